"""The image of the predict service: what its installation asks pip for, with and without CUDA."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from embedded.config import REPOSITORY

LOCK = REPOSITORY / "docker" / "requirements-serving.txt"
DOCKERFILE = (REPOSITORY / "docker" / "serving.Dockerfile").read_text()
INDEX = "https://cpu.example.org/"
# Keeps what it was called with and the files that it was to read, and installs nothing.
PIP = """#!/bin/sh
echo "$@" >>"$LOG/calls"
number=$(wc -l <"$LOG/calls")
while [ $# -gt 0 ]; do
    case $1 in
        -r) cp "$2" "$LOG/$number.txt" ;;
        --report) cp "$LOG/report.json" "$2" ;;
    esac
    shift
done
exit "${EXIT:-0}"
"""


def install(folder: Path, **environment: str) -> tuple[list[str], list[str], str]:
    """(pip's calls, the requirements of each, what was printed) of the image's installation."""
    (folder / "pip").write_text(PIP)
    (folder / "pip").chmod(0o755)
    packages = [
        {
            "metadata": {"name": name},
            "download_info": {"archive_info": {"hashes": {"sha256": 64 * digit}}},
        }
        for name, digit in (("torch", "a"), ("torchvision", "b"))
    ]
    (folder / "report.json").write_text(json.dumps({"install": packages}))
    path = f"{folder}:{Path(sys.executable).parent}:{os.defpath}"
    result = subprocess.run(
        ["sh", REPOSITORY / "docker" / "install-serving.sh", LOCK],
        env={"PATH": path, "LOG": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    calls = (folder / "calls").read_text().splitlines()
    files = [file.read_text() for file in sorted(folder.glob("[0-9].txt"))]
    return calls, files, result.stdout


def packages(requirements: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", requirements, re.M))


def test_image_takes_all_of_the_lock_with_its_hashes(tmp_path: Path) -> None:
    calls, files, _ = install(tmp_path)
    assert files == [LOCK.read_text()]
    assert "--require-hashes" in calls[0]
    assert calls[-1] == "check"


def test_image_for_cpus_takes_all_but_cuda_with_its_hashes(tmp_path: Path) -> None:
    calls, files, printed = install(tmp_path, TORCH_CPU_INDEX=INDEX)
    left_out = packages(LOCK.read_text()) - packages(files[0])
    assert {"torch", "torchvision", "triton", "nvidia-cublas"} <= left_out
    assert not [name for name in packages(files[0]) if re.match("nvidia|cuda|torch", name)]
    assert not [name for name in left_out if not re.match("nvidia-|cuda-|torch|triton", name)]
    assert set(files[0].splitlines()) <= set(LOCK.read_text().splitlines())
    assert "--require-hashes" in calls[0]
    assert "--index-url" not in calls[0]

    locked = dict(re.findall(r"^(torch|torchvision)==(\S+)", LOCK.read_text(), re.M))
    assert files[1].split() == [f"{name}=={version}+cpu" for name, version in locked.items()]
    assert f"--no-deps --index-url {INDEX}" in calls[1]
    assert calls[-1] == "check"
    assert f"TORCH_SHA256={64 * 'a'}\nTORCHVISION_SHA256={64 * 'b'}\n" in printed


def test_image_for_cpus_checks_the_hashes_that_it_is_given(tmp_path: Path) -> None:
    hashes = {"TORCH_SHA256": "1" * 64, "TORCHVISION_SHA256": "2" * 64}
    _, files, _ = install(tmp_path, TORCH_CPU_INDEX=INDEX, **hashes)
    assert re.findall(r"--hash=sha256:(\S+)", files[1]) == ["1" * 64, "2" * 64]


def test_failed_installation_fails_the_build(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        install(tmp_path, EXIT="1")


def test_health_check_of_the_image_is_the_one_of_compose() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())
    command = compose["x-predict"]["healthcheck"]["test"]
    (image,) = re.findall(r"^ +CMD (\[.*\])$", DOCKERFILE, re.M)
    assert ["CMD", *json.loads(image)] == command


def test_image_declares_what_it_writes_to_and_listens_beyond_loopback() -> None:
    assert 'VOLUME ["/tmp", "/var/lib/gun-detection"]' in DOCKERFILE
    assert "GUN_DETECTION_SERVE_HOST=0.0.0.0" in DOCKERFILE
    assert DOCKERFILE.rstrip().endswith('CMD ["gun-detection", "serve"]')
