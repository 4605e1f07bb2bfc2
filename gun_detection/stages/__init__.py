"""Each stage of the loop as one call, JSON types in and out.

The DAGs' tasks and the command line both call these, so that they do the same. The detector's
packages take seconds to import: only the stages that run it do.
"""

from gun_detection.stages.learning import (
    check_need,
    compare,
    evaluate,
    ingest,
    threshold,
    train,
)
from gun_detection.stages.release import (
    answer,
    gate,
    model_card,
    promote,
    prune,
    require_passed,
    rollback,
)
from gun_detection.stages.scoring import finish_scoring, plan_scoring, score_shard

__all__ = [
    "answer",
    "check_need",
    "compare",
    "evaluate",
    "finish_scoring",
    "gate",
    "ingest",
    "model_card",
    "plan_scoring",
    "promote",
    "prune",
    "require_passed",
    "rollback",
    "score_shard",
    "threshold",
    "train",
]
