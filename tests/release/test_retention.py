"""Whose weights and packages are deleted, and whose never are."""

from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import (
    Approval,
    EnginePackage,
    GateDecision,
    ScoringRun,
)
from gun_detection.errors import ModelError, ServiceUnavailableError
from gun_detection.release import retention
from gun_detection.release.champion import get_model, promote
from gun_detection.release.packages import package_key
from gun_detection.release.registry import load_model, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import model_row, random_model


@pytest.fixture
def versions(settings: Settings, storage: Storage) -> list[str]:
    """Seven versions, oldest first, with files under the names of theirs."""
    ids = []
    for number in range(7):
        # The time of a row is that of its transaction.
        with open_session(settings) as session:
            model = model_row(session, number)
            storage.put(settings.data_bucket, model.weights_key, b"x")
            storage.put(settings.data_bucket, f"models/{model.id}/model.json", model.id.encode())
            ids.append(model.id)
    return ids


def stored(settings: Settings, storage: Storage) -> set[str]:
    keys = (item.key for item in storage.list_objects(settings.data_bucket, "models/"))
    return {key.split("/")[1] for key in keys if key.endswith("weights.safetensors")}


def package(settings: Settings, storage: Storage, *versions: str) -> None:
    """As they are made: two files and a row for each engine."""
    for model_id in versions:
        for engine in ("openvino", "openvino-int8"):
            files = {f"trunk-{engine}.bin": "a" * 64, "trunk-b.xml": "b" * 64}
            for file in files:
                storage.put(settings.data_bucket, package_key(model_id, engine, file), b"x")
            with open_session(settings) as session:
                session.add(
                    EnginePackage(
                        model_id=model_id,
                        engine=engine,
                        accepted=True,
                        reason="",
                        pictures=1,
                        files=files,
                        toolchain="",
                    )
                )


def packaged(settings: Settings, storage: Storage) -> tuple[dict[str, int], set[str]]:
    """How many files of packages each version has, and which have rows of them."""
    files: dict[str, int] = {}
    for item in storage.list_objects(settings.data_bucket, "models/"):
        _, model_id, *rest = item.key.split("/")
        if rest[0] == "engines":
            files[model_id] = files.get(model_id, 0) + 1
    with open_session(settings) as session:
        return files, set(session.scalars(select(EnginePackage.model_id)))


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


def test_one_that_a_person_said_yes_to_stays_until_it_is_promoted(
    versions: list[str], settings: Settings
) -> None:
    with open_session(settings) as session:
        promote(session, versions[0], actor="a", reason="b")
        decide(session, versions[1], versions[0], answer=True)
    assert stages.prune(settings, 1)["deleted"] == sorted(versions[2:6])


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
    package(settings, storage, versions[0])
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_many", lambda *_: None)
        with pytest.raises(ServiceUnavailableError, match="10 objects are still in"):
            stages.prune(settings, 1)
    files, rows = packaged(settings, storage)
    assert (files, rows) == ({versions[0]: 4}, set()), "no row without its files"
    assert stages.prune(settings, 1)["deleted"] == sorted(versions[:6])
    assert stored(settings, storage) == {versions[6]}
    assert packaged(settings, storage) == ({}, set())


def test_a_deleted_version_that_is_made_again_is_there_again(
    settings: Settings, storage: Storage
) -> None:
    with open_session(settings) as session:
        model = publish(random_model(0), settings, storage, session).id
    with open_session(settings) as session:
        model_row(session, 1)
    assert stages.prune(settings, 1)["deleted"] == [model]
    with open_session(settings) as session:
        again = publish(random_model(0), settings, storage, session)
    with open_session(settings) as session:
        version = get_model(session, model)
        assert (version.id, version.deleted_at) == (again.id, None)
        load_model(version, settings, storage)


def test_checkpoints_of_trainings_that_were_given_up_go(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(settings.data_bucket, "checkpoints/a-training/000000010.safetensors", b"x")
    assert stages.prune(settings, 1)["checkpoints"] == 0
    monkeypatch.setattr(retention, "_GIVEN_UP", timedelta(seconds=-60))
    assert stages.prune(settings, 1, dry_run=True)["checkpoints"] == 1
    assert list(storage.list_objects(settings.data_bucket, "checkpoints/"))
    assert stages.prune(settings, 1)["checkpoints"] == 1
    assert not list(storage.list_objects(settings.data_bucket, "checkpoints/"))


def test_it_waits_for_a_promotion_under_way(versions: list[str], settings: Settings) -> None:
    with open_session(settings) as session:
        promote(session, versions[0], actor="a", reason="b")
        with pytest.raises(ServiceUnavailableError):
            stages.prune(settings, 1)


def test_packages_go_with_the_weights_that_they_were_made_of(
    versions: list[str], settings: Settings, storage: Storage
) -> None:
    package(settings, storage, *versions)
    report = f"models/{versions[0]}/evaluations/engines/report.html"
    storage.put(settings.data_bucket, report, b"x")
    stages.prune(settings, 2, dry_run=True)
    assert packaged(settings, storage) == (dict.fromkeys(versions, 4), set(versions))
    assert stages.prune(settings, 2)["deleted"] == sorted(versions[:5])
    assert packaged(settings, storage) == (dict.fromkeys(versions[5:], 4), set(versions[5:]))
    assert storage.exists(settings.data_bucket, report)


def test_packages_that_outlived_their_weights_are_deleted(
    versions: list[str], settings: Settings, storage: Storage
) -> None:
    """Made while the version was deleted, or deleted by a release that left them."""
    stages.prune(settings, 6)
    package(settings, storage, versions[0])
    assert stages.prune(settings, 6)["deleted"] == [versions[0]]
    assert packaged(settings, storage) == ({}, set())
    assert stages.prune(settings, 6)["deleted"] == []
