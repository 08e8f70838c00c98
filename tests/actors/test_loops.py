"""Calls on event loops, under a clock that the test moves: time limits, what is given up, what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.loops import ANSWER_S, CANCEL_GRACE_S, LOOK_S, LoopCalls, OnLoop, Overdue

pytestmark = pytest.mark.asyncio

Outcome = tuple[Any, BaseException | None]


class Bench:
    """Calls on the loop that runs, or on another one, and what became of them."""

    def __init__(self) -> None:
        self.clock = DeterministicDispatcher(1, switch=0, busy=0)
        self.replaced: list[asyncio.AbstractEventLoop] = []
        self.calls = LoopCalls(self.clock, self.replaced.append)

    def start(self, awaitable: Awaitable[Any], **options: Any) -> tuple[OnLoop, list[Outcome]]:
        loop = options.pop("loop", None) or asyncio.get_running_loop()
        call = OnLoop(awaitable, loop, self.calls, "a call", **options)
        outcomes: list[Outcome] = []
        call.start(lambda value, error: outcomes.append((value, error)))
        return call, outcomes

    def is_empty(self) -> bool:
        """Whether nothing is kept of calls that are over, once it has been looked."""
        self.clock.advance(2 * LOOK_S)
        return len(self.calls) == 0 and not self.calls._pulses and self.calls._next_look == float("inf")


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def rounds(count: int = 10) -> None:
    """Let the event loop of the test run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_call_ends_with_what_it_gives_or_raises_and_nothing_is_kept(bench: Bench) -> None:
    async def gives(value: object) -> object:
        if isinstance(value, BaseException):
            raise value
        return value

    for value in (1, ValueError("no"), SystemExit(3), asyncio.CancelledError("by itself")):
        call, outcomes = bench.start(gives(value), timeout_s=1.0)
        assert (len(bench.calls), call.is_settled()) == (1, False)
        await rounds()
        expected = (None, value) if isinstance(value, BaseException) else (value, None)
        assert outcomes == [expected]
        assert call.is_settled()
        assert bench.is_empty()


async def test_a_time_limit_ends_a_call_at_its_time_and_no_sooner_each_time(bench: Bench) -> None:
    for _ in range(3):
        call, outcomes = bench.start(for_ever(), timeout_s=1.0)
        await rounds()
        bench.clock.advance(0.75)
        await rounds()
        assert (outcomes, call.is_overdue) == ([], False)

        bench.clock.advance(0.25)
        await rounds()

        ((value, error),) = outcomes
        assert (value, type(error), str(error)) == (None, Overdue, "not done within 1 s")
        assert bench.replaced == []
        assert bench.is_empty()


async def test_a_short_time_limit_holds_behind_a_long_one_and_between_two_looks(bench: Bench) -> None:
    _, long = bench.start(for_ever(), timeout_s=64.0)
    _, unlimited = bench.start(for_ever())
    await rounds()
    for _ in range(3):
        _, short = bench.start(for_ever(), timeout_s=LOOK_S / 4)
        await rounds()
        bench.clock.advance(LOOK_S / 4)
        await rounds()
        assert isinstance(short[0][1], Overdue)
    assert long == []
    bench.clock.advance(64.0)
    await rounds()
    assert isinstance(long[0][1], Overdue)
    assert unlimited == []
    for call in list(bench.calls._open):
        call.cancel()
    await rounds()
    assert bench.is_empty()


async def test_a_coroutine_that_swallows_its_cancellation_is_given_up_after_the_grace_time(bench: Bench) -> None:
    go = asyncio.Event()

    async def stubborn() -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    _, outcomes = bench.start(stubborn(), timeout_s=1.0)
    await rounds()
    bench.clock.advance(1.0)
    await rounds()
    assert outcomes == []
    assert bench.calls.problems() == ["a call is overdue"]

    bench.clock.advance(CANCEL_GRACE_S - LOOK_S)
    await rounds()
    assert outcomes == []

    bench.clock.advance(LOOK_S)
    assert isinstance(outcomes[0][1], Overdue)
    assert bench.replaced == [], "a loop that runs is not replaced because one coroutine is stubborn"
    assert bench.calls.problems() == []
    go.set()
    await rounds()
    assert len(outcomes) == 1
    assert bench.is_empty()


async def test_a_loop_that_does_not_even_cancel_is_given_up(bench: Bench) -> None:
    loop = asyncio.get_running_loop()
    for round_ in range(1, 3):
        _, outcomes = bench.start(for_ever(), timeout_s=1.0)
        await rounds()
        bench.clock.advance(1.0)
        bench.clock.advance(CANCEL_GRACE_S - LOOK_S)  # the loop has had no turn, as it is in here
        assert (outcomes, bench.replaced) == ([], [loop] * (round_ - 1))
        bench.clock.advance(LOOK_S)
        assert isinstance(outcomes[0][1], Overdue)
        assert bench.replaced == [loop] * round_
        await rounds()
        assert bench.is_empty()


async def test_a_blocked_loop_is_named_until_it_answers_and_again_the_next_time(bench: Bench) -> None:
    _, outcomes = bench.start(for_ever())
    await rounds()
    for _ in range(3):
        bench.clock.advance(LOOK_S)  # it is asked
        await rounds()
        assert bench.calls.problems() == []
        bench.clock.advance(LOOK_S)
        bench.clock.advance(ANSWER_S)
        assert bench.calls.problems() == []
        bench.clock.advance(LOOK_S)
        assert bench.calls.problems() == ["a call waits for an event loop that has been blocked for 1.2 s"]
        await rounds()
        assert bench.calls.problems() == []
    assert outcomes == []
    (call,) = bench.calls._open
    call.cancel()
    await rounds()
    assert bench.is_empty()


async def test_a_call_that_has_not_begun_counts_as_blocked_from_its_start(bench: Bench) -> None:
    call, _ = bench.start(for_ever())
    bench.clock.advance(ANSWER_S)
    assert bench.calls.problems() == []
    bench.clock.advance(LOOK_S)
    assert bench.calls.problems() == ["a call waits for an event loop that has been blocked for 1.2 s"]
    await rounds()
    assert bench.calls.problems() == []
    call.cancel()
    await rounds()
    assert bench.is_empty()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_its_caller_gives_up_is_cancelled_and_settled_once(bench: Bench, begun: bool) -> None:
    ended = []

    async def noted() -> None:
        try:
            await for_ever()
        finally:
            ended.append(True)

    call, outcomes = bench.start(noted(), timeout_s=1.0)
    if begun:
        await rounds()
    call.cancel()
    assert [type(error) for _, error in outcomes] == [asyncio.CancelledError]
    await rounds()

    assert ended == [True] * begun
    assert len(outcomes) == 1
    assert bench.is_empty()


async def test_a_loop_that_is_closed_fails_what_waits_for_it_and_what_comes_later(bench: Bench) -> None:
    loop = asyncio.new_event_loop()
    _, waiting = bench.start(for_ever(), loop=loop)
    bench.clock.advance(4 * LOOK_S)
    assert waiting == []
    assert bench.calls.problems() == ["a call waits for an event loop that is not running"]
    loop.close()
    assert bench.calls.problems() == ["a call waits for an event loop that is closed"]
    bench.clock.advance(LOOK_S)
    _, later = bench.start(for_ever(), loop=loop)

    assert str(waiting[0][1]) == "the event loop it belongs to was closed before it was done"
    assert "takes no calls" in str(later[0][1])
    assert bench.is_empty()


async def test_a_loop_that_stands_still_fails_calls_that_said_so_after_their_time(bench: Bench) -> None:
    loop = asyncio.new_event_loop()
    for _ in range(2):
        _, patient = bench.start(for_ever(), loop=loop)
        _, outcomes = bench.start(for_ever(), loop=loop, stopped_s=2.0)
        bench.clock.advance(2.0 - LOOK_S)
        assert outcomes == []
        bench.clock.advance(LOOK_S)
        assert str(outcomes[0][1]) == "the event loop it belongs to is not running"
        assert patient == []
        for call in list(bench.calls._open):
            call.cancel()
        assert bench.is_empty()
    loop.call_soon(loop.stop)
    loop.close()


async def test_what_goes_on_with_an_outcome_and_fails_leaves_the_others_alone(bench: Bench) -> None:
    def fails(value: object, error: object) -> None:
        raise SystemExit(3)

    async def gives() -> int:
        return 1

    call = OnLoop(gives(), asyncio.get_running_loop(), bench.calls, "a call")
    call.start(fails)
    _, outcomes = bench.start(gives())
    await rounds()

    assert outcomes == [(1, None)]
    assert bench.is_empty()


async def test_many_calls_share_one_look(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    call_later = bench.clock.call_later

    def counted(delay_s: float, callback: Any) -> Any:
        timers.append(delay_s)
        return call_later(delay_s, callback)

    monkeypatch.setattr(bench.clock, "call_later", counted)
    started = [bench.start(for_ever(), timeout_s=100.0) for _ in range(50)]
    await rounds()
    assert timers == [LOOK_S]
    for number in range(2, 6):
        bench.clock.advance(LOOK_S)
        await rounds()
        assert timers == [LOOK_S] * number
    for call, _ in started:
        call.cancel()
    await rounds()
    assert bench.is_empty()
    assert timers == [LOOK_S] * 5
