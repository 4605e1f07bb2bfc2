import hashlib
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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
def proxy_of_nothing(settings: Settings, status: int, page: bytes) -> Iterator[Settings]:
    """Settings of a server that answers with its own page, as a proxy whose server is away."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

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
        (404, b"404 page not found\n"),
        (404, b"<html><body>not here</body></html>"),
        (200, b"<html><body>back soon</body></html>"),
        (200, b""),
    ],
)
def test_a_page_of_a_proxy_is_no_listing(status: int, page: bytes, settings: Settings) -> None:
    with (
        proxy_of_nothing(settings, status, page) as away,
        pytest.raises(ServiceUnavailableError, match="is no S3 server; see whether"),
    ):
        list(Storage(away).list_objects("bucket"))


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
