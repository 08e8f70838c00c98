"""The report: a table for people, JSON for programs, a chart for the eye."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.harness import Row

PEERS = ("pykka", "msgspec", "diskcache", "sqlitedict", "burner-redis", "redis", "huey", "litequeue", "procrastinate")
UNITS = ("per_s", "us", "ms", "s", "mb")
"""Endings of a figure's name, the longer before the one that it ends with."""
VERDICTS = {True: "pass", False: "MISS", None: ""}
COLOURS = {True: "#2a7f62", False: "#c0392b", None: "#8a8f98"}


def number(value: float) -> str:
    """Three significant digits, thousands grouped."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def figure_text(name: str, value: float) -> str:
    """`ours_us` 2.2 as `ours 2.20 us`; `calls` 7 as `calls 7`."""
    for suffix in UNITS:
        if name.endswith(f"_{suffix}"):
            head = name.removesuffix(f"_{suffix}").replace("_", " ")
            return f"{head} {number(value)} {suffix.replace('_', ' ')}"
    return f"{name.replace('_', ' ')} {number(value)}"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text: what was measured, what it must reach, the figure, the verdict, the details."""
    cells = [("measure", "reach", "measured", "", "from")]
    for row in rows:
        sign = ">=" if row.at_least else "<="
        reach = "" if row.limit is None else f"{sign} {number(row.limit)} {row.unit}".rstrip()
        measured = f"{number(row.value)} {row.unit}".rstrip()
        details = ", ".join(figure_text(name, value) for name, value in row.figures.items())
        cells.append((row.what, reach, measured, VERDICTS[row.passed], details))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = []
    for what, reach, measured, verdict, details in cells:
        aligned = (what.ljust(widths[0]), reach.rjust(widths[1]), measured.rjust(widths[2]), verdict.ljust(widths[3]))
        lines.append("  ".join((*aligned, details)).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Return one line that counts the verdicts and names what was missed."""
    judged = [row for row in rows if row.passed is not None]
    missed = [row.name for row in judged if not row.passed]
    said = f"{len(judged) - len(missed)} of {len(judged)} targets reached"
    return f"{said}; missed: {', '.join(missed)}" if missed else said


def environment() -> dict[str, Any]:
    """Return what the figures depend on: interpreter, cores, versions. No host name."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in PEERS},
    }


def write_json(rows: Sequence[Row], file: Path) -> None:
    """Write environment and rows; a row's `passed` is null where nothing was to be reached."""
    found = [
        {
            "name": row.name,
            "what": row.what,
            "value": row.value,
            "unit": row.unit,
            "reach": None if row.limit is None else {"at_least" if row.at_least else "at_most": row.limit},
            "passed": row.passed,
            "figures": row.figures,
            "own": row.own,
        }
        for row in rows
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": environment(), "rows": found}, indent=2) + "\n", encoding="utf-8")


def _headroom(row: Row) -> float:
    """Return how many times over the target was reached; below 1 is a miss."""
    assert row.limit is not None
    good, bad = (row.value, row.limit) if row.at_least else (row.limit, row.value)
    if bad <= 0:
        return 1.0
    return max(good, 1e-3) / bad


def write_svg(rows: Sequence[Row], file: Path) -> None:
    """Draw a bar per row, logarithmic: judged rows as headroom over their target, peers as their ratio to ours."""
    judged = [row for row in rows if row.limit is not None]
    shown = [row for row in rows if row.limit is None and row.unit == "x"]
    heights = [max(1, len(judged)), max(1, len(shown))]
    # Text stays text, and nothing in the file changes from run to run but the figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scopestate", "font.size": 9}):
        figure = Figure(figsize=(11, 1.8 + 0.32 * sum(heights)), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=heights)
        _bars(upper, judged, [_headroom(row) for row in judged], "times the target (right of the line: reached)")
        _bars(
            lower, shown, [row.value for row in shown], "times as long as scopestate (right of the line: we are faster)"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasSVG(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _bars(axes: Any, rows: Sequence[Row], lengths: Sequence[float], label: str) -> None:
    places = range(len(rows))
    # From 1, the line that decides, so that a bar's side says reached or missed at a glance.
    axes.barh(places, [length - 1 for length in lengths], left=1, color=[COLOURS[row.passed] for row in rows])
    axes.set_yticks(places, [row.what for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        axes.annotate(
            f"{number(row.value)} {row.unit}".rstrip(),
            (max(length, 1), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.margins(x=0.15)
