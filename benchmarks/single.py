"""One measure in a process of its own: `python -m benchmarks.single MODULE MEASURE full|quick` prints its rows as JSON.

Only the module of the measure is imported: what another module needs may be missing from an older commit.
"""

from __future__ import annotations

import importlib
import sys

import msgspec

from benchmarks.harness import FULL, QUICK


def main(module: str, measure: str, sizes: str) -> None:
    """Run the measure and print its rows, as one line."""
    rows = importlib.import_module(module).MEASURES[measure](QUICK if sizes == "quick" else FULL)
    print(msgspec.json.encode(rows).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
