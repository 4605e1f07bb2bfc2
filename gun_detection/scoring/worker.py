"""The process that scores one shard.

`python -m gun_detection.scoring.worker SHARD_ID [--take-over]` reports its result or its error to
its parent; one that reports neither has crashed, and `supervise` starts the next.
"""

import gc
import logging
import os
import sys
from collections.abc import Callable

from sqlalchemy import select

from gun_detection.children import relay_logs, report_error, report_progress, report_result
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion, ScoringRun, Shard
from gun_detection.detector.engines import Engine
from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    StaleAttemptError,
    TransientError,
    explain_os_error,
)
from gun_detection.reading import Reader
from gun_detection.scoring.leases import claim_shard, give_up
from gun_detection.scoring.pipeline import score_shard
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage

OpenEngine = Callable[[ModelVersion, Settings, Storage], Engine]


def run(
    shard_id: int, settings: Settings, open_engine: OpenEngine, *, take_over: bool
) -> dict[str, object]:
    """Score what is left of a shard; its figures."""
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
    engine = open_engine(model, settings, Storage(settings))
    # What is loaded stays. To look through it for garbage stops every thread, and leaves a GPU
    # without work, for a quarter of a second each time.
    gc.freeze()
    # The lease begins when the work does, not while weights are read.
    lease = claim_shard(shard_id, settings, take_over=take_over)
    try:
        return score_shard(
            lease,
            engine,
            settings,
            Reader(settings),
            lambda done, total: report_progress(done=done, total=total),
        )
    except StaleAttemptError:
        raise
    except (GunDetectionError, OSError):
        give_up(lease, settings)
        raise


def main(arguments: list[str], open_engine: OpenEngine) -> None:
    """The program; its exit code tells nothing, what it reports does."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    relay_logs()
    try:
        take_over = "--take-over" in arguments
        stats = run(int(arguments[0]), load_settings(), open_engine, take_over=take_over)
        report_result(stats)
    except GunDetectionError as error:
        report_error(error)
    except OSError as error:
        report_error(TransientError(explain_os_error(error), reason="OS_ERROR"))


if __name__ == "__main__":
    from gun_detection.release.packages import open_engine

    main(sys.argv[1:], open_engine)
    # All is said and stored. Taking down what is loaded would keep the task for another second.
    logging.shutdown()
    os._exit(0)
