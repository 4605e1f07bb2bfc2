"""Logging through the standard library: key=value or JSON lines, and a daily-rotated file."""

import logging
import sys
from logging.handlers import TimedRotatingFileHandler
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from gun_detection.settings import Settings
from gun_detection.text import printable, printable_lines

# The last one is uvicorn's: the message once more, with colours.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T02:00:00 INFO gun_detection.training message key=value …` in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        # Messages quote keys of objects and names of files.
        line = printable_lines(super().format(record))
        return line + "".join(f" {key}={_quote(value)}" for key, value in extra.items())


def _quote(value: Any) -> str:
    text = printable(f"{value:.6g}" if isinstance(value, float) else str(value))
    return f'"{text}"' if " " in text or not text else text


def configure_logging(settings: Settings, *, file: bool = True) -> None:
    """Send the package's messages to standard error and, with `file`, to a file rotated daily.

    For runs outside Airflow; inside it the task log takes what the library says.
    """
    formatter: logging.Formatter
    if settings.log_format == "json":
        formatter = JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    else:
        formatter = KeyValueFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file:
        folder = settings.home / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(
            TimedRotatingFileHandler(
                folder / "gun-detection.log", when="midnight", backupCount=30, utc=True
            )
        )
    logger = logging.getLogger("gun_detection")
    for handler in handlers:
        handler.setFormatter(formatter)
    logger.handlers[:] = handlers
    logger.setLevel(settings.log_level)
    logger.propagate = False
