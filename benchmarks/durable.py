"""A PostgreSQL of its own with the settings of production: what is committed survives a crash."""

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import text

from embedded import postgres
from embedded.config import Ports
from embedded.processes import start_service, stop_service
from gun_detection.database import open_session, upgrade
from gun_detection.settings import Settings, load_settings


@contextmanager
def durable_database() -> Iterator[Settings]:
    """Settings of an empty, migrated database whose commits wait for the disk."""
    with tempfile.TemporaryDirectory(prefix="gun-detection-benchmark-") as name:
        folder = Path(name)
        # As root, PostgreSQL runs as another user, who has to get into the folder.
        folder.chmod(0o711)
        user, password = postgres.unprivileged_user(), secrets.token_urlsafe(16)
        port = Ports.free().postgres
        server = postgres.PostgresServer(folder / "postgres", port, password, user)
        postgres.prepare_folder(server)
        postgres.create_cluster(server)
        service = postgres.postgres_service(server)
        process = start_service(service, folder)
        try:
            while not postgres.answers(server):
                time.sleep(0.05)
            url = server.url(postgres.SUPERUSER)
            settings = load_settings().model_copy(update={"database_url": SecretStr(url)})
            upgrade(settings)
            yield settings
        finally:
            stop_service(service, process)


def server_cpu(settings: Settings) -> float:
    """CPU seconds of the server's processes that serve the open connections, up to now."""
    with open_session(settings) as session:
        query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
        pids = session.scalars(text(query)).all()
    ticks = 0
    for pid in pids:
        # The name of the process, in brackets, may hold blanks; utime and stime are fields 14, 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
