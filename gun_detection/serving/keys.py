"""API keys: only their hashes are kept, each with scopes and a day on which it ends.

An entry is one word, `name:scopes:end:sha256`, with scopes joined by `+` and `never` or the last
day (UTC) as its end; one that ends has `:` and the day on which it was made after it. A key holds
256 random bits, so that a plain hash of it cannot be turned back.
"""

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Self

from gun_detection.errors import NotFoundError, SettingsError
from gun_detection.settings import Settings

SCOPES = ("predict", "store", "metrics")
PREFIX = "gd_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile("[0-9a-f]{64}")
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key: `end` is its last day, or None; `made` its first, where it ends."""

    name: str
    scopes: frozenset[str]
    end: date | None
    sha256: str
    made: date | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Raises `SettingsError`, without the entry in it."""
        parts = entry.split(":")
        if len(parts) not in (4, 5):
            raise SettingsError("an API key's entry is not name:scopes:end:sha256")
        name, scopes, end, sha256, *made = parts
        check_name(name)
        if not _SHA256.fullmatch(sha256):
            raise SettingsError(f"the entry of the API key {name} has no sha256")
        last = None if end == "never" else _day(name, "ends", end, "YYYY-MM-DD or never")
        first = _day(name, "was made", made[0], "YYYY-MM-DD") if made else None
        return cls(name, check_scopes(name, scopes.split("+")), last, sha256, first)

    def __str__(self) -> str:
        scopes = "+".join(scope for scope in SCOPES if scope in self.scopes)
        made = f":{self.made}" if self.made else ""
        return f"{self.name}:{scopes}:{self.end or 'never'}:{self.sha256}{made}"

    def valid(self, today: date) -> bool:
        return self.end is None or today <= self.end

    @property
    def days(self) -> int | None:
        """How long it lasts, None for ever; raises `SettingsError` if its entry does not say."""
        if self.end is None:
            return None
        if self.made is None:
            raise SettingsError(
                f"the entry of the API key {self.name} does not say on which day it was made: "
                "say with --days how long the new one lasts"
            )
        return (self.end - self.made).days


def _day(name: str, what: str, text: str, form: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"the API key {name} {what} on {text!r}: write {form}") from None


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name of an API key: letters, digits, dots, dashes and underscores"
        )


def check_scopes(name: str, scopes: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(scopes)
    if not chosen or not chosen <= set(SCOPES):
        raise SettingsError(f"scopes of the API key {name}: choose from {', '.join(SCOPES)}")
    return chosen


def today() -> date:
    return datetime.now(UTC).date()


def new_key(name: str, scopes: Iterable[str], days: int | None) -> tuple[str, Key]:
    """(the key itself, which is never kept, what is kept of it)."""
    secret = new_secret()
    key = key_of(secret, name, scopes)
    if days is not None:
        key = replace(key, end=today() + timedelta(days=days), made=today())
    return secret, key


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def key_of(secret: str, name: str, scopes: Iterable[str]) -> Key:
    """What is kept of a key that never ends; raises `SettingsError` for a bad name or scope."""
    check_name(name)
    return Key(name, check_scopes(name, scopes), None, _digest(secret))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of the settings and of their file, which may change at any time."""

    def __init__(self, settings: Settings) -> None:
        self._fixed = given_keys(settings)
        self._file = keys_file(settings)
        self._looked, self._stamp = 0.0, _stamp(self._file)
        self._keys = self._index()

    def find(self, key: str) -> Key | None:
        """The valid key that this is."""
        self._look()
        # The index is by hash: how long this takes says nothing about the keys.
        found = self._keys.get(_digest(key))
        return found if found is not None and found.valid(today()) else None

    def __len__(self) -> int:
        return sum(key.valid(today()) for key in self._keys.values())

    def _look(self) -> None:
        """Read the file again if it changed; raises `SettingsError` if it is damaged."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            # Until it can be read again, every request fails: keys may have been taken out of it.
            self._keys = self._index()
            self._stamp = stamp
        self._looked = time.monotonic()

    def _index(self) -> dict[str, Key]:
        return {key.sha256: key for key in [*self._fixed, *read_keys(self._file)]}


def given_keys(settings: Settings) -> list[Key]:
    """The keys of the settings themselves; raises `SettingsError` for a damaged entry."""
    given = settings.serve_keys.get_secret_value() if settings.serve_keys else ""
    try:
        return [Key.parse(entry) for entry in given.split()]
    except SettingsError as error:
        raise SettingsError(f"GUN_DETECTION_SERVE_KEYS is damaged: {error.message}") from None


def keys_file(settings: Settings) -> Path:
    return settings.serve_keys_file or settings.home / "api-keys"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"the file of API keys {path} cannot be read: {error}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(path: Path) -> list[Key]:
    """The entries of a file; none if there is no file."""
    try:
        lines = path.read_text().split()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"the file of API keys {path} cannot be read: {error}") from None
    return [Key.parse(line) for line in lines]


def add_key(path: Path, key: Key) -> None:
    """Add an entry; raises `SettingsError` if a valid key has this name."""
    with _changing(path) as keys:
        if any(other.name == key.name and other.valid(today()) for other in keys):
            raise SettingsError(
                f"there is an API key {key.name}: rotate it, revoke it, or take another name"
            )
        keys.append(key)


def rotate_key(path: Path, name: str, overlap_days: int, days: int | None) -> tuple[str, Key]:
    """A new key of this name and scopes, which lasts `days` or as long as the one before it did.

    Those before it end in `overlap_days` at the latest. Raises `NotFoundError` if there is none,
    and `SettingsError` if it is not known how long the last one was to last.
    """
    with _changing(path) as keys:
        before = [key for key in keys if key.name == name and key.valid(today())]
        if not before:
            raise NotFoundError(f"there is no valid API key {name} in {path}")
        last = today() + timedelta(days=overlap_days)
        for key in before:
            end = last if key.end is None else min(last, key.end)
            keys[keys.index(key)] = replace(key, end=end)
        last_made = before[-1]
        secret, key = new_key(name, last_made.scopes, last_made.days if days is None else days)
        keys.append(key)
    return secret, key


def revoke_key(path: Path, name: str) -> int:
    """Remove all keys of this name, at once; how many they were."""
    with _changing(path) as keys:
        kept = [key for key in keys if key.name != name]
        removed = len(keys) - len(kept)
        if not removed:
            raise NotFoundError(f"there is no API key {name} in {path}")
        keys[:] = kept
    return removed


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The entries, to be changed by one process at a time; replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = partial(_open_for_owner, (path if path.exists() else path.parent).stat())
    with open(path.with_name(path.name + ".lock"), "w", opener=opener) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_keys(path)
        yield keys
        new = path.with_name(path.name + ".new")
        with open(new, "w", opener=opener) as file:
            file.writelines(f"{key}\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)


def _open_for_owner(owner: os.stat_result, path: str, flags: int) -> int:
    """A private file; what root writes is given away, since the service is another user."""
    # The folder may be that user's: no link in it shall lead root elsewhere.
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    return descriptor
