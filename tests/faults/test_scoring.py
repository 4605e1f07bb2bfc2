"""Processes, servers and pictures that fail while a shard is scored.

After each: every planned upload has exactly one outcome by the pinned model, with the detections
of an undisturbed run, nothing doubled and nothing lost.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.detector.detections import Detections
from gun_detection.errors import (
    ServiceUnavailableError,
    StaleAttemptError,
    TerminalError,
    TransientError,
)
from gun_detection.images import DecodeLimits, decode
from gun_detection.scoring import pipeline, supervise
from gun_detection.scoring.leases import claim_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.faults.conftest import PICTURES, check
from tests.scoring.conftest import count, outcomes, picture, rows, upload
from tests.scoring.simulated import Simulated

POINTS = ("lease", "read", "decode", "infer", "copy", "upsert", "written", "acknowledge")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_worker_that_dies_is_followed_by_one_that_ends_its_work(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    number: signal.Signals,
) -> None:
    marker = tmp_path / "died"
    # In the middle of the shard, where there is one.
    nth = {"read": 40, "decode": 40, "infer": 40, "copy": 2, "upsert": 2, "written": 2}.get(
        point, 1
    )
    fault = {"point": point, "signal": number, "nth": nth, "marker": str(marker)}
    monkeypatch.setenv("FAULT", json.dumps(fault))
    supervise.score_shard(settings, shard)
    assert marker.exists(), "nothing died"
    check(settings, pictures)
    [(run_id, attempt)] = rows(settings, "SELECT run_id, attempt FROM shard")
    assert attempt == 2
    assert finish_run(run_id, settings).scored == PICTURES - 1


def test_a_worker_that_hangs_is_ended_and_followed(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    marker = tmp_path / "stopped"
    fault = {"point": "infer", "signal": signal.SIGSTOP, "nth": 40, "marker": str(marker)}
    monkeypatch.setenv("FAULT", json.dumps(fault))
    supervise.score_shard(settings.model_copy(update={"shard_lease_seconds": 30}), shard)
    assert marker.exists(), "nothing stopped"
    assert "died (silent for 30 s)" in caplog.text
    check(settings, pictures)


def test_a_picture_that_kills_is_quarantined_and_the_shard_goes_on(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = decode(pictures["n30"], DecodeLimits.from_settings(settings)).pixels
    monkeypatch.setenv("POISON", hashlib.sha256(pixels.tobytes()).hexdigest())
    supervise.score_shard(settings, shard)
    assert rows(
        settings,
        "SELECT u.key, l.reason, l.sha256 FROM ledger l JOIN upload u ON "
        "u.id = l.upload_id WHERE l.reason <> 'NOT_IMAGE'",
    ) == [("n30.jpg", "CRASHED", hashlib.sha256(pictures["n30"]).hexdigest())]
    assert count(settings, "ledger") == PICTURES
    assert rows(settings, "SELECT attempt FROM shard") == [(4,)], "three deaths, then the end"


def test_the_same_bytes_kill_no_more_than_one_picture_does(
    drive: None,
    plan: Callable[..., Plan],
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = picture(1)
    pixels = decode(bad, DecodeLimits.from_settings(settings)).pixels
    monkeypatch.setenv("POISON", hashlib.sha256(pixels.tobytes()).hexdigest())
    upload(storage, settings, **{f"bad{number}": bad for number in range(8)})
    upload(storage, settings, **{f"good{number}": picture(10 + number) for number in range(3)})
    [shard] = plan().shard_ids
    supervise.score_shard(settings, shard)
    found = outcomes(settings)
    assert {name for name, outcome in found.items() if outcome == "scored"} == {
        f"good{number}" for number in range(3)
    }
    assert [found[f"bad{number}"] for number in range(8)] == ["CRASHED"] * 8
    assert rows(settings, "SELECT attempt FROM shard") == [(4,)], "three deaths, then the end"


def test_more_pictures_that_kill_than_can_be_keep_nothing_newer_waiting(
    shard: int,
    plan: Callable[..., Plan],
    settings: Settings,
    storage: Storage,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervise, "_MOST_CONDEMNED", 1)
    deadly = ("n10", "n11", "n12")
    limits = DecodeLimits.from_settings(settings)
    pixels = [decode(pictures[name], limits).pixels.tobytes() for name in deadly]
    monkeypatch.setenv("POISON", ",".join(hashlib.sha256(data).hexdigest() for data in pixels))
    with pytest.raises(TerminalError, match="more than bad pictures"):
        supervise.score_shard(settings, shard)
    upload(storage, settings, new=picture(PICTURES))
    [following] = plan().shard_ids
    with pytest.raises(TerminalError, match="more than bad pictures"):
        supervise.score_shard(settings, following)
    assert outcomes(settings)["new"] == "scored"
    assert {key for (key,) in rows(settings, "SELECT key FROM unscored_uploads")} == {
        f"{name}.jpg" for name in deadly
    }


def test_a_worker_that_dies_before_it_gets_anywhere_is_not_started_for_ever(
    shard: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        supervise,
        "_command",
        lambda *_, **__: [sys.executable, "-c", "import sys; sys.exit('no such driver')"],
    )
    with pytest.raises(TransientError, match=r"exit code 1(.|\n)*no such driver") as caught:
        supervise.score_shard(settings, shard)
    assert caught.value.reason == "WORKER_LOST"
    assert count(settings, "ledger") == 0


def test_a_worker_that_dies_of_every_picture_is_no_matter_of_pictures(
    shard: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_MOST_CONDEMNED", 1)
    monkeypatch.setenv("POISON", "*")
    with pytest.raises(TerminalError, match="more than bad pictures"):
        supervise.score_shard(settings, shard)
    states = (
        "SELECT DISTINCT stale, deferred FROM ledger LEFT JOIN pending_upload USING (upload_id)"
    )
    assert rows(settings, states) == [(True, True)]


def test_what_the_worker_raises_is_raised_and_its_lease_is_free(
    shard: int, settings: Settings, storage: Storage
) -> None:
    missing = settings.model_copy(
        update={"s3_secret_access_key": type(settings.s3_secret_access_key)("wrong")}
    )
    with pytest.raises(TerminalError) as caught:
        supervise.score_shard(missing, shard)
    assert caught.value.reason == "ACCESS_DENIED"
    assert rows(settings, "SELECT lease_until, crashes FROM shard") == [(None, 0)]


def test_the_whole_task_is_killed_and_the_next_ends_its_work(
    shard: int, settings: Settings, pictures: dict[str, bytes]
) -> None:
    code = (
        "from gun_detection.scoring import supervise; import sys; "
        "supervise._command = lambda shard, *, take_over: [sys.executable, '-m', "
        "'tests.faults.driver', str(shard), '--take-over']; "
        "from gun_detection.settings import load_settings; "
        f"supervise.score_shard(load_settings(), {shard})"
    )
    task = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    deadline = time.monotonic() + 300
    while not rows(settings, "SELECT 1 FROM shard WHERE attempt > 0"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    task.kill()
    task.wait()
    supervise.score_shard(settings, shard, take_over=True)
    check(settings, pictures)


class Lingering(Simulated):
    """Leaves half of the pictures for the time when a later attempt is at work."""

    def __init__(self, attempt: int, settings: Settings) -> None:
        super().__init__(seconds=0.3, streams=1)
        self.begun = threading.Event()
        self._attempt, self._own = attempt, settings

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        self.begun.set()
        if self.pictures >= PICTURES // 2:
            deadline = time.monotonic() + 300
            while rows(self._own, "SELECT attempt FROM shard") == [(self._attempt,)]:
                assert time.monotonic() < deadline, "no other attempt has begun"
                time.sleep(0.05)
        return super().__call__(images)


def test_two_attempts_alive_write_everything_once(
    shard: int, settings: Settings, storage: Storage, pictures: dict[str, bytes]
) -> None:
    first = claim_shard(shard, settings)
    engine = Lingering(first.attempt, settings)
    errors: list[BaseException] = []

    def zombie() -> None:
        try:
            pipeline.score_shard(first, engine, settings, storage)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=zombie)
    thread.start()
    assert engine.begun.wait(300)
    supervise.score_shard(settings, shard, take_over=True)
    thread.join(300)
    assert [type(error) for error in errors] == [StaleAttemptError]
    check(settings, pictures)


def test_a_database_that_restarts_loses_nothing(
    shard: int,
    settings: Settings,
    storage: Storage,
    pictures: dict[str, bytes],
) -> None:
    """Every connection is cut again and again while the shard is written."""
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.3):
            with open_session(settings) as session:
                session.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        for attempt in range(20):
            try:
                supervise.score_shard(settings, shard, take_over=attempt > 0)
                break
            except ServiceUnavailableError:
                continue
    finally:
        stop.set()
        thread.join()
    supervise.score_shard(settings, shard, take_over=True)
    check(settings, pictures)


def test_objects_that_are_replaced_or_deleted_meanwhile_have_an_outcome(
    shard: int, settings: Settings, storage: Storage
) -> None:
    storage.delete(settings.uploads_bucket, "n05.jpg")
    upload(storage, settings, n06=b"other bytes")
    supervise.score_shard(settings, shard)
    assert rows(
        settings,
        "SELECT key, reason FROM quarantine WHERE key IN ('n05.jpg', 'n06.jpg') ORDER BY key",
    ) == [("n05.jpg", "OBJECT_MISSING"), ("n06.jpg", "OBJECT_CHANGED")]
    assert count(settings, "ledger") == PICTURES
