"""Values that the store cannot hold: refused before they are acknowledged, and never in the way of others."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stored import read_values

from scopestate import Engine, StorageError, messages, ops
from scopestate.actors.stretch import MOST_UNSAVED
from scopestate.config import from_mapping
from scopestate.errors import DeserializationError, ScopestateError, UnsavableValue, ValueTooLarge
from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite.database import connect
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.transfer import read_lines

LIMIT = 1_000_000
"""Stands for SQLite's own limit of a billion bytes."""
Open = Callable[..., Engine]


def small(uri: str) -> sqlite3.Connection:
    connection = connect(uri)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LIMIT)
    return connection


class Picky(FileAdapter):
    """A store that cannot hold one key, as a database with limits of its own."""

    refuses = "big"

    def save(self, batch: Sequence[ScopeChange]) -> None:
        for change in batch:
            if change.entries.get(self.refuses) is not None:
                raise UnsavableValue(f"the value for key {self.refuses!r} is too large", change.scope, self.refuses)
        super().save(batch)


@pytest.fixture
def open_on(tmp_path: Path) -> Iterator[Open]:
    """Open engines on one directory that save once an hour, and when they are told to."""
    opened: list[Engine] = []

    def open_(
        adapter: Any = FileAdapter, *, limits: dict[str, int] | None = None, durability: str = "interval"
    ) -> Engine:
        config = from_mapping({
            "limits": limits or {},
            "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": {
                "store_method": "file_based", "file_path": str(tmp_path), "save_interval_ms": 3_600_000,
                "durability": durability,
            }}}}],
        })  # fmt: skip
        store = FileAdapter(tmp_path, connect=small) if adapter is FileAdapter else adapter(tmp_path)
        opened.append(Engine(config, adapter=store))
        return opened[-1]

    yield open_
    for engine in opened:
        engine.close()


def on_disk(directory: Path, scope: str) -> dict[str, bytes]:
    with StoreReader(directory) as reader:
        return read_values(reader, scope)


BIG = "x" * (LIMIT + 1)
WAYS: dict[str, Callable[[Engine], Any]] = {
    "set": lambda engine: engine.set("s", "k", BIG),
    "update": lambda engine: engine.update("s", "list", [ops.Append("", "y" * 600_000)]),
    "ask": lambda engine: engine.ask(messages.Set("s", "k", BIG)),
    "aio": lambda engine: asyncio.run(engine.aio.set("s", "k", BIG)),
    "call": lambda engine: engine.call("state::set", {"scope": "s", "key": "k", "value": BIG}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_value_over_the_limit_of_the_store_is_refused(
    open_on: Open, tmp_path: Path, way: Callable[[Engine], Any]
) -> None:
    engine = open_on()
    engine.set("s", "list", ["x" * 600_000])

    with pytest.raises(ScopestateError) as refused:
        way(engine)

    assert isinstance(refused.value, ValueTooLarge)
    engine.set("a", "k", 1)
    engine.flush()
    assert on_disk(tmp_path, "a") == {"k": b"1"}
    assert engine.health().ok


def test_the_largest_value_that_is_taken_is_saved_under_the_longest_names(open_on: Open, tmp_path: Path) -> None:
    engine = open_on()
    limits = engine._limits
    name = "\U0001f600" * limits.longest_name  # four bytes each
    value = "x" * (limits.max_value_bytes - 2)

    engine.set(name, name, value)
    engine.flush()
    with pytest.raises(ValueTooLarge):
        engine.set(name, name, value + "x")

    assert on_disk(tmp_path, name) == {name: f'"{value}"'.encode()}


@pytest.mark.parametrize("what", ["scope", "key"])
def test_a_name_over_the_limit_of_the_store_is_refused(open_on: Open, what: str) -> None:
    engine = open_on()
    name = "n" * (engine._limits.longest_name + 1)

    with pytest.raises(DeserializationError, match=f"the {what} 'nnn.* has {len(name)} characters"):
        engine.set(*(name, "k") if what == "scope" else ("s", name), 1)

    engine.flush()
    assert engine.health().ok


def test_a_reload_does_not_lift_the_limit_of_the_store(open_on: Open) -> None:
    engine = open_on(limits={"max_value_bytes": 10})
    assert engine._limits.max_value_bytes == 10

    engine.reconfigure(from_mapping({"limits": {"max_value_bytes": 0}}))
    with pytest.raises(ValueTooLarge):
        engine.set("s", "k", "x" * LIMIT)
    engine.reconfigure(from_mapping({"limits": {"max_value_bytes": 10 * LIMIT}}))
    with pytest.raises(ValueTooLarge):
        engine.set("s", "k", "x" * LIMIT)


def test_what_one_value_cannot_all_others_can(open_on: Open, tmp_path: Path) -> None:
    engine = open_on(Picky)
    engine.set("s", "small", 1)
    engine.set("s", "big", 2)
    engine.set("t", "small", 3)

    engine.flush()

    assert on_disk(tmp_path, "s") == {"small": b"1"}
    assert on_disk(tmp_path, "t") == {"small": b"3"}
    health = engine.health()
    assert health.problems == ("not saved: the value for key 'big' is too large",)
    assert engine.get("s", "big") == 2
    engine.close()


def test_a_value_that_is_not_saved_stays_in_memory_until_it_is_replaced(open_on: Open, tmp_path: Path) -> None:
    engine = open_on(Picky, limits={"passivate_after_ms": 1})
    engine.set("s", "big", 1)
    engine.flush()
    actor = engine._scopes["s"]

    assert not actor._is_saved()
    engine.delete("s", "big")
    engine.set("s", "other", 2)
    engine.flush()

    assert engine.health().ok
    assert actor._is_saved() or engine._scopes.get("s") is not actor
    assert on_disk(tmp_path, "s") == {"other": b"2"}


def test_the_callers_of_one_scope_are_refused_and_those_of_others_answered(open_on: Open, tmp_path: Path) -> None:
    engine = open_on(Picky, durability="commit")

    with pytest.raises(StorageError, match="too large"):
        engine.set("s", "big", 1)
    engine.set("t", "small", 2)

    assert engine.get("s", "big") is None
    assert on_disk(tmp_path, "t") == {"small": b"2"}
    assert engine.health().ok


def test_a_scope_at_the_highest_number_that_a_store_holds_can_be_read_and_not_written(
    open_on: Open, tmp_path: Path
) -> None:
    store = FileAdapter(tmp_path)
    store.save([ScopeChange("s", 2**53 - 1, {"k": Row(b"1", 1, 1)})])
    store.close()
    engine = open_on()
    engine.set("t", "k", 1)

    assert engine.get("s", "k") == 1
    for write in (
        lambda: engine.set("s", "k", 2),
        lambda: engine.set("s", "k", 2, ttl=60),
        lambda: engine.set("s", "new", 2),
        lambda: engine.delete("s", "k"),
        lambda: engine.touch("s", "k", 60),
        lambda: engine.touch("s", "k", None),
    ):
        with pytest.raises(StorageError, match="takes no more writes"):
            write()
    engine.flush()

    assert engine.get("s", "k") == 1
    assert on_disk(tmp_path, "t") == {"k": b"1"}


def test_a_number_that_the_store_cannot_hold_keeps_no_other_scope_from_being_saved(
    open_on: Open, tmp_path: Path
) -> None:
    engine = open_on()
    engine.set("s", "k", 1)
    engine._scopes["s"]._sequence = 2**63 - 1  # as it may come from an adapter that does not know the limit
    engine.set("s", "k", 2)
    engine.set("t", "k", 3)

    engine.flush()

    assert on_disk(tmp_path, "t") == {"k": b"3"}
    assert "scope 's' has the number" in engine.health().problems[0]
    engine.close()


def test_an_import_with_a_number_behind_which_nothing_could_be_written_is_refused() -> None:
    lines = [b'{"scopestate_export":1}\n', b'{"scope":"s","sequence":9223372036854775807}\n']

    with pytest.raises(DeserializationError, match=r"line 2: .*sequence"):
        list(read_lines(lines))


class Failing(FileAdapter):
    """A store on a disk that can be full."""

    full = False

    def save(self, batch: Sequence[ScopeChange]) -> None:
        if self.full:
            raise StorageError("the disk is full")
        super().save(batch)


def test_a_scope_that_cannot_be_saved_stops_before_its_numbers_could_repeat(open_on: Open) -> None:
    """A killed process skips 2**32 numbers, so a scope may not give more than that without a save."""
    engine = open_on(Failing)
    store = engine._parts.backend.store
    assert isinstance(store, Failing)
    engine.set("s", "k", 1)
    engine.set("t", "k", 1)
    engine.flush()
    store.full = True
    engine._scopes["s"]._sequence += MOST_UNSAVED  # so many writes
    engine.set("s", "k", 2)
    with pytest.raises(StorageError, match="the disk is full"):
        engine.flush()

    writes: list[Callable[[], Any]] = [
        lambda: engine.set("s", "k", 3),
        lambda: engine.set("s", "new", 3),
        lambda: engine.delete("s", "k"),
        lambda: engine.update("s", "k", [ops.Increment("", 1)]),
        lambda: engine.set("s", "k", 3, idempotency_key="i"),
        lambda: engine.touch("s", "k", ttl=60),
        lambda: engine.transact("s", lambda tx: tx.set("k", 3)),
    ]
    for write in writes:
        with pytest.raises(StorageError, match="2147483649 of them are not saved yet"):
            write()
    assert engine.get("s", "k") == 2
    engine.set("t", "k", 2)

    store.full = False
    engine.flush()

    for write in writes:
        write()
    assert engine.get("s", "k") == 3
    engine.flush()
