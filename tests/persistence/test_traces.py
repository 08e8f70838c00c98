"""The traces of the changes in the journal: kept as long as a change or a dead letter, and in no other store."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine, Retry
from scopestate.observing import origin_of
from scopestate.ops.trace_context import TraceContext, TracedDepth, context_of
from scopestate.wire.depth import event_depth

PATIENCE_S = 60.0
CONTEXT = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=1")
PLAIN_TABLES = {
    "answers", "consumers", "dead_letters", "deliveries", "epochs", "extents", "journal", "scopes", "sqlite_sequence",
    "state", "store",
}  # fmt: skip


def config_of(directory: Path) -> dict[str, Any]:
    options = {"store_method": "file_based", "file_path": str(directory)}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}


def write(engine: Engine, key: str, context: TraceContext | None = CONTEXT) -> None:
    token = event_depth.set(TracedDepth.of(0, context))
    try:
        engine.set("orders", key, 1)
    finally:
        event_depth.reset(token)


def stored(directory: Path, statement: str) -> list[Any]:
    connection = sqlite3.connect(next(directory.glob("*.db")))
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


class Handler:
    """Keeps the traces of what it handles; fails while `fails` is set."""

    def __init__(self) -> None:
        self.seen: dict[str, TraceContext | None] = {}
        self.fails = False
        self._changed = threading.Condition()

    def __call__(self, event: Any) -> None:
        with self._changed:
            self.seen[event.key] = origin_of(event)
            self._changed.notify_all()
        if self.fails:
            raise ValueError

    def wait_for(self, *keys: str) -> dict[str, TraceContext | None]:
        with self._changed:
            assert self._changed.wait_for(lambda: set(keys) <= set(self.seen), PATIENCE_S), self.seen
            return dict(self.seen)


def test_an_event_has_its_trace_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "store"
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship")(Handler())
        engine.consumers().pause("ship")
        write(engine, "traced")
        write(engine, "plain", None)
    monkeypatch.setattr(TracedDepth, "is_used", False)  # as in a process of its own

    handler = Handler()
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship")(handler)
        engine.consumers().resume("ship")
        assert handler.wait_for("traced", "plain") == {"traced": CONTEXT, "plain": None}
        engine.drain(PATIENCE_S)
    assert stored(directory, "SELECT count(*) FROM journal") == [(0,)]
    assert stored(directory, "SELECT * FROM traces") == []


def test_a_dead_letter_keeps_the_trace_until_it_is_gone(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    handler = Handler()
    handler.fails = True
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=1))(handler)
        write(engine, "first")
        write(engine, "second")
        engine.flush()
        handler.wait_for("first", "second")
        engine.drain(PATIENCE_S)
        engine.flush()
        assert stored(directory, "SELECT count(*) FROM journal") == [(0,)]
        assert stored(directory, "SELECT trace FROM traces") == [(CONTEXT.text,)] * 2

        letters = engine.dead_letters("ship").list()
        assert [context_of(letter.event.depth) for letter in letters] == [CONTEXT] * 2
        ids = {letter.event.key: letter.id for letter in letters}  # either event may have failed first
        handler.seen, handler.fails = {}, False
        engine.dead_letters("ship").replay([ids["first"]])
        assert handler.wait_for("first") == {"first": CONTEXT}
        engine.drain(PATIENCE_S)
        engine.flush()
        assert stored(directory, "SELECT count(*) FROM traces") == [(1,)]
        engine.dead_letters("ship").purge([ids["second"]])
        engine.flush()
        assert stored(directory, "SELECT count(*) FROM traces") == [(0,)]


def test_a_store_without_traces_has_no_table_for_them(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship")(Handler())
        write(engine, "plain", None)
        engine.drain(PATIENCE_S)
    tables = stored(directory, "SELECT name FROM sqlite_master WHERE type = 'table'")
    assert {name for (name,) in tables} == PLAIN_TABLES
    assert stored(directory, "SELECT 1 FROM sqlite_master WHERE type = 'trigger'") == []


def test_a_trace_that_was_edited_is_ignored(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship")(Handler())
        engine.consumers().pause("ship")
        write(engine, "first")
        write(engine, "second")
    connection = sqlite3.connect(next(directory.glob("*.db")))
    connection.execute("UPDATE traces SET trace = 'nonsense' WHERE position = (SELECT min(position) FROM traces)")
    connection.execute("UPDATE traces SET trace = x'ff' WHERE position = (SELECT max(position) FROM traces)")
    connection.commit()
    connection.close()

    handler = Handler()
    with Engine.from_config(config_of(directory)) as engine:
        engine.on_change(scope="orders", durable="ship")(handler)
        engine.consumers().resume("ship")
        assert handler.wait_for("first", "second") == {"first": None, "second": None}
