"""Evaluations that are recorded: once, whoever makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import func, select

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import Evaluation
from gun_detection.datasets.synthetic import draw_picture
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.inference import Predictor
from gun_detection.evaluation import evaluate
from gun_detection.evaluation.evaluate import evaluate_folder, evaluate_version
from gun_detection.images import SandboxedDecoder
from gun_detection.release.champion import get_model
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model


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
            return evaluate_version(model, dataset, settings, storage, session).id

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
