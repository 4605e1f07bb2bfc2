"""`python -m embedded up|down|status|logs|env|demo`."""

import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from embedded.config import load_platform
from embedded.environment import (
    direct_addresses,
    given_settings,
    owned_environment,
    program_folder,
)
from embedded.postgres import installation
from embedded.stack import Stack
from embedded.supervision import NAME as SUPERVISOR
from gun_detection.errors import GunDetectionError, explain_os_error

app = typer.Typer(
    help="The whole platform on this machine, without containers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)


@contextmanager
def show_step(step: str) -> Iterator[None]:
    """A spinner while the step goes on, a line with its duration when it is done."""
    start = time.monotonic()
    with console.status(f"{step} …"):
        yield
    console.print(f"[green]✓[/] {step} [dim]({time.monotonic() - start:.1f} s)[/]")


@app.command()
def up() -> None:
    """Start everything that does not run, and wait until it is healthy."""
    stack = Stack(load_platform())
    start = time.monotonic()
    if stack.up(show_step):
        console.print(f"The platform is up after {time.monotonic() - start:.0f} s.")
    else:
        console.print("The platform is already up.")
    _print_addresses(stack)


def _print_addresses(stack: Stack) -> None:
    platform = stack.platform
    console.print(f"Airflow      {platform.airflow_url}")
    console.print(f"  sign in    admin / {platform.credentials.passwords['admin']}", markup=False)
    console.print(f"  others     {platform.directory / 'credentials.json'}", markup=False)
    console.print(f"TensorBoard  {platform.tensorboard_url}")
    console.print(f"Predict      {platform.predict_url}")
    console.print(f"  API key    {platform.credentials.predict_key}", markup=False)
    console.print(f"S3           {platform.s3_url}")


@app.command()
def down(
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete all data and credentials as well.")
    ] = False,
) -> None:
    """Stop everything; the data stays."""
    stack = Stack(load_platform())
    with console.status("Stopping …"):
        ran = stack.down()
    console.print("The platform is down." if ran else "Nothing was running.")
    if purge:
        stack.purge()
        console.print(f"Deleted {stack.platform.directory}.")


@app.command()
def status() -> None:
    """Show every component; the exit code is 0 when all are healthy."""
    stack = Stack(load_platform())
    rows = stack.status()
    table = Table("component", "state", "pid", "up", "address", "health", box=None)
    for row in rows:
        table.add_row(
            row.name,
            row.state.lower(),
            str(row.pid or "–"),
            _duration(row.uptime),
            row.address,
            "[green]healthy[/]" if row.healthy else "[red]not healthy[/]",
        )
    console.print(table)
    raise typer.Exit(0 if all(row.healthy for row in rows) else 1)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds))) if seconds > 0 else "–"


@app.command()
def logs(
    component: Annotated[str | None, typer.Argument(help="One component; all by default.")] = None,
    follow: Annotated[bool, typer.Option("-f", help="Go on as more is written.")] = False,
    lines: Annotated[int, typer.Option("-n", min=1, help="Lines of each component.")] = 20,
) -> None:
    """Show the last lines of the logs."""
    stack = Stack(load_platform())
    names = [service.name for group in stack.groups.values() for service in group]
    names.append(SUPERVISOR)
    if component is not None and component not in names:
        raise typer.BadParameter(f"no component {component!r}: take one of {', '.join(names)}")
    files = {name: stack.log_of(name) for name in names if component in (None, name)}
    for name, file in files.items():
        if file.exists():
            with file.open(errors="replace") as opened:
                _print_lines(name, deque(opened, maxlen=lines))
    if follow:
        _follow(files)


def _follow(files: dict[str, Path]) -> None:
    """Print what is appended to the files until interrupted; they may be rotated meanwhile."""
    positions = {name: file.stat().st_size for name, file in files.items() if file.exists()}
    while True:
        for name, file in files.items():
            if not file.exists():
                continue
            start = positions.get(name, 0)
            if file.stat().st_size < start:
                start = 0
            with file.open("rb") as opened:
                opened.seek(start)
                new = opened.read()
            positions[name] = start + len(new)
            _print_lines(name, new.decode(errors="replace").splitlines())
        time.sleep(0.5)


def _print_lines(name: str, lines: "deque[str] | list[str]") -> None:
    for line in lines:
        console.print(f"{name:>13} | {line.rstrip()}", markup=False)


@app.command()
def env() -> None:
    """Print the platform's environment for a shell: `eval "$(make -s env)"`."""
    stack = Stack(load_platform())
    predict = {
        "PREDICT_URL": stack.platform.predict_url,
        "PREDICT_KEY": stack.platform.credentials.predict_key,
    }
    # The services' settings too: what a person does by hand follows the same ones as the nights.
    given = given_settings(stack.platform)
    owned = owned_environment(stack.platform, stack.postgres)
    for name, value in (given | owned | direct_addresses() | predict).items():
        print(f"export {name}={shlex.quote(value)}")
    # For `psql`, where the machine has none.
    path = os.pathsep.join([str(program_folder()), "${PATH}", str(installation() / "bin")])
    print(f'export PATH="{path}"')


@app.command()
def demo() -> None:
    """Start the platform and go once round the loop (DATA=path, kaggle or s3://… for real data)."""
    from embedded.demo import demo as run_demo

    stack = Stack(load_platform())
    run_demo(stack, console, show_step, os.environ.get("DATA"))
    console.print()
    _print_addresses(stack)
    console.print("It goes on running; `make down` stops it.")


def main() -> None:
    # This process uses the platform's servers, too.
    os.environ.update(direct_addresses())
    try:
        app()
    except GunDetectionError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        sys.exit(1)
    except OSError as error:
        console.print(f"error: {explain_os_error(error)}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
