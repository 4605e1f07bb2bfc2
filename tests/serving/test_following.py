"""The champion serves, whoever it is by now; pictures that are to be kept reach the ledger."""

import asyncio
import hashlib
import json
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from embedded import postgres
from embedded.servers import Servers
from gun_detection.database import open_session
from gun_detection.errors import ServiceUnavailableError, SettingsError
from gun_detection.release.champion import promote, rollback
from gun_detection.release.registry import publish
from gun_detection.serving import models as serving_models
from gun_detection.serving.keys import new_key
from gun_detection.serving.refusals import Refusal
from gun_detection.serving.service import Service
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.picture_files import saved, scene
from tests.serving.conftest import OPEN, PROGRAM, THRESHOLD, Running

PICTURE = saved(scene(320, 200), "JPEG")
QUICK = OPEN | {"GUN_DETECTION_SERVE_REFRESH_SECONDS": "0.3"}
Start = Callable[..., Running]


@pytest.fixture
def models(settings: Settings, storage: Storage) -> list[str]:
    """Two published versions that find different things."""
    new = [replace(random_model(seed), threshold=THRESHOLD) for seed in (1, 2)]
    with open_session(settings) as session:
        return [publish(one, settings, storage, session).id for one in new]


def make_champion(settings: Settings, model: str) -> None:
    with open_session(settings) as session:
        promote(session, model, actor="test", reason="a test")


def answering(service: Running) -> str | None:
    answer = httpx.get(f"{service.url}/model")
    return answer.json()["model"] if answer.is_success else None


def wait_for(service: Running, model: str) -> None:
    deadline = time.monotonic() + 60
    while answering(service) != model:
        assert time.monotonic() < deadline, service.log
        time.sleep(0.05)


def test_promotions_under_load_lose_no_request(
    settings: Settings, models: list[str], start: Start
) -> None:
    service = start(ready="/health", **QUICK)
    first, second = models
    for path in ("/ready", "/model"):
        answer = httpx.get(service.url + path)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "NO_CHAMPION")
    answer = httpx.post(f"{service.url}/predict/", files={"file": PICTURE})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    make_champion(settings, first)
    wait_for(service, first)

    stop = threading.Event()
    found: dict[str, set[str]] = defaultdict(set)
    # (when a request began, the model that answered it)
    order: list[tuple[float, str]] = []

    def load(number: int) -> int:
        asked = 0
        with httpx.Client(base_url=service.url, timeout=60) as client:
            while not stop.is_set():
                asked += 1
                began = time.monotonic()
                if number % 2:
                    answer = client.post("/predict/?format=json", files={"file": PICTURE})
                    assert answer.status_code == 200, answer.text
                    assert answer.headers["x-model"] == answer.json()["model"]
                    predictions = [answer.json()]
                else:
                    files = [("files", PICTURE)] * 3
                    answer = client.post("/predict/batch", files=files)
                    assert answer.status_code == 200, answer.text
                    predictions = [item["prediction"] for item in answer.json()["images"]]
                    assert {one["model"] for one in predictions} == {answer.json()["model"]}
                for one in predictions:
                    found[one["model"]].add(json.dumps([d["box"] for d in one["detections"]]))
                order.append((began, predictions[0]["model"]))
        return asked

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(load, number) for number in range(4)]
        try:
            for change in (second, None, second):
                time.sleep(1)
                if change is None:
                    with open_session(settings) as session:
                        rollback(session, actor="test", reason="a test")
                else:
                    make_champion(settings, change)
                wait_for(service, change or first)
            changed = time.monotonic()
            while not any(began > changed for began, _ in order):
                assert time.monotonic() < changed + 60, service.log
                time.sleep(0.05)
        finally:
            stop.set()
        assert min(one.result() for one in asked) > 1
    assert {model for _, model in order} == {first, second}
    assert order[0][1] == first
    # What was asked before may be answered by the former model.
    assert {model for began, model in order if began > changed} == {second}
    # Each version always finds the same, and not what the other one does.
    assert [len(boxes) for boxes in found.values()] == [1, 1]
    assert found[first] != found[second]
    assert " status=5" not in service.log.partition(f"serving {first}")[2]


def test_figures_of_several_processes_name_the_new_champion_only(
    settings: Settings, models: list[str], start: Start
) -> None:
    first, second = models
    make_champion(settings, first)
    service = start("--workers", 2, **QUICK)

    def wait_until_both_serve(model: str) -> None:
        deadline = time.monotonic() + 60
        while service.log.count(f"serving {model}") < 2:
            assert time.monotonic() < deadline, service.log
            time.sleep(0.1)

    wait_until_both_serve(first)
    make_champion(settings, second)
    wait_until_both_serve(second)
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    shown = {line for line in lines if line.startswith("gun_detection_model{")}
    assert shown == {
        f'gun_detection_model{{model="{first}"}} 0.0',
        f'gun_detection_model{{model="{second}"}} 1.0',
    }


def test_champion_that_cannot_be_loaded_is_told_while_the_one_before_serves(
    settings: Settings, storage: Storage, servers: Servers, models: list[str], start: Start
) -> None:
    first, second = models
    make_champion(settings, first)
    service = start(**QUICK)
    storage.delete(settings.data_bucket, f"models/{second}/weights.safetensors")
    make_champion(settings, second)

    def stale() -> str | None:
        card = httpx.get(f"{service.url}/model").json()
        assert card["model"] == first
        return card["stale"]

    def wait_until(reason: str | None) -> None:
        deadline = time.monotonic() + 60
        while stale() != reason:
            assert time.monotonic() < deadline, service.log
            time.sleep(0.1)

    wait_until("OBJECT_MISSING")
    assert "gun_detection_model_stale 1.0" in httpx.get(f"{service.url}/metrics").text
    time.sleep(1)
    assert service.log.count("no other model can be served") == 1
    with open_session(settings) as session:
        rollback(session, actor="test", reason="a test")
    wait_until(None)
    assert "gun_detection_model_stale 0.0" in httpx.get(f"{service.url}/metrics").text

    # Without the database it goes on with what it has.
    assert settings.database_url is not None
    name = settings.database_url.get_secret_value().rpartition("/")[2]
    with postgres.administer(servers.postgres) as cursor:
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
            [name],
        )
        wait_until("SERVICE_UNAVAILABLE")
        assert httpx.post(f"{service.url}/predict/", files={"file": PICTURE}).is_success
        assert httpx.get(f"{service.url}/ready").is_success
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_until(None)


def test_kept_pictures_are_scored_like_every_upload(
    settings: Settings, storage: Storage, models: list[str], start: Start
) -> None:
    make_champion(settings, models[0])
    secret, key = new_key("portal", ["predict", "store"], None)
    service = start(
        GUN_DETECTION_SERVE_KEYS=str(key),
        GUN_DETECTION_SERVE_STORE="asked",
        GUN_DETECTION_SERVE_RATE_LIMIT="off",
    )
    client = httpx.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60
    )

    def stored() -> list[str]:
        return [item.key for item in storage.list_objects(settings.uploads_bucket)]

    with client:
        plain = client.post("/predict/?format=json", files={"file": PICTURE}).json()
        assert plain["stored_as"] is None
        refused = client.post("/predict/?store=true", files={"file": b"words"})
        assert refused.status_code == 415
        assert stored() == []
        kept = client.post("/predict/?format=json&store=true", files={"file": PICTURE}).json()
        again = client.post("/predict/batch?store=true", files=[("files", PICTURE)] * 2).json()
        [name] = stored()
        assert name.endswith(f"/{hashlib.sha256(PICTURE).hexdigest()}.jpeg")
        assert kept["stored_as"] == f"s3://{settings.uploads_bucket}/{name}"
        assert {one["prediction"]["stored_as"] for one in again["images"]} == {kept["stored_as"]}
        assert storage.get(settings.uploads_bucket, name) == PICTURE

    run = subprocess.run([PROGRAM, "score", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["scored"] == 1
    with open_session(settings) as session:
        rows = session.execute(
            text("SELECT key, x1, y1, x2, y2, review_state FROM current_detections")
        ).all()
    assert {(row.key, row.review_state) for row in rows} == {(name, "unreviewed")}
    boxes = np.array([row[1:5] for row in rows])
    served = np.array([one["box"] for one in kept["detections"]])
    assert len(boxes) == len(served)
    # Rows have no order; a box of the answer is rounded.
    assert np.abs(boxes[:, None] - served[None]).max(-1).min(0).max() < 0.02


def test_a_storage_that_hangs_keeps_only_those_waiting_who_store(
    start: Start, weights: Path
) -> None:
    secret, key = new_key("portal", ["predict", "store", "metrics"], None)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        service = start(
            "--model",
            weights,
            GUN_DETECTION_SERVE_KEYS=str(key),
            GUN_DETECTION_SERVE_STORE="asked",
            GUN_DETECTION_SERVE_RATE_LIMIT="1000/minute",
            GUN_DETECTION_S3_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
            GUN_DETECTION_S3_ACCESS_KEY_ID="x",
            GUN_DETECTION_S3_SECRET_ACCESS_KEY="y",
        )
        client = httpx.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60
        )

        def post(store: str) -> httpx.Response:
            query = f"/predict/?format=json&store={store}"
            return client.post(query, files={"file": PICTURE})

        with client, ThreadPoolExecutor(16) as pool:
            storing = [pool.submit(post, "true") for _ in range(16)]
            deadline = time.monotonic() + 60
            while "pictures_under_way 16.0" not in client.get("/metrics").text:
                assert time.monotonic() < deadline
            assert post("false").is_success
            for answer in [one.result() for one in storing]:
                assert answer.status_code == 503
                assert answer.json()["error"]["reason"] == "SERVICE_UNAVAILABLE"
                assert int(answer.headers["retry-after"]) >= 1
            assert post("false").is_success


def test_who_stores_is_not_told_to_try_again_what_the_storage_refuses(settings: Settings) -> None:
    wrong = {"serve_store": "asked", "s3_secret_access_key": SecretStr("wrong")}

    async def store() -> Refusal:
        service = Service(settings.model_copy(update=wrong), None)
        with pytest.raises(Refusal) as refused:
            await service._store(PICTURE)
        await service.stop()
        return refused.value

    refusal = asyncio.run(store())
    assert (refusal.status, refusal.reason, refusal.headers) == (503, "ACCESS_DENIED", {})
    assert "operator" in refusal.message


@pytest.mark.parametrize(
    ("error", "reason", "passes"),
    [
        (OSError(28, "No space left on device"), "LOAD_FAILED", True),
        (SettingsError("the threshold is below the floor"), "SETTINGS", False),
        (ServiceUnavailableError("nothing answers"), "SERVICE_UNAVAILABLE", True),
    ],
)
def test_whatever_goes_wrong_the_champion_is_looked_for_again(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
    passes: bool,
) -> None:
    quick = settings.model_copy(update={"serve_refresh_seconds": 0.01})
    looked: list[int] = []

    def load(*_: object) -> None:
        looked.append(1)
        raise error

    monkeypatch.setattr(serving_models, "_load", load)

    async def follow() -> None:
        keeper = serving_models.ModelKeeper(quick)
        await keeper.start()
        while len(looked) < 3:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as refused:
            _ = keeper.serving
        assert refused.value.reason == reason
        # Clients come again where they are told when.
        assert ("Retry-After" in refused.value.headers) is passes
        assert ("ask its operator" in refused.value.message) is not passes
        await keeper.stop()

    asyncio.run(asyncio.wait_for(follow(), 30))
