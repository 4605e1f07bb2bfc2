"""Disks that are full and clocks that jump while a shard is scored, and a listing that is killed.

After each: the same as of `test_scoring`.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg2 import sql
from pydantic import SecretStr
from sqlalchemy import text

from embedded import postgres
from embedded.servers import Servers
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.errors import ServiceUnavailableError, TerminalError, TransientError
from gun_detection.release.packages import package_key
from gun_detection.scoring import supervise
from gun_detection.scoring.leases import claim_shard
from gun_detection.scoring.plan import Plan
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from tests.faults.conftest import PICTURES, check
from tests.scoring.conftest import count, rows, upload

# A server of S3 takes a quarter of an hour either way.
LEASE, MINUTES, HOUR = 300, 600, 3600
# How long each lease that is written has left, by the database's clock.
_NOTE_LEASES = """
CREATE TABLE noted (seconds float);
CREATE FUNCTION note_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO noted VALUES (EXTRACT(EPOCH FROM NEW.lease_until - clock_timestamp()));
    RETURN NEW;
END $$;
CREATE TRIGGER note BEFORE UPDATE OF lease_until ON shard FOR EACH ROW
WHEN (NEW.lease_until IS NOT NULL) EXECUTE FUNCTION note_lease();
"""


@contextmanager
def small_disk(options: str) -> Iterator[Path]:
    """A file system in memory, which only root can mount."""
    # Not in pytest's own folder, into which PostgreSQL's user cannot look.
    folder = Path(tempfile.mkdtemp(prefix="gun-detection-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0777", "none", str(folder)]
    folder.chmod(0o755)
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        folder.rmdir()
        pytest.skip("a small disk can only be mounted by root, outside of a locked container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def fill(folder: Path, spare: int = 0) -> Path:
    """A file that leaves `spare` bytes of a small disk."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - spare))
    return filler


@pytest.fixture
def temporary(shard: int, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folders of temporary files, of ours and of others, on a small disk of their own."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with small_disk("size=64k") as folder, monkeypatch.context() as patch:
        (settings.home / "tmp").symlink_to(folder)
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


def test_a_full_temporary_folder_costs_the_log_and_no_result(
    temporary: Path, shard: int, settings: Settings, pictures: dict[str, bytes]
) -> None:
    fill(temporary)
    assert supervise.score_shard(settings, shard)["scored"] == PICTURES - 1
    check(settings, pictures)
    assert rows(settings, "SELECT attempt FROM shard") == [(1,)]


def test_a_full_temporary_folder_hides_no_error(
    temporary: Path, shard: int, settings: Settings
) -> None:
    fill(temporary)
    secret = SecretStr("wrong")
    with pytest.raises(TerminalError) as caught:
        supervise.score_shard(settings.model_copy(update={"s3_secret_access_key": secret}), shard)
    assert caught.value.reason == "ACCESS_DENIED"


def test_a_temporary_folder_that_takes_no_file_is_to_be_tried_again(
    temporary: Path, shard: int, settings: Settings, pictures: dict[str, bytes]
) -> None:
    used = sum(1 for _ in temporary.iterdir()) + 1
    remount = ["mount", "-o", f"remount,nr_inodes={used}", str(temporary)]
    subprocess.run(remount, check=True)
    ours = settings.home / "tmp"
    with pytest.raises(TransientError, match=f"disk is full at {ours}.*: free some space"):
        supervise.score_shard(settings, shard)
    assert rows(settings, "SELECT attempt FROM shard") == [(0,)]
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(temporary)], check=True)
    supervise.score_shard(settings, shard)
    check(settings, pictures)


def test_a_package_that_does_not_fit_is_fetched_when_there_is_space(
    shard: int,
    champion: ModelVersion,
    settings: Settings,
    storage: Storage,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, file = os.urandom(100_000), "trunk-x.bin"
    storage.put(settings.data_bucket, package_key(champion.id, "simulated", file), data)
    monkeypatch.setenv("PACKAGE", json.dumps([file, hashlib.sha256(data).hexdigest()]))
    with small_disk("size=256k") as home:
        monkeypatch.setenv("GUN_DETECTION_HOME", str(home))
        filler = fill(home, spare=50_000)
        with pytest.raises(TransientError, match=rf"disk is full at {home}/.*{file}: free some"):
            supervise.score_shard(load_settings(), shard)
        assert count(settings, "ledger") == 0
        filler.unlink()
        supervise.score_shard(load_settings(), shard)
        assert [path.name for path in home.rglob("*") if path.is_file()] == [file]
    check(settings, pictures)


@pytest.fixture
def full_database(servers: Servers, shard: int, settings: Settings) -> Iterator[Path]:
    """The filler of a disk that holds the outcomes, with room for some of them."""
    assert settings.database_url is not None
    database = settings.database_url.get_secret_value().rpartition("/")[2]
    tables, space = ("ledger", "detection"), sql.Identifier(f"small_{database}")

    def move(to: sql.Composable) -> None:
        with postgres.administer(servers.postgres, database) as cursor:
            for table in tables:
                move = sql.SQL("ALTER TABLE {} SET TABLESPACE {}")
                cursor.execute(move.format(sql.Identifier(table), to))

    with small_disk("size=1m") as disk:
        folder = disk / "tables"
        folder.mkdir()
        if servers.postgres.user is not None:
            os.chown(folder, *servers.postgres.user)
        with postgres.administer(servers.postgres) as cursor:
            create = sql.SQL("CREATE TABLESPACE {} LOCATION {}")
            cursor.execute(create.format(space, sql.Literal(str(folder))))
        move(space)
        yield fill(disk, spare=4 * 8192)
        move(sql.Identifier("pg_default"))
        with postgres.administer(servers.postgres) as cursor:
            cursor.execute(sql.SQL("DROP TABLESPACE {}").format(space))


def test_a_database_without_space_loses_nothing(
    full_database: Path,
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAUSES", "[0.1, 0.1]")
    with pytest.raises(ServiceUnavailableError, match=r"No space left.*: free some space"):
        supervise.score_shard(settings, shard)
    assert 0 < count(settings, "ledger") < PICTURES
    assert rows(settings, "SELECT lease_until FROM shard") == [(None,)]
    full_database.unlink()
    supervise.score_shard(settings, shard)
    check(settings, pictures)


def test_a_database_that_gets_space_meanwhile_is_waited_for(
    full_database: Path, shard: int, settings: Settings, pictures: dict[str, bytes]
) -> None:
    waits: list[str] = []

    def free(record: logging.LogRecord) -> bool:
        if "No space left" in record.getMessage():
            waits.append(record.getMessage())
            full_database.unlink(missing_ok=True)
        return True

    logger = logging.getLogger("gun_detection.scoring.pipeline")
    logger.addFilter(free)
    try:
        supervise.score_shard(settings, shard)
    finally:
        logger.removeFilter(free)
    assert waits
    check(settings, pictures)
    assert rows(settings, "SELECT attempt FROM shard") == [(1,)]


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets the clock of a process jump."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the clock of a process can only be changed where there is a C compiler")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def jump(point: str, seconds: int, marker: Path) -> str:
    """The fault of a clock that jumps in the middle of the shard, or before its lease is taken."""
    nth = 40 if point == "infer" else 1
    return json.dumps({"point": point, "jump": seconds, "nth": nth, "marker": str(marker)})


@pytest.mark.parametrize("seconds", [MINUTES, -MINUTES], ids=["forward", "back"])
@pytest.mark.parametrize("point", ["start", "infer"])
def test_a_clock_that_jumps_moves_no_lease(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    clock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    seconds: int,
) -> None:
    short = settings.model_copy(update={"shard_lease_seconds": LEASE})
    monkeypatch.setenv("FAULT", jump(point, seconds, tmp_path / "jumped"))
    monkeypatch.setenv("LD_PRELOAD", str(clock))
    with open_session(settings) as session:
        session.execute(text(_NOTE_LEASES))
    supervise.score_shard(short, shard)
    assert (tmp_path / "jumped").exists(), "no clock has jumped"
    left = [value for (value,) in rows(settings, "SELECT seconds FROM noted")]
    assert left
    assert all(0 < value <= LEASE for value in left)
    check(settings, pictures)
    assert rows(settings, "SELECT attempt, crashes FROM shard") == [(1, 0)]


@pytest.mark.parametrize("seconds", [MINUTES, -MINUTES], ids=["ahead", "behind"])
def test_a_wrong_clock_neither_takes_a_lease_nor_waits_for_one_that_is_over(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    clock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    short = settings.model_copy(update={"shard_lease_seconds": LEASE})
    held = claim_shard(shard, short)
    monkeypatch.setenv("LD_PRELOAD", str(clock))
    monkeypatch.setenv("FAULT", jump("start", seconds, tmp_path / "first"))
    with pytest.raises(ServiceUnavailableError) as caught:
        supervise.score_shard(short, shard)
    assert caught.value.reason == "SHARD_HELD"
    assert rows(settings, "SELECT attempt FROM shard") == [(held.attempt,)]
    rows(settings, "UPDATE shard SET lease_until = now() RETURNING id")
    monkeypatch.setenv("FAULT", jump("start", seconds, tmp_path / "second"))
    supervise.score_shard(short, shard)
    assert all((tmp_path / name).exists() for name in ("first", "second")), "no clock has jumped"
    check(settings, pictures)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
def test_a_clock_that_the_s3_server_refuses_is_named_and_the_next_attempt_goes_on(
    shard: int,
    settings: Settings,
    pictures: dict[str, bytes],
    clock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    monkeypatch.setenv("FAULT", jump("infer", seconds, tmp_path / "jumped"))
    monkeypatch.setenv("LD_PRELOAD", str(clock))
    with pytest.raises(ServiceUnavailableError, match="clock of this machine") as caught:
        supervise.score_shard(settings, shard)
    assert caught.value.reason == "CLOCK_WRONG"
    assert rows(settings, "SELECT lease_until, crashes FROM shard") == [(None, 0)]
    assert count(settings, "ledger") < PICTURES
    # The next process has the clock of the machine.
    supervise.score_shard(settings, shard)
    check(settings, pictures)


@pytest.mark.parametrize(("point", "nth"), [("list", 40), ("note", 2)])
def test_a_listing_that_is_killed_is_made_again(
    drive: None,
    plan: Callable[..., Plan],
    settings: Settings,
    storage: Storage,
    pictures: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    nth: int,
) -> None:
    upload(storage, settings, **pictures)
    marker = tmp_path / "died"
    fault = {"point": point, "signal": signal.SIGKILL, "nth": nth, "marker": str(marker)}
    monkeypatch.setenv("FAULT", json.dumps(fault))
    listing = subprocess.run([sys.executable, "-m", "tests.faults.driver", "survey"], check=False)
    assert listing.returncode == -signal.SIGKILL
    assert count(settings, "upload") == 32, "the first part was noted"
    [shard_id] = plan().shard_ids
    assert count(settings, "upload") == PICTURES
    supervise.score_shard(settings, shard_id)
    check(settings, pictures)
