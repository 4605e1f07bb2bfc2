"""Listings of buckets too large for paging: S3 Inventory, or a table that somebody made by hand.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

import csv
import gzip
import hashlib
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_plus

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from gun_detection.errors import NotFoundError, SettingsError, TerminalError
from gun_detection.storage import Storage, StoredObject, parse_s3_uri

logger = logging.getLogger(__name__)

_DATED = re.compile(r"((?:.*/)?)(\d{4}-\d\d-\d\dT\d\d-\d\dZ)/manifest\.json", re.DOTALL)
_TABLES = (".csv", ".csv.gz", ".parquet")
_BATCH = 10_000

# What is read of a row, in this order, by the column that each kind of table has it in. The first
# four are needed; the others are there when all versions of the objects are listed.
_BY_HAND = ("key", "size", "etag", "last_modified", "is_latest", "is_delete_marker")
_CSV = ("Key", "Size", "ETag", "LastModifiedDate", "IsLatest", "IsDeleteMarker")
_PARQUET = ("key", "size", "e_tag", "last_modified_date", "is_latest", "is_delete_marker")
_NEEDED = 4

_Row = tuple[Any, ...]


@dataclass(frozen=True)
class _Table:
    """One file of rows.

    A CSV of S3 Inventory has its `header` in the manifest and its keys encoded as in a URL;
    without `md5` nobody said what the file must hold.
    """

    bucket: str
    key: str
    columns: tuple[str, ...] = _BY_HAND
    header: list[str] | None = None
    md5: str | None = None

    @property
    def where(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def read_inventory(
    storage: Storage, uri: str, *, bucket: str | None = None
) -> Generator[StoredObject, None, None]:
    """The current objects of a bucket, in the order of the files, with flat memory.

    `uri` is the `manifest.json` of an S3 Inventory, a prefix below which its newest complete one
    is taken, or a table made by hand: a `.csv`, `.csv.gz` (RFC 4180) or `.parquet` with the
    columns key, size (bytes), etag and last_modified (ISO 8601), of the objects in `bucket`,
    or else in the bucket that it lies in. Delete markers, older versions and folder markers are
    left out. Each file goes through a temporary one, and no row of a damaged file is believed.

    Raises `NotFoundError` for a list that is not there, `SettingsError` for one that is of
    another bucket or format or that lacks a column, `TerminalError` with reason `BAD_INVENTORY`
    for what is damaged, naming file and row.
    """
    place, key = parse_s3_uri(uri)
    if key.endswith(_TABLES):
        yield from _read_table(storage, _Table(place, key), bucket or place)
        return
    source, tables = _read_manifest(storage, *_find_manifest(storage, place, key))
    if bucket not in (None, source):
        raise SettingsError(
            f"{uri} is the inventory of the bucket {source}, not of {bucket}: name the one of "
            f"{bucket}"
        )
    for table in tables:
        yield from _read_table(storage, table, source)


def locate(storage: Storage, uri: str) -> tuple[str, datetime | None]:
    """What `read_inventory` reads for `uri`, and from when on its objects were listed, by the date
    of its folder; None for what has no such folder.

    A table that somebody made has no such date: that of its file says nothing of its rows.
    """
    place, key = parse_s3_uri(uri)
    if not key.endswith(_TABLES) and not _is_manifest(key):
        uri, *_ = _find_manifest(storage, place, key)
        place, key = parse_s3_uri(uri)
    match = _dated(key)
    return uri, _date(match) if match else None


def overdue(storage: Storage, uri: str, now: datetime) -> str | None:
    """That no inventory came lately below a prefix, and what to do; None where one did.

    They are due as often as the last two came. The second that is missing is overdue after a day;
    where there is only one yet, the next is after nine days. What is named by itself, a manifest
    or a table, has no age. Raises `SettingsError` where there is more than one inventory.
    """
    place, key = parse_s3_uri(uri)
    if key.endswith(_TABLES) or _is_manifest(key):
        return None
    found = islice(_complete(storage, place, key), 2)
    dates = [_date(match) for match, *_ in found]
    if not dates:
        return None
    allowed = 2 * (dates[0] - dates[1]) if len(dates) == 2 else timedelta(weeks=1, days=1)
    if now <= dates[0] + allowed + timedelta(days=1):
        return None
    return (
        f"the newest inventory below {uri} is of {dates[0]:%Y-%m-%d %H:%M} UTC, and the next is "
        "overdue: what was uploaded since is unknown. See whether the bucket's inventory is still "
        "enabled, and whether S3 may write it to its destination"
    )


def _is_manifest(key: str) -> bool:
    return key.rpartition("/")[2] == "manifest.json"


def _find_manifest(storage: Storage, bucket: str, key: str) -> tuple[str, bytes, bytes]:
    """The address of a manifest, with its content; under a prefix of the newest complete one."""
    if _is_manifest(key):
        return f"s3://{bucket}/{key}", *_get_manifest(storage, bucket, key)
    for match, content, checksum in _complete(storage, bucket, key):
        logger.info("the inventory of %s is read", match[2])
        return f"s3://{bucket}/{match[0]}", content, checksum
    raise NotFoundError(
        f"there is no complete inventory below s3://{bucket}/{key}: the first one takes AWS up to "
        "48 hours, and each has a folder of its date with manifest.json and manifest.checksum",
        reason="INVENTORY_MISSING",
    )


def _complete(
    storage: Storage, bucket: str, key: str
) -> Iterator[tuple[re.Match[str], bytes, bytes]]:
    """The complete inventories below a prefix, the newest first: name, manifest and checksum."""
    prefix = f"{key.rstrip('/')}/" if key else ""
    listed = {item.key for item in storage.list_objects(bucket, prefix)}
    found = [match for name in listed if (match := _dated(name))]
    folders = sorted({match[1] for match in found})
    if len(folders) > 1:
        raise SettingsError(
            f"there is more than one inventory below s3://{bucket}/{key}: name one of "
            + ", ".join(f"s3://{bucket}/{folder}" for folder in folders[:5])
        )
    for match in sorted(found, key=lambda match: match[2], reverse=True):
        # The checksum is written when all else is.
        if _checksum_key(match[0]) in listed:
            content, checksum = _get_manifest(storage, bucket, match[0])
            if _is_md5(content, checksum):
                yield match, content, checksum
            else:
                logger.warning("s3://%s/%s does not match its checksum", bucket, match[0])


def _dated(name: str) -> re.Match[str] | None:
    """A match where this is the manifest in a folder of a date that there is."""
    match = _DATED.fullmatch(name)
    try:
        return match if match and _date(match) else None
    except ValueError:
        return None


def _date(match: re.Match[str]) -> datetime:
    return datetime.strptime(match[2], "%Y-%m-%dT%H-%M%z")


def _checksum_key(manifest: str) -> str:
    return manifest.removesuffix("json") + "checksum"


def _get_manifest(storage: Storage, bucket: str, key: str) -> tuple[bytes, bytes]:
    return storage.get(bucket, key), storage.get(bucket, _checksum_key(key))


def _is_md5(content: bytes, checksum: bytes) -> bool:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return digest.encode() == checksum.strip().lower()


def _read_manifest(
    storage: Storage, where: str, content: bytes, checksum: bytes
) -> tuple[str, list[_Table]]:
    """The bucket that is listed, and the files that list it."""
    if not _is_md5(content, checksum):
        raise _bad(f"{where} does not match its manifest.checksum")
    try:
        manifest = json.loads(content)
        source, kind = manifest["sourceBucket"], manifest["fileFormat"]
        place = manifest["destinationBucket"].rpartition(":")[2]
        fields = [name.strip() for name in manifest["fileSchema"].split(",")]
        files = [(item["key"], item["MD5checksum"].lower()) for item in manifest["files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(f"{where} is no manifest of an S3 Inventory ({error!r})") from error
    if kind == "CSV":
        table = partial(_Table, columns=_CSV, header=fields)
    elif kind == "Parquet":
        table = partial(_Table, columns=_PARQUET)
    else:
        raise SettingsError(
            f"{where} is in the format {kind}: set the inventory's output format to CSV or Parquet"
        )
    return source, [table(place, key, md5=md5) for key, md5 in files]


def _read_table(storage: Storage, table: _Table, bucket: str) -> Iterator[StoredObject]:
    with tempfile.TemporaryDirectory(prefix="gun-detection-inventory-") as folder:
        path = storage.download(table.bucket, table.key, Path(folder) / "table")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if table.md5 not in (None, digest.hexdigest()):
            raise _bad(f"{table.where} has not the MD5 that its manifest says")
        parquet = table.columns is _PARQUET or table.key.endswith(".parquet")
        rows = _parquet_rows(path, table) if parquet else _csv_rows(path, table)
        yield from _objects(rows, table, bucket)


def _csv_rows(path: Path, table: _Table) -> Iterator[_Row]:
    with _open_text(path, table.key) as file:
        reader = csv.reader(file, strict=True)
        number = 0
        try:
            header = table.header or next(reader, [])
            columns = _present(header, table)
            places = [header.index(name) if name in columns else None for name in table.columns]
            for row in reader:
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields instead of {len(header)}")
                number += 1
                yield tuple(None if place is None else row[place] for place in places)
        except (csv.Error, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _bad(f"{table.where} cannot be read after row {number} ({error})") from error


def _open_text(path: Path, key: str) -> IO[str]:
    opener: Callable[..., Any] = gzip.open if key.endswith(".gz") else open
    # Excel writes a mark of byte order.
    text: IO[str] = opener(path, "rt", encoding="utf-8-sig", newline="")
    return text


def _parquet_rows(path: Path, table: _Table) -> Iterator[_Row]:
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = _present(file.schema_arrow.names, table)
            for batch in file.iter_batches(_BATCH, columns=columns):
                values = {name: _values(batch.column(name)) for name in columns}
                yield from zip(
                    *(values.get(name, [None] * batch.num_rows) for name in table.columns),
                    strict=True,
                )
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _bad(f"{table.where} cannot be read after row {number} ({error})") from error


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type):
        # Python's own times end at microseconds, and those without a zone are UTC.
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values


def _present(names: Iterable[str], table: _Table) -> list[str]:
    """Which of the table's columns are there; raises `SettingsError` when one is needed."""
    found = set(names)
    missing = [name for name in table.columns[:_NEEDED] if name not in found]
    if missing:
        where = (
            "switch on the optional fields Size, LastModifiedDate and ETag in the inventory's "
            "configuration, and wait for the next one"
            if table.columns is not _BY_HAND
            else f"a table has the columns {', '.join(_BY_HAND[:_NEEDED])}, named in its first row"
        )
        raise SettingsError(f"{table.where} lacks {', '.join(missing)}: {where}")
    return [name for name in table.columns if name in found]


def _objects(rows: Iterable[_Row], table: _Table, bucket: str) -> Iterator[StoredObject]:
    for number, (key, size, etag, modified, latest, marker) in enumerate(rows, start=1):
        try:
            if _flag(marker) or _flag(latest) is False:
                continue
            if table.header is not None:
                # A space is written as a plus, and a plus as %2B.
                key = unquote_plus(key, errors="strict")
            item = StoredObject(bucket, key, int(size), etag.strip('"'), _time(modified))
            item.check()
            if not key or not item.etag:
                raise ValueError("the key or the ETag is empty")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise _bad(f"{table.where}, row {number}: {error}") from error
        if not (key.endswith("/") and item.size == 0):
            yield item


def _flag(value: Any) -> bool | None:
    if value in (None, ""):
        return None
    return value if isinstance(value, bool) else value.lower() == "true"


def _time(value: Any) -> datetime:
    time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    # In UTC: PostgreSQL does not know every offset that Python does.
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def _bad(message: str) -> TerminalError:
    return TerminalError(
        f"{message}: have the inventory written again, or name an older one",
        reason="BAD_INVENTORY",
    )
