"""What the example prints: progress while it runs, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from scopestate import Engine
from weather.data import FILES

WIDTH = 12
"""Of the bar, so that the whole line fits into 80 columns."""
NAMES = {"seattle": "Seattle", "san-francisco": "San Francisco"}


class Progress:
    """On a terminal one line that updates itself; elsewhere a line for every quarter."""

    def __init__(self, out: TextIO, engine: Engine, total: int) -> None:
        self._out = out
        self._engine = engine
        self._total = total
        self._live = out.isatty()
        self._began = time.monotonic()
        self._quarters = 0

    def show(self) -> None:
        """Print how far the writers are, by what they note in the scope `progress` (durability: memory)."""
        done = sum(self._engine.list("progress"))
        if self._live:
            bar = "#" * (done * WIDTH // self._total)
            self._out.write(f"\r\033[K[{bar:<{WIDTH}}] {self._text(done)}")
            self._out.flush()
        elif done * 4 // self._total > self._quarters:
            self._quarters = done * 4 // self._total
            print(f"  {self._text(done)}", file=self._out, flush=True)

    def end(self) -> None:
        """Print the last state and leave the line."""
        self.show()
        if self._live:
            print(file=self._out)

    def _text(self, done: int) -> str:
        stats, passed_s = self._engine.stats(), time.monotonic() - self._began
        rate = round((stats.deliveries + stats.skipped) / passed_s) if passed_s else 0
        reactions = stats.deliveries
        return f"{done:>6,} of {self._total:,}, {rate:>6,} events/s, {reactions:>6,} reactions, {stats.saves:>3} saves"


def months(engine: Engine) -> str:
    """Return the year as a table, read from the engine's derived state."""
    rows = [["°F", *(cell for station in FILES for cell in (NAMES[station], "", ""))]]
    rows.append(["month", *(cell for _ in FILES for cell in ("mean", "high", "low"))])
    year = [f"2010-{number:02}" for number in range(1, 13)]
    rows += [[month, *(cell for station in FILES for cell in _month(engine, station, month))] for month in year]
    return table(rows)


def _month(engine: Engine, station: str, month: str) -> list[str]:
    """Return mean, high and low of a month; dashes if there is nothing about it."""
    total = engine.get(f"months/{station}", month)
    dates = [f"{month}-{day:02}" for day in range(1, 32)]
    days = [day for date in dates if (day := engine.get(f"extremes/{station}", date)) is not None]
    if total is None or not days:
        return ["-", "-", "-"]
    return [
        _degrees(total["sum_tenths"] / total["readings"]),
        _degrees(max(day["high"]["tenths"] for day in days)),
        _degrees(min(day["low"]["tenths"] for day in days)),
    ]


def alerts(engine: Engine) -> str:
    """Return one line for each kind of alert."""
    return "\n".join(
        f"{kind} alerts: " + ", ".join(f"{NAMES[station]} {len(days)}" for station, days in sorted(found.items()))
        for kind in ("heat", "cold")
        if (found := engine.get("alerts", kind))
    )


def bands(engine: Engine) -> str:
    """Return the distribution of the readings as a table."""
    found = {f"{tens}s": engine.get("bands", f"{tens}s") for tens in range(-50, 150, 10)}
    rows = [["hours in the", *NAMES.values()]]
    rows += [[name, *(f"{counts.get(station, 0):,}" for station in NAMES)] for name, counts in found.items() if counts]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _degrees(tenths: float) -> str:
    return f"{tenths / 10:.1f}"
