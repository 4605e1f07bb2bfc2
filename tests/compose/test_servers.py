"""What the containers run, run here: on servers of the same versions, with their environment."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg2
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from embedded import postgres
from embedded.config import REPOSITORY, Ports
from embedded.processes import start_service, stop_service

PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def database() -> Iterator[postgres.PostgresServer]:
    """A new PostgreSQL as the image starts it, before its script has run."""
    with tempfile.TemporaryDirectory(prefix="gun-detection-compose-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        server = postgres.PostgresServer(
            folder / "postgres", Ports.free().postgres, "boss", postgres.unprivileged_user()
        )
        postgres.prepare_folder(server)
        postgres.create_cluster(server)
        service = postgres.postgres_service(server)
        process = start_service(service, folder)
        try:
            wait_for(lambda: postgres.answers(server))
            yield server
        finally:
            stop_service(service, process)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.1)


def run_script(name: str, environment: dict[str, str], path: Path) -> None:
    result = subprocess.run(
        ["sh", REPOSITORY / "docker" / name],
        env=environment | {"PATH": f"{path}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def prepare_databases(services: dict[str, Any], server: postgres.PostgresServer) -> dict[str, str]:
    """Run the image's script; the passwords that it was given."""
    given = {k: v for k, v in services["postgres"]["environment"].items() if "DB_PASS" in k}
    connection = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.port),
        "PGPASSWORD": server.password,
        "POSTGRES_USER": "postgres",
        "POSTGRES_DB": "postgres",
    }
    run_script("postgres-init.sh", given | connection, postgres.binaries(server))
    return given


def test_each_role_reaches_its_own_database_only(
    services: dict[str, Any], database: postgres.PostgresServer
) -> None:
    given = prepare_databases(services, database)
    passwords = {
        "airflow": given["AIRFLOW_DB_PASSWORD"],
        "gun_detection": given["LIBRARY_DB_PASSWORD"],
    }
    for role, password in passwords.items():
        for name in passwords:
            address = {"host": "127.0.0.1", "port": database.port, "dbname": name}
            if role == name:
                connection = psycopg2.connect(user=role, password=password, **address)
                connection.cursor().execute("CREATE TABLE mine (id int)")
                connection.close()
            else:
                with pytest.raises(psycopg2.OperationalError, match="permission denied"):
                    psycopg2.connect(user=role, password=password, **address)


@pytest.fixture
def store(services: dict[str, Any], tmp_path: Path) -> Iterator[Ports]:
    """SeaweedFS with the arguments and the environment of its container, on other ports."""
    service, ports = services["seaweedfs"], Ports.free()
    moved = {
        "-dir": str(tmp_path),
        "-s3.port": ports.s3,
        "-s3.port.grpc": ports.s3_grpc,
        "-master.port": ports.seaweedfs_master,
        "-master.port.grpc": ports.seaweedfs_master_grpc,
        "-volume.port": ports.seaweedfs_volume,
        "-volume.port.grpc": ports.seaweedfs_volume_grpc,
        "-filer.port": ports.seaweedfs_filer,
        "-filer.port.grpc": ports.seaweedfs_filer_grpc,
        "-s3.localSocket": str(tmp_path / "s3.sock"),
        "-filer.localSocket": str(tmp_path / "filer.sock"),
    }
    kept = [text for text in service["command"] if text.split("=")[0] not in moved]
    arguments = [*kept, *(f"{name}={value}" for name, value in moved.items())]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAMS / "weed", *service["entrypoint"][1:], *arguments],
            env=service["environment"] | {"HOME": str(tmp_path)},
            stderr=log,
            stdout=log,
        )
        try:
            wait_for(lambda: healthy(ports.s3))
            yield ports
        finally:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def s3_client(ports: Ports, key: str | None, secret: str | None) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{ports.s3}",
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=None if key else Config(signature_version=UNSIGNED),
    )


def test_storage_answers_its_one_identity_only(services: dict[str, Any], store: Ports) -> None:
    environment = services["airflow-init"]["environment"]
    key = environment["GUN_DETECTION_S3_ACCESS_KEY_ID"]
    secret = environment["GUN_DETECTION_S3_SECRET_ACCESS_KEY"]
    owner = s3_client(store, key, secret)
    owner.create_bucket(Bucket="pictures")
    owner.put_object(Bucket="pictures", Key="a", Body=b"1")
    assert owner.get_object(Bucket="pictures", Key="a")["Body"].read() == b"1"
    for stranger in (s3_client(store, None, None), s3_client(store, key, "wrong")):
        with pytest.raises(ClientError, match=r"AccessDenied|SignatureDoesNotMatch"):
            stranger.get_object(Bucket="pictures", Key="a")


def test_parts_of_storage_without_sign_in_are_on_loopback_only(store: Ports) -> None:
    outside = [
        line.split()[1]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and not line.split()[1].startswith("0100007F")
    ]
    open_ports = {int(address.rpartition(":")[2], 16) for address in outside}
    assert store.s3 in open_ports
    closed = (store.seaweedfs_master, store.seaweedfs_filer, store.seaweedfs_volume)
    assert not open_ports & set(closed)
    for port in closed:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()


def test_image_of_storage_is_the_version_that_is_tested(services: dict[str, Any]) -> None:
    output = subprocess.run(
        [PROGRAMS / "weed", "version"], capture_output=True, text=True, check=True
    )
    tag = services["seaweedfs"]["image"].rpartition(":")[2]
    assert f" {tag} " in output.stdout


@pytest.mark.airflow
def test_initialisation_prepares_everything_and_can_be_repeated(
    services: dict[str, Any], database: postgres.PostgresServer, store: Ports, tmp_path: Path
) -> None:
    prepare_databases(services, database)
    environment = {
        name: value.replace("@postgres/", f"@127.0.0.1:{database.port}/").replace(
            "http://seaweedfs:8333", f"http://127.0.0.1:{store.s3}"
        )
        for name, value in services["airflow-init"]["environment"].items()
    }
    environment |= {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "GUN_DETECTION_HOME": str(tmp_path / "home"),
        "HOME": str(tmp_path),
    }
    (tmp_path / "dags").mkdir()
    for _ in range(2):
        run_script("airflow-init.sh", environment, PROGRAMS)
    client = s3_client(
        store,
        environment["GUN_DETECTION_S3_ACCESS_KEY_ID"],
        environment["GUN_DETECTION_S3_SECRET_ACCESS_KEY"],
    )
    buckets = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    assert {"gun-detection-data", "uploads"} <= buckets
    command = [PROGRAMS / "airflow", "pools", "list", "--output", "json"]
    listed = subprocess.run(command, env=environment, capture_output=True, check=True)
    pools = json.loads(listed.stdout[listed.stdout.index(b"[") :])
    assert {pool["pool"]: pool["slots"] for pool in pools}["gpu"] == "1"
    with postgres.administer(database, "airflow") as cursor:
        cursor.execute("SELECT to_regclass('ab_user') IS NOT NULL")
        assert cursor.fetchone() == (True,)
    with postgres.administer(database, "gun_detection") as cursor:
        cursor.execute("SELECT to_regclass('alembic_version') IS NOT NULL")
        assert cursor.fetchone() == (True,)


def test_celery_and_the_executor_of_airflow_fit_together(tmp_path: Path) -> None:
    environment = {"AIRFLOW_HOME": str(tmp_path), "PATH": os.defpath}
    script = "import airflow.providers.celery.executors.celery_executor"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
