"""`durability: commit` as callers see it: an answer means it is on disk, a failed commit never happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from watching import PATIENCE_S, Gate, GatedStore, Seen, broken, in_thread

from scopestate import Engine, StorageError, messages, ops

COMMIT = [{"prefix": "s", "durability": "commit"}]


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
def engine(store: GatedStore, open_engine: Callable[..., Engine]) -> Engine:
    """An engine whose scopes `s...` are on commit, with one value there."""
    engine = open_engine(store=store, scopes=COMMIT)
    engine.set("s", "k", 1)
    return engine


def test_an_answer_means_that_the_write_is_in_the_store(engine: Engine, store: GatedStore) -> None:
    assert store.values("s") == {"k": b"1"}

    engine.update("s", "k", [ops.Increment("", 1)])
    assert store.values("s") == {"k": b"2"}

    engine.delete("s", "k")
    assert store.values("s") == {}


def test_nobody_sees_a_write_before_it_is_in_the_store(engine: Engine, store: GatedStore) -> None:
    seen, gate = Seen(), Gate()
    engine.on_change(scope="s")(seen)
    store.at_save = gate
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()

    readers = [
        in_thread(lambda: engine.get("s", "k")),
        in_thread(lambda: engine.list("s")[0]),
        in_thread(lambda: engine.ask(messages.Get("s", "k"))),
        in_thread(lambda: asyncio.run(engine.aio.get("s", "k"))),
    ]
    assert store.values("s") == {"k": b"1"}
    assert seen.events == []
    gate.open()

    assert [read() for read in readers] == [2, 2, 2, 2]
    assert writer().old_value == 1
    assert len(seen.wait_for(1)) == 1


CALLS: dict[str, tuple[Callable[[Engine], Any], str]] = {
    "set": (lambda engine: engine.set("s", "k", 2), "SET_ERROR"),
    "update": (lambda engine: engine.update("s", "k", []), "UPDATE_ERROR"),
    "delete": (lambda engine: engine.delete("s", "k"), "DELETE_ERROR"),
    "aio.set": (lambda engine: asyncio.run(engine.aio.set("s", "k", 2)), "SET_ERROR"),
    "aio.delete": (lambda engine: asyncio.run(engine.aio.delete("s", "k")), "DELETE_ERROR"),
    "call": (lambda engine: engine.call("state::update", {"scope": "s", "key": "k", "ops": []}), "UPDATE_ERROR"),
    "ref": (lambda engine: engine.scope("s").actor_ref.ask(messages.Set("s", "k", 2)), "SET_ERROR"),
}


@pytest.mark.parametrize(("call", "code"), CALLS.values(), ids=CALLS)
def test_a_commit_that_fails_fails_the_call_and_nothing_has_happened(
    call: Callable[[Engine], Any], code: str, engine: Engine, store: GatedStore
) -> None:
    seen = Seen()
    engine.on_change()(seen)
    store.at_save = broken

    with pytest.raises(StorageError, match=r"Failed to .*on fire") as failed:
        call(engine)

    assert failed.value.code == code
    assert engine.get("s", "k") == 1
    assert engine.list("s") == [1]
    engine.drain(timeout=PATIENCE_S)
    assert seen.events == []

    store.at_save = lambda: None
    assert engine.set("s", "k", 3).old_value == 1
    assert store.values("s") == {"k": b"3"}
    assert [event.new_value for event in seen.wait_for(1)] == [3]


def test_writers_that_wait_together_share_one_commit(engine: Engine, store: GatedStore) -> None:
    gate = Gate()
    store.at_save = gate
    first = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()
    before = engine.stats().saves
    replies = [engine.ask(messages.Set(f"s{number % 5}", str(number), number), block=False) for number in range(100)]
    gate.open()

    first()
    for reply in replies:
        reply.get(timeout=PATIENCE_S)
    # One for the first writer, and one more, or two if the hundred came while that one began.
    assert engine.stats().saves - before <= 3
    assert sum(map(len, store.rows.values())) == 101


def test_other_scopes_of_the_same_store_do_not_wait(engine: Engine, store: GatedStore) -> None:
    gate = Gate()
    store.at_save = gate
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()

    assert engine.set("other", "k", 1).created
    assert engine.get("other", "k") == 1
    gate.open()
    writer()


def test_memory_scopes_are_never_saved(store: GatedStore, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(store=store, scopes=[{"prefix": "session:", "durability": "memory"}])
    engine.set("session:1", "k", 1)
    engine.set("user:1", "k", 1)
    engine.flush()

    assert list(store.rows) == ["user:1"]
    assert engine.list_groups() == ["session:1", "user:1"]
