"""The views show what the last champion that looked at a picture said of it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.detector.detections import Detections
from gun_detection.release.champion import promote, rollback
from gun_detection.release.registry import publish
from gun_detection.scoring.plan import Plan
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.scoring.conftest import picture, rows, score_all, upload
from tests.scoring.simulated import Simulated

Planned = Callable[..., Plan]


class Blind(Simulated):
    """Finds nothing."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        return [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)) for _ in images]


@pytest.fixture
def another(settings: Settings, storage: Storage) -> Callable[..., ModelVersion]:
    def make(seed: int, *, champion: bool) -> ModelVersion:
        with open_session(settings) as session:
            model = publish(random_model(seed), settings, storage, session)
        if champion:
            with open_session(settings) as session:
                promote(session, model.id, actor="tester", reason="a test")
        return model

    return make


def test_what_a_rolled_back_model_said_does_not_come_back(
    plan: Planned,
    champion: ModelVersion,
    another: Callable[..., ModelVersion],
    settings: Settings,
    storage: Storage,
    engine: Simulated,
) -> None:
    def seen() -> tuple[object, ...]:
        return (
            rows(settings, "SELECT key, model_id, by_champion FROM current_outcomes ORDER BY key"),
            rows(settings, "SELECT key, x1 FROM current_detections ORDER BY detection_id"),
            rows(settings, "SELECT key, model_id FROM quarantine"),
        )

    upload(storage, settings, gun=picture(1), words=b"words")
    score_all(plan(), settings, storage, engine)
    first = seen()
    found = first[1]
    assert found
    bad = another(1, champion=True)
    score_all(plan(kind="rescore", model=bad), settings, storage, Blind())
    assert seen() == (
        [("gun.jpg", bad.id, True), ("words.jpg", bad.id, True)],
        [],
        [("words.jpg", bad.id)],
    )
    with open_session(settings) as session:
        rollback(session, actor="tester", reason="it finds nothing")
    assert seen() == first
    good = another(2, champion=True)
    still = (
        [("gun.jpg", champion.id, False), ("words.jpg", champion.id, False)],
        found,
        [("words.jpg", champion.id)],
    )
    assert seen() == still
    candidate = another(3, champion=False)
    score_all(plan(kind="rescore", model=candidate), settings, storage, Blind())
    assert seen() == still, "one that never was champion comes last"
    score_all(plan(kind="rescore", model=good), settings, storage, engine)
    assert seen()[0] == [("gun.jpg", good.id, True), ("words.jpg", good.id, True)]
    assert seen()[2] == [("words.jpg", good.id)]


def test_before_any_champion_looked_the_newest_outcome_is_shown(
    plan: Planned,
    another: Callable[..., ModelVersion],
    settings: Settings,
    storage: Storage,
    engine: Simulated,
) -> None:
    upload(storage, settings, gun=picture(1))
    for seed, kind in ((1, "new"), (2, "rescore")):
        candidate = another(seed, champion=False)
        score_all(plan(kind=kind, model=candidate), settings, storage, engine)
    view = "SELECT key, model_id, by_champion FROM current_outcomes"
    assert rows(settings, view) == [("gun.jpg", candidate.id, False)]
