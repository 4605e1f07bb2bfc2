"""Real servers for the tests: PostgreSQL and SeaweedFS in a temporary folder, on free ports."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from psycopg2 import sql
from xdist.scheduler import LoadFileScheduling

from embedded import postgres
from embedded.config import REPOSITORY
from embedded.servers import Servers, make_bucket, temporary_servers
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from gun_detection.database.models import ModelVersion
    from gun_detection.release.registry import NewModel

_TEMPLATE = "migrated_template"
_numbers = count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Forget the outer shell's platform, and keep Airflow out of the home folder."""
    for name in [n for n in os.environ if n.startswith(("GUN_DETECTION_", "AIRFLOW", "PLATFORM_"))]:
        del os.environ[name]
    home = tempfile.mkdtemp(prefix="gun-detection-airflow-")
    config.add_cleanup(lambda: shutil.rmtree(home))
    os.environ |= {
        "AIRFLOW_HOME": home,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
    }


class _OnePlatform(LoadFileScheduling):  # type: ignore[misc]
    """The tests of a file run in one process, and those of the one platform in the same."""

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/integration/"
        return folder if nodeid.startswith(folder) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _OnePlatform(config, log)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL and SeaweedFS; they end with this process, even when it is killed."""
    with temporary_servers() as running:
        yield running


@pytest.fixture(scope="session")
def migrated_template(servers: Servers) -> str:
    """Name of a database that has every migration and that others are copied from."""
    from gun_detection.database import upgrade

    template = sql.Identifier(_TEMPLATE)
    with postgres.administer(servers.postgres) as cursor:
        cursor.execute(sql.SQL("CREATE DATABASE {}").format(template))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in servers.variables(_TEMPLATE, "data", "uploads").items():
                patch.setenv(name, value)
            upgrade(load_settings())
        # A database can be copied only while nobody, a pool included, is connected to it.
        cursor.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(template))
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
            [_TEMPLATE],
        )
    return _TEMPLATE


@pytest.fixture
def settings(
    servers: Servers,
    migrated_template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Settings]:
    """Settings of a fresh, migrated database and two empty buckets, also in the environment."""
    number = next(_numbers)
    database, buckets = f"test_{number}", (f"data-{number}", f"uploads-{number}")
    for name, value in servers.variables(database, *buckets).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GUN_DETECTION_HOME", str(tmp_path / "home"))
    loaded = load_settings()
    name = sql.Identifier(database)
    with postgres.administer(servers.postgres) as cursor:
        template = sql.Identifier(migrated_template)
        cursor.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, template))
    for bucket in buckets:
        make_bucket(Storage(loaded), bucket)
    yield loaded
    with postgres.administer(servers.postgres) as cursor:
        cursor.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
    _delete_buckets(servers)


def _delete_buckets(servers: Servers) -> None:
    """Every bucket with what is in it: the server has room for a limited number of them."""
    client = boto3.client(
        "s3",
        endpoint_url=servers.seaweedfs.url,
        region_name="us-east-1",
        aws_access_key_id=servers.seaweedfs.access_key_id,
        aws_secret_access_key=servers.seaweedfs.secret_access_key,
    )
    for bucket in client.list_buckets()["Buckets"]:
        client.delete_bucket(Bucket=bucket["Name"])


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings)


@pytest.fixture
def session(settings: Settings) -> "Iterator[Session]":
    from gun_detection.database import open_session

    with open_session(settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real pictures: `../shared/data`, or `TEST_DATA_DIR`."""
    folder = Path(os.environ.get("TEST_DATA_DIR") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no pictures in {folder}: set TEST_DATA_DIR to the folder that has them")
    return folder


def random_model(seed: int) -> "NewModel":
    """A small detector with random weights from a seed."""
    import torch

    from gun_detection.detector.architectures import DetectorConfig, build_detector
    from gun_detection.release.registry import NewModel

    detector = DetectorConfig(architecture="resnet18_fpn")
    torch.manual_seed(seed)
    return NewModel(
        model=build_detector(detector),
        detector=detector,
        config={"detector": detector.model_dump(mode="json")},
        config_hash="c" * 64,
        dataset_id=None,
        parent_id=None,
        threshold=0.5,
        training={},
    )


def model_row(session: "Session", number: int) -> "ModelVersion":
    """A model version of which nothing is stored but its row, for all that never looks with it."""
    from gun_detection.database.models import ModelVersion

    name = f"resnet18-fpn-{number:012x}"
    row = ModelVersion(
        id=name,
        architecture="resnet18_fpn",
        config={"detector": {"architecture": "resnet18_fpn"}},
        config_hash="c" * 64,
        code_version="0",
        weights_key=f"models/{name}/weights.safetensors",
        weights_sha256=f"{number:064x}",
        threshold=0.5,
        training={},
    )
    session.add(row)
    session.flush()
    return row
