"""Options that several commands share, and what they stand for."""

from typing import Annotated

import typer

from gun_detection.logs import configure_logging
from gun_detection.settings import Settings, load_settings

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Data set version; the newest by default.")
]
Preset = Annotated[
    str | None, typer.Option(help="smoke, demo, cpu, gpu or seed; by default the settings' own.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the preset; repeatable."),
]
Model = Annotated[
    str, typer.Argument(help="`champion`, a model version, or a .safetensors or .pth file.")
]
Split = Annotated[str, typer.Option(help="holdout or validation.")]
Version = Annotated[str, typer.Argument(help="A model version; see `gun-detection models`.")]
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
