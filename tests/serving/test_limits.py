"""Rate limits, the bounded queue, timeouts, and several processes."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from limits import parse

from gun_detection.errors import SettingsError
from gun_detection.serving import limits as serving_limits
from gun_detection.serving import pictures as serving_pictures
from gun_detection.serving.app import create_app
from gun_detection.serving.limits import FileStorage, RateLimit, client_name
from gun_detection.serving.refusals import Refusal
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.serving.conftest import OPEN, Running, serving_here

PICTURE = saved(scene(64, 64), "JPEG")
Start = Callable[..., Running]


def post(service: Running, pictures: int = 1, **headers: str) -> httpx.Response:
    field, path = ("file", "/predict/") if pictures == 1 else ("files", "/predict/batch")
    files = [(field, PICTURE)] * pictures
    return httpx.post(service.url + path, files=files, headers=headers, timeout=60)


def test_ten_pictures_a_minute_by_default(start: Start, weights: Path) -> None:
    service = start("--model", weights, GUN_DETECTION_SERVE_ANONYMOUS="true")
    answers = [post(service) for _ in range(8)] + [post(service, pictures=2)]
    assert [answer.status_code for answer in answers] == [200] * 9
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers[:8]] == list("98765432")
    refused = post(service)
    assert refused.status_code == 429
    assert refused.json()["error"]["reason"] == "RATE_LIMITED"
    assert refused.headers["x-ratelimit-limit"] == "10"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # Nobody else's word for who they are.
    assert post(service, **{"X-Forwarded-For": "192.0.2.1"}).status_code == 429
    for path in ("/", "/model", "/health"):
        assert httpx.get(service.url + path).is_success


def test_batch_beyond_the_limit_is_not_asked_to_come_again(start: Start, weights: Path) -> None:
    service = start(
        "--model",
        weights,
        GUN_DETECTION_SERVE_ANONYMOUS="true",
        GUN_DETECTION_SERVE_RATE_LIMIT="3/minute",
    )
    refused = post(service, pictures=4)
    assert refused.status_code == 429
    # To come again would not help.
    assert "4 pictures at once" in refused.json()["error"]["message"]
    assert "retry-after" not in refused.headers


def test_trusted_proxy_says_who_asks(start: Start, weights: Path) -> None:
    service = start(
        "--model",
        weights,
        GUN_DETECTION_SERVE_ANONYMOUS="true",
        GUN_DETECTION_SERVE_RATE_LIMIT="1/minute",
        GUN_DETECTION_SERVE_TRUSTED_PROXIES="127.0.0.0/8,10.0.0.0/8",
    )

    def status(forwarded: str) -> int:
        return post(service, **{"X-Forwarded-For": forwarded}).status_code

    assert [status("192.0.2.1"), status("192.0.2.1"), status("192.0.2.2")] == [200, 429, 200]
    # What stands left of the last untrusted address was written by that client.
    assert [status("1.1.1.1, 192.0.2.3, 10.1.1.1"), status("2.2.2.2, 192.0.2.3")] == [200, 429]
    assert [status("2001:db8::1"), status("2001:db8::2"), status("2001:db8:1::1")] == [
        200,
        429,
        200,
    ]
    assert [status("nonsense"), status("other nonsense")] == [200, 429]


def test_processes_share_limits_and_figures(start: Start, weights: Path) -> None:
    service = start(
        "--model",
        weights,
        "--workers",
        2,
        GUN_DETECTION_SERVE_ANONYMOUS="true",
        GUN_DETECTION_SERVE_RATE_LIMIT="20/minute",
    )
    deadline = time.monotonic() + 60
    while service.log.count("serving random.safetensors") < 2:
        assert time.monotonic() < deadline, service.log
        time.sleep(0.1)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: post(service).status_code, range(40)))
    assert sorted(statuses) == [200] * 20 + [429] * 20
    counted = httpx.get(f"{service.url}/metrics").text
    assert 'gun_detection_pictures_total{outcome="looked at"} 20.0' in counted
    assert "died" not in service.log

    parent = psutil.Process(service.process.pid)
    served = [one for one in parent.children() if "spawn_main" in " ".join(one.cmdline())]
    assert len(served) == 2
    # Asked how it is twice a second, it dies before it has answered.
    served[0].suspend()
    time.sleep(1.5)
    served[0].kill()
    deadline = time.monotonic() + 60
    while service.log.count("serving random.safetensors") < 3:
        assert time.monotonic() < deadline, service.log
        time.sleep(0.1)
    # One that is gone does not count as serving.
    assert "gun_detection_pictures_under_way 0.0" in httpx.get(f"{service.url}/metrics").text

    served = parent.children(recursive=True)
    parent.kill()
    # They would hold the port.
    assert not psutil.wait_procs(served, 30)[1]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"serve_rate_limit": "many"}, "GUN_DETECTION_SERVE_RATE_LIMIT"),
        ({"serve_rate_limit": "10/minute; rm"}, "GUN_DETECTION_SERVE_RATE_LIMIT"),
        ({"serve_rate_limit": "10/minute;200/day"}, "GUN_DETECTION_SERVE_RATE_LIMIT"),
        ({"serve_rate_limit": "0/minute"}, "GUN_DETECTION_SERVE_RATE_LIMIT"),
        ({"serve_rate_store": "nonsense://x"}, "GUN_DETECTION_SERVE_RATE_STORE"),
    ],
)
def test_bad_limits_are_refused_by_name(settings: dict[str, str], name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        RateLimit(Settings.model_validate(settings), None)


def test_counter_is_exact_under_threads_and_forgets(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "counts.sqlite")
    key = parse("5/minute").key_for("one")
    with ThreadPoolExecutor(8) as pool:
        granted = list(pool.map(lambda _: storage.acquire_entry(key, 5, 60), range(40)))
    assert sum(granted) == 5
    assert storage.get_moving_window(key, 5, 60)[1] == 5
    assert storage.acquire_entry("other", 5, 60, amount=5)
    assert not storage.acquire_entry("other", 5, 60)
    assert not storage.acquire_entry("third", 5, 60, amount=6)
    assert FileStorage(tmp_path / "counts.sqlite").get_moving_window(key, 5, 60)[1] == 5
    assert storage.acquire_entry(key, 5, 0)
    assert storage.reset() == 1


def test_a_counter_that_cannot_be_read_is_told_and_not_a_fault(tmp_path: Path) -> None:
    limit = RateLimit(Settings(serve_rate_limit="5/minute"), tmp_path)
    (tmp_path / "rate-limit.sqlite").write_bytes(b"no database" * 1000)
    for left in ("rate-limit.sqlite-wal", "rate-limit.sqlite-shm"):
        (tmp_path / left).unlink(missing_ok=True)
    with pytest.raises(Refusal) as caught:
        asyncio.run(limit.spend("one"))
    assert (caught.value.status, caught.value.reason) == (503, "RATE_STORE")


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What threads of a test wait for until it ends."""
    event = threading.Event()
    yield event
    event.set()


def test_a_counter_that_does_not_answer_is_told(
    tmp_path: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_limits, "_SECONDS", 0.5)
    monkeypatch.setattr(FileStorage, "acquire_entry", lambda *_, **__: hanging.wait(60))
    limit = RateLimit(Settings(serve_rate_limit="5/minute"), tmp_path)
    with pytest.raises(Refusal) as caught:
        asyncio.run(limit.spend("one"))
    assert (caught.value.status, caught.value.reason) == (503, "RATE_STORE")


def test_counting_does_not_wait_for_what_else_hangs(
    tmp_path: Path, hanging: threading.Event
) -> None:
    async def count() -> dict[str, str]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, hanging.wait)
        limit = RateLimit(Settings(serve_rate_limit="5/minute"), tmp_path)
        try:
            return await asyncio.wait_for(limit.spend("one"), 30)
        finally:
            hanging.set()
            await blocked

    assert asyncio.run(count())["X-RateLimit-Remaining"] == "4"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, "unknown"),
        ("x", "unknown"),
    ],
)
def test_names_of_clients(address: str | None, name: str) -> None:
    assert client_name(address) == name


def test_full_queue_says_when_to_come_again(start: Start, weights: Path) -> None:
    service = start("--model", weights, GUN_DETECTION_SERVE_QUEUE="2", **OPEN)
    large = saved(scene(3000, 2000), "PNG")

    def send(_: int) -> httpx.Response:
        return httpx.post(f"{service.url}/predict/", files={"file": large}, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(send, range(36)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["reason"] == "BUSY"
            assert int(answer.headers["retry-after"]) >= 1
    assert post(service).is_success
    assert "gun_detection_pictures_under_way 0.0" in httpx.get(f"{service.url}/metrics").text


def test_bytes_of_a_batch_take_places_before_they_come(start: Start, weights: Path) -> None:
    service = start("--model", weights, GUN_DETECTION_SERVE_QUEUE="4", **OPEN)
    head = (
        "POST /predict/batch HTTP/1.1\r\nHost: x\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n{}\r\n\r\n"
    )
    for length in ("Content-Length: 41000000", "Transfer-Encoding: chunked"):
        with service.connect() as connection:
            connection.sendall(head.format(length).encode())
            deadline = time.monotonic() + 30
            while (answer := post(service)).is_success:
                assert time.monotonic() < deadline
            assert answer.json()["error"]["reason"] == "BUSY"
        deadline = time.monotonic() + 30
        while not post(service).is_success:
            assert time.monotonic() < deadline
    assert post(service, pictures=4).is_success
    assert post(service, pictures=5).status_code == 413


def test_request_without_an_answer_in_time_is_told_so(start: Start, weights: Path) -> None:
    service = start("--model", weights, GUN_DETECTION_SERVE_TIMEOUT="0.01", **OPEN)
    answer = post(service)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "TIMEOUT")
    assert int(answer.headers["retry-after"]) >= 1


def test_drawing_is_within_the_time_of_an_answer(
    weights: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_pictures, "_draw", lambda *_: hanging.wait(120))
    settings = Settings(
        serve_model=str(weights), serve_anonymous=True, serve_rate_limit="off", serve_timeout=4
    )
    with serving_here(create_app(settings)) as (_, port):
        url = f"http://127.0.0.1:{port}/predict/"
        answer = httpx.post(url, files={"file": PICTURE}, timeout=60)
        hanging.set()
    assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "TIMEOUT")


def test_client_that_goes_away_while_its_picture_is_drawn_frees_its_place(
    weights: Path, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = threading.Event()

    def draw(*_: object) -> bytes:
        drawing.set()
        hanging.wait(120)
        return b""

    monkeypatch.setattr(serving_pictures, "_draw", draw)
    settings = Settings(
        serve_model=str(weights), serve_anonymous=True, serve_rate_limit="off", serve_queue=1,
        serve_timeout=300,
    )  # fmt: skip
    with serving_here(create_app(settings)) as (_, port):
        url = f"http://127.0.0.1:{port}/predict/"

        def leave() -> None:
            with suppress(httpx.ReadTimeout):
                httpx.post(url, files={"file": PICTURE}, timeout=httpx.Timeout(60, read=1))

        while not drawing.is_set():
            leave()
        deadline = time.monotonic() + 30
        while not httpx.post(f"{url}?format=json", files={"file": PICTURE}, timeout=60).is_success:
            assert time.monotonic() < deadline
        hanging.set()


def test_client_that_goes_away_frees_its_place(start: Start, weights: Path) -> None:
    service = start("--model", weights, GUN_DETECTION_SERVE_QUEUE="4", **OPEN)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        + saved(scene(3000, 2000), "PNG")
        + b"\r\n--x--\r\n"
    )
    head = (
        b"POST /predict/ HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    for _ in range(8):
        connections = [service.connect() for _ in range(4)]
        for connection in connections:
            connection.sendall(head + body)
            connection.close()
    deadline = time.monotonic() + 30
    while not post(service).is_success:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def taken_on(service: Running) -> float:
    """Pictures that were looked at or are under way."""
    figures = httpx.get(f"{service.url}/metrics", timeout=60).text
    names = r'(?:under_way|total\{outcome="looked at"\})'
    return sum(map(float, re.findall(rf"^gun_detection_pictures_{names} (\S+)", figures, re.M)))


def test_requests_under_way_end_when_the_service_is_stopped(start: Start, weights: Path) -> None:
    service = start("--model", weights, **OPEN)
    large = saved(scene(3000, 2000), "PNG")
    statuses: list[int] = []

    def send() -> None:
        answer = httpx.post(f"{service.url}/predict/", files={"file": large}, timeout=60)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while taken_on(service) < 6:
        assert time.monotonic() < deadline
    service.stop()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6
    with pytest.raises(httpx.ConnectError):
        httpx.get(service.url)
