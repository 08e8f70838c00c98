"""Numbers and times as people read them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

ExactTimes = Annotated[bool, typer.Option("--exact-times", help="Show exact times in UTC instead of `3 min ago`.")]

_UNITS: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))
_FAR_S: Final = 30 * 86_400.0
"""A time that is farther away is shown as a date."""


def number(value: float) -> str:
    """Return a number with separators: `1,234,567`. A fraction below 10 gets one decimal."""
    if isinstance(value, int) or value >= 9.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}"


def many(value: int, what: str) -> str:
    """Return `1 key`, `1,234 keys`."""
    return f"{value:,} {what}" if value == 1 else f"{value:,} {what}s"


def duration(seconds: float) -> str:
    """Return a duration in one or two units: `12 s`, `3 min`, `2 h 5 min`, `4 d`."""
    left = max(seconds, 0.0)
    if left < 1:
        return "0 s" if left < 0.0005 else f"{left * 1000:.0f} ms"
    for place, (size, unit) in enumerate(_UNITS):
        if left >= size:
            whole = int(left // size)
            # A second unit is useful only while the first is small.
            if whole < 10 and size > 60:
                smaller, name = _UNITS[place + 1]
                rest = int((left - whole * size) // smaller)
                if rest:
                    return f"{whole} {unit} {rest} {name}"
            return f"{whole} {unit}"
    raise AssertionError(seconds)


def exact(ms: int) -> str:
    """Return a time, given in milliseconds since 1970, as `2030-01-31T12:00:00+00:00`. Any number is shown."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms since 1970"


def moment(ms: int, *, exactly: bool = False, now_ms: int | None = None) -> str:
    """Return a time as people say it: `3 min ago`, `in 2 h`; as a date if it is far away, or with `exactly`."""
    if exactly:
        return exact(ms)
    away_s = (ms - (time.time_ns() // 1_000_000 if now_ms is None else now_ms)) / 1000
    if abs(away_s) >= _FAR_S:
        return exact(ms)
    if abs(away_s) < 1:
        return "now"
    return f"in {duration(away_s)}" if away_s > 0 else f"{duration(-away_s)} ago"
