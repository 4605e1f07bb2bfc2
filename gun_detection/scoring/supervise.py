"""Scores a shard in a process of its own, and starts the next when that one dies.

A picture can kill what looks at it (a crash in native code, more memory than there is), or keep it
for good. The process that died, or had to be killed, is followed by one that is careful, and a
picture of which two die alone is quarantined; the shard goes on. See `leases` for how it is told.
"""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import Text, cast, func, select

from gun_detection.children import Ended, run_child
from gun_detection.database import open_session
from gun_detection.database.models import LedgerEntry, ScoringRun, Shard
from gun_detection.errors import TerminalError, TransientError, explain_os_error
from gun_detection.scoring.quarantine import TRIES, retry
from gun_detection.scratch import scratch
from gun_detection.settings import Settings

logger = logging.getLogger(__name__)

_LAST_LINES = 15
# Beyond this it is not the pictures.
_MOST_CONDEMNED = 5
# Deaths in a row after which nothing has changed.
_MOST_IDLE = 2
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# A driver in trouble keeps whoever asks it.
_DRIVER_SECONDS = 30


def score_shard(
    settings: Settings,
    shard_id: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    take_over: bool = False,
) -> dict[str, Any]:
    """Score what is left to do in one shard; its figures (`stats.Meter.stats`).

    Raises what the worker raised; `TransientError` when it dies before it gets anywhere, and
    `TerminalError` when it dies of more pictures than can be bad.
    """
    idle = 0
    state = _state(shard_id, settings)
    while True:
        ended = _run_worker(settings, shard_id, on_progress, take_over=take_over)
        if ended.error is not None:
            raise ended.error
        if ended.result is not None:
            result: dict[str, Any] = ended.result
            return result
        before, state = state, _state(shard_id, settings)
        idle = idle + 1 if state == before else 0
        end = "\n".join(ended.lines[-_LAST_LINES:])
        cause = (
            f"silent for {settings.shard_lease_seconds} s" if ended.silent else _cause(ended.code)
        )
        message = f"the process that scores shard {shard_id} died ({cause})"
        logger.warning("%s; the end of its log:\n%s", message, end)
        if idle >= _MOST_IDLE:
            raise TransientError(
                f"{message} before it got anywhere; the end of its log:\n{end}",
                reason="WORKER_LOST",
            )
        if state.condemned > _MOST_CONDEMNED:
            _acquit(shard_id, settings)
            raise TerminalError(
                f"{message}, as others did of {state.condemned} pictures: this is more than bad "
                f"pictures, which wait to be looked at anew; the end of its log:\n{end}",
                reason="WORKER_CRASHES",
            )
        take_over = True


def _run_worker(
    settings: Settings,
    shard_id: int,
    on_progress: Callable[[int, int], None],
    *,
    take_over: bool,
) -> Ended:
    try:
        with scratch(settings, "shard") as folder:
            return run_child(
                _command(shard_id, take_over=take_over),
                folder,
                _environment(settings, shard_id),
                lambda progress: on_progress(progress["done"], progress["total"]),
                # Then another attempt may have the shard, and this one is of no more use.
                patience=settings.shard_lease_seconds,
            )
    except OSError as error:
        # A disk that is full may have room by the next attempt.
        raise TransientError(explain_os_error(error), reason="OS_ERROR") from error


class _State(tuple[int, int | None, int, int]):
    """(outcomes, suspect, its crashes, condemned) of a shard: whether an attempt got anywhere."""

    __slots__ = ()

    @property
    def condemned(self) -> int:
        return self[3]


def _state(shard_id: int, settings: Settings) -> _State:
    with open_session(settings) as session:
        shard = session.get(Shard, shard_id)
        if shard is None:
            return _State((0, None, 0, 0))
        run = session.get_one(ScoringRun, shard.run_id)
        mine = (
            LedgerEntry.model_id == run.model_id,
            LedgerEntry.upload_id.in_(select(func.unnest(shard.upload_ids))),
            LedgerEntry.stale.is_(False),
        )
        # The same bytes, as of a camera without a signal, are one bad picture.
        picture = func.coalesce(LedgerEntry.sha256, cast(LedgerEntry.upload_id, Text))
        condemned = func.count(picture.distinct()).filter(LedgerEntry.reason == "CRASHED")
        done, crashed = session.execute(select(func.count(), condemned).where(*mine)).one()
        return _State((done, shard.suspect_id, shard.suspect_crashes, crashed))


def _acquit(shard_id: int, settings: Settings) -> None:
    """Have the pictures judged anew that this shard's processes died of: there were too many.

    Those that were condemned by several runs are not acquitted any more.
    """
    with open_session(settings) as session:
        shard = session.get_one(Shard, shard_id)
        crashed = session.scalars(
            select(LedgerEntry.upload_id).where(
                LedgerEntry.upload_id.in_(select(func.unnest(shard.upload_ids))),
                LedgerEntry.run_id == shard.run_id,
                LedgerEntry.reason == "CRASHED",
                LedgerEntry.tries < TRIES,
            )
        )
        retry(session, list(crashed))


def _command(shard_id: int, *, take_over: bool) -> list[str]:
    module = [sys.executable, "-m", "gun_detection.scoring.worker", str(shard_id)]
    return [*module, "--take-over"] if take_over else module


def _environment(settings: Settings, shard_id: int) -> dict[str, str]:
    """Several threads look at a picture each: threads within one would only get in their way.

    Of several GPUs it sees one, as it would take the first. Those at work at the same time have
    shards of successive ids, and so different ones. Who says which are to be seen is obeyed.
    """
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | settings.to_environment()
    if _VISIBLE not in os.environ and len(gpus := _gpus()) > 1:
        environment[_VISIBLE] = gpus[shard_id % len(gpus)]
    return environment


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that are to be seen here; none without a driver.

    Of one that is split into instances (MIG), those. PyTorch is not asked: this process would
    hold memory of a GPU from then on.
    """
    query = ["nvidia-smi", "-L"]
    try:
        # Where one of several is lost it lists the others, and fails.
        listed = subprocess.run(
            query, capture_output=True, text=True, check=False, timeout=_DRIVER_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: list[list[str]] = []
    for kind, uuid in re.findall(r"^ *(GPU|MIG) .*\(UUID: (\S+)\)$", listed, re.MULTILINE):
        if kind == "GPU":
            found.append([uuid])
        elif found:
            found[-1].append(uuid)
    return [name for gpu, *parts in found for name in parts or [gpu]]


def _cause(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
