"""Airflow's components as services, and a client of its REST API."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

from embedded.config import HOST, PlatformError
from embedded.processes import Service
from gun_detection.errors import NotFoundError, ServiceUnavailableError

# The part of Airflow's health report that tells how a component is.
COMPONENTS = {
    "api-server": "metadatabase",
    "scheduler": "scheduler",
    "dag-processor": "dag_processor",
    "triggerer": "triggerer",
}
LOG_SERVER = "log-server"
# The logs of running tasks come from a server of their own: these would listen on every address.
_ARGUMENTS = {"scheduler": ("--skip-serve-logs",), "triggerer": ("--skip-serve-logs",)}
FINISHED = frozenset({"success", "failed"})
# How often something is read from a server that does not answer within so many seconds.
_TRIES, _SECONDS = 4, 30.0
_PAGE = 100


def airflow_services(environment: dict[str, str]) -> list[Service]:
    folder = Path(environment["AIRFLOW_HOME"])
    services = [
        Service(
            name=name,
            command=(sys.executable, "-m", "airflow", name, *_ARGUMENTS.get(name, ())),
            environment=environment,
            ports=("airflow",) if name == "api-server" else (),
            directory=folder,
        )
        for name in COMPONENTS
    ]
    port = environment["AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT"]
    log_server = Service(
        name=LOG_SERVER,
        command=(
            *(sys.executable, "-m", "uvicorn", "--factory", "--no-access-log"),
            *("--host", HOST, "--port", port),
            "airflow.utils.serve_logs.log_server:get_app",
        ),
        environment=environment,
        ports=("airflow_logs",),
        directory=folder,
    )
    return [*services, log_server]


class Airflow:
    """A client of one Airflow, signed in as one user; use it as a context manager or close it.

    Raises `NotFoundError` for an unknown DAG, run or task, `ServiceUnavailableError` when the
    server cannot be reached, and `PlatformError` for what the server refuses.
    """

    def __init__(self, url: str, username: str, password: str) -> None:
        self.url = url
        self._login = {"username": username, "password": password}
        self._client = httpx.Client(base_url=url, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def token(self) -> str:
        """A new bearer token of the user."""
        response = self._send("POST", "/auth/token", json=self._login)
        return str(_content(response)["access_token"])

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded answer of `/api/v2` + path; signs in first, and again when it has to."""
        address, tries = f"/api/v2{path}", _TRIES if method == "GET" else 1
        if "Authorization" not in self._client.headers:
            self._client.headers["Authorization"] = f"Bearer {self.token()}"
        response = self._send(method, address, tries, **arguments)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            self._client.headers["Authorization"] = f"Bearer {self.token()}"
            response = self._send(method, address, tries, **arguments)
        return _content(response)

    def health(self) -> dict[str, dict[str, Any]]:
        """The health report by component, empty while the server does not answer."""
        try:
            report = _content(self._send("GET", "/api/v2/monitor/health"))
        except ServiceUnavailableError:
            return {}
        return {name: report.get(key) or {} for name, key in COMPONENTS.items()}

    def import_errors(self) -> list[dict[str, Any]]:
        """Every DAG file that cannot be parsed, with `filename` and `stack_trace`."""
        return self._pages("/importErrors", "import_errors")

    def dags(self) -> list[dict[str, Any]]:
        return self._pages("/dags", "dags")

    def pause(self, dag_id: str, *, paused: bool = True) -> None:
        self.request("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def trigger(
        self, dag_id: str, conf: Mapping[str, Any] | None = None, *, run_id: str | None = None
    ) -> str:
        """Start a run with these parameters; its run id."""
        body: dict[str, Any] = {"logical_date": None, "conf": dict(conf or {})}
        if run_id is not None:
            body["dag_run_id"] = run_id
        return str(self.request("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"])

    def dag_runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Every run, oldest first."""
        return self._pages(f"/dags/{dag_id}/dagRuns", "dag_runs", order_by="id")

    def dag_run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        return dict(self.request("GET", f"/dags/{dag_id}/dagRuns/{run_id}"))

    def wait_for_dag(self, dag_id: str, *, timeout: float = 120) -> None:
        """Return when the DAG has been parsed and can be triggered."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.request("GET", f"/dags/{dag_id}")
            except NotFoundError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def wait(self, dag_id: str, run_id: str, *, timeout: float = 600) -> str:
        """The run's final state, `success` or `failed`; raises `PlatformError` after `timeout`."""
        deadline = time.monotonic() + timeout
        while (state := self.dag_run(dag_id, run_id)["state"]) not in FINISHED:
            if time.monotonic() > deadline:
                raise PlatformError(
                    f"run {run_id} of {dag_id} is still {state} after {timeout:.0f} s: "
                    f"look at {self.url}/dags/{dag_id}/runs/{run_id}",
                    reason="TIMEOUT",
                )
            time.sleep(0.5)
        return str(state)

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Each with `task_id`, `map_index` (-1: not mapped), `state`, `try_number`, …"""
        return self._pages(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", "task_instances")

    def task_log(
        self, dag_id: str, run_id: str, task_id: str, *, attempt: int = 1, map_index: int = -1
    ) -> str:
        """The log of one attempt as lines of text, with the messages of its errors."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{attempt}"
        content = self.request("GET", path, params={"map_index": map_index})["content"]
        return "\n".join(_log_line(line) for line in content)

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """What a task returned or pushed under `key`."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        parameters = {"map_index": map_index, "deserialize": True}
        return self.request("GET", path, params=parameters)["value"]

    def results(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """What each task returned that ended well; mapped tasks, and None, are left out."""
        found = {}
        for task in self.task_instances(dag_id, run_id):
            if task["state"] == "success" and task["map_index"] < 0:
                with suppress(NotFoundError):
                    found[task["task_id"]] = self.xcom(dag_id, run_id, task["task_id"])
        return found

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """Make the pool unless it is there; one that somebody changed stays as it is."""
        try:
            self.request("GET", f"/pools/{name}")
        except NotFoundError:
            body = {"name": name, "slots": slots, "description": description}
            self.request("POST", "/pools", json=body)

    def _pages(self, path: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self.request(
                "GET", path, params=parameters | {"limit": _PAGE, "offset": len(found)}
            )
            found += page[key]
            if not page[key] or len(found) >= page["total_entries"]:
                return found

    def _send(self, method: str, path: str, tries: int = 1, **arguments: Any) -> httpx.Response:
        # What would happen twice is asked for once, and waited for as long.
        seconds = _SECONDS if method == "GET" else _SECONDS * _TRIES
        try:
            response = self._client.request(method, path, timeout=seconds, **arguments)
        except httpx.TransportError as error:
            # A server that is busy is asked again, one that is down is not.
            if tries > 1 and isinstance(error, httpx.ReadTimeout):
                return self._send(method, path, tries - 1, **arguments)
            raise ServiceUnavailableError(
                f"Airflow at {self.url} cannot be reached ({error})"
            ) from error
        if response.is_server_error:
            raise ServiceUnavailableError(
                f"Airflow at {self.url} answered {response.status_code} to {method} {path}"
            )
        return response


def _log_line(line: Any) -> str:
    """What a person reads of one structured line: the event, why it was skipped, what failed."""
    if not isinstance(line, dict):
        return str(line)
    errors = [f"{e.get('exc_type')}: {e.get('exc_value')}" for e in line.get("error_detail") or []]
    parts = [line.get("event"), line.get("reason"), *errors]
    return " ".join(str(part) for part in parts if part)


def _content(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json() if response.content else None
    what = f"{response.request.method} {response.request.url.path}"
    if response.status_code == httpx.codes.NOT_FOUND:
        raise NotFoundError(f"{what}: {_detail(response)}")
    raise PlatformError(
        f"Airflow refused {what} with {response.status_code}: {_detail(response)}",
        reason=f"HTTP_{response.status_code}",
    )


def _detail(response: httpx.Response) -> str:
    if response.headers.get("content-type", "").startswith("application/json"):
        return str(response.json().get("detail", response.text))
    return response.text
