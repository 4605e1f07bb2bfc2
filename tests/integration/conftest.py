"""A whole platform, with a real Airflow, in a temporary folder and on free ports."""

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from embedded.airflow import Airflow
from embedded.config import Ports, load_platform, port_variable
from embedded.stack import Stack
from gun_detection.settings import Settings


@dataclass(frozen=True, slots=True)
class RunningPlatform:
    """`airflow` is signed in as admin; `environment` is what the tasks see."""

    stack: Stack
    airflow: Airflow
    settings: Settings
    environment: dict[str, str]


@pytest.fixture(scope="session")
def platform() -> Iterator[RunningPlatform]:
    """Started once (about half a minute); it ends with this process, even when it is killed."""
    with tempfile.TemporaryDirectory(prefix="gun-detection-platform-") as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PLATFORM_DIR", str(Path(folder) / "platform"))
            for name, port in asdict(Ports.free()).items():
                patch.setenv(port_variable(name), str(port))
            stack = Stack(load_platform())
        try:
            stack.up(nullcontext, attached=True)
            with stack.airflow() as airflow:
                yield RunningPlatform(stack, airflow, stack.settings, stack.environment)
        finally:
            stack.down()
            stack.purge()
