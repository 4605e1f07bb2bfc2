"""PostgreSQL through SQLAlchemy 2: sessions, schema check and migrations."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session

from gun_detection.database.address import parse_address
from gun_detection.errors import SchemaError, ServiceUnavailableError, SettingsError
from gun_detection.settings import Settings

_MIGRATIONS = Path(__file__).parent / "migrations"
# Serialization failure, deadlock, and the classes "connection", "resources", "intervention".
_TRANSIENT_STATES = ("40001", "40P01", "08", "53", "57")
_DISK_FULL = "53100"
_UPGRADE_LOCK = 0x67756E73
# What a machine that died held, as the lock of a listing, is free within a minute and not after the
# two hours of most systems, or the 15 minutes where it was to be sent something. What the address
# sets stays. By a statement, as PgBouncer refuses to connect with options that it cannot keep track
# of: https://www.pgbouncer.org/config.html, "ignore_startup_parameters".
_NOTICE_THE_DEAD = """
    SELECT set_config(name, value, false)
    FROM (VALUES ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'),
                 ('tcp_keepalives_count', '3'), ('tcp_user_timeout', '60000')
    ) AS wanted (name, value)
    JOIN pg_settings USING (name) WHERE source <> 'client'
"""


def open_engine(settings: Settings) -> Engine:
    """An engine for the library's database; connections are tested before use."""
    if settings.database_url is None:
        raise SettingsError(
            "GUN_DETECTION_DATABASE_URL is missing: set it to the PostgreSQL database, for example "
            "postgresql://user:password@host/gun_detection"
        )
    return _engine(settings.database_url.get_secret_value())


@lru_cache(maxsize=8)
def _engine(address: str) -> Engine:
    url = parse_address(address)
    engine = create_engine(url, pool_pre_ping=True)

    @event.listens_for(engine, "connect")
    def _have_the_dead_noticed(connection: DBAPIConnection, _: object) -> None:
        # In a transaction, a rollback would take it back.
        connection.autocommit = True
        with closing(connection.cursor()) as cursor:
            cursor.execute(_NOTICE_THE_DEAD)
        connection.autocommit = False

    @event.listens_for(engine, "handle_error")
    def _name_the_remedy(context: ExceptionContext) -> None:
        # Retrying is decided by type, so a lost server must not look like a programming error.
        original = context.original_exception
        # A stale connection of the pool is replaced without anyone noticing.
        if not context.is_pre_ping and _is_transient(original):
            full = getattr(original, "pgcode", None) == _DISK_FULL
            several = ", ".join(url.normalized_query.get("host", ()))
            where = several or f"{url.host or 'its socket'}:{url.port or 5432}"
            raise ServiceUnavailableError(
                f"PostgreSQL at {where} cannot be used now "
                f"({str(original).strip().splitlines()[0]})"
                + (": free some space on its disk; what was stored stays" if full else "")
            ) from original

    return engine


def _is_transient(error: object) -> bool:
    state = getattr(error, "pgcode", None)
    if state is not None:
        return str(state).startswith(_TRANSIENT_STATES)
    # libpq gives no code when the connection itself is refused or lost.
    return type(error).__name__ in {"OperationalError", "InterfaceError"}


@contextmanager
def open_session(settings: Settings, *, check_schema: bool = True) -> Iterator[Session]:
    """A session whose block is one unit of work: committed at its end, rolled back on an error.

    Raises `SchemaError` when the schema is not the one that this code needs and
    `ServiceUnavailableError` when the server cannot be reached.
    """
    engine = open_engine(settings)
    if check_schema:
        _check_schema_once(engine)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


_checked: set[str] = set()


def _check_schema_once(engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=True)
    if url not in _checked:
        with engine.connect() as connection:
            require_current_schema(connection)
        _checked.add(url)


def require_current_schema(connection: Connection) -> None:
    """Raise `SchemaError` unless the database stands at this code's newest migration."""
    found = MigrationContext.configure(connection).get_current_revision()
    head = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    if found == head:
        return
    known = {script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}
    if found is None or found in known:
        raise SchemaError(
            f"the database schema is behind (at {found or 'nothing'}, needs {head}): "
            "run `gun-detection db upgrade`"
        )
    raise SchemaError(
        f"the database schema is at {found}, which this version does not know: "
        "install the version of gun-detection that made it, or a newer one"
    )


def upgrade(settings: Settings) -> tuple[str | None, str]:
    """Migrate the database to the newest schema; (revision before, revision after).

    Safe to call at the same time from several processes: they take turns.
    """
    with open_engine(settings).begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        before = MigrationContext.configure(connection).get_current_revision()
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        after = MigrationContext.configure(connection).get_current_revision()
    assert after is not None
    return before, after


__all__ = [
    "open_engine",
    "open_session",
    "require_current_schema",
    "upgrade",
]
