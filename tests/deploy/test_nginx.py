"""The nginx example, run here with a certificate of its own in front of a small server."""

import http.client
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from embedded.config import Ports
from gun_detection.settings import Settings

NAME = "predict.example.org"
# What surrounds the example in /etc/nginx/nginx.conf, for one that is not root.
AROUND = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/other;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/gun-detection.conf;
}}
"""


@dataclass
class Upstream:
    """A server that keeps what reaches it."""

    port: int = 0
    requests: list[tuple[str, dict[str, str], int]] = field(default_factory=list)

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.requests.append((self.path, headers, len(body)))
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        found.port = server.server_port
        yield found
        server.shutdown()
        thread.join()


@dataclass
class Nginx:
    port: int
    plain_port: int
    tls: ssl.SSLContext

    def connect(self) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.tls)
        connection.timeout = 60
        return connection

    def status(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        connection = self.connect()
        try:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, fields)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def nginx(deploy: Path, upstream: Upstream) -> Iterator[Nginx]:
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed: its example is not checked")
    # Short, and open to the account that the process runs under.
    with tempfile.TemporaryDirectory(prefix="gun-detection-nginx-") as name:
        folder = Path(name)
        make_certificate(folder)
        # Below those that others may take for their connections meanwhile.
        free = Ports.free()
        port, plain_port = free.airflow, free.predict
        example = (deploy / "nginx" / "gun-detection.conf").read_text()
        # Every change is one that the example's comments ask for, or makes the test faster.
        for before, after in (
            (r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
            (r"listen 80;", f"listen 127.0.0.1:{plain_port};"),
            (r"listen \[::\]:\d+( ssl)?;", ""),
            (r"server 127\.0\.0\.1:8000;", f"server 127.0.0.1:{upstream.port};"),
            (r"/etc/ssl/certs/\S+\.pem", f"{folder}/cert.pem"),
            (r"/etc/ssl/private/\S+\.key", f"{folder}/key.pem"),
            (r"/run/gun-detection-nginx", f"{folder}/bodies"),
            (r"client_body_timeout 10s;", "client_body_timeout 5s;"),
            (r"client_header_timeout 10s;", "client_header_timeout 5s;"),
        ):
            example, count = re.subn(before, after, example)
            assert count, f"the example has no {before}"
        (folder / "gun-detection.conf").write_text(example)
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
        command = [program, "-p", name, "-c", f"{name}/nginx.conf", "-e", f"{name}/error.log"]
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for path in (folder, *folder.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, **account)
        log = (folder / "error.log").read_text() if (folder / "error.log").exists() else ""
        assert checked.returncode == 0, checked.stderr + log
        assert "[warn]" not in checked.stderr + log
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **account)
        try:
            wait_for_port(port)
            tls = ssl.create_default_context(cafile=str(folder / "cert.pem"))
            yield Nginx(port, plain_port, tls)
        finally:
            process.terminate()
            process.wait()


def make_certificate(folder: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = f"-subj /CN={NAME} -addext subjectAltName=DNS:{NAME},IP:127.0.0.1"
    files = f"-keyout {folder}/key.pem -out {folder}/cert.pem"
    arguments = f"{command} {names} {files}".split()
    subprocess.run(arguments, capture_output=True, check=True)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "nginx did not start"
            time.sleep(0.05)


def test_picture_arrives_whole(nginx: Nginx, upstream: Upstream) -> None:
    # Ten million bytes are what the service takes; a form has a little around them.
    for path in ("/predict/", "/predict"):
        assert nginx.status("POST", path, bytes(10 * 2**20 + 2**16)) == 200
    assert nginx.status("POST", "/predict/batch", bytes(30 * 2**20)) == 200
    assert [(path, size) for path, _, size in upstream.requests] == [
        ("/predict/", 10 * 2**20 + 2**16),
        ("/predict", 10 * 2**20 + 2**16),
        ("/predict/batch", 30 * 2**20),
    ]


def test_limits_fit_those_of_the_service(deploy: Path) -> None:
    text = (deploy / "nginx" / "gun-detection.conf").read_text()
    sizes = dict(re.findall(r"location = (\S+) \{\s+client_max_body_size (\d+)m;", text))
    settings = Settings.model_fields
    picture = settings["serve_max_bytes"].default
    batch = picture * settings["serve_batch_images"].default
    # At least what the service takes with 64 KiB for the form, and at most 1 MiB more.
    for path, expected in (
        ("/predict/", picture),
        ("/predict", picture),
        ("/predict/batch", batch),
    ):
        assert expected + 2**16 <= int(sizes[path]) * 2**20 <= expected + 2**20, path
    (waited,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(waited) > settings["serve_timeout"].default


@pytest.mark.parametrize(
    ("path", "size"),
    [("/predict/", 11 * 2**20 + 1), ("/predict/batch", 161 * 2**20 + 1), ("/", 2**16 + 1)],
)
def test_body_beyond_the_limit_is_refused_before_it_is_sent(
    nginx: Nginx, upstream: Upstream, path: str, size: int
) -> None:
    connection = nginx.connect()
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert upstream.requests == []


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nHost: ",
        b"POST /predict/ HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab",
    ],
    ids=["headers", "body"],
)
def test_request_that_stops_coming_is_cut_off(
    nginx: Nginx, upstream: Upstream, beginning: bytes
) -> None:
    plain = socket.create_connection(("127.0.0.1", nginx.port), timeout=60)
    with nginx.tls.wrap_socket(plain, server_hostname=NAME) as connection:
        connection.sendall(beginning)
        # Raises a timeout where nginx goes on waiting.
        try:
            answer = connection.recv(4096)
        except (ConnectionResetError, ssl.SSLEOFError):
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert upstream.requests == []


def test_client_cannot_claim_another_address(nginx: Nginx, upstream: Upstream) -> None:
    claimed = {"X_Forwarded_For": "192.0.2.1", "Forwarded": "for=192.0.2.1"}
    claimed |= {"X_Real_IP": "192.0.2.1", "X_Forwarded_Proto": "http"}
    assert nginx.status("GET", "/model", **claimed) == 200
    (_, headers, _) = upstream.requests[0]
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert not {"forwarded", "x-real-ip"} & set(headers)


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/a/../metrics", "/metrics?a=1"]
)
def test_metrics_are_not_there(nginx: Nginx, upstream: Upstream, path: str) -> None:
    assert nginx.status("GET", path) == 404
    assert upstream.requests == []


def test_client_with_too_many_requests_is_slowed_down(nginx: Nginx, upstream: Upstream) -> None:
    answers: list[int] = []
    # By one connection, which is much quicker than the five a second that are allowed.
    connection = nginx.connect()
    while 429 not in answers and len(answers) < 400:
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
        answers.append(answer.status)
    connection.close()
    assert answers[:20] == [200] * 20
    assert set(answers) == {200, 429}
    assert len(upstream.requests) == answers.count(200)


def test_client_with_too_many_connections_is_refused(nginx: Nginx) -> None:
    waiting = [nginx.connect() for _ in range(10)]
    for connection in waiting:
        connection.putrequest("POST", "/predict/")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(bytes(10))
    # With those below fewer requests than the limit on requests.
    answers = []
    while 429 not in answers and len(answers) < 8:
        answers.append(nginx.status("GET", "/"))
        time.sleep(0.02)
    for connection in waiting:
        connection.close()
    assert answers[-1] == 429


def test_without_tls_there_is_only_the_way_to_it(nginx: Nginx, upstream: Upstream) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", nginx.plain_port, timeout=60)
    connection.request("GET", "/model?a=1", headers={"Host": "elsewhere.example.org"})
    answer = connection.getresponse()
    assert answer.status == 301
    assert answer.headers["Location"] == f"https://{NAME}/model?a=1"
    connection.close()
    assert upstream.requests == []
