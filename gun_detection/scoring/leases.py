"""Who may write a shard's outcomes: leases with attempt numbers, and the search for pictures that
kill the process that looks at them."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import ScoringRun, Shard
from gun_detection.errors import NotFoundError, ServiceUnavailableError, StaleAttemptError
from gun_detection.settings import Settings

# So many times a process may die of the picture that it looks at alone.
_CRASHES = 2


@dataclass(frozen=True, slots=True)
class Item:
    """An upload that is to be scored."""

    id: int
    bucket: str
    key: str
    etag: str
    size: int


@dataclass(frozen=True)
class Lease:
    """The right to write a shard's outcomes, until another attempt takes it over.

    `items` are those without an outcome, in the order of their ids, and last those that were tried
    in vain or judged before. After a crash the attempt is
    `careful`: the one that was suspected stands first, and `condemned` is the one that two
    attempts died of.
    """

    shard_id: int
    attempt: int
    run_id: str
    model_id: str
    items: list[Item]
    careful: bool = False
    condemned: Item | None = None


def claim_shard(shard_id: int, settings: Settings, *, take_over: bool = False) -> Lease:
    """Take the lease of a shard with what is left to do in it; older attempts are fenced off.

    Raises `ServiceUnavailableError` while another worker holds the lease, unless `take_over`:
    whoever scheduled this attempt knows that the earlier one is dead.
    """
    with open_session(settings) as session:
        shard = session.get(Shard, shard_id, with_for_update=True)
        if shard is None:
            raise NotFoundError(f"there is no shard {shard_id}")
        now = session.scalar(select(func.now()))
        assert now is not None
        if shard.lease_until and shard.lease_until > now and not take_over:
            raise ServiceUnavailableError(
                f"shard {shard_id} is held by attempt {shard.attempt} "
                f"until {shard.lease_until:%H:%M:%S}",
                reason="SHARD_HELD",
            )
        # Who gives up says so; who is killed leaves the lease behind.
        if shard.lease_until is not None:
            shard.crashes += 1
            shard.suspect_crashes += shard.suspect_id is not None
        shard.attempt += 1
        shard.lease_until = now + timedelta(seconds=settings.shard_lease_seconds)
        run = session.get_one(ScoringRun, shard.run_id)
        items = _left(session, shard, run.model_id)
        suspect = next((item for item in items if item.id == shard.suspect_id), None)
        condemned = suspect if shard.suspect_crashes >= _CRASHES else None
        if condemned is not None or suspect is None:
            shard.suspect_id, shard.suspect_crashes = None, 0
        if suspect is not None:
            items.remove(suspect)
        if suspect is not None and condemned is None:
            items.insert(0, suspect)
        return Lease(
            shard.id, shard.attempt, run.id, run.model_id, items, shard.crashes > 0, condemned
        )


def renew(session: Session, lease: Lease, settings: Settings, **values: Any) -> None:
    """Lock the shard's row until the transaction ends, if the lease is still ours.

    `values` are written to it. Raises `StaleAttemptError` when another attempt took over.
    """
    until = func.now() + timedelta(seconds=settings.shard_lease_seconds)
    attempt = session.scalar(
        update(Shard)
        .where(Shard.id == lease.shard_id, Shard.attempt == lease.attempt)
        .values({"lease_until": until} | values)
        .returning(Shard.attempt)
        .execution_options(synchronize_session=False)
    )
    if attempt is None:
        raise StaleAttemptError(
            f"attempt {lease.attempt} no longer holds shard {lease.shard_id}: "
            "a later one took it over, and nothing more is written by this one"
        )


def suspect(lease: Lease, item: Item, settings: Settings) -> None:
    """Note the picture that is looked at next, alone: a crash is then of this one's doing."""
    with open_session(settings) as session:
        known = session.scalar(select(Shard.suspect_id).where(Shard.id == lease.shard_id))
        values: dict[str, Any] = {"suspect_id": item.id}
        renew(session, lease, settings, **values | ({} if known == item.id else _INNOCENT))


_INNOCENT: dict[str, Any] = {"suspect_crashes": 0}


def give_up(lease: Lease, settings: Settings) -> None:
    """Give the lease back with work left in it: no crash, the next attempt may begin at once.

    In later runs what is left comes after what was not tried yet: a bucket that cannot be read
    uses up no cap, in which others have room.
    """
    with open_session(settings) as session:
        renew(session, lease, settings, lease_until=None, suspect_id=None, **_INNOCENT)
        session.execute(_DEFER, {"shard": lease.shard_id})


_DEFER = text(
    """
    UPDATE pending_upload SET deferred = true
    WHERE NOT deferred AND upload_id = ANY(ARRAY(
        SELECT unnest(upload_ids) FROM shard WHERE id = :shard
    ))
    """
)


def finish_shard(lease: Lease, settings: Settings, stats: dict[str, Any] | None = None) -> None:
    """Give the lease back for good; raises `StaleAttemptError` when another attempt holds it.

    An attempt that had nothing left to do leaves the figures of the one that did. Uploads that it
    passed over, as the model has judged them before, do not wait any longer.
    """
    values: dict[str, Any] = {} if stats is None else {"stats": stats}
    with open_session(settings) as session:
        values |= {"lease_until": None, "suspect_id": None, "finished_at": func.now()}
        renew(session, lease, settings, **values | _INNOCENT)
        # Whoever has one judged anew meanwhile has done so, or waits, before the ledger is asked.
        session.execute(_LOCK_PENDING, {"shard": lease.shard_id})
        session.execute(_NO_LONGER_PENDING, {"shard": lease.shard_id, "model": lease.model_id})


_LOCK_PENDING = text(
    """
    SELECT upload_id FROM pending_upload
    WHERE upload_id = ANY(ARRAY(SELECT unnest(upload_ids) FROM shard WHERE id = :shard))
    ORDER BY upload_id FOR UPDATE
    """
)
_NO_LONGER_PENDING = text(
    """
    DELETE FROM pending_upload p WHERE p.upload_id = ANY(ARRAY(
        SELECT unnest(upload_ids) FROM shard WHERE id = :shard
    )) AND EXISTS (
        SELECT FROM ledger l
        WHERE l.upload_id = p.upload_id AND l.model_id = :model AND NOT l.stale
    )
    """
)


def _left(session: Session, shard: Shard, model_id: str) -> list[Item]:
    rows = session.execute(
        text(
            """
            SELECT u.id, u.bucket, u.key, u.etag, u.size
            FROM upload u LEFT JOIN pending_upload p ON p.upload_id = u.id
            WHERE u.id = ANY(:ids) AND NOT EXISTS (
                SELECT FROM ledger l
                WHERE l.upload_id = u.id AND l.model_id = :model AND NOT l.stale
            ) ORDER BY COALESCE(p.deferred, false), u.id
            """
        ).bindparams(bindparam("ids", shard.upload_ids)),
        {"model": model_id},
    )
    return [Item(*row) for row in rows]
