"""A platform with a real Airflow whose detector only waits; for the benchmarks of scale.

Everything is real but the engine: servers, DAGs, tasks, shards, reading, decoding and writing.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import obstore
from obstore.store import S3Store
from sqlalchemy import text

from embedded.airflow import Airflow
from embedded.config import Ports, load_platform, port_variable
from embedded.launch import processes_of
from embedded.processes import marker_of
from embedded.stack import Stack
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.release.champion import promote
from gun_detection.settings import Settings

DAG = "score_uploads"


@dataclass(frozen=True)
class Scored:
    """When a shard's task began, its pipeline, and both ended: seconds since the run began."""

    task_began: float
    began: float
    ended: float
    task_ended: float


@dataclass(frozen=True)
class Run:
    """A finished run: seconds of all of it, and its shards."""

    seconds: float
    shards: list[Scored]

    @property
    def first(self) -> float:
        """When the first scoring task began."""
        return min(shard.task_began for shard in self.shards)

    @property
    def last(self) -> float:
        """When the last scoring task ended."""
        return max(shard.task_ended for shard in self.shards)

    @property
    def pipelines(self) -> float:
        """Seconds that pipelines were at work, summed over the shards."""
        return sum(shard.ended - shard.began for shard in self.shards)


@dataclass(frozen=True)
class Simulation:
    """A running platform; `folder` is a temporary one for whatever is started beside it."""

    stack: Stack
    airflow: Airflow
    folder: Path

    @property
    def settings(self) -> Settings:
        return self.stack.settings

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each service so far, with those of its children that have ended."""
        used = {}
        for service in (item for group in self.stack.groups.values() for item in group):
            marker = marker_of(service.name, self.stack.platform.services)
            used[service.name] = sum(map(_cpu_of, processes_of(marker)))
        return used

    def shard_cpu(self) -> float:
        """CPU seconds of all processes that scored a shard so far."""
        return sum(map(float, _cpu_file(self.folder).read_text().split()))


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process and of those that it has waited for."""
    # The name of the process, in brackets, may hold blanks; the times are fields 14 to 17.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def simulated_platform(
    seconds: float, streams: int, variables: Mapping[str, str], broker: str | None = None
) -> Iterator[Simulation]:
    """Scoring takes `seconds` for each of `streams` pictures at once in every shard.

    `variables` are settings of the library. With the URL of a broker tasks wait there for Celery
    workers. Nothing but `score_uploads` runs.
    """
    with tempfile.TemporaryDirectory(prefix="gun-detection-simulation-") as name:
        folder = Path(name)
        _cpu_file(folder).touch()
        places = {port_variable(name): str(port) for name, port in asdict(Ports.free()).items()}
        os.environ |= places | dict(variables) | {"PLATFORM_DIR": str(folder / "platform")}
        os.environ |= {"GUN_DETECTION_ENGINE": "eager", "GUN_DETECTION_WATCH_SECONDS": "0"}
        stack = Stack(load_platform())
        stack.environment = stack.environment | {
            "PYTHONPATH": str(Path(__file__).with_name("simulated_engine")),
            "SIMULATED_SECONDS": str(seconds),
            "SIMULATED_STREAMS": str(streams),
            "SIMULATED_CPU": str(_cpu_file(folder)),
        }
        if broker is not None:
            stack.environment |= _celery(stack.environment, broker)
        try:
            stack.up(lambda step: nullcontext(), attached=True)
            _promote(stack.settings)
            with stack.airflow() as airflow:
                airflow.wait_for_dag(DAG)
                for dag in airflow.dags():
                    airflow.pause(dag["dag_id"], paused=dag["dag_id"] != DAG)
                yield Simulation(stack, airflow, folder)
        finally:
            stack.down()
            stack.purge()


def _celery(environment: dict[str, str], broker: str) -> dict[str, str]:
    database = environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"]
    return {
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CELERY__BROKER_URL": broker,
        "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{database}",
    }


def _cpu_file(folder: Path) -> Path:
    return folder / "cpu"


def _promote(settings: Settings) -> None:
    """A champion that nobody loads."""
    with open_session(settings) as session:
        model = ModelVersion(
            id="simulated",
            architecture="mobilenet_v2_fpn",
            config={},
            config_hash="",
            code_version="",
            weights_key="",
            weights_sha256="",
            threshold=0.5,
            training={},
        )
        session.add(model)
        session.flush()
        promote(session, model.id, actor="benchmark", reason="it only waits")


def upload(simulation: Simulation, prefix: str, pictures: int) -> None:
    """Put so many small pictures, no two alike, under a prefix."""
    asyncio.run(_put(simulation.settings, prefix, pictures))


async def _put(settings: Settings, prefix: str, pictures: int) -> None:
    assert settings.s3_secret_access_key is not None
    store = S3Store(
        settings.uploads_bucket,
        endpoint=settings.s3_endpoint_url,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        client_options={"allow_http": True},
    )
    limit = asyncio.Semaphore(32)

    async def put(number: int) -> None:
        async with limit:
            key = f"{prefix}{number:06d}.png"
            await obstore.put_async(store, key, _picture(prefix, number), use_multipart=False)

    await asyncio.gather(*(put(number) for number in range(pictures)))


def _picture(prefix: str, number: int) -> bytes:
    """The red of the first pixel says how many boxes the engine marks."""
    pixels = np.random.default_rng([*prefix.encode(), number]).integers(
        0, 256, (32, 32, 3), dtype=np.uint8
    )
    pixels[0, 0, 2] = number % 4
    return cv2.imencode(".png", pixels)[1].tobytes()


def run(simulation: Simulation, prefix: str, *, timeout: float = 1800) -> Run:
    """Score what lies under a prefix; every upload must have exactly one outcome afterwards."""
    airflow = simulation.airflow
    run_id = airflow.trigger(DAG, {"prefix": prefix})
    state = airflow.wait(DAG, run_id, timeout=timeout)
    assert state == "success", f"the run ended as {state}"
    whole = airflow.dag_run(DAG, run_id)
    start = datetime.fromisoformat(whole["start_date"])

    def since(moment: datetime | str) -> float:
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        return (moment - start).total_seconds()

    tasks = [row for row in airflow.task_instances(DAG, run_id) if row["task_id"] == "score"]
    statement = "SELECT finished_at, stats FROM shard WHERE run_id = :run ORDER BY number"
    with open_session(simulation.settings) as session:
        rows = session.execute(text(statement), {"run": f"airflow:{DAG}:{run_id}"}).all()
    shards = []
    for task in tasks:
        row = rows[task["map_index"]]
        ended = since(row.finished_at)
        began = ended - row.stats["seconds"]
        shards.append(Scored(since(task["start_date"]), began, ended, since(task["end_date"])))
    return Run(since(whole["end_date"]), shards)


def check(simulation: Simulation, prefix: str, pictures: int) -> str:
    """What the ledger holds of a prefix, in words; anything but one row for each is an error."""
    statement = """
        SELECT COUNT(*) AS uploads, COALESCE(SUM(rows), 0) AS rows, MIN(rows) AS least,
               MAX(rows) AS most, SUM(scored) AS scored, SUM(boxes) AS boxes
        FROM (
            SELECT u.id, COUNT(DISTINCT l.id) AS rows, COUNT(d.id) AS boxes,
                   COUNT(DISTINCT l.id) FILTER (WHERE l.outcome = 'scored') AS scored
            FROM upload u LEFT JOIN ledger l ON l.upload_id = u.id
            LEFT JOIN detection d ON d.ledger_id = l.id
            WHERE starts_with(u.key, :prefix) GROUP BY u.id
        ) one
    """
    with open_session(simulation.settings) as session:
        found = session.execute(text(statement), {"prefix": prefix}).one()
    boxes = sum(number % 4 for number in range(pictures))
    assert tuple(found) == (pictures, pictures, 1, 1, pictures, boxes), found
    return f"{found.uploads:,} uploads, {found.rows:,} ledger rows, {found.boxes:,} detections"
