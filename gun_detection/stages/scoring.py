"""Scoring uploads: survey, plan, shards, end; the quarantine; the watch for new ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion, Promotion
from gun_detection.errors import ReleaseError
from gun_detection.scoring.words import run_text, survey_text
from gun_detection.settings import Settings
from gun_detection.stages.links import run_url
from gun_detection.storage import Storage

Json = dict[str, Any]
Kind = Literal["new", "rescore"]


def survey_uploads(
    settings: Settings,
    kind: Kind = "new",
    bucket: str | None = None,
    prefix: str | None = None,
    model: str = "champion",
    *,
    listing: bool = True,
) -> Json:
    """List the sources and say what a run would cover, how long it would take and cost.

    Without `listing` that is what is known, as where the watcher has noted it. `confirm` is
    whether a person is to be asked first.
    """
    from gun_detection.release.champion import get_model
    from gun_detection.scoring.plan import survey
    from gun_detection.scoring.sources import choose_sources, load_sources
    from gun_detection.scoring.watch import expect_looks, find_silent

    sources = choose_sources(load_sources(settings), settings, bucket, prefix)
    with open_session(settings) as session:
        version = get_model(session, model)
        _require_former_champion(session, version)
        expect_looks(settings, session)
    storage = Storage(settings)
    silent = find_silent(sources, settings, storage) if listing and kind == "new" else {}
    found = asdict(survey(kind, version, sources, settings, storage, prefix or "", listing=listing))
    found["unlisted"] = silent | found["unlisted"]
    return found | {
        "text": survey_text(found),
        "confirm": found["planned"] > settings.confirm_images,
        "confirm_images": settings.confirm_images,
        "confirm_minutes": settings.confirm_minutes,
    }


def _require_former_champion(session: Session, version: ModelVersion) -> None:
    """Raise `ReleaseError` where what a model finds would stand for what a champion found."""
    found = select(Promotion.id).where(Promotion.model_id == version.id).limit(1)
    if session.scalar(found) is None:
        raise ReleaseError(
            f"{version.id} never was champion, and what it finds in uploads would be shown as what "
            "a champion found: look at pictures with `gun-detection predict --model "
            f"{version.id}`, or promote it first"
        )


def plan_scoring(
    settings: Settings,
    surveyed: Json,
    bucket: str | None = None,
    prefix: str | None = None,
    threshold: float | None = None,
    run_id: str | None = None,
    limit: int | None = None,
) -> Json:
    """Open a scoring run over what was surveyed; its model is pinned from here on.

    It has at most `limit` uploads, by default as many as a person is not asked about: whoever asked
    one and got a yes gives the number that was `planned`. Raises `TerminalError` (RUN_ENDED) for a
    `run_id` whose run has ended.
    """
    from gun_detection.release.champion import get_model
    from gun_detection.scoring.plan import Survey, open_run
    from gun_detection.scoring.sources import choose_sources, load_sources

    sources = choose_sources(load_sources(settings), settings, bucket, prefix)
    found = Survey(**{name: surveyed[name] for name in Survey.__dataclass_fields__})
    if limit is None:
        # More may wait by now, and a question that nobody answered is no yes.
        limit = surveyed["confirm_images"]
    with open_session(settings) as session:
        plan = open_run(
            found,
            get_model(session, found.model_id),
            sources,
            settings,
            session,
            threshold=threshold,
            run_id=run_id,
            limit=limit,
        )
    return asdict(plan) | {"run_url": run_url(settings, plan.run_id)}


def score_shard(
    settings: Settings,
    shard_id: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    take_over: bool = False,
) -> Json:
    """Score what is left to do in one shard; its figures."""
    from gun_detection.scoring.supervise import score_shard as score

    return score(settings, shard_id, on_progress, take_over=take_over)


def finish_scoring(settings: Settings, run_id: str) -> Json:
    """Close a scoring run; raises `FailureBudgetError` when something is wrong with it."""
    from gun_detection.scoring.runs import finish_run

    summary = asdict(finish_run(run_id, settings))
    return summary | {"text": run_text(summary), "run_url": run_url(settings, run_id)}


def freshness(settings: Settings) -> Json:
    """How many uploads nobody has scored, and how long the oldest of them waits, in seconds."""
    from sqlalchemy import text

    statement = (
        "SELECT COALESCE(SUM(unscored), 0)::bigint AS unscored, "
        "COALESCE(MAX(oldest_seconds), 0) AS oldest_seconds FROM scoring_freshness"
    )
    with open_session(settings) as session:
        row = session.execute(text(statement)).one()
    return {"unscored": row.unscored, "oldest_seconds": row.oldest_seconds}


def list_quarantine(settings: Settings, limit: int | None = None, **conditions: Any) -> list[Json]:
    """What is in quarantine, the newest first; see `quarantine.list_quarantine`."""
    from gun_detection.scoring.quarantine import list_quarantine as rows

    with open_session(settings) as session:
        found = rows(session, limit=limit, **conditions)
    return [
        asdict(row)
        | {
            "first_seen_at": row.first_seen_at.isoformat(timespec="seconds"),
            "scored_at": row.scored_at.isoformat(timespec="seconds"),
        }
        for row in found
    ]


def retry_quarantine(settings: Settings, upload_ids: Sequence[int] = (), **conditions: Any) -> Json:
    """Have what is in quarantine judged anew by the next run: these uploads, or those chosen."""
    from gun_detection.scoring.quarantine import list_quarantine as rows
    from gun_detection.scoring.quarantine import retry

    with open_session(settings) as session:
        chosen = upload_ids or [row.upload_id for row in rows(session, **conditions)]
        return {"waiting": retry(session, chosen)}


def export_quarantine(settings: Settings, folder: Path, **conditions: Any) -> Json:
    """Write a table of what is in quarantine, and the files, into a folder."""
    from gun_detection.scoring.quarantine import export
    from gun_detection.scoring.quarantine import list_quarantine as rows

    with open_session(settings) as session:
        found = rows(session, **conditions)
    written, gone = export(found, folder, settings, Storage(settings))
    return {"rows": len(found), "files": written, "gone": gone, "folder": str(folder)}


def look_for_uploads(settings: Settings) -> Json | None:
    """What was uploaded since the last look, by bucket, and whether queues hold `more`; None where
    neither is so."""
    from gun_detection.scoring.watch import look

    news = look(settings)
    return None if news is None else asdict(news)


def told_of_uploads(settings: Settings, news: Json) -> None:
    """Note that these news have led to something: they are not told again."""
    from gun_detection.scoring.watch import News, told

    told(News(**news), settings)
