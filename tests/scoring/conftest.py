"""What the tests of scoring share: a champion, uploads, and a run from survey to end."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.detector.engines import Engine
from gun_detection.release.champion import promote
from gun_detection.scoring.leases import claim_shard
from gun_detection.scoring.pipeline import Reads, score_shard
from gun_detection.scoring.plan import Plan, Survey, open_run, survey
from gun_detection.scoring.selection import Kind
from gun_detection.scoring.sources import Source, choose_sources, load_sources
from gun_detection.scoring.watch import look
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import model_row
from tests.scoring.simulated import Simulated


def picture(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def upload(storage: Storage, settings: Settings, **pictures: bytes) -> None:
    for name, data in pictures.items():
        storage.put(settings.uploads_bucket, f"{name}.jpg", data)


def outcomes(settings: Settings) -> dict[str, str]:
    """Outcome or reason by name, of what the champion, or whoever did last, said."""
    with open_session(settings) as session:
        rows = session.execute(text("SELECT key, outcome, reason FROM current_outcomes"))
        return {row.key.removesuffix(".jpg"): row.reason or row.outcome for row in rows}


def rows(settings: Settings, statement: str, **arguments: Any) -> list[tuple[Any, ...]]:
    with open_session(settings) as session:
        return [tuple(row) for row in session.execute(text(statement), arguments)]


def count(settings: Settings, table: str) -> int:
    return int(rows(settings, f"SELECT COUNT(*) FROM {table}")[0][0])


def score_all(made: Plan, settings: Settings, reader: Reads, engine: Engine) -> None:
    for shard_id in made.shard_ids:
        score_shard(claim_shard(shard_id, settings), engine, settings, reader)


def wait_all(settings: Settings) -> None:
    """Everything that was ever uploaded waits, as if a listing had it anew."""
    with open_session(settings) as session:
        session.execute(_WAIT)


_WAIT = text(
    """
    INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at)
    SELECT id, bucket, key, size, uploaded_at FROM upload ON CONFLICT DO NOTHING
    """
)


def later(settings: Settings, hours: int = 13) -> None:
    """All that is in the ledger was written so long ago."""
    with open_session(settings) as session:
        session.execute(_AGE, {"hours": hours})


_AGE = text("UPDATE ledger SET created_at = created_at - make_interval(hours => :hours)")


def champion_after(settings: Settings) -> ModelVersion:
    with open_session(settings) as session:
        newer = model_row(session, 1)
    with open_session(settings) as session:
        promote(session, newer.id, actor="tester", reason="a test")
    return newer


def waiting(settings: Settings) -> int | None:
    """Uploads of the bucket that the watcher has news of."""
    news = look(settings)
    return None if news is None else news.waiting[settings.uploads_bucket]


@pytest.fixture
def champion(session: Session) -> ModelVersion:
    """Of which nothing is stored but its row: a simulated engine looks in its place."""
    model = model_row(session, 0)
    promote(session, model.id, actor="tester", reason="a test")
    session.commit()
    return model


@pytest.fixture
def engine() -> Simulated:
    return Simulated()


@pytest.fixture
def surveyed(
    champion: ModelVersion, settings: Settings, storage: Storage
) -> Callable[..., tuple[Survey, list[Source]]]:
    def make(
        kind: Kind = "new",
        bucket: str | None = None,
        prefix: str = "",
        model: ModelVersion = champion,
        settings: Settings = settings,
        *,
        listing: bool = True,
    ) -> tuple[Survey, list[Source]]:
        sources = choose_sources(load_sources(settings), settings, bucket, prefix)
        found = survey(kind, model, sources, settings, storage, prefix, listing=listing)
        return found, sources

    return make


@pytest.fixture
def plan(
    champion: ModelVersion, settings: Settings, surveyed: Callable[..., tuple[Survey, list[Source]]]
) -> Callable[..., Plan]:
    """A run from its survey to its plan."""

    def make(
        run_id: str | None = None,
        limit: int | None = None,
        model: ModelVersion = champion,
        settings: Settings = settings,
        **scope: Any,
    ) -> Plan:
        found, sources = surveyed(model=model, settings=settings, **scope)
        with open_session(settings) as session:
            return open_run(found, model, sources, settings, session, run_id=run_id, limit=limit)

    return make


@pytest.fixture
def small(settings: Settings) -> Iterator[Settings]:
    """Shards of two pictures."""
    return settings.model_copy(update={"shard_images": 2})
