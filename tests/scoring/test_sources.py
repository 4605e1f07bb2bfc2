"""Which buckets are scored, and what of them."""

from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random

import pytest

from gun_detection import stages
from gun_detection.errors import SettingsError
from gun_detection.scoring.sources import (
    Source,
    choose_sources,
    load_sources,
    regular_expression,
)
from gun_detection.settings import Settings
from tests.scoring.conftest import rows


def with_file(tmp_path: Path, content: str) -> Settings:
    path = tmp_path / "sources.yaml"
    path.write_text(content)
    return Settings(sources_file=path)


def test_without_a_file_all_of_the_uploads_bucket_is_scored() -> None:
    assert load_sources(Settings()) == [Source(bucket="uploads")]


def test_each_bucket_has_its_own_settings(tmp_path: Path) -> None:
    settings = with_file(
        tmp_path,
        "buckets:\n"
        "- {bucket: doors, prefix: cam/, include: ['*.jpg'], images_per_run: 100}\n"
        "- {bucket: archive, inventory: 's3://lists/archive/'}\n",
    )
    doors, archive = load_sources(settings)
    assert (doors.bucket, doors.prefix, doors.images_per_run) == ("doors", "cam/", 100)
    assert archive.inventory == "s3://lists/archive/"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("buckets: []", "buckets: List should have at least 1 item"),
        ("buckets: [{bucket: a, prefx: b}]", r"buckets\.0\.prefx: Extra inputs"),
        ("buckets: [{bucket: a, days: 0}]", r"buckets\.0\.days"),
        (
            "buckets: [{bucket: a, partitions: '%Y/%m/%d/%H%M/'}]",
            r"buckets\.0\.partitions: .*'%Y/%m/%d/%H%M/' differs within an hour",
        ),
        ("buckets: [{bucket: a, partitions: '%H:%f/'}]", "differs within an hour"),
        ("- just a list", "the whole"),
        ("buckets: [", "cannot be read"),
        ("buckets: [{bucket: a}, {bucket: a, prefix: x/}]", "prefixes that overlap"),
        ("buckets: [{bucket: gun-detection-data}]", "is the data bucket"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_sources(with_file(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_sources(Settings(sources_file=tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("a/b.jpg", True),
        ("a/b.JPG", False),
        ("b.jpeg", True),
        ("tmp/b.jpg", False),
        ("a/thumb_b.jpg", False),
        ("a\nb.jpg", True),
    ],
)
def test_patterns_choose_keys(key: str, wanted: bool) -> None:
    source = Source(bucket="b", include=("*.jpg", "*.jpeg"), exclude=("tmp/*", "*/thumb_*"))
    assert source.wants(key) is wanted


def test_the_database_matches_patterns_as_python_does(settings: Settings) -> None:
    random = Random(5)
    letters = "aab-]!^*?\\.$|&~é\n"
    pairs = [
        (
            "".join(random.choices(f"{letters}[[[***??", k=random.randint(0, 7))),
            "".join(random.choices(letters, k=random.randint(0, 3))),
        )
        for _ in range(4000)
    ]
    pairs += [(pattern, pattern.translate({ord("["): "", ord("]"): ""})) for pattern, _ in pairs]
    found = rows(
        settings,
        "SELECT key ~ expression FROM unnest(CAST(:keys AS text[]), CAST(:expressions AS text[])) "
        "AS pairs(key, expression)",
        keys=[key for _, key in pairs],
        expressions=[regular_expression(pattern) for pattern, _ in pairs],
    )
    expected = [fnmatchcase(key, pattern) for pattern, key in pairs]
    assert [matches for (matches,) in found] == expected
    assert sum(expected) > 500, "enough do match"


def test_days_are_listed_up_to_tomorrow() -> None:
    source = Source(bucket="b", prefix="cam/", partitions="%Y/%m/%d/", days=2)
    now = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
    assert source.prefixes(now) == ["cam/2026/02/28/", "cam/2026/03/01/", "cam/2026/03/02/"]
    before = datetime(2026, 2, 25, 3, 0, tzinfo=UTC)
    after_an_outage = ["2026/02/24", "2026/02/25", "2026/02/26", "2026/02/27"]
    assert source.prefixes(now, before)[:4] == [f"cam/{day}/" for day in after_an_outage]
    assert source.prefixes(now, now) == source.prefixes(now)
    monthly = Source(bucket="b", partitions="%Y-%m/", days=2)
    assert monthly.prefixes(now) == ["2026-02/", "2026-03/"]


def test_partitions_by_the_hour_are_listed_for_whole_days() -> None:
    source = Source(bucket="b", prefix="frames/", partitions="%Y/%m/%d/%H/", days=1)
    now = datetime(2026, 11, 26, 3, 0, tzinfo=UTC)

    def hours(*days: int) -> list[str]:
        return [f"frames/2026/11/{day}/{hour:02}/" for day in days for hour in range(24)]

    assert source.prefixes(now) == hours(25, 26, 27)
    before = datetime(2026, 11, 24, 23, 0, tzinfo=UTC)
    assert source.prefixes(now, before) == hours(23, 24, 25, 26, 27)


def test_what_came_between_two_listings_around_midnight_is_listed() -> None:
    source = Source(bucket="b", partitions="%d/", days=1)
    before = datetime(2026, 3, 2, 23, 59, tzinfo=UTC)
    after = before + timedelta(minutes=2)
    assert source.prefixes(after, before) == ["01/", "02/", "03/", "04/"]
    # What ended after that, and had begun on the day before.
    assert source.prefixes(after + timedelta(minutes=1), after) == ["02/", "03/", "04/"]


SOURCES = [
    Source(bucket="a", partitions="%Y/"),
    Source(bucket="b", prefix="x/", inventory="s3://lists/b"),
    Source(bucket="b", prefix="y/"),
]


def test_a_run_is_about_all_sources_or_those_of_a_bucket() -> None:
    assert choose_sources(SOURCES, Settings()) == SOURCES
    assert choose_sources(SOURCES, Settings(), "b") == SOURCES[1:]
    assert choose_sources(SOURCES, Settings(), "other") == [Source(bucket="other")]


def test_a_prefix_is_listed_itself() -> None:
    assert choose_sources(SOURCES, Settings(), "a", "2025/") == [Source(bucket="a", prefix="2025/")]
    assert choose_sources(SOURCES, Settings(), "b", "x/1") == [Source(bucket="b", prefix="x/1")]
    assert choose_sources(SOURCES, Settings(), "b", "z") == [Source(bucket="b", prefix="z")]
    with pytest.raises(SettingsError, match="a prefix needs a bucket: choose one of a, b"):
        choose_sources(SOURCES, Settings(), None, "x/")


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_bucket_without_a_name_is_not_all_of_them(prefix: str) -> None:
    with pytest.raises(SettingsError, match="the name of the bucket is empty"):
        choose_sources(SOURCES, Settings(), "", prefix)


@pytest.mark.parametrize("prefix", [None, "images/"])
def test_the_data_bucket_is_not_scored_by_hand_either(prefix: str | None) -> None:
    settings = Settings()
    with pytest.raises(SettingsError, match="gun-detection-data is the data bucket"):
        choose_sources(SOURCES, settings, settings.data_bucket, prefix)
    with pytest.raises(SettingsError, match="gun-detection-data is the data bucket"):
        stages.survey_uploads(settings, "rescore", settings.data_bucket, prefix)
