"""What the supervisor is told of each service."""

import configparser
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
