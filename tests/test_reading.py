"""Every promise of `Storage.get` holds for `Reader.get`, key by key and error by error."""

import gzip
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import boto3
import pytest

from gun_detection.errors import GunDetectionError, ServiceUnavailableError, SettingsError
from gun_detection.reading import Reader
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from tests.faults.proxy import Answer, Proxy
from tests.test_storage import proxy_of_nothing

Get = Callable[..., bytes]

ODD_KEYS = [
    "ü ñ/日本/😀.jpg",
    "e\u0301.jpg",
    "new\nline\r\t\x01\x7f.jpg",
    "100%.jpg",
    "a%2Fb%20c+d.jpg",
    "%2e%2e/a.jpg",
    "?x=1&y#z;:@$,!'()*[]{}^`|\"<>~=.jpg",
    " spaces ",
    "\ufeffmark",
    "long/" + "k" * 200 + "/é" * 100 + "/" + "k" * 118,
]
# SeaweedFS changes or refuses these, AWS does not: they must leave here as they are.
ODDER_KEYS = [
    "a//b.jpg",
    "/lead.jpg",
    "//lead.jpg",
    "trail/",
    "trail//",
    "a\\b.jpg",
    "..",
    "../a.jpg",
    "a/../b.jpg",
    "a/./b.jpg",
    "a/.",
    "nul\0.jpg",
    "k" * 1024,
]


@pytest.fixture
def proxy(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before the server of `settings`, and in the environment in its place."""
    assert settings.s3_endpoint_url
    with Proxy(int(settings.s3_endpoint_url.rpartition(":")[2])) as running:
        monkeypatch.setenv("GUN_DETECTION_S3_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
        yield running


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_odd_keys_are_read_as_they_were_written(
    key: str, settings: Settings, storage: Storage
) -> None:
    storage.put(settings.uploads_bucket, key, key.encode())
    assert Reader(settings).get(settings.uploads_bucket, key) == key.encode()


def test_every_key_is_asked_for_as_boto3_asks_for_it(settings: Settings, proxy: Proxy) -> None:
    reader, storage = Reader(load_settings()), Storage(load_settings())
    for key in ODD_KEYS + ODDER_KEYS:
        proxy.requests.clear()
        for get in (storage.get, reader.get):
            # Whether it is there does not matter.
            with pytest.raises(GunDetectionError):
                get(settings.uploads_bucket, key)
        assert len(proxy.requests) >= 2
        assert len({unquote(line) for line in proxy.requests}) == 1


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda get, s: get(s.uploads_bucket, "nothing"), "OBJECT_MISSING"),
        (lambda get, s: get("no-such-bucket", "picture"), "BUCKET_MISSING"),
        (lambda get, s: get(s.uploads_bucket, "picture", etag="0" * 32), "OBJECT_CHANGED"),
        (lambda get, s: get(s.uploads_bucket, "picture", max_bytes=5), "TOO_LARGE"),
        (lambda get, s: get(s.uploads_bucket, "a/../b"), "REQUEST_REFUSED"),
    ],
)
def test_refusals_are_those_of_storage(
    ask: Callable[[Get, Settings], bytes], reason: str, settings: Settings, storage: Storage
) -> None:
    storage.put(settings.uploads_bucket, "picture", b"pixels")
    errors = []
    for get in (storage.get, Reader(settings).get):
        with pytest.raises(GunDetectionError) as caught:
            ask(get, settings)
        errors.append(caught.value)
    assert errors[0].reason == errors[1].reason == reason
    assert type(errors[0]) is type(errors[1])


@pytest.mark.parametrize("status", [200, 403, 404, 409, 412])
@pytest.mark.parametrize("page", [b"page of a proxy\n", b"<html>not here</html>", b""])
def test_a_proxy_that_finds_no_server_says_nothing_about_the_object(
    status: int, page: bytes, settings: Settings
) -> None:
    with proxy_of_nothing(settings, status, page) as away:
        for get in (Storage(away).get, Reader(away, seconds=0.5).get):
            # Nor is its page an object that is too large.
            with pytest.raises(ServiceUnavailableError, match="is no S3 server; see whether"):
                get("bucket", "key", etag="0" * 32, max_bytes=1)


def test_wrong_credentials_are_a_setting_to_correct(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_S3_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SettingsError) as caught:
        Reader(load_settings()).get(settings.uploads_bucket, "picture")
    assert caught.value.reason == "ACCESS_DENIED"


def test_without_a_key_in_the_settings_boto3s_own_chain_is_asked(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage.put(settings.uploads_bucket, "picture", b"pixels")
    assert settings.s3_access_key_id
    assert settings.s3_secret_access_key
    monkeypatch.delenv("GUN_DETECTION_S3_ACCESS_KEY_ID")
    monkeypatch.delenv("GUN_DETECTION_S3_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SettingsError, match="no S3 credentials"):
        Reader(load_settings()).get(settings.uploads_bucket, "picture")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", settings.s3_access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", settings.s3_secret_access_key.get_secret_value())
    assert Reader(load_settings()).get(settings.uploads_bucket, "picture") == b"pixels"


def test_objects_of_every_make_come_as_they_are_stored(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    reader, bucket = Reader(settings), settings.uploads_bucket
    storage.put(bucket, "empty", b"")
    assert reader.get(bucket, "empty", max_bytes=0) == b""
    (tmp_path / "parts").write_bytes(os.urandom(9 * 2**20))
    # Its ETag is not the MD5 of its bytes.
    storage.put_file(bucket, "parts", tmp_path / "parts")
    assert reader.get(bucket, "parts") == (tmp_path / "parts").read_bytes()
    packed = gzip.compress(b"text")
    _client(settings).put_object(Bucket=bucket, Key="text", Body=packed, ContentEncoding="gzip")
    assert reader.get(bucket, "text") == packed


def _client(settings: Settings):  # type: ignore[no-untyped-def]
    assert settings.s3_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
    )


# The second is one that obstore is not asked for.
@pytest.mark.parametrize("key", ["picture", "new\nline"])
def test_threads_keep_their_connections(key: str, settings: Settings, proxy: Proxy) -> None:
    Storage(load_settings()).put(settings.uploads_bucket, key, b"pixels")
    reader, before = Reader(load_settings()), proxy.connections
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda _: reader.get(settings.uploads_bucket, key), range(100)))
    assert read == [b"pixels"] * 100
    # Not 100; a client may open one while another becomes free, and so have some more than threads.
    assert proxy.connections - before <= 20


def test_a_bucket_of_another_region_is_read_where_it_is(
    settings: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage(load_settings()).put(settings.uploads_bucket, "picture", b"pixels")
    # It is not simply tried again.
    monkeypatch.setattr("gun_detection.reading.time.sleep", lambda _: pytest.fail("it waits"))
    proxy.fail(Answer(301, "PermanentRedirect"), times=2)
    assert Reader(load_settings()).get(settings.uploads_bucket, "picture") == b"pixels"
    assert proxy.injected == 2


def test_an_overwritten_object_is_not_waited_for(settings: Settings, proxy: Proxy) -> None:
    Storage(load_settings()).put(settings.uploads_bucket, "picture", b"pixels")
    with pytest.raises(ServiceUnavailableError, match="was changed"):
        Reader(load_settings()).get(settings.uploads_bucket, "picture", etag="0" * 32)
    assert len(proxy.requests) == 2


@contextmanager
def _server_with_other_etags(headers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server whose ETags are not MD5s: its URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            for name, value in ({"ETag": f'"{"a" * 32}"', "Content-Length": "6"} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"pixels")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("headers", "readings"),
    [
        ({}, 4),
        ({"x-amz-server-side-encryption": "AES256"}, 4),
        # From the second object on it is known.
        ({"x-amz-server-side-encryption": "aws:kms"}, 3),
        ({"x-amz-server-side-encryption-customer-algorithm": "AES256"}, 3),
        ({"ETag": '"' + "a" * 32 + '-3"'}, 2),
    ],
)
def test_an_etag_that_is_no_md5_condemns_nothing(
    headers: dict[str, str], readings: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _server_with_other_etags(headers) as (url, asked):
        monkeypatch.setenv("GUN_DETECTION_S3_ENDPOINT_URL", url)
        reader = Reader(load_settings())
        assert [reader.get("bucket", "key") for _ in range(2)] == [b"pixels"] * 2
        assert asked == ["/bucket/key"] * readings


def test_a_child_process_reads_after_its_parent_did(settings: Settings, storage: Storage) -> None:
    storage.put(settings.uploads_bucket, "picture", b"pixels")
    assert Reader(settings).get(settings.uploads_bucket, "picture") == b"pixels"
    child = get_context("fork").Process(target=_read_and_exit, args=(settings,), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0


def _read_and_exit(settings: Settings) -> None:
    read = Reader(settings).get(settings.uploads_bucket, "picture")
    os._exit(0 if read == b"pixels" else 1)
