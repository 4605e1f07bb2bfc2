"""Checks of a set-up, each with what to do when it fails."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.errors import GunDetectionError, NotFoundError, TerminalError
from gun_detection.scoring.sources import load_sources
from gun_detection.settings import Settings
from gun_detection.storage import Storage

_MIN_FREE_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    check: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Check]:
    """Look at everything, also after something was found wrong."""
    return [
        _check("database", lambda: _database(settings)),
        _check("storage", lambda: _storage(settings)),
        _check("uploads", lambda: _uploads(settings)),
        _check("policy", lambda: _policy(settings)),
        _check("recipe", lambda: _recipe(settings)),
        _check("detector", _detector),
        _check("disk", lambda: _disk(settings)),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except GunDetectionError as error:
        detail = error.message
    except Exception as error:
        # One that nobody foresaw is no reason to leave out the other checks.
        detail = f"{type(error).__name__}: {error}"
    return Check(name, False, " ".join(detail.split()))


def _database(settings: Settings) -> str:
    with open_session(settings) as session:
        version = session.scalar(text("SHOW server_version"))
        champion = session.execute(text("SELECT model_id FROM current_champion")).scalar()
    return f"PostgreSQL {version}, schema is current, champion: {champion or 'none yet'}"


def _storage(settings: Settings) -> str:
    bucket = settings.data_bucket
    there = Storage(settings).bucket_exists(bucket)
    state = "is there" if there else "is still to be made, by the first ingest"
    return f"{settings.s3_endpoint_url or 'AWS S3'}, the data bucket {bucket} {state}"


def _uploads(settings: Settings) -> str:
    buckets = list(dict.fromkeys(source.bucket for source in load_sources(settings)))
    storage = Storage(settings)
    missing = [bucket for bucket in buckets if not storage.bucket_exists(bucket)]
    if missing:
        named = "SOURCES_FILE" if settings.sources_file else "UPLOADS_BUCKET"
        raise NotFoundError(
            f"buckets that do not exist: {', '.join(missing)}; create them, or name others in "
            f"GUN_DETECTION_{named}",
            reason="BUCKET_MISSING",
        )
    return f"in {', '.join(buckets)}"


def _policy(settings: Settings) -> str:
    from gun_detection.release.policy import load_policy

    policy = load_policy(settings.gate_policy)
    return f"the gate judges by {policy.name}, {len(policy.rules)} rules"


def _recipe(settings: Settings) -> str:
    from gun_detection.training.config import resolve_config

    config = resolve_config(settings)
    network, weights = config.detector.architecture, config.initial_weights
    return f"{settings.training_preset}: {network} that starts from {weights}"


def _detector() -> str:
    import torch

    if torch.cuda.is_available():
        return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads"


def _disk(settings: Settings) -> str:
    settings.home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.home).free
    detail = f"{free / 2**30:.1f} GiB free at {settings.home}"
    if free < _MIN_FREE_BYTES:
        raise TerminalError(f"{detail}: make room, 1 GiB at least")
    return detail
