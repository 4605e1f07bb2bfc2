"""The unit of the predict service, read as systemd reads it."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from embedded.stack import UNPRIVILEGED_DATA

UNIT = "gun-detection-serve.service"


def analyze(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: the unit is not checked")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_unit_is_understood(deploy: Path, tmp_path: Path) -> None:
    text = (deploy / "systemd" / UNIT).read_text()
    # Where the service is not installed, its program is not there.
    copy = tmp_path / UNIT
    copy.write_text(text.replace("/opt/gun-detection/bin/gun-detection", "/bin/true"))
    result = analyze("verify", "--man=no", copy)
    assert (result.returncode, result.stderr) == (0, "")


def test_unit_leaves_little_to_a_break_in(deploy: Path) -> None:
    # systemd's own measure, times ten: 96 is a service without any of it.
    result = analyze("security", "--offline=yes", "--threshold=20", deploy / "systemd" / UNIT)
    assert result.returncode == 0, result.stdout + result.stderr


def service_of(deploy: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(deploy / "systemd" / UNIT)
    return parser["Service"]


def test_stopping_lets_requests_under_way_be_finished(deploy: Path) -> None:
    service = service_of(deploy)
    # Otherwise the processes that decode their pictures would be ended at the same time.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"].removesuffix("s")) > 30
    assert service["ExecStart"].split()[1:] == ["serve"]
    assert Path(service["ExecStart"].split()[0]).is_absolute()
    # Secrets come from the file, which only root can read, and not from the unit.
    assert service["EnvironmentFile"] == "/etc/gun-detection/serve.env"
    assert "SERVE_KEYS" not in (deploy / "systemd" / UNIT).read_text()


def test_state_is_not_where_a_platform_keeps_its_own(deploy: Path) -> None:
    service = service_of(deploy)
    home = Path("/var/lib") / service["StateDirectory"]
    # systemd gives all that is in it to the user of the service.
    assert home not in (UNPRIVILEGED_DATA, *UNPRIVILEGED_DATA.parents)
    assert service["WorkingDirectory"] == str(home)
    text = (deploy / "systemd" / UNIT).read_text()
    assert f"Environment=GUN_DETECTION_HOME={home}\n" in text
    assert f"--home-dir {home} " in text
