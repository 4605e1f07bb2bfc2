"""Evaluations that are recorded: once, whoever makes them."""

from typing import Any

import pytest
from sqlalchemy import func, select

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import Evaluation
from gun_detection.evaluation import evaluate
from gun_detection.evaluation.evaluate import evaluate_version
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
