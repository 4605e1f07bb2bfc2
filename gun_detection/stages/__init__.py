"""Each stage of the loop as one call, JSON types in and out.

The DAGs' tasks and the command line both call these, so that they do the same. The detector's
packages take seconds to import: only the stages that run it do.
"""

from gun_detection.stages.learning import (
    check_need,
    compare,
    curve,
    evaluate,
    ingest,
    threshold,
    train,
)
from gun_detection.stages.release import (
    answer,
    gate,
    model_card,
    package,
    promote,
    prune,
    require_passed,
    rollback,
)
from gun_detection.stages.scoring import (
    export_quarantine,
    finish_scoring,
    freshness,
    list_quarantine,
    look_for_uploads,
    plan_scoring,
    retry_quarantine,
    score_shard,
    survey_uploads,
    told_of_uploads,
)

__all__ = [
    "answer",
    "check_need",
    "compare",
    "curve",
    "evaluate",
    "export_quarantine",
    "finish_scoring",
    "freshness",
    "gate",
    "ingest",
    "list_quarantine",
    "look_for_uploads",
    "model_card",
    "package",
    "plan_scoring",
    "promote",
    "prune",
    "require_passed",
    "retry_quarantine",
    "rollback",
    "score_shard",
    "survey_uploads",
    "threshold",
    "told_of_uploads",
    "train",
]
