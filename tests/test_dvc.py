"""`dvc repro` in a fresh clone: what is run and what is not; the registry says the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select
from sqlalchemy.orm import Session

from embedded.config import REPOSITORY
from gun_detection.database.models import DatasetVersion, Evaluation, ModelVersion
from gun_detection.settings import Settings

Dvc = Callable[..., str]

_FILES = (".dvcignore", ".dvc/config", ".dvc/.gitignore", "dvc.yaml", "params.yaml")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the pipeline, as Git would hand it out."""
    folder = tmp_path / "clone"
    for name in _FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def dvc(clone: Path, settings: Settings, tmp_path: Path) -> Dvc:
    """Runs DVC in the clone, with nobody's own configuration; its standard output."""
    # After `settings`, which are in the environment.
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "dvc"),
        "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "dvc"),
        "DVC_SYSTEM_CONFIG_DIR": str(tmp_path / "dvc"),
    }

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            ["dvc", *arguments], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    return run


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as it stands")


def change(folder: Path, stage: str, **values: object) -> None:
    """Edit `params.yaml`."""
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params[stage] |= values
    file.write_text(yaml.safe_dump(params))


def stages_run(output: str) -> list[str]:
    prefix = "Running stage '"
    lines = output.splitlines()
    return [line[len(prefix) :].rstrip("':") for line in lines if line.startswith(prefix)]


def leaves(document: Any) -> Any:
    """What DVC takes for metrics: no lists, and nothing that is not known."""
    if not isinstance(document, dict):
        return document
    kept = {k: leaves(v) for k, v in document.items() if v is not None and not isinstance(v, list)}
    return {name: value for name, value in kept.items() if value != {}}


def test_the_pipeline_runs_what_changed_and_says_what_the_registry_says(
    clone: Path, dvc: Dvc, session: Session
) -> None:
    change(clone, "ingest", source="synthetic:60:1")
    change(clone, "train", preset="smoke", recipe={"max_steps": 1})
    assert stages_run(dvc("repro")) == ["ingest", "train", "evaluate"]
    commit(clone)
    assert stages_run(dvc("repro")) == []

    documents = {
        file.stem: json.loads(file.read_bytes()) for file in (clone / "reports").glob("*.json")
    }
    model = session.scalars(select(ModelVersion)).one()
    row = session.scalars(select(Evaluation)).one()
    assert documents["dataset"]["dataset_id"] == session.scalars(select(DatasetVersion.id)).one()
    assert documents["model"]["model_id"] == model.id
    assert model.config["max_steps"] == 1
    assert documents["history"] == model.training["history"]
    shown = json.loads(dvc("metrics", "show", "--json"))
    metrics = shown[""]["data"]["reports/metrics.json"]["data"]
    assert (metrics["model_id"], metrics["split"]) == (model.id, "holdout")
    measured = leaves(row.metrics)
    assert {name: metrics[name] for name in measured} == measured
    assert documents["curve"][-1]["recall"] is not None

    dag = dvc("dag", "--dot")
    assert '"ingest" -> "train"' in dag
    assert '"train" -> "evaluate"' in dag
    page = Path(dvc("plots", "show").strip().removeprefix("file://")).read_text()
    assert "Precision and recall at every threshold" in page
    assert "Losses of the training" in page

    change(clone, "evaluate", split="validation")
    assert stages_run(dvc("repro")) == ["evaluate"]
    change(clone, "evaluate", split="holdout")
    change(clone, "train", recipe={"max_steps": 2})
    assert stages_run(dvc("repro")) == ["train", "evaluate"]
    [first, second] = session.scalars(select(ModelVersion).order_by(ModelVersion.created_at))
    moved = json.loads(dvc("metrics", "diff", "--json"))["reports/metrics.json"]
    assert (moved["model_id"]["old"], moved["model_id"]["new"]) == (first.id, second.id)
    changed = json.loads(dvc("params", "diff", "--json"))["params.yaml"]
    assert changed == {"train.recipe.max_steps": {"old": 1, "new": 2, "diff": 1}}
    page = Path(dvc("plots", "diff", "HEAD").strip().removeprefix("file://")).read_text()
    assert '"HEAD"' in page, "what was committed is drawn beside what is new"

    # The same source again is the same data set: nothing that follows from it is stale.
    assert stages_run(dvc("repro", "--force", "ingest")) == ["ingest"]
    assert stages_run(dvc("repro")) == []
