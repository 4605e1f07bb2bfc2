"""Score history again with a new champion, the newest uploads first."""

from airflow.sdk import AssetOrTimeSchedule, dag
from orchestration import CHAMPION, DEADLINE, DEFAULT_ARGS, SINCE, TELL, at_hours
from scoring import PARAMS, scoring_tasks

DOC = """
### Score uploads again

After every promotion or rollback, and every night at 05:00 UTC until nothing is left: uploads that
an earlier champion has scored are scored by the present one, the newest first, at most
`GUN_DETECTION_RESCORE_IMAGES` in one run (0 switches it off), one shard at a time and behind the
scoring of new uploads. **survey** says how many there are, how long it takes and what it costs.

Until an upload has been scored again, the views show what the earlier model found in it; that stays
in the database for good.
"""


@dag(
    schedule=AssetOrTimeSchedule(timetable=at_hours("0 5 * * *"), assets=[CHAMPION]),
    start_date=SINCE,
    catchup=False,
    max_active_runs=1,
    # Where workers are few, higher ranks go first.
    default_args=DEFAULT_ARGS | {"priority_weight": 1, "weight_rule": "absolute"},
    on_failure_callback=TELL,
    deadline=DEADLINE,
    tags=["gun-detection", "scoring"],
    doc_md=DOC,
    params=PARAMS,
)
def rescore_uploads() -> None:
    scoring_tasks("rescore", at_once=1)


rescore_uploads()
