"""Candidates, people and champions in a real Airflow: approval, time-out, rollback, pinned runs.

The champion changes here: this comes after the tests that know it, and takes it as it finds it.
"""

import time
from typing import Any

import pytest
from sqlalchemy import text

from embedded.config import PlatformError
from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.datasets.synthetic import upload_pictures
from gun_detection.release.champion import take_turn
from gun_detection.storage import Storage
from tests.integration.conftest import (
    QUICK,
    WEBHOOK_PATH,
    RunningPlatform,
    browser,
    run,
    wait_for_messages,
    wait_until,
)

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1800)]


def rows(platform: RunningPlatform, statement: str, **values: object) -> list[Any]:
    with open_session(platform.settings) as session:
        return list(session.execute(text(statement), values).all())


def champion_now(platform: RunningPlatform) -> str:
    [row] = rows(platform, "SELECT model_id FROM current_champion")
    return str(row.model_id)


def state_of(platform: RunningPlatform, model_id: str) -> Any:
    [row] = rows(platform, "SELECT * FROM model_states WHERE model_id = :id", id=model_id)
    return row


def candidate(champion: dict[str, Any], seed: int, promotion: str) -> dict[str, Any]:
    overrides = {"max_steps": 2, "seed": seed}
    dataset = champion["ingest"]["dataset_id"]
    return QUICK | {"dataset_id": dataset, "overrides": overrides, "promotion": promotion}


def freed(platform: RunningPlatform, run_id: str) -> bool:
    """Whether the scheduler knows that the process that asked has ended.

    An answer before that can be lost: the scheduler may take the end of that process for the end
    of the one that takes the answer, and ask again.
    """
    log = platform.stack.log_of("scheduler").read_text(errors="replace")
    return f"TaskInstance Finished: dag_id=retrain, task_id=approve, run_id={run_id}," in log


def wait_for_question(platform: RunningPlatform, run_id: str) -> str:
    """The path at which the question of a retrain run is answered."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        tasks = platform.airflow.task_instances("retrain", run_id)
        states = {task["task_id"]: task["state"] for task in tasks}
        if states["approve"] == "awaiting_input" and freed(platform, run_id):
            return f"/dags/retrain/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"
        assert states["approve"] in (None, "scheduled", "queued", "running", "awaiting_input")
        time.sleep(1)
    raise AssertionError("nobody was asked")


def wait_for_earlier_runs(platform: RunningPlatform) -> None:
    """One scoring run of a DAG at a time."""
    deadline = time.monotonic() + 600
    while any(
        row["state"] in ("queued", "running") for row in platform.airflow.dag_runs("score_uploads")
    ):
        assert time.monotonic() < deadline
        time.sleep(2)


def test_a_person_approves_with_the_numbers_in_view(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    before = champion_now(platform)
    run_id = platform.airflow.trigger("retrain", candidate(champion, 21, "approve"))
    question = wait_for_question(platform, run_id)
    asked = platform.airflow.request("GET", question)
    model = platform.airflow.xcom("retrain", run_id, "gate")["candidate_id"]
    assert model in asked["subject"]
    for part in ("| AP50 |", "/gun-detection/reports/", "/gun-detection/cards/", model):
        assert part in asked["body"]
    assert state_of(platform, model).state == "passed"
    answer = {"chosen_options": ["Approve"], "params_input": {"comment": "looked at *all*"}}
    with platform.stack.airflow("viewer") as viewer, pytest.raises(PlatformError) as refused:
        viewer.request("PATCH", question, json=answer)
    assert refused.value.reason == "HTTP_403"
    with platform.stack.airflow("operator") as operator:
        operator.request("PATCH", question, json=answer)
    assert platform.airflow.wait("retrain", run_id) == "success"
    log = platform.airflow.task_log("retrain", run_id, "approve")
    assert champion_now(platform) == model, log
    row = state_of(platform, model)
    assert (row.state, row.approver, row.approval_comment) == (
        "champion",
        "operator",
        "looked at *all*",
    )
    [promotion] = rows(platform, "SELECT * FROM promotion WHERE model_id = :id", id=model)
    assert promotion.actor.startswith("operator, in airflow:retrain:")
    assert promotion.reason.startswith("looked at *all* — ")
    told = wait_for_messages(platform, model, 2)
    assert [message.splitlines()[0].split(" ", 1)[1] for message in told] == [
        "waits for approval*",
        f"is champion, after {before}*",
    ]
    assert set(platform.receiver.paths) == {"/" + WEBHOOK_PATH}
    for task in ("approve", "promote"):
        assert WEBHOOK_PATH not in platform.airflow.task_log("retrain", run_id, task)


def test_no_answer_in_time_is_a_rejection_and_the_run_is_green(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    before = champion_now(platform)
    result = run(platform, "retrain", candidate(champion, 22, "approve"))
    model = result["train"]["model_id"]
    assert result["promote"] == "skipped"
    assert champion_now(platform) == before
    row = state_of(platform, model)
    assert (row.state, row.passed, row.approved) == ("rejected", True, False)
    assert row.approver == "nobody, in the time that there was"
    told = wait_for_messages(platform, model, 2)
    assert [message.splitlines()[0] for message in told] == [
        f"*{model} waits for approval*",
        f"*{model} was not approved*",
    ]


def test_by_hand_is_left_to_people(platform: RunningPlatform, champion: dict[str, Any]) -> None:
    before = champion_now(platform)
    result = run(platform, "retrain", candidate(champion, 23, "manual"))
    assert (result["gate"]["passed"], result["promote"]) == (True, "skipped")
    log = platform.airflow.task_log("retrain", result["run_id"], "approve")
    model = result["train"]["model_id"]
    assert f"gun-detection promote {model}" in log
    assert champion_now(platform) == before
    [told] = wait_for_messages(platform, model)
    assert told.startswith(f"*{model} passed the gate and is promoted by hand*")


def test_a_decision_after_the_question_is_not_answered_with_it(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    before = champion_now(platform)
    run_id = platform.airflow.trigger("retrain", candidate(champion, 24, "approve"))
    wait_for_question(platform, run_id)
    platform.airflow.request(
        "POST",
        "/dags/retrain/clearTaskInstances",
        json={
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": ["gate"],
            "include_downstream": True,
            "only_failed": False,
        },
    )
    assert platform.airflow.wait("retrain", run_id) == "failed"
    tasks = platform.airflow.task_instances("retrain", run_id)
    attempts = {task["task_id"]: task["try_number"] for task in tasks}
    log = platform.airflow.task_log("retrain", run_id, "approve", attempt=attempts["approve"])
    assert "trigger a new run" in log
    assert champion_now(platform) == before


def test_the_verdict_is_shown_to_those_who_signed_in(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    with platform.stack.airflow("viewer") as viewer:
        token = {"Authorization": f"Bearer {viewer.token()}"}
    model, run_id = champion["train"]["model_id"], champion["run_id"]
    base = f"{platform.airflow.url}/gun-detection"
    verdict = {"dag_id": "retrain", "run_id": run_id}
    pages = {
        "/models": (None, model),
        "/scoring": (None, "Scoring"),
        f"/decisions/{champion['gate']['decision_id']}": (None, "passes the gate"),
        f"/cards/{model}": (None, "Intended use"),
        "/verdict": (verdict, model),
    }
    with browser() as client:
        for path, (query, expected) in pages.items():
            assert client.get(base + path, params=query).status_code == 401
            page = client.get(base + path, params=query, headers=token)
            assert (page.status_code, expected in page.text) == (200, True), path
            assert "default-src 'none'" in page.headers["content-security-policy"]
        nothing = client.get(f"{base}/verdict", params=verdict | {"run_id": "none"}, headers=token)
        assert "decided nothing" in nothing.text
        for path in ("/decisions/999999", "/cards/none", "/cards/..%2F..%2Fdatasets"):
            assert client.get(base + path, headers=token).status_code == 404
    links = platform.airflow.request(
        "GET", f"/dags/retrain/dagRuns/{run_id}/taskInstances/gate/links"
    )["extra_links"]
    assert links["Decision"] == champion["gate"]["decision_url"]


def test_a_run_keeps_its_model_while_the_champion_changes(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    storage, bucket = Storage(platform.settings), platform.settings.uploads_bucket
    pictures = upload_pictures(80, seed=33)
    for picture in pictures:
        storage.put(bucket, f"pinned/{picture.name}", picture.data)
    before = champion_now(platform)
    wait_for_earlier_runs(platform)
    scope = {"bucket": bucket, "prefix": "pinned/"}
    run_id = platform.airflow.trigger("score_uploads", scope)
    scored = (
        "SELECT DISTINCT l.model_id FROM ledger l JOIN upload u ON u.id = l.upload_id "
        "WHERE u.key LIKE 'pinned/%'"
    )
    deadline = time.monotonic() + 600
    while not rows(platform, scored):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stages.rollback(platform.settings, "tester", "while a run is under way")
    after = champion_now(platform)
    assert after != before
    assert platform.airflow.wait("score_uploads", run_id) == "success"
    assert platform.airflow.xcom("score_uploads", run_id, "finish")["scored"] == len(pictures)
    pinned = rows(platform, "SELECT model_id FROM scoring_run WHERE id LIKE :id", id=f"%{run_id}%")
    assert {row.model_id for row in pinned} == {before}
    finished = platform.airflow.xcom("score_uploads", run_id, "finish")
    with platform.stack.airflow("viewer") as viewer, browser() as client:
        token = {"Authorization": f"Bearer {viewer.token()}"}
        query = {"dag_id": "score_uploads", "run_id": run_id}
        tab = client.get(
            f"{platform.airflow.url}/gun-detection/scored", params=query, headers=token
        )
        linked = client.get(finished["run_url"], headers=token)
        for page in (tab, linked):
            assert (page.status_code, f"/cards/{before}" in page.text) == (200, True)
    again = run(platform, "rescore_uploads", scope)
    assert again["survey"]["outdated"] == again["finish"]["scored"] == len(pictures)
    assert {row.model_id for row in rows(platform, scored)} == {before, after}


def test_a_rollback_waits_its_turn_and_says_who_asked(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    first = champion_now(platform)
    [latest] = rows(
        platform,
        "SELECT candidate_id, id FROM gate_decision WHERE passed AND candidate_id <> :id "
        "ORDER BY id DESC LIMIT 1",
        id=first,
    )
    stages.promote(platform.settings, latest.candidate_id, "tester", "to have one to leave")
    platform.airflow.wait_for_dag("rollback_champion", timeout=300)
    with open_session(platform.settings) as session:
        # Another promotion is under way.
        take_turn(session)
        run_id = platform.airflow.trigger("rollback_champion", {"reason": "too many alarms"})
        deadline = time.monotonic() + 300
        while True:
            [task] = platform.airflow.task_instances("rollback_champion", run_id)
            if task["state"] == "up_for_retry":
                break
            assert time.monotonic() < deadline
            time.sleep(1)
    assert platform.airflow.wait("rollback_champion", run_id) == "success"
    log = platform.airflow.task_log("rollback_champion", run_id, "rollback", attempt=1)
    assert "another promotion is under way" in log
    assert champion_now(platform) == first
    [row] = rows(platform, "SELECT * FROM champion_history ORDER BY promotion_id DESC LIMIT 1")
    assert (row.kind, row.reason, row.until) == ("rollback", "too many alarms", None)
    assert row.actor.startswith("admin, in airflow:rollback_champion:")
    again = f"*{first} is champion again"
    wait_until(lambda: again in "".join(platform.receiver.about(first)[-1:]))
