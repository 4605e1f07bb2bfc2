"""What a service is, and how one runs as a child of this process."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from embedded.config import REPOSITORY, write_private
from embedded.launch import MARKER

LAUNCH = Path(__file__).with_name("launch.py")


@dataclass(frozen=True, slots=True)
class Service:
    """One process that is kept running; `ports` are names of `Ports`, `user` is (uid, gid)."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    ports: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    user: tuple[int, int] | None = None
    directory: Path = REPOSITORY
    # How long it is given to stop by itself, in seconds.
    patience: int = 20


def marker_of(service: str, folder: Path) -> str:
    """What marks the processes of a service whose description lies in `folder`."""
    return f"{folder}:{service}"


def write_service(service: Service, folder: Path) -> Path:
    """Describe the service in a private file for `launch.py`."""
    path = folder / f"{service.name}.json"
    write_private(path, _description(service, folder))
    return path


def revision(service: Service, folder: Path) -> str:
    """Differs when the service has to be restarted to follow its description."""
    return hashlib.sha256(_description(service, folder).encode()).hexdigest()[:16]


def code_revision() -> str:
    """Differs when the code that services run does, or what it depends on."""
    digest = hashlib.sha256()
    folders = (REPOSITORY / name for name in ("embedded", "gun_detection", "plugins"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    for path in [REPOSITORY / "requirements.txt", *sorted(files)]:
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _description(service: Service, folder: Path) -> str:
    description = {
        "command": service.command,
        "environment": service.environment | {MARKER: marker_of(service.name, folder)},
        "directory": str(service.directory),
        "user": service.user,
        "stop_signal": int(service.stop_signal),
    }
    return json.dumps(description, indent=2, sort_keys=True)


def start_service(service: Service, folder: Path) -> subprocess.Popen[bytes]:
    """Start a service as a child of this process, without the supervisor; it ends with it."""
    path = write_service(service, folder)
    with (folder / f"{service.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(LAUNCH), str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop_service(service: Service, process: subprocess.Popen[bytes]) -> None:
    """Ask the service to stop, and kill it when it does not."""
    process.send_signal(service.stop_signal)
    try:
        process.wait(service.patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
