"""The working tree beside an older commit: each measure in turn on both, so that a row is a ratio from one run."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from benchmarks.builds import (
    ROOT,
    build_commit,
    build_working_tree,
    clean_environment,
    commit_of,
    describe,
    describe_working_tree,
)
from benchmarks.harness import Compared, Measure, Row
from benchmarks.report import environment, figure_text


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two builds."""

    name: str
    """`old` or `new`."""
    what: str
    """The commit or the working tree, in words."""
    python: Path
    """The interpreter of its environment."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row: what its figure was in each alternation, and how many times as much the new build costs."""

    name: str
    olds: Sequence[Compared]
    news: Sequence[Compared]

    @property
    def ratios(self) -> list[float]:
        """One for each alternation: new / old of neighbouring runs, inverted if more is better."""
        return [new.cost_against(old) for old, new in zip(self.olds, self.news, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(slots=True)
class Comparison:
    """The results, and what could not be compared."""

    changes: list[Change] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a row or a measure -> why it was left out."""
    new_failed: list[str] = field(default_factory=list)
    """The measures that failed on the new build; their reasons are in `left_out`."""


class MeasureFailed(Exception):
    """A measure ended with an error on one side; the text is the last line of it."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(f"fails on {side.name} ({side.what}): {reason}")
        self.side = side


def run_measure(side: Side, name: str, measure: Measure, *, quick: bool) -> dict[str, Row]:
    """Run one measure on one side, in a process of its own; return its rows by name."""
    command: list[str | Path] = [
        side.python,
        "-m",
        "benchmarks.single",
        measure.__module__,
        name,
        "quick" if quick else "full",
    ]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MeasureFailed(side, complaint[-1])
    return {row.name: row for row in msgspec.json.decode(done.stdout, type=list[Row])}


def compare(old: Side, new: Side, measures: Mapping[str, Measure], rounds: int, *, quick: bool) -> Comparison:
    """Run each measure `rounds` times on both sides, alternately."""
    found = Comparison()
    for name, measure in measures.items():
        try:
            _compare_one(found, old, new, name, measure, rounds, quick=quick)
        except MeasureFailed as failure:
            found.left_out[name] = str(failure)
            if failure.side is new:
                found.new_failed.append(name)
    return found


def _compare_one(
    found: Comparison, old: Side, new: Side, name: str, measure: Measure, rounds: int, *, quick: bool
) -> None:
    taken: dict[str, list[dict[str, Row]]] = {old.name: [], new.name: []}
    for number in range(rounds):
        # Neither side is always the first: a machine that heats up or cools down must not favour one.
        for side in (new, old) if number % 2 else (old, new):
            taken[side.name].append(run_measure(side, name, measure, quick=quick))
        print(f"{name}: {number + 1} of {rounds}", file=sys.stderr, flush=True)
    pair_rows(found, taken[old.name], taken[new.name])


def pair_rows(found: Comparison, olds: Sequence[Mapping[str, Row]], news: Sequence[Mapping[str, Row]]) -> None:
    """Add the rows of the alternations, each given as rows by name, to `found`."""
    for name in news[0]:
        pairs = [(old[name].compared, new[name].compared) for old, new in zip(olds, news, strict=True) if name in old]
        compared = [(before, after) for before, after in pairs if before is not None and after is not None]
        if len(pairs) < len(news):
            found.left_out[name] = "the old build has no such row"
        elif len(compared) < len(pairs):
            found.left_out[name] = "says nothing about the engine alone"
        else:
            found.changes.append(Change(name, [before for before, _ in compared], [after for _, after in compared]))


def table(changes: Sequence[Change], limit: float) -> str:
    """Return the rows as aligned text."""
    lines = [("row", "new / old", "min - max", "", "old", "new")]
    for change in changes:
        name = change.news[0].name
        old, new = (
            figure_text(name, statistics.median(each.value for each in side)) for side in (change.olds, change.news)
        )
        spread = f"{_ratio(min(change.ratios))} - {_ratio(max(change.ratios))}"
        lines.append((change.name, _ratio(change.ratio), spread, _verdict(change, limit), old, new))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    aligned.insert(1, "-" * max(len(line) for line in aligned))
    return "\n".join(aligned)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "inf"


def _verdict(change: Change, limit: float) -> str:
    # With alternations on both sides of 1 the difference may be noise, whatever the median says.
    doubt = "?" if min(change.ratios) <= 1 <= max(change.ratios) else ""
    if change.ratio > limit:
        return f"WORSE{doubt}"
    return f"better{doubt}" if change.ratio < 1 / limit else ""


def run(revision: str, measures: Mapping[str, Measure], *, rounds: int, limit: float, quick: bool, file: Path) -> int:
    """Build both sides, compare and report; return the exit status.

    1 if a row costs more than `limit` times as much, a measure fails on the new build, or nothing could be compared;
    else 0. Raises BuildError if a side cannot be built.
    """
    with TemporaryDirectory() as folder:
        commit = commit_of(revision)
        old = Side("old", describe(commit), build_commit(commit))
        new = Side("new", describe_working_tree(), build_working_tree(Path(folder) / "environment"))
        found = compare(old, new, measures, rounds, quick=quick)

    worse = [change.name for change in found.changes if change.ratio > limit]
    where = environment()
    print(f"old: {old.what}\nnew: {new.what}")
    print(
        f"{where['implementation']} {where['python']}, {where['system']}, {where['cores']} cores; {rounds} alternations"
    )
    print("A ratio above 1 means that the new build is slower or larger; it is the median of the alternations.")
    print("`?`: the alternations lie on both sides of 1, so the difference may be noise.\n")
    print(table(found.changes, limit))
    for name, reason in found.left_out.items():
        print(f"not compared: {name}: {reason}")
    said = f"{len(found.changes) - len(worse)} of {len(found.changes)} rows cost at most {limit:g} times as much"
    print(f"\n{said}; worse: {', '.join(worse)}" if worse else f"\n{said}")
    _write_json(found, old, new, rounds=rounds, limit=limit, file=file)
    print(f"written: {file}")
    return int(bool(worse or found.new_failed or not found.changes))


def _write_json(found: Comparison, old: Side, new: Side, *, rounds: int, limit: float, file: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": change.name,
            "figure": change.news[0].name,
            # JSON has no infinity: null where the old figure is 0 and the new one is not.
            "ratio": _finite(change.ratio),
            "ratios": [_finite(ratio) for ratio in change.ratios],
            "old": [each.value for each in change.olds],
            "new": [each.value for each in change.news],
            "worse": change.ratio > limit,
        }
        for change in found.changes
    ]
    report = {
        "environment": environment(),
        "old": old.what,
        "new": new.what,
        "rounds": rounds,
        "limit": limit,
        "rows": rows,
        "left_out": found.left_out,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
