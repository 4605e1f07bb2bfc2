"""The web page in a real browser, with real pictures."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from gun_detection.database import open_session
from gun_detection.release.champion import promote
from gun_detection.release.registry import publish
from gun_detection.serving.keys import new_key
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.picture_files import saved, scene
from tests.serving.conftest import OPEN, THRESHOLD, Running

Start = Callable[..., Running]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: the page was not looked at")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, service: Running) -> Iterator[Page]:
    """The page, which may load nothing from elsewhere and must not fail."""
    opened = browser.new_page(viewport={"width": 800, "height": 900})
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            faults.append(request.url)
            if not request.url.startswith((service.url, "blob:", "data:"))
            else None
        ),
    )
    opened.on(
        "console",
        lambda message: (
            faults.append(message.text) if "Content Security Policy" in message.text else None
        ),
    )
    opened.goto(service.url)
    yield opened
    opened.close()
    assert faults == []


@pytest.fixture
def pictures(tmp_path: Path, shared_data: Path) -> list[Path]:
    """A real picture, one with a hostile name, and one that is none."""
    real = shared_data / "guns-seed" / "Images" / "1.jpeg"
    hostile = tmp_path / '<img src=x onerror="document.title=1">.png'
    hostile.write_bytes(saved(scene(200, 120), "PNG"))
    words = tmp_path / "words.jpg"
    words.write_bytes(b"words")
    return [real, hostile, words]


@pytest.mark.seed
def test_pictures_get_boxes_or_a_reason(page: Page, pictures: list[Path]) -> None:
    expect(page.locator("#model")).to_contain_text("random.safetensors")
    expect(page.locator("#controls")).to_be_hidden()
    page.set_input_files("#files", pictures)
    cards = page.locator(".card")
    expect(cards).to_have_count(3)
    expect(page.locator("details:visible")).to_have_count(2)
    expect(cards.nth(0).locator(".summary")).to_contain_text("unreviewed")
    expect(cards.nth(1).locator("h2")).to_have_text(pictures[1].name)
    expect(cards.nth(2).locator(".summary")).to_have_text("Not looked at: this is not a picture.")
    assert page.title() == "Gun detection"
    # What was drawn is not the picture alone.
    reddish = """canvas => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
            count += data[i] === 216 && data[i + 1] === 31 && data[i + 2] === 42;
        return count;
    }"""
    canvas = cards.nth(0).locator("canvas")
    assert canvas.evaluate(reddish) > 100
    page.locator("#threshold").fill("1")
    expect(cards.nth(0).locator(".summary")).to_contain_text("No box at this threshold")
    assert canvas.evaluate(reddish) == 0
    page.get_by_role("button", name="The model's own").click()
    assert canvas.evaluate(reddish) > 100
    assert float(page.locator("#threshold").input_value()) == pytest.approx(THRESHOLD)
    page.get_by_role("button", name="Remove all").click()
    expect(cards).to_have_count(0)


@pytest.mark.seed
def test_json_and_picture_can_be_downloaded(page: Page, pictures: list[Path]) -> None:
    page.set_input_files("#files", pictures[:1])
    card = page.locator(".card")
    with page.expect_download() as waiting:
        card.get_by_role("button", name="Download with boxes").click()
    assert waiting.value.suggested_filename == "1-unreviewed.png"
    assert Path(waiting.value.path()).read_bytes().startswith(b"\x89PNG")
    card.locator("summary").click()
    with page.expect_download() as waiting:
        card.get_by_role("button", name="Download JSON").click()
    document = json.loads(Path(waiting.value.path()).read_bytes())
    assert document["review"] == "unreviewed"
    assert len(document["detections"]) == card.locator("tbody tr").count()


@pytest.mark.seed
def test_keyboard_alone_is_enough(page: Page, pictures: list[Path]) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    # From here the browser's own dialog goes on.
    page.set_input_files("#files", pictures[:1])
    card = page.locator(".card")
    expect(card.locator("details")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("1.jpeg")
    page.locator("#threshold").focus()
    before = page.locator("#threshold-value").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator("#threshold-value").text_content() != before
    card.get_by_role("button", name="Remove").focus()
    page.keyboard.press("Enter")
    expect(card).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "files"


def test_dropped_and_pasted_pictures_are_taken(page: Page) -> None:
    transfer = page.evaluate_handle(
        """async () => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 64});
            canvas.getContext('2d').fillRect(0, 0, 64, 64);
            const blob = await new Promise(done => canvas.toBlob(done));
            const transfer = new DataTransfer();
            transfer.items.add(new File([blob], 'made.png', {type: 'image/png'}));
            return transfer;
        }"""
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator(".card details")).to_be_visible()
    page.evaluate("t => dispatchEvent(new ClipboardEvent('paste', {clipboardData: t}))", transfer)
    expect(page.locator(".card details:visible")).to_have_count(2)


def test_page_fits_every_screen(browser: Browser, service: Running) -> None:
    for width in (320, 800, 1440):
        opened = browser.new_page(viewport={"width": width, "height": 800})
        opened.goto(service.url)
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        opened.close()


def test_phones_are_offered_their_camera(browser: Browser, service: Running) -> None:
    for touch in (True, False):
        context = browser.new_context(has_touch=touch, is_mobile=touch)
        opened = context.new_page()
        opened.goto(service.url)
        assert opened.get_by_text("Take a photo").is_visible() is touch
        assert opened.locator("#camera").get_attribute("capture") == "environment"
        context.close()


def test_page_asks_for_a_key(browser: Browser, start: Start, weights: Path) -> None:
    key, entry = new_key("person", ["predict"], None)
    service = start("--model", weights, GUN_DETECTION_SERVE_KEYS=str(entry))
    page = browser.new_page()
    page.goto(service.url)
    expect(page.locator("#model")).to_have_text("This service asks for an API key.")
    page.get_by_label("API key").fill("gd_wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#model")).to_have_text("This API key is not valid.")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("random.safetensors")
    expect(page.locator("#key-form")).to_be_hidden()
    page.close()


def test_page_follows_the_champion(
    browser: Browser, start: Start, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    with open_session(settings) as session:
        strict, lenient = (
            publish(replace(random_model(seed), threshold=at), settings, storage, session).id
            for seed, at in ((1, 0.9), (2, THRESHOLD))
        )
    service = start(ready="/health", GUN_DETECTION_SERVE_REFRESH_SECONDS="0.3", **OPEN)

    def make_champion(model: str) -> None:
        with open_session(settings) as session:
            promote(session, model, actor="test", reason="a test")
        deadline = time.monotonic() + 60
        while httpx.get(f"{service.url}/ready").json().get("model") != model:
            assert time.monotonic() < deadline, service.log
            time.sleep(0.05)

    picture = tmp_path / "picture.jpg"
    picture.write_bytes(saved(scene(320, 200), "JPEG"))
    make_champion(strict)
    page = browser.new_page()
    page.goto(service.url)
    expect(page.locator("#model")).to_contain_text(f"{strict}, threshold 90 %")
    make_champion(lenient)
    page.set_input_files("#files", [picture])
    # Its own threshold comes with it.
    expect(page.locator("#model")).to_contain_text(f"{lenient}, threshold 5 %")
    expect(page.locator(".summary")).to_contain_text("surest")
    assert float(page.locator("#threshold").input_value()) == pytest.approx(THRESHOLD)
    # One that a person chose stays.
    page.locator("#threshold").fill("0.5")
    make_champion(strict)
    page.set_input_files("#files", [picture])
    expect(page.locator("#model")).to_contain_text(strict)
    assert float(page.locator("#threshold").input_value()) == pytest.approx(0.5)
    page.close()
