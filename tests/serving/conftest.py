"""The predict service as users run it: its own process, on a free port of loopback."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from gun_detection.detector.weights import serialize
from gun_detection.serving.protocol import Protocol
from tests.conftest import random_model

PROGRAM = Path(sys.executable).with_name("gun-detection")
# A random model's scores are low: all of them count.
THRESHOLD = 0.05
OPEN = {"GUN_DETECTION_SERVE_ANONYMOUS": "true", "GUN_DETECTION_SERVE_RATE_LIMIT": "off"}


@dataclass(frozen=True)
class Running:
    """A service that answers at `url`; `log` is what it wrote so far."""

    url: str
    port: int
    process: "subprocess.Popen[bytes]"
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait(self, path: str = "/ready", seconds: float = 180) -> None:
        """Until this address answers with success."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            try:
                if httpx.get(self.url + path).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    folder: Path, *arguments: object, ready: str = "/ready", **environment: str
) -> Iterator[Running]:
    """A running service with these settings on top of the test's own."""
    port = free_port()
    log = folder / f"serve-{port}.log"
    home = {"GUN_DETECTION_HOME": str(folder / "home")}
    with log.open("wb") as output:
        process = _start([*arguments, "--port", port], home | environment, output)
    running = Running(f"http://127.0.0.1:{port}", port, process, log)
    try:
        running.wait(ready)
        yield running
        assert process.poll() is not None or running.stop() == 0, running.log
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in running.log, running.log


def _start(
    arguments: list[object], environment: dict[str, str], output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [PROGRAM, "serve", *map(str, arguments)],
        env=os.environ | environment,
        stdout=output,
        stderr=output,
    )


@contextmanager
def serving_here(app: FastAPI, loop: str = "asyncio") -> Iterator[tuple[uvicorn.Server, int]]:
    """The server of an app in a thread of this process, where it can be changed; and its port.

    What the kernel takes of an answer before its client does is little.
    """
    config = uvicorn.Config(
        app, http=Protocol, ws="none", loop=loop, log_config=None, timeout_keep_alive=1,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield server, listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a small random detector, and its threshold beside it."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    new = random_model(1)
    data, sha256 = serialize(new.model, new.detector)
    path.write_bytes(data)
    record = {"weights_sha256": sha256, "threshold": THRESHOLD}
    path.with_name("model.json").write_text(json.dumps(record))
    assert hashlib.sha256(data).hexdigest() == sha256
    return path


@pytest.fixture(scope="session")
def service(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service of one file that answers anybody."""
    with serving(tmp_path_factory.mktemp("service"), "--model", weights, **OPEN) as running:
        yield running


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts services that end with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda *arguments, **named: stack.enter_context(
            serving(tmp_path, *arguments, **named)
        )
