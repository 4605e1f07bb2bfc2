"""A server that does not give out some objects keeps none of the others waiting."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gun_detection.errors import (
    GunDetectionError,
    ServiceUnavailableError,
)
from gun_detection.scoring import delivery, pipeline
from gun_detection.scoring.leases import claim_shard, give_up
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import (
    champion_after,
    count,
    later,
    outcomes,
    picture,
    rows,
    score_all,
    upload,
)
from tests.scoring.simulated import AWAY, DENIED, Refusing, Simulated

Planned = Callable[..., Plan]


@pytest.mark.parametrize(("error", "reason"), [(DENIED, "ACCESS_DENIED"), (AWAY, "UNREADABLE")])
def test_an_object_that_is_not_delivered_keeps_no_other_waiting(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
    reason: str,
) -> None:
    upload(storage, settings, a=picture())
    upload(storage, settings, **{f"b{number}": picture(1 + number) for number in range(8)})
    made = plan()
    score_all(made, settings, Refusing(settings, error, {"a.jpg"}), engine)
    found = outcomes(settings)
    assert found.pop("a") == reason
    assert set(found.values()) == {"scored"}
    assert plan().planned == 0, "not every minute"
    for night in range(4):
        later(settings)
        storage.put(settings.uploads_bucket, "other.jpg", picture(100 + night))
        made = plan()
        assert made.planned == 2, "every night, as long as it takes"
        score_all(made, settings, Refusing(settings, error, {"a.jpg"}), engine)
    later(settings)
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings)["a"] == "scored"


def test_history_that_is_not_delivered_is_asked_for_a_few_times_only(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(9)})
    score_all(plan(), settings, storage, engine)
    newer = champion_after(settings)
    refusing = Refusing(settings, DENIED, {"b0.jpg"})
    score_all(plan(kind="rescore", model=newer), settings, refusing, engine)
    for planned in (1, 1, 0):
        later(settings)
        made = plan(model=newer)
        assert made.planned == planned
        score_all(made, settings, refusing, engine)
    assert outcomes(settings)["b0"] == "scored", "as the former champion said"


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_a_server_that_delivers_nothing_gives_no_outcome(
    plan: Planned, settings: Settings, storage: Storage, error: GunDetectionError
) -> None:
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(3)})
    [shard] = plan().shard_ids
    with pytest.raises(type(error)):
        score_shard(claim_shard(shard, settings), Simulated(), settings, Refusing(settings, error))
    assert count(settings, "ledger") == 0


def test_a_server_that_goes_away_ends_the_shard_soon(
    plan: Planned, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 5)
    # Each of the threads asks for one more, and there are as many as there are cores, and some.
    monkeypatch.setattr(pipeline, "cores", lambda: 2)
    asked: list[str] = []

    class Away(Storage):
        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            asked.append(key)
            raise AWAY

    few = settings.model_copy(update={"readers": 1})
    upload(storage, settings, **{f"b{number:02}": picture(number) for number in range(40)})
    [shard] = plan(settings=few.model_copy(update={"shard_images": 1000})).shard_ids
    with pytest.raises(ServiceUnavailableError):
        score_shard(claim_shard(shard, few), Simulated(), few, Away(few))
    assert len(asked) < 20


def test_whether_a_server_went_away_is_asked_once(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 2)
    asked: list[str] = []
    delivered = threading.Event()

    class Leaving(Storage):
        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            asked.append(key)
            if key == "b00.jpg" and not delivered.is_set():
                delivered.set()
                return super().get(bucket, key, **options)
            delivered.wait(60)
            # Many threads fail at the same time.
            time.sleep(0.4)
            raise AWAY

    upload(storage, settings, **{f"b{number:02}": picture(number) for number in range(40)})
    [shard] = plan(settings=settings.model_copy(update={"shard_images": 1000})).shard_ids
    with pytest.raises(ServiceUnavailableError):
        score_shard(claim_shard(shard, settings), engine, settings, Leaving(settings))
    assert len(asked) - len(set(asked)) <= 3, "one asks for all of them"


def test_many_objects_that_fail_for_good_keep_nothing_behind_them_waiting(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 3)
    one_by_one = settings.model_copy(update={"readers": 1})
    names = [f"b{number:02}" for number in range(20)]
    upload(storage, settings, **{name: picture(seed) for seed, name in enumerate(names)})
    lost = Refusing(settings, AWAY, {f"{name}.jpg" for name in names[:16]})
    score_all(plan(), one_by_one, lost, engine)
    expected = ["UNREADABLE"] * 16 + ["scored"] * 4
    assert outcomes(settings) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize(("error", "reason"), [(DENIED, "ACCESS_DENIED"), (AWAY, "UNREADABLE")])
def test_a_shard_of_nothing_but_such_objects_has_outcomes_where_others_are_delivered(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    error: GunDetectionError,
    reason: str,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 3)
    upload(storage, settings, **{f"a{number}": picture(number) for number in range(8)})
    score_all(plan(), settings, storage, engine)
    names = [f"b{number}" for number in range(8)]
    upload(storage, settings, **{name: picture(8 + seed) for seed, name in enumerate(names)})
    made = plan()
    [shard] = made.shard_ids
    lease = claim_shard(shard, settings)
    with pytest.raises(type(error)):
        score_shard(lease, engine, settings, Refusing(settings, error))
    assert count(settings, "ledger") == 8, "the whole bucket"
    give_up(lease, settings)
    # Among them those that were scored last.
    refused = {f"{name}.jpg" for name in (*names, "a6", "a7")}
    score_all(made, settings, Refusing(settings, error, refused), engine)
    found = outcomes(settings)
    assert {found[name] for name in names} == {reason}
    assert finish_run(made.run_id, settings).quarantined == 8


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_what_was_tried_in_vain_uses_up_no_cap(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
) -> None:
    upload(storage, settings, **{f"a{number}": picture(number) for number in range(3)})
    capped = settings.model_copy(update={"run_images": 3})
    lease = claim_shard(plan(settings=capped).shard_ids[0], settings)
    with pytest.raises(type(error)):
        score_shard(lease, engine, settings, Refusing(settings, error))
    give_up(lease, settings)
    upload(storage, settings, **{f"b{number}": picture(3 + number) for number in range(2)})
    made = plan(settings=capped)
    assert (made.planned, made.left_over) == (3, 2)
    items = claim_shard(made.shard_ids[0], settings).items
    assert [item.key for item in items[:2]] == ["b0.jpg", "b1.jpg"]
    score_all(plan(), settings, storage, engine)
    assert list(outcomes(settings).values()) == ["scored"] * 5
    assert rows(settings, "SELECT COUNT(*) FROM pending_upload WHERE deferred") == [(0,)]


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_a_server_that_goes_away_at_the_end_blames_no_object(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
) -> None:
    """Fewer than would end a shard in its midst."""
    one_by_one = settings.model_copy(update={"readers": 1})

    class Leaving(Storage):
        left = 6

        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            if not self.left:
                raise error
            self.left -= 1
            return super().get(bucket, key, **options)

    upload(storage, settings, **{f"b{number}": picture(number) for number in range(9)})
    made = plan()
    [shard] = made.shard_ids
    lease = claim_shard(shard, one_by_one)
    with pytest.raises(type(error)):
        score_shard(lease, engine, one_by_one, Leaving(settings))
    assert list(outcomes(settings).values()) == ["scored"] * 6
    give_up(lease, settings)
    score_all(made, settings, storage, engine)
    assert list(outcomes(settings).values()) == ["scored"] * 9


@pytest.mark.parametrize("careful", [False, True])
def test_objects_that_fail_slowly_do_not_look_like_a_worker_that_hangs(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage, careful: bool
) -> None:
    # All of them together take longer than a lease, and none of them nearly as long.
    short = settings.model_copy(update={"readers": 1, "shard_lease_seconds": 10})
    held, heard = [], []

    class Slow(Refusing):
        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            if key.startswith("bad"):
                time.sleep(0.7)
                held.extend(rows(settings, "SELECT lease_until > clock_timestamp() FROM shard"))
            return super().get(bucket, key, **options)

    bad = [f"bad{number}" for number in range(9)]
    upload(storage, settings, a=picture(), **{name: picture(1 + n) for n, name in enumerate(bad)})
    [shard] = plan().shard_ids
    lease = replace(claim_shard(shard, short), careful=careful)
    reader = Slow(settings, AWAY, {f"{name}.jpg" for name in bad})

    def progress(done: int, total: int) -> None:
        heard.append((time.monotonic(), done))

    began = time.monotonic()
    score_shard(lease, engine, short, reader, progress)
    assert set(held) == {(True,)}
    moments = [began, *(moment for moment, _ in heard)]
    assert max(after - before for before, after in itertools.pairwise(moments)) < 10
    assert heard[-1][1] == 10
    assert outcomes(settings) == {"a": "scored"} | dict.fromkeys(bad, "UNREADABLE")
