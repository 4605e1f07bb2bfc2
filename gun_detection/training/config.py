"""What a training does, as one frozen object that is stored with the model."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gun_detection.detector.architectures import DetectorConfig
from gun_detection.detector.weights import NAMED_WEIGHTS, read_weights
from gun_detection.errors import SettingsError
from gun_detection.evaluation.threshold import OperatingTarget
from gun_detection.settings import Settings
from gun_detection.storage import Storage


class Augmentation(BaseModel):
    """Random changes of the training pictures, other ones each time that a picture is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(0.5, ge=0, le=1, description="Probability of mirroring.")
    photometric: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability of each change of brightness, contrast, saturation and hue.",
    )
    zoom_out: float = Field(
        0.0, ge=0, le=1, description="Probability of setting the picture on a larger canvas."
    )
    crop: float = Field(
        0.0, ge=0, le=1, description="Probability of a crop that keeps boxes by their centres."
    )
    mosaic: float = Field(
        0.0, ge=0, le=1, description="Probability of four pictures as the tiles of one."
    )
    paste: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability of one more gun, cut out of a picture with a plain light ground.",
    )
    plain_end: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the epochs, the last ones, without paste, mosaic, zoom-out and crop.",
    )
    scales: tuple[float, ...] = Field(
        (1.0,), description="Factors on the input size; each step draws one for its whole batch."
    )


class TrainingConfig(BaseModel):
    """A recipe. The named ones are in `PRESETS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: DetectorConfig = DetectorConfig()
    initial_weights: str = Field(
        "coco", description="`coco`, `imagenet`, `none`, or a file or S3 URI of weights."
    )
    initial_weights_sha256: str | None = Field(
        None,
        description="The sha256 of that file or object, by itself what it holds when the training "
        "is asked for; other weights are refused.",
    )
    frozen_stages: int = Field(
        0, ge=0, description="Stages of the backbone, from the stem on, that do not learn."
    )

    epochs: int = Field(10, gt=0, description="Passes over the training images.")
    max_steps: int | None = Field(None, gt=0, description="Stop after so many steps.")
    batch_size: int = Field(8, gt=0, description="Pictures in a step, over all processes.")
    micro_batch: int | None = Field(
        None, gt=0, description="Pictures at a time; gradients of a step are accumulated."
    )
    group_by_aspect: bool = Field(True, description="Batches of wide, or of tall pictures.")
    source_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0: every picture once an epoch; 1: every source (folder) equally often.",
    )
    negative_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Least share of gun-free pictures in an epoch; they are repeated to reach it.",
    )
    augmentation: Augmentation = Augmentation()

    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="Update rule.")
    learning_rate: float = Field(1e-3, gt=0, description="Rate after the warm-up.")
    backbone_rate: float = Field(
        1.0, ge=0, description="Factor on the rate for the pretrained part of the backbone."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of `sgd`.")
    weight_decay: float = Field(1e-4, ge=0, description="Decay of weights.")
    schedule: Literal["cosine", "step", "constant"] = Field(
        "cosine",
        description="How the rate goes on after the warm-up; `step` divides it by ten at 70 % "
        "and again at 90 % of the steps.",
    )
    warmup_steps: int = Field(20, ge=0, description="Steps in which the rate rises from zero.")
    clip_norm: float | None = Field(10.0, gt=0, description="Largest norm of the gradient.")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of the moving average of weights that is kept."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the forward pass; `auto` is bfloat16 where the hardware has it.",
    )

    validate_every: int = Field(1, gt=0, description="Epochs from one validation to the next.")
    patience: int | None = Field(
        None, gt=0, description="Stop after so many validations without a better AP50."
    )
    checkpoint_minutes: float = Field(
        5.0, ge=0, description="Longest time between checkpoints; there is one after each epoch."
    )
    target: OperatingTarget = Field(
        OperatingTarget(), description="What the operating threshold is chosen for."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, order and augmentation.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch and self.micro_batch > self.batch_size:
            raise ValueError("micro_batch is larger than batch_size")
        if not self.augmentation.scales or min(self.augmentation.scales) <= 0:
            raise ValueError("augmentation.scales needs factors above zero")
        return self

    def hash(self) -> str:
        """The identity of the recipe: equal recipes, equal hash."""
        # What is not there has no part in it: models from before this value had keep their hash.
        absent = {"initial_weights_sha256"} if self.initial_weights_sha256 is None else set()
        return hashlib.sha256(self.model_dump_json(exclude=absent).encode()).hexdigest()


_SMALL = DetectorConfig(architecture="resnet18_fpn", norm="trainable")
_STRONG = Augmentation(
    zoom_out=0.3,
    crop=0.3,
    mosaic=0.5,
    paste=0.5,
    plain_end=0.15,
    scales=(0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
)

PRESETS: dict[str, TrainingConfig] = {
    # Seconds: shows that everything fits together, learns nothing.
    "smoke": TrainingConfig(
        detector=_SMALL,
        initial_weights="none",
        max_steps=4,
        epochs=1,
        warmup_steps=1,
    ),
    # Minutes on two cores, from nothing: enough for drawn pictures only.
    "demo": TrainingConfig(
        detector=_SMALL, initial_weights="none", epochs=6, group_by_aspect=False
    ),
    # An hour or two on two cores, for some hundred real pictures.
    "cpu": TrainingConfig(
        detector=DetectorConfig(architecture="mobilenet_v2_fpn", norm="folded", mirrored=True),
        initial_weights="imagenet",
        epochs=24,
        batch_size=4,
        learning_rate=5e-4,
        backbone_rate=0.3,
        frozen_stages=2,
        warmup_steps=200,
        clip_norm=5.0,
        ema_decay=0.997,
        augmentation=_STRONG,
        negative_share=0.2,
        validate_every=2,
        patience=4,
    ),
    "gpu": TrainingConfig(
        detector=DetectorConfig(architecture="resnet50_fpn"),
        epochs=20,
        batch_size=8,
        learning_rate=2e-4,
        backbone_rate=0.3,
        frozen_stages=1,
        warmup_steps=200,
        clip_norm=5.0,
        ema_decay=0.998,
        augmentation=_STRONG,
        negative_share=0.2,
        patience=6,
    ),
    # The well-known tutorial recipe, for comparison.
    "seed": TrainingConfig(
        detector=DetectorConfig(architecture="resnet50_fpn"),
        frozen_stages=1,
        epochs=10,
        batch_size=3,
        group_by_aspect=False,
        optimizer="adam",
        learning_rate=1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
        clip_norm=None,
        precision="float32",
        augmentation=Augmentation(flip=0.0, photometric=0.0),
        target=OperatingTarget(kind="fixed", value=0.7),
    ),
}


def resolve_config(
    settings: Settings, preset: str | None = None, overrides: dict[str, Any] | None = None
) -> TrainingConfig:
    """A preset with the settings' and then the given overrides (`detector.max_size` style names).

    Raises `SettingsError` naming the value at fault, `NotFoundError` for initial weights that are
    not there, and what reading them raises.
    """
    name = preset or settings.training_preset
    if name not in PRESETS:
        raise SettingsError(f"unknown training preset {name!r}: choose from {', '.join(PRESETS)}")
    values = PRESETS[name].model_dump()
    changes: dict[str, Any] = {}
    if settings.architecture is not None:
        changes["detector.architecture"] = settings.architecture
    if settings.initial_weights is not None:
        changes["initial_weights"] = settings.initial_weights
    for key, value in (changes | (overrides or {})).items():
        target: Any = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.get(parent) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise SettingsError(f"unknown training value {key!r}: see docs/recipes.md")
        target[last] = value
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"training value {where}: {first['msg']}") from None
    if config.initial_weights in NAMED_WEIGHTS or config.initial_weights_sha256 is not None:
        return config
    # Other weights under the same name make another model.
    data = read_weights(config.initial_weights, Storage(settings))
    sha256 = hashlib.sha256(data).hexdigest()
    return config.model_copy(update={"initial_weights_sha256": sha256})


def parse_override(text: str) -> tuple[str, Any]:
    """(`key`, value) of `key=value`, the value read as YAML; raises `SettingsError`."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise SettingsError(f"{text!r} is not an override: write key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"the value of {key} is not readable: {value!r}") from None


def read_recipe(place: str) -> dict[str, Any]:
    """The changes in a YAML file, or with `FILE:part.of.it` in that part, under dotted names.

    Raises `SettingsError` for a file or a part that is not there or holds something else.
    """
    file, _, part = place.partition(":")
    try:
        found = yaml.safe_load(Path(file).read_bytes())
    except FileNotFoundError:
        raise SettingsError(f"there is no recipe {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SettingsError(f"the recipe {file} is not readable as YAML") from None
    for name in part.split(".") if part else ():
        if not isinstance(found, dict) or name not in found:
            raise SettingsError(f"the recipe {file} has no {part!r}")
        found = found[name]
    if not isinstance(found, dict | None):
        raise SettingsError(f"the recipe {place} is not a mapping of values by their names")
    return dict(_flat(found or {}))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe_table() -> str:
    """The documentation of every value of a recipe, with those of the presets, as Markdown."""
    names = list(PRESETS)
    lines = [
        "| value | meaning | " + " | ".join(names) + " |",
        "| --- | --- | " + " | ".join("---" for _ in names) + " |",
    ]
    dumps = [config.model_dump(mode="json") for config in PRESETS.values()]
    for name, description in _described(TrainingConfig):
        values = []
        for dump in dumps:
            value: Any = dump
            for part in name.split("."):
                value = value[part]
            values.append("" if value is None else f"`{value}`")
        lines.append(f"| `{name}` | {description} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _described(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, description) of every field, those of parts included."""
    rows: list[tuple[str, str]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _described(kind, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, field.description or ""))
    return rows


_PAGE = """# Recipes of training

Generated by `python -m gun_detection.training.config`. A recipe is a preset
(`GUN_DETECTION_TRAINING_PRESET`, or `preset` in the form of `retrain`, or `--preset`) with changes:
`overrides` in the form, on the command line `--set name=value`, or `--recipe FILE` with a YAML file
of such values. The whole recipe is stored with every model that it made.

`smoke` shows in seconds that everything fits together. `demo` learns the drawn pictures from
nothing in minutes. For real pictures there are `gpu`, and `cpu` with a small detector for machines
without one ([what it reaches](accuracy.md)); both start from pretrained weights. `seed` is the
well-known tutorial recipe, for comparison.

A training that was interrupted goes on from its last checkpoint and ends as if undisturbed. A loss
that is not finite stops it with the sha256 of the pictures of that batch. A training whose loss
and gradients rise and stay up goes back to the last good checkpoint once, with a lower rate. Where
the GPU's memory is too small, steps are computed in parts, and the record says so. With several
GPUs one process for each trains the model together (`GUN_DETECTION_TRAINING_PROCESSES`).

Initial weights from a file or S3 URI count by their sha256: other weights in the same place make
another recipe. All workers have to see the file, as `check_need` reads it, too.
"""

if __name__ == "__main__":
    print(_PAGE)
    print(recipe_table())
