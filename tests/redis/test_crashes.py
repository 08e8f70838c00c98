"""SIGKILL of an engine's process and of the server: nothing acknowledged is lost that the server has kept."""

from __future__ import annotations

import functools
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from opening import INCREMENT, open_at, owners_of, start_child
from reliability.figures import record
from reliability.living import PATIENCE_S, InThread, until
from servers import Binary, Server, StartServer

from scopestate import Engine
from scopestate.errors import ConnectionLost, NotConnected, StorageError

# ------------------------------------------------------------------------------------------------------- the engine's


def test_a_killed_process_loses_nothing_acknowledged_leaves_nothing_half_and_others_go_on(redis_server: Server) -> None:
    with open_at(redis_server.url) as engine:
        seen = threading.Event()
        over = threading.Event()

        def count() -> int:
            done = 0
            while not over.is_set():
                engine.update("s", "counter", INCREMENT)
                engine.update("s", "mine", INCREMENT)
                done += 1
                seen.set()
            return done

        mine = InThread(count)
        lines: list[bytes] = []
        for _ in range(3):
            child = start_child("writer", redis_server.url)
            assert child.stdout is not None
            with child, child.stdout as acknowledged:
                kinds: set[bytes] = set()
                here: list[bytes] = []
                for line in acknowledged:
                    here.append(line)
                    kinds.add(line[:5])
                    if len(here) > 300 and len(kinds) == 3:
                        break
                child.kill()
                here += acknowledged  # what it had said by then
            lines += [line for line in here if line.startswith(b"count")]
            last = Counter[bytes]()
            for line in here:
                if line.startswith(b"set") and line.endswith(b"\n"):
                    _, which, number = line.split()
                    last[which] = max(last[which], int(number))
            for which, number in last.items():
                value = engine.get("s", f"k{which.decode()}")
                # One more may have been on its way, for which no answer came.
                assert number <= value["first"] <= number + 1
                assert value["first"] == value["last"]
                assert len(value["fill"]) == 2000
        seen.clear()
        assert seen.wait(PATIENCE_S), "the other engine stopped"
        over.set()
        own = mine.result()

        assert engine.get("s", "mine") == own
        counted = engine.get("s", "counter")
        record("Redis: engines killed", kills=3, acknowledged=len(lines) + own, counted=counted)
        # Of each killed process two increments may have been on their way.
        assert len(lines) + own <= counted <= len(lines) + own + 3 * 2


# ------------------------------------------------------------------------------------------------------- the server's


class Writers:
    """Threads that write keys of their own until told to stop, and remember what was acknowledged and what failed."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.acknowledged: list[list[int]] = [[] for _ in range(count)]
        self.errors: list[StorageError] = []
        self._engine = engine
        self._over = threading.Event()
        self._threads = [InThread(lambda which=which: self._work(which)) for which in range(count)]  # type: ignore[misc]

    def _work(self, which: int) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._engine.set("s", f"k{which}", number)
            except StorageError as error:
                self.errors.append(error)
            else:
                self.acknowledged[which].append(number)

    def wait_for_more(self) -> None:
        """Wait until each of them has had ten more answers."""
        before = [len(numbers) for numbers in self.acknowledged]
        until(
            lambda: all(len(now) >= then + 10 for now, then in zip(self.acknowledged, before, strict=True)),
            "a writer does not go on",
        )

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.result()


def test_a_killed_server_that_keeps_its_data_loses_nothing_acknowledged(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary, persistent=True)
    with open_at(server.url) as engine:
        writers = Writers(engine, 8)
        for _ in range(3):
            writers.wait_for_more()
            server.kill()
            told = [max(numbers) for numbers in writers.acknowledged]
            server.start()
            kept = {key: int(value) for key, value in server.client().hgetall("state:s").items()}
            assert all(kept[f"k{which}"] >= number for which, number in enumerate(told))
        writers.wait_for_more()
        writers.stop()

        record(
            f"Redis: servers killed: {server_binary.name}",
            kills=3,
            acknowledged=sum(map(len, writers.acknowledged)),
            failed=len(writers.errors),
        )
        assert [engine.get("s", f"k{which}") for which in range(8)] == [max(told) for told in writers.acknowledged]
        # Those under way when it died; all others waited until it was back.
        assert len(writers.errors) <= 3 * 8
        assert {type(error.__cause__) for error in writers.errors} <= {ConnectionLost}


def test_a_server_that_comes_back_empty_is_used_on_and_what_was_last_seen_does_no_harm(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)
    with open_at(server.url) as engine:
        for key in ("updated", "set", "deleted", "elsewhere"):
            engine.update("s", key, [{"type": "increment", "path": "", "by": 5}])
        server.kill()
        server.start()
        server.client().hset("state:s", "elsewhere", "70")

        updated = engine.update("s", "updated", INCREMENT)
        assert (updated.old_value, updated.new_value) == (None, 1)
        assert engine.set("s", "set", 2).old_value is None
        assert engine.delete("s", "deleted") is None
        assert engine.update("s", "elsewhere", INCREMENT).new_value == 71
        assert engine.list("s") == [71, 2, 1]


CALLS: dict[str, Callable[[Engine], Any]] = {
    "SET_ERROR": lambda engine: engine.set("s", "k", 1),
    "UPDATE_ERROR": lambda engine: engine.update("s", "k", INCREMENT),
    "DELETE_ERROR": lambda engine: engine.delete("s", "k"),
    "GET_ERROR": lambda engine: engine.get("s", "k"),
    "LIST_ERROR": lambda engine: engine.list("s"),
}


def failure_of(work: Callable[[], Any]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        work()
    assert type(caught.value) is StorageError
    return caught.value


def noted_when_sent(engine: Engine) -> threading.Event:
    """Return what is set once a command has gone into one of the engine's sockets."""
    sent = threading.Event()

    def noting(send: Callable[[bytes], None], data: bytes) -> None:
        send(data)
        sent.set()

    for owner in owners_of(engine):
        connection: Any = owner._connection
        if connection is not None:
            connection._send = functools.partial(noting, connection._send)
    return sent


@pytest.mark.parametrize("code", CALLS)
def test_a_call_under_way_when_the_server_dies_says_if_it_may_have_been_applied(
    server_binary: Binary, start_server: StartServer, code: str
) -> None:
    server = start_server(server_binary)
    with open_at(server.url, connect_wait_ms=50) as engine:
        engine.set("s", "k", 0)
        engine.list("s")
        sent = noted_when_sent(engine)
        server.pause()
        call = InThread(lambda: CALLS[code](engine))
        assert sent.wait(PATIENCE_S), "the call is not sent"
        server.kill()

        error = failure_of(call.result)

        assert error.code == code
        assert "was lost" in str(error)
        if code in ("GET_ERROR", "LIST_ERROR"):
            assert type(error.__cause__) is ConnectionLost
            assert "nothing was changed" in str(error)
        else:
            assert type(error.__cause__) is ConnectionLost
            assert "may have been applied: read the key before retrying" in str(error)

        # And those after it, which find no server.
        error = failure_of(lambda: CALLS[code](engine))
        assert error.code == code
        assert type(error.__cause__) is NotConnected
        assert "nothing was sent" in str(error)
        assert f"127.0.0.1:{server.port}" in str(error)
        health = engine.health()
        assert not health.ok
        assert any("no connection to Redis" in json.dumps(problem) for problem in health.problems)

        server.start()
        until(lambda: _answers(engine), "the engine does not find the server again")
        assert engine.set("s", "k", 7).old_value is None
        until(lambda: engine.health().ok, "a problem stays in health()")


def _answers(engine: Engine) -> bool:
    try:
        engine.get("s", "k")
        engine.list("s")
    except StorageError:
        return False
    return True


def test_a_call_that_waits_for_a_server_which_returns_in_time_is_done(
    server_binary: Binary, start_server: StartServer
) -> None:
    server = start_server(server_binary)
    with open_at(server.url, connect_wait_ms=20_000) as engine:
        engine.set("s", "k", 0)
        server.kill()
        call = InThread(lambda: engine.update("s", "k", INCREMENT))
        until(lambda: owners_of(engine)[0].why_not is not None, "it does not try to connect")
        server.start()

        assert call.result().new_value == 1
