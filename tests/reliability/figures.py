"""Figures of the last run of the reliability tests: kills survived, interruptions, seeds, cases.

Each test records its own figures; they are kept in `bench-results/reliability.json`, next to those of the benchmarks,
and a command puts them into docs/explanation/reliability.md.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

FILE = Path(__file__).parents[2] / "bench-results" / "reliability.json"


def record(name: str, **figures: float | str) -> None:
    """Keep `figures` under `name`, in place of those of an earlier run; other names stay.

    Raises nothing if the folder cannot be written: figures are a report, not a result.
    """
    try:
        FILE.parent.mkdir(exist_ok=True)
        everything = read()
        everything[name] = figures
        with tempfile.NamedTemporaryFile("w", dir=FILE.parent, suffix=".json", delete=False) as file:
            json.dump(everything, file, indent=2, sort_keys=True)
        os.replace(file.name, FILE)
    except OSError as error:
        print(f"figures of {name} not kept: {error}: {figures}")  # noqa: T201 - pytest shows it with the test


def read() -> dict[str, dict[str, float | str]]:
    """Return the figures that were kept, by name; empty if there are none."""
    try:
        content = json.loads(FILE.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
