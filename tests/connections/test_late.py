"""A thread that looks at its connection only after the time limit, when the answer has been there for a while."""

from __future__ import annotations

import types
from typing import Any

import pytest
from patient_model import Line, NumberedCall, PatientOwner
from played_owner import ReplyTo

from scopestate.errors import CallTimeout
from scopestate.persistence.connections.owner import HOLDER
from scopestate.persistence.connections.pump import Means, TimeLimits


class Setup:
    """An owner whose steps the test makes, with one call that was sent and has five seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sent: list[Any] = []
        self.outcomes: list[tuple[Any, Any]] = []
        self.world = types.SimpleNamespace(choose=lambda what, first, *others: first[1])
        self.line = Line(self)  # type: ignore[arg-type]
        target = types.SimpleNamespace(address="played", dial=lambda: self.line)
        means = Means(self._deliver, lambda: self.now_s, lambda low, high: high)
        self.owner = PatientOwner(target, TimeLimits(5.0, 1.0), means)
        call = NumberedCall(1, ReplyTo(1), 0)  # type: ignore[arg-type]
        self.owner._sort_in(call, self.now_s)
        self.pump()
        assert [number for _, number in self.sent] == [1]

    def pump(self) -> None:
        self.owner._pump_safely(waits=False, dials=True)

    def _deliver(self, outcomes: list[Any]) -> None:
        self.outcomes += [(answer, type(error)) for _, answer, error in outcomes]


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_an_answer_that_is_there_ends_the_call_though_it_is_received_late(setup: Setup) -> None:
    setup.line.answers.append(1)
    setup.now_s = 7.0

    setup.pump()

    assert setup.outcomes == [(1, type(None))]


def test_a_call_without_an_answer_ends_though_others_are_answered(setup: Setup) -> None:
    setup.line.answers.append(2)  # of a call that was given up
    setup.now_s = 7.0

    setup.pump()

    assert setup.outcomes == [(None, CallTimeout)]


def test_an_event_loop_that_was_blocked_receives_before_it_ends_calls(setup: Setup) -> None:
    owner, later = setup.owner, []
    watch: Any = types.SimpleNamespace(check_later=lambda delay_s, check: later.append(delay_s))
    owner._watch = watch
    setup.line.answers.append(1)
    setup.now_s = 7.0

    owner._check_age(watch)
    assert setup.outcomes == []
    assert HOLDER not in owner._claim
    assert later

    setup.pump()
    assert setup.outcomes == [(1, type(None))]
