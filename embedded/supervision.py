"""The supervisor that starts the services, restarts them when they die and keeps their logs."""

import http.client
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]

from embedded.config import Platform, PlatformError, write_private
from embedded.launch import kill_processes_of, processes_of
from embedded.processes import LAUNCH, Service, marker_of, revision, write_service

NAME = "supervisor"
ALIVE = frozenset({"STARTING", "RUNNING", "BACKOFF"})
# They end their children themselves: those of PostgreSQL are not to be interrupted one by one, and
# requests under way still need the decoders of the predict service.
_STOPPED_ALONE = frozenset({"postgres", "predict"})
# A service whose disk is full, say, comes back when there is room again, without `up`. The pause
# grows by a second with each try: it is seven minutes after a day.
_TRIES = 1_000_000
_NOT_RUNNING = (ConnectionError, FileNotFoundError, http.client.HTTPException, TimeoutError)


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A service as the supervisor sees it; `started` and `stopped` are seconds since 1970."""

    state: str
    pid: int
    started: int
    stopped: int


class Supervisor:
    """The supervisor of one platform; `groups` are services that change together."""

    def __init__(self, platform: Platform, groups: dict[str, list[Service]]) -> None:
        self._folder = platform.services
        self._logs = platform.logs
        self._socket = platform.sockets / "supervisor.sock"
        self._config = platform.directory / "supervisord.conf"
        self._pid_file = platform.directory / "supervisord.pid"
        self._groups = groups
        self._attached: subprocess.Popen[bytes] | None = None

    def running(self) -> bool:
        """Whether a supervisor answers, whatever old sockets and pid files say."""
        try:
            with self._rpc() as rpc:
                rpc.getState()
        except _NOT_RUNNING:
            return False
        return True

    def states(self) -> dict[str, ProcessState]:
        """The state of each service; empty when no supervisor runs."""
        try:
            with self._rpc() as rpc:
                found = rpc.getAllProcessInfo()
        except _NOT_RUNNING:
            return {}
        return {
            item["name"]: ProcessState(item["statename"], item["pid"], item["start"], item["stop"])
            for item in found
        }

    def start(self, *, attached: bool = False) -> None:
        """Start the supervisor, not its services; `attached` ends it with this process."""
        self._write()
        supervisord = Service(
            NAME,
            (sys.executable, "-m", "supervisor.supervisord", "-c", str(self._config))
            + (("-n",) if attached else ()),
            # The services do not inherit this: each gets exactly what its description says.
            environment={"LC_ALL": "C.UTF-8"},
        )
        command = [sys.executable, str(LAUNCH), str(write_service(supervisord, self._folder))]
        if attached:
            self._attached = subprocess.Popen(command, start_new_session=True)
        else:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise PlatformError(f"the supervisor does not start: {done.stderr.strip()}")
        deadline = time.monotonic() + 30
        while not self.running():
            if time.monotonic() > deadline:
                raise PlatformError(f"the supervisor does not answer: see {self._log(NAME)}")
            time.sleep(0.1)

    def update(self) -> list[str]:
        """Stop the groups whose description has changed and take over the new one; their names."""
        self._write()
        with self._rpc() as rpc:
            [[added, changed, removed]] = rpc.reloadConfig()
            for group in (*changed, *removed):
                rpc.stopProcessGroup(group)
                rpc.removeProcessGroup(group)
            for group in (*changed, *added):
                rpc.addProcessGroup(group)
        return sorted({*added, *changed, *removed})

    def start_group(self, group: str) -> None:
        """Start those services of the group that do not run, also those that wait to be tried."""
        states = self.states()
        with self._rpc() as rpc:
            for name in (service.name for service in self._groups[group]):
                waits = states[name].state == "BACKOFF"
                if waits:
                    rpc.stopProcess(f"{group}:{name}")
                if waits or states[name].state not in ALIVE:
                    rpc.startProcess(f"{group}:{name}", False)

    def stop(self) -> bool:
        """Stop everything, services first, and wait for it; False when nothing ran."""
        ran = self.running()
        if ran:
            with self._rpc() as rpc:
                rpc.shutdown()
            patience = sum(max(s.patience for s in group) for group in self._groups.values())
            deadline = time.monotonic() + patience + 10
            while processes_of(marker_of(NAME, self._folder)) and time.monotonic() < deadline:
                time.sleep(0.1)
                if self._attached is not None:
                    self._attached.poll()
        return self.clean() > 0 or ran

    def clean(self) -> int:
        """End what a killed supervisor, or a killed service, left behind; how many it were."""
        killed = kill_processes_of(marker_of(NAME, self._folder))
        for group in self._groups.values():
            killed += sum(kill_processes_of(marker_of(s.name, self._folder)) for s in group)
        if self._attached is not None:
            self._attached.wait()
        self._socket.unlink(missing_ok=True)
        self._pid_file.unlink(missing_ok=True)
        return killed

    @contextmanager
    def _rpc(self) -> Iterator[Any]:
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
        try:
            yield proxy.supervisor
        finally:
            transport.close()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _write(self) -> None:
        sections = [
            f"""[supervisord]
logfile={self._log(NAME)}
logfile_maxbytes=10MB
logfile_backups=1
pidfile={self._pid_file}
childlogdir={self._logs}
silent=true
umask=077

[unix_http_server]
file={self._socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""
        ]
        # What starts first stops last.
        for priority, (group, services) in enumerate(self._groups.items()):
            names = ",".join(service.name for service in services)
            sections.append(f"[group:{group}]\nprograms={names}\npriority={priority}\n")
            sections += [self._program(service) for service in services]
        write_private(self._config, "\n".join(sections))

    def _program(self, service: Service) -> str:
        description = write_service(service, self._folder)
        as_group = "false" if service.name in _STOPPED_ALONE else "true"
        return f"""[program:{service.name}]
command="{sys.executable}" "{LAUNCH}" "{description}"
environment=REVISION="{revision(service, self._folder)}"
autostart=false
autorestart=true
startsecs=3
startretries={_TRIES}
stopsignal={service.stop_signal.name.removeprefix("SIG")}
stopwaitsecs={service.patience}
stopasgroup={as_group}
killasgroup=true
redirect_stderr=true
stdout_logfile={self._log(service.name)}
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=2
"""
