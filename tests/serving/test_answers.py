"""What the service answers to those who use it well."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from gun_detection.detector.running import reference
from gun_detection.images import SandboxedDecoder
from gun_detection.release.registry import open_file
from gun_detection.serving.answers import DISCLAIMER, WELCOME
from gun_detection.serving.negotiation import preferred
from gun_detection.settings import Settings
from tests.picture_files import FILES, saved, scene
from tests.serving.conftest import THRESHOLD, Running

PICTURE = saved(scene(320, 200), "JPEG")
# Larger than the detector looks at.
LARGE = saved(scene(2400, 1600), "JPEG")


@pytest.fixture
def http(service: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def test_greets_programs_and_shows_browsers_the_page(http: httpx.Client) -> None:
    for accept in ("*/*", "application/json", "text/html;q=0.5, application/json"):
        assert http.get("/", headers={"Accept": accept}).json() == {"message": WELCOME}
    browser = http.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert browser.headers["content-type"].startswith("text/html")
    for name in ("page.css", "page.js"):
        assert f'"{name}"' in browser.text
        assert http.get(f"/{name}").is_success


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_answers_with_boxes_scores_and_what_they_are_worth(http: httpx.Client, kind: str) -> None:
    picture = {"file": (f"x.{kind}", saved(scene(320, 200), kind.upper()))}
    answer = http.post("/predict/?format=json", files=picture).json()
    assert (answer["width"], answer["height"]) == (320, 200)
    assert (answer["review"], answer["disclaimer"]) == ("unreviewed", DISCLAIMER)
    assert (answer["model"], answer["engine"]) == ("random.safetensors", "eager")
    assert answer["threshold"] == THRESHOLD
    scores = [one["score"] for one in answer["detections"]]
    assert scores == sorted(scores, reverse=True)
    assert scores
    for one in answer["detections"]:
        x1, y1, x2, y2 = one["box"]
        assert 0 <= x1 < x2 <= 320
        assert 0 <= y1 < y2 <= 200
    assert answer["timings_ms"]["total"] >= answer["timings_ms"]["decode"] > 0


@pytest.mark.parametrize("picture", [PICTURE, LARGE], ids=["small", "large"])
def test_finds_what_scoring_finds(http: httpx.Client, weights: Path, picture: bytes) -> None:
    model, config, _ = open_file(weights)
    engine = reference(model, config, THRESHOLD, torch.device("cpu"))
    with SandboxedDecoder(Settings()) as decoder:
        image = decoder.decode(picture, fit=engine.input_size)
    [found] = engine([image.pixels])
    height, width = image.pixels.shape[:2]
    expected = found.resized((width, height), (image.width, image.height))
    answer = http.post("/predict/?format=json", files={"file": picture}).json()["detections"]
    np.testing.assert_allclose([one["box"] for one in answer], expected.boxes, atol=0.02)
    np.testing.assert_allclose([one["score"] for one in answer], expected.scores, atol=1e-3)


@pytest.mark.parametrize("picture", [PICTURE, LARGE], ids=["small", "large"])
def test_draws_the_boxes_into_the_whole_picture(http: httpx.Client, picture: bytes) -> None:
    answer = http.post("/predict/", files={"file": picture})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-review"] == "unreviewed"
    assert answer.headers["x-model"] == "random.safetensors"
    drawn = Image.open(io.BytesIO(answer.content))
    whole = Image.open(io.BytesIO(picture))
    assert drawn.size == whole.size
    assert drawn.text["Review"] == DISCLAIMER
    assert int(answer.headers["x-detections"]) > 0
    assert (np.asarray(drawn) == (255, 32, 32)).all(-1).any(), "no box was drawn"
    none = http.post("/predict/?threshold=1", files={"file": picture})
    assert none.headers["x-detections"] == "0"
    assert not (np.asarray(Image.open(io.BytesIO(none.content))) == (255, 32, 32)).all(-1).any()


def test_the_form_of_the_answer_is_the_clients_choice(http: httpx.Client) -> None:
    def kind(query: str, accept: str) -> str:
        answer = http.post(f"/predict/{query}", files={"file": PICTURE}, headers={"Accept": accept})
        return answer.headers["content-type"]

    assert kind("", "*/*") == "image/png"
    assert kind("", "application/json") == "application/json"
    assert kind("?format=png", "application/json") == "image/png"
    assert kind("?format=json", "image/png") == "application/json"
    assert http.post("/predict", files={"file": PICTURE}).is_success


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "a/b"),
        ("*/*", "a/b"),
        ("c/d", "c/d"),
        ("c/*, a/b;q=0.9", "c/d"),
        ("a/b;q=0.1, c/d;q=0.2", "c/d"),
        ("*/*, a/b;q=0", "c/d"),
        ("c/d;q=nonsense", "a/b"),
        ("x/y", "a/b"),
        (",;,", "a/b"),
    ],
)
def test_accept_headers(accept: str, expected: str) -> None:
    assert preferred(accept, ("a/b", "c/d")) == expected


def test_threshold_is_a_parameter(http: httpx.Client) -> None:
    def scores(threshold: float) -> list[float]:
        query = f"/predict/?format=json&threshold={threshold}"
        answer = http.post(query, files={"file": PICTURE}).json()
        assert answer["threshold"] == max(threshold, THRESHOLD)
        return [one["score"] for one in answer["detections"]]

    everything = scores(0)
    middle = everything[len(everything) // 2]
    assert scores(middle + 1e-4) == [score for score in everything if score > middle + 1e-4]
    for bad in ("-1", "1.1", "nan", "inf", "much", ""):
        answer = http.post(f"/predict/?threshold={bad}", files={"file": PICTURE})
        assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "PARAMETER"), bad


def test_batch_answers_for_each_picture(http: httpx.Client) -> None:
    names = ["one.jpg", "two.txt", "<b>&\n.png", "large.jpg"]
    contents = [PICTURE, b"words", FILES["png"], LARGE]
    files = [("files", pair) for pair in zip(names, contents, strict=True)]
    answer = http.post("/predict/batch", files=files).json()
    assert answer["review"] == "unreviewed"
    assert [item["name"] for item in answer["images"]][:2] == names[:2]
    assert [item["error"] and item["error"]["reason"] for item in answer["images"]] == [
        None,
        "NOT_IMAGE",
        None,
        None,
    ]
    alone = http.post("/predict/?format=json", files={"file": PICTURE}).json()
    assert answer["images"][0]["prediction"]["detections"] == alone["detections"]


def test_says_what_answers(http: httpx.Client) -> None:
    card = http.get("/model").json()
    assert card["model"] == "random.safetensors"
    assert card["architecture"] == "resnet18_fpn"
    assert (card["source"], card["stores"], card["stale"]) == ("file", "never", None)
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"ready": True, "model": "random.safetensors"}


def test_counts_what_it_did(http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    good = 'gun_detection_pictures_total{outcome="looked at"}'
    bad = 'gun_detection_pictures_total{outcome="NOT_IMAGE"}'
    before = value(good), value(bad)
    http.post("/predict/", files={"file": PICTURE})
    http.post("/predict/", files={"file": b"words"})
    assert (value(good), value(bad)) == (before[0] + 1, before[1] + 1)
    assert value('gun_detection_model{model="random.safetensors"}') == 1
    assert value("gun_detection_pictures_under_way") == 0


def test_every_answer_has_the_headers_that_protect_browsers(http: httpx.Client) -> None:
    for path in ("/", "/nowhere", "/model", "/page.js"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-request-id"]
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


def answer_id(answer: httpx.Response) -> str:
    return answer.headers["x-request-id"]


def test_log_says_what_was_asked_and_nothing_of_the_picture(
    http: httpx.Client, service: Running
) -> None:
    answer = http.post("/predict/", files={"file": ("secret-name.jpg", PICTURE)})
    deadline = time.monotonic() + 10
    # It is written when the answer is out.
    while not (lines := [x for x in service.log.splitlines() if x.count(answer_id(answer))]):
        assert time.monotonic() < deadline
    assert len(lines) == 1
    assert "status=200" in lines[0]
    assert "secret-name" not in service.log


def test_openapi_document_names_everything(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/",
        "/predict/",
        "/predict/batch",
        "/model",
        "/health",
        "/ready",
        "/metrics",
    }
    responses = document["paths"]["/predict/"]["post"]["responses"]
    assert {"200", "401", "413", "415", "422", "429", "503"} <= set(responses)
    assert set(responses["200"]["content"]) == {"image/png", "application/json"}
    assert json.dumps(document).count("Unreviewed") >= 1
