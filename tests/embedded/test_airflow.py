"""The client of Airflow before a server that is slow, or not there."""

from collections.abc import Iterator

import httpx
import pytest

from embedded.airflow import Airflow
from gun_detection.errors import ServiceUnavailableError

Answers = list[Exception | httpx.Response]


@pytest.fixture
def answers() -> Answers:
    return []


@pytest.fixture
def airflow(answers: Answers) -> Iterator[Airflow]:
    """Signed in at a server that gives these answers, one after the other."""

    def answer(request: httpx.Request) -> httpx.Response:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    with Airflow("http://airflow", "admin", "secret") as client:
        client.close()
        client._client = httpx.Client(
            base_url=client.url,
            transport=httpx.MockTransport(answer),
            headers={"Authorization": "Bearer token"},
        )
        yield client


def test_a_busy_server_is_read_from_again(airflow: Airflow, answers: Answers) -> None:
    late = [httpx.ReadTimeout("timed out")] * 3
    answers += [*late, httpx.Response(200, json={"state": "success"})]
    assert airflow.wait("retrain", "first") == "success"
    answers += [*late, *late]
    with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
        airflow.dag_run("retrain", "first")
    assert len(answers) == 2


def test_nothing_is_asked_for_twice_that_would_happen_twice(
    airflow: Airflow, answers: Answers
) -> None:
    answers += [httpx.ReadTimeout("timed out"), httpx.Response(200, json={"dag_run_id": "x"})]
    with pytest.raises(ServiceUnavailableError) as caught:
        airflow.trigger("retrain")
    assert len(answers) == 1
    # As long as what is read from a busy server, all told.
    assert isinstance(caught.value.__cause__, httpx.ReadTimeout)
    assert caught.value.__cause__.request.extensions["timeout"]["read"] == 120


def test_a_server_that_is_down_is_told_at_once(airflow: Airflow, answers: Answers) -> None:
    answers += [httpx.ConnectError("refused"), httpx.Response(200, json={})]
    with pytest.raises(ServiceUnavailableError):
        airflow.dag_run("retrain", "first")
    assert len(answers) == 1
