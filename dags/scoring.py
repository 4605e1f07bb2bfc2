"""The tasks of a scoring run, for new uploads and for history alike."""

import logging
from datetime import timedelta
from typing import Any, Literal

from airflow.sdk import Param, TriggerRule, get_current_context, task
from orchestration import DETECTIONS, SCORING_QUEUE, Confirm, ScoringRunLink, progress_log

PARAMS: dict[str, Param] = {
    "bucket": Param(
        None,
        type=["null", "string"],
        title="Bucket",
        description="Empty for all that are configured.",
    ),
    "prefix": Param(
        None,
        type=["null", "string"],
        title="Prefix",
        description="Only keys that start with this; empty for all.",
    ),
    "threshold": Param(
        None,
        type=["null", "number"],
        minimum=0,
        maximum=1,
        title="Score threshold",
        description="For this run's summary; empty for the champion's own. Detections above "
        "the storage floor are kept whatever it is.",
    ),
}
logger = logging.getLogger("gun_detection.scoring")


def send_freshness() -> None:
    """The gauges of what waits, whatever became of the run: also while nights fail they tell.

    What keeps them from being sent hides no other failure.
    """
    from airflow.sdk.observability import stats

    from gun_detection import stages
    from gun_detection.settings import load_settings

    try:
        fresh = stages.freshness(load_settings())
        stats.gauge("gun_detection.scoring.unscored", fresh["unscored"])
        stats.gauge("gun_detection.scoring.oldest_unscored_seconds", fresh["oldest_seconds"])
    except Exception:
        logger.exception("the gauges of what waits were not sent")


def scoring_tasks(kind: Literal["new", "rescore"], at_once: int) -> None:
    """Survey, confirm, plan, score so many shards `at_once`, finish."""

    @task
    def survey(params: dict[str, Any] | None = None, dag_run: Any = None) -> dict[str, Any]:
        """Say what is to be scored, how long it takes and what it costs."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        # The watcher has noted the uploads that it tells of. Listing what is listed at night only
        # would keep them waiting.
        found = stages.survey_uploads(
            load_settings(),
            kind,
            # What the form sends where nothing was filled in.
            params["bucket"] or None,
            params["prefix"],
            listing=dag_run.run_type != "asset_triggered",
        )
        print(found["text"])
        return found

    @task
    def plan(
        surveyed: dict[str, Any],
        limit: int | None,
        params: dict[str, Any] | None = None,
        dag: Any = None,
        run_id: str | None = None,
        ti: Any = None,
    ) -> list[int]:
        """Open the run and cut it into shards; their ids, which the scoring tasks are mapped over.

        Beside them go the run's id and the address of its page.
        """
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        # The same run planned again, as after a crash, is the plan that was made first.
        planned = stages.plan_scoring(
            load_settings(),
            surveyed,
            params["bucket"] or None,
            params["prefix"],
            params["threshold"],
            run_id=f"airflow:{dag.dag_id}:{run_id}",
            limit=limit,
        )
        for name in ("run_id", "run_url"):
            ti.xcom_push(name, planned[name])
        return list(planned["shard_ids"])

    @task(
        queue=SCORING_QUEUE,
        max_active_tis_per_dag=at_once,
        execution_timeout=timedelta(hours=12),
        map_index_template="shard {{ shard_id }}",
    )
    def score(shard_id: int) -> dict[str, Any]:
        """Score one shard; what an earlier attempt has done is not done again."""
        from airflow.sdk.observability import stats

        from gun_detection import stages
        from gun_detection.settings import load_settings

        get_current_context()["shard_id"] = shard_id  # type: ignore[typeddict-unknown-key]
        # Airflow starts an attempt when the one before is over or lost: it may take the lease.
        done = stages.score_shard(load_settings(), shard_id, progress_log("scored"), take_over=True)
        for name in ("scored", "quarantined", "detections", "repeated", "bytes"):
            stats.incr(f"gun_detection.scoring.{name}", done[name])
        for name, seconds in done["working"].items():
            stats.timing(f"gun_detection.scoring.{name}", 1000 * seconds)
        return done

    @task(trigger_rule=TriggerRule.ALL_DONE, outlets=[DETECTIONS])
    def finish(ti: Any = None, outlet_events: Any = None) -> dict[str, Any]:
        """Close the run, and fail when anything was left undone."""
        from airflow.sdk.exceptions import AirflowFailException

        from gun_detection import stages
        from gun_detection.settings import load_settings

        send_freshness()
        # As an argument of the task it would have to be there.
        scoring_run = ti.xcom_pull(task_ids="plan", key="run_id")
        if scoring_run is None:
            raise AirflowFailException("nothing was planned: the logs of survey and plan say why")
        summary = stages.finish_scoring(load_settings(), scoring_run)
        print(summary["text"])
        outlet_events[DETECTIONS].extra = {
            name: summary[name] for name in ("run_id", "scored", "quarantined", "detections")
        }
        return summary

    surveyed = survey()
    confirm = Confirm(task_id="confirm", survey_task="survey")
    surveyed >> confirm
    planned = plan(surveyed, confirm.output)
    finished = finish()
    planned >> finished
    score.expand(shard_id=planned) >> finished
    for made in (planned, finished):
        made.operator.operator_extra_links = (ScoringRunLink(plan_task="plan"),)
