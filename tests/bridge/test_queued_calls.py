"""Calls of many threads through a bridge: those on one key go one after the other, and a lost one is sent again."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from played_engine import LIST, PlayedEngine
from second_engine import PATIENCE_S, OpenBridge
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from scopestate import Engine, StorageError
from scopestate.actors.turn import HOLDER
from scopestate.errors import ConnectionLost
from scopestate.persistence.bridge.calls import TurnCall


class HoldingEngine(PlayedEngine):
    """It answers a call when the test says so."""

    def __init__(self) -> None:
        self.arrived: list[str] = []
        """What was called, such as `set k`."""
        self._held: dict[str, tuple[ServerConnection, dict[str, Any]]] = {}
        self._news = threading.Condition()
        super().__init__({})

    def _converse(self, connection: ServerConnection) -> None:
        self._connections.append(connection)
        connection.send(json.dumps({"type": "workerregistered", "worker_id": str(uuid.uuid4())}))
        try:
            for message in connection:
                frame = json.loads(message)
                if frame["type"] != "invokefunction" or not frame.get("invocation_id"):
                    continue
                if frame["function_id"] == LIST:
                    connection.send(json.dumps(self._answer(frame)))
                    continue
                label = " ".join((frame["function_id"].removeprefix("state::"), frame["data"].get("key", "")))
                with self._news:
                    self.arrived.append(label)
                    self._held[label] = connection, frame
                    self._news.notify_all()
        except (ConnectionClosed, OSError):
            pass

    def wait_for(self, *labels: str) -> None:
        """Wait until these calls have come, and no others."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.arrived) >= len(labels), PATIENCE_S), self.arrived
            assert self.arrived == list(labels)

    def answer(self, label: str, result: Any) -> None:
        with self._news:
            connection, frame = self._held.pop(label)
        answer = {key: frame[key] for key in ("invocation_id", "function_id")}
        connection.send(json.dumps({"type": "invocationresult", **answer, "result": result}))


@pytest.fixture
def holding() -> Iterator[HoldingEngine]:
    holding = HoldingEngine()
    yield holding
    holding.close()


@pytest.fixture
def engine(holding: HoldingEngine, open_bridge: OpenBridge) -> Engine:
    return open_bridge(holding.url)


def under_way(engine: Engine) -> list[bool]:
    """For each call that has no answer: whether it goes as it is."""
    return [type(call) is TurnCall for call in list(engine._scopes["s"]._open)]  # type: ignore[attr-defined]


def wait_until(engine: Engine, calls: int) -> None:
    wait_for(lambda: len(under_way(engine)) == calls)


def test_calls_on_a_key_wait_for_each_other_and_those_on_others_do_not(engine: Engine, holding: HoldingEngine) -> None:
    with ThreadPoolExecutor(6) as pool:
        # None sends its call itself: there is no connection yet, then it is in use.
        tasks = [pool.submit(engine.set, "s", "first", 0)]
        holding.wait_for("set first")
        tasks.append(pool.submit(engine.set, "s", "k", 1))
        holding.wait_for("set first", "set k")
        tasks.append(pool.submit(engine.set, "s", "k", 2))
        wait_until(engine, 3)
        tasks.append(pool.submit(engine.list, "s"))
        wait_until(engine, 4)
        tasks.append(pool.submit(engine.get, "s", "other"))
        holding.wait_for("set first", "set k", "get other")
        assert under_way(engine) == [True, True, False, False, True]

        holding.answer("get other", 7)
        assert tasks[4].result(PATIENCE_S) == 7
        holding.answer("set k", {"old_value": 5, "new_value": 1, "revision": 3})
        assert tasks[1].result(PATIENCE_S).old_value == 5
        holding.wait_for("set first", "set k", "get other", "set k")
        holding.answer("set k", {"old_value": 1, "new_value": 2})
        assert tasks[2].result(PATIENCE_S).old_value == 1
        holding.answer("set first", {"old_value": None, "new_value": 0})
        tasks[0].result(PATIENCE_S)
        holding.wait_for("set first", "set k", "get other", "set k", "list ")
        holding.answer("list ", [1])
        assert tasks[3].result(PATIENCE_S) == [1]

    scope: Any = engine._scopes["s"]
    assert (scope._open, scope._keys) == ({}, {})


def test_reads_on_a_key_go_side_by_side_and_a_write_behind_them(engine: Engine, holding: HoldingEngine) -> None:
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(engine.set, "s", "first", 0)
        holding.wait_for("set first")
        reads = [pool.submit(engine.get, "s", "k")]
        holding.wait_for("set first", "get k")
        wait_until(engine, 2)
        write = pool.submit(engine.delete, "s", "k")
        wait_until(engine, 3)
        assert holding.arrived == ["set first", "get k"]
        holding.answer("get k", 1)
        assert reads[0].result(PATIENCE_S) == 1
        holding.wait_for("set first", "get k", "delete k")
        holding.answer("delete k", 1)
        assert write.result(PATIENCE_S) == 1
        holding.answer("set first", {"old_value": None, "new_value": 0})
        first.result(PATIENCE_S)


def test_of_the_calls_on_a_lost_connection_reads_are_made_again(engine: Engine, holding: HoldingEngine) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(engine.set, "s", "first", 0)
        holding.wait_for("set first")
        read = pool.submit(engine.get, "s", "k")
        holding.wait_for("set first", "get k")
        write = pool.submit(engine.update, "s", "n", [{"type": "increment", "path": "", "by": 1}])
        holding.wait_for("set first", "get k", "update n")
        assert under_way(engine) == [True, True, True]
        holding.cut()

        for lost in (first, write):
            with pytest.raises(StorageError) as caught:
                lost.result(PATIENCE_S)
            assert isinstance(caught.value.__cause__, ConnectionLost)
        holding.wait_for("set first", "get k", "update n", "get k")
        holding.answer("get k", 3)
        assert read.result(PATIENCE_S) == 3

    scope: Any = engine._scopes["s"]
    assert (scope._open, scope._keys) == ({}, {})


def test_an_answer_that_is_no_answer_fails_its_call_alone(engine: Engine, holding: HoldingEngine) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.set, "s", "first", 0)
        holding.wait_for("set first")
        write = pool.submit(engine.set, "s", "k", 1)
        holding.wait_for("set first", "set k")
        holding.answer("set k", "not what it returns")
        with pytest.raises(StorageError, match="its result is not what state::set returns"):
            write.result(PATIENCE_S)
        holding.answer("set first", {"old_value": None, "new_value": 0})
        assert first.result(PATIENCE_S).old_value is None


def test_a_thread_that_sends_the_call_of_a_task_leaves_the_event_loop_alone(
    holding: HoldingEngine, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread handles the answer that the task's call has waited for, as the scope was busy when it came."""
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(engine.set, "s", "k", 1)
        holding.wait_for("set k")
        second = pool.submit(lambda: asyncio.run(engine.aio.set("s", "k", 2), debug=True))
        wait_until(engine, 2)
        scope: Any = engine._scopes["s"]
        scope._claim[HOLDER] = threading.get_ident()
        holding.answer("set k", {"old_value": None, "new_value": 1})
        wait_for(lambda: len(scope._mailbox) == 1)
        del scope._claim[HOLDER]

        pool.submit(scope.run_batch).result(PATIENCE_S)

        assert scope._connection.owner._watch is None
        wait_for(lambda: holding.arrived == ["set k"] * 2)
        holding.answer("set k", {"old_value": 1, "new_value": 2})
        assert first.result(PATIENCE_S).new_value == 1
        assert second.result(PATIENCE_S).new_value == 2
    assert "Traceback" not in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    paused = threading.Event()
    for _ in range(int(PATIENCE_S * 1000)):
        if condition():
            return
        paused.wait(0.001)
    raise AssertionError("in vain")
