"""`engine::metrics`: the figures of an engine for its workers, with those of single scopes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from raw import PATIENCE_S
from serving import OpenRaw, OpenServer

import scopestate
from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.scope_figures import ScopeFigures, figures_of
from scopestate.server.server import Server

TOKENS = {
    "auth": {
        "tokens": [
            "full",
            {"token": "scraper", "functions": ["engine::metrics"]},
            {"token": "pattern", "functions": ["engine::*"]},
            {"token": "other", "functions": ["state::get"]},
        ]
    }
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


def test_a_worker_gets_health_counts_and_scopes(server: Server, connect: OpenRaw) -> None:
    server.engine.set("users", "ada", {"n": 1})
    worker = connect()
    worker.call("state::set", {"scope": "users", "key": "bob", "value": 22})

    told = worker.call("engine::metrics", {})

    assert told["version"] == scopestate.__version__
    assert told["state"] == "in memory: lost when this process ends"
    assert told["health"]["ok"] is True
    assert told["stats"]["calls"]["state::set"] == 2
    assert (told["server"]["workers"], told["server"]["calls"]) == (1, 2)
    assert told["scope_count"] == 1
    users = {"scope": "users", "keys": 2, "bytes": 9, "revision": 2, "writes_per_s": None}
    assert told["scopes"] == [users]
    assert (told["consumers"], told["problem"]) == ([], None)


def test_the_program_gets_the_same(server: Server) -> None:
    assert server.engine.call("engine::metrics", {})["scope_count"] == 0


@pytest.mark.parametrize(("token", "may"), [("full", True), ("scraper", True), ("pattern", False), ("other", False)])
def test_a_token_must_be_full_or_name_the_figures(
    token: str, may: bool, open_server: OpenServer, connect: OpenRaw
) -> None:
    worker = connect(open_server(**TOKENS), additional_headers={"Authorization": f"Bearer {token}"})

    answer = worker.ask("engine::metrics", {})

    assert ("result" in answer) == may
    assert may or answer["error"]["code"] == "FORBIDDEN"


def test_bad_input_is_refused(server: Server, connect: OpenRaw) -> None:
    assert connect().ask("engine::metrics", 5)["error"]["code"] == "deserialization_error"


def test_a_slow_reading_holds_up_no_call_and_is_shared(
    server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, readings = threading.Event(), threading.Event(), []
    stats = Engine.stats

    def slow(engine: Engine) -> Any:
        readings.append(engine)
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return stats(engine)

    monkeypatch.setattr(Engine, "stats", slow)
    first, second = connect(), connect()
    try:
        first.invoke("engine::metrics", {})
        assert begun.wait(PATIENCE_S)
        second.invoke("engine::metrics", {})
        assert second.call("state::set", {"scope": "s", "key": "k", "value": 1}) == {"old_value": None, "new_value": 1}
    finally:
        may_end.set()
    assert first.receive()["result"]["health"]["ok"] is True
    assert second.receive()["result"]["health"]["ok"] is True
    assert len(readings) == 1


def test_stopping_does_not_wait_for_a_reading(open_server: OpenServer, connect: OpenRaw, monkeypatch: Any) -> None:
    begun, may_end = threading.Event(), threading.Event()
    stats = Engine.stats

    def slow(engine: Engine) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return stats(engine)

    server = open_server()
    worker = connect(server)
    monkeypatch.setattr(Engine, "stats", slow)
    try:
        worker.invoke("engine::metrics", {})
        assert begun.wait(PATIENCE_S)
        server.stop()
    finally:
        may_end.set()


def test_rates_are_those_since_the_reading_before(engine: Engine) -> None:
    clock = Clock()
    scopes = ScopeFigures(engine, clock)
    engine.set("a", "k", 1)
    assert [one.writes_per_s for one in scopes.read(5)[1]] == [None]
    for number in range(30):
        engine.set("a", "k", number)
    engine.set("new", "k", 1)
    clock.now_s += 10

    _, found = scopes.read(5)

    assert {one.scope: one.writes_per_s for one in found} == {"a": 3.0, "new": 0.0}


def test_the_largest_and_the_most_written_are_told(engine: Engine) -> None:
    clock = Clock()
    scopes = ScopeFigures(engine, clock)
    for number in range(20):
        with engine.scope(f"scope-{number:02}").batch() as batch:
            for key in range(number + 1):
                batch.set(str(key), "x")
    assert scopes.read(3)[0] == 20
    for _ in range(5):
        engine.set("scope-00", "0", "y")
    clock.now_s += 1

    count, found = scopes.read(3)

    assert count == 20
    assert [one.scope for one in found][:3] == ["scope-19", "scope-18", "scope-17"]
    assert max(found, key=lambda one: one.writes_per_s or 0).scope == "scope-00"


def test_the_size_of_a_large_scope_is_estimated(engine: Engine) -> None:
    for number in range(5000):
        engine.set("s", str(number), "x" * 98)

    ((one),) = ScopeFigures(engine).read(1)[1]

    assert (one.keys, one.bytes) == (5000, 500_000)


def test_scopes_that_are_not_in_memory_are_not_loaded(tmp_path: Path) -> None:
    kv = {"store_method": "file_based", "file_path": str(tmp_path / "state")}
    config = from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})
    with Engine(config) as engine:
        engine.set("s", "k", 1)
    with Engine(config) as engine:
        assert figures_of(engine, ScopeFigures(engine))["scope_count"] == 0
        assert engine.list_groups() == ["s"]


def test_scopes_of_another_engine_are_asked_for(server: Server) -> None:
    server.engine.set("far", "k", 1)
    bridge = {"name": "bridge", "config": {"bridge_url": server.url}}
    config = from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": bridge}}]})
    with Engine(config) as engine:
        told = figures_of(engine, ScopeFigures(engine))
        (one,) = told["scopes"]
        assert (one["scope"], one["keys"], one["bytes"], one["revision"]) == ("far", 1, None, None)
        server.stop()
        gone = asyncio.run(asyncio.to_thread(figures_of, engine, ScopeFigures(engine)))
    assert gone["scopes"] == []
    assert "cannot connect" in gone["problem"]
