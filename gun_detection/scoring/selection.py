"""Which uploads a run is about, and which of them come first."""

from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

from gun_detection.database.models import ModelVersion
from gun_detection.scoring.sources import PartlyConfigured, Source, regular_expression

# `new`: what no model has scored; `rescore`: what another model than the present champion has.
Kind = Literal["new", "rescore"]

_OUTDATED = """
    u.current AND NOT EXISTS (SELECT FROM pending_upload p WHERE p.upload_id = u.id)
    AND NOT EXISTS (
        SELECT FROM ledger l
        WHERE l.upload_id = u.id AND l.model_id = :model AND NOT l.stale
    )
"""
_FROM = {"new": "pending_upload AS u (id)", "rescore": "upload u"}
_WHICH = {"new": "u.wanted", "rescore": _OUTDATED}
# The oldest uploads wait longest, but what was tried before keeps no other waiting, as it may fail
# each time. Of history, the newest is what people look at; of each source as much, so that one that
# cannot be read, whose uploads are taken on each time, keeps no other waiting.
_PLACE = {
    "new": "deferred, uploaded_at",
    "rescore": "row_number() OVER (ORDER BY u.id DESC) AS place",
}
_IN_SOURCE = {"new": "deferred, uploaded_at, id", "rescore": "id DESC"}
_IN_RUN = {"new": "deferred, uploaded_at, id", "rescore": "place, id DESC"}


def count(session: Session, kind: Kind, model: ModelVersion, source: Source) -> int:
    """How many uploads of a source a run by the model would be about."""
    condition, arguments = _scope(kind, model, source, 0)
    statement = f"SELECT COUNT(*) FROM {_FROM[kind]} WHERE {condition}"
    found = session.execute(text(statement), arguments)
    return int(found.scalar_one())


def choose(
    kind: Kind, model: ModelVersion, sources: list[Source], cap: int
) -> tuple[str, dict[str, Any]]:
    """A statement for the id and size of the uploads of a run, and its arguments: those of each
    source within its own cap, then all of them in their order within that of the run."""
    parts = []
    arguments: dict[str, Any] = {"cap": cap}
    for number, source in enumerate(sources):
        condition, values = _scope(kind, model, source, number)
        parts.append(
            f"(SELECT id, size, {_PLACE[kind]} FROM {_FROM[kind]} WHERE {condition} "
            f"ORDER BY {_IN_SOURCE[kind]} LIMIT :cap_{number})"
        )
        own = cap if source.images_per_run is None else min(cap, source.images_per_run)
        arguments |= values | {f"cap_{number}": own}
    union = " UNION ALL ".join(parts)
    return f"SELECT id, size FROM ({union}) u ORDER BY {_IN_RUN[kind]} LIMIT :cap", arguments


def _scope(
    kind: Kind, model: ModelVersion, source: Source, number: int
) -> tuple[str, dict[str, Any]]:
    """The condition of what a run is about in one source, and its arguments."""
    bucket, prefix = f"bucket_{number}", f"prefix_{number}"
    condition = f"{_WHICH[kind]} AND u.bucket = :{bucket} AND starts_with(u.key, :{prefix})"
    arguments: dict[str, Any] = {bucket: source.bucket, prefix: source.prefix}
    if kind == "rescore":
        # Of what waits, `wanted` says so.
        arguments["model"] = model.id
        for place, part in enumerate([source, *_within(source)]):
            within, include, exclude = (
                f"{name}_{number}_{place}" for name in ("within", "include", "exclude")
            )
            condition += (
                f" AND (NOT starts_with(u.key, :{within}) OR ("
                f"(CAST(:{include} AS text[]) = '{{}}'"
                f" OR u.key ~ ANY(CAST(:{include} AS text[])))"
                f" AND NOT u.key ~ ANY(CAST(:{exclude} AS text[]))))"
            )
            arguments |= {
                within: part.prefix,
                include: [regular_expression(pattern) for pattern in part.include],
                exclude: [regular_expression(pattern) for pattern in part.exclude],
            }
    return condition, arguments


def _within(source: Source) -> tuple[Source, ...]:
    return source.configured if isinstance(source, PartlyConfigured) else ()
