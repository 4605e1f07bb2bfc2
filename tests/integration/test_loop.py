"""Once round the whole loop in a real Airflow: the three DAGs, on real servers."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from rich.console import Console
from sqlalchemy import text

from embedded.config import PlatformError
from embedded.demo import demo
from gun_detection.database import open_session
from gun_detection.datasets.synthetic import hold_on_side, upload_pictures
from gun_detection.storage import Storage
from tests.integration.conftest import QUICK, RunningPlatform, browser, run, wait_for_messages

# Whole rounds of the loop, which take many minutes on a slow machine.
pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1800)]


def query(platform: RunningPlatform, statement: str) -> list[Any]:
    with open_session(platform.settings) as session:
        return list(session.execute(text(statement)).all())


def outcomes(platform: RunningPlatform, prefix: str) -> dict[tuple[str, str | None], int]:
    """By the champion, or by whoever looked at an upload last."""
    rows = query(
        platform,
        "SELECT outcome, reason, COUNT(*) AS total FROM current_outcomes "
        f"WHERE key LIKE '{prefix}%' GROUP BY outcome, reason",
    )
    return {(row.outcome, row.reason): row.total for row in rows}


def test_the_dags_have_no_import_errors(platform: RunningPlatform) -> None:
    platform.airflow.wait_for_dag("score_uploads", timeout=300)
    assert platform.airflow.import_errors() == []


def test_a_candidate_is_trained_measured_judged_and_promoted(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    model = champion["train"]["model_id"]
    assert champion["evaluate_candidate"]["model_id"] == model
    assert champion["evaluate_candidate"]["images"] == champion["ingest"]["holdout_images"]
    assert champion["gate"]["passed"]
    assert champion["promote"]["champion_id"] == model
    [row] = query(platform, "SELECT model_id, actor FROM current_champion")
    assert row.model_id == model
    assert champion["run_id"] in row.actor


def test_the_same_again_is_skipped_with_the_reason(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    dataset = champion["ingest"]["dataset_id"]
    assert (
        run(platform, "ingest_dataset", {"source": "synthetic:80:3"})["ingest"]["created"] is False
    )
    again = run(platform, "retrain", QUICK | {"dataset_id": dataset})
    assert again["promote"] == "skipped"
    log = platform.airflow.task_log("retrain", again["run_id"], "check_need")
    assert "neither data nor configuration changed" in log
    assert len(query(platform, "SELECT 1 FROM promotion")) == 1


def test_every_upload_gets_one_outcome(platform: RunningPlatform, champion: dict[str, Any]) -> None:
    storage, bucket = Storage(platform.settings), platform.settings.uploads_bucket
    pictures = upload_pictures(6, seed=9)
    good = pictures[0].data
    odd = {
        "cut.jpg": good[: len(good) // 2],
        "words.jpg": b"words",
        "turned.jpg": hold_on_side(good),
    }
    for name, data in ({p.name: p.data for p in pictures} | odd).items():
        storage.put(bucket, f"loop/{name}", data)
    run(platform, "score_uploads", {"bucket": bucket, "prefix": "loop/"})
    expected = {("scored", None): 7, ("quarantined", "NOT_IMAGE"): 1}
    assert outcomes(platform, "loop/") == expected | {("quarantined", "TRUNCATED"): 1}
    before = query(platform, "SELECT * FROM ledger ORDER BY id")
    again = run(platform, "score_uploads", {"bucket": bucket, "prefix": "loop/"})
    assert again["finish"]["planned"] == 0
    assert query(platform, "SELECT * FROM ledger ORDER BY id") == before
    sizes = query(
        platform,
        "SELECT key, width, height FROM current_outcomes "
        "WHERE key IN ('loop/held.jpg', 'loop/upload-9-0000.jpg')",
    )
    assert len({(row.width, row.height) for row in sizes}) == 1, "EXIF orientation is applied"


@pytest.mark.parametrize(
    ("dag_id", "conf"),
    [
        ("score_uploads", {"threshold": 2}),
        ("score_uploads", {"prefix": 5}),
        ("retrain", {"preset": "fast"}),
        ("retrain", {"promotion": "perhaps"}),
        ("rollback_champion", {}),
    ],
)
def test_a_bad_value_is_refused_when_triggered(
    platform: RunningPlatform, dag_id: str, conf: dict[str, Any]
) -> None:
    with pytest.raises(PlatformError) as caught:
        platform.airflow.trigger(dag_id, conf)
    assert caught.value.reason == "HTTP_400"


def test_a_bucket_that_is_not_there_fails_at_once_and_says_so(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    run_id = platform.airflow.trigger("score_uploads", {"bucket": "no-such-bucket"})
    assert platform.airflow.wait("score_uploads", run_id) == "failed"
    tasks = platform.airflow.task_instances("score_uploads", run_id)
    assert {t["task_id"]: t["try_number"] for t in tasks}["survey"] == 1
    assert "no-such-bucket" in platform.airflow.task_log("score_uploads", run_id, "survey")
    [told] = wait_for_messages(platform, "no-such-bucket")
    line, *reasons, url = told.splitlines()
    assert line == "*score_uploads failed*"
    assert [reason.partition(":")[0] for reason in reasons] == ["survey", "finish"]
    assert unquote(url) == f"{platform.airflow.url}/dags/score_uploads/runs/{run_id}"


def test_reports_are_linked_and_shown_to_those_who_signed_in(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    links = platform.airflow.request(
        "GET",
        f"/dags/retrain/dagRuns/{champion['run_id']}/taskInstances/evaluate_candidate/links",
    )["extra_links"]
    report = champion["evaluate_candidate"]["report_url"]
    assert links["Report"] == report
    with platform.stack.airflow("viewer") as viewer:
        token = {"Authorization": f"Bearer {viewer.token()}"}
    base = report.partition("evaluations/")[0]
    with browser() as client:
        assert client.get(report).status_code == 401
        page = client.get(report, headers=token)
        assert (page.status_code, "AP50" in page.text) == (200, True)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        dataset = champion["ingest"]["report_url"]
        assert client.get(dataset, headers=token).status_code == 200
        model = champion["train"]["model_id"]
        for path in (
            f"models/{model}/model.json",
            "evaluations/none/none.html",
            "evaluations/../models/x.html",
        ):
            assert client.get(base + path, headers=token).status_code == 404
        for path in ("docs", "openapi.json"):
            url = f"{platform.airflow.url}/gun-detection/{path}"
            assert client.get(url, headers=token).status_code == 404


@pytest.fixture
def real_pictures(shared_data: Path) -> Iterator[Path]:
    """Some of the real pictures, where tasks that run as another user can read them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for kind in ("Images", "Labels"):
            (folder / kind).mkdir()
            for file in sorted((shared_data / "guns-seed" / kind).iterdir()):
                if int(file.stem) <= 100:
                    shutil.copyfile(file, folder / kind / file.name)
        yield folder


@pytest.mark.seed
def test_the_loop_goes_round_on_real_pictures(
    platform: RunningPlatform, champion: dict[str, Any], real_pictures: Path
) -> None:
    ingested = run(platform, "ingest_dataset", {"source": str(real_pictures)})["ingest"]
    assert (ingested["files"], ingested["duplicates"], ingested["clipped_boxes"]) == (100, 4, 1)
    trained = run(platform, "retrain", QUICK | {"dataset_id": ingested["dataset_id"]})
    assert trained["evaluate_candidate"]["images"] == ingested["holdout_images"]
    assert trained["evaluate_champion"]["dataset_id"] == ingested["dataset_id"]
    storage, bucket = Storage(platform.settings), platform.settings.uploads_bucket
    files = sorted((real_pictures / "Images").iterdir())[:8]
    for file in files:
        storage.put(bucket, f"real/{file.name}", file.read_bytes())
    run(platform, "score_uploads", {"bucket": bucket, "prefix": "real/"})
    assert outcomes(platform, "real/") == {("scored", None): 8}
    [row] = query(platform, "SELECT COUNT(*) AS boxes FROM detection")
    assert row.boxes > 0


def test_the_demo_ends_with_what_came_of_it_and_doubles_nothing(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    for again in (False, True):
        console = Console(file=io.StringIO(), width=200)
        demo(platform.stack, console, lambda _: nullcontext(), "synthetic:81:4")
        table = " ".join(console.file.getvalue().split())
        assert "scored 25 pictures" in table
        assert "quarantined 2: corrupt.jpg TRUNCATED, notes.jpg NOT_IMAGE" in table
        assert ("neither data nor configuration changed" in table) is again
    rows = query(
        platform,
        "SELECT COUNT(*) FROM ledger l JOIN upload u ON u.id = l.upload_id "
        "WHERE u.key LIKE 'demo/%'",
    )
    assert rows[0][0] == 27
