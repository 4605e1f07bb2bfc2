"""Whose weights are deleted, and whose never are."""

import pytest
from sqlalchemy.orm import Session

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import Approval, GateDecision, ScoringRun
from gun_detection.errors import ModelError, ServiceUnavailableError
from gun_detection.release.registry import get_model, load_model, promote, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model


@pytest.fixture
def versions(settings: Settings, storage: Storage) -> list[str]:
    """Seven versions, oldest first."""
    ids = []
    for seed in range(7):
        # The time of a row is that of its transaction.
        with open_session(settings) as session:
            ids.append(publish(random_model(seed), settings, storage, session).id)
    return ids


def stored(settings: Settings, storage: Storage) -> set[str]:
    keys = (item.key for item in storage.list_objects(settings.data_bucket, "models/"))
    return {key.split("/")[1] for key in keys if key.endswith("weights.safetensors")}


def decide(session: Session, model_id: str, champion: str | None, answer: bool | None) -> None:
    row = GateDecision(
        candidate_id=model_id, champion_id=champion, holdout_id="h", passed=True, rules=[]
    )
    session.add(row)
    session.flush()
    if answer is not None:
        session.add(Approval(gate_decision_id=row.id, approved=answer, actor="a"))


def test_the_newest_champions_and_those_in_use_stay(
    versions: list[str], settings: Settings, storage: Storage
) -> None:
    former, champion, pinned, waiting, refused, _, newest = versions
    with open_session(settings) as session:
        for model in (former, champion):
            promote(session, model, actor="a", reason="b")
        values = {"bucket": "b", "prefix": "", "threshold": 0.5, "planned": 1, "left_over": 0}
        session.add(ScoringRun(id="r", model_id=pinned, **values))
        decide(session, waiting, champion, None)
        decide(session, refused, champion, answer=False)
    planned = stages.prune(settings, 1, dry_run=True)
    assert planned["deleted"] == sorted(versions[4:6])
    assert stored(settings, storage) == set(versions), "a dry run deletes nothing"
    assert stages.prune(settings, 1)["deleted"] == sorted(versions[4:6])
    assert stored(settings, storage) == {former, champion, pinned, waiting, newest}
    document = storage.get(settings.data_bucket, f"models/{refused}/model.json")
    assert refused.encode() in document, "what it was stays known"
    assert stages.prune(settings, 1)["deleted"] == []
    with (
        open_session(settings) as session,
        pytest.raises(ModelError, match="deleted by retention"),
    ):
        load_model(get_model(session, refused), settings, storage)
    for act in (
        lambda: stages.promote(settings, refused, "a", "b"),
        lambda: stages.gate(settings, refused, "d"),
    ):
        with pytest.raises(ModelError) as caught:
            act()
        assert caught.value.reason == "MODEL_DELETED"


def test_one_that_was_compared_with_an_earlier_champion_waits_for_nobody(
    versions: list[str], settings: Settings
) -> None:
    with open_session(settings) as session:
        decide(session, versions[0], None, None)
        promote(session, versions[1], actor="a", reason="b")
    assert versions[0] in stages.prune(settings, 1)["deleted"]


def test_a_listing_of_several_pages_hides_nothing(
    versions: list[str], settings: Settings, storage: Storage
) -> None:
    # A page of a listing holds 1,000 keys; these sort before every weights file.
    for number in range(1050):
        storage.put(settings.data_bucket, f"models/a/failures/{number}.jpg", b"x")
    assert stages.prune(settings, 2)["deleted"] == sorted(versions[:5])
    assert stored(settings, storage) == set(versions[5:])
    assert len(list(storage.list_objects(settings.data_bucket, "models/a/"))) == 1050


def test_what_a_crash_left_over_is_deleted_the_next_time(
    versions: list[str],
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_many", lambda *_: None)
        with pytest.raises(ServiceUnavailableError, match="6 weights are still in"):
            stages.prune(settings, 1)
    assert stages.prune(settings, 1)["deleted"] == sorted(versions[:6])
    assert stored(settings, storage) == {versions[6]}


def test_a_deleted_version_that_is_made_again_is_there_again(
    versions: list[str], settings: Settings, storage: Storage
) -> None:
    stages.prune(settings, 1)
    with open_session(settings) as session:
        again = publish(random_model(0), settings, storage, session)
    with open_session(settings) as session:
        version = get_model(session, versions[0])
        assert (version.id, version.deleted_at) == (again.id, None)
        load_model(version, settings, storage)


def test_it_waits_for_a_promotion_under_way(versions: list[str], settings: Settings) -> None:
    with open_session(settings) as session:
        promote(session, versions[0], actor="a", reason="b")
        with pytest.raises(ServiceUnavailableError):
            stages.prune(settings, 1)
