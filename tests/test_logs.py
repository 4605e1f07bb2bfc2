import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gun_detection.logs import configure_logging
from gun_detection.settings import load_settings


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("gun_detection")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def _logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path, style: str
) -> str:
    monkeypatch.setenv("GUN_DETECTION_HOME", str(home))
    monkeypatch.setenv("GUN_DETECTION_LOG_FORMAT", style)
    configure_logging(load_settings())
    logger = logging.getLogger("gun_detection.test")
    logger.debug("not at this level")
    logger.info("scored", extra={"key": "a b\nforged line", "count": 3})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (home / "logs" / "gun-detection.log").read_text() == captured.err
    return captured.err


def test_an_event_is_one_line_of_keys_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [line] = _logged(capsys, monkeypatch, tmp_path, "text").splitlines()
    assert line.endswith('INFO gun_detection.test scored key="a b\\nforged line" count=3')


def test_no_line_of_a_message_looks_like_an_event(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GUN_DETECTION_HOME", str(tmp_path))
    configure_logging(load_settings())
    logging.getLogger("gun_detection.test").error("no \x1b[2J\u202egpj\nforged line")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(r"ERROR gun_detection.test no \x1b[2J\u202egpj")
    assert second == "    forged line"


def test_or_one_json_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [line] = _logged(capsys, monkeypatch, tmp_path, "json").splitlines()
    event = json.loads(line)
    assert (event["message"], event["count"]) == ("scored", 3)
    assert event["key"] == "a b\nforged line"
