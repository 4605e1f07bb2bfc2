"""What the DAG files share: retries, assets, links from a task to what it made, asking a person."""

import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import (
    Asset,
    AssetWatcher,
    BaseOperator,
    BaseOperatorLink,
    CronTriggerTimetable,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
)
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from notifications import Announcement, FailedRun, LargeRun, keep_reason, tell_of_late_run
from run_deadline import RunMade
from uploads_trigger import UploadsTrigger

from gun_detection.errors import TransientError

# A dead worker is noticed by its heartbeat and tried again; an error only if it may pass.
DEFAULT_ARGS: dict[str, Any] = {
    "owner": "gun-detection",
    "retries": 3,
    "retry_delay": timedelta(seconds=15),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ExceptionRetryPolicy(
        rules=[
            RetryRule(TransientError, RetryAction.RETRY, reason="a server may be back by then"),
            RetryRule(OSError, RetryAction.RETRY, reason="the disk may have room by then"),
        ],
        default=RetryAction.FAIL,
    ),
    "on_failure_callback": keep_reason,
}
# What a DAG calls when a run of it failed.
TELL = FailedRun()

TRAINING_DATA = Asset("training_data", uri="gun-detection://training-data", group="gun-detection")
CHAMPION = Asset("champion", uri="gun-detection://champion", group="gun-detection")
DETECTIONS = Asset("detections", uri="gun-detection://detections", group="gun-detection")


def _since() -> datetime | None:
    """When the platform was made; a wrong date is refused by the tasks."""
    try:
        since = datetime.fromisoformat(os.environ.get("GUN_DETECTION_SINCE", ""))
    except ValueError:
        return None
    return since if since.tzinfo else since.replace(tzinfo=UTC)


# The last run that was missed since then is made up for. Airflow does so only after a first one,
# which a machine that is off at night would never have.
SINCE = _since()


def at_hours(cron: str) -> CronTriggerTimetable:
    """A schedule in UTC whose first run, where `SINCE` is not known, is the next."""
    return CronTriggerTimetable(cron, timezone="UTC", run_immediately=timedelta(0))


def _setting(name: str, default: float) -> float:
    """A number that the schedule itself depends on; a wrong one is refused by the tasks."""
    try:
        value = float(os.environ.get(f"GUN_DETECTION_{name}", default))
    except ValueError:
        return default
    return value if 0 <= value < _MOST else default


# More than any setting may be, and not what a duration cannot hold.
_MOST = 1e6
# What hangs is told of, as not everything that hangs ends: a task that waits for a worker or a pool
# has no limit of time, and one in native code hears of none.
_LATE_HOURS = _setting("LATE_HOURS", 6)


def late_after(hours: float) -> DeadlineAlert | None:
    """The deadline of a DAG of which a run that goes on for longer may hang."""
    if _LATE_HOURS <= 0:
        return None
    return DeadlineAlert(
        reference=RunMade(),
        interval=timedelta(hours=hours),
        callback=AsyncCallback(tell_of_late_run, {"hours": hours}),
    )


DEADLINE = late_after(_LATE_HOURS)
# A training and what comes before and after it may take a day each, and then a person is asked.
LEARNING_DEADLINE = late_after(_LATE_HOURS + 48 + _setting("APPROVAL_HOURS", 24))
SCORING_TASKS = max(1, int(_setting("SCORING_TASKS", 2)))
SCORING_QUEUE = os.environ.get("GUN_DETECTION_SCORING_QUEUE") or "default"
_WATCH_SECONDS = _setting("WATCH_SECONDS", 20)
UPLOADS = Asset(
    "uploads",
    uri="gun-detection://uploads",
    group="gun-detection",
    watchers=[AssetWatcher("new_uploads", UploadsTrigger(_WATCH_SECONDS))]
    if _WATCH_SECONDS > 0
    else [],
)

_EVERY = 5.0
# How long the library's database may be away before a person's answer is lost, in seconds.
_PATIENCE = 600.0


class ReportLink(BaseOperatorLink):
    """The report that the task stored."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "report_url")


class TensorBoardLink(BaseOperatorLink):
    """The training run in TensorBoard."""

    name = "TensorBoard"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "tensorboard_url")


class DecisionLink(BaseOperatorLink):
    """What the gate said, rule by rule."""

    name = "Decision"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "decision_url")


class ModelCardLink(BaseOperatorLink):
    """The model card of the new champion."""

    name = "Model card"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return _returned(ti_key, "card_url")


class ScoringRunLink(BaseOperatorLink):
    """What a scoring run did: its counts, its speed, its quarantine."""

    name = "Scoring run"

    def __init__(self, *, plan_task: str) -> None:
        self.plan_task = plan_task

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        # As the run was planned: it is also there where its end says that something is wrong.
        return str(ti_key.xcom_pull(task_ids=self.plan_task, key="run_url") or "")


# What a person may say beside the answer. Airflow adds the DAG's own parameters to what it gets
# here, and leaves these out of the form.
COMMENT = {
    "comment": Param(None, type=["null", "string"], maxLength=1000, title="Comment (may be empty)")
}


def _is_shown(operator: HITLOperator, context: Any) -> bool:
    """Stores the question; False where Airflow goes on to show another.

    What a task instance asked first stays when it is cleared: only the answer is taken out.
    """
    from airflow.sdk.execution_time import task_runner
    from airflow.sdk.execution_time.comms import CreateHITLDetailPayload, HITLDetailRequestResult

    shown = task_runner.SUPERVISOR_COMMS.send(
        CreateHITLDetailPayload(
            ti_id=context["ti"].id,
            options=operator.options,
            subject=operator.subject,
            body=operator.body,
            defaults=operator.defaults,
            params=operator.serialized_params,
            # The server refuses null, which is the default here.
            assigned_users=[],
        )
    )
    assert isinstance(shown, HITLDetailRequestResult)
    return (shown.subject, shown.body) == (operator.subject, operator.body)


class Approve(ApprovalOperator):
    """Asks a person about a candidate that passed, where the promotion is to be approved.

    Returns who said yes; skips what follows after a rejection by the gate or by a person, after
    the time to answer, and where promotions are made by hand. Whoever may trigger the DAG may
    answer, viewers may not. Fails where it asked about another decision before. Takes
    `params=COMMENT`.
    """

    def __init__(self, *, gate_task: str, **arguments: Any) -> None:
        super().__init__(
            subject="Shall this candidate become champion?",
            defaults=self.REJECT,
            notifiers=[Announcement("waiting", gate_task)],
            **arguments,
        )
        self.gate_task = gate_task

    def execute(self, context: Any) -> Any:
        decision = context["ti"].xcom_pull(task_ids=self.gate_task)
        if not decision["passed"]:
            raise AirflowSkipException(decision["explanation"])
        if decision["promotion"] == "manual":
            model = decision["candidate_id"]
            Announcement("passed", self.gate_task)(context)
            raise AirflowSkipException(f"promote it by hand: gun-detection promote {model}")
        if decision["promotion"] == "auto":
            return {"actor": None, "comment": ""}
        self.subject = f"Shall {decision['candidate_id']} become champion?"
        self.body = decision["approval_text"]
        self.response_timeout = timedelta(hours=decision["approval_hours"])
        if not _is_shown(self, context):
            raise AirflowFailException(
                "the gate decided again, and Airflow would show the question about its former "
                "decision: trigger a new run"
            )
        return super().execute(context)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        # Checks the answer; what skips the tasks that follow never returns, and comes last.
        answered = HITLOperator.execute_complete(self, context, event)
        user = answered["responded_by_user"]
        approved = answered["chosen_options"] == [self.APPROVE]
        decision = context["ti"].xcom_pull(task_ids=self.gate_task)
        result = self._record(
            decision["decision_id"],
            approved=approved,
            actor=user["name"] if user else "nobody, in the time that there was",
            comment=str((answered["params_input"] or {}).get("comment") or ""),
        )
        if not approved:
            Announcement("rejected", self.gate_task, answer=result)(context)
        super().execute_complete(context, event)
        return result

    def _record(self, decision_id: int, **answer: Any) -> Any:
        # Tried here for a while: trying the task again begins with the question.
        from gun_detection import stages
        from gun_detection.settings import load_settings

        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return stages.answer(load_settings(), decision_id, **answer)
            except TransientError as error:
                if time.monotonic() >= deadline:
                    raise
                self.log.warning("the answer is not stored yet: %s", error)
                time.sleep(_EVERY)


class Confirm(HITLOperator):
    """Asks a person before a run that is larger than the cap; returns how many are scored.

    Nothing is returned where nothing is asked, and where the task was marked as successful by hand,
    with which nobody agreed to anything. Without an answer in time it is as many as the cap allows,
    the oldest first: nothing waits for a person who is asleep, and nothing costs more than was
    agreed. So it is, too, where it asked about other numbers before.
    """

    ALL, CAP, NOTHING = "Score all", "Score what the cap allows", "Score nothing now"

    def __init__(self, *, survey_task: str, **arguments: Any) -> None:
        super().__init__(
            subject="Shall all of these be scored?",
            options=[self.ALL, self.CAP, self.NOTHING],
            defaults=self.CAP,
            notifiers=[LargeRun(survey_task)],
            **arguments,
        )
        self.survey_task = survey_task

    def execute(self, context: Any) -> Any:
        survey = context["ti"].xcom_pull(task_ids=self.survey_task)
        if not survey["confirm"]:
            return None
        self.subject = f"Shall {survey['planned']:,} pictures be scored?"
        self.body = survey["text"]
        self.response_timeout = timedelta(minutes=survey["confirm_minutes"])
        if not _is_shown(self, context):
            self.log.warning(
                "Airflow would show the question about the survey before: what the cap allows is "
                "scored, and the rest waits for the next run"
            )
            return survey["confirm_images"]
        return super().execute(context)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        [chosen] = super().execute_complete(context, event)["chosen_options"]
        survey = context["ti"].xcom_pull(task_ids=self.survey_task)
        limits = {self.ALL: survey["planned"], self.CAP: survey["confirm_images"], self.NOTHING: 0}
        return limits[chosen]


def _returned(ti: Any, name: str) -> str:
    # Called in the task's own process after its end: `ti` is the running task instance.
    result = ti.xcom_pull(task_ids=ti.task_id, key="return_value", map_indexes=ti.map_index)
    return str((result or {}).get(name) or "")


def progress_log(task: str) -> Callable[..., None]:
    """A function of (done, total) that writes a line into the task's log every few seconds."""
    logger = logging.getLogger("gun_detection.progress")
    started = last = time.monotonic()

    def report(done: int, total: int, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _EVERY and done < total:
            return
        last = now
        left = (now - started) / max(done, 1) * (total - done)
        rate = done / max(now - started, 1e-9)
        logger.info("%s %d/%d%s, %.1f/s, %.0f s left", task, done, total, text, rate, left)

    return report
