"""Whether each service does its work, beyond being alive."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from embedded import postgres, seaweedfs
from embedded.airflow import COMPONENTS, LOG_SERVER, Airflow
from embedded.config import HOST, Platform
from embedded.postgres import PostgresServer
from embedded.seaweedfs import SeaweedServer
from embedded.supervision import ProcessState


@dataclass(frozen=True, slots=True)
class Health:
    """One row of the status table; `uptime` in seconds."""

    name: str
    state: str
    pid: int
    uptime: float
    address: str
    healthy: bool


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of one platform."""

    platform: Platform
    postgres: PostgresServer
    seaweedfs: SeaweedServer

    def addresses(self) -> dict[str, str]:
        """Where each service that others use is reached."""
        return {
            "postgres": f"{HOST}:{self.platform.ports.postgres}",
            "seaweedfs": self.platform.s3_url,
            "api-server": self.platform.airflow_url,
            "tensorboard": self.platform.tensorboard_url,
            "predict": self.platform.predict_url,
            LOG_SERVER: f"http://{HOST}:{self.platform.ports.airflow_logs}",
        }

    def healthy(self, states: Mapping[str, ProcessState]) -> dict[str, bool]:
        """By service; a service that does not run is not healthy, whoever answers in its place."""

        def running(name: str) -> bool:
            return name in states and states[name].state == "RUNNING"

        addresses = self.addresses()
        report = self._airflow_report() if running("api-server") else {}
        healthy = {
            "postgres": running("postgres") and postgres.answers(self.postgres),
            "seaweedfs": running("seaweedfs") and seaweedfs.answers(self.seaweedfs),
        }
        for name in ("tensorboard", "predict", LOG_SERVER):
            healthy[name] = running(name) and web_server_answers(addresses[name])
        for name in COMPONENTS:
            healthy[name] = (
                running(name)
                and name in report
                and heartbeat_after(report[name], states[name].started)
            )
        return healthy

    def _airflow_report(self) -> dict[str, dict[str, Any]]:
        password = self.platform.credentials.passwords["admin"]
        with Airflow(self.platform.airflow_url, "admin", password) as client:
            return client.health()


def web_server_answers(url: str) -> bool:
    """Whether a web server is there, even if it has nothing at this address."""
    try:
        return not httpx.get(url, timeout=5, trust_env=False).is_server_error
    except httpx.TransportError:
        return False


def heartbeat_after(component: Mapping[str, Any], moment: float) -> bool:
    """Whether a component is healthy by a heartbeat of its present process, not of the last."""
    if component.get("status") != "healthy":
        return False
    beats = [v for k, v in component.items() if k.startswith("latest_") and v is not None]
    return all(datetime.fromisoformat(beat).timestamp() >= moment for beat in beats)
