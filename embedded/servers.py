"""PostgreSQL and SeaweedFS alone, in a temporary folder and on free ports: tests and benchmarks."""

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedded import postgres, seaweedfs
from embedded.config import PlatformError, Ports
from embedded.processes import Service, start_service, stop_service
from gun_detection.errors import ServiceUnavailableError
from gun_detection.storage import Storage


@dataclass(frozen=True, slots=True)
class Servers:
    """The running servers; both are empty but for what the tests make."""

    postgres: postgres.PostgresServer
    seaweedfs: seaweedfs.SeaweedServer

    def variables(self, database: str, data_bucket: str, uploads_bucket: str) -> dict[str, str]:
        """The library's environment for one database and two buckets on these servers."""
        return {
            "GUN_DETECTION_DATABASE_URL": self.postgres.url(database),
            "GUN_DETECTION_S3_ENDPOINT_URL": self.seaweedfs.url,
            "GUN_DETECTION_S3_ACCESS_KEY_ID": self.seaweedfs.access_key_id,
            "GUN_DETECTION_S3_SECRET_ACCESS_KEY": self.seaweedfs.secret_access_key,
            "GUN_DETECTION_DATA_BUCKET": data_bucket,
            "GUN_DETECTION_UPLOADS_BUCKET": uploads_bucket,
        }


@contextmanager
def temporary_servers() -> Iterator[Servers]:
    """Both servers; they end with this process, even when it is killed, and keep nothing."""
    ports = Ports.free()
    # As root, PostgreSQL runs as another user, who has to get into the folder.
    with tempfile.TemporaryDirectory(prefix="gun-detection-servers-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)
        pg = postgres.PostgresServer(
            folder / "postgres",
            ports.postgres,
            secrets.token_urlsafe(16),
            postgres.unprivileged_user(),
            # Nothing here has to outlive a power cut.
            options={"fsync": "off", "synchronous_commit": "off"},
        )
        s3 = seaweedfs.SeaweedServer(
            folder / "seaweedfs", folder, ports, "TESTS", secrets.token_urlsafe(16)
        )
        postgres.prepare_folder(pg)
        postgres.create_cluster(pg)
        _run(stack, postgres.postgres_service(pg), folder, lambda: postgres.answers(pg))
        _run(stack, seaweedfs.seaweedfs_service(s3), folder, lambda: seaweedfs.answers(s3))
        yield Servers(pg, s3)


def _run(stack: ExitStack, service: Service, folder: Path, ready: Callable[[], bool]) -> None:
    process = start_service(service, folder)
    stack.callback(stop_service, service, process)
    deadline = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            log = (folder / f"{service.name}.log").read_text()[-2000:]
            raise PlatformError(f"{service.name} does not start: {log}")
        time.sleep(0.05)


def make_bucket(storage: Storage, bucket: str) -> None:
    """Right after its start the server answers before it can make buckets."""
    deadline = time.monotonic() + 60
    while True:
        try:
            storage.ensure_bucket(bucket)
        except ServiceUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
