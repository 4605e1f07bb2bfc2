"""People's answers, and two promotions at once."""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import GateDecision, Promotion
from gun_detection.detector.weights import serialize
from gun_detection.errors import (
    GunDetectionError,
    NotFoundError,
    ReleaseError,
    ServiceUnavailableError,
    SettingsError,
)
from gun_detection.release import canary, card
from gun_detection.release.champion import get_model
from gun_detection.release.pages import approval_text, decision_page, models_page, verdict_page
from gun_detection.release.registry import NewModel, import_file, publish
from gun_detection.release.rules import Canary
from gun_detection.release.verdict import Outcome, Verdict
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.release.conftest import watch_storage


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
    return [published(random_model(seed), settings, storage) for seed in (1, 2)]


def published(new: NewModel, settings: Settings, storage: Storage) -> str:
    with open_session(settings) as session:
        return publish(new, settings, storage, session).id


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


def test_no_transaction_waits_for_the_bucket(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(canary, "fly_canary", lambda *_: Canary(difference=0.0, compared=8))
    own, other = (stages.ingest(f"synthetic:40:{seed}", settings)["dataset_id"] for seed in (1, 2))
    first, second = (
        published(replace(random_model(seed), dataset_id=own), settings, storage) for seed in (1, 2)
    )
    new = random_model(3)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(serialize(new.model, new.detector)[0])

    def judge() -> None:
        decision = stages.gate(settings, second, other, "trial")
        assert "was not compared" in decision["caution"], "it read both manifests"

    def take_in() -> None:
        with open_session(settings) as session:
            import_file(file, "resnet18_fpn", None, settings, storage, session)

    waiting = watch_storage(settings, monkeypatch)
    found = {}
    acts: dict[str, Callable[[], Any]] = {
        "import": take_in,
        "promote": lambda: stages.promote(settings, first, "a", "b"),
        "gate": judge,
        "promote the candidate": lambda: stages.promote(settings, second, "a", "b"),
        "roll back": lambda: stages.rollback(settings, "a", "b"),
        "card": lambda: stages.model_card(settings, "champion"),
        "prune": lambda: stages.prune(settings, 1),
    }
    for name, act in acts.items():
        waiting.clear()
        act()
        found[name] = set(waiting)
    assert found == {name: {0} for name in acts}


def test_a_card_that_cannot_be_written_takes_nothing_back_and_doubles_nothing(
    models: list[str],
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(canary, "fly_canary", lambda *_: Canary(difference=0.0, compared=8))
    dataset = stages.ingest("synthetic:40:1", settings)["dataset_id"]

    def fail(*_: object) -> None:
        raise ServiceUnavailableError("the bucket is away")

    with monkeypatch.context() as patch:
        patch.setattr(card, "make_card", fail)
        judged = stages.gate(settings, models[0], dataset, "trial")
        made = stages.promote(settings, models[0], "a", "b", judged["decision_id"])
        with pytest.raises(ServiceUnavailableError):
            stages.model_card(settings, models[0])
    assert (judged["passed"], made["champion_id"]) == (True, models[0])
    told = [message for message in caplog.messages if "the bucket is away" in message]
    assert len(told) == 2
    assert all(f"`gun-detection card {models[0]} --out DIR`" in message for message in told)
    with open_session(settings) as session:
        assert session.scalars(select(GateDecision.id)).all() == [judged["decision_id"]]
        assert session.scalar(select(func.count(Promotion.id))) == 1
    page = stages.model_card(settings, models[0])["card.md"].decode()
    assert f"(decision {judged['decision_id']})" in page
    assert "promoted by a" in page
