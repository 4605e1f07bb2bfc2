"""What listings leave in the database: new, changed, restored and vanished uploads."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo

import pytest
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.errors import ServiceUnavailableError
from gun_detection.scoring import listing
from gun_detection.scoring.listing import Listed, note_objects, note_uploads
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings
from gun_detection.storage import Storage, StoredObject
from tests.scoring.conftest import outcomes, picture, rows, score_all, upload
from tests.scoring.simulated import Simulated


@pytest.fixture
def note(settings: Settings, storage: Storage) -> Callable[..., Listed]:
    def listed(**changes: object) -> Listed:
        source = Source(bucket=settings.uploads_bucket).model_copy(update=changes)
        return note_uploads(source, settings, storage, wait=True)

    return listed


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> datetime:
    """The time of every listing: no other day begins between two of them."""
    now = datetime.now(UTC).replace(hour=12)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return now

    monkeypatch.setattr(listing, "datetime", Clock)
    return now


def put(storage: Storage, settings: Settings, key: str, data: bytes) -> None:
    storage.put(settings.uploads_bucket, key, data)


def state(settings: Settings) -> list[tuple[object, ...]]:
    return rows(settings, f"SELECT key, size, current, {_PENDING} FROM upload u ORDER BY id")


_PENDING = "EXISTS (SELECT FROM pending_upload p WHERE p.upload_id = u.id)"


def test_objects_are_noted_once(
    note: Callable[..., Listed], settings: Settings, storage: Storage
) -> None:
    put(storage, settings, "a", b"1")
    put(storage, settings, "b", b"22")
    assert note() == Listed(objects=2, new=2)
    assert note() == Listed(objects=2)
    assert state(settings) == [("a", 1, True, True), ("b", 2, True, True)]


def test_other_bytes_under_a_key_supersede_the_former(
    note: Callable[..., Listed], settings: Settings, storage: Storage
) -> None:
    put(storage, settings, "a", b"1")
    note()
    put(storage, settings, "a", b"22")
    assert note() == Listed(objects=1, changed=1)
    assert state(settings) == [("a", 1, False, False), ("a", 2, True, True)]


def test_bytes_that_come_back_are_current_again(
    note: Callable[..., Listed], settings: Settings, storage: Storage
) -> None:
    for data in (b"1", b"22", b"1"):
        put(storage, settings, "a", data)
        note()
    assert state(settings) == [("a", 1, True, True), ("a", 2, False, False)]
    assert note() == Listed(objects=1)


def test_patterns_and_partitions_leave_out_what_is_not_wanted(
    note: Callable[..., Listed], settings: Settings, storage: Storage, noon: datetime
) -> None:
    today = noon.strftime("%Y/%m/%d/")
    for key in (f"{today}a.jpg", f"{today}b.txt", "2001/01/01/c.jpg"):
        put(storage, settings, key, b"1")
    counts = note(include=("*.jpg",), partitions="%Y/%m/%d/")
    assert counts == Listed(objects=1, left_out=1, new=1)
    assert rows(settings, "SELECT key FROM upload") == [(f"{today}a.jpg",)]


@pytest.mark.parametrize(
    "key", ["tab\there", "line\nbreak", "back\\slash", r"\N", "naïve ☃ 𝄞", "%2F+ &<>", "a" * 1024]
)
def test_any_key_is_noted_as_it_is(
    note: Callable[..., Listed], settings: Settings, storage: Storage, key: str
) -> None:
    noted = note_objects(
        settings.uploads_bucket,
        [StoredObject(settings.uploads_bucket, key, 1, "e", datetime.now(UTC))],
        settings,
    )
    assert noted.new == 1
    assert rows(settings, "SELECT key FROM upload") == [(key,)]


def test_listings_longer_than_a_transaction_are_noted_whole(
    note: Callable[..., Listed],
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "_CHUNK", 2)
    for number in range(5):
        put(storage, settings, f"n{number}", b"1")
    assert note() == Listed(objects=5, new=5)


def test_the_same_key_twice_in_one_listing_is_the_newest(settings: Settings) -> None:
    bucket = settings.uploads_bucket
    new = StoredObject(bucket, "a", 2, "new", datetime(2026, 2, 1, tzinfo=UTC))
    old = replace(new, etag="old", last_modified=datetime(2026, 1, 1, tzinfo=UTC))
    note_objects(bucket, [new, old], settings)
    assert rows(settings, "SELECT etag, current FROM upload") == [("new", True)]


def test_old_news_change_nothing_about_what_is_newer(settings: Settings) -> None:
    bucket = settings.uploads_bucket
    first = StoredObject(bucket, "a", 1, "first", datetime(2026, 1, 1, tzinfo=UTC))
    second = replace(first, etag="second", last_modified=datetime(2026, 1, 2, tzinfo=UTC))
    for item in (first, second, first):
        note_objects(bucket, [item], settings)
    current = f"SELECT etag, current, {_PENDING} FROM upload u ORDER BY id"
    assert rows(settings, current) == [("first", False, False), ("second", True, True)]
    third = replace(first, last_modified=datetime(2026, 1, 3, tzinfo=UTC))
    assert note_objects(bucket, [third], settings).changed == 1
    assert rows(settings, current) == [("first", True, True), ("second", False, False)]


def test_a_version_between_two_times_of_another_is_old(settings: Settings) -> None:
    bucket = settings.uploads_bucket
    first = StoredObject(bucket, "a", 1, "a", datetime(2026, 1, 1, tzinfo=UTC))
    again = replace(first, last_modified=datetime(2026, 1, 3, tzinfo=UTC))
    between = replace(first, etag="b", last_modified=datetime(2026, 1, 2, tzinfo=UTC))
    for item in (first, again, between):
        note_objects(bucket, [item], settings)
    assert rows(settings, "SELECT etag, current FROM upload") == [("a", True)]


def test_an_inventory_that_is_read_again_brings_nothing_back(
    note: Callable[..., Listed],
    plan: Callable[..., Plan],
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    def table(day: int) -> None:
        row = f"a.jpg,{len(data)},{etag},2026-01-{day:02}T00:00:00Z"
        storage.put("lists", "all.csv", f"key,size,etag,last_modified\n{row}\n".encode())

    data = picture()
    etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    storage.ensure_bucket("lists")
    upload(storage, settings, a=data)
    table(1)
    inventory = "s3://lists/all.csv"
    note(inventory=inventory)
    made = plan()
    storage.delete(settings.uploads_bucket, "a.jpg")
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "OBJECT_MISSING"}
    assert note(inventory=inventory) == Listed(objects=1)
    upload(storage, settings, a=data)
    with open_session(settings) as session:
        session.execute(text("UPDATE ledger SET created_at = '2026-01-05Z'"))
    assert note(inventory=inventory).returned == 0
    table(7)
    assert note(inventory=inventory).returned == 1


def test_a_picture_put_back_while_its_outcome_was_written_is_looked_at_once_more(
    note: Callable[..., Listed],
    plan: Callable[..., Plan],
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    upload(storage, settings, a=picture())
    made = plan()
    storage.delete(settings.uploads_bucket, "a.jpg")
    score_all(made, settings, storage, engine)
    [(etag, size)] = rows(settings, "SELECT etag, size FROM upload")
    put_back = StoredObject(settings.uploads_bucket, "a.jpg", size, etag, datetime.now(UTC))
    put_back = replace(put_back, last_modified=put_back.last_modified - timedelta(minutes=10))
    assert note_objects(settings.uploads_bucket, [put_back], settings).returned == 1
    again = plan(listing=False)
    assert again.planned == 1
    score_all(again, settings, storage, engine)
    assert outcomes(settings) == {"a": "OBJECT_MISSING"}
    # It is gone after all, and the same inventory is read every night.
    earlier = replace(put_back, last_modified=put_back.last_modified - timedelta(minutes=6))
    assert note_objects(settings.uploads_bucket, [earlier], settings).returned == 0


def test_days_that_fell_due_in_an_outage_are_listed_after_it(
    note: Callable[..., Listed], settings: Settings, storage: Storage, noon: datetime
) -> None:
    days = [(noon - timedelta(days=ago)).strftime("%Y/%m/%d/") for ago in (0, 6)]
    for day in days:
        put(storage, settings, f"{day}a.jpg", b"1")
    assert note(partitions="%Y/%m/%d/") == Listed(objects=1, new=1)
    with open_session(settings) as session:
        session.execute(
            text("UPDATE source_listing SET listed_at = :then"), {"then": noon - timedelta(days=5)}
        )
    assert note(partitions="%Y/%m/%d/") == Listed(objects=2, new=1)
    assert note(partitions="%Y/%m/%d/") == Listed(objects=1)


def test_two_listings_of_a_bucket_take_turns(
    note: Callable[..., Listed], settings: Settings, storage: Storage
) -> None:
    source = Source(bucket=settings.uploads_bucket)
    put(storage, settings, "a", b"1")
    inside, leave = threading.Event(), threading.Event()

    class Slow(Storage):
        def list_objects(self, bucket: str, prefix: str = ""):  # type: ignore[no-untyped-def]
            inside.set()
            leave.wait(30)
            return super().list_objects(bucket, prefix)

    slow = threading.Thread(
        target=note_uploads, args=(source, settings, Slow(settings)), kwargs={"wait": True}
    )
    slow.start()
    assert inside.wait(30)
    with pytest.raises(ServiceUnavailableError) as held:
        note_uploads(source, settings, storage, wait=False)
    leave.set()
    slow.join(30)
    assert held.value.reason == "LISTING_HELD"
    assert note_uploads(source, settings, storage, wait=False) == Listed(objects=1)
