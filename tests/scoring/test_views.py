"""The views show what the last champion that looked at a picture said of it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.detector.detections import Detections
from gun_detection.errors import ReleaseError, TerminalError
from gun_detection.release.champion import promote, rollback
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import model_row
from tests.scoring.conftest import champion_after, count, later, picture, rows, score_all, upload
from tests.scoring.simulated import DENIED, Refusing, Simulated

Planned = Callable[..., Plan]


class Blind(Simulated):
    """Finds nothing."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        return [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)) for _ in images]


@pytest.fixture
def another(settings: Settings) -> Callable[..., ModelVersion]:
    def make(seed: int, *, champion: bool) -> ModelVersion:
        with open_session(settings) as session:
            model = model_row(session, seed)
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


def test_what_was_found_in_a_picture_that_is_gone_stays_in_the_views(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    names = [f"b{number:02}" for number in range(14)]
    upload(storage, settings, **{name: picture(seed) for seed, name in enumerate(names)})
    score_all(plan(), settings, storage, engine)
    found = rows(settings, "SELECT key, x1, score FROM current_detections ORDER BY detection_id")
    assert found
    newer = champion_after(settings)
    for name in names:
        storage.delete(settings.uploads_bucket, f"{name}.jpg")
    made = plan(kind="rescore", model=newer)
    score_all(made, settings, storage, engine)
    summary = finish_run(made.run_id, settings)
    assert summary.reasons == {"OBJECT_MISSING": 14}, "more than the budget, and no failure"
    view = "SELECT key, x1, score FROM current_detections ORDER BY detection_id"
    assert rows(settings, view) == found
    assert count(settings, "quarantine") == 0
    assert plan(kind="rescore", model=newer).planned == 0


@pytest.mark.parametrize("reason", ["ARCHIVED", "ACCESS_DENIED", "OUT_OF_MEMORY"])
def test_what_was_found_in_a_picture_that_the_champion_cannot_look_at_stays_in_the_views(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated, reason: str
) -> None:
    upload(storage, settings, a=picture(1), b=picture(2))
    score_all(plan(), settings, storage, engine)
    found = rows(settings, "SELECT key, x1 FROM current_detections ORDER BY detection_id")
    assert {key for key, _ in found} == {"a.jpg"}, "the other one holds none"
    newer = champion_after(settings)
    refusing = Refusing(settings, TerminalError("no", reason=reason), {"a.jpg"})
    score_all(plan(kind="rescore", model=newer), settings, refusing, engine)
    view = "SELECT key, by_champion FROM current_outcomes ORDER BY key"
    assert rows(settings, view) == [("a.jpg", False), ("b.jpg", True)]
    view = "SELECT DISTINCT key FROM current_detections ORDER BY key"
    assert rows(settings, view) == [("a.jpg",)]
    # Why the champion has nothing to say is to be seen, too.
    assert rows(settings, "SELECT key, reason FROM quarantine") == [("a.jpg", reason)]


def test_what_waited_to_be_judged_anew_is_when_its_model_is_champion_again(
    plan: Planned,
    champion: ModelVersion,
    settings: Settings,
    storage: Storage,
    engine: Simulated,
) -> None:
    upload(storage, settings, a=picture(1), b=picture(2))
    score_all(plan(), settings, Refusing(settings, DENIED, {"a.jpg"}), engine)
    newer = champion_after(settings)
    later(settings)
    score_all(plan(model=newer), settings, storage, engine)
    found = rows(settings, "SELECT x1 FROM current_detections ORDER BY detection_id")
    assert found
    with open_session(settings) as session:
        promote(session, champion.id, actor="tester", reason="the other one is worse")
    # Until then it is what the other model found that counts.
    assert rows(settings, "SELECT x1 FROM current_detections ORDER BY detection_id") == found
    assert count(settings, "outdated_uploads") == 1
    made = plan(kind="rescore")
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    view = "SELECT DISTINCT outcome, by_champion FROM current_outcomes"
    assert rows(settings, view) == [("scored", True)]
    assert plan(kind="rescore").planned == 0


def test_what_never_was_champion_scores_no_uploads(
    champion: ModelVersion, settings: Settings, storage: Storage
) -> None:
    with open_session(settings) as session:
        candidate = model_row(session, 2)
    with pytest.raises(ReleaseError, match="never was champion"):
        stages.survey_uploads(settings, model=candidate.id)
    stages.survey_uploads(settings, model=champion.id)
    champion_after(settings)
    assert stages.survey_uploads(settings, "rescore", model=champion.id)["planned"] == 0
