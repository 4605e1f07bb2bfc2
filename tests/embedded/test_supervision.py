"""What the supervisor is told of each service."""

import configparser
import time
from pathlib import Path

from embedded.config import load_platform
from embedded.postgres import PostgresServer, postgres_service
from embedded.predict import predict_service
from embedded.processes import Service
from embedded.supervision import Supervisor


def test_who_ends_its_own_children_is_stopped_without_them(directory: Path, tmp_path: Path) -> None:
    platform = load_platform()
    services = [
        postgres_service(PostgresServer(tmp_path, 5433, "secret", None)),
        predict_service(platform, {}),
        Service("other", ("true",), {}),
    ]
    Supervisor(platform, {"all": services})._write()
    parser = configparser.RawConfigParser()
    parser.read(directory / "supervisord.conf")
    programs = {name: parser[f"program:{name}"] for name in ("postgres", "predict", "other")}
    assert {name: part["stopasgroup"] for name, part in programs.items()} == {
        "postgres": "false",
        "predict": "false",
        "other": "true",
    }
    # Those that are left in the end all go.
    assert {part["killasgroup"] for part in programs.values()} == {"true"}


def test_what_cannot_start_is_tried_for_ever_and_at_once_when_asked(
    directory: Path, tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    command = ("/bin/sh", "-c", f"test -e {mended} && exec sleep 600")
    supervisor = Supervisor(load_platform(), {"only": [Service("ailing", command, {})]})
    supervisor.start(attached=True)
    try:
        supervisor.start_group("only")
        ends: set[int] = set()
        while len(ends) < 3:
            state = supervisor.states()["ailing"]
            ends |= {state.stopped} if state.state == "BACKOFF" else set()
            time.sleep(0.1)
        # The next try is seconds away.
        mended.touch()
        supervisor.start_group("only")
        # It is taken for running after some seconds.
        assert supervisor.states()["ailing"].state in {"STARTING", "RUNNING"}
        supervisor.start_group("only")
    finally:
        supervisor.stop()
    parser = configparser.RawConfigParser()
    parser.read(directory / "supervisord.conf")
    # Each pause is a second longer than the one before.
    assert sum(range(parser.getint("program:ailing", "startretries"))) > 365 * 86400
