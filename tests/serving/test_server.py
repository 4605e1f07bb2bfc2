"""How the service is set up: short names of settings, origins, what is refused at the start."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gun_detection.serving.server import take_short_names
from tests.picture_files import saved, scene
from tests.serving.conftest import OPEN, PROGRAM, Running

PICTURE = saved(scene(320, 200), "JPEG")


def test_short_names_stand_for_settings_that_are_not_set() -> None:
    environment = {
        "MODEL_PATH": "a.pth",
        "CONFIDENCE_THRESHOLD": "0.6",
        "GUN_DETECTION_SERVE_THRESHOLD": "0.7",
        "WORKERS": "",
    }
    take_short_names(environment)
    assert environment["GUN_DETECTION_SERVE_MODEL"] == "a.pth"
    assert environment["GUN_DETECTION_SERVE_THRESHOLD"] == "0.7"
    assert "GUN_DETECTION_SERVE_WORKERS" not in environment


def test_service_by_its_short_names(start: Callable[..., Running], weights: Path) -> None:
    service = start(
        MODEL_PATH=str(weights),
        CONFIDENCE_THRESHOLD="0.9",
        MAX_IMAGE_SIZE="20kB",
        LOG_LEVEL="WARNING",
        WORKERS="1",
        GUN_DETECTION_SERVE_CORS_ORIGINS="https://one.example, https://two.example",
        **OPEN,
    )
    assert httpx.get(f"{service.url}/model").json()["threshold"] == 0.9
    url = f"{service.url}/predict/?format=json"
    assert httpx.post(url, files={"file": PICTURE}).json()["threshold"] == 0.9
    answer = httpx.post(url, files={"file": bytes(20_001)})
    assert (answer.status_code, answer.json()["error"]["reason"]) == (413, "TOO_LARGE")
    assert "INFO gun_detection" not in service.log

    def allowed(origin: str) -> str | None:
        return httpx.get(service.url, headers={"Origin": origin}).headers.get(
            "access-control-allow-origin"
        )

    assert allowed("https://two.example") == "https://two.example"
    assert allowed("https://other.example") is None


def test_stopped_service_leaves_no_folder_behind(
    start: Callable[..., Running], weights: Path, tmp_path: Path
) -> None:
    service = start("--model", weights, **OPEN)
    # Below its home, where nothing is deleted for its age.
    [folder] = (tmp_path / "home").glob("*/serve-*")
    assert (folder / "rate-limit.sqlite").exists()
    assert service.stop() == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GUN_DETECTION_SERVE_RATE_LIMIT": "many"}, "GUN_DETECTION_SERVE_RATE_LIMIT"),
        ({"GUN_DETECTION_SERVE_KEYS": "nonsense"}, "not name:scopes:end:sha256"),
        ({"CONFIDENCE_THRESHOLD": "2"}, "GUN_DETECTION_SERVE_THRESHOLD"),
        ({"MAX_IMAGE_SIZE": "10"}, "GUN_DETECTION_SERVE_MAX_BYTES"),
        ({"MODEL_PATH": "/nowhere.pth"}, "there is no weights file /nowhere.pth"),
        ({"MODEL_PATH": __file__ + ".pth"}, "there is no weights file"),
        ({}, "GUN_DETECTION_DATABASE_URL is missing"),
    ],
)
def test_what_can_never_serve_is_refused_at_the_start(
    environment: dict[str, str], message: str
) -> None:
    run = subprocess.run(
        [PROGRAM, "serve", "--port", "0"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode in (1, 2)
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_damaged_weights_are_refused_at_the_start(tmp_path: Path, weights: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-1000])
    run = subprocess.run(
        [PROGRAM, "serve", "--model", damaged], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "damaged.safetensors" in run.stderr
    assert "Traceback" not in run.stderr
