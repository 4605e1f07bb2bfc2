"""A queue tells of uploads, whatever else is in it, and loses none."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gun_detection import stages
from gun_detection.errors import FailureBudgetError, TerminalError
from gun_detection.scoring import events
from gun_detection.scoring.leases import claim_shard
from gun_detection.scoring.listing import _alone
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.watch import News, look
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import outcomes, picture, rows, score_all, upload, waiting
from tests.scoring.simulated import Refusing, Simulated
from tests.scoring.test_watch import hours_pass


class Queue:
    """A server that speaks the JSON protocol of SQS; `messages` are those not deleted yet, `seen`
    those that were given out, and are not again before their visibility timeout."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self.seen: set[str] = set()
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
        visible = [item for item in self.messages.items() if item[0] not in self.seen]
        first = visible[: asked["MaxNumberOfMessages"]]
        self.seen |= {handle for handle, _ in first}
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


@pytest.fixture
def watched(settings: Settings, queue: Queue, tmp_path: Path) -> Callable[..., Settings]:
    """Settings where the uploads bucket, and others that are named, have the queue."""

    def make(*others: str) -> Settings:
        path = tmp_path / "sources.yaml"
        path.write_text(
            "buckets:\n"
            + "".join(
                f"  - {{bucket: {bucket}, queue: '{queue.url}'}}\n"
                for bucket in (settings.uploads_bucket, *others)
            )
        )
        return settings.model_copy(update={"sources_file": path})

    return make


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
        json.dumps(bridged(bucket, "cam/offset.jpg")).replace("06Z", "06+23:00"),
    ):
        queue.send(body)
    for number in range(25):
        queue.send(event(bucket, f"cam/{number}.jpg"))
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {bucket}, prefix: cam/, queue: '{queue.url}'}}]")
    assert waiting(settings.model_copy(update={"sources_file": path})) == 28
    assert queue.messages == {}
    noted = {key for (key,) in rows(settings, "SELECT key FROM upload")}
    assert {"cam/a b+cé.jpg", "cam/by-sns.jpg", "cam/24.jpg"} <= noted
    assert len(noted) == 28


def bridged(bucket: str, key: str, kind: str = "Object Created", size: int = 5) -> dict[str, Any]:
    return {
        "version": "0",
        "detail-type": kind,
        "source": "aws.s3",
        "time": "2026-02-03T04:05:06Z",
        "detail": {
            "bucket": {"name": bucket},
            "object": {"key": key, "size": size, "etag": "0123456789abcdef"},
        },
    }


def test_events_by_way_of_eventbridge_tell_of_uploads(
    champion: object,
    settings: Settings,
    queue: Queue,
    watched: Callable[..., Settings],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bucket = settings.uploads_bucket
    deleted = bridged(bucket, "gone.jpg", "Object Deleted")
    del deleted["detail"]["object"]["size"]
    for body in (
        bridged(bucket, "a+b%2Bé.jpg"),
        {"Type": "Notification", "Message": json.dumps(bridged(bucket, "by-sns.jpg"))},
        deleted,
        bridged(bucket, "a.jpg", "Object Tags Added"),
        bridged("another-bucket", "x.jpg"),
        bridged(bucket, "folder/", size=0),
        {"Service": "Amazon S3", "Event": "s3:TestEvent"},
    ):
        queue.send(body)
    assert waiting(watched()) == 2
    assert queue.messages == {}
    assert rows(settings, "SELECT key, size, etag, uploaded_at::text FROM upload ORDER BY key") == [
        (key, 5, "0123456789abcdef", "2026-02-03 04:05:06+00")
        for key in ("a+b%2Bé.jpg", "by-sns.jpg")
    ]
    assert "no S3 event" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"detail-type": "EC2 Instance State-change Notification", "detail": {"state": "stopped"}},
        {"detail-type": "Object Created", "detail": {}},
        {"Event": "another"},
        json.dumps(event("b", "infinite.jpg")).replace('"size": 5', '"size": 1e999'),
        "[" * 100_000,
    ],
)
def test_a_message_that_is_no_event_is_logged_and_let_go(
    champion: object,
    queue: Queue,
    watched: Callable[..., Settings],
    body: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue.send(body)
    assert look(watched()) is None
    assert queue.messages == {}
    assert "is no S3 event" in caplog.text
    assert (body if isinstance(body, str) else json.dumps(body))[:40] in caplog.text


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
    champion: object, settings: Settings, queue: Queue, watched: Callable[..., Settings]
) -> None:
    queue.send(event(settings.uploads_bucket, "a.jpg"))
    url = settings.database_url.get_secret_value().rpartition("/")[0]  # type: ignore[union-attr]
    broken = watched().model_copy(
        update={"database_url": type(settings.database_url)(url + "/gone")}
    )
    with pytest.raises(Exception, match="gone"):
        look(broken)
    assert len(queue.messages) == 1


@pytest.mark.parametrize(
    ("address", "region"),
    [
        ("https://sqs.eu-central-1.amazonaws.com/1/uploads", "eu-central-1"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/uploads", "cn-north-1"),
        ("http://127.0.0.1:9324/1/uploads", None),
        ("https://queues.example.org/sqs.eu-central-1.amazonaws.com", None),
    ],
)
def test_requests_are_signed_for_the_region_of_the_queue(address: str, region: str | None) -> None:
    assert events._region(address) == region


def test_while_a_bucket_is_listed_its_queue_is_left_alone(
    champion: object,
    settings: Settings,
    storage: Storage,
    queue: Queue,
    watched: Callable[..., Settings],
) -> None:
    queue.send(event(settings.uploads_bucket, "a.jpg"))
    storage.ensure_bucket("listed-bucket")
    storage.put("listed-bucket", "b.jpg", b"b")
    with_queue = watched()
    assert with_queue.sources_file is not None
    with with_queue.sources_file.open("a") as file:
        file.write("  - {bucket: listed-bucket}\n")
    with _alone(settings.uploads_bucket, settings, wait=True):
        # In a thread, as a look that waits for the listing would wait for this test.
        found: list[News | None] = []
        looking = threading.Thread(target=lambda: found.append(look(with_queue)))
        looking.start()
        looking.join(120)
        assert not looking.is_alive(), "it waits for the listing"
    looking.join()
    assert found[0] is not None
    assert found[0].waiting == {"listed-bucket": 1}
    assert queue.seen == set(), "read in vain a few times, a message is lost"
    assert waiting(with_queue) == 1
    assert queue.messages == {}


def test_a_queue_is_left_alone_once_it_tells_of_a_bucket_that_is_listed(
    champion: object, settings: Settings, queue: Queue, watched: Callable[..., Settings]
) -> None:
    sharing = watched("other-bucket")
    with _alone(settings.uploads_bucket, settings, wait=True):
        queue.send(event("other-bucket", "a.jpg"))
        look(sharing)
        assert queue.messages == {}, "nothing holds up the other bucket"
        queue.seen.clear()
        queue.send(event("other-bucket", "b.jpg"))
        for number in range(20):
            queue.send(event(settings.uploads_bucket, f"{number}.jpg"))
        look(sharing)
        assert len(queue.seen) == 10, "one batch, of which a part is received in vain"
        assert len(queue.messages) == 20
        queue.seen.clear()
        look(sharing)
        assert queue.seen == set(), "received in vain a few times, a message is lost"
    news = look(sharing)
    assert queue.messages == {}
    assert news is not None
    assert news.waiting == {settings.uploads_bucket: 20, "other-bucket": 2}


def test_a_queue_that_waits_for_a_listing_was_not_looked_at(
    champion: object,
    settings: Settings,
    storage: Storage,
    queue: Queue,
    watched: Callable[..., Settings],
) -> None:
    storage.ensure_bucket("other-bucket")
    sharing = watched("other-bucket")
    state = "SELECT source, looked_at, message FROM source_look"
    unseen = "SELECT source, message FROM unseen_sources"
    look(sharing)
    hours_pass(settings, 2, "source_look", "looked_at")
    before = rows(settings, state)
    with _alone(settings.uploads_bucket, settings, wait=True):
        with _alone("other-bucket", settings, wait=True):
            look(sharing)
            assert rows(settings, state) == before, "all of its buckets are listed"
        queue.send(event(settings.uploads_bucket, "a.jpg"))
        for _ in range(2):
            # The message is received in vain once, and then left alone.
            look(sharing)
            assert rows(settings, state) == before
        assert rows(settings, unseen) == [(queue.url, None)], "unseen, but by no fault"
        found = stages.survey_uploads(sharing, bucket="other-bucket")
        assert (found["unlisted"], list(queue.messages)) == ({}, ["handle-0"])
        queue.seen.clear()
    assert waiting(sharing) == 1
    assert queue.messages == {}
    assert rows(settings, unseen) == []


def test_a_queue_in_which_nothing_waits_for_a_listing_was_looked_at(
    champion: object, settings: Settings, queue: Queue, watched: Callable[..., Settings]
) -> None:
    sharing = watched("other-bucket")
    with _alone(settings.uploads_bucket, settings, wait=True):
        look(sharing)
        hours_pass(settings, 2, "source_look", "looked_at")
        queue.send(event("other-bucket", "a.jpg"))
        look(sharing)
        assert queue.messages == {}
        assert rows(settings, "SELECT source FROM unseen_sources") == []


def test_a_queue_that_never_ends_is_left_after_a_while(
    champion: object,
    settings: Settings,
    queue: Queue,
    watched: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_DRAIN_SECONDS", 0.1)
    for number in range(2000):
        queue.send(event(settings.uploads_bucket, f"{number}.jpg"))
    first = look(watched())
    assert first is not None
    assert first.more
    assert first.waiting[settings.uploads_bucket] == 2000 - len(queue.messages) < 2000
    monkeypatch.setattr(events, "_DRAIN_SECONDS", 600.0)
    last = look(watched())
    assert last == News({settings.uploads_bucket: 2000}, last.upto if last else {}, more=False)


def test_a_queue_that_holds_more_is_told_of_without_any_upload(
    champion: object,
    queue: Queue,
    watched: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_DRAIN_SECONDS", 0.0)
    for number in range(20):
        queue.send(event("another-bucket", f"{number}.jpg"))
    assert look(watched()) == News({}, {}, more=True)


def restored(bucket: str, key: str, *, bridge: bool, etag: str) -> dict[str, Any]:
    """What S3 tells when an object was taken out of an archive: it has no sequencer."""
    if bridge:
        body = bridged(bucket, key, "Object Restore Completed")
        body["detail"]["object"]["etag"] = etag
        return body
    body = event(bucket, key, "ObjectRestore:Completed")
    body["Records"][0]["s3"]["object"]["eTag"] = etag
    expiry = {"lifecycleRestorationExpiryTime": "2026-02-10T00:00:00.000Z"}
    body["Records"][0]["glacierEventData"] = {"restoreEventData": expiry}
    return body


@pytest.mark.parametrize("bridge", [False, True])
def test_what_was_restored_from_an_archive_is_judged_again(
    plan: Any,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    queue: Queue,
    watched: Callable[..., Settings],
    bridge: bool,
) -> None:
    upload(storage, settings, a=picture(1), b=picture(2), c=b"no picture")
    refusing = Refusing(settings, TerminalError("no", reason="ARCHIVED"), {"a.jpg", "b.jpg"})
    score_all(plan(), settings, refusing, engine)
    etags = dict(rows(settings, "SELECT key, etag FROM upload"))
    before = rows(settings, "SELECT key, etag, uploaded_at FROM upload ORDER BY id")
    for key, etag in (
        ("a.jpg", etags["a.jpg"]),
        ("b.jpg", "of an older version"),
        ("c.jpg", etags["c.jpg"]),
        ("never-seen.jpg", "e"),
    ):
        queue.send(restored(settings.uploads_bucket, key, bridge=bridge, etag=etag))
    look(watched())
    assert queue.messages == {}
    assert rows(settings, "SELECT key, etag, uploaded_at FROM upload ORDER BY id") == before
    made: Plan = plan(settings=watched())
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "scored", "b": "ARCHIVED", "c": "NOT_IMAGE"}


def versions(bucket: str, *etags_and_sequencers: tuple[str, str]) -> list[dict[str, Any]]:
    """Events of one key and one second."""
    made = []
    for etag, sequencer in etags_and_sequencers:
        body = bridged(bucket, "a.jpg")
        body["detail"]["object"] |= {"etag": etag, "sequencer": sequencer}
        made.append(body)
    return made


def test_of_versions_of_one_second_the_later_one_counts(
    champion: object, settings: Settings, queue: Queue, watched: Callable[..., Settings]
) -> None:
    # The shorter is filled up at its right.
    old, new = ("old", "617F08299329D189"), ("new", "618")
    others = [event(settings.uploads_bucket, f"{number}.jpg") for number in range(10)]
    for order in ([old, new], [new, old]):
        for between in ([], others):
            first, second = versions(settings.uploads_bucket, *order)
            # Messages are given out by ten: the second is in the same part, or in another.
            for body in (first, *between, second):
                queue.send(body)
            look(watched())
            assert queue.messages == {}
            current = "SELECT etag FROM upload WHERE key = 'a.jpg' AND current"
            assert rows(settings, current) == [("new",)]
            rows(settings, "DELETE FROM pending_upload RETURNING upload_id")
            rows(settings, "DELETE FROM upload RETURNING id")
            queue.seen.clear()


def test_a_source_of_which_nobody_hears_any_more_fails_the_night(
    champion: object,
    settings: Settings,
    storage: Storage,
    queue: Queue,
    watched: Callable[..., Settings],
) -> None:
    upload(storage, settings, b=picture(2))
    queue.send(event(settings.uploads_bucket, "a.jpg"))
    found = stages.survey_uploads(watched())
    assert found["unlisted"] == {}
    assert (found["planned"], queue.messages) == (2, {}), "the queue is read, too"
    queue.close()
    assert stages.survey_uploads(watched(), listing=False)["unlisted"] == {}
    found = stages.survey_uploads(watched())
    assert list(found["unlisted"]) == [queue.url]
    assert "cannot be read" in found["text"]
    made = stages.plan_scoring(watched(), found)
    assert made["planned"] == 2
    for shard_id in made["shard_ids"]:
        score_shard(claim_shard(shard_id, settings), Simulated(), settings, storage)
    with pytest.raises(FailureBudgetError, match=f"{queue.url}.* cannot be read") as caught:
        stages.finish_scoring(settings, made["run_id"])
    assert caught.value.reason == "NOT_LISTED"
