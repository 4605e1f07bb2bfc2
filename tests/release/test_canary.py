"""A candidate whose stored weights are not what was measured never becomes champion."""

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.errors import (
    ImageError,
    ModelError,
    NotFoundError,
    ReleaseError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.evaluation.evaluate import evaluate_version, load_samples
from gun_detection.release import canary
from gun_detection.release.champion import get_model, promote
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.evaluation.conftest import version_of
from tests.test_storage import proxy_of_nothing


@dataclass(frozen=True)
class Candidate:
    """A version that was measured on the holdout of `dataset_id`, and another of its kind."""

    model_id: str
    other_id: str
    dataset_id: str


@pytest.fixture
def candidate(settings: Settings, storage: Storage) -> Candidate:
    dataset = stages.ingest("synthetic:40:5", settings)["dataset_id"]
    ids = []
    for seed in (1, 2):
        with open_session(settings) as session:
            ids.append(publish(random_model(seed), settings, storage, session).id)
    stages.evaluate(settings, ids[0], dataset)
    return Candidate(ids[0], ids[1], dataset)


def damage(candidate: Candidate, settings: Settings, storage: Storage) -> None:
    key = f"models/{candidate.model_id}/weights.safetensors"
    data = bytearray(storage.get(settings.data_bucket, key))
    data[len(data) // 2] ^= 1
    storage.put(settings.data_bucket, key, bytes(data))


def cut(candidate: Candidate, settings: Settings, storage: Storage) -> None:
    key = f"models/{candidate.model_id}/weights.safetensors"
    data = storage.get(settings.data_bucket, key)
    storage.put(settings.data_bucket, key, data[: len(data) // 2])


def swap(candidate: Candidate, settings: Settings, storage: Storage) -> None:
    own, other = (
        f"models/{model}/weights.safetensors" for model in (candidate.model_id, candidate.other_id)
    )
    storage.put(settings.data_bucket, own, storage.get(settings.data_bucket, other))


def swap_with_its_hash(candidate: Candidate, settings: Settings, storage: Storage) -> None:
    """Whoever did it changed the record, too: only the answers give it away."""
    swap(candidate, settings, storage)
    with open_session(settings) as session:
        session.execute(
            text(
                "UPDATE model_version SET weights_sha256 = other.weights_sha256 "
                "FROM model_version other WHERE other.id = :other AND model_version.id = :own"
            ),
            {"own": candidate.model_id, "other": candidate.other_id},
        )


def another_architecture(candidate: Candidate, settings: Settings, storage: Storage) -> None:
    with open_session(settings) as session:
        session.execute(
            text(
                "UPDATE model_version SET config = jsonb_set(config, "
                "'{detector,architecture}', CAST(:name AS jsonb)) WHERE id = :id"
            ),
            {"name": json.dumps("mobilenet_v2_fpn"), "id": candidate.model_id},
        )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "sha256"),
        (cut, "sha256"),
        (swap, "sha256"),
        (swap_with_its_hash, "detections compared"),
        (another_architecture, "mobilenet_v2_fpn"),
    ],
)
def test_what_is_stored_is_not_what_was_measured(
    candidate: Candidate,
    settings: Settings,
    storage: Storage,
    spoil: Callable[[Candidate, Settings, Storage], None],
    reason: str,
) -> None:
    spoil(candidate, settings, storage)
    decision = stages.gate(settings, candidate.model_id, candidate.dataset_id, "trial")
    assert decision["passed"] is False
    assert reason in decision["explanation"]
    with pytest.raises((ReleaseError, TerminalError)):
        stages.promote(settings, candidate.model_id, "a", "b", decision["decision_id"])
    with open_session(settings) as session, pytest.raises(NotFoundError, match="no champion"):
        get_model(session, "champion")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda *_, **__: subprocess.CompletedProcess([], 1, "", "OSError: [Errno 28]"),
            "Errno 28",
        ),
        (lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""), "signal 9"),
        (lambda *_, **__: _raise(subprocess.TimeoutExpired("canary", 900)), "within 900 s"),
    ],
    ids=["disk", "killed", "slow"],
)
def test_trouble_of_the_machine_says_nothing_of_the_model(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
    message: str,
) -> None:
    monkeypatch.setattr(canary.subprocess, "run", run)
    with pytest.raises(ServiceUnavailableError, match=message) as caught:
        canary.fly_canary("m", "d", [], settings)
    assert caught.value.reason == "CANARY_LOST"


def test_a_page_of_a_proxy_says_nothing_of_the_model(
    candidate: Candidate, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fly = canary.fly_canary
    with proxy_of_nothing(settings, 200, b"<html>back soon</html>") as away:
        # It went away after the gate had read what was measured.
        monkeypatch.setattr(canary, "fly_canary", lambda m, d, items, _: fly(m, d, items, away))
        with pytest.raises(ServiceUnavailableError, match="is no S3 server; see whether"):
            stages.gate(settings, candidate.model_id, candidate.dataset_id, "trial")
    with open_session(settings) as session:
        assert session.scalar(text("SELECT count(*) FROM gate_decision")) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("bad weights"), "error"),
        (NotFoundError("no weights"), "error"),
        (TerminalError("damaged", reason="SHA256_MISMATCH"), "error"),
        (ImageError("no number", reason="NOT_FINITE"), "error"),
        (ImageError("no picture"), "transient"),
        (SettingsError("no engine"), "transient"),
        (ServiceUnavailableError("away"), "transient"),
    ],
)
def test_only_the_model_is_blamed_for_the_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    said: str,
) -> None:
    request = json.dumps({"model_id": "m", "dataset_id": "d", "pictures": []})
    monkeypatch.setattr("sys.stdin", io.StringIO(request))
    monkeypatch.setattr(canary, "_look", lambda *_: _raise(error))
    canary.main()
    assert list(json.loads(capsys.readouterr().out)) == [said]


def _raise(error: Exception) -> None:
    raise error


def test_a_champion_from_other_pictures_is_not_replaced_without_a_person(
    candidate: Candidate, settings: Settings, storage: Storage
) -> None:
    with open_session(settings) as session:
        champion = publish(
            replace(random_model(3), dataset_id=candidate.dataset_id), settings, storage, session
        ).id
    with open_session(settings) as session:
        promote(session, champion, actor="a", reason="b")
    same = stages.gate(settings, candidate.model_id, candidate.dataset_id, "trial")
    assert (same["promotion"], same["caution"]) == ("auto", None)
    grown = stages.ingest("synthetic:44:5", settings)["dataset_id"]
    more = stages.gate(settings, candidate.model_id, grown, "trial")
    assert (more["promotion"], more["caution"]) == ("auto", None)
    other = stages.ingest("synthetic:40:6", settings)["dataset_id"]
    judged = stages.gate(settings, candidate.model_id, other, "trial")
    assert judged["promotion"] == "approve"
    for text_ in (judged["explanation"], judged["approval_text"]):
        assert "only 0% of the " in text_.replace("\\", "")
        assert " 0 have other labels now" in text_
    by_hand = settings.model_copy(update={"promotion": "manual"})
    assert stages.gate(by_hand, candidate.model_id, other, "trial")["promotion"] == "manual"


def test_weights_that_are_swapped_after_the_gate_are_not_promoted(
    candidate: Candidate, settings: Settings, storage: Storage
) -> None:
    decision = stages.gate(settings, candidate.model_id, candidate.dataset_id, "trial", "tester")
    assert decision["passed"] is True, decision["explanation"]
    assert storage.get(settings.data_bucket, f"models/{candidate.model_id}/card.md")
    swap(candidate, settings, storage)
    with pytest.raises(TerminalError) as caught:
        stages.promote(settings, candidate.model_id, "a", "b", decision["decision_id"])
    assert caught.value.reason == "SHA256_MISMATCH"


def test_large_pictures_are_looked_at_as_they_were_measured(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    version = version_of(tmp_path, lambda number: (4, 4), settings, storage)
    assert version.dataset_id is not None
    row = evaluate_version(version, version.dataset_id, settings, storage)
    samples = load_samples(row, settings, storage).items
    flown = canary.fly_canary(version.id, version.dataset_id, samples, settings)
    assert flown.compared > 0
    assert flown.difference is not None
    assert flown.difference < 1e-4
