"""From when on a run is late, told so that the run can be cleared all the same."""

from datetime import UTC, datetime
from typing import Any

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk.definitions.deadline import BaseDeadlineReference


class RunMade(BaseDeadlineReference):
    """When Airflow made the run, also where it is cleared later.

    Airflow's own `DAGRUN_QUEUED_AT` is moved when a run is cleared, and fails at that with an error
    of the server (https://github.com/apache/airflow/issues/70368).
    """

    def _evaluate_with(self, **_: Any) -> datetime:
        return datetime.now(UTC)


class RunDeadline(AirflowPlugin):
    """Apart from the pages: without it, no run of a DAG with a deadline is made."""

    name = "gun_detection_run_deadline"
    deadline_references = [RunMade]  # noqa: RUF012 -- as Airflow wants it
