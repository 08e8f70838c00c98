"""Numbers and times as people read them."""

from __future__ import annotations

import pytest

from scopestate.cli.people import duration, exact, many, moment, number

NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.0004, "0 s"),
        (0.25, "250 ms"),
        (1, "1 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (185, "3 min"),
        (3_600, "1 h"),
        (3_900, "1 h 5 min"),
        (36_300, "10 h"),
        (90_000, "1 d 1 h"),
        (864_000_000, "10000 d"),
    ],
)
def test_durations_have_one_unit_or_two(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("away_s", "said"), [(0, "now"), (-180, "3 min ago"), (7200, "in 2 h"), (-40 * 86_400, "2026-12-06T08:00:00+00:00")]
)
def test_times_are_told_from_now_and_far_ones_as_dates(away_s: int, said: str) -> None:
    assert moment(NOW_MS + away_s * 1000, now_ms=NOW_MS) == said


def test_an_exact_time_is_told_on_demand_and_any_number_is_shown() -> None:
    assert moment(NOW_MS, exactly=True, now_ms=NOW_MS) == "2027-01-15T08:00:00+00:00"
    assert exact(2**62) == f"{2**62} ms since 1970"


def test_numbers_have_separators() -> None:
    assert [number(value) for value in (0, 7, 1234567, 1234.6, 2.5, 3.0, 9.96)] == [
        "0",
        "7",
        "1,234,567",
        "1,235",
        "2.5",
        "3",
        "10",
    ]
    assert (many(1, "key"), many(0, "key"), many(12345, "key")) == ("1 key", "0 keys", "12,345 keys")
