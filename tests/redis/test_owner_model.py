"""Each order of what can happen at an owner's claim ends well; and the bugs that such code can have are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from effort import FULL, untraced
from interleaving import Problem, World, explore
from owner_model import (
    a_caller_and_a_poster,
    a_caller_and_a_task,
    a_main_task_and_a_caller,
    a_main_task_and_a_poster,
    a_main_task_that_reads_first,
    a_pause_and_a_caller,
    a_task_and_a_poster,
    a_task_and_housekeeping,
)
from played_owner import enter_worlds

from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.connections.watch import Watch
from scopestate.persistence.redis import scope as scope_module
from scopestate.persistence.redis.owner import RedisConnectionOwner


@pytest.fixture(autouse=True)
def _in_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_worlds(monkeypatch, RedisConnectionOwner, scope_module)


LARGE = [
    (a_caller_and_a_poster, {"losses": 1}),
    (a_pause_and_a_caller, {"rivals": 1}),
    (a_caller_and_a_task, {}),
    (a_main_task_and_a_poster, {"cuts": 1}),
    (a_main_task_that_reads_first, {"cuts": 1}),
    (a_main_task_that_reads_first, {"losses": 1}),
    (a_main_task_that_reads_first, {"cuts": 1, "rivals": 1}),
    (a_main_task_and_a_caller, {"cuts": 1}),
]
"""Scenarios of ten seconds and more. Bugs are looked for in them in every run: that ends with the first one."""


@pytest.mark.timeout(600)  # seconds on an idle machine; many times that on a busy one, with coverage
@pytest.mark.parametrize(
    ("scenario", "faults"),
    [
        (a_caller_and_a_poster, {"cuts": 1}),
        (a_caller_and_a_poster, {"timeouts": 1}),
        (a_task_and_a_poster, {"rivals": 1}),
        (a_task_and_housekeeping, {}),
        (a_main_task_and_a_poster, {}),
        *(LARGE if FULL else ()),
    ],
)
def test_rest_is_reached_from_every_state(scenario: Callable[[World], None], faults: dict[str, int]) -> None:
    with untraced():
        graph = explore(scenario, faults)

    assert graph.states > 100
    assert graph.ends > 0


class AsksOnlyForItsInbox(RedisConnectionOwner):
    """A bug that the model must find: the holder that gives the claim back does not see that it is wanted."""

    def _give_back(self) -> None:
        self._claim.pop("holder", None)
        if self._inbox or self._is_news:
            self._ask()


class LooksFirst(RedisConnectionOwner):
    """Another one: the holder looks at the inbox before it gives the claim back."""

    def _give_back(self) -> None:
        is_wanted = self._inbox or self._wanted or self._is_news
        self._claim.pop("holder", None)
        if is_wanted:
            self._ask()


class SendsAgain(RedisConnectionOwner):
    """And another: what was under way when the connection broke is sent once more."""

    def _fail_under_way(self, error: Broken) -> None:
        while self._under_way:
            command = self._under_way.popleft()
            other = command.once_more()
            command.scope.commands.command = other
            self._pass_to(self, other)


class LeavesTheReply(RedisConnectionOwner):
    """And one more: an event loop that was interrupted does not ask the I/O thread to receive the reply."""

    def _recover_task(self, watch: Watch) -> None:
        watch.stop()
        self._claim.pop("holder", None)


@pytest.mark.parametrize(
    ("kind", "scenario", "faults"),
    [
        (AsksOnlyForItsInbox, a_pause_and_a_caller, {"rivals": 1}),
        (LooksFirst, a_caller_and_a_poster, {}),
        (LooksFirst, a_caller_and_a_task, {}),
        (SendsAgain, a_caller_and_a_poster, {"losses": 1}),
        (LeavesTheReply, a_main_task_and_a_poster, {"cuts": 1}),
    ],
)
def test_a_bug_is_found(
    kind: type[RedisConnectionOwner], scenario: Callable[..., None], faults: dict[str, int]
) -> None:
    with untraced(), pytest.raises(Problem, match=r"rest|done twice"):
        explore(lambda world: scenario(world, kind), faults)
