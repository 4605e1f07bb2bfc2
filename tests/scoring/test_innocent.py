"""Good pictures are scored whatever else goes wrong: servers, machines, buckets, late messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.errors import (
    FailureBudgetError,
    ImageError,
    ServiceUnavailableError,
    TerminalError,
)
from gun_detection.images import DecoderPool, Reason
from gun_detection.scoring import pipeline
from gun_detection.scoring.leases import claim_shard
from gun_detection.scoring.pages import run_page
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
    wait_all,
)
from tests.scoring.simulated import Refusing, Simulated

Planned = Callable[..., Plan]


def test_a_decoder_that_died_once_is_tried_again(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died: list[int] = []
    decode = DecoderPool.decode

    def once(pool: DecoderPool, data: bytes, **options: Any) -> Any:
        if not died:
            died.append(1)
            raise ImageError("killed from outside", reason=Reason.DECODER_CRASHED)
        return decode(pool, data, **options)

    monkeypatch.setattr(DecoderPool, "decode", once)
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}


def test_a_machine_without_memory_for_any_picture_blames_none(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(3)})
    [shard] = plan().shard_ids
    with pytest.raises(ServiceUnavailableError) as caught:
        score_shard(claim_shard(shard, settings), Simulated(most=1), settings, storage)
    assert caught.value.reason == "NO_MEMORY"
    assert count(settings, "ledger") == 0


def test_what_a_machine_may_have_done_is_judged_again_a_few_times(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(width=200), words=b"words")
    full = Simulated(most=64 * 48 * 3)
    for planned in (2, 1, 1):
        made = plan()
        assert made.planned == planned
        score_all(made, settings, storage, full)
        assert outcomes(settings) == {"a": "OUT_OF_MEMORY", "words": "NOT_IMAGE"}
        later(settings)
    assert plan().planned == 0, "three times are enough"


def test_pictures_under_way_are_all_that_is_remembered(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers: list[Any] = []
    made = pipeline._Worker

    def remember(*arguments: Any) -> Any:
        workers.append(made(*arguments))
        return workers[-1]

    monkeypatch.setattr(pipeline, "_Worker", remember)
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(9)}, x=b"no")
    score_all(plan(), settings, storage, engine)
    assert len(outcomes(settings)) == 10
    assert all(worker._by_bytes == {} for worker in workers)


def test_pictures_of_the_past_that_were_archived_are_no_failure(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    names = {f"b{seed:02}": picture(seed) for seed in range(14)}
    upload(storage, settings, **names)
    score_all(plan(), settings, storage, engine)
    made = plan(kind="rescore", model=champion_after(settings))
    score_all(made, settings, Refusing(settings, TerminalError("no", reason="ARCHIVED")), engine)
    assert finish_run(made.run_id, settings).reasons == {"ARCHIVED": 14}


def test_what_the_model_has_judged_before_waits_no_longer(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, engine)
    wait_all(settings)
    made = plan()
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    assert count(settings, "unscored_uploads") == 0
    assert plan().planned == 0


def test_a_bucket_that_cannot_be_listed_keeps_no_other_waiting(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: gone-bucket}}, {{bucket: {settings.uploads_bucket}}}]")
    upload(storage, settings, a=picture())
    made = plan(settings=settings.model_copy(update={"sources_file": path}))
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}
    with pytest.raises(FailureBudgetError, match="gone-bucket") as caught:
        finish_run(made.run_id, settings)
    assert caught.value.reason == "NOT_LISTED"
    with open_session(settings) as session:
        page = run_page(session, made.run_id)
    assert "not listed" in page
    assert "gone-bucket" in page
    assert rows(settings, "SELECT state FROM scoring_run") == [("failed",)]


def test_runs_that_nobody_works_at_are_closed(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    abandoned, held = plan(run_id="abandoned"), plan(run_id="held")
    claim_shard(held.shard_ids[0], settings)
    plan(run_id="today")
    states = "SELECT id, state FROM scoring_run ORDER BY id"
    assert {state for _, state in rows(settings, states)} == {"open"}
    with open_session(settings) as session:
        session.execute(_OLD_RUNS)
    plan(run_id="tomorrow")
    assert rows(settings, states) == [
        ("abandoned", "failed"),
        ("held", "open"),
        ("today", "failed"),
        ("tomorrow", "open"),
    ]
    assert abandoned.planned == 1


_OLD_RUNS = text("UPDATE scoring_run SET created_at = created_at - interval '2 days'")


def test_what_no_source_covers_any_more_is_not_waited_for(
    plan: Planned, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    configured = settings.model_copy(update={"sources_file": path})
    bucket = settings.uploads_bucket

    def planned(source: str, **scope: Any) -> int:
        path.write_text(f"buckets: [{{{source}}}]")
        return plan(settings=configured, **scope).planned

    everything = f"bucket: {bucket}"
    upload(storage, settings, **{"a/1": b"1", "a/2": b"2", "b/1": b"3"})
    assert planned(everything) == 3
    assert planned(f"{everything}, exclude: ['*/2.jpg']") == 2
    assert planned(f"{everything}, prefix: b/") == 1
    assert count(settings, "unscored_uploads") == 1
    assert planned(f"{everything}, prefix: b/", bucket=bucket, prefix="a/") == 2, "by hand"
    storage.ensure_bucket("another-bucket")
    assert planned("bucket: another-bucket") == 0
    assert count(settings, "scoring_freshness") == 0
    assert planned(everything) == 3, "nothing of it was forgotten"
