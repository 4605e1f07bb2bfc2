"""New uploads are told of once they are noted, until it is known that the news arrived."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.scoring import watch
from gun_detection.scoring.plan import Plan
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


def test_a_source_can_be_left_unwatched(
    champion: object, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    upload(storage, settings, a=b"1")
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: {settings.uploads_bucket}, watch: false}}]")
    assert look(settings.model_copy(update={"sources_file": path})) is None
