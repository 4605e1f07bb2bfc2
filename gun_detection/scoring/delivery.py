"""The bytes of uploads, and whether a server that fails for some of them still gives out others."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.errors import GunDetectionError, TransientError
from gun_detection.scoring.leases import Item, Lease
from gun_detection.settings import Settings

# Between the listing and the reading an object can be deleted, overwritten (its new version is
# another upload, found by the next listing), be archived, or turn out too large: outcomes, not
# failures.
UNREADABLE = {
    "OBJECT_MISSING",
    "OBJECT_CHANGED",
    "TOO_LARGE",
    "ARCHIVED",
    "REQUEST_REFUSED",
}
# So many objects in a row that a server fails to deliver may be the server's doing.
_MOST_FAILED = 20


class Reads(Protocol):
    """Where bytes come from."""

    def get(
        self, bucket: str, key: str, *, max_bytes: int | None = None, etag: str | None = None
    ) -> bytes: ...


class Delivery:
    """Reads the uploads of a lease; its methods are called by many threads."""

    def __init__(self, lease: Lease, settings: Settings, reader: Reads) -> None:
        self._lease, self._settings, self._reader = lease, settings, reader
        self._failed_in_a_row = 0
        # An object that came, and when it was asked for.
        self._known: Item | None = None
        self._asked_at = float("-inf")
        self._away = False
        self._lock, self._asking = threading.Lock(), threading.Lock()

    def get(self, item: Item) -> bytes:
        """The bytes of an upload; raises the server's error."""
        asked_at = time.monotonic()
        try:
            data = self._reader.get(
                item.bucket, item.key, max_bytes=self._settings.max_image_bytes, etag=item.etag
            )
        except TransientError as error:
            with self._lock:
                self._failed_in_a_row += error.reason not in UNREADABLE
            raise
        with self._lock:
            self._known, self._asked_at, self._failed_in_a_row = item, asked_at, 0
        return data

    @property
    def doubtful(self) -> bool:
        """Whether so many failed in a row that it may be the server's doing."""
        return self._failed_in_a_row >= _MOST_FAILED

    def goes_on(self, since: float) -> bool:
        """Whether the server gives out what it is asked for after this moment (`time.monotonic`).

        One thread asks for all of them, and once in vain is enough: the attempt is to end then.
        """
        with self._asking:
            if not self._away and self._asked_at < since:
                self._away = not self._ask()
            return not self._away

    def _ask(self) -> bool:
        """Ask for what came before, or else for a few at the same time."""
        if self._known is not None:
            refusal = self._refusal(self._known)
            # It may be gone by now: that says nothing.
            if refusal not in UNREADABLE:
                return refusal is None
        few = self._few()
        with ThreadPoolExecutor(len(few)) as pool:
            return None in list(pool.map(self._refusal, few))

    def _refusal(self, item: Item) -> str | None:
        try:
            self.get(item)
        except GunDetectionError as error:
            return error.reason
        return None

    def _few(self) -> list[Item]:
        """Some of the lease, and some that were scored before, of the same buckets."""
        items = self._lease.items
        places = {len(items) // 4, len(items) // 2, len(items) - 1}
        buckets = sorted({item.bucket for item in items})
        with open_session(self._settings) as session:
            scored = session.execute(_SCORED, {"buckets": buckets, "parts": 8}).all()
        return [items[place] for place in places] + [Item(*row) for row in scored]


# The last one, and others of earlier times, as it may be the last ones that nobody may read; each
# looked for among so many that this takes no time in a bucket of which none was scored.
_SCORED = text(
    """
    SELECT DISTINCT u.id, u.bucket, u.key, u.etag, u.size
    FROM (SELECT MAX(id) AS id FROM ledger) last
    CROSS JOIN generate_series(1, :parts) part
    CROSS JOIN LATERAL (
        SELECT u.* FROM (
            SELECT upload_id FROM ledger
            WHERE id <= last.id * part / :parts AND reason IS NULL ORDER BY id DESC LIMIT 10000
        ) near JOIN upload u ON u.id = near.upload_id
        WHERE u.current AND u.bucket = ANY(CAST(:buckets AS text[])) LIMIT 1
    ) u
    """
)
