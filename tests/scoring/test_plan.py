"""What a run is about, and how it is cut into shards."""

import errno
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.errors import (
    FailureBudgetError,
    GunDetectionError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
    TransientError,
)
from gun_detection.scoring import listing
from gun_detection.scoring.leases import claim_shard, give_up
from gun_detection.scoring.pages import run_page
from gun_detection.scoring.plan import Plan, Survey, cut, open_run
from gun_detection.scoring.runs import finish_run
from gun_detection.scoring.sources import Source
from gun_detection.scoring.words import duration, run_text, survey_text
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import model_row
from tests.scoring.conftest import count, outcomes, picture, rows, score_all, upload
from tests.scoring.simulated import Simulated

Surveyed = Callable[..., tuple[Survey, list[Source]]]
Planned = Callable[..., Plan]


def keys_of(made: Plan, settings: Settings) -> list[str]:
    """What a run is about, in the order of the keys."""
    planned = (
        "SELECT key FROM shard, unnest(upload_ids) AS of(id) JOIN upload USING (id) "
        "WHERE run_id = :run ORDER BY key"
    )
    return [key for (key,) in rows(settings, planned, run=made.run_id)]


def test_a_survey_counts_before_anything_is_opened(
    surveyed: Surveyed, plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture(1))
    score_all(plan(), settings, storage, engine)
    upload(storage, settings, b=picture(2), c=picture(3))
    found, _ = surveyed()
    assert (found.listed, found.new, found.changed, found.scored) == (3, 1, 1, 1)
    assert (found.waiting, found.planned, found.left_over) == (2, 2, 0)
    assert count(settings, "scoring_run") == 1
    assert found.seconds is not None
    assert found.seconds > 0


def test_what_the_watcher_noted_is_planned_without_listing(
    surveyed: Surveyed, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(1))
    surveyed()
    upload(storage, settings, b=picture(2))
    found, _ = surveyed(listing=False)
    assert (found.listed, found.waiting, found.planned) == (None, 1, 1)
    assert "listed" not in survey_text(asdict(found))


def test_the_first_survey_knows_no_time(surveyed: Surveyed) -> None:
    assert surveyed()[0].seconds is None


def test_time_and_cost_follow_from_earlier_shards(
    plan: Planned, surveyed: Surveyed, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    made = plan()
    score_all(made, settings, storage, engine)
    rows(
        settings,
        'UPDATE shard SET stats = stats || \'{"seconds": 36, "pictures": 1}\' RETURNING id',
    )
    upload(storage, settings, **{f"n{number}": b"x" for number in range(100)})
    priced = settings.model_copy(update={"worker_cost_per_hour": 3.0, "scoring_tasks": 2})
    found, _ = surveyed(settings=priced)
    assert (found.planned, found.seconds, found.cost) == (100, 1800.0, 3.0)
    assert "| time | about 30 min |" in survey_text(vars(found))
    assert "| cost | about 3.00 |" in survey_text(vars(found))


def test_shards_of_a_few_uploads_tell_less_of_speed_than_large_ones(
    plan: Planned, surveyed: Surveyed, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    stats = "UPDATE shard SET stats = stats || '{}' WHERE stats->>'seconds' <> '50' RETURNING id"
    for number, figures in enumerate(('{"seconds": 50, "pictures": 100}', '{"seconds": 3}')):
        upload(storage, settings, **{f"a{number}": picture(number)})
        score_all(plan(), settings, storage, engine)
        rows(settings, stats.format(figures))
    upload(storage, settings, **{f"n{number}": b"x" for number in range(100)})
    found, _ = surveyed(settings=settings.model_copy(update={"scoring_tasks": 1}))
    assert found.seconds == 50.0


def test_history_is_scored_by_one_at_a_time(
    plan: Planned, surveyed: Surveyed, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{number}": picture(number) for number in range(4)})
    made = plan()
    score_all(made, settings, storage, engine)
    stats = 'UPDATE shard SET stats = stats || \'{"seconds": 100, "pictures": 1}\' RETURNING id'
    rows(settings, stats)
    with open_session(settings) as session:
        newer = model_row(session, 1)
    tasks = settings.model_copy(update={"scoring_tasks": 8, "worker_cost_per_hour": 36})
    found, _ = surveyed(kind="rescore", model=newer, settings=tasks)
    assert (found.seconds, found.cost) == (400.0, 4.0)


def test_the_oldest_come_first_and_the_rest_wait(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    for number in range(5):
        upload(storage, settings, **{f"n{number}": b"x"})
    capped = settings.model_copy(update={"run_images": 3})
    made = plan(settings=capped)
    assert (made.planned, made.left_over) == (3, 2)
    planned = "SELECT u.key FROM shard s JOIN upload u ON u.id = ANY(s.upload_ids)"
    oldest = rows(settings, "SELECT key FROM upload ORDER BY uploaded_at, id LIMIT 3")
    assert sorted(rows(settings, planned)) == sorted(oldest)


def test_a_limit_below_the_cap_holds(plan: Planned, settings: Settings, storage: Storage) -> None:
    upload(storage, settings, **{f"n{number}": b"x" for number in range(5)})
    made = plan(limit=2)
    assert (made.planned, made.left_over) == (2, 3)
    assert plan(limit=0).shard_ids == []


def test_planning_a_run_again_gives_the_plan_that_was_made(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"x")
    first = plan(run_id="night")
    upload(storage, settings, b=b"x")
    again = plan(run_id="night")
    assert again == first
    assert again.planned == 1


def test_two_attempts_at_once_have_one_plan(
    surveyed: Surveyed, champion: ModelVersion, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"x")
    found, sources = surveyed()

    def attempt() -> Plan:
        with open_session(settings) as session:
            return open_run(found, champion, sources, settings, session, run_id="night")

    with ThreadPoolExecutor(1) as pool:
        with open_session(settings) as session:
            first = open_run(found, champion, sources, settings, session, run_id="night")
            second = pool.submit(attempt)
            # Until it waits for the first.
            waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
            while not (second.done() or rows(settings, waits)):
                time.sleep(0.01)
        assert second.result(10) == first
    assert count(settings, "scoring_run") == 1


def test_a_run_that_has_ended_is_not_planned_anew(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    made = plan(run_id="night")
    score_all(made, settings, storage, engine)
    finish_run("night", settings)
    upload(storage, settings, b=picture(1))
    with pytest.raises(TerminalError, match="trigger a new one") as caught:
        plan(run_id="night")
    assert caught.value.reason == "RUN_ENDED"
    # As after single tasks were cleared.
    score_all(made, settings, storage, engine)
    assert finish_run("night", settings).scored == 1


def test_a_run_takes_no_more_than_was_asked_about(
    surveyed: Surveyed, settings: Settings, storage: Storage
) -> None:
    few = settings.model_copy(update={"confirm_images": 3})

    def planned(before: int, meanwhile: int, name: str, *, agreed: bool = False) -> int:
        upload(storage, settings, **{f"{name}{number}": b"x" for number in range(before)})
        found = stages.survey_uploads(few)
        assert found["confirm"] == (found["planned"] > 3)
        upload(storage, settings, **{f"{name}-{number}": b"x" for number in range(meanwhile)})
        surveyed()
        limit = found["planned"] if agreed else None
        return int(stages.plan_scoring(few, found, limit=limit)["planned"])

    assert planned(2, 4, "a") == 3, "nobody was asked"
    # Two, four and one.
    assert planned(1, 4, "b", agreed=True) == 7, "somebody agreed to seven"
    assert planned(1, 4, "c") == 3, "nobody answered"


def test_a_bucket_by_hand_is_planned_whatever_other_surveys_say_meanwhile(
    surveyed: Surveyed, champion: ModelVersion, settings: Settings, storage: Storage
) -> None:
    storage.ensure_bucket("another-bucket")
    for number in range(3):
        storage.put("another-bucket", f"{number}.jpg", b"x")
    capped = settings.model_copy(update={"run_images": 2})
    found = stages.survey_uploads(capped, bucket="another-bucket")
    assert "no nightly run takes those of s3://another-bucket/, trigger this again" in found["text"]
    surveyed()
    made = stages.plan_scoring(capped, found, bucket="another-bucket")
    assert (made["planned"], made["left_over"]) == (2, 1)
    with pytest.raises(FailureBudgetError):
        stages.finish_scoring(settings, made["run_id"])
    with open_session(settings) as session:
        assert "left for the next run by hand" in run_page(session, made["run_id"])


def test_what_a_run_by_hand_leaves_over_is_said_to_wait_for_another(settings: Settings) -> None:
    summary = {"scored": 1, "quarantined": 0, "reasons": {}, "detections": 0, "stats": None}
    left = summary | {"left_over": 7, "by_hand": ["s3://b/x/"]}
    assert "7 left: no nightly run takes those of s3://b/x/, trigger this again." in run_text(left)
    assert "7 left for the next run." in run_text(left | {"by_hand": []})


def test_a_prefix_of_a_configured_source_is_of_the_night(
    surveyed: Surveyed, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    bucket = settings.uploads_bucket
    path.write_text(f"buckets: [{{bucket: {bucket}, prefix: a/}}]")
    configured = settings.model_copy(update={"sources_file": path})

    def by_hand(prefix: str) -> list[str]:
        return surveyed(settings=configured, bucket=bucket, prefix=prefix)[0].by_hand

    assert by_hand("") == by_hand("a/b/") == []
    assert by_hand("b/") == [f"s3://{bucket}/b/"]


def test_patterns_hold_below_a_prefix_that_is_shorter_than_those_of_the_sources(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: frames/a/, exclude: ['*/thumbnails/*']}}, "
        f"{{bucket: {bucket}, prefix: frames/b/, include: ['*/photo*']}}]"
    )
    wanted = ["frames/a/1", "frames/b/photo", "frames/c/thumbnails/1"]
    for name in (*wanted, "frames/a/thumbnails/1", "frames/b/1", "others/1"):
        upload(storage, settings, **{name: b"x"})
    configured = settings.model_copy(update={"sources_file": path})
    assert plan(settings=configured, bucket=bucket, prefix="frames").planned == 3
    noted = rows(settings, "SELECT key FROM upload ORDER BY key")
    assert noted == [(f"{name}.jpg",) for name in wanted]
    # All of them were scored before the file was as it is.
    score_all(plan(), settings, storage, engine)
    with open_session(settings) as session:
        newer = model_row(session, 1)
    scope = {"settings": configured, "bucket": bucket, "prefix": "frames"}
    assert plan(kind="rescore", model=newer, **scope).planned == 3


def test_a_run_that_would_lose_what_the_champion_finds_is_not_opened(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"x")
    with pytest.raises(SettingsError, match=r"0\.5, is below GUN_DETECTION_SCORE_FLOOR \(0\.6\)"):
        plan(settings=settings.model_copy(update={"score_floor": 0.6}))
    assert count(settings, "scoring_run") == 0
    assert plan().planned == 1


def test_a_prefix_is_taken_literally(plan: Planned, settings: Settings, storage: Storage) -> None:
    upload(storage, settings, **{"a%/x": b"1", "ab/x": b"2", "a_/x": b"3"})
    assert plan(prefix="a%/", bucket=settings.uploads_bucket).planned == 1
    assert plan(prefix="a_/", bucket=settings.uploads_bucket).planned == 1


def test_a_missing_bucket_is_named(plan: Planned) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        plan(bucket="no-such-bucket")


def test_a_name_that_no_bucket_can_have_is_a_mistake_and_not_tried_again(
    surveyed: Surveyed, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="Bad Bucket"):
        surveyed(bucket="Bad Bucket")
    with pytest.raises(SettingsError, match="Bad Bucket"):
        surveyed(kind="rescore", bucket="Bad Bucket")
    upload(storage, settings, a=b"x")
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: Bad Bucket}}, {{bucket: {settings.uploads_bucket}}}]")
    found, _ = surveyed(settings=settings.model_copy(update={"sources_file": path}))
    assert (found.planned, list(found.unlisted)) == (1, ["s3://Bad Bucket/"])


def test_history_of_a_bucket_is_looked_for_where_it_is_or_was(
    surveyed: Surveyed, settings: Settings, storage: Storage
) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        surveyed(kind="rescore", bucket="no-such-bucket")
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        stages.survey_uploads(settings, "rescore", "no-such-bucket", "a/")
    storage.ensure_bucket("another-bucket")
    assert surveyed(kind="rescore", bucket="another-bucket")[0].planned == 0
    upload(storage, settings, a=b"x")
    surveyed()
    rows(settings, "UPDATE upload SET bucket = 'gone-bucket' RETURNING id")
    assert surveyed(kind="rescore", bucket="gone-bucket")[0].planned == 0


def test_what_waits_is_scored_while_nothing_can_be_listed(
    surveyed: Surveyed,
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
) -> None:
    upload(storage, settings, a=picture())
    surveyed()
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(f"buckets: [{{bucket: {bucket}, inventory: 's3://{bucket}/list.csv'}}]")
    storage.put(bucket, "list.csv", b"words")
    damaged = settings.model_copy(update={"sources_file": path})
    made = plan(settings=damaged)
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}
    with pytest.raises(FailureBudgetError, match=r"list\.csv") as caught:
        finish_run(made.run_id, settings)
    assert caught.value.reason == "NOT_LISTED"
    with pytest.raises(SettingsError, match=r"list\.csv"):
        surveyed(settings=damaged)


@pytest.mark.parametrize(
    ("error", "own", "planned"),
    [
        (SettingsError("access denied"), False, 2),
        # Nothing could be read either: the survey is to be tried again.
        (ServiceUnavailableError("away"), False, None),
        # Whoever named it wants to know at once.
        (SettingsError("access denied"), True, None),
    ],
)
def test_what_waits_is_planned_without_a_listing_only_where_that_helps(
    surveyed: Surveyed,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    error: GunDetectionError,
    own: bool,
    planned: int | None,
) -> None:
    storage.ensure_bucket("another-bucket")
    bucket = "another-bucket" if own else settings.uploads_bucket
    for number in range(2):
        storage.put(bucket, f"{number}.jpg", b"x")
    asked = bucket if own else None
    assert surveyed(bucket=asked)[0].planned == 2
    monkeypatch.setattr(storage, "list_objects", Mock(side_effect=error))
    if planned is None:
        with pytest.raises(type(error), match=error.message):
            surveyed(bucket=asked)
    else:
        found, _ = surveyed(bucket=asked)
        assert (found.planned, found.unlisted) == (planned, {f"s3://{bucket}/": error.message})


@pytest.fixture
def two_sources(settings: Settings, storage: Storage, tmp_path: Path) -> Settings:
    """The first has an inventory, the second an upload."""
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: a/, inventory: 's3://{bucket}/list.csv'}}, "
        f"{{bucket: {bucket}, prefix: b/}}]"
    )
    upload(storage, settings, **{"b/1": b"x"})
    return settings.model_copy(update={"sources_file": path})


def test_a_full_disk_at_one_source_keeps_no_other_waiting(
    surveyed: Surveyed,
    settings: Settings,
    two_sources: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = settings.uploads_bucket
    full = OSError(errno.ENOSPC, "No space left on device", "/somewhere")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", Mock(side_effect=full))
    found, sources = surveyed(settings=two_sources)
    assert found.planned == 1
    assert list(found.unlisted) == [f"s3://{bucket}/a/"]
    assert "the disk is full at /somewhere" in found.unlisted[f"s3://{bucket}/a/"]
    assert two_sources.sources_file is not None
    two_sources.sources_file.write_text(f"buckets: [{sources[0].model_dump_json()}]")
    with pytest.raises(TransientError, match="the disk is full"):
        surveyed(settings=two_sources)


def test_whatever_is_wrong_with_one_source_keeps_no_other_waiting(
    surveyed: Surveyed,
    settings: Settings,
    storage: Storage,
    two_sources: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = settings.uploads_bucket
    nobody = RuntimeError("that nobody thought of")
    monkeypatch.setattr(listing, "read_inventory", Mock(side_effect=nobody))
    storage.put(bucket, "list.csv", b"key")
    found, _ = surveyed(settings=two_sources)
    assert found.planned == 1
    assert "that nobody thought of" in found.unlisted[f"s3://{bucket}/a/"]


def test_what_no_source_covers_is_not_late_where_none_can_be_listed(
    surveyed: Surveyed, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    upload(storage, settings, **{"old/1": b"x"})
    surveyed()
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: new/, inventory: 's3://{bucket}/lists/'}}]"
    )
    with pytest.raises(NotFoundError, match="no complete inventory"):
        surveyed(settings=settings.model_copy(update={"sources_file": path}))
    assert rows(settings, "SELECT unscored FROM scoring_freshness WHERE unscored > 0") == []


def test_each_bucket_has_its_own_cap(
    plan: Planned, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    bucket = settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: a/, images_per_run: 1}}, "
        f"{{bucket: {bucket}, prefix: b/}}]"
    )
    upload(storage, settings, **{f"{name}/{n}": b"x" for name in "ab" for n in range(3)})
    made = plan(settings=settings.model_copy(update={"sources_file": path}))
    assert (made.planned, made.left_over) == (4, 2)


def test_sources_take_turns_where_a_run_has_no_room_for_all(
    plan: Planned, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: old/}}, {{bucket: {bucket}, prefix: live/}}]"
    )
    upload(storage, settings, **{f"old/{n}": b"x" for n in range(9)}, **{"live/0": b"x"})
    made = plan(settings=settings.model_copy(update={"sources_file": path, "run_images": 3}))
    assert keys_of(made, settings) == ["live/0.jpg", "old/0.jpg", "old/1.jpg"]


def test_what_was_tried_before_has_its_turn_whatever_is_new(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"tried{n}": b"x" for n in range(3)})
    give_up(claim_shard(plan().shard_ids[0], settings), settings)
    upload(storage, settings, **{f"new{n:02}": b"x" for n in range(30)})
    capped = settings.model_copy(update={"run_images": 22})
    keys = keys_of(plan(settings=capped), settings)
    assert [key for key in keys if "tried" in key] == ["tried0.jpg", "tried1.jpg"]
    assert len(keys) == 22
    # Nobody else needs the room.
    assert len(keys_of(plan(settings=settings, prefix="tried"), settings)) == 3


def test_history_is_of_each_source_as_much_and_of_what_its_patterns_let_through(
    plan: Planned,
    surveyed: Surveyed,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
) -> None:
    names = ("north/1", "north/2", "south/1", "south/2", "south/3", "south/thumb_4")
    for number, name in enumerate(names):
        upload(storage, settings, **{name: picture(number)})
        score_all(plan(), settings, storage, engine)
    path, bucket = tmp_path / "sources.yaml", settings.uploads_bucket
    path.write_text(
        f"buckets: [{{bucket: {bucket}, prefix: north/, include: ['*.jpg']}}, "
        f"{{bucket: {bucket}, prefix: south/, exclude: ['*/thumb_*']}}]"
    )
    configured = settings.model_copy(update={"sources_file": path, "rescore_images": 3})
    with open_session(settings) as session:
        newer = model_row(session, 1)
    found, _ = surveyed(kind="rescore", model=newer, settings=configured)
    assert (found.outdated, found.planned, found.left_over) == (5, 3, 2)
    made = plan(kind="rescore", model=newer, settings=configured)
    assert keys_of(made, settings) == ["north/2.jpg", "south/2.jpg", "south/3.jpg"]


def test_history_is_scored_again_only_where_another_model_did(
    plan: Planned,
    surveyed: Surveyed,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    upload(storage, settings, a=picture(), b=picture(1))
    score_all(plan(), settings, storage, engine)
    upload(storage, settings, c=picture(2))
    with open_session(settings) as session:
        newer = model_row(session, 1)
    found, _ = surveyed(kind="rescore", model=newer)
    assert (found.outdated, found.planned, found.listed) == (2, 2, None)
    assert plan(model=newer).planned == 1, "what is new is no history"
    capped = settings.model_copy(update={"rescore_images": 1})
    made = plan(kind="rescore", model=newer, settings=capped)
    newest = "SELECT MAX(upload_id) FROM ledger"
    planned = "SELECT upload_ids[1] FROM shard WHERE run_id = :run"
    assert rows(settings, planned, run=made.run_id) == rows(settings, newest)
    score_all(made, settings, storage, engine)
    score_all(plan(kind="rescore", model=newer), settings, storage, engine)
    assert plan(kind="rescore", model=newer).planned == 0
    assert rows(settings, "SELECT COUNT(*), COUNT(DISTINCT model_id) FROM ledger") == [(4, 2)]
    assert outcomes(settings) == {"a": "scored", "b": "scored"}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1] * 7, [3, 3, 1]),
        # One of 4 MiB fills a shard of 1 MiB by itself.
        ([4 * 2**20, 1, 1], [1, 2]),
        ([2**19] * 4, [2, 2]),
        # No more than four shards: each takes more.
        ([1] * 40, [10, 10, 10, 10]),
        # Two are scored at the same time.
        ([0] * 3, [2, 1]),
        ([0], [1]),
    ],
)
def test_shards_are_of_like_work(sizes: list[int], expected: list[int]) -> None:
    settings = Settings(shard_images=3, shard_mb=1, max_shards=4)
    uploads = list(enumerate(sizes))
    shards = cut(uploads, settings)
    assert [len(shard) for shard in shards] == expected
    assert [upload for shard in shards for upload in shard] == uploads


@pytest.mark.parametrize(("pictures", "expected"), [(10, [10]), (60, [30, 30]), (150, [75, 75])])
def test_a_shard_is_worth_its_start(pictures: int, expected: list[int]) -> None:
    settings = Settings(shard_images=100, scoring_tasks=2)
    assert [len(shard) for shard in cut([(n, 0) for n in range(pictures)], settings)] == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, [100] * 10),
        # Ten minutes a shard: they do not shrink.
        (6.0, [100] * 10),
        # Five minutes are 300 pictures.
        (1.0, [300, 300, 300, 100]),
        # At least two, which are scored at the same time.
        (0.001, [500, 500]),
        (0.0, [100] * 10),
    ],
)
def test_shards_grow_where_pictures_are_quick(seconds: float | None, expected: list[int]) -> None:
    settings = Settings(shard_images=100, scoring_tasks=2, shard_minutes=5)
    uploads = [(n, 0) for n in range(1000)]
    assert [len(shard) for shard in cut(uploads, settings, seconds)] == expected
    assert cut([], settings, seconds) == []


def test_shards_grow_only_so_far() -> None:
    settings = Settings(shard_images=10, scoring_tasks=1, shard_minutes=5)
    shards = cut([(n, 0) for n in range(1000)], settings, 1e-6)
    assert [len(shard) for shard in shards] == [200] * 5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40.4, "40 s"), (119, "119 s"), (300, "5 min"), (12_000, "3 h 20 min"), (300_000, "3 d 11 h")],
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert duration(seconds) == words
