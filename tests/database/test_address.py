import os
import socket

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from gun_detection import database
from gun_detection.database import open_engine, open_session
from gun_detection.database.copying import copy_rows
from gun_detection.errors import ServiceUnavailableError, SettingsError
from gun_detection.settings import Settings, load_settings


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_any_scheme_of_postgresql_gets_the_driver_that_copies(
    settings: Settings, scheme: str
) -> None:
    assert settings.database_url is not None
    _, _, rest = settings.database_url.get_secret_value().partition("://")
    other = settings.model_copy(update={"database_url": SecretStr(f"{scheme}://{rest}")})
    with open_session(other) as session:
        copy_rows(session, "upload", ("key",), [])


_READ = "%40, %3A and %2F"
_OPTION = "sslmode=require"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("words", _READ),
        ("mysql://u:secret@host/d", _READ),
        ("postgresql://u:se@cret@127.0.0.1:9/d", _READ),
        ("postgresql://u:p@ss:secret@127.0.0.1:9/d", _READ),
        ("postgresql://u:p@secret/x@127.0.0.1:9/d", _READ),
        ("postgresql://u:p@secret:1,x:2@127.0.0.1:9/d", _READ),
        ("postgresql://u:secret@h:1,[::1]:2/d", _READ),
        # Options of other drivers.
        ("postgresql+asyncpg://u:secret@127.0.0.1:9/d?ssl=require", _OPTION),
        ("postgresql://u:12/x?secret=secret", _OPTION),
        ("postgresql://u:secret@h:1,i:2/d?port=secret", _OPTION),
    ],
)
def test_a_url_that_cannot_be_used_says_how_to_write_it_and_nothing_of_it(
    url: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_DATABASE_URL", url)
    with pytest.raises(SettingsError, match=remedy) as caught, open_session(load_settings()):
        pass
    assert "cret" not in caught.value.message
    assert caught.value.__suppress_context__


def test_what_the_url_sets_stays(settings: Settings) -> None:
    assert settings.database_url is not None
    address = settings.database_url.get_secret_value()
    options = "-csearch_path%3Dguns%20-c%20tcp_keepalives_idle%3D600"
    query = f"options={options}&connect_timeout=3&application_name=night&keepalives_idle=500"
    other = settings.model_copy(update={"database_url": SecretStr(f"{address}?{query}")})
    with open_session(other, check_schema=False) as session:
        for name, value in (
            ("search_path", "guns"),
            ("timezone", "UTC"),
            ("application_name", "night"),
            ("tcp_keepalives_idle", "600"),
            ("tcp_keepalives_count", "3"),
        ):
            assert session.scalar(text(f"SHOW {name}")) == value
    arguments = database._engine(f"{address}?{query}").url.query
    assert arguments["connect_timeout"] == "3"
    assert arguments["keepalives_idle"] == "500"
    assert database._engine(address).url.query["connect_timeout"] == "10"


def test_a_machine_that_dies_is_noticed_within_a_minute(settings: Settings) -> None:
    names = [f"tcp_keepalives_{part}" for part in ("idle", "interval", "count")]
    with open_engine(settings).connect() as connection:
        connection.rollback()
        # By the server.
        shown = [connection.scalar(text(f"SHOW {name}")) for name in [*names, "tcp_user_timeout"]]
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as client:
            of_client = [
                client.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            ]
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert shown == ["30", "10", "3", "60000"]
    assert of_client == [30, 10, 3, 60_000]


def test_a_pooler_is_asked_for_nothing_that_it_cannot_keep(settings: Settings) -> None:
    # PgBouncer refuses a connection with any other option than these few.
    assert open_engine(settings).url.query["options"] == "-c timezone=UTC"


def test_the_host_that_takes_writes_is_found_among_several(settings: Settings) -> None:
    assert settings.database_url is not None
    address = settings.database_url.get_secret_value()
    several = address.replace("@", "@127.0.0.1:9,") + "?target_session_attrs=read-write"
    other = settings.model_copy(update={"database_url": SecretStr(several)})
    with open_session(other) as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_several_servers_that_are_down_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUN_DETECTION_DATABASE_URL", "postgres://u:se,cr:1@127.0.0.1:9,localhost/d")
    with (
        pytest.raises(ServiceUnavailableError, match=r"at 127\.0\.0\.1:9, localhost ") as caught,
        open_session(load_settings()),
    ):
        pass
    assert "se,cr" not in caught.value.message
