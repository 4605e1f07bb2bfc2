"""What the recipe reaches on real pictures, beside the well-known tutorial recipe.

    python benchmarks/accuracy.py --data DIR --weights FILE [--presentations N] [--out DIR]

DIR holds `pistols/` and `negatives/` (Images/N.jpeg, Labels/N.txt), FILE an ImageNet MobileNetV2 of
torchvision. A quarter of the near-duplicate groups is held back and only measured on at the end;
both recipes see the same pictures, the same number of times, from the same backbone. Prints AP50
and false positives with their intervals, and leaves the model and its report in `--out`.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from embedded.servers import make_bucket, temporary_servers
from gun_detection import stages
from gun_detection.database import open_session, upgrade
from gun_detection.logs import configure_logging
from gun_detection.release.champion import get_model
from gun_detection.settings import load_settings
from gun_detection.storage import Storage
from gun_detection.training.config import PRESETS, parse_override
from gun_detection.training.loop import Progress

OURS: dict[str, Any] = {"preset": "cpu", "patience": None}
SHOWN = (
    "ap50",
    "ap75",
    "ap",
    "threshold",
    "precision",
    "recall",
    "false_positives_per_negative",
    "sensitivity",
    "specificity",
)
SEED: dict[str, Any] = {"preset": "seed", "detector.norm": "trainable", "frozen_stages": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--presentations", type=int, default=3000)
    parser.add_argument("--recipes", nargs="+", default=["ours", "seed"], choices=["ours", "seed"])
    parser.add_argument("--processes", type=int, help="training processes; default as the settings")
    parser.add_argument("--validations", type=int, default=4, help="validations in a training")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy"))
    arguments = parser.parse_args()
    with temporary_servers() as servers, tempfile.TemporaryDirectory() as name:
        os.environ |= servers.variables("postgres", "data", "uploads")
        os.environ["GUN_DETECTION_HOME"] = f"{name}/home"
        os.environ["GUN_DETECTION_VALIDATION_SHARE"] = "0.1"
        os.environ["GUN_DETECTION_HOLDOUT_SHARE"] = "0.25"
        if arguments.processes:
            os.environ["GUN_DETECTION_TRAINING_PROCESSES"] = str(arguments.processes)
        measure(arguments, Path(name))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    settings = load_settings()
    configure_logging(settings, file=False)
    make_bucket(Storage(settings), settings.data_bucket)
    upgrade(settings)
    for part in ("pistols", "negatives"):
        shutil.copytree(arguments.data / part, folder / "source" / part)
    dataset = stages.ingest(str(folder / "source"), settings)
    print(json.dumps(dataset, indent=2), flush=True)
    rows = []
    for recipe in arguments.recipes:
        overrides = dict(OURS if recipe == "ours" else SEED)
        preset = overrides.pop("preset")
        if recipe == "ours":
            overrides |= dict(parse_override(text) for text in arguments.changes)
        batch = overrides.get("batch_size", PRESETS[preset].batch_size)
        steps = arguments.presentations // batch
        # An epoch with repeated gun-free pictures is a little longer than the split.
        epochs = max(1, round(arguments.presentations / dataset["train_images"]))
        overrides |= {
            "detector.architecture": "mobilenet_v2_fpn",
            "initial_weights": str(arguments.weights.resolve()),
            "epochs": epochs + 1,
            "max_steps": steps,
            "validate_every": max(1, epochs // arguments.validations),
            "checkpoint_minutes": 10,
        }
        started = time.monotonic()
        trained = stages.train(settings, None, preset, overrides, progress())
        result = stages.evaluate(settings, trained["model_id"])
        with open_session(settings) as session:
            record = get_model(session, trained["model_id"]).training
        rows.append((recipe, result, record, time.monotonic() - started))
        export(settings, trained["model_id"], result, arguments.out / recipe)
        print(json.dumps({"recipe": recipe, "metrics": result, "training": record}, indent=2))
    show(rows)


def progress() -> Any:
    last = time.monotonic()

    def report(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > 30 or now.step == now.steps:
            last = time.monotonic()
            print(
                f"step {now.step}/{now.steps}, loss {now.loss:.3f}, "
                f"{now.images_per_second:.2f} pictures/s, {now.seconds_left:.0f} s left",
                flush=True,
            )

    return report


def export(settings: Any, model_id: str, result: dict[str, Any], out: Path) -> None:
    """Copy the model's files and its report from the bucket."""
    out.mkdir(parents=True, exist_ok=True)
    storage = Storage(settings)
    for name in ("weights.safetensors", "model.json"):
        data = storage.get(settings.data_bucket, f"models/{model_id}/{name}")
        (out / name).write_bytes(data)
    key = result["report_url"].partition("/reports/")[2]
    (out / "report.html").write_bytes(storage.get(settings.data_bucket, key))
    shutil.copytree(settings.tensorboard_dir, out / "tensorboard", dirs_exist_ok=True)


def show(rows: list[Any]) -> None:
    """Both recipes side by side, each number with its 95 % interval."""
    for recipe, result, record, seconds in rows:
        print(f"\n{recipe}: {result['model_id']}, {record['images']} presentations")
        numbers = {name: result[name] for name in SHOWN}
        numbers |= {f"recall_at_fppi_{k}": v for k, v in result["recall_at_fppi"].items()}
        for name, value in numbers.items():
            span = result["intervals"].get(name)
            text = "not measured" if value is None else f"{value:.3f}"
            print(f"  {name:32s} {text}" + (f"  [{span[0]:.3f}, {span[1]:.3f}]" if span else ""))
        print(
            f"  {'cost':32s} {record['cpu_seconds']:.0f} CPU s of training, "
            f"{record['wall_seconds']:.0f} s in {record['processes']} processes; "
            f"all told {seconds:.0f} s"
        )
    found = {row[0]: row for row in rows}
    if len(found) == 2:
        ours, seed = found["ours"], found["seed"]
        print(f"\nAP50 ratio {ours[1]['ap50'] / max(seed[1]['ap50'], 1e-9):.2f}")
        show_cost(ours[2]["history"], seed[2])


def show_cost(ours: list[dict[str, float]], theirs: dict[str, Any]) -> None:
    """When ours was as good on the validation pictures as the other became at best."""
    best = max(theirs["history"], key=lambda row: row["validation_ap50"])
    for row in ours:
        if row["validation_ap50"] >= best["validation_ap50"]:
            share = row["cpu_seconds"] / theirs["cpu_seconds"]
            print(
                f"best validation AP50 of seed, {best['validation_ap50']:.3f}, was passed by ours "
                f"({row['validation_ap50']:.3f}) after {row['cpu_seconds']:.0f} CPU s: "
                f"ratio to seed's whole training {share:.2f}"
            )
            return
    print("ours never passed the best validation AP50 of seed")


if __name__ == "__main__":
    main()
