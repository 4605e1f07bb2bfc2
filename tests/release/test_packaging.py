"""Packages of a small detector with random weights: made, checked, refused."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select

from gun_detection.database import open_session
from gun_detection.database.models import EnginePackage, ModelVersion
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import shape_class
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor
from gun_detection.detector.running import DetectorEngine, runnable
from gun_detection.errors import ModelError, SettingsError
from gun_detection.evaluation.evaluate import evaluate_version, load_labelled, load_samples
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.samples import Labelled, Samples, measure
from gun_detection.release import packaging
from gun_detection.release.packages import open_engine, package_key
from gun_detection.release.packaging import drift, package_all
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.evaluation.conftest import version_of
from tests.release.conftest import F32, make, stored, wanting

PIXELS = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


def test_a_package_scores_as_the_reference_does(
    version: ModelVersion, settings: Settings, storage: Storage
) -> None:
    row = make(version, F32, settings, storage)
    assert row.accepted, row.reason
    assert row.ap50 == pytest.approx(row.reference_ap50, abs=1e-6)
    assert row.pictures > 0
    assert "openvino" in row.toolchain
    keys = [package_key(version.id, F32, file) for file in row.files]
    assert sorted(keys) == stored(version, settings, storage)
    reference = open_engine(version, wanting("eager", settings), storage)
    engine = open_engine(version, wanting(F32, settings), storage)
    assert (engine.name, engine.batch, engine.input_size) == (F32, 1, reference.input_size)
    assert torch.get_num_threads() == 1 or engine.streams == 1
    [expected], [found] = reference([PIXELS]), engine([PIXELS])
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("enough", "expected"), [(3, 3), (100, 100), (1000, None)])
def test_an_engine_looks_at_few_regions_where_they_are_enough(
    enough: int,
    expected: int | None,
    version: ModelVersion,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def check(self: object, engine: DetectorEngine) -> packaging._Result:
        most = engine.predictor._model.rpn.post_nms_top_n()
        tried.append(most)
        return packaging._Result(accepted=most >= enough, reason="so many regions")

    monkeypatch.setattr(packaging, "FEW_PROPOSALS", 3)
    monkeypatch.setattr(packaging._Packaging, "_check", check)
    row = make(version, F32, settings, storage)
    assert (tried, row.accepted) == ([3] if enough == 3 else [3, 100], expected is not None)
    if expected is not None:
        engine = open_engine(version, wanting(F32, settings), storage)
        assert engine.predictor._model.rpn.post_nms_top_n() == expected


@pytest.mark.usefixtures("quick")
def test_a_package_that_finds_less_is_refused(
    version: ModelVersion, settings: Settings, storage: Storage
) -> None:
    assert version.dataset_id is not None
    evaluation = evaluate_version(version, version.dataset_id, settings, storage)
    samples = load_samples(evaluation, settings, storage)
    # As if the reference had found every gun.
    perfect = [
        replace(item, matched=Matched.of(truth, Detections(truth, np.ones(len(truth), np.float32))))
        for item in samples.items
        for truth in [item.matched.truth.astype(np.float32)]
    ]
    key = evaluation.report_key.removesuffix(".html") + ".json"
    storage.put(settings.data_bucket, key, Samples(perfect, "cpu").to_json())
    row = make(version, F32, settings, storage)
    assert (row.accepted, row.reference_ap50, row.files) == (False, 1.0, {})
    assert stored(version, settings, storage) == []
    with pytest.raises(ModelError, match=r"that of the reference 1\.0000") as caught:
        open_engine(version, wanting(F32, settings), storage)
    assert caught.value.reason == "PACKAGE_REFUSED"
    assert open_engine(version, wanting("auto", settings), storage).name == "eager"


@pytest.mark.usefixtures("quick")
def test_a_package_that_computes_no_numbers_is_refused(
    version: ModelVersion, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = packaging._Packaging._load

    def damaged(self: packaging._Packaging, name: str, files: Any) -> DetectorEngine:
        engine = load(self, name, files)
        if name == F32:
            engine.predictor._model.roi_heads.box_predictor.cls_score.bias.data[0] = np.nan
        return engine

    monkeypatch.setattr(packaging._Packaging, "_load", damaged)
    row = make(version, F32, settings, storage)
    assert (row.accepted, row.files) == (False, {})
    assert "what is no number" in row.reason


def test_an_imported_model_cannot_be_checked(settings: Settings, storage: Storage) -> None:
    with open_session(settings) as session:
        imported = publish(random_model(2), settings, storage, session)
    with pytest.raises(ModelError, match=f"gun-detection package {imported.id}") as caught:
        open_engine(imported, wanting(F32, settings), storage)
    assert caught.value.reason == "NOT_PACKAGED"
    row = make(imported, F32, settings, storage)
    assert not row.accepted
    assert "imported" in row.reason
    assert open_engine(imported, wanting("auto", settings), storage).name == "eager"


@pytest.mark.usefixtures("quick")
def test_every_engine_of_the_machine_and_each_once(
    version: ModelVersion, settings: Settings, storage: Storage
) -> None:
    heard = []
    rows = package_all(version, settings, storage, lambda *now: heard.append(now))
    make(version, F32, settings, storage)
    assert tuple(row.engine for row in rows) == runnable(torch.device("cpu"))
    with open_session(settings) as session:
        assert len(session.scalars(select(EnginePackage)).all()) == len(rows)
    assert heard[-1] == (rows[0].pictures, rows[0].pictures)
    # The holdout is measured on; 8 bits are fitted to training pictures, all of so few.
    assert version.dataset_id is not None
    manifest = load_manifest(storage, settings.data_bucket, version.dataset_id)
    read = {path.name for path in (settings.home / "cache" / "images").glob("*/*")}
    seen = {entry.sha256 for entry in manifest.split("holdout")}
    if "openvino-int8" in runnable(torch.device("cpu")):
        seen |= {entry.sha256 for entry in manifest.split("train")}
    assert read == seen


@pytest.mark.usefixtures("quick")
def test_an_engine_that_breaks_takes_nothing_back(
    version: ModelVersion, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = packaging._Packaging._build

    def broken(self: packaging._Packaging, engine: str) -> dict[str, bytes]:
        if engine != F32:
            raise MemoryError
        return build(self, engine)

    monkeypatch.setattr(packaging._Packaging, "_build", broken)
    monkeypatch.setattr(packaging, "runnable", lambda _: (F32, "openvino-bf16"))
    monkeypatch.setattr(packaging, "require_runnable", lambda engine: None)
    with pytest.raises(MemoryError):
        package_all(version, settings, storage)
    with open_session(settings) as session:
        assert session.scalars(select(EnginePackage.engine)).all() == [F32]


@pytest.mark.usefixtures("quick")
def test_a_package_whose_scores_all_moved_is_refused(
    version: ModelVersion, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert version.dataset_id is not None
    evaluation = evaluate_version(version, version.dataset_id, settings, storage)
    truths = [
        item.matched.truth.astype(np.float32)
        for item in load_samples(evaluation, settings, storage).items
    ]
    manifest = load_manifest(storage, settings.data_bucket, version.dataset_id)
    pictures = DetectionDataset(manifest, "holdout", settings, storage)
    known = {
        load_labelled(pictures, index).pixels.tobytes(): truth for index, truth in enumerate(truths)
    }

    class Scoring:
        """Finds every gun, and gives all of them the same score."""

        device = torch.device("cpu")

        def __init__(self, score: float) -> None:
            self.score = score

        def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
            found = [known[image.tobytes()] for image in images]
            return [
                Detections(boxes, np.full(len(boxes), self.score, np.float32)) for boxes in found
            ]

    def engine(score: float) -> DetectorEngine:
        scoring: Any = Scoring(score)
        return DetectorEngine(F32, scoring, (9999, 9999), device="cpu", streams=1, batch=1)

    samples = load_samples(evaluation, settings, storage)
    perfect = [
        replace(item, matched=Matched.of(truth, Detections(truth, np.ones(len(truth), np.float32))))
        for item, truth in zip(samples.items, truths, strict=True)
    ]
    key = evaluation.report_key.removesuffix(".html") + ".json"
    storage.put(settings.data_bucket, key, Samples(perfect, "cpu").to_json())
    for score, accepted in ((0.9, True), (0.4, False)):
        monkeypatch.setattr(packaging._Packaging, "_load", lambda *_, score=score: engine(score))
        row = make(version, F32, settings, storage)
        assert (row.accepted, row.ap50, row.reference_ap50) == (accepted, 1.0, 1.0), row.reason
    assert "recall 0.000 against 1.000" in row.reason


def test_an_engine_is_checked_in_batches_of_like_shapes(
    settings: Settings, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = version_of(
        tmp_path, lambda number: (1 + number % 2, 1 + number // 2 % 2), settings, storage
    )
    batches: list[list[tuple[int, ...]]] = []
    model = random_model(1).model.eval()

    class Alone:
        """Finds what the reference does, whatever else is in the batch."""

        device = torch.device("cpu")

        def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
            batches.append([image.shape for image in images])
            return [found for image in images for found in predictor([image])]

    predictor = Predictor(model, Alone.device, EVALUATION_FLOOR)
    engine = DetectorEngine(
        F32,
        Alone(),
        (9999, 9999),
        device="cpu",
        streams=1,
        batch=3,  # type: ignore[arg-type]
    )
    monkeypatch.setattr(packaging._Packaging, "_load", lambda *_: engine)
    row = make(mixed, F32, settings, storage)
    assert row.accepted
    assert "boxes differ by 0.00 px, by 0.0 px" in row.reason
    checked = batches[: -(-row.pictures // 3)]
    assert [len(shapes) for shapes in checked[:-1]] == [3] * (len(checked) - 1)
    # A batch is of one shape but where one shape ends and the next begins.
    kinds = {shape_class(shape) for shapes in checked for shape in shapes}
    assert sum(len({*map(shape_class, shapes)}) > 1 for shapes in checked) < len(kinds)
    # What one costs is measured in batches, too.
    assert 3 in {len(shapes) for shapes in batches[len(checked) :]}


@pytest.mark.usefixtures("quick")
def test_an_engine_is_checked_on_what_scoring_decodes_for_it(
    settings: Settings, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_version = version_of(tmp_path, lambda number: (4, 4), settings, storage)
    sides: dict[str, int] = {}

    def measured(
        predictor: Predictor, pictures: Iterable[Labelled], *rest: Any, batch: int
    ) -> Samples:
        looked_at = list(pictures)
        sides.update({picture.name: max(picture.pixels.shape) for picture in looked_at})
        return measure(predictor, looked_at, *rest, batch=batch)

    monkeypatch.setattr("gun_detection.release.packaging.measure", measured)
    row = make(large_version, F32, settings, storage)
    assert row.accepted
    assert large_version.dataset_id is not None
    manifest = load_manifest(storage, settings.data_bucket, large_version.dataset_id)
    whole = {entry.name: max(entry.width, entry.height) for entry in manifest.split("holdout")}
    assert {large / sides[name] for name, large in whole.items()} == {2, 4}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_needed(version: ModelVersion, settings: Settings, storage: Storage) -> None:
    with pytest.raises(SettingsError, match="needs a GPU"):
        make(version, "cuda", settings, storage)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([[0, 0, 10, 10, 0.9]], 0.0),
        ([[1, 0, 10, 12, 0.2]], 2.0),
        ([[80, 80, 90, 90, 0.9]], 0.0),
        ([], 0.0),
    ],
    ids=["the same", "apart", "another gun", "nothing"],
)
def test_drift(after: list[list[float]], expected: float) -> None:
    before = [[0.0, 0, 10, 10, 0.8], [50, 50, 60, 60, 0.05]]
    found = [np.array(rows, np.float32).reshape(-1, 5) for rows in (before, after)]
    one, other = ([Detections(rows[:, :4], rows[:, 4])] for rows in found)
    assert drift(one, other)[1] == pytest.approx(expected, abs=0.05)
