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
# Of each source its next ones in their order, with their `place` in it. The oldest uploads wait
# longest. What was tried before may fail each time, so that it comes after others, and yet one in
# eleven, as the server may have been to blame. Of history, the newest is what people look at.
_NEXT = {
    "new": """
        SELECT *, row_number() OVER (PARTITION BY deferred ORDER BY uploaded_at, id)
                  * CASE WHEN deferred THEN 10 ELSE 1 END AS place
        FROM (
            (SELECT id, size, deferred, uploaded_at FROM {which} AND NOT deferred
             ORDER BY uploaded_at, id LIMIT :{cap})
            UNION ALL
            (SELECT id, size, deferred, uploaded_at FROM {which} AND deferred
             ORDER BY uploaded_at, id LIMIT :{cap})
        ) w ORDER BY place, deferred LIMIT :{cap}
    """,
    "rescore": """
        SELECT id, size, row_number() OVER (ORDER BY u.id DESC) AS place
        FROM {which} ORDER BY id DESC LIMIT :{cap}
    """,
}
# Where a run has no room for all of them, and then the order in which its own are looked at.
_TURNS = {"new": "place, deferred, uploaded_at, id", "rescore": "place, id DESC"}
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
    """A statement for the id and size of the uploads of a run, and its arguments.

    They are those of each source within its own cap; where they are more than that of the run, the
    sources take turns, so that none waits for what was left over of another, or cannot be read.
    """
    parts = []
    arguments: dict[str, Any] = {"cap": cap}
    for number, source in enumerate(sources):
        condition, values = _scope(kind, model, source, number)
        which, own = f"{_FROM[kind]} WHERE {condition}", f"cap_{number}"
        parts.append(f"({_NEXT[kind].format(which=which, cap=own)})")
        most = cap if source.images_per_run is None else min(cap, source.images_per_run)
        arguments |= values | {own: most}
    waiting = " UNION ALL ".join(parts)
    chosen = f"SELECT * FROM ({waiting}) w ORDER BY {_TURNS[kind]} LIMIT :cap"
    return f"SELECT id, size FROM ({chosen}) c ORDER BY {_IN_RUN[kind]}", arguments


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
