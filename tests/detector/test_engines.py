import subprocess
import sys
from pathlib import Path

import pytest

from gun_detection.detector.engines import cores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", None),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("9900000 100000\n", None),
    ],
)
def test_cores_within_the_limit_of_a_container(
    text: str, expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    everything = cores(tmp_path / "missing")
    assert cores(tmp_path / "cpu.max") == (expected or everything)


def test_scoring_loads_no_pytorch_but_for_its_engine() -> None:
    """It takes seconds, which tests and whatever only looks at outcomes need not wait for."""
    looked = "import sys, gun_detection.scoring.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", looked], check=False).returncode == 0
