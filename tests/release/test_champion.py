from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import GateDecision, ModelVersion, Promotion
from gun_detection.errors import (
    ModelError,
    NotFoundError,
    ReleaseError,
    ServiceUnavailableError,
)
from gun_detection.release.champion import current_champion, get_model, promote, rollback
from gun_detection.settings import Settings
from tests.conftest import model_row

NewModel = Callable[[int], ModelVersion]


@pytest.fixture
def new_model(session: Session) -> NewModel:
    return partial(model_row, session)


def by(session: Session, model: ModelVersion) -> Promotion:
    return promote(session, model.id, actor="tester", reason="a test")


def test_the_last_promotion_is_the_champion(new_model: NewModel, session: Session) -> None:
    with pytest.raises(NotFoundError, match="no champion yet"):
        get_model(session, "champion")
    first, second = new_model(1), new_model(2)
    by(session, first)
    assert by(session, second).previous_id == first.id
    assert get_model(session, "champion").id == second.id
    again = by(session, second)
    assert session.scalar(select(func.count()).select_from(Promotion)) == 2
    assert again.model_id == second.id


def test_rolling_back_twice_goes_back_two_steps(new_model: NewModel, session: Session) -> None:
    models = [new_model(seed) for seed in (1, 2, 3)]
    for model in models:
        by(session, model)
    for expected in (models[1], models[0]):
        rollback(session, actor="tester", reason="worse in practice")
        champion = current_champion(session)
        assert champion is not None
        assert champion.id == expected.id
    with pytest.raises(ReleaseError, match="first champion"):
        rollback(session, actor="tester", reason="again")
    kinds = session.scalars(select(Promotion.kind).order_by(Promotion.id))
    assert list(kinds) == ["promote"] * 3 + ["rollback"] * 2


def test_a_rollback_that_is_tried_again_goes_back_one_step(
    new_model: NewModel, session: Session
) -> None:
    models = [new_model(seed) for seed in (1, 2, 3)]
    for model in models:
        by(session, model)
    rows = {rollback(session, actor="run 1", reason="why", once=True).id for _ in range(3)}
    assert len(rows) == 1
    assert get_model(session, "champion").id == models[1].id
    rollback(session, actor="run 2", reason="why", once=True)
    assert get_model(session, "champion").id == models[0].id


def test_a_rollback_that_is_not_the_last_word_is_not_announced_again(
    new_model: NewModel, session: Session
) -> None:
    first, second = new_model(1), new_model(2)
    by(session, first)
    by(session, second)
    rollback(session, actor="run 1", reason="why", once=True)
    by(session, second)
    with pytest.raises(ReleaseError, match="trigger a new run") as caught:
        rollback(session, actor="run 1", reason="why", once=True)
    assert caught.value.reason == "CHAMPION_CHANGED"
    assert f"{second.id} is champion since" in caught.value.message
    assert get_model(session, "champion").id == second.id


def test_who_was_champion_twice_hides_nobody_between(new_model: NewModel, session: Session) -> None:
    first, second, third = (new_model(seed) for seed in (1, 2, 3))
    for model in (first, second, first, third):
        by(session, model)
    rollback(session, actor="tester", reason="why")
    assert get_model(session, "champion").id == first.id
    assert rollback(session, actor="tester", reason="why").model_id == second.id


def test_a_version_without_weights_becomes_no_champion(
    new_model: NewModel, session: Session
) -> None:
    model = new_model(1)
    session.get_one(ModelVersion, model.id).deleted_at = datetime.now(UTC)
    session.flush()
    with pytest.raises(ModelError) as caught:
        by(session, model)
    assert caught.value.reason == "MODEL_DELETED"


def test_rolling_back_to_a_stranger_is_refused(new_model: NewModel, session: Session) -> None:
    first, second, never = (new_model(seed) for seed in (1, 2, 3))
    by(session, first)
    by(session, second)
    with pytest.raises(ReleaseError, match="was not a champion"):
        rollback(session, actor="tester", reason="why", to=never.id)
    assert rollback(session, actor="tester", reason="why", to=first.id).model_id == first.id


@pytest.mark.parametrize(("actor", "reason"), [("", "why"), ("who", "")])
def test_who_and_why_are_needed(
    new_model: NewModel, session: Session, actor: str, reason: str
) -> None:
    with pytest.raises(ReleaseError, match="who does it and why"):
        promote(session, new_model(1).id, actor=actor, reason=reason)


def _decision(session: Session, candidate: str, champion: str | None, passed: bool) -> GateDecision:
    row = GateDecision(
        candidate_id=candidate, champion_id=champion, holdout_id="h", passed=passed, rules=[]
    )
    session.add(row)
    session.flush()
    return row


def test_a_decision_allows_only_what_it_was_about(new_model: NewModel, session: Session) -> None:
    first, second, third = (new_model(seed) for seed in (1, 2, 3))
    by(session, first)
    for decision in (
        _decision(session, second.id, first.id, passed=False),
        _decision(session, third.id, first.id, passed=True),
    ):
        with pytest.raises(ReleaseError, match="does not allow"):
            promote(session, second.id, actor="a", reason="b", decision=decision)
    stale = _decision(session, second.id, None, passed=True)
    with pytest.raises(ReleaseError) as caught:
        promote(session, second.id, actor="a", reason="b", decision=stale)
    assert caught.value.reason == "CHAMPION_CHANGED"
    good = _decision(session, second.id, first.id, passed=True)
    assert promote(session, second.id, actor="a", reason="b", decision=good).gate_decision_id
    # The task that promoted is tried again after it was killed: no second row, no error.
    assert promote(session, second.id, actor="a", reason="b", decision=good).model_id == second.id


def test_what_was_rejected_since_is_not_promoted_by_an_older_decision(
    new_model: NewModel, session: Session
) -> None:
    first, second = new_model(1), new_model(2)
    by(session, first)
    old = _decision(session, second.id, first.id, passed=True)
    rejected = _decision(session, second.id, first.id, passed=False)
    with pytest.raises(ReleaseError, match=f"gate decision {rejected.id}, .* run the gate again"):
        promote(session, second.id, actor="a", reason="b", decision=old)
    assert get_model(session, "champion").id == first.id
    new = _decision(session, second.id, first.id, passed=True)
    _decision(session, first.id, first.id, passed=False)
    made = promote(session, second.id, actor="a", reason="b", decision=new)
    # As champion it was looked at once more, and the task that promoted it is tried again.
    _decision(session, second.id, second.id, passed=False)
    assert promote(session, second.id, actor="a", reason="b", decision=new).id == made.id


def test_a_promotion_that_is_tried_again_undoes_no_rollback(
    new_model: NewModel, session: Session
) -> None:
    first, second = new_model(1), new_model(2)
    by(session, first)
    good = _decision(session, second.id, first.id, passed=True)
    promote(session, second.id, actor="a", reason="b", decision=good)
    rollback(session, actor="operator", reason="worse in practice")
    with pytest.raises(ReleaseError) as caught:
        promote(session, second.id, actor="a", reason="b", decision=good)
    assert caught.value.reason == "CHAMPION_CHANGED"
    champion = current_champion(session)
    assert champion is not None
    assert champion.id == first.id


def test_of_two_promotions_at_once_the_second_is_told(
    new_model: NewModel, session: Session, settings: Settings
) -> None:
    model = new_model(1)
    by(session, model)

    def second() -> None:
        with open_session(settings) as other:
            promote(other, model.id, actor="a", reason="b")

    with pytest.raises(ServiceUnavailableError) as caught:
        second()
    assert caught.value.reason == "PROMOTION_UNDER_WAY"
