"""New uploads are told of once they are noted, until it is known that the news arrived."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.errors import FailureBudgetError
from gun_detection.scoring import watch
from gun_detection.scoring.listing import _alone
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.quarantine import retry
from gun_detection.scoring.runs import finish_run
from gun_detection.scoring.watch import News, look, told
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import champion_after, picture, rows, score_all, upload, waiting
from tests.scoring.simulated import Simulated


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


def test_what_runs_have_taken_on_is_found_in_one_pass(
    plan: Any, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    plan()
    # Plans that go through all ids for each upload take a minute or more.
    arguments = {"buckets": [settings.uploads_bucket], "bucket": settings.uploads_bucket}
    with open_session(settings) as session:
        for statement in (
            """
            WITH noted AS (
                INSERT INTO upload (bucket, key, etag, size, uploaded_at)
                SELECT :bucket, 'k' || number, 'e', 1, now() FROM generate_series(1, 60000) number
                RETURNING id, bucket, key, size, uploaded_at
            )
            INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at)
            SELECT * FROM noted
            """,
            """
            INSERT INTO shard (run_id, number, upload_ids)
            SELECT r.id, 1 + u.id % 100, array_agg(u.id) FROM upload u, scoring_run r
            WHERE u.id <= 50000 GROUP BY 1, 2
            """,
            "ANALYZE upload, pending_upload, shard, scoring_run",
            "SET LOCAL work_mem = '64kB'",
            "SET LOCAL statement_timeout = '10s'",
        ):
            session.execute(text(statement), arguments)
        [row] = session.execute(text(watch._UNTOLD), arguments)
    assert (row.waiting, row.upto) == (10_001, 60_001)


def hours_pass(settings: Settings, hours: int, table: str, column: str) -> None:
    with open_session(settings) as session:
        session.execute(
            text(f"UPDATE {table} SET {column} = {column} - make_interval(hours => :hours)"),
            {"hours": hours},
        )


def fail(settings: Settings, run_id: str) -> None:
    """What ends a run none of whose shards was scored."""
    with pytest.raises(FailureBudgetError):
        finish_run(run_id, settings)


def test_what_a_run_failed_to_score_is_told_of_again_after_an_hour(
    plan: Any, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    news = look(settings)
    assert news is not None
    told(news, settings)
    plan(run_id="failed")
    upload(storage, settings, b=picture(1))
    news = look(settings)
    assert news is not None
    told(news, settings)
    score_all(plan(run_id="good", limit=0), settings, storage, engine)
    with open_session(settings) as session:
        session.execute(text("DELETE FROM pending_upload WHERE key = 'b.jpg'"))
    hours_pass(settings, 2, "upload_watch", "told_at")
    assert look(settings) is None, "a run has it"
    fail(settings, "failed")
    mark = rows(settings, "SELECT upload_id FROM upload_watch")
    news = look(settings)
    assert news is not None
    assert list(news.waiting.values()) == [1]
    told(news, settings)
    assert rows(settings, "SELECT upload_id FROM upload_watch") == mark, "b was told of"
    assert look(settings) is None
    hours_pass(settings, 2, "upload_watch", "told_at")
    plan(run_id="second")
    assert look(settings) is None, "another run has it"
    fail(settings, "second")
    assert waiting(settings) == 1
    for run_id in ("third", "fourth"):
        assert look(settings) is not None
        plan(run_id=run_id)
        fail(settings, run_id)
    assert look(settings) is None, "trying again and again does not help"
    hours_pass(settings, 25, "scoring_run", "finished_at")
    assert look(settings) is None, "it has become one for the nights"


def test_what_was_told_of_before_times_were_kept_is_told_of_when_it_failed(
    plan: Any, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    news = look(settings)
    assert news is not None
    told(news, settings)
    with open_session(settings) as session:
        session.execute(text("UPDATE upload_watch SET told_at = NULL"))
    assert look(settings) is None
    plan(run_id="failed")
    fail(settings, "failed")
    assert waiting(settings) == 1


def test_what_runs_have_no_room_for_waits_for_the_night(
    plan: Any, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture(1))
    news = look(settings)
    assert news is not None
    told(news, settings)
    score_all(plan(run_id="small", limit=1), settings, storage, engine)
    finish_run("small", settings)
    hours_pass(settings, 2, "upload_watch", "told_at")
    assert rows(settings, "SELECT COUNT(*) FROM pending_upload") == [(1,)]
    assert look(settings) is None


def test_what_a_run_did_judge_waits_for_the_next_when_it_is_to_be_judged_anew(
    plan: Any, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, words=b"words")
    news = look(settings)
    assert news is not None
    told(news, settings)
    score_all(plan(run_id="done"), settings, storage, engine)
    finish_run("done", settings)
    hours_pass(settings, 2, "upload_watch", "told_at")
    with open_session(settings) as session:
        assert retry(session, session.scalars(text("SELECT upload_id FROM quarantine")).all()) == 1
    assert look(settings) is None


def test_what_is_not_wanted_any_more_is_not_told_of_when_it_failed(
    plan: Any, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    plan(run_id="failed")
    fail(settings, "failed")
    with open_session(settings) as session:
        session.execute(text("UPDATE pending_upload SET wanted = false"))
    assert look(settings) is None


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


def test_a_source_that_cannot_be_looked_at_is_known_to_be_unseen(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    unseen = "SELECT source, looked_at IS NULL, message IS NULL FROM unseen_sources ORDER BY 1"
    path = tmp_path / "sources.yaml"
    path.write_text(
        f"buckets: [{{bucket: gone, prefix: a/}}, {{bucket: {settings.uploads_bucket}}}]"
    )
    both = settings.model_copy(update={"sources_file": path})
    look(both)
    assert rows(settings, unseen) == [("s3://gone/a/", True, False)]
    storage.ensure_bucket("gone")
    look(both)
    assert rows(settings, unseen) == []
    with open_session(settings) as session:
        session.execute(text("UPDATE source_look SET looked_at = now() - interval '2 h'"))
    assert [row[1:] for row in rows(settings, unseen)] == [(False, True)] * 2
    look(settings)
    assert rows(settings, unseen) == [], "one is not watched any more"
    with open_session(settings) as session:
        session.execute(text("UPDATE source_look SET looked_at = now() - interval '2 h'"))
    champion_after(settings)
    stages.survey_uploads(settings.model_copy(update={"watch_seconds": 0.0}))
    assert rows(settings, unseen) == [], "none is, as it was set"


def test_a_source_that_another_lists_was_not_looked_at(
    settings: Settings, storage: Storage
) -> None:
    state = "SELECT looked_at, message FROM source_look"
    unseen = "SELECT source, message FROM unseen_sources"
    with _alone(settings.uploads_bucket, settings, wait=True):
        look(settings)
        [(first, message)] = rows(settings, state)
        assert first is not None, "from when on nobody could look"
        assert message is None
        look(settings)
        assert rows(settings, state) == [(first, None)]
        assert rows(settings, unseen) == []
        hours_pass(settings, 2, "source_look", "looked_at")
        look(settings)
        assert rows(settings, unseen) == [(f"s3://{settings.uploads_bucket}/", None)]
        with open_session(settings) as session:
            session.execute(text("UPDATE source_look SET message = 'gone', looked_at = NULL"))
        look(settings)
        assert rows(settings, f"SELECT looked_at IS NULL, message FROM ({state}) s") == [
            (False, None)
        ], "who lists it can"
        hours_pass(settings, 2, "source_look", "looked_at")
    look(settings)
    assert rows(settings, unseen) == []


def test_what_nobody_ever_looked_at_is_unseen_an_hour_after_a_survey(
    champion: object, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    storage.ensure_bucket("nightly")
    path = tmp_path / "sources.yaml"
    path.write_text(
        f"buckets: [{{bucket: {settings.uploads_bucket}, prefix: a/}}, "
        "{bucket: nightly, watch: false}, "
        "{bucket: north, queue: 'http://127.0.0.1:9/q'}, "
        "{bucket: south, queue: 'http://127.0.0.1:9/q'}]"
    )
    several = settings.model_copy(update={"sources_file": path})
    names = [f"s3://{settings.uploads_bucket}/a/", "http://127.0.0.1:9/q"]
    unseen = "SELECT source FROM unseen_sources"

    def survey(settings: Settings) -> None:
        stages.survey_uploads(settings, bucket=settings.uploads_bucket, listing=False)

    survey(several)
    assert rows(settings, unseen) == []
    hours_pass(settings, 2, "source_look", "looked_at")
    survey(several)
    assert sorted(row[0] for row in rows(settings, unseen)) == sorted(names)
    look(several)
    assert rows(settings, f"{unseen} WHERE message IS NULL") == []
    assert sorted(row[0] for row in rows(settings, "SELECT source FROM source_look")) == sorted(
        names
    ), "they are called the same by both"
    survey(settings)
    assert rows(settings, "SELECT source FROM source_look") == [
        (f"s3://{settings.uploads_bucket}/",)
    ]
    survey(settings.model_copy(update={"watch_seconds": 0.0}))
    assert rows(settings, "SELECT source FROM source_look") == []


def test_a_source_can_be_left_unwatched(
    champion: object, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    upload(storage, settings, a=b"1")
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {settings.uploads_bucket}, watch: false}}]")
    assert look(settings.model_copy(update={"sources_file": path})) is None
