"""What people see of scoring in the Airflow UI, from a real database."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import text

from embedded.config import REPOSITORY
from gun_detection.database import open_session
from gun_detection.errors import NotFoundError
from gun_detection.scoring.leases import claim_shard, give_up
from gun_detection.scoring.pages import run_page, scored_page, scoring_page
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run, summarize_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import picture, score_all, upload
from tests.scoring.simulated import Simulated

Planned = Callable[..., Plan]
RUN = "airflow:score_uploads:scheduled__2025-11-25T03:00:00+00:00"
HOSTILE = ["<script>alert(1)</script>", '" onmouseover="alert(1)', "a\nb\u202ec", "k" * 1024]
REFRESH = '<meta http-equiv="refresh" content="10">'


@pytest.fixture
def finished(plan: Planned, engine: Simulated, small: Settings, storage: Storage) -> Plan:
    """A run in two shards that scored two uploads and quarantined one."""
    upload(storage, small, one=picture(3), two=picture(4), words=b"words")
    made = plan(settings=small, run_id=RUN)
    score_all(made, small, storage, engine)
    finish_run(RUN, small)
    return made


def shown(settings: Settings, run_id: str = RUN) -> str:
    with open_session(settings) as session:
        return run_page(session, run_id)


def overview(settings: Settings) -> str:
    with open_session(settings) as session:
        return scoring_page(session)


def change(settings: Settings, statement: str, **arguments: object) -> None:
    with open_session(settings) as session:
        session.execute(text(statement), arguments)


def value(page: str, name: str) -> str:
    """What stands beside a name."""
    [found] = re.findall(rf"<dt>{re.escape(name)}</dt><dd[^>]*>([^<]*)", page)
    return str(found)


def cells(page: str, first: str) -> list[str]:
    """The row of a table in which this comes first, as plain text."""
    rows = [re.sub(r"<[^>]*>", "\t", row).split("\t") for row in re.findall("<tr>.*?</tr>", page)]
    [row] = [row for row in ([cell for cell in row if cell] for row in rows) if row[0] == first]
    return row


def test_sources_that_nobody_sees_are_told_of(settings: Settings) -> None:
    change(
        settings,
        "INSERT INTO source_look (source, looked_at, message) VALUES "
        "('s3://a/', now() - interval '3 h', 'access is denied: <b>'), ('s3://b/', NULL, 'gone'), "
        "('s3://c/', now() - interval '2 h', NULL), ('s3://d/', now(), NULL)",
    )
    page = overview(settings)
    told = re.findall(r"New uploads are not seen</strong> in (\S+?),? ", page)
    assert told == ["s3://a/", "s3://b/", "s3://c/"]
    assert "access is denied: &lt;b&gt;" in page
    assert "3 h" in page
    assert "could never be looked at" in page
    # Nobody may have looked so far, or a listing may be under way.
    assert "nobody has had a look at since" in page
    assert "triggerer runs" in page
    assert "a listing may take as long" in page
    assert 'class="good">Every upload' not in page


def test_an_empty_database_has_pages(settings: Settings) -> None:
    page = overview(settings)
    assert "nothing waits" in page
    assert "None yet" in page
    assert "Nothing is in quarantine" in page
    with open_session(settings) as session:
        assert "has scored nothing" in scored_page(session, RUN)
        with pytest.raises(NotFoundError, match="there is no scoring run"):
            run_page(session, RUN)


def test_a_finished_run_shows_what_was_found_and_done(finished: Plan, settings: Settings) -> None:
    page = shown(settings)
    with open_session(settings) as session:
        summary = summarize_run(session, RUN)
        assert scored_page(session, RUN) == page
    assert summary.stats is not None
    for name, expected in {
        "listed": "3",
        "new": "3",
        "planned": "3",
        "estimated time": "unknown",
        "scored": "2",
        "quarantined": "1",
        "detections at or above the threshold": str(summary.detections),
    }.items():
        assert value(page, name) == expected, name
    assert "finished</span>" in page
    assert f'/gun-detection/cards/{summary.model_id}"' in page
    working, waiting = summary.stats["working"], summary.stats["waiting"]
    seconds = summary.stats["seconds"]
    assert cells(page, "decode")[1:] == [
        f"{working['decode']:.1f}",
        f"{working['decode'] / seconds:.2f}",
        f"{waiting['decode']:.1f}",
        f"{waiting['decode'] / seconds:.2f}",
    ]
    assert summary.stats["slowest"][0]["address"] in page
    assert re.search(r"<summary>NOT_IMAGE .*?1</span>", page)
    assert f"{settings.uploads_bucket}/words.jpg" in page
    row = cells(page, "1")
    assert (row[1:3], row[-1]) == (["finished", "1"], "simulated, nowhere")
    assert REFRESH not in page


def test_an_open_run_shows_how_far_it_is_and_loads_itself_again(
    plan: Planned, engine: Simulated, small: Settings, storage: Storage
) -> None:
    upload(storage, small, **{f"p{i}": picture(i) for i in range(5)})
    first, second, third = plan(settings=small, run_id=RUN).shard_ids
    page = shown(small)
    assert REFRESH in page
    assert "0 of 5 done" in page
    assert "Known when the first shard is finished" in page
    score_shard(claim_shard(first, small), engine, small, storage)
    lease = claim_shard(second, small)
    page = shown(small)
    assert re.search("2 of 5 done, .* left; last outcome .* ago", page)
    assert "Of 1 finished shard with 2 pictures" in page
    assert [cells(page, n)[1].split(" until")[0] for n in "012"] == ["finished", "held", "waiting"]
    assert cells(page, "2")[2] == "0 of 1"
    change(small, "UPDATE shard SET lease_until = now() - interval '1 h' WHERE id = :i", i=second)
    assert cells(shown(small), "1")[1].startswith("lease lapsed 6")
    give_up(lease, small)
    assert cells(shown(small), "1")[1] == "waiting"
    assert third


def test_what_a_run_left_to_others_is_no_failure_unless_it_failed(
    finished: Plan, plan: Planned, settings: Settings
) -> None:
    plan(run_id="other")
    change(settings, "UPDATE ledger SET run_id = 'other' WHERE reason IS NOT NULL")
    assert value(shown(settings), "judged by another run") == "1"
    change(settings, "UPDATE scoring_run SET state = 'failed'")
    page = shown(settings)
    assert value(page, "without an outcome by this run") == "1"
    assert 'class="bad">failed' in page


def test_a_run_from_before_surveys_and_one_without_work_have_pages(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    plan(run_id="idle")
    finish_run("idle", settings)
    page = shown(settings, "idle")
    assert value(page, "pictures/s, whole run") == "–"
    assert "there was nothing to score" in page
    change(settings, "UPDATE scoring_run SET survey = '{}'")
    assert "Not recorded" in shown(settings, "idle")


def test_what_is_unscored_is_told_by_bucket_and_late_in_red(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture())
    plan()
    page = overview(settings)
    assert ">2 uploads</strong> without an outcome" in page
    assert 'class="bad"' not in page
    change(
        settings,
        "UPDATE pending_upload SET bucket = 'north', waits_since = now() - interval '25 h' "
        "WHERE key = 'a.jpg'",
    )
    page = overview(settings)
    assert '<strong class="bad">25 h ' in page
    assert value(page, "north").startswith("1, the oldest 25 h ")


def test_the_list_tells_the_counts_at_a_runs_end(finished: Plan, settings: Settings) -> None:
    change(settings, "DELETE FROM detection")
    [row] = [
        r
        for r in re.findall("<tr>.*?</tr>", overview(settings))
        if quote(RUN) in r and "finished" in r
    ]
    assert re.findall(r'class="number">(\d+)<', row)[:4] == ["3", "2", "1", "4"]


def test_the_list_counts_what_has_not_ended_as_the_summary_does(
    finished: Plan, plan: Planned, settings: Settings, storage: Storage
) -> None:
    uncounted = "scored = NULL, quarantined = NULL, detections = NULL"
    change(settings, f"UPDATE scoring_run SET threshold = 0.6, {uncounted}")
    upload(storage, settings, later=picture(9))
    plan(run_id="b", limit=0)
    with open_session(settings) as session:
        expected = session.execute(
            text("SELECT * FROM scoring_summary WHERE run_id = :run"), {"run": RUN}
        ).one()
    page = overview(settings)
    assert page.index("/gun-detection/runs/b") < page.index(f"/gun-detection/runs/{quote(RUN)}")
    counts = (expected.planned, expected.scored, expected.quarantined, expected.detections)
    [row] = [r for r in re.findall("<tr>.*?</tr>", page) if quote(RUN) in r and "finished" in r]
    assert re.findall(r'class="number">(\d+)<', row)[:4] == [str(count) for count in counts]
    assert expected.detections > 0
    [row] = [r for r in re.findall("<tr>.*?</tr>", page) if "runs/b" in r]
    assert 'class="number wait">1<' in row


class Tags(HTMLParser):
    """The tags of a page, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(name for name, _ in attrs)}


def test_hostile_keys_and_messages_are_text(finished: Plan, settings: Settings) -> None:
    innocent = Tags(shown(settings)).seen | Tags(overview(settings)).seen
    for key in HOSTILE:
        change(settings, "UPDATE upload SET key = :key WHERE size < 100", key=key)
        change(settings, "UPDATE ledger SET message = :key WHERE reason IS NOT NULL", key=key)
        slow = json.dumps([{"seconds": 1.0, "address": f"s3://b/{key}"}])
        change(
            settings,
            "UPDATE shard SET stats = jsonb_set(stats, '{slowest}', CAST(:slow AS jsonb))",
            slow=slow,
        )
        for page in (shown(settings), overview(settings)):
            assert Tags(page).seen <= innocent
            assert "\u202e" not in page
            assert "k" * 200 not in page


def test_many_in_quarantine_are_counted_and_the_first_shown(
    finished: Plan, settings: Settings
) -> None:
    change(
        settings,
        "INSERT INTO upload (bucket, key, etag, size, uploaded_at) "
        "SELECT 'b', 'bad-' || n || '.', 'e', 1, now() FROM generate_series(1, 150) n",
    )
    change(
        settings,
        "INSERT INTO ledger (upload_id, model_id, run_id, shard_id, attempt, outcome, reason) "
        "SELECT u.id, :model, :run, :shard, 1, 'quarantined', 'EMPTY' FROM upload u "
        "WHERE bucket = 'b' ORDER BY id",
        model=finished.model_id,
        run=RUN,
        shard=finished.shard_ids[0],
    )
    page = shown(settings)
    assert re.search(r"<summary>EMPTY .*?150</span>", page)
    assert page.index("<summary>EMPTY") < page.index("<summary>NOT_IMAGE")
    assert (page.count("b/bad-"), "b/bad-50." in page) == (50, True)
    assert f"--run {RUN} --reason EMPTY" in page
    page = overview(settings)
    assert "151 uploads that could not be used: EMPTY 150, NOT_IMAGE 1." in page
    assert (page.count("b/bad-"), "b/bad-150." in page) == (100, True)


# As the API server has it, which has none of the detector's packages loaded.
_SERVE = """
import asyncio, json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "plugins")
import httpx
from airflow.api_fastapi.core_api.security import get_user
import gun_detection_plugin as plugin

async def ask(paths):
    transport = httpx.ASGITransport(plugin.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as client:
        answers = [await client.get(path) for path in paths]
    return [[answer.status_code, answer.text] for answer in answers]

signed_in, paths = json.loads(sys.stdin.read())
routes = [route.path.replace("{decision_id}", "1") for route in plugin.app.routes]
if signed_in:
    for check in (get_user, *(d.dependency for d in plugin._MAY_LOOK)):
        plugin.app.dependency_overrides[check] = lambda: None
print(json.dumps({
    "answers": asyncio.run(ask(paths or [f"{path}?dag_id=a&run_id=b" for path in routes])),
    "routes": routes,
    "modules": sorted(sys.modules),
}))
"""


def serve(*, signed_in: bool, paths: list[str]) -> dict[str, list[Any]]:
    ran = subprocess.run(
        [sys.executable, "-c", _SERVE],
        input=json.dumps([signed_in, paths]),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, list[Any]] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def test_every_route_asks_who_is_there() -> None:
    result = serve(signed_in=False, paths=[])
    assert {"/scoring", "/runs/{run_id}", "/scored", "/models"} <= set(result["routes"])
    assert {status for status, _ in result["answers"]} == {401}


def test_runs_are_served_under_their_names_and_without_the_detector(
    finished: Plan, settings: Settings
) -> None:
    _, dag, dag_run = RUN.split(":", 2)
    page = shown(settings)
    expected = {
        f"/runs/{quote(RUN, safe='')}": (200, page),
        f"/runs/{RUN}": (200, page),
        # As the UI writes it: a plus is a space to those who read a query.
        f"/scored?dag_id={dag}&run_id={dag_run}": (200, page),
        f"/scored?dag_id=retrain&run_id={dag_run}": (200, "has scored nothing"),
        "/scoring": (200, overview(settings)),
        "/runs/unknown": (404, "no scoring run"),
        "/runs/a%00b": (404, "no such run"),
        "/scored?dag_id=a%00b&run_id=c": (404, "no such run"),
    }
    result = serve(signed_in=True, paths=list(expected))
    for (status, part), (answered, body) in zip(expected.values(), result["answers"], strict=True):
        assert answered == status
        assert part in body
    assert not {"torch", "numpy", "boto3", "cv2", "pandas"} & set(result["modules"])
