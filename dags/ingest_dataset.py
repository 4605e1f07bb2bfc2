"""Bring training data in: check it, store it, split it, version it."""

from typing import Any

from airflow.sdk import Param, dag, task
from orchestration import DEADLINE, DEFAULT_ARGS, TELL, TRAINING_DATA, ReportLink, progress_log

DOC = """
### Bring training data in

Reads a source, checks every picture and box, and stores what is good as an **immutable data set
version** with train, validation and holdout splits. What was refused is listed in the report, with
a reason each; open it by the *Report* button on the *Details* tab of the `ingest` task.

Running it again on the same data changes nothing and says so.

| source | what |
| --- | --- |
| *(empty)* | what `GUN_DETECTION_DATASET_SOURCE` says |
| `synthetic:200:0` | drawn pictures: number, seed |
| `kaggle:owner/name` | a Kaggle data set (needs `KAGGLE_USERNAME` and `KAGGLE_KEY`) |
| `s3://bucket/prefix` | objects under a prefix |
| `/path` | a folder or an archive that the worker can read |
"""


@dag(
    schedule=None,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    on_failure_callback=TELL,
    deadline=DEADLINE,
    tags=["gun-detection", "data"],
    doc_md=DOC,
    params={
        "source": Param(
            None,
            type=["null", "string"],
            title="Source",
            description="synthetic[:N[:seed]], kaggle[:owner/name], s3://bucket/prefix or a path; "
            "empty for the configured one.",
        )
    },
)
def ingest_dataset() -> None:
    @task(outlets=[TRAINING_DATA])
    def ingest(params: dict[str, Any] | None = None, outlet_events: Any = None) -> dict[str, Any]:
        """Check the source and store what is good as a data set version."""
        from gun_detection import stages
        from gun_detection.settings import load_settings

        assert params is not None
        result = stages.ingest(params["source"], load_settings(), progress_log("checked"))
        outlet_events[TRAINING_DATA].extra = {
            "dataset_id": result["dataset_id"],
            "images": result["images"],
        }
        return result

    ingested = ingest()
    ingested.operator.operator_extra_links = (ReportLink(),)


ingest_dataset()
