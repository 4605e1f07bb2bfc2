"""The client, and every example in the documentation, against a real service."""

import http.server
import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedded.config import REPOSITORY
from gun_detection.client import Client
from gun_detection.errors import (
    ImageError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.serving.answers import DISCLAIMER
from gun_detection.serving.keys import new_key
from tests.picture_files import saved, scene
from tests.serving.conftest import Running, free_port, serving

PICTURE = saved(scene(320, 200), "JPEG")
DOCUMENT = REPOSITORY / "docs" / "serving.md"


Guarded = tuple[Running, str]


@pytest.fixture(scope="module")
def guarded(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A service, and a key for it."""
    key, entry = new_key("client", ["predict"], None)
    with serving(
        tmp_path_factory.mktemp("guarded"),
        "--model",
        weights,
        GUN_DETECTION_SERVE_KEYS=str(entry),
        GUN_DETECTION_SERVE_RATE_LIMIT="off",
    ) as running:
        yield running, key


def test_what_the_client_gives(guarded: Guarded, tmp_path: Path) -> None:
    service, key = guarded
    file = tmp_path / "picture.jpg"
    file.write_bytes(PICTURE)
    with Client(service.url, api_key=key) as client:
        assert client.ready()
        prediction = client.predict(file)
        assert prediction.detections
        assert (prediction.review, prediction.disclaimer) == ("unreviewed", DISCLAIMER)
        assert client.predict(PICTURE).detections == prediction.detections
        assert client.predict(str(file), threshold=1).detections == []
        several = client.predict_batch([file, b"words"])
        assert several.images[0].prediction is not None
        assert several.images[0].prediction.detections == prediction.detections
        assert several.images[1].error is not None
        assert several.images[1].error.reason == "NOT_IMAGE"
        assert client.overlay(file).startswith(b"\x89PNG")
        assert client.model().model == prediction.model
        with pytest.raises(ImageError, match="not a picture") as caught:
            client.predict(b"words")
        assert caught.value.reason == "NOT_IMAGE"
        with pytest.raises(TerminalError, match="threshold") as wrong:
            client.predict(PICTURE, threshold=2)
        assert (wrong.type, wrong.value.reason) == (TerminalError, "PARAMETER")
        with pytest.raises(SettingsError):
            client.predict(PICTURE, store=True)
        with pytest.raises(FileNotFoundError):
            client.predict("/nowhere.jpg")
    with Client(service.url) as client, pytest.raises(SettingsError, match="API key"):
        client.predict(PICTURE)
    with Client(f"{service.url}/elsewhere", api_key=key) as client, pytest.raises(NotFoundError):
        client.model()


Answers = list[tuple[int, dict[str, str], bytes]]


@pytest.fixture
def scripted() -> Iterator[Callable[[Answers], str]]:
    """Servers that give these answers, one after the other; their addresses."""
    servers: list[http.server.HTTPServer] = []

    def start(answers: Answers) -> str:
        left = iter(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, body = next(left)
                if not status:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GOOD = json.dumps(
    {
        "detections": [],
        "threshold": 0.5,
        "model": "x",
        "engine": "eager",
        "width": 1,
        "height": 1,
        "timings_ms": dict.fromkeys(("decode", "wait_and_inference", "inference", "total"), 1),
    }
).encode()


def refused(reason: str, message: str = "no") -> bytes:
    return json.dumps({"error": {"reason": reason, "message": message}}).encode()


BUSY = refused("BUSY", "too much to do")
LIMITED = refused("RATE_LIMITED", "too many pictures")


def test_client_tries_again_where_that_helps(scripted: Callable[[Answers], str]) -> None:
    url = scripted([(503, {"Retry-After": "1"}, BUSY), (0, {}, b""), (200, {}, GOOD)])
    began = time.monotonic()
    with Client(url) as client:
        assert client.predict(PICTURE).model == "x"
    assert time.monotonic() - began >= 1, "it waits as long as it is asked to"


def test_client_waits_for_the_default_limit(
    scripted: Callable[[Answers], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = scripted([(429, {"Retry-After": "60"}, LIMITED), (200, {}, GOOD)])
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    with Client(url) as client:
        assert client.predict(PICTURE).model == "x"
    assert slept == [75]


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([(503, {"Retry-After": "0"}, BUSY)] * 3, ServiceUnavailableError, "too much to do"),
        ([(503, {"Retry-After": "3600"}, BUSY)], ServiceUnavailableError, "too much to do"),
        ([(502, {}, b"<html>")] * 3, ServiceUnavailableError, "answered 502"),
        ([(429, {}, b"<html>")] * 3, ServiceUnavailableError, "answered 429"),
        ([(429, {}, LIMITED)], TerminalError, "too many pictures"),
        ([(503, {}, refused("SETTINGS", "its operator"))], TerminalError, "its operator"),
        ([(500, {}, b"")], TerminalError, "answered 500"),
        ([(413, {}, refused("TOO_LARGE"))], ImageError, "no"),
        ([(413, {}, refused("TOO_MANY_PARTS"))], TerminalError, "no"),
        ([(415, {}, refused("NO_FORM"))], TerminalError, "no"),
        ([(422, {}, refused("CORRUPT"))], ImageError, "no"),
        ([(422, {}, refused("NO_FILE"))], TerminalError, "no"),
        ([(200, {}, b"<html>")], TerminalError, "is it the predict service"),
    ],
    ids=[
        "busy",
        "long pause",
        "proxy",
        "proxy's limit",
        "never room",
        "operator",
        "fault",
        "bytes",
        "parts",
        "form",
        "picture",
        "file",
        "other service",
    ],
)
def test_client_gives_up_with_a_reason(
    scripted: Callable[[Answers], str], answers: Answers, error: type[Exception], message: str
) -> None:
    with Client(scripted(answers), retries=2) as client, pytest.raises(error, match=message) as got:
        client.predict(PICTURE)
    assert got.type is error


def test_service_that_is_away_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retries=0) as client:
        assert not client.ready()
        with pytest.raises(ServiceUnavailableError, match=url):
            client.predict(PICTURE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


CURLS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("curl")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "picture.jpg").write_bytes(PICTURE)
    (tmp_path / "other.png").write_bytes(saved(scene(64, 64), "PNG"))
    return tmp_path


def test_documentation_has_examples() -> None:
    assert len(CURLS) >= 9
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", CURLS)
def test_curl_examples(guarded: Guarded, folder: Path, command: str) -> None:
    service, key = guarded
    run = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | {"URL": service.url, "KEY": key},
        capture_output=True,
        check=True,
    )
    if "boxes.png" in command:
        assert (folder / "boxes.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert json.loads(run.stdout)


def test_python_example(guarded: Guarded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, key = guarded
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"url": service.url, "key": key}
    exec(blocks("python")[0], names)
    assert names["drawn"].startswith(b"\x89PNG")
    assert len(names["several"].images) == 2
