"""A candidate that passes is not promoted without a person where the rules do not see it all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import GateDecision
from gun_detection.datasets.synthetic import draw_pictures
from gun_detection.release import canary
from gun_detection.release.champion import promote
from gun_detection.release.gate import why_again
from gun_detection.release.pages import decision_page
from gun_detection.release.registry import publish
from gun_detection.release.rules import Canary
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model

Published = Callable[..., str]


@pytest.fixture
def published(settings: Settings, storage: Storage) -> Published:
    """Publishes a model of a data set, or an imported one; the same seed gives the same weights."""

    def make(seed: int, dataset_id: str | None = None, **network: Any) -> str:
        new = replace(random_model(seed), dataset_id=dataset_id)
        config = {"detector": new.config["detector"] | network}
        new = replace(new, config=config, config_hash=f"{seed}-{network}")
        with open_session(settings) as session:
            return publish(new, settings, storage, session).id

    return make


@pytest.fixture(autouse=True)
def stored_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored model is what was measured, without the process that looks."""
    monkeypatch.setattr(canary, "fly_canary", lambda *_: Canary(difference=0.0, compared=8))


def crown(settings: Settings, model: str) -> None:
    with open_session(settings) as session:
        promote(session, model, actor="tester", reason="a test")


def judge(
    settings: Settings, model: str, dataset_id: str, policy: str = "trial", **asked: Any
) -> dict[str, Any]:
    judged = stages.gate(settings, model, dataset_id, policy, **asked)
    assert judged["passed"], judged["explanation"]
    return judged


def export(root: Path, *, labelled: Callable[[int], bool], shift: float = 0.0) -> str:
    """Forty pictures in a folder, four of five with a gun; the boxes of those not `labelled` go."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "Images").mkdir(parents=True)
    (root / "Labels").mkdir()
    for number, picture in enumerate(draw_pictures(40, seed=5)):
        boxes = picture.boxes + shift if labelled(number) else []
        rows = [" ".join(f"{value:g}" for value in box) for box in boxes]
        (root / "Images" / f"{number}.jpeg").write_bytes(picture.data)
        (root / "Labels" / f"{number}.txt").write_text("\n".join([str(len(rows)), *rows]))
    return str(root)


def test_guns_that_lost_their_labels_are_told_of(
    published: Published, settings: Settings, tmp_path: Path
) -> None:
    whole, moved, half = (
        stages.ingest(export(tmp_path / "guns", **kind), settings)["dataset_id"]
        for kind in (
            {"labelled": lambda _: True},
            {"labelled": lambda _: True, "shift": 0.5},
            {"labelled": lambda number: number % 2 == 0},
        )
    )
    assert len({whole, moved, half}) == 3
    crown(settings, published(1, whole))
    judged = judge(settings, published(2, moved), moved)
    assert (judged["promotion"], judged["caution"]) == ("auto", None), "drawn a little otherwise"
    judged = judge(settings, published(2, half), half)
    assert judged["promotion"] == "approve"
    assert "have other labels now and 0 are gone" in judged["caution"]
    assert "0 have other labels" not in judged["caution"]


def test_an_imported_champion_counts_by_the_pictures_that_it_was_chosen_by(
    published: Published, settings: Settings
) -> None:
    own, other = (stages.ingest(f"synthetic:40:{seed}", settings)["dataset_id"] for seed in (1, 6))
    imported, candidate = published(1), published(2, other)
    chosen = judge(settings, imported, own)
    stages.promote(settings, imported, "tester", "a test", chosen["decision_id"])
    for _ in range(2):
        # By the second time the champion was measured on the new pictures, too.
        judged = judge(settings, candidate, other)
        assert judged["promotion"] == "approve"
        assert "only 0% of the" in judged["caution"]
    assert judge(settings, published(2, own), own)["caution"] is None


@pytest.mark.parametrize(("measured", "said"), [(True, "only 0% of the"), (False, "nobody knows")])
def test_an_imported_champion_that_was_forced_in_is_not_replaced_without_a_person(
    published: Published, settings: Settings, measured: bool, said: str
) -> None:
    own, other = (stages.ingest(f"synthetic:40:{seed}", settings)["dataset_id"] for seed in (1, 6))
    imported = published(1)
    if measured:
        stages.evaluate(settings, imported, own)
    crown(settings, imported)
    candidate = published(2, other)
    for _ in range(2):
        judged = judge(settings, candidate, other)
        assert judged["promotion"] == "approve"
        assert said in judged["caution"]


def test_who_was_rolled_back_does_not_come_back_without_a_person(
    published: Published, settings: Settings
) -> None:
    dataset = stages.ingest("synthetic:40:1", settings)["dataset_id"]
    first, second = published(1, dataset), published(2, dataset)
    crown(settings, first)
    judged = judge(settings, second, dataset)
    assert (judged["promotion"], judged["caution"]) == ("auto", None)
    stages.promote(settings, second, "tester", "a test", judged["decision_id"])
    stages.rollback(settings, "ann", "false alarms at the gate of the school")
    judged = judge(settings, second, dataset)
    assert judged["promotion"] == "approve"
    for text in (judged["caution"], judged["explanation"], judged["approval_text"]):
        assert "ann rolled it back on" in text
        assert "false alarms at the gate of the school" in text
    # Who approves it all the same is not asked again by a gate that is tried again.
    stages.promote(settings, second, "bob", "it was the camera", judged["decision_id"])
    assert judge(settings, second, dataset)["promotion"] == "auto"


@pytest.mark.parametrize("comment", ["marks umbrellas", ""])
def test_who_was_refused_does_not_come_in_without_a_person(
    published: Published, settings: Settings, comment: str
) -> None:
    dataset = stages.ingest("synthetic:40:1", settings)["dataset_id"]
    first, second = published(1, dataset), published(2, dataset)
    judged = judge(settings, second, dataset)
    assert (judged["promotion"], judged["caution"]) == ("auto", None)
    stages.answer(settings, judged["decision_id"], approved=False, actor="carol", comment=comment)
    for champion in (None, first):
        if champion is not None:
            crown(settings, champion)
        judged = judge(settings, second, dataset)
        assert judged["promotion"] == "approve"
        for text in (judged["caution"], judged["explanation"]):
            assert f"{second} was refused on " in text
            assert text.endswith(f"by carol: {comment}" if comment else "by carol")
    assert judge(settings, published(3, dataset), dataset)["caution"] is None


@pytest.mark.parametrize(("asked", "mode"), [("auto", "approve"), ("manual", "manual")])
def test_a_person_is_asked_what_the_rules_leave_open(
    published: Published, settings: Settings, tmp_path: Path, asked: str, mode: str
) -> None:
    dataset = stages.ingest("synthetic:40:1", settings)["dataset_id"]
    crown(settings, published(1, dataset))
    policy = tmp_path / "cheap.yaml"
    policy.write_text(
        "rules: [{kind: stored_model}, {kind: times_champion, cost: weights_bytes, limit: 0.9}]"
    )
    dear = stages.gate(settings, published(2, dataset), dataset, str(policy), promotion=asked)
    assert (dear["passed"], dear["caution"]) == (False, None)
    other = published(2, dataset, max_detections=50)
    judged = judge(settings, other, dataset, str(policy), promotion=asked)
    assert judged["promotion"] == mode
    for text in (judged["caution"], judged["explanation"], judged["approval_text"]):
        said = text.replace("\\", "")
        assert "another network than the champion's, which costs 1.0 times as much" in said
        assert "1.000 (at most 0.900)" in said
    with open_session(settings) as session:
        page = decision_page(session, judged["decision_id"])
        assert "and a person decides" in page
        assert "and a person decides" not in decision_page(session, dear["decision_id"])
    card = stages.model_card(settings, other)
    assert "passed, a person decides" in card["card.html"].decode()
    assert "passed, a person decides" in card["card.md"].decode()
    stages.answer(settings, judged["decision_id"], approved=False, actor="ann")
    with open_session(settings) as session:
        decision = session.get_one(GateDecision, judged["decision_id"])
        assert why_again(session, decision) is None


def test_auto_asks_where_there_is_a_caution_whoever_chose_it(
    published: Published, settings: Settings
) -> None:
    own, other = (stages.ingest(f"synthetic:40:{seed}", settings)["dataset_id"] for seed in (1, 6))
    crown(settings, published(1, own))
    cautious, plain = (published(2, other), other), (published(2, own), own)
    by_hand = settings.model_copy(update={"promotion": "manual"})
    for case, asked, mode in (
        (cautious, "auto", "approve"),
        (cautious, "manual", "manual"),
        (cautious, None, "manual"),
        (plain, "auto", "auto"),
        (plain, "approve", "approve"),
    ):
        judged = judge(by_hand, *case, promotion=asked)
        assert (judged["promotion"], judged["caution"] is None) == (mode, case == plain)
        with open_session(settings) as session:
            recorded = session.get_one(GateDecision, judged["decision_id"]).policy
        assert recorded is not None
        assert recorded["promotion"] == mode
