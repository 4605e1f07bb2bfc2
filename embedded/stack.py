"""The platform as a whole: what it consists of, how it is brought up and down, how it is."""

import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from embedded import postgres, seaweedfs
from embedded.airflow import Airflow, airflow_services
from embedded.config import (
    Platform,
    PlatformError,
    check_disk,
    check_port,
    remember_ports,
    remembered_ports,
)
from embedded.environment import (
    AIRFLOW_DATABASE,
    DATA_BUCKET,
    LIBRARY_DATABASE,
    UPLOADS_BUCKET,
    program_folder,
    service_environment,
    write_passwords,
)
from embedded.health import Checks, Health, web_server_answers
from embedded.predict import predict_service
from embedded.processes import Service, code_revision
from embedded.supervision import ALIVE, ProcessState, Supervisor
from embedded.tensorboard import tensorboard_service
from gun_detection.errors import ServiceUnavailableError
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage

# Where the data of PostgreSQL lies when root starts the platform, one folder for each.
UNPRIVILEGED_DATA = Path("/var/lib/gun-detection")
_SERVER_TIMEOUT = 60
_AIRFLOW_TIMEOUT = 300
# A service that ended this often while it was waited for does not start.
_MOST_ENDS = 3
_LOG_LINES = 15


class Report(Protocol):
    """Shows that a step goes on; used as `with report("step"):`."""

    def __call__(self, step: str) -> AbstractContextManager[object]: ...


class Stack:
    """The services of one platform."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        user = postgres.unprivileged_user()
        self.postgres = postgres.PostgresServer(
            # The state folder is closed to the user that PostgreSQL runs as for root.
            platform.directory / "postgres"
            if user is None
            else UNPRIVILEGED_DATA / platform.credentials.identity,
            platform.ports.postgres,
            platform.credentials.postgres_password,
            user,
        )
        self.seaweedfs = seaweedfs.SeaweedServer(
            platform.directory / "seaweedfs",
            platform.sockets,
            platform.ports,
            platform.credentials.s3_access_key_id,
            platform.credentials.s3_secret_access_key,
        )
        self._checks = Checks(platform, self.postgres, self.seaweedfs)

    @cached_property
    def environment(self) -> dict[str, str]:
        # What runs other code than that of this folder has to be started again.
        code = {"PLATFORM_CODE": code_revision()}
        return service_environment(self.platform, self.postgres) | code

    @cached_property
    def groups(self) -> dict[str, list[Service]]:
        """The services in the order of their start."""
        return {
            "postgres": [postgres.postgres_service(self.postgres)],
            "seaweedfs": [seaweedfs.seaweedfs_service(self.seaweedfs)],
            "airflow": airflow_services(self.environment),
            "tensorboard": [tensorboard_service(self.platform, self.environment)],
            "predict": [predict_service(self.platform, self.environment)],
        }

    @cached_property
    def supervisor(self) -> Supervisor:
        return Supervisor(self.platform, self.groups)

    @property
    def settings(self) -> Settings:
        """The library's settings inside the platform, whatever this process has in its own."""
        return load_settings(self.environment)

    def airflow(self, user: str = "admin") -> Airflow:
        """A client of Airflow's REST API; to be closed."""
        password = self.platform.credentials.passwords[user]
        return Airflow(self.platform.airflow_url, user, password)

    def up(self, report: Report, *, attached: bool = False) -> bool:
        """Start what does not run; False when everything ran already and nothing had changed."""
        with self._lock():
            # What the services would refuse is refused before anything is stopped.
            load_settings(self.environment)
            self._check_room()
            fresh = not self.supervisor.running()
            changed = self._prepare(fresh)
            if not fresh and not changed and all(row.healthy for row in self.status()):
                self._migrate_library()
                return False
            if fresh:
                self.supervisor.start(attached=attached)
            self._start_servers(report)
            self._start_airflow(report)
        return True

    def down(self) -> bool:
        """Stop everything; False when nothing ran."""
        with self._lock():
            return self.supervisor.stop()

    def purge(self) -> None:
        """Delete the state of a stopped platform, data and credentials included."""
        if self.supervisor.running():
            raise PlatformError("the platform runs: stop it first")
        shutil.rmtree(self.postgres.folder, ignore_errors=True)
        shutil.rmtree(self.platform.sockets, ignore_errors=True)
        shutil.rmtree(self.platform.directory)

    def status(self) -> list[Health]:
        """One row for each service, in the order of their start."""
        states = self.supervisor.states()
        healthy = self._checks.healthy(states)
        addresses = self._checks.addresses()
        stopped = ProcessState("STOPPED", 0, 0, 0)
        rows = []
        for name in (service.name for service in self._services()):
            now = states.get(name, stopped)
            uptime = time.time() - now.started if now.state == "RUNNING" else 0.0
            rows.append(
                Health(name, now.state, now.pid, uptime, addresses.get(name, ""), healthy[name])
            )
        return rows

    def log_of(self, name: str) -> Path:
        return self.platform.logs / f"{name}.log"

    def _services(self) -> Iterator[Service]:
        for group in self.groups.values():
            yield from group

    def _others_answer(self) -> bool:
        platform = self.platform
        return all(map(web_server_answers, (platform.tensorboard_url, platform.predict_url)))

    def _check_room(self) -> None:
        check_disk(self.platform.directory)
        postgres.prepare_folder(self.postgres)
        check_disk(self.postgres.folder)

    def _prepare(self, fresh: bool) -> list[str]:
        """Bring the supervisor's groups up to date; the names of those that changed."""
        if fresh:
            self.supervisor.clean()
        # A mistake must not stop what runs: whatever can be wrong is looked at first.
        self._check_ports()
        changed = [] if fresh else self.supervisor.update()
        remember_ports(self.platform)
        return changed

    def _check_ports(self) -> None:
        """Raise `PlatformError` for a port that neither is free nor belongs to this platform."""
        states = self.supervisor.states()
        before = remembered_ports(self.platform.directory)
        own = {
            before.get(name)
            for service in self._services()
            if service.name in states and states[service.name].state in ALIVE
            for name in service.ports
        }
        seaweedfs.check_sockets(self.seaweedfs)
        for name in (name for service in self._services() for name in service.ports):
            port = getattr(self.platform.ports, name)
            if port not in own:
                check_port(name, port)

    def _start_servers(self, report: Report) -> None:
        with report("PostgreSQL"):
            if not postgres.answers(self.postgres):
                postgres.remove_stale_lock(self.postgres)
            if postgres.create_cluster(self.postgres):
                self._migrated.unlink(missing_ok=True)
            self._start("postgres", lambda: postgres.answers(self.postgres), _SERVER_TIMEOUT)
            credentials = self.platform.credentials
            for name, password in (
                (AIRFLOW_DATABASE, credentials.airflow_database_password),
                (LIBRARY_DATABASE, credentials.library_database_password),
            ):
                postgres.create_database(self.postgres, name, password)
        with report("SeaweedFS"):
            self._start("seaweedfs", lambda: seaweedfs.answers(self.seaweedfs), _SERVER_TIMEOUT)
            # The server answers a moment before it can make buckets.
            self._wait("seaweedfs", self._make_buckets, _SERVER_TIMEOUT)

    def _make_buckets(self) -> bool:
        storage = Storage(self.settings)
        try:
            for bucket in (DATA_BUCKET, UPLOADS_BUCKET):
                storage.ensure_bucket(bucket)
        except ServiceUnavailableError:
            return False
        return True

    def _start_airflow(self, report: Report) -> None:
        with report("Database schemas"):
            if not self._migrated.exists() or self._migrated.read_text() != version(
                "apache-airflow"
            ):
                self._run(sys.executable, "-m", "airflow", "db", "migrate")
                self._migrated.write_text(version("apache-airflow"))
            self._migrate_library()
        with report("Airflow, TensorBoard and the predict service"):
            write_passwords(self.platform)
            self.supervisor.start_group("tensorboard")
            self.supervisor.start_group("predict")
            self._start("airflow", self._airflow_is_healthy, _AIRFLOW_TIMEOUT)
            for group in ("tensorboard", "predict"):
                self._wait(group, self._others_answer, _AIRFLOW_TIMEOUT)
            with self.airflow() as client:
                client.ensure_pool("gpu", 1, "One task at a time on the accelerator")

    @property
    def _migrated(self) -> Path:
        return self.platform.airflow_home / "migrated"

    def _migrate_library(self) -> None:
        self._run(str(program_folder() / "gun-detection"), "db", "upgrade")

    def _airflow_is_healthy(self) -> bool:
        healthy = self._checks.healthy(self.supervisor.states())
        return all(healthy[service.name] for service in self.groups["airflow"])

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.platform.airflow_home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = "\n".join(done.stdout.splitlines()[-_LOG_LINES:])
            raise PlatformError(f"`{' '.join(command)}` failed:\n{lines}")

    def _start(self, group: str, ready: Callable[[], bool], timeout: float) -> None:
        self.supervisor.start_group(group)
        self._wait(group, ready, timeout)

    def _wait(self, group: str, ready: Callable[[], bool], timeout: float) -> None:
        """Return when the group is ready; raise with the last lines of the log when it fails."""
        deadline = time.monotonic() + timeout
        ends: dict[str, set[int]] = {service.name: set() for service in self.groups[group]}
        while not ready():
            states = self.supervisor.states()
            for name, seen in ends.items():
                if states[name].state in {"BACKOFF", "EXITED", "FATAL"}:
                    seen.add(states[name].stopped)
                if states[name].state == "FATAL" or len(seen) >= _MOST_ENDS:
                    raise PlatformError(self._failure(name, "does not start"))
            if time.monotonic() > deadline:
                sick = [name for name, well in self._checks.healthy(states).items() if not well]
                name = next((name for name in sick if name in ends), next(iter(ends)))
                raise PlatformError(self._failure(name, f"is not healthy after {timeout:.0f} s"))
            time.sleep(0.25)

    def _failure(self, name: str, what: str) -> str:
        log = self.log_of(name)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join([f"{name} {what}; the end of {log}:", *lines[-_LOG_LINES:]])

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        with (self.platform.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PlatformError(
                    "another `up` or `down` of this platform is at work: wait for it"
                ) from None
            yield
