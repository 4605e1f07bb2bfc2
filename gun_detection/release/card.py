"""The model card of a version, generated from what is recorded, as HTML and as Markdown.

After Mitchell et al., "Model Cards for Model Reporting", 2019.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment
from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import (
    DatasetVersion,
    Evaluation,
    GateDecision,
    ModelVersion,
    Promotion,
)
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.evaluation.evaluate import load_labelled, load_samples
from gun_detection.evaluation.metrics import Metrics
from gun_detection.evaluation.report import (
    data_uri,
    draw_failure,
    number_rows,
    rank_failures,
    slice_row,
)
from gun_detection.evaluation.slices import Slice
from gun_detection.release.champion import get_model
from gun_detection.release.pages import environment
from gun_detection.settings import Settings
from gun_detection.storage import Storage

_FAILURES = 4


def card_key(model_id: str) -> str:
    return f"models/{model_id}/card.html"


def write_card(model_id: str, settings: Settings, storage: Storage) -> dict[str, bytes]:
    """Make the card anew and store it beside the model; its files by their names.

    `card.html` holds its pictures, `card.md` refers to `failures/N.jpg` beside it. It shows what
    is committed, and no transaction is open while pictures are read, drawn and stored.
    """
    files = make_card(model_id, settings, storage)
    kinds = {"html": "text/html; charset=utf-8", "md": "text/markdown; charset=utf-8"}
    for name, data in files.items():
        kind = kinds.get(name.rpartition(".")[2], "image/jpeg")
        storage.put(settings.data_bucket, f"models/{model_id}/{name}", data, content_type=kind)
    return files


def make_card(model_id: str, settings: Settings, storage: Storage) -> dict[str, bytes]:
    """The files of the card: `card.html`, `card.md` and the pictures of known failures."""
    with open_session(settings) as session:
        model = get_model(session, model_id)
        row = _shown(session, model)
        content = _content(session, model, row)
    pictures = _failures(row, model.threshold, settings, storage) if row else {}
    content["failures"] = _captions(pictures)
    templates: Environment = environment()
    page = templates.get_template("card.html").render(
        content,
        images={name: data_uri(data) for name, (_, data) in pictures.items()},
    )
    text = templates.get_template("card.md").render(content)
    files = {"card.html": page.encode(), "card.md": text.encode()}
    return files | {name: data for name, (_, data) in pictures.items()}


def _shown(session: Session, model: ModelVersion) -> Evaluation | None:
    """The evaluation that the last gate decision on the model rests on.

    Without a decision it is that on the model's own data set, and the last one without either.
    """
    decided = session.scalar(
        select(Evaluation)
        .join(GateDecision, GateDecision.candidate_evaluation_id == Evaluation.id)
        .where(GateDecision.candidate_id == model.id)
        .order_by(GateDecision.id.desc())
        .limit(1)
    )
    if decided is not None:
        return decided
    own = Evaluation.dataset_id == model.dataset_id
    return session.scalar(
        select(Evaluation)
        .where(Evaluation.model_id == model.id, Evaluation.split == "holdout")
        .order_by(own.desc(), Evaluation.id.desc())
        .limit(1)
    )


def _content(session: Session, model: ModelVersion, row: Evaluation | None) -> dict[str, Any]:
    metrics, slices = None, []
    if row is not None:
        known = {name: row.metrics[name] for name in Metrics.model_fields}
        metrics = Metrics.model_validate(known)
        slices = [Slice.model_validate(item) for item in row.metrics["slices"]]
    dataset = session.get(DatasetVersion, model.dataset_id) if model.dataset_id else None
    decisions = select(GateDecision).where(GateDecision.candidate_id == model.id)
    promotions = select(Promotion).where(Promotion.model_id == model.id)
    return {
        "model": model,
        "dataset": dataset,
        "detector": model.config["detector"],
        "initial": _initial(model),
        "config": {k: v for k, v in model.config.items() if k != "detector"},
        "training": model.training,
        "evaluation": row,
        "metrics": metrics,
        "numbers": number_rows(metrics) if metrics else [],
        "slices": [slice_row(item) for item in slices],
        "decisions": session.scalars(decisions.order_by(GateDecision.id)).all(),
        "promotions": session.scalars(promotions.order_by(Promotion.id)).all(),
    }


def _initial(model: ModelVersion) -> str:
    """What the training began with, in words."""
    if not model.training:
        return "what was imported"
    name = model.config.get("initial_weights")
    return "random values" if name in (None, "none") else str(name)


def _failures(
    row: Evaluation, threshold: float, settings: Settings, storage: Storage
) -> dict[str, tuple[str, bytes]]:
    """(caption, JPEG) of the worst pictures of the holdout by file name."""
    samples = load_samples(row, settings, storage).items
    manifest = load_manifest(storage, settings.data_bucket, row.dataset_id)
    pictures = DetectionDataset(manifest, "holdout", settings, storage)
    found: dict[str, tuple[str, bytes]] = {}
    for kind, worst in rank_failures(samples, threshold).items():
        for index in worst[:_FAILURES]:
            pixels = load_labelled(pictures, index).pixels
            name = f"failures/{len(found) + 1}.jpg"
            caption = f"{kind}: {samples[index].name}"
            found[name] = caption, draw_failure(samples[index], pixels, threshold)
    return found


def _captions(pictures: Mapping[str, tuple[str, bytes]]) -> dict[str, str]:
    return {name: caption for name, (caption, _) in pictures.items()}
