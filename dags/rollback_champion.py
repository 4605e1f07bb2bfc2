"""Make an earlier champion the champion again."""

from typing import Any

from airflow.sdk import Param, dag, task
from notifications import Announcement
from orchestration import CHAMPION, DEFAULT_ARGS, TELL, ModelCardLink

DOC = """
### Go back to an earlier champion

Only by hand. The champion before the present one, or the version that you name, is champion again
from the next scoring run on; a run under way keeps the model that it began with. Uploads that it
has not scored are scored next. Its stored weights are checked first. A run that went back once does
not do so again when it is cleared: trigger a new one.

Who was champion when is on the *Models* page.
"""


@dag(
    schedule=None,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=TELL,
    tags=["gun-detection", "training"],
    doc_md=DOC,
    params={
        "reason": Param(
            type="string",
            minLength=3,
            maxLength=1000,
            title="Reason",
            description="Goes into the promotion log.",
        ),
        "model": Param(
            None,
            type=["null", "string"],
            title="Model version",
            description="An earlier champion; empty for the one before the present.",
        ),
    },
)
def rollback_champion() -> None:
    @task(outlets=[CHAMPION], on_success_callback=Announcement("rolled back", "rollback"))
    def rollback(
        params: dict[str, Any] | None = None, dag_run: Any = None, outlet_events: Any = None
    ) -> dict[str, Any]:
        """Append the earlier champion to the promotion log."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        run = f"airflow:rollback_champion:{dag_run.run_id}"
        user = dag_run.triggering_user_name
        result = stages.rollback(
            load_settings(),
            actor=f"{user}, in {run}" if user else run,
            reason=params["reason"],
            to=params["model"],
            once=True,
        )
        outlet_events[CHAMPION].extra = result
        return result

    rollback().operator.operator_extra_links = (ModelCardLink(),)


rollback_champion()
