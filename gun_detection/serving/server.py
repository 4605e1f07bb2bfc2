"""The processes: uvicorn, and what keeps them from ever answering."""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from gun_detection.children import end_with_parent
from gun_detection.database import open_session
from gun_detection.errors import ServiceUnavailableError, SettingsError
from gun_detection.logs import configure_logging
from gun_detection.release.registry import open_file
from gun_detection.scoring.sources import load_sources
from gun_detection.scratch import scratch
from gun_detection.serving.app import create_app
from gun_detection.serving.frame import MOST_HEAD_BYTES
from gun_detection.serving.keys import KeyRing
from gun_detection.serving.limits import RateLimit
from gun_detection.serving.metrics import forget_dead_processes
from gun_detection.serving.models import follows_champion
from gun_detection.serving.protocol import Protocol
from gun_detection.serving.service import STORED_KINDS, stored_key
from gun_detection.settings import PREFIX, Settings, load_settings

logger = logging.getLogger(__name__)

# The names that users of the tutorial service know, and what they stand for.
SHORT_NAMES = {
    "MODEL_PATH": "SERVE_MODEL",
    "CONFIDENCE_THRESHOLD": "SERVE_THRESHOLD",
    "MAX_IMAGE_SIZE": "SERVE_MAX_BYTES",
    "LOG_LEVEL": "LOG_LEVEL",
    "WORKERS": "SERVE_WORKERS",
}
_FOLDER = "PREDICT_SERVICE_FOLDER"
_CONNECTIONS = 1000
_STOP_SECONDS = 30
# A process says nothing while it imports and loads.
_SILENT_SECONDS = 120
# Proxies keep connections for the next request, for a minute as a rule: who hangs up first would
# make some of their requests fail.
_IDLE_SECONDS, _IDLE_SECONDS_OF_PROXIES = 5, 75


def take_short_names(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give the settings what is set under a short name only."""
    for short, long in SHORT_NAMES.items():
        value = environment.get(short)
        if value and not environment.get(PREFIX + long):
            # Other programs write this one in small letters.
            environment[PREFIX + long] = value.upper() if short == "LOG_LEVEL" else value


def run(settings: Settings) -> None:
    """Serve until a signal says to stop; requests under way get half a minute to end.

    Raises `GunDetectionError` at once for what would keep it from ever answering.
    """
    _check(settings)
    # uvicorn repeats the signal that stopped it, and this process would die before it cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Not in /tmp, where it might be deleted for its age while nobody asks.
    with scratch(settings, "serve") as folder:
        os.environ[_FOLDER] = str(folder)
        if settings.serve_workers > 1:
            # The figures' library looks at it when the processes to come import it.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        proxies = settings.serve_trusted_proxies
        config = uvicorn.Config(
            "gun_detection.serving.server:application",
            factory=True,
            host=settings.serve_host,
            port=settings.serve_port,
            workers=settings.serve_workers,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=_IDLE_SECONDS_OF_PROXIES if proxies else _IDLE_SECONDS,
            timeout_worker_healthcheck=_SILENT_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        )
        with suppress(KeyboardInterrupt):
            if config.workers > 1:
                served = _serve_in_processes(config)
            else:
                server = uvicorn.Server(config)
                server.run()
                served = server.started
            if not served:
                sys.exit(STARTUP_FAILURE)


class _Supervisor(Multiprocess):
    """uvicorn's, which notices at once that a process has died while it was asked how it is.

    As long as this process holds the other end, too, that pipe does not end with its process, and
    the answer is waited for as long as a silent one's: no other process is looked after until
    then, and no signal to stop.
    """

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()


def _serve_in_processes(config: uvicorn.Config) -> bool:
    """Whether they could start."""
    supervisor = _Supervisor(config, [config.bind_socket()])
    supervisor.run()
    return all(process.exitcode != STARTUP_FAILURE for process in supervisor.processes)


def application() -> FastAPI:
    """What each process makes of the environment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        # One that lived on would hold the port against the next start.
        end_with_parent()
        if not parent.is_alive():
            sys.exit(STARTUP_FAILURE)
    forget_dead_processes()
    settings = load_settings()
    configure_logging(settings, file=False)
    _log_uvicorn()
    return create_app(settings, Path(os.environ[_FOLDER]))


def _log_uvicorn() -> None:
    """Its messages look like ours; what a form has wrong is told to who sent it."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    logger = logging.getLogger("uvicorn")
    logger.handlers[:] = logging.getLogger("gun_detection").handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _check(settings: Settings) -> None:
    keys = KeyRing(settings)
    RateLimit(settings, None)
    threshold, floor = settings.serve_threshold, settings.score_floor
    if threshold is not None and threshold < floor:
        raise SettingsError(
            f"GUN_DETECTION_SERVE_THRESHOLD ({threshold:g}) is below GUN_DETECTION_SCORE_FLOOR "
            f"({floor:g}), below which nothing is found: raise it, or lower that one"
        )
    if settings.serve_store != "never":
        _check_scored(settings)
    if follows_champion(settings):
        # A database that is away may come back, one with another schema does not change by itself.
        with suppress(ServiceUnavailableError), open_session(settings):
            pass
    else:
        open_file(Path(settings.serve_model))
    _log_uvicorn()
    if not len(keys) and not settings.serve_anonymous:
        logger.warning(
            "there is no valid API key, so nobody will be answered: make one with `gun-detection "
            "keys new NAME`, or set GUN_DETECTION_SERVE_ANONYMOUS=true"
        )


def _check_scored(settings: Settings) -> None:
    """Raise `SettingsError` where pictures would be stored that no run looks for."""
    sources, now = load_sources(settings), datetime.now(UTC)
    for kind in STORED_KINDS:
        bucket, key = settings.uploads_bucket, stored_key("0" * 64, kind, now)
        if not any(
            source.covers(bucket, key) and key.startswith(tuple(source.prefixes(now)))
            for source in sources
        ):
            raise SettingsError(
                f"pictures are stored as s3://{bucket}/{key}, which is in no bucket of "
                f"GUN_DETECTION_SOURCES_FILE {settings.sources_file}, so that they would not be "
                "scored: let one have them, or set GUN_DETECTION_SERVE_STORE=never"
            )
