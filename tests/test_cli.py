"""The command line: the loop by hand, JSON on standard output alone, errors in one line."""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gun_detection import stages
from gun_detection.cli import main
from gun_detection.database import open_session
from gun_detection.database.models import ScoringRun
from gun_detection.datasets.synthetic import upload_pictures
from gun_detection.errors import ServiceUnavailableError
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the program here; (exit code, standard output, standard error)."""
    logger = logging.getLogger("gun_detection")
    before = logger.handlers[:], logger.level, logger.propagate

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gun-detection", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        for handler in logger.handlers:
            handler.close()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


def ok(result: tuple[int, str, str]) -> Any:
    code, output, errors = result
    assert code == 0, errors
    return json.loads(output)


def test_the_loop_by_hand(
    cli: Run,
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "There is no model version yet." in cli("models")[1]
    dataset = ok(cli("ingest", "synthetic:60:1", "--json"))
    assert dataset["created"] is True
    assert ok(cli("ingest", "synthetic:60:1", "--json"))["created"] is False
    trained = ok(cli("train", "--preset", "smoke", "--set", "max_steps=1", "--json"))
    model = trained["model_id"]
    again = cli("train", "--preset", "smoke", "--set", "max_steps=1", "--json")
    assert ok(again) == trained | {"created": False}
    # As `datasets` shows it.
    short = ("--dataset", dataset["dataset_id"][:16])
    again = cli("train", *short, "--preset", "smoke", "--set", "max_steps=1", "--json")
    assert ok(again) == trained | {"created": False}
    metrics = ok(cli("evaluate", model, *short, "--json"))
    assert metrics["images"] == dataset["holdout_images"]

    low, high = metrics["intervals"]["recall"]
    assert low <= metrics["recall"] <= high
    assert {item["property"] for item in metrics["slices"]} >= {"source", "brightness"}
    assert "95 % interval" in cli("evaluate", model)[1]
    point = ok(cli("threshold", model, *short, "--target", "fixed", "--value", 0.3, "--json"))
    assert (point["threshold"], point["target"]["kind"]) == (0.3, "fixed")
    other = ok(cli("train", "--preset", "smoke", "--set", "max_steps=2", "--restart", "--json"))[
        "model_id"
    ]
    compared = ok(cli("compare", model, other, *short, "--json"))
    assert (compared["first"], compared["second"]) == (model, other)
    assert {"ap50", "recall"} <= {item["name"] for item in compared["differences"]}
    assert "ap50" in cli("compare", model, other)[1]

    code, _, errors = cli("promote", model)
    assert (code, "has not passed the gate" in errors) == (1, True)
    strict = tmp_path / "strict.yaml"
    strict.write_text("rules: [{kind: at_least, metric: ap50, limit: 1, minimum_pictures: 1}]")
    refused = ok(cli("gate", model, "--policy", strict, "--json"))
    assert (refused["passed"], refused["policy"]) == (False, "strict.yaml")
    assert "FAILED" in refused["explanation"]
    assert cli("promote", model)[0] == 1
    assert ok(cli("gate", model, *short, "--policy", "trial", "--json"))["passed"] is True
    assert ok(cli("promote", model, "--json"))["champion_id"] == model
    assert "Nobody is told of it" in cli("promote", model)[1]
    code, _, errors = cli("package", model, "--engine", "bogus")
    assert (code, "there is no engine 'bogus': choose from auto" in errors) == (2, True)
    code, _, errors = cli("rollback", "--reason", "a test")
    assert (code, "first champion" in errors) == (1, True)

    for picture in upload_pictures(3, seed=1):
        storage.put(settings.uploads_bucket, picture.name, picture.data)
    storage.put(settings.uploads_bucket, "words.jpg", b"words")
    monkeypatch.setenv("GUN_DETECTION_SHARD_IMAGES", "2")
    with monkeypatch.context() as patch:
        patch.setenv("GUN_DETECTION_CONFIRM_IMAGES", "1")
        first = cli("score", "--json")
    # Nobody is asked, and nothing but one document is printed.
    assert ok(first)["planned"] == 1
    assert "Scoring 1 of 4; --yes scores all." in first[2]
    summary = ok(cli("score", "--jobs", 2, "--json"))
    assert (summary["planned"], summary["quarantined"] + ok(first)["quarantined"]) == (3, 1)
    assert ok(cli("score", "--json"))["planned"] == 0
    for command in ("list", "retry"):
        code, output, _ = cli("quarantine", command, "--reason", "not_image")
        assert (code, "Nothing in quarantine fits" in output) == (0, True)
    assert "Nothing" not in cli("quarantine", "list", "--reason", "NOT_IMAGE")[1]
    for option in (["--reason", "NOT_IMAGE"], ["--all"]):
        code, _, errors = cli("quarantine", "retry", "1", *option)
        assert (code, "not both" in errors) == (2, True)

    assert [row["state"] for row in ok(cli("models", "--json"))] == ["candidate", "champion"]
    written = ok(cli("card", model, "--out", tmp_path / "card", "--json"))["files"]
    assert {"card.html", "card.md"} <= {Path(name).name for name in written}
    assert model in (tmp_path / "card" / "card.md").read_text()
    pruned = ok(cli("prune", "--keep", 1, "--json"))
    assert pruned["deleted"] == [], "the newest and the champion stay"
    assert [row["dataset"] for row in ok(cli("datasets", "--json"))] == [dataset["dataset_id"]]
    assert dataset["dataset_id"][:16] in cli("datasets")[1], "in one line, to be copied"
    assert all(check["ok"] for check in ok(cli("doctor", "--json")))


@pytest.fixture
def three_wait(cli: Run, settings: Settings, storage: Storage) -> None:
    """There is a champion, and three uploads that it has not scored."""
    with open_session(settings) as session:
        model = publish(random_model(1), settings, storage, session).id
    assert ok(cli("promote", model, "--force", "--reason", "a test", "--json"))
    for picture in upload_pictures(3, seed=1):
        storage.put(settings.uploads_bucket, picture.name, picture.data)


@pytest.mark.usefixtures("three_wait")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_shard_that_fails_stops_no_other_and_ends_its_run(
    cli: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setenv("GUN_DETECTION_SHARD_IMAGES", "1")
    tried = []

    def fail(_: Settings, shard_id: int, __: object) -> None:
        tried.append(shard_id)
        raise ServiceUnavailableError(f"nothing answers shard {shard_id}")

    monkeypatch.setattr(stages, "score_shard", fail)
    code, output, errors = cli("score", "--jobs", jobs, "--json")
    assert (code, len(set(tried))) == (1, 3)
    # The first cause, and what it has led to.
    assert json.loads(output)["error"]["message"].startswith("nothing answers shard")
    assert "3 of 3 uploads of run" in errors
    with open_session(settings) as session:
        assert session.scalar(select(ScoringRun.state)) == "failed"


@pytest.mark.usefixtures("three_wait")
@pytest.mark.parametrize(("options", "planned"), [(["--yes"], 3), ([], 3), (["--json"], 1)])
def test_all_is_scored_where_somebody_said_so(
    cli: Run,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    planned: int,
) -> None:
    monkeypatch.setenv("GUN_DETECTION_CONFIRM_IMAGES", "1")
    monkeypatch.setattr("typer.confirm", lambda _: True)
    monkeypatch.setattr(stages, "score_shard", lambda *_: None)
    assert cli("score", *options)[0] == 1
    with open_session(settings) as session:
        assert session.scalar(select(ScoringRun.planned)) == planned


JOBS = """
import signal
import sys
from pathlib import Path
from gun_detection.children import run_child
from gun_detection.cli.scoring import _in_parallel

# What runs in the background inherits that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


def wait(number):
    own = folder / f"{number}"
    own.mkdir()
    pid = str(folder / f"{number}.pid")
    run_child([sys.executable, "-c", child, pid], own, {}, lambda _: None)


_in_parallel(wait, [0, 1, 2], 2)
"""


def test_an_interrupt_ends_all_that_is_scored_at_the_same_time(tmp_path: Path) -> None:
    pids = [tmp_path / f"{number}.pid" for number in (0, 1)]

    def eventually(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    # In a session of its own: from a terminal the children would hear of it, too.
    with subprocess.Popen(
        [sys.executable, "-c", JOBS, str(tmp_path)], start_new_session=True
    ) as process:
        try:
            eventually(lambda: all(pid.exists() and pid.read_text() for pid in pids))
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130
        finally:
            process.kill()
    assert not (tmp_path / "2.pid").exists()
    for pid in pids:
        stat = Path(f"/proc/{pid.read_text()}/stat")
        # Nobody may collect what it leaves.
        eventually(lambda stat=stat: not stat.exists() or ") Z " in stat.read_text())  # type: ignore[misc]


def test_a_file_is_evaluated_and_used_without_a_database(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gun_detection.datasets.synthetic import draw_pictures
    from gun_detection.detector.architectures import DetectorConfig, build_detector
    from gun_detection.detector.weights import serialize

    monkeypatch.setenv("GUN_DETECTION_HOME", str(tmp_path / "home"))
    config = DetectorConfig(architecture="resnet18_fpn")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(serialize(build_detector(config), config)[0])
    folder = tmp_path / "guns"
    (folder / "Images").mkdir(parents=True)
    (folder / "Labels").mkdir()
    for number, picture in enumerate(draw_pictures(5, seed=2)):
        (folder / "Images" / f"{number}.jpeg").write_bytes(picture.data)
        rows = [" ".join(str(round(v)) for v in box) for box in picture.boxes]
        (folder / "Labels" / f"{number}.txt").write_text("\n".join([str(len(rows)), *rows]))
    (folder / "Images" / "9.jpeg").write_bytes(b"words")
    (folder / "Labels" / "9.txt").write_text("0")
    curve = tmp_path / "reports" / "curve.json"
    found = ok(cli("evaluate", weights, "--folder", folder, "--curve", curve, "--json"))
    assert json.loads(curve.read_bytes())[0]["recall"] == 0
    assert {"ap", "ap50", "ap75", "false_positives_per_negative"} <= set(found)
    assert (found["images"], found["negatives"]) == (5, 1)
    assert found["rejected"] == {"NOT_IMAGE": 1}

    picture_file, broken = folder / "Images" / "0.jpeg", folder / "Images" / "9.jpeg"
    code, output, _ = cli(
        "predict", picture_file, broken, "--model", weights, "--out", tmp_path / "o", "--json"
    )
    document = json.loads(output)
    assert code == 1, "a picture that could not be looked at is not passed over"
    assert document["review"] == "unreviewed"
    assert "error" in document["images"][1]
    assert [file.name for file in (tmp_path / "o" / "overlays").iterdir()] == ["00001-0.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["frobnicate"], 2, "No such command"),
        (["evaluate"], 2, "Missing argument"),
        (["evaluate", "champion", "--split", "train"], 2, "holdout or validation"),
        (["score", "--threshold", "2"], 2, "Invalid value for"),
        (["score", "--bucket", ""], 2, "it is empty: name a bucket"),
        (["rescore", "--bucket", ""], 2, "it is empty: name a bucket"),
        (["quarantine", "retry", "--reason", "CRASHED", "--bucket", ""], 2, "it is empty"),
        (["ingest", "synthetic:many"], 2, "synthetic:200:0"),
        (["train", "--preset", "fast"], 2, "choose from smoke, demo, cpu, gpu, seed"),
        (["train", "--set", "epochs"], 2, "key=value"),
        (["train", "--set", "epoch=3"], 2, "docs/recipes.md"),
        (["promote", "m", "--force"], 2, "say why"),
        (["promote", "m", "--force", "--reason", " "], 2, "say why"),
        (["prune", "--keep", str(10**19)], 2, "Invalid value for"),
        (["quarantine", "list", "--limit", str(10**19)], 2, "Invalid value for"),
        (["keys", "new", "a", "--days", "9999999"], 2, "Invalid value for"),
        (["keys", "rotate", "a", "--days", "9999999"], 2, "Invalid value for"),
        (["keys", "rotate", "a", "--overlap-days", "9999999"], 2, "Invalid value for"),
        (["train", "--recipe", "/nowhere.yaml"], 2, "there is no recipe"),
        (["train", "--dataset", "/nowhere.json"], 2, "there is no dataset_id in /nowhere.json"),
        (["gate", "/nowhere.json"], 2, "there is no model_id in /nowhere.json"),
        (["threshold", "champion", "--target", "luck"], 2, "'fppi', 'precision', 'f1'"),
        (["compare", "a", "b", "--split", "train"], 2, "holdout or validation"),
        (["train"], 1, "there is no data set yet"),
        (["score"], 1, "there is no champion yet"),
        (["evaluate", "no-such-model"], 1, "gun-detection datasets|there is no"),
        (["evaluate", "/nowhere.pth", "--folder", "/tmp"], 1, "no weights file"),
        (["ingest", "/nowhere"], 1, "does not exist"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    cli: Run, settings: Settings, arguments: list[str], code: int, message: str
) -> None:
    found, output, errors = cli(*arguments)
    assert found == code
    assert output == ""
    assert any(part in " ".join(errors.split()) for part in message.split("|"))
    assert "Traceback" not in errors


def test_an_error_with_json_is_json_too(cli: Run, settings: Settings) -> None:
    code, output, _ = cli("score", "--json")
    assert (code, json.loads(output)["error"]["reason"]) == (1, "NO_CHAMPION")


def test_an_unknown_variable_stops_every_command(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUN_DETECTION_THRESHHOLD", "1")
    code, _, errors = cli("models")
    assert (code, "GUN_DETECTION_THRESHHOLD" in errors) == (2, True)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['gun-detection', '--help']\n"
        "from gun_detection.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'sqlalchemy', 'boto3', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
