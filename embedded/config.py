"""Where the platform keeps its state, which ports it takes and which credentials it made."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from base64 import urlsafe_b64encode
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from gun_detection.errors import TerminalError
from gun_detection.serving.keys import new_secret

REPOSITORY = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
USERS = {"admin": "admin", "operator": "op", "reviewer": "user", "viewer": "viewer"}
MINIMUM_FREE_BYTES = 2**30
# The kernel takes 107 bytes for the path of a socket; the supervisor adds its process id.
_LONGEST_SOCKET_PATH = 90
# Not `TMPDIR`: a shell with another one would find nothing that runs.
_SHORT_FOLDER = Path("/tmp")


class PlatformError(TerminalError):
    """The platform cannot be started or used as things are; the message says what to change."""

    default_reason = "PLATFORM"


@dataclass(frozen=True, slots=True)
class Ports:
    """One TCP port for everything that listens; `PLATFORM_<NAME>_PORT` moves one."""

    airflow: int = 8080
    airflow_logs: int = 8793
    tensorboard: int = 6006
    predict: int = 8000
    postgres: int = 5433
    s3: int = 8333
    s3_grpc: int = 18333
    seaweedfs_master: int = 8334
    seaweedfs_master_grpc: int = 18334
    seaweedfs_volume: int = 8335
    seaweedfs_volume_grpc: int = 18335
    seaweedfs_filer: int = 8336
    seaweedfs_filer_grpc: int = 18336
    seaweedfs_admin: int = 8337
    seaweedfs_admin_grpc: int = 18337

    @classmethod
    def choose(cls, remembered: dict[str, int]) -> Self:
        """The ports from the environment, else those used last time, else the defaults."""
        known = {item.name for item in fields(cls)}
        chosen = {name: port for name, port in remembered.items() if name in known}
        for name in known:
            if text := os.environ.get(port_variable(name)):
                chosen[name] = _port(port_variable(name), text)
        ports = cls(**chosen)
        owners: dict[int, str] = {}
        for name, port in asdict(ports).items():
            if port in owners:
                raise PlatformError(
                    f"port {port} is set for two things: change {port_variable(name)} "
                    f"or {port_variable(owners[port])}"
                )
            owners[port] = name
        return ports

    @classmethod
    def free(cls) -> Self:
        """Ports that nothing listens on now, below those that outgoing connections take."""
        found: set[int] = set()
        while len(found) < len(fields(cls)):
            port = 10000 + secrets.randbelow(20000)
            if port_is_free(port):
                found.add(port)
        return cls(*found)


def port_variable(name: str) -> str:
    return f"PLATFORM_{name.upper()}_PORT"


def _port(variable: str, text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise PlatformError(f"{variable} is {text!r}: set it to a port between 1 and 65535")
    return int(text)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do; a connection that is winding down does not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def check_port(name: str, port: int) -> None:
    """Raise `PlatformError` when another program has the port."""
    if not port_is_free(port):
        raise PlatformError(
            f"port {port} is taken: stop the program that listens there, "
            f"or set {port_variable(name)} to another port",
            reason="PORT_TAKEN",
        )


def _secret() -> str:
    return secrets.token_urlsafe(24)


def _signing_key() -> str:
    """As long as the hash that signs with it."""
    return secrets.token_urlsafe(64)


def _fernet_key() -> str:
    """32 bytes in the form that Fernet wants."""
    return urlsafe_b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class Credentials:
    """Every secret of one platform, made once; `identity` names it outside its state folder.

    `since` is when that was, as ISO 8601 has it.
    """

    identity: str = field(default_factory=lambda: secrets.token_hex(8))
    postgres_password: str = field(default_factory=_secret, repr=False)
    airflow_database_password: str = field(default_factory=_secret, repr=False)
    library_database_password: str = field(default_factory=_secret, repr=False)
    s3_access_key_id: str = field(default_factory=lambda: secrets.token_hex(10).upper())
    s3_secret_access_key: str = field(default_factory=_secret, repr=False)
    fernet_key: str = field(default_factory=_fernet_key, repr=False)
    jwt_secret: str = field(default_factory=_signing_key, repr=False)
    api_secret_key: str = field(default_factory=_signing_key, repr=False)
    predict_key: str = field(default_factory=new_secret, repr=False)
    passwords: dict[str, str] = field(
        default_factory=lambda: {user: _secret() for user in USERS}, repr=False
    )
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True, slots=True)
class Platform:
    """One platform: its folder, ports and credentials."""

    directory: Path
    ports: Ports
    credentials: Credentials

    @property
    def airflow_home(self) -> Path:
        return self.directory / "airflow"

    @property
    def library_home(self) -> Path:
        return self.directory / "home"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def services(self) -> Path:
        return self.directory / "services"

    @property
    def sockets(self) -> Path:
        """Folder for Unix sockets: a short path outside the state folder when that one is deep."""
        inside = self.directory / "run"
        if len(os.fsencode(inside / "supervisor.sock")) <= _LONGEST_SOCKET_PATH:
            return inside
        name = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        return _SHORT_FOLDER / f"gun-detection-{name}"

    @property
    def airflow_url(self) -> str:
        return f"http://{HOST}:{self.ports.airflow}"

    @property
    def tensorboard_url(self) -> str:
        return f"http://{HOST}:{self.ports.tensorboard}"

    @property
    def predict_url(self) -> str:
        return f"http://{HOST}:{self.ports.predict}"

    @property
    def s3_url(self) -> str:
        return f"http://{HOST}:{self.ports.s3}"


def host_name() -> str:
    """The name that Airflow knows this machine by: the address at which logs are served."""
    return HOST


def state_directory() -> Path:
    """`PLATFORM_DIR`, or `.platform` in the repository."""
    text = os.environ.get("PLATFORM_DIR") or REPOSITORY / ".platform"
    directory = Path(text).expanduser().resolve()
    for folder in (directory, REPOSITORY):
        # In the configuration of Airflow and of the supervisor it begins a variable.
        if "%" in str(folder):
            raise PlatformError(f"{folder} has a percent sign in its name: use another folder")
    return directory


def load_platform() -> Platform:
    """The platform of the state folder, made at the first call; ports follow the environment."""
    directory = state_directory()
    credentials_file = directory / "credentials.json"
    if directory.is_dir() and any(directory.iterdir()) and not credentials_file.exists():
        # Its mode would be changed, and `--purge` would delete what is in it.
        raise PlatformError(
            f"{directory} is not empty and holds no platform: "
            "set PLATFORM_DIR to a new or empty folder"
        )
    private_folder(directory)
    if not credentials_file.exists():
        # Of two that start at once, one wins and both read the same.
        write_private(credentials_file, json.dumps(asdict(Credentials()), indent=2), keep=True)
    ports = Ports.choose(remembered_ports(directory))
    credentials = Credentials(**_read(credentials_file))
    # Secrets that a platform of an earlier version lacks are made once, too.
    write_private(credentials_file, json.dumps(asdict(credentials), indent=2))
    platform = Platform(directory, ports, credentials)
    for folder in ("airflow", "home", "logs", "services"):
        private_folder(directory / folder)
    private_folder(platform.sockets)
    return platform


def remembered_ports(directory: Path) -> dict[str, int]:
    """The ports of the last start, none before the first."""
    file = directory / "ports.json"
    return _read(file) if file.exists() else {}


def remember_ports(platform: Platform) -> None:
    write_private(platform.directory / "ports.json", json.dumps(asdict(platform.ports), indent=2))


def check_disk(folder: Path) -> None:
    """Raise `PlatformError` when less than 1 GiB is free where the servers write."""
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_FREE_BYTES:
        raise PlatformError(
            f"only {free / 2**20:.0f} MiB are free in {folder}, 1024 MiB are needed: "
            "free some space, or set PLATFORM_DIR to a folder on another disk",
            reason="DISK_FULL",
        )


def private_folder(folder: Path) -> None:
    """Make the folder for this user alone; refuse one that belongs to somebody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(
            f"{folder} cannot be made ({error.strerror}): set PLATFORM_DIR to a folder of your own"
        ) from error
    if folder.stat().st_uid != os.geteuid():
        raise PlatformError(
            f"{folder} belongs to another user: set PLATFORM_DIR to a folder of your own"
        )
    folder.chmod(0o700)


def write_private(path: Path, text: str, *, keep: bool = False) -> None:
    """Write a file that only this user can read, whole or not at all; `keep` one that is there.

    A file that says so already is left alone: looking at a platform works on a full disk, too.
    """
    if path.is_file() and path.stat().st_mode & 0o077 == 0 and path.read_text() == text:
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            with suppress(FileExistsError):
                os.link(name, path)
        else:
            os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise PlatformError(f"{path} is damaged ({error}): restore it from a backup") from error
    return content
