"""What could not be scored is listed, tried again, and taken out for a look."""

import csv
import errno
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection import stages
from gun_detection.cli import output, scoring
from gun_detection.database import open_session
from gun_detection.errors import (
    GunDetectionError,
    ServiceUnavailableError,
    SettingsError,
    explain_os_error,
)
from gun_detection.scoring import supervise
from gun_detection.scoring.leases import claim_shard, finish_shard
from gun_detection.scoring.ledger import Outcome, write_outcomes
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.quarantine import retry
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import count, outcomes, picture, rows, score_all, upload, wait_all
from tests.scoring.simulated import Simulated

Planned = Callable[..., Plan]


@pytest.fixture(autouse=True)
def bad(plan: Planned, engine: Simulated, settings: Settings, storage: Storage) -> str:
    """A run that quarantined three of four; its id."""
    upload(storage, settings, good=picture(), words=b"words", empty=b"")
    storage.put(settings.uploads_bucket, "=cmd\nnext", b"words, too")
    made = plan()
    score_all(made, settings, storage, engine)
    return made.run_id


def keys(settings: Settings, **conditions: object) -> set[str]:
    return {row["key"] for row in stages.list_quarantine(settings, **conditions)}


def test_the_quarantine_is_listed_by_reason_place_and_run(settings: Settings, bad: str) -> None:
    assert keys(settings) == {"words.jpg", "empty.jpg", "=cmd\nnext"}
    assert keys(settings, reasons=["EMPTY"]) == {"empty.jpg"}
    assert keys(settings, prefix="w", bucket=settings.uploads_bucket) == {"words.jpg"}
    assert keys(settings, bucket="another") == set()
    assert keys(settings, run_id=bad) == keys(settings)
    assert keys(settings, run_id="another") == set()
    assert len(stages.list_quarantine(settings, limit=2)) == 2


def test_the_command_lists_all_of_it(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload(storage, settings, **{f"more-{number}": b"" for number in range(100)})
    made = plan(settings=settings.model_copy(update={"shard_images": 100}))
    score_all(made, settings, storage, engine)
    monkeypatch.setattr(scoring, "read_settings", lambda: settings)
    monkeypatch.setattr(output.out, "width", 200)
    capsys.readouterr()
    scoring.list_quarantine(as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 103
    scoring.list_quarantine()
    shown = capsys.readouterr().out
    assert all(f"more-{number}.jpg" in shown for number in range(100))
    scoring.list_quarantine(limit=2, as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_what_is_tried_again_keeps_its_outcome_until_there_is_another(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    assert stages.retry_quarantine(settings, reasons=["EMPTY", "NOT_IMAGE"]) == {"waiting": 3}
    assert count(settings, "unscored_uploads") == 3
    assert outcomes(settings)["words"] == "NOT_IMAGE"
    generous = settings.model_copy(update={"shard_images": 10})
    made = plan(settings=generous)
    assert made.planned == 3
    score_all(made, settings, storage, engine)
    assert rows(settings, "SELECT tries FROM quarantine WHERE key = 'words.jpg'") == [(2,)]
    assert plan().planned == 0


def test_what_is_overwritten_while_it_is_to_be_tried_again_does_not_wait(
    settings: Settings,
) -> None:
    [row] = stages.list_quarantine(settings, reasons=["EMPTY"])
    with ThreadPoolExecutor(1) as thread:
        with open_session(settings) as session:
            session.execute(text("UPDATE upload SET current = false WHERE key = 'empty.jpg'"))
            # It takes the upload for current, as this is not committed.
            retried = thread.submit(stages.retry_quarantine, settings, [row["upload_id"]])
            wait_for_one_that_waits(settings)
        retried.result()
    assert count(settings, "pending_upload") == 0


def test_what_is_to_be_tried_again_while_its_shard_ends_waits(
    plan: Planned, settings: Settings
) -> None:
    [row] = stages.list_quarantine(settings, reasons=["EMPTY"])
    # Something made them wait although they have their outcomes: the shard ends that.
    wait_all(settings)
    lease = claim_shard(plan().shard_ids[0], settings)
    with ThreadPoolExecutor(1) as thread:
        with open_session(settings) as session:
            retry(session, [row["upload_id"]])
            finished = thread.submit(finish_shard, lease, settings)
            wait_for_one_that_waits(settings)
        finished.result()
    waiting = "SELECT key FROM unscored_uploads JOIN ledger USING (upload_id) WHERE stale"
    assert rows(settings, waiting) == [("empty.jpg",)]


def wait_for_one_that_waits(settings: Settings) -> None:
    """Until a session waits for what another has locked."""
    waiting = (
        "SELECT COUNT(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    until = time.monotonic() + 120
    while rows(settings, waiting) == [(0,)]:
        assert time.monotonic() < until, "nobody waits"
        time.sleep(0.05)


def test_what_is_tried_again_comes_after_what_was_not(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    assert stages.retry_quarantine(settings, reasons=["EMPTY"]) == {"waiting": 1}
    upload(storage, settings, later=picture(1))
    [shard] = plan().shard_ids
    assert [item.key for item in claim_shard(shard, settings).items] == ["later.jpg", "empty.jpg"]
    made = plan(settings=settings.model_copy(update={"run_images": 1}))
    score_all(made, settings, storage, engine)
    assert outcomes(settings)["later"] == "scored"


def test_what_several_runs_condemned_is_not_acquitted_any_more(
    plan: Planned, settings: Settings
) -> None:
    [row] = stages.list_quarantine(settings, reasons=["EMPTY"])
    assert stages.retry_quarantine(settings, [row["upload_id"]]) == {"waiting": 1}
    # The second and the third time.
    for stale in (True, False):
        [shard] = plan().shard_ids
        crashed = Outcome(row["upload_id"], None, reason="CRASHED", message="")
        write_outcomes(claim_shard(shard, settings), [crashed], settings)
        supervise._acquit(shard, settings)
        state = (
            "SELECT stale, p.upload_id IS NOT NULL FROM ledger "
            "LEFT JOIN pending_upload p USING (upload_id) WHERE upload_id = :id"
        )
        assert rows(settings, state, id=row["upload_id"]) == [(stale, stale)]


def test_what_is_tried_again_is_not_late_for_its_age(settings: Settings) -> None:
    with open_session(settings) as session:
        session.execute(text("UPDATE upload SET uploaded_at = now() - interval '200 days'"))
    stages.retry_quarantine(settings, [stages.list_quarantine(settings)[0]["upload_id"]])
    fresh = stages.freshness(settings)
    assert (fresh["unscored"], fresh["oldest_seconds"] < 3600) == (1, True)


def test_single_uploads_are_tried_again(settings: Settings) -> None:
    [row] = stages.list_quarantine(settings, reasons=["EMPTY"])
    good = rows(settings, "SELECT upload_id FROM ledger WHERE outcome = 'scored'")[0][0]
    assert stages.retry_quarantine(settings, [row["upload_id"], good, 10**9]) == {"waiting": 1}


def test_what_was_overwritten_since_is_not_tried_again(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    [row] = stages.list_quarantine(settings, reasons=["EMPTY"])
    upload(storage, settings, empty=picture())
    plan()
    assert stages.retry_quarantine(settings, [row["upload_id"]]) == {"waiting": 0}


def test_an_export_names_files_by_their_bytes_alone(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    storage.delete(settings.uploads_bucket, "empty.jpg")
    result = stages.export_quarantine(settings, tmp_path / "out")
    assert (result["rows"], result["files"], result["gone"]) == (3, 2, 1)
    names = {path.name for path in (tmp_path / "out" / "files").iterdir()}
    assert names == {hashlib.sha256(data).hexdigest() for data in (b"words", b"words, too")}
    with (tmp_path / "out" / "quarantine.csv").open(newline="") as file:
        table = {row["key"]: row for row in csv.DictReader(file)}
    assert table[r"'=cmd\nnext"]["reason"] == "NOT_IMAGE"
    assert table["empty.jpg"]["file"] == ""


def denied(where: str) -> SettingsError:
    return SettingsError(f"{where}: access denied", reason="ACCESS_DENIED")


@pytest.fixture
def fail(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the reading of these keys (none: of all) fail from here on."""

    def failing(error: GunDetectionError, *keys: str) -> None:
        def get(self: Storage, bucket: str, key: str, **options: Any) -> bytes:
            if not keys or key in keys:
                raise error
            return real(self, bucket, key, **options)

        monkeypatch.setattr(Storage, "get", get)

    real = Storage.get
    return failing


def has_reason(settings: Settings, key: str, reason: str) -> None:
    with open_session(settings) as session:
        session.execute(
            text(
                "UPDATE ledger SET reason = :reason FROM upload u "
                "WHERE u.id = upload_id AND u.key = :key"
            ),
            {"reason": reason, "key": key},
        )


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("ACCESS_DENIED", denied("a")),
        ("UNREADABLE", ServiceUnavailableError("the S3 server answered 500")),
        ("NOT_IMAGE", denied("a")),
    ],
)
def test_an_export_goes_on_after_an_object_that_cannot_be_had(
    settings: Settings,
    fail: Callable[..., None],
    tmp_path: Path,
    reason: str,
    error: GunDetectionError,
) -> None:
    has_reason(settings, "words.jpg", reason)
    fail(error, "words.jpg")
    result = stages.export_quarantine(settings, tmp_path / "out")
    assert (result["rows"], result["files"], result["gone"]) == (3, 2, 1)
    with (tmp_path / "out" / "quarantine.csv").open(newline="") as file:
        files = {row["key"]: row["file"] for row in csv.DictReader(file)}
    assert files["words.jpg"] == ""
    assert files["empty.jpg"] == hashlib.sha256(b"").hexdigest()


def test_an_export_ends_when_the_server_is_away(
    settings: Settings, fail: Callable[..., None], tmp_path: Path
) -> None:
    fail(ServiceUnavailableError("the server is away"))
    with pytest.raises(ServiceUnavailableError, match="away"):
        stages.export_quarantine(settings, tmp_path / "out")


def test_an_export_takes_nothing_else_for_what_is_in_quarantine(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    upload(storage, settings, words=picture())
    result = stages.export_quarantine(settings, tmp_path / "out")
    assert (result["rows"], result["files"], result["gone"]) == (3, 2, 1)
    names = {path.name for path in (tmp_path / "out" / "files").iterdir()}
    assert names == {hashlib.sha256(data).hexdigest() for data in (b"", b"words, too")}


def test_an_export_that_fails_leaves_the_one_before(
    settings: Settings, fail: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents() -> dict[str, bytes]:
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in files}

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    stages.export_quarantine(settings, tmp_path / "out")
    before = contents()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left") as caught:
            stages.export_quarantine(settings, tmp_path / "out")
    assert str(tmp_path / "out" / "files") in explain_os_error(caught.value)
    fail(ServiceUnavailableError("the server is away"), "empty.jpg")
    with pytest.raises(ServiceUnavailableError, match="away"):
        stages.export_quarantine(settings, tmp_path / "out")
    assert contents() == before


@pytest.mark.parametrize("error", [denied("all"), ServiceUnavailableError("the server is away")])
def test_an_export_without_any_file_says_why(
    settings: Settings, fail: Callable[..., None], tmp_path: Path, error: GunDetectionError
) -> None:
    for key in keys(settings):
        has_reason(settings, key, "ACCESS_DENIED")
    fail(error)
    with pytest.raises(type(error), match=error.message):
        stages.export_quarantine(settings, tmp_path / "out")
    with (tmp_path / "out" / "quarantine.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
