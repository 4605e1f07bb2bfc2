"""Score every upload that no model has scored."""

from airflow.sdk import AssetOrTimeSchedule, dag
from orchestration import DEADLINE, DEFAULT_ARGS, SCORING_TASKS, SINCE, TELL, UPLOADS, at_hours
from scoring import PARAMS, scoring_tasks

DOC = """
### Score uploads

Within a minute of an upload, every night at 03:00 UTC, and by hand. **survey** lists the buckets
and says what is new, how long it will take and what it costs; **confirm** asks a person only where
the run is larger than the cap. **plan** cuts it into shards for the present champion, who is pinned
for the whole run. Each **score** task works through one shard; **finish** fails loudly when an
upload was left without an outcome or too many are in quarantine.

A picture that cannot be used is quarantined with a reason and stops nothing. Trying a task again,
or running the DAG twice, doubles nothing. Every detection is *unreviewed* until a person has
looked at it. What an earlier champion has scored is the work of `rescore_uploads`.
"""


@dag(
    schedule=AssetOrTimeSchedule(timetable=at_hours("0 3 * * *"), assets=[UPLOADS]),
    start_date=SINCE,
    catchup=False,
    max_active_runs=1,
    # Of one run; Airflow's default would be the limit otherwise.
    max_active_tasks=max(16, SCORING_TASKS),
    # Where workers are few, higher ranks go first.
    default_args=DEFAULT_ARGS | {"priority_weight": 10, "weight_rule": "absolute"},
    on_failure_callback=TELL,
    deadline=DEADLINE,
    tags=["gun-detection", "scoring"],
    doc_md=DOC,
    params=PARAMS,
)
def score_uploads() -> None:
    scoring_tasks("new", SCORING_TASKS)


score_uploads()
