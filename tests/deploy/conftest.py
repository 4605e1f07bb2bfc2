"""The files for deploying the predict service."""

from pathlib import Path

import pytest

from embedded.config import REPOSITORY


@pytest.fixture(scope="session")
def deploy() -> Path:
    return REPOSITORY / "deploy"
