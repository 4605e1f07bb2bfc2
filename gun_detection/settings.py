"""Every setting of the library, typed, read from `GUN_DETECTION_…` environment variables.

`docs/settings.md` is generated from this file by `python -m gun_detection.settings`.
"""

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gun_detection.errors import SettingsError

PREFIX = "GUN_DETECTION_"

# Bounds of durations, in seconds: neither timers nor calendars go on for ever.
_HOUR, _DAY, _YEAR = 3600, 24 * 3600, 365 * 24 * 3600


class Settings(BaseSettings):
    """Where things are, what limits hold and what the defaults of each stage are."""

    # An empty variable is how Compose and Kubernetes say that something is not set.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    # Where things are
    home: Path = Field(
        Path.home() / ".gun-detection", description="Folder for caches, TensorBoard runs and logs."
    )
    database_url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL of the PostgreSQL database, "
        "for example `postgresql://user:password@host/gun_detection`, with `%40`, `%3A` and `%2F` "
        "for any `@`, `:` and `/` in the password.",
    )
    s3_endpoint_url: str | None = Field(
        None, description="URL of the S3-compatible server; unset means AWS."
    )
    s3_region: str = Field("us-east-1", description="Region that requests are signed for.")
    s3_access_key_id: str | None = Field(
        None, description="Access key; unset means boto3's own chain (profile, instance role …)."
    )
    s3_secret_access_key: SecretStr | None = Field(
        None, description="Secret that belongs to the access key; set both or neither."
    )
    data_bucket: str = Field(
        "gun-detection-data", description="Bucket for data sets, models, shards and reports."
    )
    uploads_bucket: str = Field("uploads", description="Bucket that teams upload pictures to.")
    public_url: str = Field(
        "http://127.0.0.1:8080", description="Where people open the Airflow UI; used in links."
    )
    tensorboard_url: str | None = Field(
        None, description="Where people open TensorBoard; used in links."
    )

    # Pictures
    max_image_pixels: int = Field(
        50_000_000,
        gt=0,
        description="Largest picture that is decoded, in pixels (from its header).",
    )
    max_image_bytes: int = Field(
        64 * 2**20, gt=0, description="Largest file that is read as a picture, in bytes."
    )
    min_image_side: int = Field(
        16, gt=0, description="Pictures with a shorter side are refused as `TOO_SMALL`, in pixels."
    )
    decode_timeout: float = Field(
        20.0, gt=0, le=_HOUR, description="Longest time that one decode may take, in seconds."
    )
    decode_memory_mb: int = Field(
        2048, ge=256, description="Address space of the decoding process, in MiB."
    )

    # Data sets
    dataset_source: str = Field(
        "synthetic",
        description="Default source: `synthetic`, `kaggle[:owner/name]`, `s3://bucket/prefix`, "
        "or the path of a folder or an archive.",
    )
    dataset_reject_budget: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of images or boxes that may be rejected before the set is.",
    )
    validation_share: float = Field(
        0.15, gt=0, lt=1, description="Share of image groups used for validation."
    )
    holdout_share: float = Field(
        0.25, gt=0, lt=1, description="Share of image groups frozen as the holdout."
    )

    # Training
    training_preset: str = Field(
        "demo", description="Named recipe: `smoke`, `demo`, `cpu`, `gpu` or `seed`."
    )
    architecture: str | None = Field(
        None, description="Detector architecture instead of the preset's own."
    )
    initial_weights: str | None = Field(
        None,
        description="`coco`, `imagenet`, `none`, or the path or S3 URI of a weights file, "
        "instead of the preset's own.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the detector runs; `auto` takes a GPU when there is one."
    )
    training_processes: int | None = Field(
        None,
        gt=0,
        description="Processes that train one model together; unset: one for each GPU, "
        "one on a CPU.",
    )
    training_workers: int | None = Field(
        None,
        ge=0,
        description="Processes that read training pictures, for each training process; unset: up "
        "to 8 beside a GPU, none on a CPU.",
    )
    pixel_cache_gb: float = Field(
        20.0,
        ge=0,
        description="Largest size of the cache of decoded training pictures in `HOME`, in GB.",
    )

    # Release
    gate_policy: str = Field(
        "standard",
        description="Rules of the gate: `standard`, `trial`, or the path of a YAML file.",
    )
    promotion: Literal["auto", "approve", "manual"] = Field(
        "auto",
        description="What happens to a candidate that passed: `auto` promotes it, `approve` asks "
        "a person in the Airflow UI, `manual` leaves it to `gun-detection promote`.",
    )
    approval_hours: float = Field(
        24.0,
        gt=0,
        le=_YEAR / 3600,
        description="How long a person is waited for, a year at most; no answer is a rejection.",
    )
    keep_models: int = Field(
        10,
        ge=1,
        description="Newest model versions whose weights are kept; champions' always are.",
    )

    # Scoring
    sources_file: Path | None = Field(
        None,
        description="YAML file of the buckets to score, each with its own prefix, patterns, "
        "partitions and caps (docs/scoring.md); unset: all of `UPLOADS_BUCKET`.",
    )
    watch_seconds: float = Field(
        20.0,
        ge=0,
        # After an hour without a look, people are told that nobody looks.
        le=_HOUR / 2,
        description="Pause between two looks for new uploads, half an hour at most; 0: they wait "
        "for the night.",
    )
    since: datetime | None = Field(
        None,
        description="When the platform was made, in UTC: of the runs by the clock that were missed "
        "since then, each DAG makes up for the last. Without it, not before its first run.",
    )
    late_hours: float = Field(
        6.0,
        ge=0,
        le=_YEAR / 3600,
        description="After so long, a year at most, a run that scores or ingests is late, which is "
        "told like a failure; 0: never.",
    )
    engine: Literal["auto", "eager", "cuda", "openvino-f32", "openvino-bf16", "openvino-int8"] = (
        Field(
            "auto",
            description="What runs the detector in scoring; `auto` takes the fastest that was "
            "checked against the reference on the holdout and that the machine can run.",
        )
    )
    score_floor: float = Field(
        0.05, ge=0, le=1, description="Detections with a lower score are not stored."
    )
    run_images: int = Field(
        100_000,
        gt=0,
        description="Most pictures of one scoring run; what is left over waits for the next.",
    )
    rescore_images: int = Field(
        10_000, ge=0, description="Most pictures of one run that scores history again."
    )
    confirm_images: int = Field(
        50_000,
        gt=0,
        description="A run over more pictures asks a person first; without an answer only so many "
        "are scored, and the rest waits for the next run.",
    )
    confirm_minutes: float = Field(
        60.0,
        gt=0,
        le=_YEAR / 60,
        description="How long that answer is waited for, a year at most.",
    )
    shard_images: int = Field(
        2500, gt=0, description="Pictures in one shard, as long as there are few shards."
    )
    shard_mb: int = Field(
        512, gt=0, description="MiB of pictures in one shard, as long as there are few shards."
    )
    max_shards: int = Field(
        32, gt=0, le=256, description="Most shards of one run; in a larger run each grows."
    )
    shard_minutes: float = Field(
        5.0,
        ge=0,
        le=_DAY / 60,
        description="A shard is made larger, up to 20 times, where by earlier ones it would take "
        "less.",
    )
    scoring_tasks: int = Field(
        2, gt=0, description="Shards that are scored at the same time, over all machines."
    )
    scoring_queue: str = Field(
        "default",
        description="Queue of the workers that score, and make a champion ready for it: `gpu` "
        "where those that train score as well (docs/deployment.md).",
    )
    worker_cost_per_hour: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Price of one scoring worker for an hour, in your currency; for estimates.",
    )
    readers: int = Field(16, gt=0, description="Objects that one worker reads at the same time.")
    memory_mb: int = Field(
        512,
        ge=64,
        description="MiB of files and pixels that one worker holds at the same time, besides "
        "the detector; on a GPU more, where full batches need it (docs/scoring.md).",
    )
    scoring_failure_budget: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of a run's pictures, and of an hour's and a day's, that may be "
        "quarantined before it fails.",
    )
    scoring_failure_count: int = Field(
        10,
        ge=0,
        description="Quarantined pictures of a run, and of an hour or a day, that never fail one, "
        "whatever their share.",
    )
    shard_lease_seconds: int = Field(
        900, ge=30, le=_DAY, description="How long a silent worker keeps its shard, in seconds."
    )

    # Predict service
    serve_host: str = Field("127.0.0.1", description="Address that the predict service binds.")
    serve_port: int = Field(8000, ge=0, le=65535, description="Its port.")
    serve_workers: int = Field(
        1, gt=0, description="Its processes; each has a model of its own and uses all cores."
    )
    serve_model: str = Field(
        "champion",
        description="What it serves: `champion`, which follows every promotion and rollback, or "
        "the path of a .safetensors or .pth file.",
    )
    serve_threshold: float | None = Field(
        None, ge=0, le=1, description="Score threshold instead of the model's own."
    )
    serve_refresh_seconds: float = Field(
        10.0, gt=0, le=_DAY, description="Pause between two looks for another champion."
    )
    serve_max_bytes: ByteSize = Field(
        ByteSize(10 * 2**20),
        ge=2**14,
        description="Largest picture that it takes, in bytes, or as in `10MB`.",
    )
    serve_batch_images: int = Field(16, gt=0, description="Most pictures of one batch request.")
    serve_queue: int = Field(
        64,
        gt=0,
        description="Pictures under way in one process; beyond them the answer is 503.",
    )
    serve_timeout: float = Field(
        30.0,
        gt=0,
        le=_HOUR,
        description="Longest time from a request's last byte to its answer, in seconds.",
    )
    serve_body_seconds: float = Field(
        20.0,
        gt=0,
        le=_HOUR,
        description="Longest time that a request may take to arrive, in seconds.",
    )
    serve_anonymous: bool = Field(
        False, description="Whether it answers without an API key (see `gun-detection keys`)."
    )
    serve_keys: SecretStr | None = Field(
        None, description="API keys, as `gun-detection keys new` prints their entries."
    )
    serve_keys_file: Path | None = Field(
        None,
        description="File with an entry on each line, read again when it changes; unset: "
        "`api-keys` in `HOME`.",
    )
    serve_rate_limit: str = Field(
        "10/minute", description="Pictures of one client, one limit as in `10/minute`, or `off`."
    )
    serve_rate_store: SecretStr | None = Field(
        None,
        description="Where several machines count them, `redis://host`; unset: each by itself.",
    )
    serve_trusted_proxies: str = Field(
        "",
        description="Addresses or networks, with commas between, whose `X-Forwarded-For` is "
        "believed.",
    )
    serve_cors_origins: str = Field(
        "", description="Origins, with commas between, whose pages may call it from a browser."
    )
    serve_store: Literal["never", "asked", "always"] = Field(
        "never",
        description="Whether pictures go to `UPLOADS_BUCKET`, where scoring finds them: `asked` "
        "stores those of requests with `store=true`.",
    )

    # Logging
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe message that is logged."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="`text` for key=value lines, `json` for one JSON object a line."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            missing = (
                "S3_ACCESS_KEY_ID" if self.s3_access_key_id is None else "S3_SECRET_ACCESS_KEY"
            )
            raise ValueError(f"{PREFIX}{missing} is missing: set both S3 credentials or neither")
        if self.validation_share + self.holdout_share >= 1:
            raise ValueError(
                f"{PREFIX}VALIDATION_SHARE and {PREFIX}HOLDOUT_SHARE leave nothing to train on: "
                "their sum must be below 1"
            )
        if self.data_bucket == self.uploads_bucket:
            raise ValueError(f"{PREFIX}DATA_BUCKET and {PREFIX}UPLOADS_BUCKET must differ")
        return self

    @property
    def tensorboard_dir(self) -> Path:
        return self.home / "tensorboard"

    def to_environment(self) -> dict[str, str]:
        """The variables that give a child process these settings, secrets included."""
        values = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in self
        }
        return {PREFIX + name.upper(): str(v) for name, v in values.items() if v is not None}


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the environment once more, or another one that is to win over this process's own.

    Raises `SettingsError` naming the variable at fault.
    """
    found = os.environ if environment is None else environment
    given = {name: value for name, value in found.items() if name.upper().startswith(PREFIX)}
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in given if name.upper() not in known)
    if unknown:
        raise SettingsError(
            f"unknown setting {unknown[0]}: remove it or correct its name (docs/settings.md)"
        )
    try:
        return Settings.model_validate(
            {
                name.upper().removeprefix(PREFIX).lower(): value
                for name, value in given.items()
                if value
            }
        )
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """One line for the first fault, without the value (it may be a secret)."""
    first = error.errors(include_input=False, include_url=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return text
    return f"{PREFIX}{str(first['loc'][0]).upper()}: {text}"


def settings_table() -> str:
    """The documentation of every setting as a Markdown table."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        default = default.replace(str(Path.home()), "~")
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Settings\n")
    print("Generated by `python -m gun_detection.settings`; read from the environment.")
    print("One that is empty has its default.\n")
    print(settings_table())
