"""What people see on the terminal, whatever keys and files are called."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from gun_detection.cli import main, output
from gun_detection.errors import NotFoundError
from tests.bad_pictures import CASES

KEYS = [case.key for case in CASES if case.group == "Keys"]
MARKUP = "[red]a[/] [/b] \\[/]"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.out, "width", 5000)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines that were printed since the last call; nothing in them acts on a terminal."""

    def read() -> list[str]:
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert [char for char in printed if not char.isprintable() and char != "\n"] == []
        return printed.removesuffix("\n").split("\n")

    return read


def test_a_row_is_a_line(lines: Callable[[], list[str]]) -> None:
    rows = [{"key": key, "message": f"{key} is not there"} for key in [*KEYS, MARKUP]]
    output.show_rows(rows, False, "")
    head, *shown = lines()
    assert head.split() == ["key", "message"]
    assert len(shown) == len(rows)
    assert r"new\nline.jpg" in "".join(shown)
    assert shown[-1].split("  ")[0].strip() == MARKUP


def test_many_rows_are_shown_piece_by_piece(lines: Callable[[], list[str]]) -> None:
    output.show_rows([{"number": number} for number in range(2500)], False, "")
    shown = [line.strip() for line in lines()]
    assert shown.count("number") == 3
    assert [int(line) for line in shown if line != "number"] == list(range(2500))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_stands_on_one_line(key: str, lines: Callable[[], list[str]]) -> None:
    output.show({"prefix": key, "unlisted": {key: key}}, False)
    assert [line.split()[0] for line in lines()] == ["prefix", "unlisted"]

    images: list[dict[str, Any]] = [
        {"file": key, "detections": [{"score": 0.5}]},
        {"file": key, "error": f"{key} is damaged"},
    ]
    output.show_predictions({"images": images, "model": key, "threshold": 0.5})
    assert len(lines()) == 4


@pytest.mark.parametrize("key", KEYS)
def test_no_line_of_an_error_passes_for_another_message(
    key: str, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NotFoundError(f"the object of s3://bucket/{key} does not exist")

    monkeypatch.setattr("gun_detection.cli.app", fail)
    monkeypatch.setattr(sys, "argv", ["gun-detection", "score"])
    with pytest.raises(SystemExit):
        main()
    first, *others = lines()
    assert first.startswith("error: the object of s3://bucket/")
    assert all(line.startswith("    ") for line in others)


def test_a_headline_keeps_its_lines(lines: Callable[[], list[str]]) -> None:
    output.show({"scored": 1}, False, "1 scored\x1b[2J\n0.50 s: 'a.jpg'")
    assert lines() == [r"1 scored\x1b[2J", "    0.50 s: 'a.jpg'", "scored  1"]
