"""Whatever a caller does during a call to Redis, the state stays whole and the next call gets its own answer."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from opening import INCREMENT, at_rest, open_at, owners_of, start_child
from reliability.living import InThread, Seen, until
from servers import Server, StartServer

from scopestate import Engine, StateEvent, messages
from scopestate.errors import (
    ConnectionLost,
    EngineClosed,
    Overloaded,
    ReplyTimeout,
    ScopestateError,
    StorageError,
    ValueTooLarge,
)
from scopestate.ops import turns
from scopestate.persistence.connections import owner as connection_owner
from scopestate.persistence.connections.owner import arm
from scopestate.persistence.redis import commands as redis_commands
from scopestate.persistence.redis.calls import Call
from scopestate.signals import wait_for

LIMITS = {"call_timeout_ms": 10_000}


# --------------------------------------------------------------------------------------------------- cancelled and late


def test_cancelled_tasks_leave_the_others_their_own_answers(redis_server: Server) -> None:
    async def work() -> None:
        engine = open_at(redis_server.url, LIMITS)
        draw = random.Random(3)

        async def one(which: int) -> int:
            done = 0
            for _ in range(60):
                number = draw.randrange(10**6)
                await engine.aio.set("s", f"k{which}", number)
                assert await engine.aio.get("s", f"k{which}") == number
                await engine.aio.update("s", "counter", INCREMENT)
                done += 1
            return done

        async def cut_short(which: int) -> int:
            begun = 0
            for _ in range(60):
                task = asyncio.create_task(engine.aio.update("s", "counter", INCREMENT))
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
                begun += 1
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    continue
            return begun

        *whole, cut = await asyncio.gather(*(one(which) for which in range(5)), cut_short(9))
        counter = await engine.aio.get("s", "counter")
        assert sum(whole) == 300
        assert 300 <= counter <= 300 + cut
        await engine.aio.close()

    asyncio.run(work())


def test_a_call_that_its_caller_gives_up_is_taken_in_later_and_the_scope_goes_on(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, call_timeout_ms=20_000) as engine:
        engine.set("s", "k", 0)
        server.pause()
        engine._parts.limits.call_timeout_s = 0.1
        for _ in range(2):  # at the connection, and behind it
            with pytest.raises(ReplyTimeout, match="may still be applied"):
                engine.update("s", "k", INCREMENT)
        engine._parts.limits.call_timeout_s = 20.0
        server.resume()

        at_rest(engine)
        # The first one was sent; the second may have been.
        found = engine.get("s", "k")
        assert found in (1, 2)
        assert engine.update("s", "k", INCREMENT).new_value == found + 1
        assert engine.stats().store["connects"] == 1


def test_a_reply_that_comes_while_its_caller_gives_up_leaves_the_scope_free(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()

    def late(wait: Callable[[float], bool | None], timeout_s: float | None = None) -> bool:
        """The time is over, and the reply comes before the caller says that it has given up."""
        monkeypatch.setattr(connection_owner, "wait_for", wait_for)
        assert not wait_for(wait, timeout_s)
        server.resume()
        at_rest(engine)
        return False

    with open_at(server.url, call_timeout_ms=20_000) as engine:
        engine.set("t", "k", 0)
        engine.ask(messages.Get("t", "k"), block=False).get(timeout=20)  # the I/O thread is there
        engine.set("s", "k", 0)
        server.pause()
        held = engine.ask(messages.Set("t", "k", 1), block=False)  # so that the next call has to queue
        until(lambda: owners_of(engine)[0].load() > 0, "nothing is on its way")
        monkeypatch.setattr(connection_owner, "wait_for", late)
        engine._parts.limits.call_timeout_s = 0.1
        with pytest.raises(ReplyTimeout):
            engine.set("s", "k", 1)
        engine._parts.limits.call_timeout_s = 20.0
        held.get(timeout=20)
        at_rest(engine)
        assert engine.set("s", "k", 2).old_value == 1


# -------------------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("state", ["running", "stopped", "down"])
def test_close_while_calls_are_under_way_ends_in_time_and_answers_everybody(
    start_server: StartServer, state: str
) -> None:
    """With limits that are longer than any test waits: only `close` can end the calls."""
    hour_ms = 3_600_000
    server = start_server()
    limits = {"call_timeout_ms": hour_ms, "close_grace_ms": 200}
    engine = open_at(server.url, limits, call_timeout_ms=hour_ms, connect_wait_ms=hour_ms)
    for scope in range(8):
        engine.set(f"s{scope}", "k", 0)
    outcomes: list[set[str]] = [set() for _ in range(16)]
    begun = threading.Barrier(17)

    def work(which: int) -> None:
        begun.wait(30)
        while True:
            try:
                if which % 2:
                    engine.update(f"s{which % 8}", "k", INCREMENT)
                else:
                    engine.list(f"s{which % 8}")
            except EngineClosed:
                return
            except StorageError as error:
                cause: Any = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                outcomes[which].add(str(cause))

    threads = [InThread(lambda which=which: work(which)) for which in range(16)]  # type: ignore[misc]
    begun.wait(30)
    if state == "stopped":
        server.pause()
    elif state == "down":
        server.kill()
    until(lambda: any(owner.load() for owner in owners_of(engine)), "no call is under way")

    InThread(engine.close).result()

    for thread in threads:
        thread.result()
    with pytest.raises(EngineClosed):
        engine.set("s", "k", 1)


def test_what_is_posted_after_the_io_thread_ended_while_it_wanted_the_claim_is_refused(valkey: Server) -> None:
    engine = open_at(valkey.url)
    try:
        engine.set("s", "k", 0)
        engine.ask(messages.Get("s", "k"), block=False).get(timeout=20)  # the I/O thread is there
        owner, scope = owners_of(engine)[0], engine._scopes["s"]
        at_rest(engine)
        owner._claim["holder"] = types.SimpleNamespace(thread=0)
        owner._ask()
        until(lambda: owner._wanted, "the I/O thread does not want the claim")
        closing = InThread(engine.close)
        until(lambda: not owner._thread["thread"].is_alive(), "the I/O thread does not end")
        del owner._claim["holder"]
        closing.result()

        call = Call(turns.Get("k"), None, 0)
        lock = arm(call)
        scope.mailbox.append(call)
        owner.post(scope)

        assert lock.acquire(timeout=20), "its caller waits for ever"
        assert type(call.error.__cause__ or call.error) is EngineClosed
    finally:
        engine.close()


def test_close_does_not_leave_an_update_in_its_pause(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_commands, "_PAUSE_S", (3600.0, 3600.0))
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    engine = open_at(valkey.url, {"close_grace_ms": 50})
    engine.update("s", "k", INCREMENT)
    valkey.client().hset("state:s", "k", "10")
    waiting = engine.ask(messages.Update("s", "k", INCREMENT), block=False)
    until(lambda: engine.stats().store["update_conflicts"] > 0, "no conflict")
    engine.close()
    try:
        assert waiting.get(timeout=20).new_value == 11
    except (EngineClosed, StorageError) as error:
        # The engine was closed while the update was on its way, or before.
        assert isinstance(error, EngineClosed) or type(error.__cause__) is ConnectionLost  # noqa: PT017


def test_closing_does_not_wait_for_connections_that_are_being_made(start_server: StartServer) -> None:
    server = start_server()
    limits = {"close_grace_ms": 100}
    engine = open_at(server.url, limits, call_timeout_ms=2000, connect_timeout_ms=60_000, connect_wait_ms=60_000)
    engine.set("s", "k", 0)
    server.pause()

    def ask(scope: str) -> str:
        try:
            engine.list(scope)
        except ScopestateError as error:
            return type(error).__name__
        return "answered"

    threads = [InThread(lambda scope=f"s{number}": ask(scope)) for number in range(14)]  # type: ignore[misc]
    owners = owners_of(engine)
    until(lambda: sum(owner.load() > 0 for owner in owners) >= 4, "not many connections are wanted")
    began = time.monotonic()
    engine.close()

    assert time.monotonic() - began < 30  # a connection would take twice as long to fail
    assert {thread.result() for thread in threads} <= {"StorageError", "EngineClosed"}


def test_an_engine_may_be_closed_from_a_handler_of_its_own_event(valkey: Server) -> None:
    engine = open_at(valkey.url)
    closed = threading.Event()

    @engine.on_change(scope="s")
    def hear(event: StateEvent) -> None:
        engine.close()
        closed.set()

    engine.set("s", "k", 1)
    assert closed.wait(30)
    until(lambda: engine.closed, "the engine does not close")


# ------------------------------------------------------------------------------------------- processes and many engines


@pytest.mark.timeout(300)  # seconds on an idle machine
def test_a_forked_child_is_refused_and_its_parent_goes_on(redis_server: Server) -> None:
    child = start_child("fork", redis_server.url)
    output, _ = child.communicate(timeout=250)
    assert child.returncode == 0
    *children, parent = [json.loads(line) for line in output.splitlines()]
    assert [facts["answers"] for facts in children] == [[*["EngineForked"] * 3, str(number)] for number in range(6)]
    assert parent["statuses"] == [0] * 6
    assert parent["values"] == parent["counts"]
    assert min(parent["counts"]) > 0
    # Nothing that a child did, its end included, has cost the parent a connection.
    assert parent["connects"] == 1


@pytest.mark.timeout(300)
def test_engines_that_nobody_closes_lose_nothing_and_do_not_keep_the_process(redis_server: Server) -> None:
    child = start_child("dropper", redis_server.url, 10)
    output, _ = child.communicate(timeout=250)
    assert child.returncode == 0, output
    assert redis_server.ask("HGET", "state:s", "k") == "10"


def test_two_engines_of_one_process_share_what_they_write_and_nothing_else(valkey: Server) -> None:
    with open_at(valkey.url) as first, open_at(valkey.url) as second:
        seen = Seen()
        second.register_function("watch", seen)
        second.register_trigger(function_id="watch", scope="s")

        def count(engine: Engine) -> None:
            for _ in range(200):
                engine.update("s", "k", INCREMENT)

        threads = [InThread(lambda engine=engine: count(engine)) for engine in (first, second)]  # type: ignore[misc]
        for thread in threads:
            thread.result()

        assert first.get("s", "k") == second.get("s", "k") == 400
        events = seen.wait_for(200)  # its own
        revisions = [event.revision for event in events]
        assert revisions == sorted(set(revisions))
        first.close()
        assert second.set("s", "k", 1).old_value == 400


# --------------------------------------------------------------------------------------------------------------- limits


def test_a_scope_that_leaves_memory_and_returns_gives_no_event_number_twice(valkey: Server) -> None:
    with open_at(valkey.url, {"passivate_after_ms": 30}) as engine:
        seen = Seen()
        engine.register_function("watch", seen)
        engine.register_trigger(function_id="watch")
        for number in range(4):
            engine.set("s", "k", number)
            engine.update("s", "k", INCREMENT)
            until(lambda: "s" not in engine._scopes, "the scope stays in memory")

        events = seen.wait_for(8)
        sequences = [event.revision for event in events]
        assert sequences == sorted(set(sequences))
        assert [(event.old_value, event.new_value) for event in events[2:4]] == [(1, 1), (1, 2)]


def test_callers_of_a_scope_that_keeps_leaving_lose_nothing(valkey: Server) -> None:
    with open_at(valkey.url, {"passivate_after_ms": 1}) as engine:
        over = threading.Event()

        def count() -> int:
            done = 0
            while not over.is_set():
                engine.update("s", "k", INCREMENT)
                done += 1
                over.wait(draw.randrange(30) / 1e4)
            return done

        draw = random.Random(1)
        threads = [InThread(count) for _ in range(4)]
        first = engine._scopes["s"]
        until(lambda: engine._scopes.get("s", first) is not first, "the scope never leaves")
        over.set()
        assert engine.get("s", "k") == sum(thread.result() for thread in threads)


def test_a_full_mailbox_refuses_and_nothing_that_was_refused_is_written(start_server: StartServer) -> None:
    server = start_server()

    async def work() -> None:
        engine = open_at(server.url, {"scope_mailbox": 10}, call_timeout_ms=20_000)
        async with engine.aio:
            await engine.aio.set("s", "k", 0)
            server.pause()
            tasks = [asyncio.create_task(engine.aio.update("s", "k", INCREMENT)) for _ in range(50)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            server.resume()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [result for result in results if isinstance(result, Overloaded)]
            written = [result for result in results if not isinstance(result, BaseException)]
            assert len(refused) + len(written) == 50
            assert 1 <= len(written) <= 20  # at most ten on their way, and ten behind them
            assert await engine.aio.get("s", "k") == len(written)
            assert engine.stats().refused == len(refused)

    asyncio.run(work())


def test_a_value_over_the_limit_is_refused_before_anything_is_sent(valkey: Server) -> None:
    with open_at(valkey.url, {"max_value_bytes": 100}) as engine:
        engine.set("s", "k", "x" * 98)
        with pytest.raises(ValueTooLarge, match="nothing was written"):
            engine.set("s", "k", "x" * 99)
        with pytest.raises(ValueTooLarge, match="nothing was written"):
            engine.update("s", "k", [{"type": "set", "path": "", "value": "y" * 99}])
        assert engine.get("s", "k") == "x" * 98


def test_handlers_that_call_the_engine_are_heard_by_others_in_order(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        seen = Seen()

        @engine.on_change(scope="s", key="in")
        def double(event: StateEvent) -> None:
            assert engine.get("s", "in") >= event.new_value
            engine.set("s", "out", event.new_value * 2)
            engine.update("counts", "heard", INCREMENT)
            engine.list("s")

        engine.register_function("watch", seen)
        engine.register_trigger(function_id="watch", scope="s", key="out")
        for number in range(50):
            engine.set("s", "in", number)

        assert [event.new_value for event in seen.wait_for(50)] == [number * 2 for number in range(50)]
        engine.drain(60)
        assert engine.get("counts", "heard") == 50
        assert {event.depth for event in seen.events} == {1}


def test_writers_wait_for_a_handler_that_is_full_and_their_writes_are_not_lost(valkey: Server) -> None:
    with open_at(valkey.url, {"handler_mailbox": 2, "handler_when_full": "block"}) as engine:
        gate, heard = threading.Event(), []

        @engine.on_change(scope="s")
        def hear(event: StateEvent) -> None:
            gate.wait(20)
            heard.append(event.new_value)

        writing = InThread(lambda: [engine.set("s", "k", number) for number in range(30)])
        until(lambda: engine.stats().blocked > 0, "nobody waits for the handler")
        assert writing.thread.is_alive()
        gate.set()
        writing.result()
        engine.drain(60)

        assert heard == list(range(30))


# ---------------------------------------------------------------------------------------------------------- many of all


def test_sixty_four_threads_and_as_many_tasks_get_their_own_answers(redis_server: Server) -> None:
    with open_at(redis_server.url, {"call_timeout_ms": 30_000}) as engine:
        rounds = 12

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

        async def tasks() -> None:
            await asyncio.gather(*(in_task(which) for which in range(64)))

        threads = [InThread(lambda which=which: on_thread(which)) for which in range(64)]  # type: ignore[misc]
        asyncio.run(tasks())
        for thread in threads:
            thread.result()

        assert engine.get("s0", "counter") == 128 * rounds
        at_rest(engine)
