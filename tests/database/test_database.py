import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from gun_detection import database
from gun_detection.database import open_engine, open_session, upgrade
from gun_detection.database.models import Base
from gun_detection.errors import SchemaError, ServiceUnavailableError, SettingsError
from gun_detection.release.verdict import Verdict
from gun_detection.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _check_again() -> Iterator[None]:
    database._checked.clear()
    yield
    database._checked.clear()


def test_the_migrations_make_the_tables_of_the_models(settings: Settings) -> None:
    with open_engine(settings).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_upgrading_again_changes_nothing(settings: Settings) -> None:
    before, after = upgrade(settings)
    assert before == after


@contextmanager
def migrated_to(revision: str, settings: Settings) -> Iterator[tuple[Connection, Config]]:
    """A schema of its own as a former version left it, to be migrated further."""
    with open_engine(settings).begin() as connection:
        connection.execute(text("CREATE SCHEMA old"))
        connection.execute(text("SET LOCAL search_path TO old"))
        config = Config()
        config.set_main_option("script_location", str(database._MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        yield connection, config
        connection.execute(text("DROP SCHEMA old CASCADE"))


def test_decisions_of_the_first_gate_are_read_as_those_of_today(settings: Settings) -> None:
    with migrated_to("0002", settings) as (connection, config):
        connection.execute(
            text(
                "INSERT INTO model_version (id, architecture, config, config_hash, code_version, "
                "weights_key, weights_sha256, threshold, training) "
                "VALUES ('m', '', '{}', '', '', '', '', 0.5, '{}')"
            )
        )
        rules = [
            {"name": "AP50 floor", "value": 0.5, "limit": 0.3, "passed": True},
            {"name": "AP50 of the champion", "value": None, "limit": 0.6, "passed": False},
        ]
        connection.execute(
            text(
                "INSERT INTO gate_decision (candidate_id, holdout_id, passed, rules) "
                "VALUES ('m', 'h', false, CAST(:rules AS jsonb))"
            ),
            {"rules": json.dumps(rules)},
        )
        command.upgrade(config, "head")
        [stored] = connection.scalars(text("SELECT rules FROM gate_decision"))
    assert [str(Verdict.model_validate(rule)) for rule in stored] == [
        "AP50 floor: 0.500 (at least 0.300) passed",
        "AP50 of the champion: nothing measured (at least 0.600) FAILED",
    ]


def test_what_waits_to_be_judged_anew_is_deferred_from_the_start(settings: Settings) -> None:
    with migrated_to("0006", settings) as (connection, config):
        connection.execute(text(_JUDGED_BEFORE))
        command.upgrade(config, "head")
        waiting = text("SELECT key, deferred FROM pending_upload ORDER BY key")
        found = connection.execute(waiting).all()
    assert found == [("judged", True), ("new", False)]


_JUDGED_BEFORE = """
    INSERT INTO model_version (id, architecture, config, config_hash, code_version,
                               weights_key, weights_sha256, threshold, training)
    VALUES ('m', '', '{}', '', '', '', '', 0.5, '{}');
    INSERT INTO scoring_run (id, model_id, bucket, prefix, threshold, planned, left_over)
    VALUES ('r', 'm', '', '', 0.5, 1, 0);
    INSERT INTO shard (run_id, number, upload_ids) VALUES ('r', 0, '{1}');
    INSERT INTO upload (bucket, key, etag, size, uploaded_at)
    VALUES ('b', 'judged', '', 1, now()), ('b', 'new', '', 1, now());
    INSERT INTO ledger (upload_id, model_id, run_id, shard_id, attempt, outcome, reason, stale)
    VALUES (1, 'm', 'r', 1, 1, 'quarantined', 'CRASHED', true);
"""


def test_what_waited_when_a_flag_said_so_waits_on(settings: Settings) -> None:
    with migrated_to("0008", settings) as (connection, config):
        connection.execute(
            text(
                """
                INSERT INTO upload (bucket, key, etag, size, uploaded_at,
                                    current, pending, wanted, deferred)
                VALUES ('b', 'new', '1', 7, '2026-01-01Z', true, true, true, false),
                       ('b', 'tried', '2', 8, '2026-01-02Z', true, true, true, true),
                       ('b', 'unwanted', '3', 9, '2026-01-03Z', true, true, false, false),
                       ('b', 'scored', '4', 1, '2026-01-04Z', true, false, true, false),
                       ('b', 'past', '5', 1, '2026-01-05Z', false, false, true, false)
                """
            )
        )
        command.upgrade(config, "head")
        waiting = connection.execute(
            text(
                "SELECT p.bucket, p.key, p.size, p.uploaded_at = u.uploaded_at, wanted, deferred "
                "FROM pending_upload p JOIN upload u ON u.id = upload_id ORDER BY upload_id"
            )
        ).all()
        unscored = connection.scalars(text("SELECT key FROM unscored_uploads ORDER BY key")).all()
        [fresh] = connection.execute(
            text("SELECT bucket, unscored, oldest_upload = '2026-01-01Z' FROM scoring_freshness")
        )
    assert waiting == [
        ("b", "new", 7, True, True, False),
        ("b", "tried", 8, True, True, True),
        ("b", "unwanted", 9, True, False, False),
    ]
    assert unscored == ["new", "tried"]
    assert fresh == ("b", 2, True)


def test_what_was_told_of_before_is_told_no_more(settings: Settings) -> None:
    with migrated_to("0010", settings) as (connection, config):
        connection.execute(text("INSERT INTO upload_watch (bucket, upload_id) VALUES ('b', 7)"))
        command.upgrade(config, "head")
        [kept] = connection.execute(text("SELECT bucket, upload_id, told_at FROM upload_watch"))
    assert kept == ("b", 7, None)


@pytest.mark.parametrize(
    ("revision", "remedy"),
    [(None, "gun-detection db upgrade"), ("9999", "install the version of gun-detection")],
)
def test_another_schema_is_refused_with_the_remedy(
    settings: Settings, revision: str | None, remedy: str
) -> None:
    with open_engine(settings).begin() as connection:
        connection.execute(text("DELETE FROM alembic_version"))
        if revision:
            connection.execute(text("INSERT INTO alembic_version VALUES (:r)"), {"r": revision})
    with pytest.raises(SchemaError, match=remedy), open_session(settings):
        pass


def test_without_a_database_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(SettingsError, match="GUN_DETECTION_DATABASE_URL"),
        open_session(load_settings()),
    ):
        pass


def test_a_server_that_is_down_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUN_DETECTION_DATABASE_URL", "postgresql+psycopg2://u:secret@127.0.0.1:9/d")
    with (
        pytest.raises(ServiceUnavailableError, match=r"127\.0\.0\.1:9") as caught,
        open_session(load_settings()),
    ):
        pass
    assert "secret" not in caught.value.message


def test_a_connection_that_breaks_is_transient_and_rolls_back(settings: Settings) -> None:
    def work() -> None:
        with open_session(settings) as session:
            session.execute(text("CREATE TABLE half_done ()"))
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(ServiceUnavailableError):
        work()
    with open_session(settings) as session:
        assert session.scalar(text("SELECT to_regclass('half_done')")) is None


def test_a_restarted_server_is_not_noticed_by_the_next_session(settings: Settings) -> None:
    with open_session(settings) as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
    # From outside the pool, so that only its idle connection is lost.
    assert settings.database_url is not None
    outside = create_engine(settings.database_url.get_secret_value(), poolclass=NullPool)
    with outside.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    with open_session(settings) as session:
        assert session.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("table", ["promotion", "review", "gate_decision", "approval"])
@pytest.mark.parametrize(
    "statement", ["DELETE FROM {}", "UPDATE {} SET id = DEFAULT", "TRUNCATE {} CASCADE"]
)
def test_history_cannot_be_changed(session: Session, table: str, statement: str) -> None:
    with pytest.raises(DBAPIError, match="append-only"), session.begin_nested():
        session.execute(text(statement.format(table)))


def test_an_empty_database_has_empty_views(session: Session) -> None:
    for view in (
        "current_champion",
        "champion_history",
        "model_states",
        "current_uploads",
        "current_outcomes",
        "current_detections",
        "unscored_uploads",
        "outdated_uploads",
        "scoring_freshness",
        "quarantine",
        "scoring_summary",
    ):
        assert session.execute(text(f"SELECT * FROM {view}")).all() == []
