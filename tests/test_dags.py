"""Every DAG file parses, quickly importable things only, and says what it is for."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
            "queues": {{t.task_id: t.queue for t in dag.tasks}},
            "tasks_at_once": dag.max_active_tasks,
            "late": [alert.interval.total_seconds() / 3600 for alert in dag.deadline or []],
            "told_by": [type(alert.callback).__name__ for alert in dag.deadline or []],
            "limited": [t.task_id for t in dag.tasks if t.execution_timeout],
        }} for dag in bag.dags.values()
    }},
}}))
"""


def dags(**settings: str) -> dict[str, Any]:
    """What the DAG files make with these settings."""
    ran = subprocess.run(
        [sys.executable, "-c", _DAGS.format(folder=str(DAGS))],
        env=dict(os.environ) | {f"GUN_DETECTION_{name}": value for name, value in settings.items()},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def test_the_dags_are_complete() -> None:
    found = dags()
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


@pytest.mark.parametrize("queue", ["default", "gpu"])
def test_what_needs_the_gpu_waits_for_a_worker_that_has_one(queue: str) -> None:
    found = dags(SCORING_QUEUE="" if queue == "default" else queue)["dags"]
    pools, queues = found["retrain"]["pools"], found["retrain"]["queues"]
    alone = {task for task, pool in pools.items() if pool == "gpu"}
    assert {"train", "evaluate_candidate", "evaluate_champion", "gate", "package"} == alone
    # A package is for the machines that score, wherever the training was.
    assert {task for task in alone if queues[task] != "gpu"} <= {"package"}
    assert queues["package"] == queue
    assert {queues[task] for task in set(queues) - alone} == {"default"}
    for dag_id in ("score_uploads", "rescore_uploads"):
        others = found[dag_id]["queues"]
        assert others.pop("score") == queue
        assert set(others.values()) == {"default"}


def test_as_many_shards_at_once_as_the_setting_says() -> None:
    assert dags()["dags"]["score_uploads"]["tasks_at_once"] == 16
    assert dags(SCORING_TASKS="40")["dags"]["score_uploads"]["tasks_at_once"] == 40


def test_a_run_that_hangs_ends_or_is_told_of() -> None:
    found = dags()["dags"]
    for dag_id in ("score_uploads", "rescore_uploads", "ingest_dataset"):
        assert found[dag_id]["late"] == [6]
    learning = found["retrain"]
    assert learning["late"] == [6 + 48 + 24]
    # In the triggerer: the executor of Kubernetes takes none, which ends the scheduler.
    assert {told for dag in found.values() for told in dag["told_by"]} == {"AsyncCallback"}
    assert {task for task, pool in learning["pools"].items() if pool == "gpu"} == set(
        learning["limited"]
    )
    never = dags(LATE_HOURS="0")["dags"]
    assert not any(dag["late"] for dag in never.values())


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "-1", "soon"])
def test_a_wrong_number_leaves_the_dags_to_tell_of_it(value: str) -> None:
    found = dags(LATE_HOURS=value)
    assert found["errors"] == {}
    assert found["dags"]["score_uploads"]["late"] == [6]


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
made_up = {{}}
for dag in DagBag({folder!r}).dags.values():
    timetable = getattr(dag.timetable, "timetable", dag.timetable)
    if not hasattr(timetable, "expression"):
        continue
    schedule = coerce_to_core_timetable(timetable)
    # Half an hour after a run that would have been.
    run = schedule._align_to_prev(timezone.parse(sys.argv[1]))
    trigger.utcnow = lambda: run + timedelta(minutes=30)
    first = schedule.next_dagrun_info(
        last_automated_data_interval=None,
        restriction=TimeRestriction(dag.start_date, None, False),
    )
    made_up[dag.dag_id] = first.run_after == run
print(json.dumps(made_up))
"""


@pytest.mark.parametrize(
    ("since", "missed"),
    [("", False), ("once", False), ("now", False), ("2026-01-01", True), ("2026-01-01T12Z", True)],
)
def test_a_platform_makes_up_for_what_it_missed_and_a_new_one_for_nothing(
    since: str, missed: bool
) -> None:
    # One moment for both: a night may begin while the process starts.
    now = datetime.now(UTC).isoformat()
    made = now if since == "now" else since
    ran = subprocess.run(
        [sys.executable, "-c", _FIRST_RUNS.format(folder=str(DAGS)), now],
        env=dict(os.environ) | {"GUN_DETECTION_SINCE": made},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    names = ("prune_models", "rescore_uploads", "retrain", "score_uploads")
    assert json.loads(ran.stdout.strip().splitlines()[-1]) == dict.fromkeys(names, missed)


_CHECK_NEED = """
import sys, types, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow.dag_processing.dagbag import DagBag
task = DagBag({folder!r}).dags["retrain"].get_task("check_need")
params = {{"dataset_id": None, "preset": None, "overrides": {{}}, "force": False, "policy": None}}
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


# As in a task's process, with a server that keeps what a task instance asked first, as Airflow's.
_TASK = """
import json, sys, types, uuid, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import HITLDetailRequestResult
import orchestration
from gun_detection import stages
from gun_detection.errors import ServiceUnavailableError
rows = []
def send(asked):
    rows.append(asked)
    return HITLDetailRequestResult(**rows[0].model_dump(exclude={{"type"}}))
task_runner.SUPERVISOR_COMMS = types.SimpleNamespace(send=send)
HITLOperator.execute = lambda *_: "a person"
dags = DagBag({folder!r}).dags
decision = {{
    "passed": True, "candidate_id": "m", "decision_id": 1, "promotion": "approve",
    "approval_text": "look closely", "approval_hours": 1,
}}
survey = {{
    "confirm": True, "planned": 9, "text": "9 new", "confirm_minutes": 1, "confirm_images": 5,
}}
def context(result, **more):
    ti = types.SimpleNamespace(id=uuid.uuid4(), xcom_pull=lambda **_: result)
    return {{"ti": ti}} | more
def attempt(task, result):
    try:
        return task.execute(context(result))
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
approve = dags["retrain"].get_task("approve")
"""


def in_a_task(code: str) -> Any:
    """What the code prints last, which begins with the names above."""
    code = _TASK.format(folder=str(DAGS)) + code
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


_WHO_DECIDES = """
asked = {}
def gate(*_, **named):
    asked.update(named)
    return {"explanation": "passes"}
stages.gate = gate
params = {"policy": None, "promotion": "auto"}
trained = {"model_id": "m", "dataset_id": "d"}
dags["retrain"].get_task("gate").python_callable(trained, params, "night")
print(json.dumps([asked["promotion"], attempt(approve, decision)]))
"""


@pytest.mark.usefixtures("settings")
def test_what_the_form_chose_is_judged_with_the_candidate() -> None:
    assert in_a_task(_WHO_DECIDES) == ["auto", "a person"]


_ASKED_TWICE = """
said = [attempt(approve, decision) for _ in range(2)]
said.append(attempt(approve, decision | {"approval_text": "against another champion"}))
rows.clear()
confirm = dags["score_uploads"].get_task("confirm")
fewer = survey | {"planned": 8, "text": "8 new"}
said += [attempt(confirm, one) for one in (survey, survey, fewer)]
print(json.dumps(said))
"""


def test_nobody_answers_a_question_that_is_not_the_one_shown() -> None:
    first, again, other, *confirmed = in_a_task(_ASKED_TWICE)
    assert first == again == "a person"
    assert other.startswith("AirflowFailException: ")
    assert "trigger a new run" in other
    assert confirmed == ["a person", "a person", 5]


_DATABASE_AWAY = """
from datetime import datetime, timezone
answers = [ServiceUnavailableError("away")] * 2 + [None]
def answer(*_, **named):
    if error := answers.pop(0):
        raise error
    return named
stages.answer = answer
orchestration.time.sleep = lambda seconds: None
event = {
    "chosen_options": ["Approve"], "params_input": {}, "responded_at": datetime.now(timezone.utc),
    "responded_by_user": {"id": "1", "name": "ann"},
}
said = approve.execute_complete(context(decision, task=approve), event)
orchestration._PATIENCE = 0
answers = [ServiceUnavailableError("away")]
try:
    approve.execute_complete(context(decision, task=approve), event)
except ServiceUnavailableError:
    print(json.dumps(said))
"""


@pytest.mark.usefixtures("settings")
def test_an_answer_waits_for_the_database() -> None:
    # Trying the task again would ask again.
    assert in_a_task(_DATABASE_AWAY) == {"approved": True, "actor": "ann", "comment": ""}


_HOW_MANY = """
from datetime import datetime, timezone
def answered(chosen):
    event = {
        "chosen_options": [chosen], "params_input": {}, "responded_at": datetime.now(timezone.utc),
        "responded_by_user": {"id": "1", "name": "ann"},
    }
    return confirm.execute_complete(context(survey, task=confirm), event)
confirm = dags["score_uploads"].get_task("confirm")
small = survey | {"confirm": False}
limits = [answered(chosen) for chosen in confirm.options]
print(json.dumps(limits + [confirm.execute(context(small))]))
"""


@pytest.mark.usefixtures("settings")
def test_whoever_agreed_to_all_agreed_to_a_number() -> None:
    # The last is what there is, too, where the task was marked as successful by hand.
    assert in_a_task(_HOW_MANY) == [9, 5, 0, None]


_FORM = """
buckets = []
def survey_uploads(settings, kind, bucket, *_, **__):
    buckets.append(bucket)
    return {"text": ""}
def plan_scoring(settings, surveyed, bucket, *_, **__):
    buckets.append(bucket)
    return {"run_id": "r", "run_url": "u", "shard_ids": []}
stages.survey_uploads, stages.plan_scoring = survey_uploads, plan_scoring
run = types.SimpleNamespace(run_type="manual")
ti = types.SimpleNamespace(xcom_push=lambda *_: None)
for bucket in (None, "", "b"):
    params = {"bucket": bucket, "prefix": None, "threshold": None}
    score = dags["score_uploads"]
    score.get_task("survey").python_callable(params, run)
    score.get_task("plan").python_callable({}, None, params, score, "night", ti)
print(json.dumps(buckets))
"""


@pytest.mark.usefixtures("settings")
def test_an_empty_field_of_the_form_is_no_bucket() -> None:
    assert in_a_task(_FORM) == [None, None, None, None, "b", "b"]


_UNPLANNED = """
from airflow.sdk.observability import stats
sent = {}
stats.gauge = sent.__setitem__
finish = dags["score_uploads"].get_task("finish").python_callable
ti = types.SimpleNamespace(xcom_pull=lambda **_: None)
def said():
    try:
        finish(ti, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def away(_):
    raise ServiceUnavailableError("away")
stages.freshness = lambda _: {"unscored": 7, "oldest_seconds": 100.0}
said_with = said()
stages.freshness = away
print(json.dumps([sent, said_with, said()]))
"""


@pytest.mark.usefixtures("settings")
def test_what_waits_is_measured_also_where_nothing_was_planned() -> None:
    sent, said, said_without_a_database = in_a_task(_UNPLANNED)
    assert sent == {
        "gun_detection.scoring.unscored": 7,
        "gun_detection.scoring.oldest_unscored_seconds": 100.0,
    }
    assert said.startswith("AirflowFailException: nothing was planned")
    assert said_without_a_database == said
