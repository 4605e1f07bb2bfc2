"""`gun-detection …`: every stage of the loop by hand, the same calls that the DAGs make.

Exit codes: 0 done, 1 failed, 2 wrong use. With `--json` standard output holds one JSON document.
"""

import json
import sys
from typing import Annotated

import typer
from rich.markup import escape

from gun_detection import __version__
from gun_detection.cli import data, models, predict, release, scoring, serving
from gun_detection.cli.output import err, out
from gun_detection.errors import GunDetectionError, SettingsError, explain_os_error
from gun_detection.text import printable_lines

# torch, SQLAlchemy and the like are imported by the commands that need them: help stays quick.

app = typer.Typer(
    name="gun-detection",
    help="Find guns in images: data sets, training, evaluation, gate, promotion and scoring.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
database = typer.Typer(help="The database that holds everything but files.", no_args_is_help=True)
app.add_typer(database, name="db")
app.add_typer(scoring.quarantine, name="quarantine")
app.add_typer(serving.keys, name="keys")

database.command()(data.upgrade)
# In the order of the loop, as the help lists them.
for command in (
    data.ingest,
    models.train,
    models.evaluate,
    models.compare,
    models.threshold,
    release.gate,
    release.promote,
    release.rollback,
    release.package,
    release.card,
    release.prune,
    scoring.score,
    scoring.rescore,
    predict.predict,
    serving.serve,
):
    app.command()(command)
app.command("import-model")(models.import_model)
app.command()(models.models)
app.command()(data.datasets)
app.command()(data.doctor)


def _version(show: bool) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The program: a known error becomes one line and an exit code."""
    try:
        app()
    except SettingsError as error:
        _fail(error.message, error.reason, 2)
    except GunDetectionError as error:
        _fail(error.message, error.reason, 1)
    except OSError as error:
        _fail(explain_os_error(error), "OS_ERROR", 1)


def _fail(message: str, reason: str, code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    err.print(f"[red]error:[/] {escape(printable_lines(message))}", soft_wrap=True)
    raise SystemExit(code)
