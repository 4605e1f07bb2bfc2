"""The processes: uvicorn, with a limit on the time that a request's head or an answer may take."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gun_detection.database import open_session
from gun_detection.errors import ServiceUnavailableError
from gun_detection.logs import configure_logging
from gun_detection.release.registry import open_file
from gun_detection.scratch import scratch
from gun_detection.serving.app import create_app
from gun_detection.serving.frame import MOST_HEAD_BYTES
from gun_detection.serving.keys import KeyRing
from gun_detection.serving.limits import RateLimit
from gun_detection.serving.metrics import forget_dead_processes
from gun_detection.serving.models import follows_champion
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
_HEAD_SECONDS = 10.0
# How long a client may take nothing of its answer.
_ANSWER_SECONDS = 20.0
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


class Protocol(H11Protocol):
    """Closes a connection whose next request does not begin, or whose head does not end, in time.

    So it does with one whose answer is not read. uvicorn alone would wait for ever: a few hundred
    such connections keep everybody out.
    """

    _timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing is paused as soon as anything waits, however little.
        transport.set_write_buffer_limits(0)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_answer_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._stop_answer_timer()
        super().resume_writing()

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(_ANSWER_SECONDS, self._look_at_reading, left)

    def _look_at_reading(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._expect_reading()
        else:
            self.transport.abort()

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None


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
        uvicorn.run(
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


def application() -> FastAPI:
    """What each process makes of the environment."""
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
