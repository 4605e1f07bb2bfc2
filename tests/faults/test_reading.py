"""Reading through a network that breaks: the right bytes, or an error that is to be retried."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gun_detection.errors import ServiceUnavailableError, TerminalError
from gun_detection.reading import Reader
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from tests.faults.proxy import Answer, Cut, Delay, Drip, Fault, Flip, Proxy

DATA = os.urandom(100_000)


@pytest.fixture
def proxy(settings: Settings, storage: Storage) -> Iterator[Proxy]:
    """Before a server that has `DATA` under the key `picture`."""
    storage.put(settings.uploads_bucket, "picture", DATA)
    assert settings.s3_endpoint_url
    with Proxy(int(settings.s3_endpoint_url.rpartition(":")[2])) as running:
        yield running


@pytest.fixture
def proxied(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("GUN_DETECTION_S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    return load_settings()


FAULTS = [
    Answer(500, "InternalError"),
    Answer(503, "SlowDown"),
    Cut(0),
    Cut(50_000),
    Cut(50_000, reset=True),
    Flip(),
    # Longer than a reader of these tests waits for an answer: a seventh of its seconds.
    Delay(4.0),
    Drip(0.01),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_passing_fault_is_overcome(fault: Fault, proxy: Proxy, proxied: Settings) -> None:
    reader = Reader(proxied, seconds=15)
    proxy.fail(fault, times=2)
    assert reader.get(proxied.uploads_bucket, "picture") == DATA
    assert proxy.injected >= 1


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_lasting_fault_is_to_be_retried_later(
    fault: Fault, proxy: Proxy, proxied: Settings
) -> None:
    reader = Reader(proxied, seconds=3)
    proxy.fail(fault)
    with pytest.raises(ServiceUnavailableError, match=f"s3://{proxied.uploads_bucket}/picture"):
        reader.get(proxied.uploads_bucket, "picture")
    assert 1 <= proxy.injected <= 11


@pytest.mark.parametrize("begin", [Proxy.refuse, Proxy.stall], ids=["refuse", "stall"])
def test_a_network_that_is_gone_and_comes_back(
    begin: Callable[[Proxy], None], proxy: Proxy, proxied: Settings
) -> None:
    reader = Reader(proxied, seconds=6)
    assert reader.get(proxied.uploads_bucket, "picture") == DATA
    begin(proxy)
    with pytest.raises(ServiceUnavailableError):
        reader.get(proxied.uploads_bucket, "picture")
    proxy.heal()
    assert reader.get(proxied.uploads_bucket, "picture") == DATA


def test_connections_that_died_unseen_are_made_anew(proxy: Proxy, proxied: Settings) -> None:
    # A connection that is slow would be given up, and another one be made.
    reader = Reader(proxied, seconds=60)
    for _ in range(3):
        assert reader.get(proxied.uploads_bucket, "picture") == DATA
        proxy.drop()
    assert proxy.connections == 3


def test_what_fails_in_one_thread_is_right_in_all(proxy: Proxy, proxied: Settings) -> None:
    reader = Reader(proxied, seconds=60)
    with ThreadPoolExecutor(4) as pool:
        for fault in (Answer(503, "SlowDown"), Cut(50_000, reset=True), Flip()):
            proxy.fail(fault, times=4)
            read = pool.map(lambda _: reader.get(proxied.uploads_bucket, "picture"), range(20))
            assert all(data == DATA for data in read)
    assert proxy.injected == 12


def test_a_broken_answer_leaves_nothing_for_the_next_one(proxy: Proxy, proxied: Settings) -> None:
    reader = Reader(proxied, seconds=10)
    with pytest.raises(TerminalError, match="more than the 10 allowed"):
        reader.get(proxied.uploads_bucket, "picture", max_bytes=10)
    proxy.fail(Drip(0.01), times=1)
    assert reader.get(proxied.uploads_bucket, "picture") == DATA
    assert reader.get(proxied.uploads_bucket, "picture") == DATA
