import csv
import gzip
import hashlib
import io
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import text

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.scoring.inventory import overdue, read_inventory
from gun_detection.scoring.listing import Listed, note_objects, note_uploads
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings
from gun_detection.storage import Storage, StoredObject
from tests.scoring.conftest import outcomes, picture, score_all
from tests.scoring.simulated import Simulated
from tests.test_storage import proxy_of_nothing

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
ETAG = "0123456789abcdef0123456789abcdef"
ODD_KEYS = [
    "plain.jpg",
    "a b+c%20d%.jpg",
    "ü/日本/😀.jpg",
    'new\nline,"quoted".jpg',
    "../a//b/./c.jpg",
    "k" * 1024,
    "trail/",
]
FIELDS = ["Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "LastModifiedDate"]
FIELDS += ["ETag", "StorageClass"]
NAMES = {"VersionId": "version_id", "IsLatest": "is_latest", "IsDeleteMarker": "is_delete_marker"}
NAMES |= {"LastModifiedDate": "last_modified_date", "ETag": "e_tag", "StorageClass": "storage"}


def row(key: str, **other: Any) -> dict[str, Any]:
    """What S3 Inventory knows of an object."""
    known = {"Bucket": "uploads", "Key": key, "VersionId": "v1", "IsLatest": True}
    known |= {"IsDeleteMarker": False, "Size": 7, "LastModifiedDate": NOON, "ETag": ETAG}
    return known | {"StorageClass": "STANDARD"} | other


def as_csv(rows: list[dict[str, Any]], fields: list[str]) -> bytes:
    """As AWS writes it: everything in quotes, without a header, keys encoded, packed."""
    packed = io.StringIO()
    writer = csv.writer(packed, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for values in rows:
        shown = values | {"Key": quote_plus(values["Key"])}
        writer.writerow([_shown(shown[name]) for name in fields])
    return gzip.compress(packed.getvalue().encode())


def _shown(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_parquet(rows: list[dict[str, Any]], fields: list[str]) -> bytes:
    times = pa.timestamp("ms")
    columns = {}
    for name in fields:
        values = [None if row[name] == "" else row[name] for row in rows]
        column = pa.array(values, type=times if name == "LastModifiedDate" else None)
        columns[NAMES.get(name, name.lower())] = column
    return parquet_bytes(pa.table(columns))


def parquet_bytes(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=1000)
    return file.getvalue()


FORMATS = {"CSV": as_csv, "Parquet": as_parquet}
Publish = Callable[..., str]


@pytest.fixture
def publish(settings: Settings, storage: Storage) -> Publish:
    """Writes an inventory as AWS does, one file for each list of rows; its manifest's URI."""

    def write(
        *files: list[dict[str, Any]],
        kind: str = "CSV",
        fields: list[str] = FIELDS,
        date: str = "2026-05-01T00-00Z",
        folder: str = "lists/uploads/all",
        source: str = "uploads",
        damage: Callable[[bytes], bytes] = lambda content: content,
    ) -> str:
        bucket, entries = settings.data_bucket, []
        for number, rows in enumerate(files):
            content = FORMATS.get(kind, as_csv)(rows, fields)
            suffix = "csv.gz" if kind == "CSV" else kind.lower()
            key = f"{folder}/data/{date}-{number}.{suffix}"
            storage.put(bucket, key, damage(content))
            digest = hashlib.md5(content).hexdigest()
            entries.append({"key": key, "size": len(content), "MD5checksum": digest})
        manifest = {
            "sourceBucket": source,
            "destinationBucket": f"arn:aws:s3:::{bucket}",
            "version": "2016-11-30",
            "creationTimestamp": "1514944800000",
            "fileFormat": kind,
            "fileSchema": ", ".join(fields) if kind == "CSV" else "message s3.inventory { }",
            "files": entries,
        }
        content = json.dumps(manifest).encode()
        checksum = hashlib.md5(content).hexdigest().encode()
        storage.put(bucket, f"{folder}/{date}/manifest.json", content)
        storage.put(bucket, f"{folder}/{date}/manifest.checksum", checksum + b"\n")
        return f"s3://{bucket}/{folder}/{date}/manifest.json"

    return write


@pytest.mark.parametrize("kind", FORMATS)
def test_objects_are_those_of_the_inventory(kind: str, publish: Publish, storage: Storage) -> None:
    uri = publish([row(key) for key in ODD_KEYS], [row("second.jpg", Size=0)], kind=kind)
    assert list(read_inventory(storage, uri)) == [
        *(StoredObject("uploads", key, 7, ETAG, NOON) for key in ODD_KEYS),
        StoredObject("uploads", "second.jpg", 0, ETAG, NOON),
    ]


@pytest.mark.parametrize("kind", FORMATS)
def test_only_what_can_be_read_now_is_listed(kind: str, publish: Publish, storage: Storage) -> None:
    uri = publish(
        [
            row("kept.jpg"),
            row("deleted.jpg", IsDeleteMarker=True, Size="", ETag=""),
            row("older.jpg", IsLatest=False),
            row("folder/", Size=0),
        ],
        kind=kind,
    )
    assert [item.key for item in read_inventory(storage, uri)] == ["kept.jpg"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_list_of_current_versions_has_no_column_for_them(
    kind: str, publish: Publish, storage: Storage
) -> None:
    fields = ["Bucket", "Key", "Size", "LastModifiedDate", "ETag"]
    uri = publish([row("a.jpg")], [], kind=kind, fields=fields)
    assert [item.key for item in read_inventory(storage, uri)] == ["a.jpg"]


def test_below_a_prefix_the_newest_complete_inventory_is_taken(
    publish: Publish, settings: Settings, storage: Storage
) -> None:
    bucket = settings.data_bucket
    for day in range(1, 5):
        publish([row(f"{day}.jpg")], date=f"2026-05-0{day}T00-00Z")
    publish([row("other.jpg")], folder="lists/uploads/all-others")
    # Of the last two one is still being written, and one is damaged.
    storage.delete(bucket, "lists/uploads/all/2026-05-04T00-00Z/manifest.checksum")
    storage.put(bucket, "lists/uploads/all/2026-05-03T00-00Z/manifest.json", b"{}")
    for prefix in ("lists/uploads/all", "lists/uploads/all/"):
        listed = read_inventory(storage, f"s3://{bucket}/{prefix}")
        assert [item.key for item in listed] == ["2.jpg"]


@pytest.mark.parametrize(
    ("days", "allowed"), [([1], 9), ([1, 2], 3), ([1, 8], 15), ([1, 8, 9], 3), ([1, 2, 9], 15)]
)
def test_the_next_inventory_is_overdue_when_two_are_missing_and_a_day_has_passed(
    days: list[int], allowed: int, publish: Publish, settings: Settings, storage: Storage
) -> None:
    for day in days:
        publish([row(f"{day}.jpg")], date=f"2026-05-{day:02}T00-00Z")
    newest = datetime(2026, 5, days[-1], tzinfo=UTC)
    # Somebody else's folder.
    publish([row("no.jpg")], date="2026-99-99T00-00Z")
    # It is complete only with its checksum.
    publish([row("late.jpg")], date="2026-06-01T00-00Z")
    storage.delete(settings.data_bucket, "lists/uploads/all/2026-06-01T00-00Z/manifest.checksum")
    uri = f"s3://{settings.data_bucket}/lists/uploads/all/"
    end = newest + timedelta(days=allowed)
    assert overdue(storage, uri, end) is None
    why = overdue(storage, uri, end + timedelta(seconds=1))
    assert why is not None
    assert f"{uri} is of {newest:%Y-%m-%d} 00:00 UTC" in why


def test_an_overdue_inventory_is_read_and_fails_the_night(
    champion: object, publish: Publish, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    bucket = settings.uploads_bucket
    publish([row("a.jpg")], source=bucket)
    path = tmp_path / "sources.yaml"
    inventory = f"s3://{settings.data_bucket}/lists/uploads/all/"
    path.write_text(f"buckets: [{{bucket: {bucket}, inventory: '{inventory}'}}]")
    configured = settings.model_copy(update={"sources_file": path})
    found = stages.survey_uploads(configured)
    assert (found["new"], found["planned"]) == (1, 1)
    assert list(found["unlisted"]) == [f"s3://{bucket}/"]
    assert f"{inventory} is of 2026-05-01" in found["text"]
    publish([row("a.jpg")], source=bucket, date=f"{datetime.now(UTC):%Y-%m-%dT00-00Z}")
    assert stages.survey_uploads(configured)["unlisted"] == {}


def test_a_list_that_is_named_itself_has_no_age(publish: Publish, storage: Storage) -> None:
    for uri in (publish([row("a.jpg")]), "s3://lists/all.csv", "s3://lists/all.parquet"):
        assert overdue(storage, uri, datetime.now(UTC)) is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_made_by_hand_is_read_as_it_is_written(
    packed: bool, settings: Settings, storage: Storage
) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["note", "last_modified", "key", "etag", "size"])
    for key in ODD_KEYS:
        writer.writerow(["x", "2026-05-01T14:00:00+02:00", key, f'"{ETAG}"', 7])
    content = b"\xef\xbb\xbf" + text.getvalue().encode()
    name = "list.csv.gz" if packed else "list.csv"
    storage.put(settings.data_bucket, name, gzip.compress(content) if packed else content)
    uri = f"s3://{settings.data_bucket}/{name}"
    listed = list(read_inventory(storage, uri, bucket="uploads"))
    assert listed == [StoredObject("uploads", key, 7, ETAG, NOON) for key in ODD_KEYS]
    assert {item.bucket for item in read_inventory(storage, uri)} == {settings.data_bucket}


@pytest.mark.parametrize(
    "times",
    [
        pa.array([int(NOON.timestamp()) * 10**9 + 1], pa.timestamp("ns", "UTC")),
        pa.array([NOON.replace(tzinfo=None)], pa.timestamp("s")),
        pa.array(["2026-05-01T12:00:00Z"]),
    ],
    ids=lambda times: str(times.type),
)
def test_a_parquet_file_made_by_hand_has_its_times_in_any_form(
    times: Any, settings: Settings, storage: Storage
) -> None:
    columns = {"key": ["a+b%20c.jpg"], "size": [7], "etag": [ETAG], "last_modified": times}
    storage.put(settings.data_bucket, "list.parquet", parquet_bytes(pa.table(columns)))
    listed = read_inventory(storage, f"s3://{settings.data_bucket}/list.parquet")
    expected = StoredObject(settings.data_bucket, "a+b%20c.jpg", 7, ETAG, NOON)
    assert list(listed) == [expected]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"fields": ["Bucket", "Key", "Size"]}, SettingsError, "lacks ETag, LastModifiedDate"),
        (
            {"fields": ["Bucket", "Key", "Size"], "kind": "Parquet"},
            SettingsError,
            "lacks e_tag, last_modified_date: switch on the optional fields",
        ),
        ({"kind": "ORC"}, SettingsError, "output format to CSV or Parquet"),
        ({"source": "other"}, SettingsError, "of the bucket other, not of uploads"),
        ({"damage": lambda content: content[:-20]}, TerminalError, "has not the MD5"),
    ],
)
def test_an_inventory_that_cannot_be_used_says_why(
    arguments: dict[str, Any],
    error: type[GunDetectionError],
    words: str,
    publish: Publish,
    storage: Storage,
) -> None:
    uri = publish([row("a.jpg")], **arguments)
    with pytest.raises(error, match=words):
        list(read_inventory(storage, uri, bucket="uploads"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Key": ""}, "row 2: the key or the ETag is empty"),
        ({"Key": "k" * 1025}, "row 2: a key of more than 1024 bytes"),
        ({"Size": "many"}, "row 2: invalid literal"),
        ({"Size": "-1"}, "row 2: a size of -1 bytes"),
        ({"Size": "99999999999999999999"}, "row 2: a size of 99999999999999999999 bytes"),
        ({"ETag": ""}, "row 2: the key or the ETag is empty"),
        ({"ETag": "a\0b"}, "row 2: an ETag with a NUL"),
        ({"LastModifiedDate": "yesterday"}, "row 2: Invalid isoformat"),
        ({"LastModifiedDate": "0001-01-01T00:00:00+23:00"}, "row 2: date value out of range"),
    ],
)
def test_a_malformed_row_is_named(
    change: dict[str, str], words: str, publish: Publish, storage: Storage
) -> None:
    uri = publish([row("a.jpg"), row("b.jpg", **change)])
    with pytest.raises(TerminalError, match=r"-0\.csv\.gz, " + words) as caught:
        list(read_inventory(storage, uri))
    assert caught.value.reason == "BAD_INVENTORY"


@pytest.mark.parametrize("name", ["key", "size", "etag", "last_modified"])
def test_a_row_without_a_value_is_named(name: str, settings: Settings, storage: Storage) -> None:
    good = {"key": "a.jpg", "size": 7, "etag": ETAG, "last_modified": NOON}
    columns = {column: [value, value] for column, value in good.items()}
    columns[name][1] = None
    storage.put(settings.data_bucket, "list.parquet", parquet_bytes(pa.table(columns)))
    with pytest.raises(TerminalError, match=r"list\.parquet, row 2"):
        list(read_inventory(storage, f"s3://{settings.data_bucket}/list.parquet"))


@pytest.mark.parametrize("keys", [[b"a.jpg"], [7]], ids=["bytes", "numbers"])
def test_a_table_whose_keys_are_no_words_is_named(
    keys: list[object], settings: Settings, storage: Storage
) -> None:
    columns = {"key": keys, "size": [7], "etag": [ETAG], "last_modified": [NOON]}
    storage.put(settings.data_bucket, "list.parquet", parquet_bytes(pa.table(columns)))
    with pytest.raises(TerminalError, match=r"list\.parquet, row 1"):
        list(read_inventory(storage, f"s3://{settings.data_bucket}/list.parquet"))


def test_a_table_whose_keys_are_not_in_utf_8_is_named(settings: Settings, storage: Storage) -> None:
    ends, letters = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")
    keys = pa.Array.from_buffers(pa.string(), 1, [None, ends, letters])
    columns = {"key": keys, "size": [7], "etag": [ETAG], "last_modified": [NOON]}
    storage.put(settings.data_bucket, "list.parquet", parquet_bytes(pa.table(columns)))
    with pytest.raises(TerminalError, match=r"list\.parquet cannot be read"):
        list(read_inventory(storage, f"s3://{settings.data_bucket}/list.parquet"))


def test_a_time_of_an_offset_that_only_python_knows_is_noted(
    settings: Settings, storage: Storage
) -> None:
    content = f"key,size,etag,last_modified\na.jpg,7,{ETAG},2026-05-02T11:59:00+23:59\n"
    storage.put(settings.data_bucket, "list.csv", content.encode())
    source = Source(bucket="uploads", inventory=f"s3://{settings.data_bucket}/list.csv")
    assert note_uploads(source, settings, storage, wait=True).new == 1
    with open_session(settings) as session:
        assert session.scalar(text("SELECT uploaded_at FROM upload")) == NOON


GOOD_PARQUET = parquet_bytes(
    pa.table({"key": ["a.jpg"], "size": [7], "etag": ["abc"], "last_modified": ["2026-05-01"]})
)
GOOD = b"key,size,etag,last_modified\r\na.jpg,7,abc,2026-05-01\r\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.csv", GOOD + b"b.jpg,7,abc\r\n", "after row 1 .3 fields instead of 4"),
        ("list.csv", GOOD + b'b"b.jpg",7,"abc', "after row 1"),
        ("list.csv", GOOD + b"\xff.jpg,7,abc,2026-05-01\r\n", "after row"),
        # A time of its own would give each process of the tests other names for them.
        ("list.csv.gz", gzip.compress(GOOD, mtime=0)[:-12], "after row"),
        ("list.csv.gz", GOOD, "after row 0"),
        ("list.csv.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 30, "after row"),
        ("list.parquet", GOOD, "after row 0"),
        ("list.parquet", b"", "after row 0"),
        ("list.parquet", GOOD_PARQUET[:8] + b"\xff" * 20 + GOOD_PARQUET[28:], "after row 0"),
        ("manifest.json", b"[]", "does not match its manifest.checksum"),
    ],
)
def test_damage_is_named(
    name: str, content: bytes, words: str, settings: Settings, storage: Storage
) -> None:
    storage.put(settings.data_bucket, name, content)
    storage.put(settings.data_bucket, "manifest.checksum", b"0" * 32)
    with pytest.raises(TerminalError, match=words) as caught:
        list(read_inventory(storage, f"s3://{settings.data_bucket}/{name}"))
    assert caught.value.reason == "BAD_INVENTORY"


@pytest.mark.parametrize("name", ["list.csv", "list.csv.gz", "list.parquet", "manifest.json"])
def test_a_page_of_a_proxy_is_no_damage(name: str, settings: Settings) -> None:
    with (
        proxy_of_nothing(settings, 200, b"<html>back soon</html>") as away,
        pytest.raises(ServiceUnavailableError, match="is no S3 server; see whether"),
    ):
        list(read_inventory(Storage(away), f"s3://lists/{name}"))


WITHOUT_MD5 = {
    "sourceBucket": "uploads",
    "destinationBucket": "arn:aws:s3:::lists",
    "fileFormat": "CSV",
    "fileSchema": "Key, Size, LastModifiedDate, ETag",
    "files": [{"key": "a.csv.gz", "size": 7, "MD5checksum": None}],
}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"files": []}', b"\xff", json.dumps(WITHOUT_MD5).encode()]
)
def test_a_manifest_of_something_else_is_refused(
    content: bytes, settings: Settings, storage: Storage
) -> None:
    storage.put(settings.data_bucket, "manifest.json", content)
    checksum = hashlib.md5(content).hexdigest().encode()
    storage.put(settings.data_bucket, "manifest.checksum", checksum)
    with pytest.raises(TerminalError, match="is no manifest of an S3 Inventory"):
        list(read_inventory(storage, f"s3://{settings.data_bucket}/manifest.json"))


def test_a_table_without_its_header_is_refused(settings: Settings, storage: Storage) -> None:
    for content in (b"", b"a.jpg,7,abc,2026-05-01\r\n"):
        storage.put(settings.data_bucket, "list.csv", content)
        with pytest.raises(SettingsError, match="named in its first row"):
            list(read_inventory(storage, f"s3://{settings.data_bucket}/list.csv"))


def test_an_empty_inventory_lists_nothing(publish: Publish, storage: Storage) -> None:
    assert list(read_inventory(storage, publish())) == []


def test_what_is_not_there_is_named(publish: Publish, settings: Settings, storage: Storage) -> None:
    for key in ("nothing/", "nothing.csv", "nothing/manifest.json"):
        with pytest.raises(NotFoundError, match="nothing"):
            list(read_inventory(storage, f"s3://{settings.data_bucket}/{key}"))
    for folder in ("lists/a", "lists/b"):
        publish([], folder=folder)
    with pytest.raises(SettingsError, match=r"more than one inventory .*lists/a/, .*lists/b/"):
        list(read_inventory(storage, f"s3://{settings.data_bucket}/lists"))


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_stays_flat(kind: str, publish: Publish, storage: Storage) -> None:
    peaks = []
    for count in (20_000, 60_000):
        uri = publish([row(f"{number:06d}.jpg") for number in range(count)], kind=kind)
        tracemalloc.start()
        assert sum(1 for _ in read_inventory(storage, uri)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_stays_on_the_disk_when_reading_stops(
    kind: str, publish: Publish, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    listed = read_inventory(storage, publish([row("a.jpg"), row("b.jpg")], kind=kind))
    assert next(listed).key == "a.jpg"
    assert set(tmp_path.iterdir()) != before
    listed.close()
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("gone", ["a delete marker", "a version"])
def test_a_later_inventory_shows_what_is_there_again_however_old_it_is(
    gone: str,
    plan: Callable[..., Plan],
    publish: Publish,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    data, now, bucket = picture(), datetime.now(UTC), settings.uploads_bucket
    etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    put_at = now - timedelta(days=3)

    def inventory(after: timedelta) -> Listed:
        rows = [row("a.jpg", Size=len(data), ETag=etag, LastModifiedDate=put_at)]
        date = (now + after).strftime("%Y-%m-%dT%H-00Z")
        uri = publish(rows, source=bucket, date=date).removesuffix(f"{date}/manifest.json")
        return note_uploads(Source(bucket=bucket, inventory=uri), settings, storage, wait=True)

    assert inventory(-timedelta(days=1)).new == 1
    if gone == "a version":
        newer = StoredObject(bucket, "a.jpg", 5, "1" * 32, now - timedelta(hours=30))
        assert note_objects(bucket, [newer], settings).changed == 1
    # Nothing is in the bucket yet.
    score_all(plan(listing=False), settings, storage, engine)
    assert outcomes(settings) == {"a": "OBJECT_MISSING"}
    storage.put(bucket, "a.jpg", data)
    # Made a while after, which may still show how it was before.
    taken_up = {"a version": "changed", "a delete marker": "returned"}[gone]
    early, late = timedelta(hours=-12), timedelta(hours=26)
    assert [getattr(inventory(after), taken_up) for after in (early, late, late)] == [0, 1, 0]
    score_all(plan(listing=False), settings, storage, engine)
    with open_session(settings) as session:
        current = (
            "SELECT l.outcome FROM upload u JOIN ledger l ON l.upload_id = u.id WHERE u.current"
        )
        assert session.scalars(text(current)).all() == ["scored"]


def test_an_earlier_inventory_displaces_nothing_that_was_seen_after_it(
    publish: Publish, settings: Settings, storage: Storage
) -> None:
    now, bucket = datetime.now(UTC), settings.uploads_bucket
    date = (now - timedelta(days=2)).strftime("%Y-%m-%dT%H-00Z")
    first = row("a.jpg", ETag="1" * 32, LastModifiedDate=now - timedelta(days=20))
    uri = publish([first], source=bucket, date=date).removesuffix(f"{date}/manifest.json")
    source = Source(bucket=bucket, inventory=uri)
    assert note_uploads(source, settings, storage, wait=True).new == 1
    # A copy that keeps its time, which is before that of the inventory.
    copied = StoredObject(bucket, "a.jpg", 5, "2" * 32, now - timedelta(days=10))
    assert note_objects(bucket, [copied], settings).changed == 1
    assert note_uploads(source, settings, storage, wait=True).changed == 0
    with open_session(settings) as session:
        assert session.scalars(text("SELECT etag FROM upload WHERE current")).all() == ["2" * 32]
