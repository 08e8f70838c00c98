"""What is computed, as plain functions over plain values: the reactions and the check both go by these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAT_TENTHS = 700
"""A day is hot from 70 °F on."""
COLD_TENTHS = 400
"""A day is cold from 40 °F down."""

Extremes = dict[str, dict[str, Any]]
"""{"high": {"tenths": 651, "hour": "16"}, "low": {...}}"""


def band(tenths: int) -> str:
    """Return the ten degrees that a temperature lies in: `50s` for 50.0 to 59.9 °F."""
    return f"{tenths // 100 * 10}s"


def extremes(hours: Mapping[str, int]) -> Extremes:
    """Return the highest and lowest of a day's hours; of equal ones the earliest, in whatever order they came."""
    high = min(hours, key=lambda hour: (-hours[hour], hour))
    low = min(hours, key=lambda hour: (hours[hour], hour))
    return {"high": {"tenths": hours[high], "hour": high}, "low": {"tenths": hours[low], "hour": low}}


def is_hot(day: Extremes) -> bool:
    """True for a day that deserves a heat alert."""
    return bool(day["high"]["tenths"] >= HEAT_TENTHS)


def is_cold(day: Extremes) -> bool:
    """True for a day that deserves a cold alert."""
    return bool(day["low"]["tenths"] <= COLD_TENTHS)
