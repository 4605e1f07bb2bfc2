"""How pages write what they are given."""

from datetime import UTC, datetime

import pytest

from gun_detection.pages import format_count, format_size, format_time, visible


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_time(datetime(2025, 3, 1, 4, 5, 6, tzinfo=UTC)), "2025-03-01 04:05 UTC"),
        (format_count(1234567), "1,234,567"),
        (format_size(0), "0.0 MB"),
        (format_size(1.5 * 2**20), "1.5 MB"),
        (format_size(2048 * 2**20), "2.0 GB"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("2025/ünïcode 日本.jpg", "2025/ünïcode 日本.jpg"),
        ("two\nlines\tand a tab", r"two\nlines\tand a tab"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("zero\u200bwidth\x1b[31m", r"zero\u200bwidth\x1b[31m"),
        ("a" * 500 + "b" * 500, "a" * 80 + " … " + "b" * 80),
    ],
)
def test_keys_show_what_is_in_them(key: str, shown: str) -> None:
    assert visible(key) == shown
