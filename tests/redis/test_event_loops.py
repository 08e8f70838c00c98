"""An event loop reaches Redis without another thread: it sends, and waits for the socket itself."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from opening import INCREMENT, at_rest, open_at, owners_of
from reliability.living import InThread, until
from servers import Server, StartServer

from scopestate import Engine
from scopestate.errors import ConnectionLost, EngineClosed, StorageError
from scopestate.persistence.connections.watch import Watch
from scopestate.persistence.redis.connection import Connection
from scopestate.server.server import new_loop

Run = Callable[..., Any]
"""`on_loop` or `on_main_loop`."""
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, new_loop]


def on_loop(work: Callable[[], Coroutine[Any, Any, Any]], factory: Any = asyncio.new_event_loop) -> Any:
    """Run a coroutine on an event loop that is not the main thread's, as a server does."""

    def run() -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(work())

    return InThread(run).result()


def on_main_loop(work: Callable[[], Coroutine[Any, Any, Any]], factory: Any = asyncio.new_event_loop) -> Any:
    """Run a coroutine on the main thread's event loop, as most programs do."""
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())


async def send(engine: Engine) -> None:
    """Let a task send its command. Only when the engine is at rest: another thread tells a new server the scripts."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert owners_of(engine)[0]._under_way


on_each_thread = pytest.mark.parametrize("run", [on_loop, on_main_loop])


@on_each_thread
@pytest.mark.parametrize("factory", LOOPS, ids=["asyncio", "as the server has it"])
def test_one_task_after_another_needs_no_other_thread(valkey: Server, run: Run, factory: Any) -> None:
    with open_at(valkey.url) as other:
        other.set("s", "k", 4)
        other.update("s", "k", INCREMENT)
        other.get("s", "k")  # the server knows the scripts now
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)

        async def work() -> Any:
            for number in range(20):
                await engine.aio.set("s", "k", number)
                assert await engine.aio.get("s", "k") == number
                await engine.aio.update("t", "k", INCREMENT)
            return await engine.aio.get("t", "k")

        assert run(work, factory) == 20
        assert not any(owner._begun for owner in owners_of(engine))
        assert engine.stats().store["connects"] == 1


def test_many_tasks_of_the_main_thread_are_left_to_the_io_thread(valkey: Server) -> None:
    """There a signal handler may raise in the middle of what is done for other callers."""
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]
        led: list[Any] = []
        receive = owner._receive_for_task

        def received(watch: Any) -> bool:
            led.append(receive(watch))
            return bool(led[-1])

        owner._receive_for_task = received  # type: ignore[method-assign]

        async def work() -> None:
            await asyncio.gather(*(engine.aio.update("s", "k", INCREMENT) for _ in range(50)))
            assert len(led) <= 1
            done = 0
            while len(led) < 20:  # again by itself once the tasks have gone
                await engine.aio.update("s", "k", INCREMENT)
                done += 1
            assert await engine.aio.get("s", "k") == 50 + done

        asyncio.run(work())
        assert owner._begun


@pytest.mark.parametrize("factory", LOOPS, ids=["asyncio", "as the server has it"])
def test_tasks_of_two_loops_and_threads_get_their_own_answers(redis_server: Server, factory: Any) -> None:
    with open_at(redis_server.url, {"call_timeout_ms": 30_000}) as engine:
        rounds = 40

        def on_thread(which: int) -> None:
            for number in range(rounds):
                engine.set(f"s{which % 3}", f"t{which}", number)
                assert engine.get(f"s{which % 3}", f"t{which}") == number
                engine.update("s0", "counter", INCREMENT)

        async def in_task(which: int) -> None:
            for number in range(rounds):
                await engine.aio.set(f"s{which % 3}", f"a{which}", number)
                assert await engine.aio.get(f"s{which % 3}", f"a{which}") == number
                await engine.aio.update("s0", "counter", INCREMENT)

        async def tasks(first: int) -> None:
            await asyncio.gather(*(in_task(which) for which in range(first, first + 30)))

        engine.set("s0", "counter", 0)
        threads = [InThread(lambda which=which: on_thread(which)) for which in range(8)]  # type: ignore[misc]
        loops = [InThread(lambda first=first: on_loop(lambda: tasks(first), factory)) for first in (0, 30)]  # type: ignore[misc]
        for one in (*threads, *loops):
            one.result()

        assert engine.get("s0", "counter") == 68 * rounds
        at_rest(engine)


@on_each_thread
def test_a_server_that_does_not_answer_costs_the_loop_no_longer_than_a_thread(
    start_server: StartServer, run: Run
) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 20_000}, call_timeout_ms=2000) as engine:
        engine.set("s", "k", 0)

        async def work() -> type[BaseException | None]:
            await engine.aio.set("s", "k", 1)
            server.pause()
            with pytest.raises(StorageError) as caught:
                await engine.aio.set("s", "k", 2)
            server.resume()
            assert (await engine.aio.set("s", "other", 3)).created
            return type(caught.value.__cause__)

        assert run(work) is ConnectionLost


@on_each_thread
def test_a_loop_that_ends_while_it_waits_leaves_no_answer_to_the_next_caller(
    start_server: StartServer, run: Run
) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 20_000}, call_timeout_ms=20_000) as engine:
        engine.set("s", "k", "old")
        engine.set("t", "k", "theirs")
        engine.get("s", "k")
        at_rest(engine)

        async def work() -> None:
            await engine.aio.get("s", "k")
            server.pause()
            task = asyncio.create_task(engine.aio.set("s", "k", "new"))
            await send(engine)
            task.cancel()

        run(work)
        server.resume()
        assert engine.get("t", "k") == "theirs"
        assert engine.get("s", "k") == "new"
        assert engine.stats().store["connects"] == 1


@on_each_thread
def test_what_does_not_fit_into_the_socket_is_sent_by_the_io_thread(
    valkey: Server, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    send_now = Connection.send_now
    monkeypatch.setattr(Connection, "send_now", lambda self, data: send_now(self, data[:7]))
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)

        async def work() -> Any:
            for number in range(20):
                await engine.aio.set("s", "k", number)
            return await engine.aio.get("s", "k")

        assert run(work) == 19
        assert owners_of(engine)[0]._begun


def test_a_thread_that_comes_while_the_loop_waits_does_not_wait_for_the_loop(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 20_000}, call_timeout_ms=20_000) as engine:
        engine.set("s", "k", 0)
        at_rest(engine)
        blocked, go_on = threading.Event(), threading.Event()

        async def work() -> Any:
            await engine.aio.set("s", "k", 1)
            server.pause()
            task = asyncio.create_task(engine.aio.set("s", "k", 2))
            await send(engine)
            blocked.set()
            assert go_on.wait(30)  # the loop is busy with something else
            return await task

        loop = InThread(lambda: on_loop(work))
        assert blocked.wait(30)
        server.resume()
        assert engine.set("s", "k", 3).old_value == 2
        go_on.set()
        assert loop.result().old_value == 1


@on_each_thread
def test_closing_the_engine_lets_go_of_the_loop_s_descriptor(start_server: StartServer, run: Run) -> None:
    server = start_server()
    engine = open_at(server.url, {"close_grace_ms": 1}, call_timeout_ms=20_000)
    engine.set("s", "k", 0)
    at_rest(engine)

    async def work() -> None:
        await engine.aio.set("s", "k", 1)
        server.pause()
        late = asyncio.create_task(engine.aio.set("s", "k", 2))
        await send(engine)
        watch = owners_of(engine)[0]._watch
        assert watch is not None
        assert watch.active
        fd = watch._fd
        os.fstat(fd)
        await asyncio.to_thread(engine.close)
        with pytest.raises((StorageError, EngineClosed)):
            await late
        await asyncio.sleep(0)
        assert not watch.active
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    try:
        run(work)
    finally:
        engine.close()


@on_each_thread
def test_a_connection_that_the_server_has_closed_is_made_anew(start_server: StartServer, run: Run) -> None:
    server = start_server()
    with open_at(server.url) as engine:
        engine.set("s", "k", 0)

        async def work() -> Any:
            await engine.aio.set("s", "k", 1)
            server.ask("CLIENT", "KILL", "TYPE", "normal")
            return await engine.aio.get("s", "k")

        assert run(work) == 1
        until(lambda: engine.stats().store["connects"] == 2, "the connection is not made anew")


@on_each_thread
def test_events_of_a_loop_s_writes_come_in_order(valkey: Server, run: Run) -> None:
    with open_at(valkey.url) as engine:
        heard: list[Any] = []

        @engine.on_change(scope="s")
        def hear(event: Any) -> None:
            heard.append(event.new_value)

        async def work(engine: Engine) -> None:
            for number in range(100):
                await engine.aio.set("s", "k", number)

        run(lambda: work(engine))
        engine.drain(60)
        assert heard == list(range(100))


class _GivenBackAtOnce(dict[str, Any]):
    """A claim whose holder gives it back between the attempt to take it and the next look at it."""

    def setdefault(self, key: str, value: Any) -> Any:  # type: ignore[override]  # as the owner calls it
        return object()


def test_replies_that_the_loop_leaves_to_another_thread_are_taken(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url) as engine:
        engine.set("s", "k", 0)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]

        async def work() -> None:
            await engine.aio.set("s", "k", 1)
            for leave in (leave_to_a_holder_that_has_gone, lambda: owner.passivate(lambda: True)):
                server.pause()
                written = asyncio.ensure_future(engine.aio.set("s", "k", 2))
                while not owner._under_way:  # noqa: ASYNC110 - another thread may have the claim still
                    await asyncio.sleep(0)
                leave()
                server.resume()
                await asyncio.wait_for(written, 20)

        def leave_to_a_holder_that_has_gone() -> None:
            claim, owner._claim = owner._claim, _GivenBackAtOnce()
            owner._drive(owner._watch)
            owner._claim = claim
            assert not owner._watch.active
            # The rest of this round is the other thread's: it has the watch as it is now.

        on_loop(work)


def test_a_call_of_a_thread_does_not_wait_for_a_loop_that_may_end(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 60_000}, call_timeout_ms=60_000) as engine:
        engine.set("s", "k", 0)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]
        threads: list[InThread[Any]] = []

        async def work() -> None:
            await engine.aio.set("s", "k", 1)
            owner._claim["holder"] = owner._watch  # so that the thread has to post its call
            threads.append(InThread(lambda: engine.set("t", "k", 2)))
            until(lambda: bool(owner._inbox), "the call is posted")
            server.pause()
            del owner._claim["holder"]
            owner._drive(owner._watch)

        on_loop(work)
        server.resume()
        assert threads[0].result().created


def test_an_update_that_is_cancelled_while_it_reads_writes_nothing(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        engine.update("s", "k", INCREMENT)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]
        tasks: list[asyncio.Task[Any]] = []
        receive = owner._receive_for_task

        def cancel_first(watch: Any) -> bool:
            tasks[0].cancel()
            return receive(watch)

        async def work() -> None:
            await engine.aio.get("s", "k")
            owner._receive_for_task = cancel_first  # type: ignore[method-assign]
            tasks.append(asyncio.create_task(engine.aio.update("s", "new", INCREMENT)))
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            del owner._receive_for_task

        asyncio.run(work())
        assert engine.get("s", "new") is None
        at_rest(engine)


def test_a_loop_that_moves_to_the_main_thread_leads_there(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]
        loop = asyncio.new_event_loop()
        try:
            InThread(lambda: loop.run_until_complete(engine.aio.set("s", "k", 1))).result()
            assert owner._watch is not None
            before = owner._watch.thread
            while owner._watch.thread == before:  # the I/O thread may still be ending its work
                assert loop.run_until_complete(engine.aio.get("s", "k")) == 1
            assert owner._watch.thread == threading.get_ident()
        finally:
            loop.close()


def test_a_loop_that_loses_the_connection_to_another_one_posts(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another loop may take its place as the one that waits for the connection before its own call is sent."""
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)
        on_loop(lambda: engine.aio.get("s", "k"))
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]
        theirs = owner._watch
        assert theirs is not None
        end, start = Watch.end, Watch.start
        strangers: list[Watch] = []

        def started(watch: Watch, *arguments: Any) -> None:
            if watch.thread != threading.get_ident():
                strangers.append(watch)
            start(watch, *arguments)

        def come_in_between(watch: Watch) -> None:
            end(watch)
            owner._watch = theirs

        async def work() -> None:
            owner._to_post = 0
            monkeypatch.setattr(Watch, "end", come_in_between)
            monkeypatch.setattr(Watch, "start", started)
            assert (await engine.aio.set("s", "k", 1)).new_value == 1
            monkeypatch.undo()

        asyncio.run(work())
        assert not strangers
        at_rest(engine)


@on_each_thread
def test_a_loop_that_ends_before_the_reply_keeps_no_event_back(start_server: StartServer, run: Run) -> None:
    server = start_server()
    with open_at(server.url) as engine:
        engine.set("s", "k", 0)
        at_rest(engine)
        heard: list[Any] = []

        @engine.on_change(scope="s")
        def hear(event: Any) -> None:
            heard.append(event.new_value)

        async def work(engine: Engine) -> None:
            await engine.aio.set("s", "k", 1)
            server.pause()
            task = asyncio.create_task(engine.aio.set("s", "k", 2))
            await send(engine)
            task.cancel()

        run(lambda: work(engine))
        server.resume()
        until(lambda: heard == [1, 2], "the event does not come")


def test_a_check_that_was_interrupted_is_arranged_again(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    check, is_lost = Watch._check, threading.Event()

    def lose_the_first(watch: Watch, *arguments: Any) -> None:
        if is_lost.is_set():
            check(watch, *arguments)
        is_lost.set()

    monkeypatch.setattr(Watch, "_check", lose_the_first)
    with open_at(server.url, {"call_timeout_ms": 60_000}, call_timeout_ms=2000) as engine:
        engine.set("s", "k", 0)
        (owner,) = [owner for owner in owners_of(engine) if owner._connection is not None]

        async def work() -> None:
            await engine.aio.set("s", "k", 1)
            while not is_lost.is_set():  # noqa: ASYNC110 - a timer of the loop
                await asyncio.sleep(0)
            assert owner._watch is not None
            owner._watch._due -= 10  # some time later
            server.pause()
            with pytest.raises(StorageError):
                await asyncio.wait_for(engine.aio.set("s", "k", 2), 20)
            server.resume()

        asyncio.run(work())
