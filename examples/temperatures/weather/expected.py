"""The same result, computed plainly: one thread, dicts, no engine. What the engine holds must be equal to this."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from weather import rules
from weather.data import Reading
from weather.writers import Share

Expected = dict[str, dict[str, Any]]
"""scope -> key -> value"""


def compute(readings: Sequence[Reading], all_shares: Sequence[Share]) -> Expected:
    """Return every key that must be in the store, and nothing else."""
    hours: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    months: dict[tuple[str, str], list[int]] = defaultdict(list)
    bands: dict[str, Counter[str]] = defaultdict(Counter)
    result: Expected = defaultdict(dict)
    for reading in readings:
        result[f"readings/{reading.station}"][f"{reading.date}T{reading.hour}"] = {"tenths": reading.tenths}
        hours[reading.station, reading.date][reading.hour] = reading.tenths
        months[reading.station, reading.month].append(reading.tenths)
        bands[rules.band(reading.tenths)][reading.station] += 1
    for (station, month), tenths in months.items():
        result[f"months/{station}"][month] = {"readings": len(tenths), "sum_tenths": sum(tenths)}
    for name, counts in bands.items():
        result["bands"][name] = dict(counts)

    alerts: dict[str, dict[str, list[dict[str, str]]]] = {"heat": defaultdict(list), "cold": defaultdict(list)}
    for (station, date), day in hours.items():
        result[f"days/{station}/{date}"]["hours"] = day
        found = rules.extremes(day)
        result[f"extremes/{station}"][date] = found
        for kind, applies in (("heat", rules.is_hot(found)), ("cold", rules.is_cold(found))):
            if applies:
                alerts[kind][station].append({"date": date})
    for kind, days in alerts.items():
        if days:
            result["alerts"][kind] = days

    for share in all_shares:
        by_month = itertools.groupby(share.readings, key=lambda reading: reading.month)
        result[f"journal/{share.writer}"]["months"] = [
            {"month": month, "readings": sum(1 for _ in group)} for month, group in by_month
        ]
    return dict(result)
