"""What people are told, through a real HTTP and a real SMTP conversation on this machine."""

import email
import email.policy
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embedded.config import REPOSITORY
from tests.integration.receiver import receive

# As the task runner has it: DAG files on the path, connections from the environment.
_NOTIFY = """
import asyncio, json, sys, types, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
from notifications import Announcement, LargeRun, tell_of_late_run
event, result, answer = json.loads(sys.stdin.read())
task = types.SimpleNamespace(xcom_pull=lambda task_ids: result)
operator = types.SimpleNamespace(generate_link_to_ui=lambda task_instance: "http://ui/approve")
if event == "large":
    LargeRun("survey").notify({{"ti": task, "task": operator}})
elif event == "late":
    asyncio.run(tell_of_late_run(hours=6.0, context={{"dag_run": result}}))
else:
    Announcement(event, "gate", answer=answer).notify({{"ti": task, "task": operator}})
"""

RESULT = {
    "candidate_id": "model-b",
    "champion_id": "model-a",
    "previous_id": "model-b",
    "passed": True,
    "approval_hours": 24.0,
    "caution": None,
    "explanation": "model-b passes <https://evil.example|look>",
    "decision_url": "http://ui/decisions/7",
    "card_url": "http://ui/cards/model-a",
    "actor": "ann",
    "reason": "worse & worse",
}


def notify(
    event: str,
    connections: dict[str, dict[str, Any]],
    answer: dict[str, str] | None = None,
    **changes: object,
) -> str:
    """What the notifier wrote; it must never fail."""
    environment = dict(os.environ) | {
        f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()
    }
    environment["AIRFLOW__API__BASE_URL"] = "http://ui/"
    ran = subprocess.run(
        [sys.executable, "-c", _NOTIFY.format(folder=str(REPOSITORY / "plugins"))],
        input=json.dumps([event, RESULT | changes, answer]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def webhook(port: int) -> dict[str, dict[str, Any]]:
    address = {"conn_type": "http", "schema": "http", "host": "127.0.0.1", "port": port}
    return {"gun_detection_webhook": address | {"password": "hooks/secret"}}


def test_each_event_is_told_in_its_own_words() -> None:
    with receive() as receiver:
        there = webhook(receiver.port)
        notify("promoted", there)
        notify("waiting", there, caution="it costs more")
        notify("rejected", there)
        notify("rejected", there, passed=False)
        notify("rejected", there, answer={"actor": "ann", "comment": "no"})
        notify("passed", there)
        notify("rolled back", there)
        first, waiting, rejected, refused, passed, back = receiver.messages
    assert receiver.paths == ["/hooks/secret"] * 6
    assert first.splitlines() == [
        "*model-b is champion, after model-a*",
        "model-b passes &lt;https://evil.example|look&gt;",
        "http://ui/decisions/7",
    ]
    assert waiting.startswith("*model-b waits for approval*")
    assert waiting.splitlines()[1:] == [
        "It passed the gate, but look closely: it costs more. "
        "No answer within 24 hours is a rejection.",
        "http://ui/approve",
    ]
    assert rejected.startswith("*model-b was rejected by the gate*")
    assert refused.splitlines()[:2] == ["*model-b was not approved*", "By ann: no."]
    assert passed.startswith("*model-b passed the gate and is promoted by hand*\nmodel-b passes")
    assert passed.splitlines()[2:] == [
        "To promote it: gun-detection promote model-b",
        "http://ui/decisions/7",
    ]
    assert back.startswith("*model-a is champion again, after model-b*\nRolled back by ann: worse")


def test_a_run_that_waits_for_a_word_says_what_comes_without_it() -> None:
    with receive() as receiver:
        notify(
            "large",
            webhook(receiver.port),
            planned=1234567,
            confirm_images=50000,
            confirm_minutes=60.0,
        )
        [told] = receiver.messages
    assert told.splitlines() == [
        "*1,234,567 pictures wait to be scored, more than a run may without asking*",
        "Without an answer within 60 minutes 50,000 of them are scored.",
        "http://ui/approve",
    ]


def test_a_late_run_is_named() -> None:
    with receive() as receiver:
        notify(
            "late",
            webhook(receiver.port),
            dag_id="score_uploads",
            dag_run_id="scheduled__2026-01-01T03:00:00+00:00",
            state="running",
        )
        [told] = receiver.messages
    line, details, url = told.splitlines()
    assert line == "*score_uploads has not ended after 6 hours*"
    assert "scheduled__2026-01-01T03:00:00+00:00 is running" in details
    run = "scheduled__2026-01-01T03%3A00%3A00%2B00%3A00"
    assert url == f"http://ui/dags/score_uploads/runs/{run}"


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_run_that_has_ended_is_not_late(state: str) -> None:
    with receive() as receiver:
        notify("late", webhook(receiver.port), dag_id="score_uploads", dag_run_id="a", state=state)
        assert receiver.messages == []


def test_nothing_is_said_without_a_connection() -> None:
    assert "could not tell" not in notify("promoted", {})


def test_a_server_that_is_away_fails_nothing_and_keeps_the_secret() -> None:
    with receive() as receiver:
        port = receiver.port
    said = notify("promoted", webhook(port))
    assert "could not tell" in said
    # Airflow masks a connection's password in what its own hooks write to a task's log.
    own = [line for line in said.splitlines() if "could not tell" in line]
    assert own
    assert "hooks/secret" not in "".join(own)


class _Smtp(socketserver.StreamRequestHandler):
    """As much of RFC 5321 as one client needs."""

    def handle(self) -> None:
        def say(line: str) -> None:
            self.wfile.write(line.encode() + b"\r\n")

        say("220 here")
        for raw in self.rfile:
            command = raw.decode().strip()
            if command.upper() == "DATA":
                say("354 go on")
                body = []
                for line in self.rfile:
                    if line == b".\r\n":
                        break
                    body.append(line.decode())
                self.server.letters.append("".join(body))  # type: ignore[attr-defined]
            elif command.upper() == "QUIT":
                say("221 bye")
                return
            elif command.upper().startswith("RCPT"):
                self.server.recipients.append(command)  # type: ignore[attr-defined]
            say("250 fine")


@pytest.fixture
def smtp() -> Iterator[Any]:
    server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Smtp)
    server.letters, server.recipients = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def mailbox(port: int, **extra: object) -> dict[str, dict[str, Any]]:
    address = {"conn_type": "smtp", "host": "127.0.0.1", "port": port}
    plain = {"disable_ssl": True, "disable_tls": True, "from_email": "platform@example.org"}
    return {"gun_detection_email": address | {"extra": plain | extra}}


def test_a_letter_goes_to_those_named(smtp: Any) -> None:
    notify("promoted", mailbox(smtp.server_address[1], to="team@example.org"))
    [letter] = smtp.letters
    message = email.message_from_string(letter, policy=email.policy.default)
    assert message["Subject"] == "[gun detection] model-b is champion, after model-a"
    body = message.get_body(("html",))
    assert body is not None
    assert "&lt;https://evil.example" in body.get_content()
    assert "team@example.org" in smtp.recipients[0]


def test_a_connection_that_names_nobody_says_so(smtp: Any) -> None:
    assert "names nobody" in notify("promoted", mailbox(smtp.server_address[1]))
    assert smtp.letters == []
