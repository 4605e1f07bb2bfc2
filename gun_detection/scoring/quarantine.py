"""Pictures that have no detections because they could not be used: list them, try them again,
take them out."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

from gun_detection.errors import GunDetectionError, TransientError
from gun_detection.scoring.pending import judged_anew
from gun_detection.settings import Settings
from gun_detection.storage import Storage


@dataclass(frozen=True)
class Quarantined:
    """A row of the view `quarantine`: the present outcome of the newest version of a key."""

    upload_id: int
    bucket: str
    key: str
    etag: str
    reason: str
    message: str | None
    sha256: str | None
    tries: int
    first_seen_at: datetime
    scored_at: datetime
    run_id: str


def list_quarantine(
    session: Session,
    *,
    reasons: Sequence[str] = (),
    bucket: str | None = None,
    prefix: str = "",
    run_id: str | None = None,
    limit: int | None = None,
) -> list[Quarantined]:
    """The newest first; without conditions all of them."""
    rows = session.execute(
        text(
            """
            SELECT upload_id, bucket, key, etag, reason, message, sha256, tries,
                   first_seen_at, scored_at, run_id
            FROM quarantine
            WHERE (CAST(:reasons AS text[]) = '{}' OR reason = ANY(CAST(:reasons AS text[])))
            AND (CAST(:bucket AS text) IS NULL OR bucket = :bucket)
            AND starts_with(key, :prefix)
            AND (CAST(:run AS text) IS NULL OR run_id = :run)
            ORDER BY scored_at DESC, upload_id DESC LIMIT :limit
            """
        ),
        {
            "reasons": list(reasons),
            "bucket": bucket,
            "prefix": prefix,
            "run": run_id,
            "limit": limit,
        },
    )
    return [Quarantined(**row) for row in rows.mappings()]


def retry(session: Session, upload_ids: Sequence[int]) -> int:
    """Have these judged anew by the next run, after all others; how many there were.

    What they have now stays until then, and the count of tries goes on.
    """
    return int(session.execute(_RETRY, {"ids": list(upload_ids)}).scalar_one())


_RETRY = judged_anew("l.upload_id = ANY(:ids) AND l.outcome = 'quarantined'", deferred=True)


def judge_again(session: Session, model_id: str) -> int:
    """Have `model_id` look once more at what may not be the picture's fault; how many there are.

    At the earliest half a day after the last time: until it succeeds for objects that a server did
    not deliver, and `TRIES` times in all for those that another model has scored, and for pictures
    of which a process died or that took too much, as a machine in trouble lets good pictures look
    like that.
    """
    found = session.execute(
        _JUDGE_AGAIN,
        {
            "model": model_id,
            "undelivered": ["ACCESS_DENIED", "BUCKET_MISSING", "UNREADABLE"],
            "doubtful": ["CRASHED", "DECODER_CRASHED", "DECODE_TIMEOUT", "OUT_OF_MEMORY"],
            "tries": TRIES,
        },
    )
    return int(found.scalar_one())


TRIES = 3
_JUDGE_AGAIN = judged_anew(
    """
    l.reason IS NOT NULL AND NOT l.stale AND l.created_at < now() - interval '12 hours'
    AND (
        l.reason = ANY(CAST(:undelivered AS text[]) || CAST(:doubtful AS text[]))
        AND l.tries < :tries AND l.model_id = :model
        OR NOT EXISTS (SELECT FROM ledger o WHERE o.upload_id = u.id AND o.reason IS NULL)
        AND (
            l.reason = ANY(CAST(:undelivered AS text[]))
            OR l.reason = ANY(CAST(:doubtful AS text[])) AND l.tries < :tries
        )
    )
    """,
    deferred=True,
)


def export(
    rows: Sequence[Quarantined], folder: Path, settings: Settings, storage: Storage
) -> tuple[int, int]:
    """Write `quarantine.csv` and the files themselves, for a look at what was uploaded.

    (files written, objects that are gone, were overwritten or cannot be had.) Keys are never paths:
    a file is named by the sha256 of its bytes, and the table says which key it had. Treat the files
    as hostile. Table and files are written whole or not at all: an export that fails leaves what
    an earlier one wrote.

    Raises the server's error where it fails for an object that it delivered before, and, when the
    table is written, where none was delivered.
    """
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    written = gone = 0
    failed: GunDetectionError | None = None
    with _whole(folder / "quarantine.csv") as unfinished, unfinished.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*Quarantined.__dataclass_fields__, "file"])
        for row in rows:
            try:
                data = storage.get(
                    row.bucket, row.key, max_bytes=settings.max_image_bytes, etag=row.etag
                )
            except GunDetectionError as error:
                of_one = error.reason in _OF_ONE_OBJECT or row.reason in _UNDELIVERED
                if isinstance(error, TransientError) and not of_one:
                    raise
                if error.reason not in _OF_ONE_OBJECT:
                    failed = error
                name, gone = "", gone + 1
            else:
                name = hashlib.sha256(data).hexdigest()
                with _whole(files / name) as part:
                    part.write_bytes(data)
                written += 1
            table.writerow([*(_cell(value) for value in asdict(row).values()), name])
    if failed is not None and not written:
        raise failed
    return written, gone


# Of these the server did not give out the object when it was to be scored.
_UNDELIVERED = {"ACCESS_DENIED", "BUCKET_MISSING", "UNREADABLE", "ARCHIVED", "REQUEST_REFUSED"}
# These say nothing about the server, nor about the rights that it gives.
_OF_ONE_OBJECT = {
    "OBJECT_MISSING",
    "OBJECT_CHANGED",
    "TOO_LARGE",
    "ARCHIVED",
    "REQUEST_REFUSED",
}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """What is to be written, and takes the place of `path` once it is."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        # A full disk does not say by itself which one it is.
        error.filename = error.filename or str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _cell(value: object) -> object:
    """Text that no spreadsheet takes for a formula, and no reader for two lines."""
    if not isinstance(value, str):
        return value
    quoted = json.dumps(value, ensure_ascii=False)[1:-1]
    return "'" + quoted if quoted.startswith(("=", "+", "-", "@")) else quoted
