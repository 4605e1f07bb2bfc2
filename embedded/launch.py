"""Become the service that a JSON file describes; the supervisor starts every service with this.

Runs as a script and imports nothing but the standard library: it is executed again at every
restart of a service, before the service's own environment is in place.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Names the owner of a process in its environment, so that whatever it left behind can be found.
MARKER = "PLATFORM_SERVICE"
_PR_SET_PDEATHSIG = 1


def processes_of(owner: str) -> list[int]:
    """Ids of the live processes that carry this marker (of the same user, or all as root)."""
    wanted = f"{MARKER}={owner}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in variables:
            found.append(int(folder.name))
    return found


def kill_processes_of(owner: str) -> int:
    """Kill what an earlier run of a service left behind and wait for its end; how many it were."""
    killed = set()
    while left := processes_of(owner):
        for pid in left:
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return len(killed)


def die_with_parent(stop_signal: int) -> None:
    """Receive `stop_signal` when the parent process ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, stop_signal, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def launch(description: dict[str, Any]) -> None:
    """Replace this process by the described service; returns only if that fails."""
    parent = os.getppid()
    environment: dict[str, str] = description["environment"]
    # A killed scheduler leaves its workers behind: two generations must not work side by side.
    kill_processes_of(environment[MARKER])
    os.chdir(description["directory"])
    os.umask(0o077)
    if description["user"] is not None:
        uid, gid = description["user"]
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the change of user, which would clear it.
    die_with_parent(description["stop_signal"])
    if os.getppid() != parent:
        sys.exit("the supervisor ended while the service was started")
    os.execve(description["command"][0], description["command"], environment)


if __name__ == "__main__":
    launch(json.loads(Path(sys.argv[1]).read_text()))
