"""The data: temperatures of two cities, every hour of 2010, as the package `vega-datasets` ships them.

Real in its wrinkles too: 8,759 readings for each city, because the clocks went forward on 14 March.
"""

from __future__ import annotations

import csv
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

FILES = {"seattle": "seattle-temps.csv", "san-francisco": "sf-temps.csv"}
"""Station -> file; both have the columns `date` and `temp`."""


class Reading(NamedTuple):
    """One temperature at one station."""

    station: str
    date: str
    """2010-03-14"""
    hour: str
    """00 to 23, local time"""
    tenths: int
    """Tenths of a degree Fahrenheit. Whole, so that a sum does not depend on the order in which it was added up."""

    @property
    def month(self) -> str:
        """2010-03"""
        return self.date[:7]


class DataMissing(Exception):
    """The package with the data is not installed."""


def load() -> list[Reading]:
    """Return all readings in order of time, the stations alternating. Raises DataMissing."""
    readings = [reading for station, file in FILES.items() for reading in _read(station, file)]
    return sorted(readings, key=lambda reading: (reading.date, reading.hour, reading.station))


def _read(station: str, file: str) -> list[Reading]:
    # The file itself. Refused: `vega_datasets.data.seattle_temps()`, which imports pandas: that alone takes a second.
    try:
        path = distribution("vega-datasets").locate_file(f"vega_datasets/_data/{file}")
    except PackageNotFoundError as error:
        raise DataMissing("the package vega-datasets is not installed: `pip install vega-datasets`") from error
    with open(str(path), encoding="utf-8", newline="") as lines:
        return [_reading(station, row["date"], row["temp"]) for row in csv.DictReader(lines)]


def _reading(station: str, moment: str, degrees: str) -> Reading:
    """Read `2010/03/14 15:00` or `2010/03/14 15:00:00`, and `51.6`."""
    date, clock = moment.split(" ")
    return Reading(station, date.replace("/", "-"), clock[:2], int(Decimal(degrees) * 10))
