"""Scoring what the champion has not scored: plan, shards, end."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sqlalchemy import select

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion, ScoringRun, Shard
from gun_detection.errors import NotFoundError
from gun_detection.settings import Settings
from gun_detection.storage import Storage

Json = dict[str, Any]


def plan_scoring(
    settings: Settings,
    bucket: str | None = None,
    prefix: str = "",
    threshold: float | None = None,
    model: str = "champion",
    run_id: str | None = None,
) -> Json:
    """Open a scoring run over what the champion, pinned from here on, has not scored."""
    from gun_detection.release.registry import get_model
    from gun_detection.scoring.plan import plan_run

    with open_session(settings) as session:
        plan = plan_run(
            get_model(session, model),
            settings,
            Storage(settings),
            session,
            bucket=bucket,
            prefix=prefix,
            threshold=threshold,
            run_id=run_id,
        )
    return asdict(plan)


def score_shard(
    settings: Settings,
    shard_id: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    take_over: bool = False,
) -> Json:
    """Score what is left to do in one shard."""
    from gun_detection.release.registry import load_predictor
    from gun_detection.scoring.ledger import claim_shard
    from gun_detection.scoring.pipeline import score_shard as score

    storage = Storage(settings)
    with open_session(settings) as session:
        pinned = (
            select(ModelVersion)
            .join(ScoringRun, ScoringRun.model_id == ModelVersion.id)
            .join(Shard, Shard.run_id == ScoringRun.id)
            .where(Shard.id == shard_id)
        )
        model = session.scalar(pinned)
    if model is None:
        raise NotFoundError(f"there is no shard {shard_id}")
    predictor = load_predictor(model, settings, storage, settings.score_floor)
    # The lease begins when the work does, not while weights are read.
    lease = claim_shard(shard_id, settings, take_over=take_over)
    return asdict(score(lease, predictor, settings, storage, on_progress))


def finish_scoring(settings: Settings, run_id: str) -> Json:
    """Close a scoring run; raises `FailureBudgetError` when something is wrong with it."""
    from gun_detection.scoring.ledger import finish_run

    return asdict(finish_run(run_id, settings))
