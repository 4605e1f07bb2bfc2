"""A copy of the Compose project with generated secrets, and what the tool makes of it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedded.config import REPOSITORY

Compose = Callable[..., "subprocess.CompletedProcess[str]"]
PROFILES = "gpu,serving,serving-gpu"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's Compose files with a generated .env."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("docker-compose.yaml", ".env.example"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "docker", folder / "docker")
    subprocess.run(["sh", folder / "docker" / "generate-env.sh"], check=True)
    return folder


def run_compose(
    project: Path, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed: the Compose file is not checked")
    return subprocess.run(
        [program, "--file", "docker-compose.yaml", *arguments],
        cwd=project,
        env={"PATH": os.environ["PATH"], "HOME": str(project)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def compose() -> Compose:
    """Runs docker-compose in a project folder with only the given environment."""
    return run_compose


@pytest.fixture(scope="session")
def configuration(project: Path) -> dict[str, Any]:
    """The Compose file as the tool understands it, with every profile on."""
    result = run_compose(project, "config", COMPOSE_PROFILES=PROFILES)
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = yaml.safe_load(result.stdout)
    return parsed


@pytest.fixture(scope="session")
def services(configuration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = configuration["services"]
    return found
