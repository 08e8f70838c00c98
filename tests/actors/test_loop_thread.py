"""The engine's own event loop: one at a time, ended whole, and nothing kept of those before it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator

import pytest

from scopestate.actors.loops import LoopThread

PATIENCE_S = 60.0
NAME = "scopestate-test-loop"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture
def loops() -> Iterator[LoopThread]:
    thread = LoopThread(NAME)
    yield thread
    thread.close()
    for left in threads():
        left.join(PATIENCE_S)
    assert threads() == []


async def current() -> str:
    return threading.current_thread().name


def test_there_is_one_loop_until_it_ends_and_a_new_one_afterwards(loops: LoopThread) -> None:
    known: list[asyncio.AbstractEventLoop] = []
    for _ in range(3):
        loop = loops.get()
        assert loops.get() is loop
        assert loop not in known
        known.append(loop)
        assert len(threads()) == 1
        assert asyncio.run_coroutine_threadsafe(current(), loop).result(PATIENCE_S) == NAME
        loops.close()
        loops.close()
        assert loop.is_closed()
        assert threads() == []
        assert loops._ending == set()


def test_threads_that_ask_at_the_same_time_get_one_loop(loops: LoopThread) -> None:
    at_once = threading.Barrier(8)

    def ask() -> asyncio.AbstractEventLoop:
        at_once.wait(PATIENCE_S)
        return loops.get()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = {future.result(PATIENCE_S) for future in [pool.submit(ask) for _ in range(8)]}

    assert len(got) == len(threads()) == 1


def test_a_loop_is_replaced_if_it_is_the_one_in_use_and_what_ran_there_is_cancelled(loops: LoopThread) -> None:
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    first = loops.get()
    running = asyncio.run_coroutine_threadsafe(endless(), first)
    asyncio.run_coroutine_threadsafe(current(), first).result(PATIENCE_S)
    (thread,) = threads()
    loops.replace(first)
    thread.join(PATIENCE_S)
    assert ended.is_set()
    with pytest.raises(concurrent.futures.CancelledError):
        running.result(PATIENCE_S)
    assert first.is_closed()
    assert loops._ending == set()

    second = loops.get()
    assert second is not first
    loops.replace(first)
    assert loops.get() is second
    assert asyncio.run_coroutine_threadsafe(current(), second).result(PATIENCE_S) == NAME


def test_what_stops_the_loop_or_exits_on_it_does_not_end_it(loops: LoopThread) -> None:
    loop = loops.get()
    for _ in range(3):
        loop.call_soon_threadsafe(loop.stop)
        exits = loop.call_soon_threadsafe(exit_now)
        assert asyncio.run_coroutine_threadsafe(current(), loop).result(PATIENCE_S) == NAME
        assert not exits.cancelled()
        assert loops.get() is loop


def exit_now() -> None:
    raise SystemExit(3)


def test_a_loop_that_the_program_has_closed_is_replaced_at_the_next_use(loops: LoopThread) -> None:
    loop = loops.get()
    (thread,) = threads()
    loops._end(loop)
    thread.join(PATIENCE_S)
    assert loop.is_closed()

    assert loops.get() is not loop
    assert asyncio.run_coroutine_threadsafe(current(), loops.get()).result(PATIENCE_S) == NAME
