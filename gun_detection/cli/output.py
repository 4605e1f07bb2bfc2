"""What the program shows: tables for people, one JSON document for programs, bars on the side."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from gun_detection.text import printable, printable_lines

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_ROWS_OF_TABLE = 1000


@contextmanager
def progress(task: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)


def write(document: Mapping[str, Any] | list[dict[str, Any]], path: Path | None) -> None:
    """The document as a file, whole or not at all; the same result is the same file."""
    if path is None:
        return
    if isinstance(document, Mapping):
        # Whether it was made now or before is no part of the result.
        document = {name: value for name, value in document.items() if name != "created"}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)


def show(document: Mapping[str, Any], as_json: bool, headline: str | None = None) -> None:
    if as_json:
        print(json.dumps(document))
        return
    if headline:
        out.print(escape(printable_lines(headline)), soft_wrap=True)
    shown = {k: v for k, v in document.items() if not isinstance(v, list | dict) or not headline}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        # Not a table: in a narrow window, or a pipe, it would cut addresses and keys short.
        out.print(f"{name.replace('_', ' '):{width}}  {_text(value)}", soft_wrap=True)


def show_metrics(document: Mapping[str, Any], as_json: bool) -> None:
    """Numbers with their 95 % intervals; slices and the like are in the report."""
    if as_json:
        print(json.dumps(document))
        return
    intervals = document["intervals"]
    table = Table("", "value", "95 % interval", box=None, pad_edge=False)
    numbers = {k: v for k, v in document.items() if not isinstance(v, list | dict)}
    numbers |= {f"recall_at_fppi_{k}": v for k, v in document["recall_at_fppi"].items()}
    for name, value in numbers.items():
        span = intervals.get(name)
        text = f"{span[0]:.3f} to {span[1]:.3f}" if span else ""
        table.add_row(name.replace("_", " "), _text(value), text)
    out.print(table)


def show_decision(document: Mapping[str, Any], as_json: bool) -> None:
    """Rule by rule, as a person decides by it."""
    if as_json:
        print(json.dumps(document))
        return
    against = document["champion_id"] or "nothing: there is no champion yet"
    said = "[green]passes[/]" if document["passed"] else "[red]is rejected[/]"
    from gun_detection.release.verdict import Outcome, Verdict

    out.print(
        f"{_text(document['candidate_id'])} {said}, compared with {_text(against)}, by the "
        f"policy {_text(document['policy'])} ({document['policy_version']}).",
        soft_wrap=True,
    )
    table = Table("rule", "value", "interval", "needs", "outcome", "note", box=None)
    for verdict in map(Verdict.model_validate, document["rules"]):
        passed = verdict.outcome is Outcome.PASSED
        colour = "red" if verdict.blocks else "green" if passed else "dim"
        table.add_row(
            _text(verdict.rule),
            _text(verdict.value),
            verdict.span,
            verdict.needs,
            f"[{colour}]{verdict.outcome}[/]",
            _text(verdict.note),
        )
    out.print(table)
    if document["caution"]:
        out.print(f"[yellow]Look closely[/]: {_text(document['caution'])}.", soft_wrap=True)
    out.print(document["decision_url"], soft_wrap=True)


def show_rows(rows: list[dict[str, Any]], as_json: bool, empty: str) -> None:
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        out.print(empty)
    else:
        # A table is laid out as a whole before its first line is seen.
        for start in range(0, len(rows), _ROWS_OF_TABLE):
            out.print(_table(rows[start : start + _ROWS_OF_TABLE]))


def _table(rows: list[dict[str, Any]]) -> Table:
    # A name that is cut short cannot be copied.
    columns = (
        Column(name.replace("_", " "), no_wrap=name in ("model", "dataset"), overflow="fold")
        for name in rows[0]
    )
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*map(_text, row.values()))
    return table


def show_predictions(document: dict[str, Any]) -> None:
    table = Table("file", "guns", "scores", box=None)
    for result in document["images"]:
        if "error" in result:
            table.add_row(_text(result["file"]), "–", f"[red]{_text(result['error'])}[/]")
        else:
            scores = ", ".join(f"{row['score']:.2f}" for row in result["detections"])
            table.add_row(_text(result["file"]), str(len(result["detections"])), scores)
    out.print(table)
    out.print(
        f"[dim]{_text(document['model'])}, threshold {document['threshold']:.2f}. "
        "Unreviewed: a person has to look.[/]"
    )


def _text(value: Any) -> str:
    """As markup of one line that shows the value, whatever is in it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else escape(printable(str(value)))
