"""Engines on Redis under simulation: many seeds, nothing lost, doubled, out of order or left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scopestate.ops import messages
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis.calls import Call
from scopestate.persistence.redis.commands import ScopeCommands
from scopestate.persistence.redis.owner import RedisConnectionOwner
from scopestate.persistence.redis.scope import RedisScope
from scopestate.persistence.redis.script import DONE
from tests.effort import size, untraced
from tests.reliability.figures import record
from tests.simulation.__main__ import main
from tests.simulation.redis_network import End
from tests.simulation.redis_simulator import Failure, Life, World, played, simulate

SEEDS = size(60, 200)
ENOUGH_SEEDS = 300

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _played() -> Iterator[None]:
    with played():
        yield


def first_failure() -> Failure | None:
    with untraced():
        return next((failure for seed in range(ENOUGH_SEEDS) if (failure := simulate(seed)) is not None), None)


@pytest.mark.timeout(600)  # 10 s on an idle machine
def test_nothing_is_lost_or_wrong_in_any_seed() -> None:
    with untraced():
        failures = [failure for seed in range(SEEDS) if (failure := simulate(seed)) is not None]

    assert failures == []
    record("engines on a played Redis: seeds from 0", seeds=SEEDS, failures=0)


def test_a_seed_replays_to_the_letter() -> None:
    for seed in range(10):
        first, second = World(seed, trace=True), None
        first.run()
        second = World(seed, trace=True)
        second.run()

        assert first.trace == second.trace
        assert first.trace


def test_the_seeds_reach_what_they_are_there_for() -> None:
    wanted = {
        "the answer is lost",
        "bytes are through",
        "s late",
        "an answer comes twice",
        "a signal handler raises KeyboardInterrupt",
        "KeyboardInterrupt()",
        "a rival writes",
        "no answer in time",
        "the server ends",
        "the server is back",
        "the server is loading: True",
        "the server is full: True",
        "the server forgets its scripts",
        "passivate a",
        "was lost during state::set",
        "a write may have been applied",
        "nothing was sent",
        "has no memory left",
        "ReplyTimeout(",
        "EngineClosed()",
        "already wait for",
        "was changed elsewhere during each of 2 attempts",
        "engine 2: event",
        "engine 1 is closed",
        "task a/x id",
    }
    for seed in range(400):
        world = World(seed, trace=True)
        world.run()
        trace = "\n".join(world.trace or [])
        wanted = {text for text in wanted if text not in trace}
        if not wanted:
            break

    assert wanted == set()


def test_an_event_whose_answer_comes_twice_is_told_once() -> None:
    world = World(0)
    world.shares_events = True
    world.network.faults.end()
    life = Life(world, 1)
    world.lives.append(life)

    for number in (1, 2, 3):
        world.network.faults.doubled_answer = 1.0
        life.engine.tell(messages.Set("a", "y", {"id": world.next_id()}))
        while life.heard < number:
            assert world.dispatcher.step()
        world.network.faults.end()
        world.dispatcher.advance(5.0)  # the next read of the stream ends without an entry
        world.check()
        assert (life.heard, world.truth.published) == (number, number)

    life.close()


# ------------------------------------------------------------------------------------------------------ planted bugs


def what_was_under_way_is_sent_again(patch: Patch) -> None:
    def again(self: RedisConnectionOwner, error: Broken) -> None:
        while self._under_way:
            command = self._under_way.popleft()
            other = command.scope.commands.command = command.once_more()
            self._pass_to(self, other)

    patch.setattr(RedisConnectionOwner, "_fail_under_way", again)


def a_conflict_counts_as_done(patch: Patch) -> None:
    finish = ScopeCommands._finish

    def all_well(self: ScopeCommands, call: Call, found: Any, ended: list[Call]) -> None:
        finish(self, call, DONE if call.effects is not None and not call.awaited else found, ended)

    patch.setattr(ScopeCommands, "_finish", all_well)


def a_caller_that_is_cut_short_leaves_its_reply_behind(patch: Patch) -> None:
    recover = RedisConnectionOwner._recover

    def keep(self: RedisConnectionOwner, scope: Any, call: Call) -> None:
        connection = self._connection
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(End, "close", lambda end: None)
            recover(self, scope, call)
        self._connection = self._connection or connection

    patch.setattr(RedisConnectionOwner, "_recover", keep)


def a_wake_up_is_lost_when_the_claim_is_given_back(patch: Patch) -> None:
    patch.setattr(RedisConnectionOwner, "_give_back", lambda self: self._claim.pop("holder", None))


def an_alarm_is_not_set(patch: Patch) -> None:
    def only_what_is_posted(self: RedisConnectionOwner) -> None:
        self._claim.pop("holder", None)
        if self._inbox or self._wanted:
            self._ask()

    patch.setattr(RedisConnectionOwner, "_give_back", only_what_is_posted)


def a_pause_is_forgotten(patch: Patch) -> None:
    patch.setattr(RedisConnectionOwner, "_schedule", lambda self, scope: scope.commands.pausing.clear())


def later_calls_overtake_one_that_pauses(patch: Patch) -> None:
    patch.setattr(ScopeCommands, "_waits", lambda self, call, keys: False)


def an_event_is_fired_twice(patch: Patch) -> None:
    changed = RedisScope._changed

    def twice(self: RedisScope, call: Call, *change: Any) -> None:
        changed(self, call, *change)
        if call.tries:
            changed(self, call, *change)

    patch.setattr(RedisScope, "_changed", twice)


def a_lost_answer_counts_as_refused(patch: Patch) -> None:
    fail = Call.fail

    def certainly_not(self: Call, error: Exception) -> None:
        self.sends_write = False
        fail(self, error)

    patch.setattr(Call, "fail", certainly_not)


BUGS: list[Callable[[Patch], None]] = [
    what_was_under_way_is_sent_again,
    a_conflict_counts_as_done,
    a_caller_that_is_cut_short_leaves_its_reply_behind,
    a_wake_up_is_lost_when_the_claim_is_given_back,
    an_alarm_is_not_set,
    a_pause_is_forgotten,
    later_calls_overtake_one_that_pauses,
    an_event_is_fired_twice,
    a_lost_answer_counts_as_refused,
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)

    assert first_failure() is not None


def test_a_failing_seed_prints_its_trace_and_the_command_that_replays_it(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    what_was_under_way_is_sent_again(monkeypatch)
    failure = first_failure()
    assert failure is not None

    assert main(["--redis", "--seed", str(failure.seed)]) == 1

    printed = capsys.readouterr().out
    assert "engine 1 starts" in printed
    assert f"seed {failure.seed}: {failure.problem}" in printed
    assert f"python -m tests.simulation --seed {failure.seed} --redis" in printed
