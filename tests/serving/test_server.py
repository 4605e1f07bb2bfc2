"""How the service is set up: short names of settings, origins, what is refused at the start.

And what becomes of who does not read.
"""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Response
from PIL import Image

from gun_detection.errors import SettingsError
from gun_detection.serving import pictures as serving_pictures
from gun_detection.serving import protocol as serving_protocol
from gun_detection.serving import server as serving_server
from gun_detection.serving.app import create_app
from gun_detection.serving.server import take_short_names
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.serving.conftest import OPEN, PROGRAM, Running, serving_here

PICTURE = saved(scene(320, 200), "JPEG")


def test_short_names_stand_for_settings_that_are_not_set() -> None:
    environment = {
        "MODEL_PATH": "a.pth",
        "CONFIDENCE_THRESHOLD": "0.6",
        "GUN_DETECTION_SERVE_THRESHOLD": "0.7",
        "WORKERS": "",
        "LOG_LEVEL": "info",
        "MAX_IMAGE_SIZE": "20kB",
        "GUN_DETECTION_SERVE_MAX_BYTES": "",
    }
    take_short_names(environment)
    assert environment["GUN_DETECTION_SERVE_MODEL"] == "a.pth"
    assert environment["GUN_DETECTION_SERVE_THRESHOLD"] == "0.7"
    assert "GUN_DETECTION_SERVE_WORKERS" not in environment
    assert environment["GUN_DETECTION_LOG_LEVEL"] == "INFO"
    # Empty is not set.
    assert environment["GUN_DETECTION_SERVE_MAX_BYTES"] == "20kB"


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
        ({"GUN_DETECTION_SERVE_RATE_LIMIT": "10/minute;200/day"}, "write one limit"),
        ({"GUN_DETECTION_SERVE_KEYS": "nonsense"}, "not name:scopes:end:sha256"),
        (
            {"GUN_DETECTION_SERVE_STORE": "asked", "GUN_DETECTION_SOURCES_FILE": "/nowhere.yaml"},
            "GUN_DETECTION_SOURCES_FILE /nowhere.yaml cannot be read",
        ),
        ({"CONFIDENCE_THRESHOLD": "2"}, "GUN_DETECTION_SERVE_THRESHOLD"),
        ({"CONFIDENCE_THRESHOLD": "0.01"}, "GUN_DETECTION_SERVE_THRESHOLD (0.01) is below"),
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


def test_service_whose_processes_cannot_start_does_not_end_as_if_all_were_well() -> None:
    program = (
        "import uvicorn\n"
        "from gun_detection.serving.server import _serve_in_processes\n"
        "config = uvicorn.Config('nowhere:application', port=0, workers=2)\n"
        "print(_serve_in_processes(config))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.stdout == "False\n"
    assert "Could not import module" in run.stderr


def check_scored(folder: Path, source: str) -> None:
    file = folder / "sources.yaml"
    file.write_text(f"buckets:\n  - {{{source}}}\n")
    serving_server._check_scored(Settings(sources_file=file, serve_store="asked"))


@pytest.mark.parametrize(
    "source",
    [
        "bucket: others",
        "bucket: uploads, prefix: cameras/",
        "bucket: uploads, include: ['*.jpg', '*.png', '*.webp', '*.bmp']",
        "bucket: uploads, include: ['*.jpeg', '*.png', '*.webp']",
        "bucket: uploads, exclude: ['predict/*']",
        "bucket: uploads, partitions: '%Y/%m/%d/'",
    ],
)
def test_pictures_are_not_stored_where_no_run_looks(tmp_path: Path, source: str) -> None:
    with pytest.raises(SettingsError, match="would not be scored"):
        check_scored(tmp_path, source)


@pytest.mark.parametrize(
    "source",
    [
        "bucket: uploads",
        "bucket: uploads, include: ['*.jp*', '*.png', '*.webp', '*.bmp']",
        "bucket: uploads, prefix: predict/, partitions: '%Y/%m/%d/'",
    ],
)
def test_pictures_are_stored_where_runs_look(tmp_path: Path, source: str) -> None:
    check_scored(tmp_path, source)
    serving_server._check_scored(Settings(serve_store="asked"))


@pytest.fixture(params=["asyncio", "uvloop"])
def answering(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> "Iterator[tuple[uvicorn.Server, int]]":
    """A server of long answers with small buffers, and its port."""
    monkeypatch.setattr(serving_protocol, "_ANSWER_SECONDS", 1.0)
    app = FastAPI()

    @app.get("/{size}")
    async def answer(size: int) -> Response:
        return Response(bytes(size))

    with serving_here(app, request.param) as found:
        yield found


def ask(port: int, size: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET /{size} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


# The second fits into what uvicorn itself would leave waiting.
@pytest.mark.parametrize("size", [20_000_000, 40_000])
def test_who_does_not_read_is_cut_off(answering: "tuple[uvicorn.Server, int]", size: int) -> None:
    server, port = answering
    with ask(port, size):
        deadline = time.monotonic() + 60
        for expected in (1, 0):
            while len(server.server_state.connections) != expected:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert httpx.get(f"http://127.0.0.1:{port}/1").content == bytes(1)


def test_who_reads_next_to_nothing_is_cut_off(answering: "tuple[uvicorn.Server, int]") -> None:
    server, port = answering
    with ask(port, 20_000_000) as connection:
        assert connection.recv(65536)
        deadline = time.monotonic() + 30
        while server.server_state.connections:
            assert time.monotonic() < deadline
            # A few kilobytes, which is what its buffer has room for.
            time.sleep(0.7)
            connection.recv(65536)


def test_what_clients_leave_in_the_memory_is_bounded(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_pictures, "_MOST_UNSENT", 100_000)
    settings = Settings(serve_model=str(weights), serve_anonymous=True, serve_rate_limit="off")
    noise = np.random.default_rng(1).integers(0, 256, (600, 800, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    request = httpx.Request(
        "POST", "http://x/predict/", files={"file": file.getvalue()}, headers={"Host": "x"}
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with serving_here(create_app(settings)) as (_, port):

        def post(kind: str) -> httpx.Response:
            url = f"http://127.0.0.1:{port}/predict/?format={kind}"
            return httpx.post(url, files={"file": PICTURE}, timeout=60)

        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(f"POST /predict/ HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            deadline = time.monotonic() + 60
            while (refused := post("png")).is_success:
                assert time.monotonic() < deadline
            assert (refused.status_code, refused.json()["error"]["reason"]) == (503, "BUSY")
            assert post("json").is_success
        while not post("png").is_success:
            assert time.monotonic() < deadline


def test_who_reads_slowly_gets_everything(answering: "tuple[uvicorn.Server, int]") -> None:
    _, port = answering
    size, found = 240_000, b""
    with ask(port, size) as connection:
        began = time.monotonic()
        while len(found.partition(b"\r\n\r\n")[2]) < size:
            piece = connection.recv(4096)
            assert piece, len(found)
            found += piece
            time.sleep(0.05)
    assert time.monotonic() - began > 2
