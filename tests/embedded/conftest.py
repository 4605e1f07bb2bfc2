import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded.config import load_platform
from embedded.stack import Stack


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`PLATFORM_DIR`, not made yet; its path is short enough for the sockets to lie inside."""
    with tempfile.TemporaryDirectory(prefix="gd-") as name:
        folder = Path(name) / "platform"
        monkeypatch.setenv("PLATFORM_DIR", str(folder))
        yield folder


@pytest.fixture
def purged(directory: Path) -> Iterator[Path]:
    """The same, for a test that starts the platform: what lies elsewhere is deleted as well."""
    yield directory
    Stack(load_platform()).purge()
