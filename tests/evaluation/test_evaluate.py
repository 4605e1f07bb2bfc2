"""Evaluations that are recorded: once, whoever makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import Evaluation
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.synthetic import draw_picture
from gun_detection.detector.architectures import DetectorConfig, build_detector, input_size
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor
from gun_detection.errors import ModelError
from gun_detection.evaluation import evaluate
from gun_detection.evaluation.evaluate import evaluate_folder, evaluate_version, load_samples
from gun_detection.images import DecodeLimits, SandboxedDecoder, decode
from gun_detection.release.champion import get_model
from gun_detection.release.packages import load_engine
from gun_detection.release.registry import publish
from gun_detection.scoring.local import look_at
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.config import resolve_config
from gun_detection.training.worker import open_data
from tests.conftest import random_model
from tests.evaluation.conftest import version_of
from tests.release.conftest import waiting_transactions


@pytest.mark.parametrize("when", ["before it is stored", "while it is stored"])
def test_two_at_once_are_one(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    dataset = stages.ingest("synthetic:40:5", settings)["dataset_id"]
    with open_session(settings) as session:
        model_id = publish(random_model(1), settings, storage, session).id
    others: list[int] = []

    def make() -> int:
        with open_session(settings) as session:
            model = get_model(session, model_id)
        return evaluate_version(model, dataset, settings, storage).id

    def overtaken(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made = function(*arguments, **options)
            if not others:
                others.append(0)
                others[0] = make()
            return made

        return call

    if when == "before it is stored":
        monkeypatch.setattr(evaluate, "render_report", overtaken(evaluate.render_report))
    else:
        monkeypatch.setattr(storage, "put", overtaken(storage.put))
    assert [make()] == others
    with open_session(settings) as session:
        assert session.scalar(select(func.count(Evaluation.id))) == 1


def test_no_transaction_waits_for_the_detector(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = stages.ingest("synthetic:40:5", settings)["dataset_id"]
    with open_session(settings) as session:
        model_id = publish(random_model(1), settings, storage, session).id
    waiting = []
    look = Predictor.__call__

    def watched(predictor: Predictor, images: Any) -> Any:
        waiting.append(waiting_transactions(settings))
        return look(predictor, images)

    monkeypatch.setattr(Predictor, "__call__", watched)
    stages.evaluate(settings, model_id, dataset)
    stages.compare(settings, model_id, model_id, dataset, "validation")
    assert waiting
    assert set(waiting) == {0}


def voc(box: str, size: tuple[int, int]) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        f"<object><name>gun</name><bndbox>{corners}</bndbox></object></annotation>"
    )


def test_a_folder_counts_no_boxes_that_an_ingest_would_refuse(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    picture = draw_picture(0, 2).data
    with SandboxedDecoder(settings) as decoder:
        height, width = decoder.decode(picture).pixels.shape[:2]
    labels = {
        "sound": voc("10 10 60 50", (width, height)),
        "loose": voc("-3 10 60 50", (width, height)),
        "scaled": voc("10 10 60 50", (2 * width, 2 * height)),
        "outside": voc(f"{width} 10 {2 * width} 50", (0, 0)),
        "inverted": voc("60 10 10 50", (width, height)),
        "damaged": "<annotation>",
    }
    for name, label in labels.items():
        (tmp_path / f"{name}.jpeg").write_bytes(picture)
        (tmp_path / f"{name}.xml").write_text(label)
    (tmp_path / "unlabelled.jpeg").write_bytes(picture)
    predictor = Predictor(
        build_detector(DetectorConfig(architecture="resnet18_fpn")), torch.device("cpu")
    )
    found = evaluate_folder(predictor, 0.5, str(tmp_path), settings, storage)
    truths = {sample.name: sample.matched.truth.tolist() for sample in found.samples.items}
    assert truths == {"sound.jpeg": [[10, 10, 60, 50]], "loose.jpeg": [[0, 10, 60, 50]]}
    assert found.rejected == {"SIZE_MISMATCH": 1, "BAD_BOX": 2, "BAD_LABEL": 1, "MISSING_LABEL": 1}


def test_a_model_that_computes_no_numbers_is_not_one_that_finds_nothing(
    settings: Settings, storage: Storage
) -> None:
    dataset = stages.ingest("synthetic:40:5", settings)["dataset_id"]
    new = random_model(1)
    new.model.roi_heads.box_predictor.cls_score.bias.data[0] = torch.nan
    with open_session(settings) as session:
        version = publish(new, settings, storage, session)
    with pytest.raises(ModelError, match=r"^\S+: the model computes what is no number") as caught:
        evaluate_version(version, dataset, settings, storage)
    assert caught.value.reason == "NOT_FINITE"
    with open_session(settings) as session:
        assert session.scalar(select(func.count(Evaluation.id))) == 0


def test_what_is_measured_is_what_scoring_finds(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    version = version_of(tmp_path, lambda number: (4, 4), settings, storage)
    assert version.dataset_id is not None
    row = evaluate_version(version, version.dataset_id, settings, storage)
    recorded = {item.name: item for item in load_samples(row, settings, storage).items}
    manifest = load_manifest(storage, settings.data_bucket, version.dataset_id)
    entries = {entry.name: entry for entry in manifest.split("holdout")}
    engine = load_engine(version, "eager", {}, settings, storage, EVALUATION_FLOOR)
    folder = evaluate_folder(engine.predictor, 0.5, str(tmp_path), settings, storage)
    by_file = {Path(item.name).name: item.matched for item in folder.samples.items}
    files = [tmp_path / "Images" / Path(name).name for name in recorded]
    scored = look_at(files, engine, settings, EVALUATION_FLOOR, None, lambda done, total: None)
    for (name, sample), looked in zip(recorded.items(), scored, strict=True):
        assert looked.found is not None
        assert len(looked.found.scores) > 0
        for found in (sample.matched.found, by_file[Path(name).name].found):
            np.testing.assert_allclose(found.boxes, looked.found.boxes, atol=0.01)
            np.testing.assert_allclose(found.scores, looked.found.scores, atol=1e-5)
        entry, properties = entries[name], sample.properties
        assert (properties.width, properties.height) == (entry.width, entry.height)
        for truth in (sample.matched.truth, by_file[Path(name).name].truth):
            np.testing.assert_allclose(truth, entry.box_array(), atol=0.01)


def test_a_threshold_is_chosen_on_what_scoring_decodes(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    version = version_of(tmp_path, lambda number: (4, 4), settings, storage)
    assert version.dataset_id is not None
    config = resolve_config(settings, "smoke")
    data: Any = open_data(version.dataset_id, config, settings, storage)
    limits, fit = DecodeLimits.from_settings(settings), input_size(config.detector)
    for index, entry in enumerate(data.validation.entries):
        pixels, target = data.validation[index]
        expected = decode(data.validation.read(index), limits, fit).pixels
        assert pixels.shape[1] < entry.height
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        factor = entry.width / pixels.shape[2]
        np.testing.assert_allclose(target["boxes"] * factor, entry.box_array(), rtol=0.02)
