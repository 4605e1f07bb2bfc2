"""New uploads are told of once they are noted, until it is known that the news arrived."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gun_detection.scoring.plan import Plan
from gun_detection.scoring.watch import News, look, told
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import picture, rows, score_all, upload
from tests.scoring.simulated import Simulated


def waiting(settings: Settings) -> int | None:
    news = look(settings)
    return None if news is None else news.waiting[settings.uploads_bucket]


def test_an_upload_is_told_of_until_the_news_arrived(
    champion: object, settings: Settings, storage: Storage
) -> None:
    assert look(settings) is None
    upload(storage, settings, a=b"1", b=b"2")
    assert waiting(settings) == 2
    news = look(settings)
    assert news is not None
    assert waiting(settings) == 2, "nobody has said that it arrived"
    told(news, settings)
    assert look(settings) is None, "known, though not scored yet"
    upload(storage, settings, c=b"3")
    assert waiting(settings) == 3


def test_what_came_while_nothing_watched_is_found(
    champion: object, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"1")
    news = look(settings)
    assert isinstance(news, News)
    upload(storage, settings, b=b"2")
    told(news, settings)
    assert waiting(settings) == 2, "b came after what was told of"


def test_what_is_scored_is_no_news(
    plan: Any, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    made: Plan = plan()
    score_all(made, settings, storage, engine)
    assert look(settings) is None


def test_what_a_run_has_taken_on_is_no_news(
    plan: Any, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    plan()
    assert look(settings) is None
    upload(storage, settings, b=picture(1))
    assert waiting(settings) == 1


def test_without_a_champion_nobody_is_told(settings: Settings, storage: Storage) -> None:
    upload(storage, settings, a=b"1")
    assert look(settings) is None
    assert rows(settings, "SELECT key FROM upload") == [("a.jpg",)], "but it is noted"


def test_a_bucket_that_is_away_hides_no_other(
    champion: object,
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    upload(storage, settings, a=b"1")
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: gone}}, {{bucket: {settings.uploads_bucket}}}]")
    assert waiting(settings.model_copy(update={"sources_file": path})) == 1
    assert "looking for uploads in gone" in caplog.text


def test_a_source_can_be_left_unwatched(
    champion: object, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    upload(storage, settings, a=b"1")
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {settings.uploads_bucket}, watch: false}}]")
    assert look(settings.model_copy(update={"sources_file": path})) is None


class Queue:
    """A server that speaks the JSON protocol of SQS; `messages` are those not deleted yet."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        queue = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                action = self.headers["X-Amz-Target"].removeprefix("AmazonSQS.")
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(getattr(queue, action)(asked)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-amz-json-1.0")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/000000000000/uploads"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def send(self, body: object) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.messages[f"handle-{len(self.messages)}"] = text

    def ReceiveMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        first = list(self.messages.items())[: asked["MaxNumberOfMessages"]]
        return {
            "Messages": [
                {
                    "MessageId": handle,
                    "ReceiptHandle": handle,
                    "Body": body,
                    "MD5OfBody": hashlib.md5(body.encode()).hexdigest(),
                }
                for handle, body in first
            ]
        }

    def DeleteMessageBatch(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        for entry in asked["Entries"]:
            del self.messages[entry["ReceiptHandle"]]
        return {"Successful": [{"Id": entry["Id"]} for entry in asked["Entries"]], "Failed": []}


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = Queue()
    yield made
    made.close()


def event(bucket: str, key: str, name: str = "ObjectCreated:Put", size: int = 5) -> dict[str, Any]:
    described = {"key": key, "size": size, "eTag": "0123456789abcdef"}
    record = {
        "eventVersion": "2.1",
        "eventTime": "2026-02-03T04:05:06.789Z",
        "eventName": name,
        "s3": {"bucket": {"name": bucket}, "object": described},
    }
    return {"Records": [record]}


def test_a_queue_of_events_tells_of_uploads_without_a_listing(
    champion: object, settings: Settings, queue: Queue, tmp_path: Path
) -> None:
    bucket = settings.uploads_bucket
    for body in (
        event(bucket, "cam/a+b%2Bc%C3%A9.jpg"),
        {"Type": "Notification", "Message": json.dumps(event(bucket, "cam/by-sns.jpg"))},
        event(bucket, "cam/gone.jpg", "ObjectRemoved:Delete"),
        event(bucket, "elsewhere/x.jpg"),
        event("another-bucket", "cam/x.jpg"),
        event(bucket, "cam/folder/", size=0),
        {"Service": "Amazon S3", "Event": "s3:TestEvent"},
        "no JSON",
        '["no", "event"]',
        {"Records": [{"eventName": "ObjectCreated:Put"}]},
        event(bucket, "cam/%00.jpg"),
        event(bucket, "cam/half-\ud800.jpg"),
        event(bucket, "cam/large.jpg", size=2**64),
    ):
        queue.send(body)
    for number in range(25):
        queue.send(event(bucket, f"cam/{number}.jpg"))
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {bucket}, prefix: cam/, queue: '{queue.url}'}}]")
    assert waiting(settings.model_copy(update={"sources_file": path})) == 27
    assert queue.messages == {}
    noted = {key for (key,) in rows(settings, "SELECT key FROM upload")}
    assert {"cam/a b+cé.jpg", "cam/by-sns.jpg", "cam/24.jpg"} <= noted
    assert len(noted) == 27


def test_sources_that_share_a_queue_take_no_messages_from_each_other(
    champion: object, settings: Settings, queue: Queue, tmp_path: Path
) -> None:
    for key in ("a/1.jpg", "b/1.jpg", "c/1.jpg"):
        queue.send(event(settings.uploads_bucket, key))
    path = tmp_path / "sources.yaml"
    path.write_text(
        "buckets:\n"
        + "".join(
            f"  - {{bucket: {settings.uploads_bucket}, prefix: {prefix}/, queue: '{queue.url}'}}\n"
            for prefix in "ab"
        )
    )
    assert waiting(settings.model_copy(update={"sources_file": path})) == 2
    assert rows(settings, "SELECT key FROM upload ORDER BY key") == [("a/1.jpg",), ("b/1.jpg",)]


def test_messages_stay_until_their_uploads_are_noted(
    champion: object, settings: Settings, queue: Queue, tmp_path: Path
) -> None:
    queue.send(event(settings.uploads_bucket, "a.jpg"))
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {settings.uploads_bucket}, queue: '{queue.url}'}}]")
    url = settings.database_url.get_secret_value().rpartition("/")[0]  # type: ignore[union-attr]
    broken = settings.model_copy(
        update={"sources_file": path, "database_url": type(settings.database_url)(url + "/gone")}
    )
    with pytest.raises(Exception, match="gone"):
        look(broken)
    assert len(queue.messages) == 1
