"""What the DAG files share: retries, assets, and links from a task to what it made."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from airflow.sdk import (
    Asset,
    BaseOperator,
    BaseOperatorLink,
    ExceptionRetryPolicy,
    RetryAction,
    RetryRule,
)

from gun_detection.errors import TransientError

# A dead worker is noticed by its heartbeat and tried again; an error only if it may pass.
DEFAULT_ARGS: dict[str, Any] = {
    "owner": "gun-detection",
    "retries": 3,
    "retry_delay": timedelta(seconds=15),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ExceptionRetryPolicy(
        rules=[RetryRule(TransientError, RetryAction.RETRY, reason="a server may be back by then")],
        default=RetryAction.FAIL,
    ),
}

TRAINING_DATA = Asset("training_data", uri="gun-detection://training-data", group="gun-detection")
CHAMPION = Asset("champion", uri="gun-detection://champion", group="gun-detection")
DETECTIONS = Asset("detections", uri="gun-detection://detections", group="gun-detection")

_EVERY = 5.0


class ReportLink(BaseOperatorLink):
    """The report that the task stored."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "report_url")


class TensorBoardLink(BaseOperatorLink):
    """The training run in TensorBoard."""

    name = "TensorBoard"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "tensorboard_url")


def _returned(ti: Any, name: str) -> str:
    # Called in the task's own process after its end: `ti` is the running task instance.
    result = ti.xcom_pull(task_ids=ti.task_id, key="return_value", map_indexes=ti.map_index)
    return str((result or {}).get(name) or "")


def progress_log(task: str) -> Callable[..., None]:
    """A function of (done, total) that writes a line into the task's log every few seconds."""
    logger = logging.getLogger("gun_detection.progress")
    started = last = time.monotonic()

    def report(done: int, total: int, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _EVERY and done < total:
            return
        last = now
        left = (now - started) / max(done, 1) * (total - done)
        rate = done / max(now - started, 1e-9)
        logger.info("%s %d/%d%s, %.1f/s, %.0f s left", task, done, total, text, rate, left)

    return report
