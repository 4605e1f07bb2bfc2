"""Each kind of rule at its limits: first champion, little data, identical models, no slices."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from gun_detection.release.rules import Canary, Case, Rule
from gun_detection.release.verdict import Outcome, Verdict
from tests.evaluation.conftest import GUN, picture, sample
from tests.release.conftest import case, measured, pictures

PASSED, FAILED = Outcome.PASSED, Outcome.FAILED
INSUFFICIENT, NOT_APPLICABLE = Outcome.INSUFFICIENT, Outcome.NOT_APPLICABLE


def judge(on: Case, **rule: Any) -> Verdict:
    return TypeAdapter[Any](Rule).validate_python(rule).judge(on)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("found", "limit", "outcome"), [(0.8, 0.8, PASSED), (0.8, 0.81, FAILED), (0.0, 0.0, PASSED)]
)
def test_a_floor(found: float, limit: float, outcome: Outcome) -> None:
    verdict = judge(case(pictures(50, found)), kind="at_least", metric="recall", limit=limit)
    assert (verdict.value, verdict.outcome) == (found, outcome)
    assert verdict.interval is not None
    assert verdict.blocks is (outcome is FAILED)


def test_a_budget_counts_gun_free_pictures() -> None:
    rule = {"kind": "at_most", "metric": "false_positives_per_negative", "limit": 0.2}
    within = case(pictures(50, 0.5, gun_free=40, alarms=0.2))
    over = case(pictures(50, 0.5, gun_free=40, alarms=0.25))
    assert judge(within, **rule).outcome is PASSED
    assert judge(over, **rule).outcome is FAILED
    few = judge(case(pictures(50, 0.5, gun_free=5)), **rule)
    assert (few.outcome, few.blocks) == (INSUFFICIENT, True)
    assert "5 independent gun-free holdout pictures of 30 needed: add some" in few.note
    none = judge(case(pictures(50, 0.5, gun_free=0)), **rule, without_data="allow")
    assert (none.value, none.outcome, none.blocks) == (None, INSUFFICIENT, False)


def test_copies_of_one_scene_are_one_picture() -> None:
    same = [replace(item, group="scene") for item in pictures(50, 0.9)]
    verdict = judge(case(same), kind="at_least", metric="ap50", limit=0.1)
    assert verdict.outcome is INSUFFICIENT


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "not_worse", "metric": "ap50", "margin": 0.02},
        {"kind": "better", "metric": "ap50"},
        {"kind": "not_clearly_worse", "metric": "recall"},
        {"kind": "slices", "property": "source"},
        {"kind": "times_champion", "cost": "weights_bytes", "limit": 2},
    ],
)
def test_the_first_champion_is_compared_with_nobody(rule: dict[str, Any]) -> None:
    verdict = judge(case(pictures(50, 0.5)), **rule)
    assert (verdict.outcome, verdict.blocks) == (NOT_APPLICABLE, False)


@pytest.mark.parametrize(
    ("candidate", "champion", "not_worse", "better", "not_clearly_worse"),
    [
        (0.95, 0.6, PASSED, PASSED, PASSED),
        (0.8, 0.8, PASSED, FAILED, PASSED),
        (0.79, 0.8, FAILED, FAILED, PASSED),
        (0.4, 0.8, FAILED, FAILED, FAILED),
    ],
)
def test_comparisons_with_the_champion(
    candidate: float, champion: float, not_worse: str, better: str, not_clearly_worse: str
) -> None:
    on = case(pictures(100, candidate), pictures(100, champion))
    for kind, outcome in (
        ("not_worse", not_worse),
        ("better", better),
        ("not_clearly_worse", not_clearly_worse),
    ):
        margin = {"margin": 0.02} if kind == "not_worse" else {}
        verdict = judge(on, kind=kind, metric="recall", **margin)
        assert verdict.outcome is outcome, kind
        assert verdict.value == pytest.approx(candidate - champion)


def test_identical_models_are_not_worse_and_not_better() -> None:
    same = pictures(60, 0.7)
    on = case(same, same)
    verdict = judge(on, kind="not_worse", metric="ap50", margin=0.0)
    assert (verdict.outcome, verdict.value, verdict.interval) == (PASSED, 0, (0, 0))
    assert judge(on, kind="better", metric="ap50").outcome is FAILED


def test_small_steps_down_within_the_margin_are_refused() -> None:
    champion = pictures(1000, 0.8, gun_free=0)
    # The same pictures but for five: the bound is well within the margin.
    lost = [i for i, s in enumerate(champion) if s.matched.correct.all()][:5]
    candidate = [
        sample(picture([GUN]), item.name) if index in lost else item
        for index, item in enumerate(champion)
    ]
    on = case(candidate, champion)
    rule = {"kind": "not_worse", "metric": "recall", "margin": 0.02}
    refused = judge(on, **rule)
    assert refused.interval is not None
    assert refused.interval[0] > -0.02
    assert (refused.outcome, refused.note) == (FAILED, "measured below 0")
    assert judge(on, **rule, measured=-0.01).outcome is PASSED


def test_fewer_false_alarms_are_better() -> None:
    on = case(pictures(50, 0.5, 60, alarms=0.1), pictures(50, 0.5, 60, alarms=0.6))
    rule = {"metric": "false_positives_per_negative"}
    assert judge(on, kind="better", **rule).outcome is PASSED
    turned = Case(measured(on.champion.samples), on.candidate, on.canary)  # type: ignore[union-attr]
    assert judge(turned, kind="not_clearly_worse", **rule).outcome is FAILED


@pytest.mark.parametrize(("kind", "blocks"), [("not_worse", True), ("not_clearly_worse", False)])
def test_a_tiny_holdout_is_not_enough_to_compare(kind: str, blocks: bool) -> None:
    on = case(pictures(10, 0.9), pictures(10, 0.2))
    verdict = judge(on, kind=kind, metric="ap50", margin=0.02)
    assert (verdict.outcome, verdict.blocks) == (INSUFFICIENT, blocks)


def _sourced(share: float, weak: float) -> list[Any]:
    """Forty pictures of source a, thirty of b, five of c."""
    parts = [("a", 40, share), ("b", 30, weak), ("c", 5, share)]
    return [
        replace(
            item,
            name=f"{source}-{item.name}",
            group=f"{source}-{item.name}",
            properties=replace(item.properties, source=source),
        )
        for source, count, found in parts
        for item in pictures(count, found, gun_free=0)
    ]


def test_a_slice_that_got_clearly_worse_is_named() -> None:
    rule = {"kind": "slices", "property": "source", "metric": "recall"}
    verdict = judge(case(_sourced(0.9, 0.3), _sourced(0.5, 0.9)), **rule)
    assert verdict.outcome is FAILED
    assert verdict.note == "worst: b; too few guns or independent pictures in: c"
    assert judge(case(_sourced(0.9, 0.9), _sourced(0.5, 0.9)), **rule).outcome is PASSED
    none = judge(case(_sourced(0.9, 0.3), _sourced(0.5, 0.9)), **rule, minimum_guns=50)
    assert (none.outcome, none.blocks) == (INSUFFICIENT, False)


def test_a_slice_of_a_few_scenes_is_not_shown_to_be_worse() -> None:
    rule = {"kind": "slices", "property": "source", "metric": "recall"}

    def of_scenes(samples: list[Any], scenes: int) -> list[Any]:
        return [
            replace(item, group=f"b-{index % scenes}") if item.properties.source == "b" else item
            for index, item in enumerate(samples)
        ]

    for scenes, outcome, few in ((1, PASSED, "b, c"), (9, PASSED, "b, c"), (10, FAILED, "c")):
        samples = (of_scenes(_sourced(0.9, weak), scenes) for weak in (0.1, 0.9))
        verdict = judge(case(*samples), **rule)
        assert verdict.outcome is outcome
        assert verdict.note.endswith(f"independent pictures in: {few}")


def test_a_person_decides_what_another_network_may_cost() -> None:
    samples = pictures(5, 1.0)
    champion = measured(samples)
    for cost, rule in (
        ({"weights_bytes": 3388}, {"cost": "weights_bytes", "limit": 3}),
        ({"milliseconds_per_image": 33.88}, {"cost": "milliseconds_per_image", "limit": 2}),
    ):
        for network, outcome in (("resnet18_fpn", FAILED), ("resnet50_fpn", Outcome.OPEN)):
            candidate = measured(samples, architecture=network, **cost)
            on = Case(candidate, champion, Canary(difference=0.0))
            verdict = judge(on, kind="times_champion", **rule)
            assert (verdict.outcome, verdict.blocks) == (outcome, outcome is FAILED)
        assert "which costs 3.4 times as much" in verdict.note
        assert judge(on, kind="times_champion", **rule | {"limit": 4}).outcome is PASSED


def test_costs_are_compared_on_the_same_device_only() -> None:
    samples = pictures(5, 1.0)
    quick, slow = measured(samples), measured(samples, milliseconds_per_image=25.0)
    canary = Canary(difference=0.0)
    rule = {"kind": "times_champion", "cost": "milliseconds_per_image", "limit": 2}
    over = judge(Case(slow, quick, canary), **rule)
    assert (over.value, over.outcome) == (2.5, FAILED)
    assert judge(Case(quick, slow, canary), **rule).outcome is PASSED
    elsewhere = measured(samples, device="cuda")
    verdict = judge(Case(slow, elsewhere, canary), **rule)
    assert (verdict.outcome, verdict.blocks) == (INSUFFICIENT, False)
    large = measured(samples, weights_bytes=3001)
    size = {"kind": "times_champion", "cost": "weights_bytes", "limit": 3}
    assert judge(Case(large, quick, canary), **size).outcome is FAILED


@pytest.mark.parametrize(
    ("canary", "outcome"),
    [
        (Canary(difference=0.02, compared=3), PASSED),
        (Canary(difference=0.021, compared=3), FAILED),
        (Canary(error="sha256 differs"), FAILED),
        (Canary(), INSUFFICIENT),
    ],
)
def test_the_stored_model_is_the_measured_one(canary: Canary, outcome: Outcome) -> None:
    verdict = judge(case(pictures(5, 1.0), canary=canary), kind="stored_model")
    assert verdict.outcome is outcome
    assert verdict.blocks is (outcome is not PASSED)


def test_a_verdict_reads_as_a_sentence() -> None:
    verdict = judge(case(pictures(50, 0.4)), kind="at_least", metric="recall", limit=0.5)
    assert str(verdict).startswith("recall: 0.400 [0.2")
    assert str(verdict).endswith("(at least 0.500) FAILED")
