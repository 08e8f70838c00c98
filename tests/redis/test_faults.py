"""A server that stops, refuses, forgets scripts, cuts connections: each call ends well, or says why not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from opening import INCREMENT, open_at, owners_of
from reliability.living import InThread, until
from servers import Binary, Server, StartServer

from scopestate import Engine, messages
from scopestate.errors import ConnectionLost, NotConnected, StorageError
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis import making as redis_making
from scopestate.persistence.redis.connection import Connection

QUICK = {"call_timeout_ms": 200, "connect_timeout_ms": 200, "connect_wait_ms": 200}


def failure_of(work: Callable[[], Any]) -> str:
    with pytest.raises(StorageError) as caught:
        work()
    assert type(caught.value) is StorageError
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- stopped


def test_a_call_to_a_server_that_does_not_answer_ends_in_time_and_the_engine_recovers(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)
    with open_at(server.url, **QUICK) as engine:
        until(lambda: _set(engine, 0), "the first call is not answered in time")
        server.pause()
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer within 0\.2 s") as caught:
            engine.set("s", "k", 1)
        assert caught.value.code == "SET_ERROR"
        assert type(caught.value.__cause__) is ConnectionLost
        with pytest.raises(StorageError, match="nothing was sent") as caught:
            engine.set("s", "k", 2)
        assert type(caught.value.__cause__) is NotConnected
        assert time.monotonic() - began < 20
        server.resume()

        until(lambda: server.ask("HGET", "state:s", "k") == "1", "the write that was waiting")
        until(lambda: _set(engine, 3), "the engine does not recover")
        assert engine.get("s", "k") == 3


def test_the_cause_of_a_read_that_failed_says_if_it_was_sent(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    with open_at(server.url, **QUICK) as engine:
        reads = {
            "get": lambda: engine.get("s", "k"),
            "list": lambda: engine.list("s"),
            "list_groups": engine.list_groups,
        }
        for read in reads.values():
            read()

        errors = {}
        for name, read in list(reads.items())[:2]:
            until(lambda read=read: _answers(read), "there is no connection")  # type: ignore[misc]
            server.pause()
            errors[name] = _error_of(read)
            server.resume()
        with monkeypatch.context() as patched:
            patched.setattr("scopestate.persistence.redis.connection.Connection.call", _no_answer)
            errors["list_groups"] = _error_of(engine.list_groups)
        for name, error in errors.items():
            assert type(error.__cause__) is ConnectionLost, name
            assert f"was lost during state::{name} (" in str(error)
            assert str(error).endswith("; nothing was changed")

        server.kill()
        for read in reads.values():
            read_error = _error_of(read)
            if "was lost" in str(read_error):  # it had a connection, and has none now
                read_error = _error_of(read)
            assert type(read_error.__cause__) is NotConnected
            assert "may have been applied" not in str(read_error)


def _answers(work: Callable[[], Any]) -> bool:
    try:
        work()
    except StorageError:
        return False
    return True


def _error_of(work: Callable[[], Any]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        work()
    return caught.value


def _no_answer(connection: Connection, *parts: Any) -> Any:
    connection.close()
    raise Broken(f"no answer to {parts[0]}")


def test_an_answer_does_not_wait_for_the_next_connection(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, connect_timeout_ms=20_000) as engine:
        engine.set("s", "k", 0)
        engine.set("t", "k", 0)
        server.pause()
        (owner, *_) = owners_of(engine)
        lost = engine.ask(messages.Set("s", "k", 1), block=False)
        until(lambda: owner._under_way, "a command on its way")
        waiting = engine.ask(messages.Set("t", "k", 1), block=False)
        assert owner._connection is not None
        owner._connection.shut()
        with pytest.raises(StorageError, match="a write may have been applied"):
            lost.get(timeout=30)
        assert not waiting.done
        server.resume()
        assert waiting.get(timeout=20).new_value == 1


def _set(engine: Engine, value: int, scope: str = "s", key: str = "k") -> bool:
    try:
        engine.set(scope, key, value)
    except StorageError:
        return False
    return True


def test_a_late_reply_is_never_taken_for_that_of_another_call(start_server: StartServer) -> None:
    server = start_server()
    options = {"call_timeout_ms": 40, "connect_timeout_ms": 150, "connect_wait_ms": 100}
    with open_at(server.url, **options) as engine:
        for which in range(8):
            until(lambda which=which: _set(engine, which, f"s{which % 3}", f"k{which}"), "no answer in time")  # type: ignore[misc]
        over = threading.Event()
        failed = threading.Event()
        answered: set[int] = set()

        def ask(which: int) -> None:
            while not over.is_set():
                try:
                    assert engine.get(f"s{which % 3}", f"k{which}") == which
                    answered.add(which)
                except StorageError:
                    failed.set()

        threads = [InThread(lambda which=which: ask(which)) for which in range(8)]  # type: ignore[misc]
        for _ in range(8):
            answered.clear()
            until(lambda: len(answered) == 8 or not all(thread.thread.is_alive() for thread in threads), "no answer")
            failed.clear()
            server.pause()
            assert failed.wait(30)
            server.resume()
        over.set()
        for thread in threads:
            thread.result()


def test_event_loops_turn_and_the_processor_rests_while_the_server_is_stopped(start_server: StartServer) -> None:
    server = start_server()

    async def work() -> None:
        engine = open_at(server.url, call_timeout_ms=2000, connect_timeout_ms=1000, connect_wait_ms=1000)
        await engine.aio.set("s", "k", 0)
        ticks = beats = 0
        over = threading.Event()

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        def beat() -> None:  # as often, on a thread: a machine that stops for a second stops both
            nonlocal beats
            while not over.wait(0.01):
                beats += 1

        ticking = asyncio.create_task(tick())
        beating = InThread(beat)
        server.pause()
        began, used = time.monotonic(), time.process_time()
        calls = [engine.aio.set(f"s{number % 5}", "k", number) for number in range(20)]
        calls += [engine.aio.list(f"s{number % 5}") for number in range(5)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        used, took = time.process_time() - used, time.monotonic() - began
        over.set()
        beating.result()
        server.resume()
        ticking.cancel()
        assert {type(outcome) for outcome in outcomes} == {StorageError}
        assert took > 1.9  # it was two seconds or more
        assert ticks > 0.5 * beats
        assert used < 0.5 * took
        await engine.aio.close()

    asyncio.run(work())


def test_the_processor_rests_while_the_server_is_down(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, connect_wait_ms=1500) as engine:
        engine.set("s", "k", 0)
        server.kill()
        began, used = time.monotonic(), time.process_time()
        assert "nothing was sent" in failure_of(lambda: engine.set("s", "k", 1))
        assert time.monotonic() - began >= 1.4
        assert time.process_time() - used < 0.3


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_server_without_memory_refuses_writes_and_reads_and_deletes_go_on(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)
    with open_at(server.url) as engine:
        engine.set("s", "k", 1)
        engine.set("s", "other", 2)
        server.ask("CONFIG", "SET", "maxmemory", 1)
        for write in (lambda: engine.set("s", "k", 2), lambda: engine.update("s", "k", INCREMENT)):
            problem = failure_of(write)
            assert "no memory left" in problem
            assert "nothing was written" in problem
        assert engine.get("s", "k") == 1
        assert engine.list("s") == [1, 2]
        assert engine.delete("s", "other") == 2
        server.ask("CONFIG", "SET", "maxmemory", 0)
        assert engine.update("s", "k", INCREMENT).new_value == 2


def test_a_batch_that_a_server_without_memory_refuses_is_not_half_done(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)

    async def work() -> None:
        engine = open_at(server.url)
        await asyncio.gather(*(engine.aio.set("s", f"k{number}", number) for number in range(20)))
        server.ask("CONFIG", "SET", "maxmemory", 1)
        calls = [engine.aio.set("s", f"k{number}", -1) for number in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        values = await engine.aio.list("s")
        for number, outcome in enumerate(outcomes):
            expected = number if isinstance(outcome, StorageError) else -1
            assert server.ask("HGET", "state:s", f"k{number}") == str(expected)
        assert len(values) == 20
        assert any(isinstance(outcome, StorageError) for outcome in outcomes)
        await engine.aio.close()

    asyncio.run(work())


def test_a_replica_refuses_writes_and_says_what_it_is(server_binary: Binary, start_server: StartServer) -> None:
    primary = start_server(server_binary)
    primary.ask("HSET", "state:s", "k", "1")
    replica = start_server(server_binary, replica_of=primary)
    with open_at(replica.url) as engine:
        problem = failure_of(lambda: engine.set("s", "k", 2))
        assert "read-only replica" in problem
        assert "nothing was written" in problem
        assert engine.get("s", "k") == 1


def test_a_call_waits_for_a_script_of_somebody_else_and_is_done_once(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary, extra=["lua-time-limit 5"])
    with open_at(server.url, call_timeout_ms=20_000) as engine:
        engine.set("s", "k", 0)
        busy = InThread(lambda: _endless_script(server))
        until(lambda: _is_busy(server), "the script does not run")
        calls = [InThread(lambda: engine.update("s", "k", INCREMENT)) for _ in range(3)]
        until(lambda: bool(owners_of(engine)[0]._later), "no call was refused")
        server.client().script_kill()
        busy.result()

        assert sorted(call.result().new_value for call in calls) == [1, 2, 3]
        assert engine.stats().store["connects"] == 1


def test_a_script_that_never_ends_fails_calls_in_time_with_nothing_written(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary, extra=["lua-time-limit 5"])
    with open_at(server.url, call_timeout_ms=2000) as engine:
        engine.set("s", "k", 0)
        busy = InThread(lambda: _endless_script(server))
        until(lambda: _is_busy(server), "the script does not run")
        problem = failure_of(lambda: engine.set("s", "k", 1))
        assert "was not ready for it within call_timeout_ms" in problem
        assert "nothing was written" in problem
        server.client().script_kill()
        busy.result()
        assert engine.get("s", "k") == 0


def test_a_call_that_waits_for_a_script_waits_for_the_server_too_if_that_dies(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary, extra=["lua-time-limit 5"])

    async def work() -> None:
        engine = open_at(server.url, call_timeout_ms=20_000, connect_wait_ms=20_000)
        await engine.aio.set("s", "k", 0)
        busy = InThread(lambda: _endless_script(server, match="."))
        until(lambda: _is_busy(server), "the script does not run")
        # More than one at a time, so that the connection's thread sends them.
        calls = [asyncio.create_task(engine.aio.set(f"s{number}", "k", number)) for number in range(3)]
        owner = owners_of(engine)[0]
        await asyncio.to_thread(until, lambda: len(owner._later) == 3, "not every call was refused")
        server.kill()
        busy.result()
        until(lambda: owner.why_not is not None, "it does not try to connect")
        server.start()

        assert [(await call).old_value for call in calls] == [None] * 3
        await engine.aio.close()

    asyncio.run(work())


def test_calls_wait_for_a_server_that_still_loads_its_data(server_binary: Binary, start_server: StartServer) -> None:
    slowly = ["key-load-delay 500", "loading-process-events-interval-bytes 1024"]
    server = start_server(server_binary, extra=slowly)
    server.client().mset({f"filler-{number}": "x" * 100 for number in range(1000)})
    server.ask("HSET", "state:s", "k", "1")
    server.ask("SAVE")
    with open_at(server.url, call_timeout_ms=20_000, connect_wait_ms=20_000) as engine:
        assert engine.get("s", "k") == 1
        server.kill()
        starting = InThread(server.start)
        assert engine.update("s", "k", INCREMENT).new_value == 2
        starting.result()
        assert "errorstat_LOADING" in str(server.client().execute_command("INFO", "errorstats"))


def _endless_script(server: Server, match: str = "killed") -> None:
    with pytest.raises(redis.RedisError, match=match):
        server.client().eval("while true do end", 0)


def _is_busy(server: Server) -> bool:
    try:
        server.client(socket_timeout=0.2).ping()
    except redis.RedisError as error:
        return "BUSY" in str(error)
    return False


def test_forgotten_scripts_are_sent_again_and_the_order_of_each_caller_is_kept(redis_server: Server) -> None:
    over = threading.Event()

    def forget() -> None:
        while not over.is_set():
            redis_server.ask("SCRIPT", "FLUSH")

    async def work() -> None:
        engine = open_at(redis_server.url)

        async def write(which: int) -> None:
            last = None
            for number in range(30):
                result = await engine.aio.set("s", f"k{which}", number)
                assert result.old_value == last
                last = number
                await engine.aio.update("s", "counter", INCREMENT)

        await asyncio.gather(*(write(which) for which in range(10)))
        assert await engine.aio.get("s", "counter") == 300
        await engine.aio.close()

    forgetting = InThread(forget)
    try:
        asyncio.run(work())
    finally:
        over.set()
    forgetting.result()


def test_a_key_that_is_no_hash_fails_its_scope_only(redis_server: Server) -> None:
    redis_server.ask("SET", "state:s", "text")
    with open_at(redis_server.url) as engine:
        for call in (
            lambda: engine.set("s", "k", 1),
            lambda: engine.update("s", "k", INCREMENT),
            lambda: engine.delete("s", "k"),
            lambda: engine.get("s", "k"),
            lambda: engine.list("s"),
        ):
            problem = failure_of(call)
            assert "'state:s'" in problem
            assert "is not what scopestate keeps there" in problem
        assert engine.set("other", "k", 1).old_value is None
        redis_server.ask("DEL", "state:s")
        assert engine.set("s", "k", 1).old_value is None


# ---------------------------------------------------------------------------------------------------------- connections


def test_connections_that_the_server_closes_while_idle_cost_no_call(redis_server: Server) -> None:
    with open_at(redis_server.url) as engine:
        engine.set("s", "k", 0)
        engine.list("s")
        for number in range(1, 20):
            redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert engine.update("s", "k", INCREMENT).new_value == number
            assert engine.list("s") == [number]


def test_connections_that_are_closed_after_a_while_cost_no_call(start_server: StartServer) -> None:
    server = start_server(extra=["timeout 1"])
    with open_at(server.url) as engine:
        engine.set("s", "k", 0)
        until(lambda: "name=scopestate" not in str(server.client().execute_command("CLIENT LIST")), "still open")
        assert engine.update("s", "k", INCREMENT).new_value == 1


def test_connections_killed_while_busy_lose_nothing_acknowledged(redis_server: Server) -> None:
    with open_at(redis_server.url) as engine:
        over = threading.Event()
        kinds: set[type] = set()

        def count() -> tuple[int, int]:
            done = unknown = 0
            while not over.is_set():
                try:
                    engine.update("s", "k", INCREMENT)
                    done += 1
                except StorageError as error:
                    kinds.add(type(error.__cause__))
                    # Else it had only looked.
                    unknown += isinstance(error.__cause__, ConnectionLost) and error.__cause__.may_be_applied
            return done, unknown

        threads = [InThread(count) for _ in range(4)]
        for _ in range(25):
            before = engine.stats().store["connects"]
            redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            until(lambda: engine.stats().store["connects"] > before, "it does not connect again")  # noqa: B023
        over.set()
        counts = [thread.result() for thread in threads]
        assert kinds <= {ConnectionLost}
        done, unknown = (sum(numbers) for numbers in zip(*counts, strict=True))
        assert done > 0
        assert done <= engine.get("s", "k") <= done + unknown


# ---------------------------------------------------------------------------------------------------------------- large


def test_a_large_value_is_set_read_updated_and_listed(valkey: Server) -> None:
    large = "x" * 100_000_000
    with open_at(valkey.url, call_timeout_ms=20_000) as engine:
        assert engine.set("large", "k", {"text": large}).old_value is None
        assert engine.get("large", "k") == {"text": large}
        updated = engine.update("large", "k", [{"type": "set", "path": "n", "value": 1}])
        assert updated.errors == ()
        (listed,) = engine.list("large")
        assert listed["n"] == 1
        assert listed["text"] == large


def test_a_value_that_no_server_takes_is_refused_before_anything_is_sent(
    server_binary: Binary, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a server's least limit in the place of its usual one, which is 512 times that."""
    largest = 1 << 20
    monkeypatch.setattr(redis_making, "_LARGEST_BYTES", largest)
    server = start_server(server_binary, extra=[f"proto-max-bulk-len {largest}"])
    with open_at(server.url) as engine:
        fits = "x" * (largest - 2)
        engine.set("s", "k", fits)
        for call in (
            lambda: engine.set("s", "k", fits + "x"),
            lambda: engine.update("s", "k", [{"type": "set", "path": "", "value": fits + "x"}]),
        ):
            problem = failure_of(call)
            assert f"takes {largest + 1} bytes as JSON, and Redis takes {largest} at most" in problem
            assert "nothing was written" in problem
        assert engine.get("s", "k") == fits
        assert all(owner.connects <= 1 for owner in owners_of(engine))


def test_a_large_scope_holds_back_no_other(valkey: Server) -> None:
    client = valkey.client()
    text = '"' + "x" * 50_000 + '"'
    for start in range(0, 2000, 200):
        client.hset("state:large", mapping={f"k{number}": text for number in range(start, start + 200)})
    with open_at(valkey.url, call_timeout_ms=20_000) as engine:
        engine.set("small", "k", 0)
        began = time.monotonic()
        listing = InThread(lambda: [len(engine.list("large")) for _ in range(3)])
        took: list[float] = []
        while listing.thread.is_alive():
            before = time.monotonic()
            engine.set("small", "k", len(took))
            took.append(time.monotonic() - before)
        each_s = (time.monotonic() - began) / 3
        assert listing.result() == [2000] * 3
        took.sort()
        assert len(took) > 20
        # The server itself does nothing else while it puts such a reply together.
        assert took[len(took) // 2] < 0.2 * each_s
        assert took[int(len(took) * 0.95)] < each_s
