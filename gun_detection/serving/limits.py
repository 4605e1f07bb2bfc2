"""How many pictures a client may send in a time."""

import asyncio
import ipaddress
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from pathlib import Path

from limits import RateLimitItem, parse_many
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.storage.base import MovingWindowSupport
from limits.strategies import MovingWindowRateLimiter

from gun_detection.errors import SettingsError
from gun_detection.serving.refusals import Refusal, busy
from gun_detection.settings import Settings

# How long the counter is waited for.
_SECONDS = 5.0
_THREADS = 4


class FileStorage(Storage, MovingWindowSupport):
    """Counts in a SQLite file, for the processes of one machine; nothing of it need last."""

    STORAGE_SCHEME = None

    def __init__(self, path: Path) -> None:
        super().__init__(wrap_exceptions=True)
        self._path = path
        self._threads = threading.local()
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS hit (key TEXT, at REAL)")
            connection.execute("CREATE INDEX IF NOT EXISTS hit_key ON hit (key, at)")

    @property
    def base_exceptions(self) -> type[Exception]:
        return sqlite3.Error

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = time.time()
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            # Also what other clients, who never came back, have left.
            connection.execute("DELETE FROM hit WHERE at <= ?", [now - expiry])
            [(used,)] = connection.execute("SELECT COUNT(*) FROM hit WHERE key = ?", [key])
            if used + amount > limit:
                return False
            connection.executemany("INSERT INTO hit VALUES (?, ?)", [(key, now)] * amount)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = time.time()
        [(first, used)] = self._connection().execute(
            "SELECT MIN(at), COUNT(*) FROM hit WHERE key = ? AND at > ?", [key, now - expiry]
        )
        return (now if first is None else first), used

    def check(self) -> bool:
        return bool(self._connection().execute("SELECT 1").fetchone())

    def reset(self) -> int | None:
        with self._connection() as connection:
            return connection.execute("DELETE FROM hit").rowcount

    def clear(self, key: str) -> None:
        with self._connection() as connection:
            connection.execute("DELETE FROM hit WHERE key = ?", [key])

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError("this storage has moving windows only")

    def get(self, key: str) -> int:
        raise NotImplementedError("this storage has moving windows only")

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError("this storage has moving windows only")

    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._threads, "connection"):
            connection = sqlite3.connect(self._path, timeout=_SECONDS, isolation_level=None)
            connection.execute("PRAGMA synchronous = OFF")
            self._threads.connection = connection
        found: sqlite3.Connection = self._threads.connection
        return found


def parse_limit(text: str) -> RateLimitItem | None:
    """`10/minute`, or None for `off`; raises `SettingsError`, also for several limits."""
    if text == "off":
        return None
    items: list[RateLimitItem] = []
    with suppress(ValueError):
        items = parse_many(text)
    if len(items) != 1 or items[0].amount < 1:
        raise SettingsError(
            f"GUN_DETECTION_SERVE_RATE_LIMIT is {text!r}: write one limit, of 1 or more, as in "
            "10/minute, or off"
        )
    return items[0]


class RateLimit:
    """Pictures by client in a moving window; `folder` is shared by the processes of a machine.

    Without one, each process counts by itself.
    """

    def __init__(self, settings: Settings, folder: Path | None) -> None:
        self._item = parse_limit(settings.serve_rate_limit)
        store = settings.serve_rate_store
        storage: Storage
        if store is None:
            storage = FileStorage(folder / "rate-limit.sqlite") if folder else MemoryStorage()
        else:
            try:
                made = storage_from_string(store.get_secret_value(), wrap_exceptions=True)
            except ConfigurationError:
                raise SettingsError(
                    "GUN_DETECTION_SERVE_RATE_STORE is not understood: write redis://host:6379"
                ) from None
            assert isinstance(made, Storage)
            storage = made
        self._limiter = MovingWindowRateLimiter(storage)
        # Its own: in those of the process it would wait for whatever else hangs.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rate-limit")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def spend(self, client: str, pictures: int = 1, *, before: int = 0) -> dict[str, str]:
        """Headers that say what is left.

        Raises `Refusal`: 429 where it is too little, 503 where the counter does not answer.
        `before` are pictures of the same request that were spent already.
        """
        if self._item is None or pictures < 1:
            return {}
        try:
            async with asyncio.timeout(_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._spend, self._item, client, pictures, before
                )
        except (StorageError, TimeoutError):
            raise busy("the counter of requests is away: try again", 5, "RATE_STORE") from None

    def _spend(
        self, item: RateLimitItem, client: str, pictures: int, before: int
    ) -> dict[str, str]:
        granted = self._limiter.hit(item, client, cost=pictures)
        window = self._limiter.get_window_stats(item, client)
        seconds = max(1, ceil(window.reset_time - time.time()))
        headers = {
            "X-RateLimit-Limit": str(item.amount),
            "X-RateLimit-Remaining": str(max(0, window.remaining)),
            "X-RateLimit-Reset": str(seconds),
        }
        if granted:
            return headers
        whole = before + pictures
        if whole > item.amount:
            raise Refusal(
                429,
                "RATE_LIMITED",
                f"{whole} pictures at once are more than the {item} allowed: send fewer",
                headers,
            )
        raise Refusal(
            429,
            "RATE_LIMITED",
            f"more than {item} pictures: try again in {seconds} s",
            headers | {"Retry-After": str(seconds)},
        )


def client_name(address: str | None) -> str:
    """Who a client is by its address: an IPv6 network of 64 bits is usually one."""
    if address is None:
        return "unknown"
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
