import hashlib
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage, parse_s3_uri
from tests.faults.proxy import Answer, Proxy


@contextmanager
def proxy_of_nothing(
    settings: Settings, status: int, page: bytes, *, head: int | None = None
) -> Iterator[Settings]:
    """Settings of a server that answers with its own page, as a proxy whose server is away.

    `head` is its status where it is another one to HEAD.
    """

    class Handler(BaseHTTPRequestHandler):
        # With it the body of a file is sent at once.
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(head or status if self.command == "HEAD" else status)
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page)

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield settings.model_copy(update={"s3_endpoint_url": url})
        server.shutdown()


def test_exactly_one_of_many_conditional_puts_wins(settings: Settings, storage: Storage) -> None:
    def put(number: int) -> bool:
        return storage.put_if_absent(settings.data_bucket, "model", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(16)))
    assert won.count(True) == 1
    assert storage.get(settings.data_bucket, "model") == b"%d" % won.index(True)


def test_a_listing_goes_on_over_pages_and_keeps_odd_keys(
    settings: Settings, storage: Storage
) -> None:
    odd = {"p/ü ñ.jpg", "p/a&b=c.jpg", "p/'quoted' \"twice\".jpg", "p/<script>.jpg"}
    keys = odd | {f"p/{number:05d}" for number in range(1005)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: storage.put(settings.data_bucket, key, b"x"), keys))
    storage.put(settings.data_bucket, "other", b"x")
    assert {item.key for item in storage.list_objects(settings.data_bucket, "p/")} == keys


def test_an_overwritten_object_is_not_read_as_the_listed_one(
    settings: Settings, storage: Storage
) -> None:
    storage.put(settings.data_bucket, "key", b"old")
    [listed] = storage.list_objects(settings.data_bucket)
    assert storage.get(settings.data_bucket, "key", etag=listed.etag) == b"old"
    storage.put(settings.data_bucket, "key", b"new")
    with pytest.raises(ServiceUnavailableError) as caught:
        storage.get(settings.data_bucket, "key", etag=listed.etag)
    assert caught.value.reason == "OBJECT_CHANGED"


def test_a_large_object_is_refused_before_it_is_read(settings: Settings, storage: Storage) -> None:
    storage.put(settings.data_bucket, "big", b"x" * 1000)
    with pytest.raises(TerminalError) as caught:
        storage.get(settings.data_bucket, "big", max_bytes=999)
    assert caught.value.reason == "TOO_LARGE"


def test_a_download_with_other_bytes_leaves_nothing(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    storage.put(settings.data_bucket, "weights", b"good")
    good, bad = (hashlib.sha256(content).hexdigest() for content in (b"good", b"bad"))
    with pytest.raises(TerminalError) as caught:
        storage.download(settings.data_bucket, "weights", tmp_path / "file", sha256=bad)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert not list(tmp_path.glob("file*")) + list(tmp_path.glob(".download*"))
    storage.download(settings.data_bucket, "weights", tmp_path / "file", sha256=good)
    assert (tmp_path / "file").read_bytes() == b"good"


def test_a_presigned_url_reads_without_credentials(settings: Settings, storage: Storage) -> None:
    storage.put(settings.data_bucket, "picture", b"pixels")
    with urllib.request.urlopen(storage.presigned_get(settings.data_bucket, "picture")) as answer:
        assert answer.read() == b"pixels"


def test_what_is_not_there_is_named(settings: Settings, storage: Storage) -> None:
    for bucket, key, reason in [
        (settings.data_bucket, "nothing", "OBJECT_MISSING"),
        ("no-such-bucket", "nothing", "BUCKET_MISSING"),
    ]:
        with pytest.raises(NotFoundError, match=bucket) as caught:
            storage.get(bucket, key)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("status", "page"),
    [
        (200, b"<html><body>back soon</body></html>"),
        (200, b"<html><p>back soon<br></html>"),
        (200, b""),
        (403, b"<html><body>not for you</body></html>"),
        (403, b""),
        (404, b"<html><body>not here</body></html>"),
        (404, b"404 page not found\n"),
        (409, b"conflict\n"),
        (412, b"<html><p>precondition failed<br></html>"),
    ],
)
def test_nothing_that_a_proxy_says_is_believed(
    status: int, page: bytes, settings: Settings, tmp_path: Path
) -> None:
    small, large, got = (tmp_path / name for name in ("small", "large", "got"))
    small.write_bytes(b"weights")
    # In parts.
    large.write_bytes(bytes(9 * 2**20))
    with proxy_of_nothing(settings, status, page) as away:
        # botocore tries a page that is no XML again, and then says 500.
        storage = Storage(away, attempts=1)
        calls: dict[str, Callable[[], object]] = {
            "list": lambda: list(storage.list_objects("bucket")),
            "bucket_exists": lambda: storage.bucket_exists("bucket"),
            "ensure_bucket": lambda: storage.ensure_bucket("bucket"),
            "exists": lambda: storage.exists("bucket", "key"),
            "size": lambda: storage.size("bucket", "key"),
            "get": lambda: storage.get("bucket", "key", max_bytes=1, etag="0" * 32),
            "open": lambda: storage.open("bucket", "key").__enter__(),
            "download": lambda: storage.download("bucket", "key", got, sha256="0" * 64),
            "put": lambda: storage.put("bucket", "key", b"weights"),
            "put_if_absent": lambda: storage.put_if_absent("bucket", "key", b"weights"),
            "put_file": lambda: storage.put_file("bucket", "key", small),
            "put_file in parts": lambda: storage.put_file("bucket", "key", large),
        }
        assert [name for name, call in calls.items() if not _doubts(call)] == []
    assert not got.exists()


def _doubts(call: Callable[[], object]) -> bool:
    try:
        call()
    except ServiceUnavailableError as error:
        return "is no S3 server; see whether" in error.message or "answered 500" in error.message
    except Exception:
        return False
    return False


def test_what_is_there_is_told_from_what_is_not(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    bucket = settings.data_bucket
    assert storage.bucket_exists(bucket)
    assert not storage.ensure_bucket(bucket)
    assert not storage.bucket_exists("no-such-bucket")
    assert not storage.exists(bucket, "key")
    assert not storage.exists("no-such-bucket", "key")
    with pytest.raises(NotFoundError):
        storage.size(bucket, "key")
    storage.put(bucket, "key", b"")
    assert storage.exists(bucket, "key")
    assert storage.size(bucket, "key") == 0
    (tmp_path / "large").write_bytes(bytes(9 * 2**20))
    storage.put_file(bucket, "large", tmp_path / "large")
    assert storage.size(bucket, "large") == 9 * 2**20


@pytest.mark.parametrize(("head", "there"), [(200, True), (404, False), (403, None)])
def test_a_bucket_that_may_not_be_listed_may_be_there(
    head: int, there: bool | None, settings: Settings
) -> None:
    denied = b"<Error><Code>AccessDenied</Code></Error>"
    with proxy_of_nothing(settings, 403, denied, head=head) as closed:
        if there is None:
            with pytest.raises(SettingsError, match="AccessDenied"):
                Storage(closed).bucket_exists("bucket")
        else:
            assert Storage(closed).bucket_exists("bucket") is there


def test_an_upload_says_what_s3_says(settings: Settings, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(9 * 2**20))
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        storage.put_file("no-such-bucket", "key", tmp_path / "large")


def test_an_object_that_is_stored_between_two_looks_is_there(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(settings.data_bucket, "key", b"weights")
    head = storage._client.head_object
    looks: list[object] = []

    def late(**request: Any) -> object:
        looks.append(request)
        return head(**request | {"Key": "other"} if len(looks) == 1 else request)

    monkeypatch.setattr(storage._client, "head_object", late)
    assert storage.size(settings.data_bucket, "key") == 7
    assert len(looks) == 2


def test_wrong_credentials_are_a_setting_to_correct(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_S3_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SettingsError, match="GUN_DETECTION_S3_ACCESS_KEY_ID"):
        Storage(load_settings()).get(settings.data_bucket, "key")


def test_a_server_that_is_down_is_tried_again_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
        Storage(load_settings(), attempts=2).get(settings.data_bucket, "key")


@pytest.mark.parametrize("uri", ["", "bucket/key", "http://bucket/key", "s3:///key"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(GunDetectionError, match="s3://bucket/prefix"):
        parse_s3_uri(uri)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Answer(500, "InternalError"), ServiceUnavailableError, "full disk is a common cause"),
        (Answer(403, "InvalidObjectState"), TerminalError, "is archived: restore it"),
        (Answer(400, "InvalidRequest"), TerminalError, "copy the object to another name"),
    ],
    ids=str,
)
def test_an_error_of_the_server_says_what_to_do(
    answer: Answer,
    kind: type[GunDetectionError],
    words: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings.s3_endpoint_url
    with Proxy(int(settings.s3_endpoint_url.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("GUN_DETECTION_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.fail(answer)
        with pytest.raises(kind, match=words):
            Storage(load_settings()).get("bucket", "key")
