"""Options that several commands share, and what they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gun_detection.logs import configure_logging
from gun_detection.settings import Settings, load_settings


def _read_from(name: str) -> Callable[[Any], Any]:
    """A callback: of a document that `--out` wrote, its value of this name is meant."""

    def read(value: str | None) -> str | None:
        if value is None or not value.endswith(".json"):
            return value
        try:
            return str(json.loads(Path(value).read_bytes())[name])
        except (OSError, ValueError, LookupError, TypeError):
            raise typer.BadParameter(
                f"there is no {name} in {value}: name a file that --out wrote, or the {name} itself"
            ) from None

    return read


# More rows than there are, and no more than the database can count.
MOST_ROWS = 10**9

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the result to this file, too; other commands take it for the version.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Data set version; the newest by default.",
        callback=_read_from("dataset_id"),
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="smoke, demo, cpu, gpu or seed; by default the settings' own.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the preset; repeatable."),
]
Recipe = Annotated[
    str | None,
    typer.Option(metavar="FILE[:PART]", help="Change the values that this YAML file names."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="`champion`, a model version, or a .safetensors or .pth file.",
        callback=_read_from("model_id"),
    ),
]
Split = Annotated[str, typer.Option(help="holdout or validation.")]
Version = Annotated[
    str,
    typer.Argument(
        help="A model version; see `gun-detection models`.", callback=_read_from("model_id")
    ),
]
Reason = Annotated[str, typer.Option(help="Why; goes into the promotion log.")]
Threshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Score threshold; the model's own by default.")
]


def read_settings() -> Settings:
    """The settings, with logging as they say."""
    settings = load_settings()
    configure_logging(settings)
    return settings


def check_split(split: str) -> None:
    if split not in ("holdout", "validation"):
        raise typer.BadParameter("take holdout or validation", param_hint="--split")
