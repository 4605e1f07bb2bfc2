"""The real `kaggle` package against a local server that speaks Kaggle's protocol.

The package's local environment is `http://localhost`, a fixed port; as a proxy for it the server
gets those requests on any port.
"""

import base64
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gun_detection.datasets import kaggle
from gun_detection.datasets.sources import open_source
from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage

BASIC = "Basic " + base64.b64encode(b"someone:secret").decode()


class KaggleHandler(BaseHTTPRequestHandler):
    """Metadata and download calls, the latter redirected to where the archive lies."""

    archive = b""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = urlsplit(self.path).path.rsplit("/", 1)[1]
        if self.headers["Authorization"] not in (BASIC, "Bearer token-1"):
            self._json(401, {"code": 401, "message": "Unauthorized"})
        elif call == "IntrospectToken":
            self._json(200, {"active": body["token"] == "token-1", "username": "someone"})
        elif body.get("datasetSlug") == "missing":
            self._json(404, {"code": 404, "message": "Not Found"})
        elif body.get("datasetSlug") == "locked":
            self._json(403, {"code": 403, "message": "Permission denied"})
        elif body.get("datasetSlug") == "broken":
            self._json(500, {"code": 500, "message": "out of order"})
        elif call == "GetDatasetMetadata":
            self._json(200, {"info": {"licenses": [{"name": "GPL-3.0"}]}})
        else:
            self.send_response(302)
            self.send_header("Location", "http://localhost/storage/archive.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(self.archive)))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(self.archive)

    def _json(self, status: int, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder and no credentials."""
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "XDG_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def server(
    home: Path, tmp_path: Path, make_folder: object, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), KaggleHandler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{running.server_port}")
        for name in ("NO_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        # The S3 server of the tests is asked directly.
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(make_folder: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_folder("guns", 6)  # type: ignore[operator]
    path = Path(shutil.make_archive(str(tmp_path / "upstream"), "zip", root))
    monkeypatch.setattr(KaggleHandler, "archive", path.read_bytes())
    return path


def key_in_environment(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("KAGGLE_USERNAME", "someone")
    patch.setenv("KAGGLE_KEY", "secret")


def key_in_file(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / ".kaggle").mkdir()
    file = home / ".kaggle" / "kaggle.json"
    file.write_text('{"username": "someone", "key": "secret"}')
    file.chmod(0o600)


def token_in_environment(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("KAGGLE_API_TOKEN", "token-1")


@pytest.mark.parametrize("sign_in", [key_in_environment, key_in_file, token_in_environment])
def test_download(
    server: ThreadingHTTPServer,
    archive: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sign_in: object,
) -> None:
    sign_in(home, monkeypatch)  # type: ignore[operator]
    before = sorted(home.rglob("*"))
    target = tmp_path / "target"
    target.mkdir()
    path = kaggle.download("owner/guns-2", target)
    assert path.parent == target
    assert path.read_bytes() == archive.read_bytes()
    assert zipfile.is_zipfile(path)
    assert sorted(home.rglob("*")) == before


def test_source(
    server: ThreadingHTTPServer,
    archive: Path,
    home: Path,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key_in_environment(home, monkeypatch)
    with open_source("kaggle", settings, storage) as source:
        assert source.name == "kaggle:issaisasank/guns-object-detection"
        assert [sample.name for sample in source] == [f"Images/{n}.jpeg" for n in range(1, 7)]


@pytest.mark.parametrize(
    ("dataset", "key", "kind", "text"),
    [
        ("owner/missing", "secret", NotFoundError, "owner/missing"),
        ("owner/locked", "secret", SettingsError, "KAGGLE_KEY"),
        ("owner/guns", "wrong", SettingsError, "KAGGLE_KEY"),
        ("owner/broken", "secret", ServiceUnavailableError, "owner/broken"),
    ],
)
def test_refusals(
    server: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    key: str,
    kind: type[GunDetectionError],
    text: str,
) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", key)
    with pytest.raises(kind, match=text) as caught:
        kaggle.download(dataset, tmp_path)
    assert "secret" not in caught.value.message


def test_server_that_is_not_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_in_environment(home, monkeypatch)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(ServiceUnavailableError, match="did not deliver"):
        kaggle.download("owner/guns", tmp_path)


def test_without_credentials(home: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="KAGGLE_USERNAME") as caught:
        kaggle.download("owner/guns", tmp_path)
    assert caught.value.reason == "KAGGLE_CREDENTIALS"


@pytest.mark.parametrize("dataset", ["guns", "a/b/c", "../x", "-p/evil", "a/b c", ""])
def test_names_that_are_none(home: Path, tmp_path: Path, dataset: str) -> None:
    with pytest.raises(SettingsError, match="owner/name"):
        kaggle.download(dataset, tmp_path)
