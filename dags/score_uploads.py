"""Score every upload that the champion has not scored."""

from datetime import timedelta
from typing import Any

from airflow.sdk import (
    AssetOrTimeSchedule,
    CronTriggerTimetable,
    Param,
    TriggerRule,
    dag,
    get_current_context,
    task,
)
from orchestration import CHAMPION, DEFAULT_ARGS, DETECTIONS, progress_log

DOC = """
### Score uploads

Every night at 03:00 UTC, after every promotion, and by hand. **plan** lists the bucket and takes
what has no outcome by the present champion, who is pinned for the whole run. Each **score** task
works through one shard; **finish** fails loudly when an upload was left without an outcome or too
many are in quarantine.

A picture that cannot be used is quarantined with a reason and stops nothing. Trying a task again,
or running the DAG twice, doubles nothing. Every detection is *unreviewed* until a person has
looked at it.
"""


@dag(
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable("0 3 * * *", timezone="UTC"), assets=[CHAMPION]
    ),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    tags=["gun-detection", "scoring"],
    doc_md=DOC,
    params={
        "bucket": Param(
            None,
            type=["null", "string"],
            title="Bucket",
            description="Empty for the uploads bucket.",
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
    },
)
def score_uploads() -> None:
    @task
    def plan(params: dict[str, Any] | None = None, run_id: str | None = None) -> dict[str, Any]:
        """List the bucket and cut what is unscored into shards."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        # The same run planned again, as after a crash, is the plan that was made first.
        return stages.plan_scoring(
            load_settings(),
            params["bucket"],
            params["prefix"] or "",
            params["threshold"],
            run_id=f"airflow:{run_id}",
        )

    @task
    def shards(planned: dict[str, Any]) -> list[int]:
        """The ids that the scoring tasks are mapped over."""
        return list(planned["shard_ids"])

    @task(
        max_active_tis_per_dag=2,
        execution_timeout=timedelta(hours=6),
        map_index_template="shard {{ shard_id }}",
    )
    def score(shard_id: int) -> dict[str, Any]:
        """Score one shard; what an earlier attempt has done is not done again."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        get_current_context()["shard_id"] = shard_id  # type: ignore[typeddict-unknown-key]
        # Airflow starts an attempt when the one before is over or lost: it may take the lease.
        return stages.score_shard(load_settings(), shard_id, progress_log("scored"), take_over=True)

    @task(trigger_rule=TriggerRule.ALL_DONE, outlets=[DETECTIONS])
    def finish(planned: dict[str, Any] | None, outlet_events: Any = None) -> dict[str, Any]:
        """Close the run, and fail when anything was left undone."""
        from airflow.sdk.exceptions import AirflowFailException

        from gun_detection import stages
        from gun_detection.settings import load_settings

        if planned is None:
            raise AirflowFailException("nothing was planned: look at the log of the plan task")
        summary = stages.finish_scoring(load_settings(), planned["run_id"])
        outlet_events[DETECTIONS].extra = summary
        return summary

    planned = plan()
    score.expand(shard_id=shards(planned)) >> finish(planned)


score_uploads()
