"""Checks of a set-up, each with what to do when it fails."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.errors import GunDetectionError, TerminalError
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
        _check("detector", _detector),
        _check("disk", lambda: _disk(settings)),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except GunDetectionError as error:
        return Check(name, False, error.message)
    except Exception as error:
        # One that nobody foresaw is no reason to leave out the other checks.
        return Check(name, False, f"{type(error).__name__}: {error}")


def _database(settings: Settings) -> str:
    with open_session(settings) as session:
        version = session.scalar(text("SHOW server_version"))
        champion = session.execute(text("SELECT model_id FROM current_champion")).scalar()
    return f"PostgreSQL {version}, schema is current, champion: {champion or 'none yet'}"


def _storage(settings: Settings) -> str:
    storage = Storage(settings)
    missing = [
        bucket
        for bucket in (settings.data_bucket, settings.uploads_bucket)
        if not storage.bucket_exists(bucket)
    ]
    where = settings.s3_endpoint_url or "AWS S3"
    buckets = f"buckets still to be made: {', '.join(missing)}" if missing else "buckets are there"
    return f"{where}, {buckets}"


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
