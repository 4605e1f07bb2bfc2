"""Telling people of failed and late runs and of promotions: a webhook in Slack's form, and e-mail.

Each is sent where Airflow has a connection for it, and nothing is said where it has none:
`gun_detection_webhook` (HTTP) and `gun_detection_email` (SMTP). A message that cannot be sent
is an error in the task's log and nothing more.
"""

import logging
import time
from html import escape
from typing import Any, Literal
from urllib.parse import quote

from airflow.sdk import BaseHook, BaseNotifier
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowNotFoundException
from asgiref.sync import sync_to_async

logger = logging.getLogger(__name__)

WEBHOOK, EMAIL = "gun_detection_webhook", "gun_detection_email"
_TIMEOUT = 10
_UNDER_WAY = {"queued", "running"}
# Beside a task's result: what its error said, at most so many characters, and of so many tasks.
_WHY, _LONGEST, _MOST = "why", 1000, 5
_PAUSE = 5.0

Event = Literal["promoted", "rejected", "waiting", "passed", "rolled back"]


class Announcement(BaseNotifier):
    """Says what happened to a candidate, with a link to the decision.

    `gate_task` is the task whose result says what was decided, `answer` what a person said.
    """

    def __init__(
        self, event: Event, gate_task: str, *, answer: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.event, self.gate_task, self.answer = event, gate_task, answer

    def notify(self, context: Any) -> None:
        result = context["ti"].xcom_pull(task_ids=self.gate_task)
        if self.event == "rejected" and self.answer is None and result["passed"]:
            return
        _tell(*self._message(result, context), self.log)

    def _message(self, result: dict[str, Any], context: Any) -> tuple[str, str, str]:
        """(what happened, why, where to look)."""
        if self.event == "rolled back":
            return (
                f"{result['champion_id']} is champion again, after {result['previous_id']}",
                f"Rolled back by {result['actor']}: {result['reason']}",
                result["card_url"],
            )
        model, url = result["candidate_id"], result["decision_url"]
        if self.event == "waiting":
            hours = f"{result['approval_hours']:g}"
            closely = f", but look closely: {result['caution']}" if result["caution"] else ""
            where = context["task"].generate_link_to_ui(task_instance=context["ti"])
            return (
                f"{model} waits for approval",
                f"It passed the gate{closely}. No answer within {hours} hours is a rejection.",
                where,
            )
        if self.event == "passed":
            return (
                f"{model} passed the gate and is promoted by hand",
                f"{result['explanation']}\nTo promote it: gun-detection promote {model}",
                url,
            )
        if self.answer is not None:
            comment = f": {self.answer['comment']}" if self.answer["comment"] else ""
            return f"{model} was not approved", f"By {self.answer['actor']}{comment}.", url
        if self.event == "promoted":
            before = result["champion_id"] or "nobody"
            return f"{model} is champion, after {before}", result["explanation"], url
        return f"{model} was rejected by the gate", result["explanation"], url


class LargeRun(BaseNotifier):
    """Says that a scoring run is larger than the cap and waits for a word, and what without one."""

    def __init__(self, survey_task: str) -> None:
        super().__init__()
        self.survey_task = survey_task

    def notify(self, context: Any) -> None:
        survey = context["ti"].xcom_pull(task_ids=self.survey_task)
        _tell(
            f"{survey['planned']:,} pictures wait to be scored, more than a run may without asking",
            f"Without an answer within {survey['confirm_minutes']:g} minutes "
            f"{survey['confirm_images']:,} of them are scored.",
            context["task"].generate_link_to_ui(task_instance=context["ti"]),
            self.log,
        )


class FailedRun(BaseNotifier):
    """Says that a run of a DAG failed, why as far as it is known, and where to look.

    For the DAG and not for its tasks: one message a run, after the last attempt, also where the
    task's process died and could say nothing.
    """

    def notify(self, context: Any) -> None:
        dag_id, run_id = context["dag"].dag_id, context["run_id"]
        _tell(f"{dag_id} failed", self._details(context), _page(dag_id, run_id), self.log)

    def _details(self, context: Any) -> str:
        task = context.get("ti")
        if task is None:
            return f"The run {context['run_id']} did not end: {context['reason']}."
        names = [one.task_id for one in context["dag"].topological_sort()]
        # A task tells why only after Airflow knows that it failed.
        time.sleep(_PAUSE)
        try:
            said = task.xcom_pull(task_ids=names, key=_WHY)
        except Exception as error:
            self.log.warning("what the tasks said is not to be had: %s", error)
            said = []
        # Of shards that fail alike, one.
        reasons = list(dict.fromkeys(why for why in said if why))
        return "\n".join(reasons[:_MOST]) or f"{task.task_id}: its log says why"


async def tell_of_late_run(hours: float, context: Any) -> None:
    """Say that a run of a DAG goes on for longer than it should, where it may hang.

    For a deadline, whose context is the run as Airflow's API shows it, and nothing else. It runs in
    the triggerer: an executor may be taken up by what hangs, and that of Kubernetes refuses it.
    """
    late = context["dag_run"]
    # Airflow takes a deadline back only of a run that ended well; of others `FailedRun` told.
    if late["state"] not in _UNDER_WAY:
        return
    dag_id, run_id = late["dag_id"], late["dag_run_id"]
    # In a thread, from which Airflow's connections are asked for by way of the triggerer's loop.
    await sync_to_async(_tell)(
        f"{dag_id} has not ended after {hours:g} hours",
        f"The run {run_id} is {late['state']}: see which of its tasks waits or hangs. "
        "Another run of this DAG begins only after it.",
        _page(dag_id, run_id),
        logger,
    )


def keep_reason(context: Any) -> None:
    """Of a task that failed: what its own error says, for `FailedRun`.

    Other errors may quote what is not for a chat: they are in the log.
    """
    from airflow.sdk.exceptions import AirflowFailException

    from gun_detection.errors import GunDetectionError

    error, task = context.get("exception"), context["ti"]
    if isinstance(error, GunDetectionError | AirflowFailException):
        task.xcom_push(key=_WHY, value=f"{task.task_id}: {error}"[:_LONGEST])


def _page(dag_id: str, run_id: str) -> str:
    return f"{conf.get('api', 'base_url').rstrip('/')}/dags/{dag_id}/runs/{quote(run_id)}"


def _tell(line: str, details: str, url: str, log: Any) -> None:
    for send in (_to_webhook, _to_email):
        try:
            send(line, details, url)
        except AirflowNotFoundException:
            continue
        except Exception as error:
            # Nobody's candidate waits for a chat server.
            log.error("%s could not tell: %s", send.__name__.strip("_"), error)


def _to_webhook(line: str, details: str, url: str) -> None:
    from airflow.providers.http.hooks.http import HttpHook

    connection = BaseHook.get_connection(WEBHOOK)
    # A webhook's path is its secret: as the password, Airflow keeps it out of logs.
    secret = connection.password or ""
    try:
        HttpHook(method="POST", http_conn_id=WEBHOOK).run(
            endpoint=secret,
            json={"text": f"*{_slack(line)}*\n{_slack(details)}\n{url}"},
            extra_options={"timeout": _TIMEOUT},
        )
    except Exception as error:
        said = str(error)
        raise RuntimeError(said.replace(secret, "***") if secret else said) from None


def _to_email(line: str, details: str, url: str) -> None:
    from airflow.providers.smtp.hooks.smtp import SmtpHook

    recipients = BaseHook.get_connection(EMAIL).extra_dejson.get("to")
    if not recipients:
        raise ValueError(f'the connection {EMAIL} names nobody: add "to" to its extra fields')
    with SmtpHook(smtp_conn_id=EMAIL) as server:
        server.send_email_smtp(
            to=recipients,
            subject=f"[gun detection] {line}",
            html_content=f"<p><strong>{escape(line)}</strong></p><p>{escape(details)}</p>"
            f'<p><a href="{escape(url)}">{escape(url)}</a></p>',
        )


def _slack(text: str) -> str:
    """Slack's own escaping: what was written by others cannot mention or link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
