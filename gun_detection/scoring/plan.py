"""What is to be scored: a survey before a run, then the run with its shards."""

import logging
import uuid
from dataclasses import dataclass

from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion, ScoringRun, Shard, Upload
from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    TerminalError,
    TransientError,
    explain_os_error,
)
from gun_detection.release.champion import require_storable
from gun_detection.scoring.listing import Listed, note_uploads, sort_out
from gun_detection.scoring.quarantine import judge_again
from gun_detection.scoring.selection import Kind, choose, count
from gun_detection.scoring.sources import Source, load_sources
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

# A part of a full shard that is worth the start of a task and a process.
_LEAST = 0.1

# Of so many shards, the last so many with at least so many pictures tell how fast scoring is.
_KNOWN_SHARDS, _TIMED_SHARDS, _ENOUGH = 2000, 50, 100
# At most so many times as much is put into a shard where pictures are quick.
_MOST_GROWTH = 20

_LOCK = 0x67756E72


@dataclass(frozen=True)
class Survey:
    """What a run would cover, before it is opened.

    `unlisted` says of sources that could not be listed why; what was known of them is in the run.
    Of the `listed` objects (None where nothing was listed), `new` and `changed` were not known
    before, `returned` had been gone, and `scored` have an outcome; `waiting` is what the run is
    about, of which `planned` fit into its caps and `left_over` wait for the next: for one by hand
    where the bucket or prefix is among `by_hand`, which no configured source covers. `outdated` is
    what a re-scoring would be about; it is counted for one only. `seconds` (of the run, with all
    its workers) and `cost` are estimates from earlier runs, None where there are none.
    """

    kind: Kind
    model_id: str
    buckets: list[str]
    prefix: str
    unlisted: dict[str, str]
    by_hand: list[str]
    listed: int | None
    left_out: int
    new: int
    changed: int
    returned: int
    scored: int
    outdated: int | None
    waiting: int
    planned: int
    left_over: int
    megabytes: float
    seconds: float | None
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """A run with its shards. `planned` counts its uploads, `left_over` those that wait for the
    next one."""

    run_id: str
    kind: Kind
    model_id: str
    threshold: float
    planned: int
    left_over: int
    shard_ids: list[int]


def survey(
    kind: Kind,
    model: ModelVersion,
    sources: list[Source],
    settings: Settings,
    storage: Storage,
    prefix: str = "",
    *,
    listing: bool = True,
) -> Survey:
    """List the sources, note their uploads, and say what a run by `model` would cover.

    Without `listing`, and in a re-scoring, it is about what is known. A source that cannot be
    listed keeps neither the others waiting nor what is known of it. Where all of them fail, the
    first error is raised if there is no use in going on: nothing waits, no server answers, or it is
    what somebody named by hand. That is `NotFoundError` for a bucket that is not there, also in a
    re-scoring where no upload of it is known.
    """
    counts = Listed()
    errors: dict[str, GunDetectionError] = {}
    configured = load_sources(settings)
    by_hand = [_address(source) for source in sources if not _is_within(source, configured)]
    listing = listing and kind == "new"
    if listing:
        errors = _list(sources, counts, settings, storage)
    nothing_listed = len(errors) == len(sources)
    # Where no server answers, nothing could be read either: the survey is to be tried again.
    away = all(isinstance(error, TransientError) for error in errors.values())
    if nothing_listed and (by_hand or away):
        raise next(iter(errors.values()))
    if kind == "rescore":
        _require_known(sources, configured, settings, storage)
    if kind == "new":
        # Also where nothing is planned: what no source covers any more is not late.
        with open_session(settings) as session:
            again = judge_again(session, model.id)
            logger.info("%d uploads are to be judged once more", again)
            sort_out(session, sources, configured)
    with open_session(settings) as session:
        waiting = sum(count(session, kind, model, source) for source in sources)
        if nothing_listed and not waiting:
            raise next(iter(errors.values()))
        chosen, arguments = choose(kind, model, sources, _cap(kind, settings))
        totals = f"SELECT COUNT(*) AS uploads, COALESCE(SUM(size), 0) AS bytes FROM ({chosen}) c"
        planned = session.execute(text(totals), arguments).one()
        each = _seconds_each(session, model)
    # A re-scoring goes one shard at a time, as what is uploaded meanwhile comes first.
    at_once = settings.scoring_tasks if kind == "new" else 1
    work = None if each is None else each * planned.uploads
    return Survey(
        kind=kind,
        model_id=model.id,
        buckets=sorted({source.bucket for source in sources}),
        prefix=prefix,
        unlisted={address: error.message for address, error in errors.items()},
        by_hand=by_hand,
        listed=counts.objects if listing else None,
        left_out=counts.left_out,
        new=counts.new,
        changed=counts.changed,
        returned=counts.returned,
        scored=max(0, counts.objects - waiting) if listing else 0,
        outdated=waiting if kind == "rescore" else None,
        waiting=waiting,
        planned=planned.uploads,
        left_over=waiting - planned.uploads,
        megabytes=round(int(planned.bytes) / 2**20, 1),
        seconds=None if work is None else round(work / at_once, 1),
        cost=None if work is None else round(work / 3600 * settings.worker_cost_per_hour, 2),
    )


def _list(
    sources: list[Source], counts: Listed, settings: Settings, storage: Storage
) -> dict[str, GunDetectionError]:
    """List all sources; of those that fail, why."""
    errors: dict[str, GunDetectionError] = {}
    for source in sources:
        address = _address(source)
        try:
            _require_bucket(source.bucket, storage)
            listed = note_uploads(source, settings, storage, wait=True)
        except OSError as error:
            # An inventory is stored here while it is read, and the disk may be full.
            errors[address] = TransientError(explain_os_error(error), reason="OS_ERROR")
        except GunDetectionError as error:
            errors[address] = error
        except Exception as error:
            # Whatever it is, the other sources are listed.
            logger.exception("%s", address)
            errors[address] = TerminalError(
                f"the listing failed ({error!r:.300}): the log of this task says where",
                reason="LISTING_FAILED",
            )
        else:
            for name, value in vars(listed).items():
                setattr(counts, name, getattr(counts, name) + value)
            continue
        logger.error("%s: %s", address, errors[address].message)
    return errors


def _require_known(
    sources: list[Source], configured: list[Source], settings: Settings, storage: Storage
) -> None:
    """Raise `NotFoundError` for a bucket that is neither configured, nor known, nor there.

    Nothing is listed for a re-scoring: a slip of the pen would find that nothing is left to do.
    """
    for bucket in {source.bucket for source in sources} - {source.bucket for source in configured}:
        with open_session(settings) as session:
            upload = session.scalar(select(Upload.id).where(Upload.bucket == bucket).limit(1))
        if upload is None:
            _require_bucket(bucket, storage)


def _require_bucket(bucket: str, storage: Storage) -> None:
    if not storage.bucket_exists(bucket):
        raise NotFoundError(f"the bucket {bucket!r} does not exist: create it, or name another one")


def _address(source: Source) -> str:
    return f"s3://{source.bucket}/{source.prefix}"


def _is_within(source: Source, configured: list[Source]) -> bool:
    return any(
        source.bucket == other.bucket and source.prefix.startswith(other.prefix)
        for other in configured
    )


def open_run(
    found: Survey,
    model: ModelVersion,
    sources: list[Source],
    settings: Settings,
    session: Session,
    *,
    threshold: float | None = None,
    run_id: str | None = None,
    limit: int | None = None,
) -> Plan:
    """Open a run over what the survey found, oldest upload first, at most `limit` of it.

    What was tried in vain or judged before comes last. Opening it again with the same `run_id`
    gives the plan that was made before; where that run has ended, `TerminalError` (RUN_ENDED) is
    raised. Raises `SettingsError` where what the model finds at its own threshold is not stored.
    """
    run_id = run_id or uuid.uuid4().hex
    # Another attempt may be about to open the same run.
    session.execute(
        text("SELECT pg_advisory_xact_lock(:lock, hashtext(:run))"), {"lock": _LOCK, "run": run_id}
    )
    known = session.get(ScoringRun, run_id)
    if known is not None and known.state != "open":
        raise TerminalError(
            f"the run {run_id} has ended, and is not planned anew: trigger a new one",
            reason="RUN_ENDED",
        )
    if known is not None:
        return _recall(session, known)
    if found.kind == "new" and found.by_hand:
        # Another survey since may have noted that nobody wants them.
        sort_out(session, sources, load_sources(settings))
    require_storable(model.id, model.threshold, settings)
    closed = session.execute(_CLOSE_ABANDONED, {"kind": found.kind}).scalars().all()
    if closed:
        logger.warning("runs that came to no end are closed: %s", ", ".join(closed))
    cap = _cap(found.kind, settings)
    cap = cap if limit is None else min(cap, limit)
    statement, arguments = choose(found.kind, model, sources, cap)
    chosen = [(row.id, row.size) for row in session.execute(text(statement), arguments)]
    run = ScoringRun(
        id=run_id,
        kind=found.kind,
        model_id=model.id,
        bucket=", ".join(found.buckets),
        prefix=found.prefix,
        threshold=model.threshold if threshold is None else threshold,
        planned=len(chosen),
        left_over=max(0, found.waiting - len(chosen)),
        survey=vars(found),
    )
    session.add(run)
    session.flush()
    rows = [
        {
            "run_id": run_id,
            "number": number,
            "upload_ids": [upload_id for upload_id, _ in part],
            "bytes": sum(size for _, size in part),
        }
        for number, part in enumerate(cut(chosen, settings, _seconds_each(session, model)))
    ]
    if rows:
        session.execute(insert(Shard), rows)
    made = _recall(session, run)
    logger.info(
        "%d uploads planned in %d shards for %s, %d left over",
        made.planned,
        len(made.shard_ids),
        model.id,
        made.left_over,
    )
    return made


def cut(
    uploads: list[tuple[int, int]], settings: Settings, seconds: float | None = None
) -> list[list[tuple[int, int]]]:
    """(id, bytes) of uploads in shards of like work, by count and by bytes.

    A shard is full at `shard_images` or `shard_mb`, whichever comes first, or later where it would
    take less than `shard_minutes`, at so many `seconds` for a picture. In a small run they are
    smaller, so that all that score at the same time have one; where there would be more than
    `max_shards`, all of them are larger in proportion.
    """
    per_byte = 1 / (settings.shard_mb * 2**20)
    weights = [max(1 / settings.shard_images, size * per_byte) for _, size in uploads]
    total = sum(weights)
    least = max(1, min(settings.scoring_tasks, int(total / _LEAST)))
    growth = 1.0
    if seconds and uploads:
        minutes = seconds * len(uploads) / total / 60
        growth = min(_MOST_GROWTH, max(1.0, settings.shard_minutes / minutes))
    full = max(min(growth, total / least), total / settings.max_shards)
    shards: list[list[tuple[int, int]]] = []
    filled = full
    for upload, weight in zip(uploads, weights, strict=True):
        # Sums of many small weights fall a little short of the whole.
        if filled > full - 1e-9 and len(shards) < settings.max_shards:
            shards.append([])
            filled = 0.0
        shards[-1].append(upload)
        filled += weight
    return shards


def _cap(kind: Kind, settings: Settings) -> int:
    return settings.run_images if kind == "new" else settings.rescore_images


def _seconds_each(session: Session, model: ModelVersion) -> float | None:
    """Seconds that one worker takes for a picture, from the last shards of the same architecture.

    Shards of a few uploads, which tell more of their own start, count only where there are no
    others; those of this very model come first. None where there are none.
    """
    row = session.execute(
        text(
            """
            WITH known AS (
                SELECT s.id, m.id = :model AS same,
                       (s.stats->>'seconds')::float AS seconds,
                       (s.stats->>'pictures')::int AS pictures
                FROM shard s JOIN scoring_run r ON r.id = s.run_id
                JOIN model_version m ON m.id = r.model_id
                WHERE s.finished_at IS NOT NULL AND m.architecture = :architecture
                AND (s.stats->>'pictures')::int > 0
                ORDER BY s.id DESC LIMIT :known
            )
            SELECT SUM(seconds) AS seconds, SUM(pictures) AS pictures FROM (
                SELECT * FROM known
                WHERE pictures >= LEAST(:enough, (SELECT MAX(pictures) FROM known))
                ORDER BY same DESC, id DESC LIMIT :timed
            ) timed
            """
        ),
        {
            "architecture": model.architecture,
            "model": model.id,
            "known": _KNOWN_SHARDS,
            "enough": _ENOUGH,
            "timed": _TIMED_SHARDS,
        },
    ).one()
    return float(row.seconds / row.pictures) if row.pictures else None


# Nobody works at them, and nothing came of them for a day. One that goes on after all is closed
# again by its own end.
_CLOSE_ABANDONED = text(
    """
    UPDATE scoring_run r SET state = 'failed', finished_at = now()
    WHERE r.state = 'open' AND r.kind = :kind AND r.created_at < now() - interval '1 day'
    AND NOT EXISTS (SELECT FROM shard s WHERE s.run_id = r.id AND s.lease_until > now())
    AND NOT EXISTS (
        SELECT FROM ledger l WHERE l.run_id = r.id AND l.created_at > now() - interval '1 day'
    )
    RETURNING r.id
    """
)


def _recall(session: Session, run: ScoringRun) -> Plan:
    shards = session.scalars(select(Shard.id).where(Shard.run_id == run.id).order_by(Shard.number))
    kind: Kind = "rescore" if run.kind == "rescore" else "new"
    return Plan(run.id, kind, run.model_id, run.threshold, run.planned, run.left_over, list(shards))
