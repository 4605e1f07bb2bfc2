"""Every DAG file parses, quickly importable things only, and says what it is for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from embedded.config import REPOSITORY

DAGS = REPOSITORY / "dags"
FILES = [*sorted(DAGS.glob("*.py")), *sorted((REPOSITORY / "plugins").glob("*.py"))]
HEAVY = ("torch", "torchvision", "cv2", "boto3", "pandas", "numpy")

_PARSE = """
import json, sys, warnings
sys.path.insert(0, {folder!r})
warnings.simplefilter("ignore")
import airflow.sdk
# What Airflow itself loads for its first asset, once per process, is not the files' doing.
airflow.sdk.Asset("any", uri="any://thing")
before = set(sys.modules)
import runpy
runpy.run_path({file!r})
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_parsing_imports_nothing_heavy(file: Path) -> None:
    code = _PARSE.format(folder=str(DAGS), file=str(file))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    imported = ran.stdout.strip().splitlines()[-1]
    assert not [name for name in HEAVY if f'"{name}"' in imported]


_DAGS = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow.dag_processing.dagbag import DagBag
bag = DagBag({folder!r})
print(json.dumps({{
    "errors": {{str(k): str(v) for k, v in bag.import_errors.items()}},
    "dags": {{
        dag.dag_id: {{
            "doc": dag.doc_md, "tags": sorted(dag.tags), "active": dag.max_active_runs,
            "catchup": dag.catchup, "params": sorted(dag.params),
            "undocumented": [
                t.task_id for t in dag.tasks if not getattr(t, "python_callable", type(t)).__doc__
            ],
            "retries": [t.retries for t in dag.tasks],
            "pools": {{t.task_id: t.pool for t in dag.tasks}},
        }} for dag in bag.dags.values()
    }},
}}))
"""


def test_the_dags_are_complete() -> None:
    code = _DAGS.format(folder=str(DAGS))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    assert found["errors"] == {}
    assert sorted(found["dags"]) == [
        "ingest_dataset",
        "prune_models",
        "rescore_uploads",
        "retrain",
        "rollback_champion",
        "score_uploads",
    ]
    for dag_id, dag in found["dags"].items():
        assert dag["doc"], dag_id
        assert "gun-detection" in dag["tags"]
        assert (dag["active"], dag["catchup"]) == (1, False)
        assert dag["undocumented"] == []
        assert min(dag["retries"]) > 0
    assert found["dags"]["retrain"]["pools"]["train"] == "gpu"
    assert found["dags"]["score_uploads"]["params"] == ["bucket", "prefix", "threshold"]


_FIRST_RUNS = """
import json, sys, warnings
from datetime import timedelta
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow._shared.timezones import timezone
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.encoders import coerce_to_core_timetable
from airflow.timetables import trigger
from airflow.timetables.base import TimeRestriction
first = {{}}
for dag in DagBag({folder!r}).dags.values():
    timetable = getattr(dag.timetable, "timetable", dag.timetable)
    if not hasattr(timetable, "expression"):
        continue
    schedule = coerce_to_core_timetable(timetable)
    # Half an hour after a run that would have been.
    run = schedule._align_to_prev(timezone.utcnow())
    trigger.utcnow = lambda: run + timedelta(minutes=30)
    anything = TimeRestriction(None, None, False)
    first[dag.dag_id] = schedule.next_dagrun_info(
        last_automated_data_interval=None, restriction=anything
    ).run_after > run
print(json.dumps(first))
"""


def test_a_new_platform_does_not_run_what_it_missed() -> None:
    code = _FIRST_RUNS.format(folder=str(DAGS))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    names = ("prune_models", "rescore_uploads", "retrain", "score_uploads")
    assert json.loads(ran.stdout.strip().splitlines()[-1]) == dict.fromkeys(names, True)


_CHECK_NEED = """
import sys, types, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow.dag_processing.dagbag import DagBag
task = DagBag({folder!r}).dags["retrain"].get_task("check_need")
params = {{"dataset_id": None, "preset": None, "overrides": {{}}, "force": False}}
task.python_callable(params, dag_run=types.SimpleNamespace(run_type=sys.argv[1]))
"""


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("run_type", "outcome"), [("scheduled", "AirflowSkipException"), ("manual", "NotFoundError")]
)
def test_nights_before_there_is_data_are_no_failures(run_type: str, outcome: str) -> None:
    code = _CHECK_NEED.format(folder=str(DAGS))
    command = [sys.executable, "-c", code, run_type]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert outcome in last
    assert "there is no data set yet" in last


_WHO_DECIDES = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.standard.operators.hitl import HITLOperator
from gun_detection import stages
asked = {{}}
def gate(*_, **named):
    asked.update(named)
    return {{"explanation": "passes"}}
stages.gate = gate
HITLOperator.execute = lambda *_: "a person"
dag = DagBag({folder!r}).dags["retrain"]
params = {{"policy": None, "promotion": "auto"}}
trained = {{"model_id": "m", "dataset_id": "d"}}
dag.get_task("gate").python_callable(trained, params, "night")
decision = {{
    "passed": True, "candidate_id": "m", "promotion": "approve", "approval_text": "look closely",
    "approval_hours": 1,
}}
context = {{"ti": types.SimpleNamespace(xcom_pull=lambda **_: decision), "params": params}}
said = dag.get_task("approve").execute(context)
print(json.dumps([asked["promotion"], said]))
"""


@pytest.mark.usefixtures("settings")
def test_what_the_form_chose_is_judged_with_the_candidate() -> None:
    code = _WHO_DECIDES.format(folder=str(DAGS))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.strip().splitlines()[-1]) == ["auto", "a person"]
