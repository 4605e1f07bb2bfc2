"""Models as they were measured, without a detector; and packages of a small one for engines."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import text, update

from gun_detection.database import open_session
from gun_detection.database.models import EnginePackage, ModelVersion
from gun_detection.datasets.ingest import ingest
from gun_detection.detector import conversion
from gun_detection.detector.openvino import Networks
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import compute_metrics
from gun_detection.evaluation.samples import Sample
from gun_detection.release import packages
from gun_detection.release.packaging import package
from gun_detection.release.registry import publish
from gun_detection.release.rules import Canary, Case, Measured
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.evaluation.conftest import GUN, OTHER, picture, sample

THRESHOLD = 0.5
F32 = "openvino-f32"


def waiting_transactions(settings: Settings) -> int:
    """How many transactions of the database are open without a statement under way."""
    statement = (
        "SELECT COUNT(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    with open_session(settings) as session:
        return int(session.scalars(text(statement)).one())


def watch_storage(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many transactions wait for the bucket, at each request to it from here on."""
    waiting: list[int] = []
    errors = Storage.errors

    def watched(storage: Storage, bucket: str, key: str) -> AbstractContextManager[None]:
        waiting.append(waiting_transactions(settings))
        return errors(storage, bucket, key)

    monkeypatch.setattr(Storage, "errors", watched)
    return waiting


def pictures(
    count: int, found: float, gun_free: int = 20, alarms: float = 0.0, seed: int = 0
) -> list[Sample]:
    """`count` pictures with a gun, a share `found` of them right; gun-free ones with `alarms`."""
    random = np.random.default_rng(seed)
    right = random.permutation(count) < round(count * found)
    samples = [
        sample(picture([GUN], (GUN if hit else OTHER, 0.9)), f"gun-{index}")
        for index, hit in enumerate(right)
    ]
    rows: list[Matched] = [
        picture([], *([(OTHER, 0.8)] if index < round(gun_free * alarms) else []))
        for index in range(gun_free)
    ]
    return samples + [sample(row, f"free-{index}") for index, row in enumerate(rows)]


def measured(samples: Sequence[Sample], model_id: str = "candidate", **changes: Any) -> Measured:
    matched = [item.matched for item in samples]
    metrics = compute_metrics(matched, THRESHOLD, [item.group for item in samples])
    numbers = metrics.model_dump(mode="json") | {"milliseconds_per_image": 10.0, "device": "cpu"}
    size = int(changes.pop("weights_bytes", 1000))
    network = {"architecture": changes.pop("architecture", "resnet18_fpn")}
    return Measured(model_id, network, THRESHOLD, numbers | changes, samples, size)


def case(
    candidate: Sequence[Sample],
    champion: Sequence[Sample] | None = None,
    canary: Canary | None = None,
) -> Case:
    return Case(
        measured(candidate),
        None if champion is None else measured(champion, "champion"),
        canary or Canary(difference=0.0, compared=8),
    )


@pytest.fixture
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of any engine; one opened for many threads leaves PyTorch with one each."""
    before = torch.get_num_threads()
    monkeypatch.setattr(packages, "_unfit", set())
    yield
    torch.set_num_threads(before)


@pytest.fixture
def version(settings: Settings, storage: Storage) -> ModelVersion:
    """A model that says that it was trained on synthetic pictures."""
    with open_session(settings) as session:
        dataset = ingest("synthetic:24", settings, storage, session)
        trained = replace(random_model(1), dataset_id=dataset.dataset_id)
        return publish(trained, settings, storage, session)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return conversion.convert(random_model(1).model.eval())


@pytest.fixture
def quick(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of the one model are not converted again in every test."""
    monkeypatch.setattr(conversion, "convert", lambda model: networks)


def make(version: ModelVersion, engine: str, settings: Settings, storage: Storage) -> EnginePackage:
    return package(version, engine, settings, storage)


def change(settings: Settings, engine: str = F32, **values: Any) -> None:
    with open_session(settings) as session:
        session.execute(
            update(EnginePackage).where(EnginePackage.engine == engine).values(**values)
        )


def wanting(engine: str, settings: Settings) -> Settings:
    return settings.model_copy(update={"engine": engine, "score_floor": 0.0})


def stored(version: ModelVersion, settings: Settings, storage: Storage) -> list[str]:
    prefix = f"models/{version.id}/engines/"
    return [item.key for item in storage.list_objects(settings.data_bucket, prefix)]
