"""A survey and a finished run in words, as Markdown: for logs, questions and pages."""

from typing import Any

from gun_detection.scoring.stats import STAGES


def survey_text(survey: dict[str, Any]) -> str:
    """What a run would cover, and what it takes."""
    listed = (
        ("listed", "listed"),
        ("left out by patterns", "left_out"),
        ("new", "new"),
        ("changed", "changed"),
        ("there again", "returned"),
        ("scored already", "scored"),
    )
    rows = [(name, f"{survey[key]:,}") for name, key in listed if survey["listed"] is not None]
    if survey["outdated"] is not None:
        rows.append(("scored by an earlier model only", f"{survey['outdated']:,}"))
    rows += [
        ("to be scored in this run", f"{survey['planned']:,} ({survey['megabytes']:,.0f} MB)"),
        (_left(survey["left_over"], survey["by_hand"]), f"{survey['left_over']:,}"),
        ("time", "unknown: nothing of this kind was timed yet"),
    ]
    if survey["seconds"] is not None:
        rows[-1] = ("time", f"about {duration(survey['seconds'])}")
    if survey["cost"]:
        rows.append(("cost", f"about {survey['cost']:,.2f}"))
    rows += [(f"**not listed**: {where}", why) for where, why in survey["unlisted"].items()]
    buckets = ", ".join(survey["buckets"])
    lines = [
        f"Model {survey['model_id']}, {buckets}/{survey['prefix']}",
        "",
        "| | |",
        "| --- | --- |",
    ]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def run_text(summary: dict[str, Any]) -> str:
    """What a run did, and where its time went."""
    reasons = ", ".join(f"{name} {count}" for name, count in summary["reasons"].items())
    lines = [
        f"{summary['scored']} scored, {summary['quarantined']} quarantined"
        f"{f' ({reasons})' if reasons else ''}, {summary['detections']} detections at or above "
        f"the threshold, {summary['left_over']} "
        f"{_left(summary['left_over'], summary['by_hand'])}."
    ]
    stats = summary["stats"]
    if stats and stats["seconds"]:
        rate = stats["pictures"] / stats["seconds"]
        parts = ", ".join(f"{name} {stats['working'][name]:.1f} s" for name in STAGES)
        lines += [
            f"{rate:.2f} pictures/s for each worker, {stats['bytes'] / 2**20:.1f} MB, "
            f"{', '.join(stats['engines'])} on {', '.join(stats['devices'])}.",
            f"At work: {parts}, in {stats['seconds']:.1f} s.",
            *(f"{row['seconds']:.2f} s: {row['address']!r}" for row in stats["slowest"]),
        ]
    return "\n".join(lines)


def _left(count: int, by_hand: list[str]) -> str:
    """What becomes of uploads that a run leaves over."""
    if count and by_hand:
        return f"left: no nightly run takes those of {', '.join(by_hand)}, trigger this again"
    return "left for the next run"


def duration(seconds: float) -> str:
    """Two units at most: `3 d 4 h`, `3 h 20 min`, `5 min`, `40 s`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
