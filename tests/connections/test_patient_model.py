"""Each order of what can happen where answers come in any order and when they like; and bugs in such code are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from effort import FULL, untraced
from interleaving import Problem, World, explore
from patient_model import (
    NumberedCall,
    PatientOwner,
    a_caller_and_a_poster,
    a_caller_and_a_task,
    a_long_call_and_a_poster,
    a_long_caller_and_a_poster,
    a_task_and_a_poster,
    a_task_and_housekeeping,
    one_caller,
    two_callers,
    two_posters,
)
from played_owner import enter_worlds

from scopestate.persistence.connections.connection import NOT_ALL


@pytest.fixture(autouse=True)
def _in_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_worlds(monkeypatch, PatientOwner)


LARGE = [
    (two_posters, {}),
    (a_long_call_and_a_poster, {}),
    (a_long_caller_and_a_poster, {}),
    (two_callers, {}),
    (a_caller_and_a_poster, {}),
    (a_task_and_a_poster, {}),
    (a_task_and_housekeeping, {}),
    (a_caller_and_a_task, {}),
]
"""Scenarios of more than a few seconds. Bugs are looked for in them in every run: that ends with the first one."""


@pytest.mark.timeout(3600)  # seconds on an idle machine; many times that on a busy one
@pytest.mark.parametrize(
    ("scenario", "faults"),
    [
        (one_caller, {}),
        (one_caller, {"cuts": 1}),
        (one_caller, {"timeouts": 1, "silence": 1}),
        (one_caller, {"cuts": 1, "silence": 1}),
        (one_caller, {"cuts": 1, "losses": 1}),
        *(LARGE if FULL else ()),
    ],
)
def test_rest_is_reached_from_every_state(scenario: Callable[[World], None], faults: dict[str, int]) -> None:
    with untraced():
        graph = explore(scenario, faults)

    assert graph.states > 100
    assert graph.ends > 0


class RingsNoBell(PatientOwner):
    """A bug that the model must find: the thread that waits for the socket is not woken by a token."""

    def _ask(self) -> None:
        self._tokens.put(None)


class LooksBeforeItSays(PatientOwner):
    """Another one: the I/O thread looks for tokens before it says that it waits for the socket."""

    def _sleep(self, wait_s: float | None, *, taken: bool) -> None:
        connection, bell = self._connection, self._bell
        if bell is None or connection is None or taken or not self._under_way or not self._tokens.empty():
            super()._sleep(0.0 if self._under_way else wait_s, taken=True)
            return
        self._at_socket = True
        connection.wait(wait_s, bell.fd)
        self._at_socket = False
        bell.silence()


class LeavesItQuietly(PatientOwner):
    """Another one: the I/O thread is not notified that a call is left to it."""

    def _leave_to_thread(self, call: NumberedCall) -> None:
        super()._leave_to_thread(call)
        self._is_news = False


class TakesThemInOrder(PatientOwner):
    """And one that takes answers for those of the calls that were sent first."""

    def _take_answers(self, connection: Any) -> None:
        while (number := connection.next_reply()) is not NOT_ALL:
            if self._under_way:
                self._end(self._under_way.pop(next(iter(self._under_way))), number, None)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "scenario"),
    [
        (RingsNoBell, a_long_call_and_a_poster),
        (LooksBeforeItSays, a_long_call_and_a_poster),
        (LeavesItQuietly, one_caller),
        (TakesThemInOrder, two_posters),
    ],
)
def test_a_bug_is_found(kind: type[PatientOwner], scenario: Callable[..., None]) -> None:
    with untraced(), pytest.raises(Problem, match=r"rest|has the answer of"):
        explore(lambda world: scenario(world, kind), {})
