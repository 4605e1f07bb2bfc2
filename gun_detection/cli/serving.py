"""Commands of the predict service."""

from typing import Annotated

import typer
from rich.markup import escape

from gun_detection.cli.options import AsJson
from gun_detection.cli.output import err, show, show_rows
from gun_detection.errors import NotFoundError, SettingsError
from gun_detection.logs import configure_logging
from gun_detection.settings import load_settings
from gun_detection.text import printable_lines

keys = typer.Typer(help="API keys of the predict service.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Who uses it; goes into the log.")]
# A hundred years; no date is much later than the year 9999.
_MOST_DAYS = 36_500
Days = Annotated[
    int | None,
    typer.Option(min=0, max=_MOST_DAYS, help="Days until its last one; without end by default."),
]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    model: Annotated[
        str | None, typer.Option(help="`champion`, or a .safetensors or .pth file.")
    ] = None,
) -> None:
    """Answer REST requests with the champion, or with one file; see docs/serving.md."""
    import os

    from gun_detection.serving.server import run, take_short_names

    given = {"HOST": host, "PORT": port, "WORKERS": workers, "MODEL": model}
    # Its processes read the environment.
    for name, value in given.items():
        if value is not None:
            os.environ[f"GUN_DETECTION_SERVE_{name}"] = str(value)
    take_short_names()
    settings = load_settings()
    configure_logging(settings, file=False)
    run(settings)


@keys.command()
def new(
    name: Name,
    scope: Annotated[
        list[str] | None, typer.Option(help="predict, store or metrics; repeatable.")
    ] = None,
    days: Days = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Write no file: the entry is put elsewhere.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an API key; it is shown this once, and only its hash is kept."""
    from gun_detection.serving.keys import add_key, keys_file, new_key

    path = keys_file(load_settings())
    secret, key = new_key(name, scope or ["predict"], days)
    if not only_print:
        add_key(path, key)
    show(
        {"key": secret, "entry": str(key), "file": None if only_print else str(path)},
        as_json,
        "Keep the key now: it cannot be shown again.",
    )


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """The keys in the file and in GUN_DETECTION_SERVE_KEYS, without the keys.

    Where the variable is damaged, those in the file are shown all the same, and the exit code is 2.
    """
    from gun_detection.serving.keys import SCOPES, given_keys, keys_file, read_keys, today

    settings = load_settings()
    path = keys_file(settings)
    places, damaged = {str(path): read_keys(path)}, None
    try:
        places["GUN_DETECTION_SERVE_KEYS"] = given_keys(settings)
    except SettingsError as error:
        damaged = error.message
    rows = [
        {
            "name": key.name,
            "scopes": ", ".join(scope for scope in SCOPES if scope in key.scopes),
            "last_day": str(key.end) if key.end else "never ends",
            "valid": key.valid(today()),
            "where": place,
        }
        for place, keys in places.items()
        for key in keys
    ]
    show_rows(rows, as_json, "There is no API key yet: gun-detection keys new NAME")
    if damaged is not None:
        # Not raised: standard output holds one document, and that is the rows.
        err.print(f"[red]error:[/] {escape(printable_lines(damaged))}", soft_wrap=True)
        raise typer.Exit(2)


@keys.command()
def rotate(
    name: Name,
    overlap_days: Annotated[
        int, typer.Option(min=0, max=_MOST_DAYS, help="How long the key before stays valid.")
    ] = 7,
    days: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MOST_DAYS, help="Days until its last one; as many as before by default."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new key of the same name and scopes; the one before ends soon."""
    from gun_detection.serving.keys import keys_file, rotate_key

    secret, key = rotate_key(keys_file(load_settings()), name, overlap_days, days)
    show(
        {"key": secret, "last_day": str(key.end) if key.end else "never ends"},
        as_json,
        "Keep the key now: it cannot be shown again.",
    )


@keys.command()
def revoke(name: Name, as_json: AsJson = False) -> None:
    """Remove all keys of a name; a running service refuses them within a second or two."""
    from gun_detection.serving.keys import given_keys, keys_file, revoke_key

    settings = load_settings()
    path = keys_file(settings)
    removed, missing = 0, None
    # First of all: no fault elsewhere keeps a key that somebody stole.
    try:
        removed = revoke_key(path, name)
    except NotFoundError as error:
        missing = error
    try:
        goes_on = any(key.name == name for key in given_keys(settings))
    except SettingsError as error:
        said = f"all keys {name} in {path} are revoked" if missing is None else missing.message
        raise SettingsError(
            f"{said}, but {error.message}: look there for a key {name}, too"
        ) from None
    hint = f"a key {name} in GUN_DETECTION_SERVE_KEYS goes on: take it out there"
    if missing is not None:
        raise NotFoundError(f"{missing.message}; {hint}") if goes_on else missing
    if goes_on:
        err.print(hint)
    show({"revoked": removed}, as_json)
