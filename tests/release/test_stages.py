"""People's answers, and two promotions at once."""

import logging
import re
import threading
from dataclasses import replace
from typing import Any

import pytest

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import GateDecision
from gun_detection.errors import GunDetectionError, NotFoundError, ReleaseError, SettingsError
from gun_detection.release import canary
from gun_detection.release.champion import get_model
from gun_detection.release.pages import approval_text, decision_page, models_page, verdict_page
from gun_detection.release.registry import publish
from gun_detection.release.rules import Canary
from gun_detection.release.verdict import Outcome, Verdict
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model


def verdict(name: str, outcome: Outcome, *, blocks: bool = False) -> dict[str, Any]:
    return Verdict(
        rule=name,
        value=0.5,
        interval=(0.4, 0.6),
        limit=0.3,
        at_most=False,
        outcome=outcome,
        blocks=blocks,
        note="",
    ).model_dump(mode="json")


@pytest.fixture
def models(settings: Settings, storage: Storage) -> list[str]:
    ids = []
    for seed in (1, 2):
        with open_session(settings) as session:
            ids.append(publish(random_model(seed), settings, storage, session).id)
    return ids


def decide(settings: Settings, model_id: str, *, passed: bool = True, origin: str = "") -> int:
    with open_session(settings) as session:
        row = GateDecision(
            candidate_id=model_id,
            champion_id=None,
            holdout_id="h" * 64,
            passed=passed,
            policy={"name": "p", "version": "v", "rules": []},
            rules=[
                verdict("AP50 | of <b>this</b>", Outcome.PASSED),
                verdict("recall", Outcome.FAILED, blocks=not passed),
            ],
            origin=origin or None,
        )
        session.add(row)
        session.flush()
        return row.id


def test_an_answer_is_given_once(models: list[str], settings: Settings) -> None:
    decision = decide(settings, models[0])
    given = {"approved": False, "actor": "ann", "comment": "no"}
    for actor, comment in (("ann", "no"), ("ann", "no, again")):
        said = stages.answer(settings, decision, approved=False, actor=actor, comment=comment)
        assert said == given
    with pytest.raises(ReleaseError, match="refused by ann"):
        stages.answer(settings, decision, approved=True, actor="bob")
    with pytest.raises(ReleaseError, match="ann refused gate decision"):
        stages.promote(settings, models[0], "bob", "why", decision)
    with pytest.raises(NotFoundError):
        stages.answer(settings, 10**9, approved=True, actor="bob")
    again = decide(settings, models[0])
    assert stages.promote(settings, models[0], "bob", "why", again)["champion_id"] == models[0]


def test_a_promotion_says_by_which_policy_the_model_passed(
    models: list[str], settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gun_detection")
    assert stages.promote(settings, models[0], "a", "forced")["policy"] is None
    assert "policy" not in caplog.text
    with open_session(settings) as session:
        row = GateDecision(
            candidate_id=models[1],
            champion_id=models[0],
            holdout_id="h",
            passed=True,
            policy={"name": "trial"},
            rules=[],
        )
        session.add(row)
        session.flush()
        decision = row.id
    assert stages.promote(settings, models[1], "a", "b", decision)["policy"] == "trial"
    assert "by a, which passed the policy trial" in caplog.text


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(
    models: list[str], settings: Settings
) -> None:
    decisions = {model: decide(settings, model) for model in models}
    ready = threading.Barrier(2)
    told: dict[str, str] = {}

    def promote(model: str) -> None:
        ready.wait()
        try:
            stages.promote(settings, model, "a", "b", decisions[model])
        except GunDetectionError as error:
            told[model] = error.reason

    threads = [threading.Thread(target=promote, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [loser] = told
    assert told[loser] in ("PROMOTION_UNDER_WAY", "CHAMPION_CHANGED")
    with open_session(settings) as session:
        assert get_model(session, "champion").id == next(m for m in models if m != loser)


def test_no_way_leads_to_a_champion_whose_threshold_is_below_what_is_stored(
    models: list[str], settings: Settings
) -> None:
    high = settings.model_copy(update={"score_floor": 0.6})
    with pytest.raises(SettingsError, match="GUN_DETECTION_SCORE_FLOOR"):
        stages.promote(high, models[0], "a", "b")
    for model in models:
        stages.promote(settings, model, "a", "b")
    with pytest.raises(SettingsError, match=rf"{models[0]}, 0\.5, is below .* \(0\.6\)"):
        stages.rollback(high, "a", "b")
    with open_session(settings) as session:
        assert get_model(session, "champion").id == models[1]
    assert stages.rollback(settings, "a", "b")["champion_id"] == models[0]


def test_the_pages_say_what_was_decided(models: list[str], settings: Settings) -> None:
    with open_session(settings) as session:
        assert "There is no champion yet" in models_page(session)
        assert "decided nothing" in verdict_page(session, "airflow:retrain:x")
        with pytest.raises(NotFoundError):
            decision_page(session, 1)
    rejected = decide(settings, models[1], passed=False, origin="airflow:retrain:x")
    passed = decide(settings, models[0])
    stages.answer(settings, passed, approved=True, actor="ann", comment="<script>")
    stages.promote(settings, models[0], "ann", "looked at it", passed)
    with open_session(settings) as session:
        page = verdict_page(session, "airflow:retrain:x")
        assert page == decision_page(session, rejected)
        assert "is rejected" in page
        assert "&lt;b&gt;this" in page
        page = decision_page(session, passed)
        assert "&lt;script&gt;" in page
        assert "by ann" in page
        page = models_page(session)
        assert page.count(models[0]) >= 3
        assert ">rejected<" in page
        decision = session.get(GateDecision, passed)
        assert decision is not None
        text = approval_text(session, decision, settings)
    row = next(line for line in text.splitlines() if line.startswith("| AP50"))
    assert row.replace("\\|", "").count("|") == 6, "a name cannot add a cell"
    assert "<b>" not in row


def test_a_card_names_the_pictures_of_its_numbers(
    models: list[str], settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "fly_canary", lambda *_: Canary(difference=0.0, compared=8))
    own, drawn, judged = (
        stages.ingest(f"synthetic:40:{seed}", settings)["dataset_id"] for seed in (1, 2, 3)
    )
    with open_session(settings) as session:
        new = replace(random_model(1), dataset_id=own)
        trained = publish(new, settings, storage, session).id

    def numbers_of(model: str) -> str:
        files = stages.model_card(settings, model)
        [key] = re.findall(r"held-back pictures of data set (\w+)", files["card.md"].decode())
        assert f"held-back pictures of data set {key} with" in files["card.html"].decode()
        return str(key)

    for dataset in (own, drawn):
        for model in (trained, models[1]):
            stages.evaluate(settings, model, dataset)
    assert numbers_of(trained) == own[:16]
    assert numbers_of(models[1]) == drawn[:16], "an imported model has no data set of its own"
    stages.gate(settings, trained, judged, "trial")
    assert numbers_of(trained) == judged[:16]
    stages.gate(settings, trained, drawn, "trial")
    stages.evaluate(settings, trained, stages.ingest("synthetic:40:4", settings)["dataset_id"])
    assert numbers_of(trained) == drawn[:16]


def test_a_card_is_written_for_a_model_that_was_not_measured(
    models: list[str], settings: Settings, storage: Storage
) -> None:
    files = stages.model_card(settings, models[0])
    assert "not measured on a holdout yet" in files["card.md"].decode()
    assert storage.get(settings.data_bucket, f"models/{models[0]}/card.html") == files["card.html"]
