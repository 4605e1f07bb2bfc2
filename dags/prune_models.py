"""Delete the weights of old model versions."""

from typing import Any

from airflow.sdk import Param, dag, task
from orchestration import DEFAULT_ARGS, SINCE, TELL, at_hours

DOC = """
### Delete the weights of old model versions

Every Sunday at 05:00 UTC, and by hand. Kept are the newest versions
(`GUN_DETECTION_KEEP_MODELS`), every version that ever was champion, and those that a scoring run
or a person is busy with. Records, cards and reports stay.
"""


@dag(
    schedule=at_hours("0 5 * * 0"),
    start_date=SINCE,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=TELL,
    tags=["gun-detection", "maintenance"],
    doc_md=DOC,
    params={
        "keep": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="Newest versions to keep",
            description="Empty for the configured number.",
        ),
        "dry_run": Param(
            False,
            type="boolean",
            title="Only say what would be deleted",
        ),
    },
)
def prune_models() -> None:
    @task
    def prune(params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Mark what nothing needs, delete it, and look that it is gone."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        result = stages.prune(load_settings(), params["keep"], dry_run=params["dry_run"])
        verb = "would delete" if result["dry_run"] else "deleted"
        print(f"{verb} the weights of {', '.join(result['deleted']) or 'nothing'}")
        print(f"{verb} {result['checkpoints']} checkpoints of trainings that were given up")
        return result

    prune()


prune_models()
