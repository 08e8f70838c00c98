"""Log lines that clients cause: how many, how long, and what is said of those that were left out."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from scopestate.wire import bounded_log
from scopestate.wire.bounded_log import BURST, BURST_INFO, LONGEST, PERIOD_S, BoundedLog, shown

NAME = "scopestate.test"
FURTHER = f"further lines like the previous one are left out for {PERIOD_S:g} s"


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(bounded_log, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def log(clock: Clock) -> BoundedLog:
    return BoundedLog(logging.getLogger(NAME))


def taken(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines so far, and begin anew."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


@pytest.mark.parametrize(("level", "burst"), [("warning", BURST), ("info", BURST_INFO)])
def test_one_period_has_one_burst_and_the_next_one_says_how_many_lines_are_missing(
    log: BoundedLog, clock: Clock, caplog: pytest.LogCaptureFixture, level: str, burst: int
) -> None:
    caplog.set_level(logging.INFO, NAME)
    say = getattr(log, level)
    missing = 0
    for left_out in (0, 1, 7, 0):
        before = [f"{missing} lines like the next one were left out"] if missing else []
        for number in range(burst + left_out):
            say("line %d", number)
        assert taken(caplog) == [*before, *(f"line {number}" for number in range(burst)), FURTHER]
        clock.now += PERIOD_S
        missing = left_out


def test_a_period_is_over_after_its_time_and_not_before(
    log: BoundedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        for _ in range(BURST):
            log.warning("line")
        assert len(taken(caplog)) == BURST + 1
        clock.now += PERIOD_S - 0.001
        log.warning("line")
        assert taken(caplog) == []
        clock.now += 0.001
        log.warning("line")
        assert taken(caplog) == ["1 lines like the next one were left out", "line"]
        clock.now += PERIOD_S


def test_lines_of_one_kind_leave_those_of_another_alone(log: BoundedLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        log.warning("often %d", number)
    log.warning("seldom %d", 1)

    assert taken(caplog)[-1] == "seldom 1"


def test_a_level_that_is_off_counts_nothing(log: BoundedLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, NAME)
    for _ in range(100):
        log.warning("line")
        log.debug("line")
    caplog.set_level(logging.DEBUG, NAME)

    log.warning("line")
    log.debug("%s", "x" * (LONGEST + 1))

    assert taken(caplog) == ["line", f"{'x' * LONGEST}... ({LONGEST + 1} characters)"]


def test_text_of_exactly_the_limit_is_shown_whole() -> None:
    whole, longer = "x" * LONGEST, "x" * (LONGEST + 1)

    assert shown(whole) == whole
    assert shown(longer) == f"{whole}... ({LONGEST + 1} characters)"
    assert shown(ValueError(longer)) == f"{whole}... ({LONGEST + 1} characters)"
    assert shown(12) == 12
