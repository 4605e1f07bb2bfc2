import os
import stat
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest

from embedded import postgres
from embedded.config import HOST, PlatformError
from embedded.postgres import PostgresServer
from tests.conftest import Servers


@pytest.fixture
def stopped(tmp_path: Path) -> PostgresServer:
    """A cluster that nothing runs; only its files matter."""
    server = PostgresServer(tmp_path, 5433, "secret", None)
    server.data.mkdir()
    (server.data / "PG_VERSION").write_text("18\n")
    return server


def _connect(servers: Servers, role: str, password: str, database: str) -> None:
    psycopg2.connect(
        host=HOST, port=servers.postgres.port, user=role, password=password, dbname=database
    ).close()


def test_a_database_is_made_once_and_its_password_can_change(servers: Servers) -> None:
    postgres.create_database(servers.postgres, "twice", "first")
    postgres.create_database(servers.postgres, "twice", "it's second")
    _connect(servers, "twice", "it's second", "twice")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        _connect(servers, "twice", "first", "twice")


def test_a_role_does_not_enter_the_database_of_another(servers: Servers) -> None:
    postgres.create_database(servers.postgres, "mine", "mine")
    postgres.create_database(servers.postgres, "yours", "yours")
    with pytest.raises(psycopg2.OperationalError, match="permission denied"):
        _connect(servers, "mine", "mine", "yours")


def test_passwords_are_stored_as_scram(servers: Servers) -> None:
    with postgres.administer(servers.postgres) as cursor:
        cursor.execute("SELECT rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL")
        assert all(password.startswith("SCRAM-SHA-256") for (password,) in cursor.fetchall())


def test_an_existing_cluster_is_kept(servers: Servers) -> None:
    assert postgres.create_cluster(servers.postgres) is False


def test_a_cluster_of_another_version_is_refused(stopped: PostgresServer) -> None:
    (stopped.data / "PG_VERSION").write_text("17\n")
    with pytest.raises(PlatformError, match="made by PostgreSQL 17"):
        postgres.create_cluster(stopped)


def test_an_interrupted_initialisation_is_made_again(servers: Servers, tmp_path: Path) -> None:
    folder = servers.postgres.folder.parent / "interrupted"
    server = replace(servers.postgres, folder=folder)
    postgres.prepare_folder(server)
    (folder / "data.new").mkdir()
    (folder / "data.new" / "half").touch()
    assert postgres.create_cluster(server) is True
    assert not (folder / "data.new").exists()
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700


@pytest.mark.parametrize("content", ["", "not a number\n", "{mine}\n", "4194305\n"])
def test_a_lock_of_no_postgres_is_removed(stopped: PostgresServer, content: str) -> None:
    lock = stopped.data / "postmaster.pid"
    lock.write_text(content.format(mine=os.getpid()))
    postgres.remove_stale_lock(stopped)
    assert not lock.exists()


def test_the_lock_of_a_running_server_stays(servers: Servers) -> None:
    postgres.remove_stale_lock(servers.postgres)
    assert (servers.postgres.data / "postmaster.pid").exists()


def test_a_stopped_server_does_not_answer(servers: Servers, stopped: PostgresServer) -> None:
    assert postgres.answers(servers.postgres)
    assert not postgres.answers(replace(stopped, port=1))


def test_user_of_the_cluster_reaches_it_whatever_the_umask(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path / "made" / "one", 5433, "secret", None)

    def modes() -> list[int]:
        before = os.umask(0o077)
        try:
            postgres.prepare_folder(server)
        finally:
            os.umask(before)
        return [stat.S_IMODE(path.stat().st_mode) for path in (server.folder.parent, server.folder)]

    assert modes() == [0o711, 0o700]
    # What somebody else made is left as it is.
    server.folder.parent.chmod(0o750)
    assert modes() == [0o750, 0o700]


def test_programs_are_copied_where_the_user_cannot_reach_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PostgresServer(tmp_path, 5433, "secret", (os.geteuid(), os.getegid()))
    monkeypatch.setattr(postgres, "_everybody_reaches", lambda _: False)
    folder = postgres.binaries(server)
    assert folder == tmp_path / "programs" / "bin"
    assert os.access(folder / "postgres", os.X_OK)
    assert postgres.binaries(server) == folder


def test_a_closed_folder_on_the_way_is_seen(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "bin").mkdir(parents=True)
    closed.chmod(0o700)
    assert not postgres._everybody_reaches(closed / "bin")
    assert postgres._everybody_reaches(Path("/usr/bin"))
