"""Where uploads come from: buckets, each with its own prefix, patterns, partitions and caps."""

from datetime import UTC, datetime, time, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gun_detection.errors import SettingsError
from gun_detection.settings import Settings


class Source(BaseModel):
    """One bucket, or a part of one, that is scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str = Field(min_length=1, description="Name of the bucket.")
    prefix: str = Field("", description="Only keys that start with this.")
    include: tuple[str, ...] = Field(
        (), description="Patterns like `*.jpg`, of which a key matches at least one; none: all."
    )
    exclude: tuple[str, ...] = Field((), description="Patterns of keys that are left out.")
    partitions: str | None = Field(
        None,
        description="What follows the prefix in buckets that are laid out by date, as `strftime` "
        "writes it, for example `%Y/%m/%d/`, or `%Y/%m/%d/%H/` by the hour: only the newest days "
        "are listed.",
    )
    days: int = Field(
        3,
        gt=0,
        description="How many days of partitions are listed, yesterday always among them; after "
        "an outage, so many before it. An upload into the folder of an older day, as of a camera "
        "that was away for longer, is found by a queue or by a run of that prefix only.",
    )
    inventory: str | None = Field(
        None,
        description="A listing instead of paging, for buckets too large for it: the `s3://` "
        "address of an S3 Inventory (its newest is taken), of a CSV or of a Parquet file.",
    )
    queue: str | None = Field(
        None, description="URL of the SQS queue that gets this bucket's event notifications."
    )
    watch: bool = Field(
        True, description="Whether it is listed between the nights, to score uploads at once."
    )
    images_per_run: int | None = Field(
        None, gt=0, description="Most pictures of this bucket in one run; the rest waits."
    )

    @field_validator("partitions")
    @classmethod
    def _not_finer_than_hours(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            hour = datetime(2026, 1, 1, 0)
            end = hour + timedelta(hours=1, microseconds=-1)
            if hour.strftime(pattern) != end.strftime(pattern):
                raise ValueError(
                    f"{pattern!r} differs within an hour: end it with the hour, or with the day, "
                    "which lists all that begins with that"
                )
        return pattern

    def wants(self, key: str) -> bool:
        """Whether the patterns let this key through; letters in capitals are other letters."""
        if self.include and not any(fnmatchcase(key, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(key, pattern) for pattern in self.exclude)

    def covers(self, bucket: str, key: str) -> bool:
        """Whether an upload is of this source."""
        return bucket == self.bucket and key.startswith(self.prefix) and self.wants(key)

    def prefixes(self, now: datetime, last: datetime | None = None) -> list[str]:
        """What is listed: the prefix, or those of whole days up to tomorrow, as clocks differ.

        Yesterday is among them always: an upload that begins before midnight ends after it.
        `last` is when it was listed whole before: what fell due since then is listed as well.
        """
        if self.partitions is None:
            return [self.prefix]
        today = now.astimezone(UTC).date()
        last_day = min(today, last.astimezone(UTC).date()) if last else today
        days = max(self.days, 2)
        first = datetime.combine(last_day - timedelta(days=days - 1), time(), UTC)
        # By hours, as a pattern may go down to them; those of one day mostly are the same.
        hours = 24 * ((today - last_day).days + days + 1)
        moments = (first + timedelta(hours=number) for number in range(hours))
        return sorted({self.prefix + moment.strftime(self.partitions) for moment in moments})


class PartlyConfigured(Source):
    """A prefix with which those of some `configured` sources begin: their patterns hold there."""

    configured: tuple[Source, ...]

    def wants(self, key: str) -> bool:
        within = [source for source in self.configured if key.startswith(source.prefix)]
        return super().wants(key) and all(source.wants(key) for source in within)


def regular_expression(pattern: str) -> str:
    """What PostgreSQL matches a key against to find what `Source.wants` does, for one pattern.

    https://docs.python.org/3/library/fnmatch.html, and "Regular Expression Escapes" in
    https://www.postgresql.org/docs/current/functions-matching.html.
    """
    made, place = [], 0
    while place < len(pattern):
        letter = pattern[place]
        place += 1
        # A bracket right after the opening one is in the set, and one that stays open is a letter.
        begin = place + pattern.startswith("!", place)
        end = pattern.find("]", begin + 1) if letter == "[" else -1
        if end >= 0:
            made.append(_set(pattern[begin:end], negated=begin > place))
            place = end + 1
        else:
            made.append({"*": ".*", "?": "."}.get(letter) or _escape(letter))
    return f"^{''.join(made)}$"


def _set(letters: str, *, negated: bool) -> str:
    made, place = [], 0
    while place < len(letters):
        first, last = letters[place], letters[place]
        if letters[place + 1 : place + 2] == "-" and place + 2 < len(letters):
            last = letters[place + 2]
            place += 2
        place += 1
        # What runs backwards holds nothing.
        if first <= last:
            made.append(_escape(first) + (f"-{_escape(last)}" if first < last else ""))
    if not made:
        return "." if negated else "$."
    return f"[{'^' if negated else ''}{''.join(made)}]"


def _escape(letter: str) -> str:
    return f"\\U{ord(letter):08x}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    buckets: list[Source] = Field(min_length=1)


def load_sources(settings: Settings) -> list[Source]:
    """The configured sources; raises `SettingsError` that says where the file is wrong."""
    path = settings.sources_file
    if path is None:
        return [Source(bucket=settings.uploads_bucket)]
    try:
        content = yaml.safe_load(path.read_text())
        sources = _File.model_validate(content).buckets
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"GUN_DETECTION_SOURCES_FILE {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise SettingsError(
            f"GUN_DETECTION_SOURCES_FILE {path}: {where}: {first['msg']}"
        ) from error
    _refuse(sources, settings, path)
    return sources


def choose_sources(
    sources: list[Source],
    settings: Settings,
    bucket: str | None = None,
    prefix: str | None = None,
) -> list[Source]:
    """The sources of a run: all, those of one bucket, or a part of one bucket by its prefix.

    A bucket that is not configured is taken whole. A prefix is listed itself, by paging, whatever
    the partitions or the inventory of its source are; the patterns of all sources below it hold.
    Raises `SettingsError` for a prefix without a bucket where there are several, for the data
    bucket, and for a name that is empty.
    """
    if bucket == "":
        # Nobody who names a bucket means all of them.
        raise SettingsError("the name of the bucket is empty: name one, or none for all of them")
    if bucket == settings.data_bucket:
        raise SettingsError(f"{bucket} is the data bucket: it is not scored")
    chosen = [source for source in sources if bucket in (None, source.bucket)]
    if not chosen:
        assert bucket is not None
        chosen = [Source(bucket=bucket)]
    if not prefix:
        return chosen
    if len({source.bucket for source in chosen}) > 1:
        names = ", ".join(sorted({source.bucket for source in chosen}))
        raise SettingsError(f"a prefix needs a bucket: choose one of {names}")
    for source in chosen:
        if prefix.startswith(source.prefix):
            change = {"prefix": prefix, "partitions": None, "inventory": None}
            return [source.model_copy(update=change)]
    bucket = chosen[0].bucket
    within = tuple(source for source in chosen if source.prefix.startswith(prefix))
    if within:
        return [PartlyConfigured(bucket=bucket, prefix=prefix, configured=within)]
    return [Source(bucket=bucket, prefix=prefix)]


def _refuse(sources: list[Source], settings: Settings, path: Path) -> None:
    """Two sources that share keys would each count them; the data bucket is no upload."""
    for number, source in enumerate(sources):
        if source.bucket == settings.data_bucket:
            raise SettingsError(f"{path}: {source.bucket} is the data bucket: it is not scored")
        for other in sources[:number]:
            shares = source.prefix.startswith(other.prefix) or other.prefix.startswith(
                source.prefix
            )
            if source.bucket == other.bucket and shares:
                raise SettingsError(
                    f"{path}: {source.bucket} is named twice with prefixes that overlap, "
                    f"{source.prefix!r} and {other.prefix!r}: give each its own"
                )
