"""`durability: commit` as callers see it: an answer means it is on disk, a failed commit never happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from reliability.living import until
from watching import PATIENCE_S, Gate, GatedStore, Seen, broken, in_thread

from scopestate import Engine, StorageError, messages, ops
from scopestate.actors.local import LocalScope
from scopestate.errors import Conflict, DeserializationError, Unsupported, UpdateRefused
from scopestate.ops import turns

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


# ---------------------------------------------------------------------------------- conditions and transactions


def conflicting_batch(engine: Engine) -> None:
    with engine.batch("s") as batch:
        batch.check("k", value=1)
        batch.set("other", 1)


def appending_to_a_number(engine: Engine) -> None:
    engine.update("s", "k", [ops.Append("", 1)], atomic=True)


REFUSALS: dict[str, tuple[Callable[[Engine], Any], type[Exception]]] = {
    "a condition": (lambda engine: engine.set("s", "k", 3, if_revision=1), Conflict),
    "a check": (conflicting_batch, Conflict),
    "an op that does not fit": (appending_to_a_number, UpdateRefused),
    "a function that raises": (lambda engine: engine.transact("s", lambda tx: tx["k"][0]), TypeError),
}


@pytest.mark.parametrize(("call", "error"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_waits_for_what_it_depends_on(
    call: Callable[[Engine], Any], error: type[Exception], engine: Engine, store: GatedStore
) -> None:
    """A conflict tells of a value. If that is lost, another process would never have seen what it conflicts with."""
    gate = Gate()
    store.at_save = gate
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()

    refused = in_thread(lambda: call(engine))
    until_held(engine, 1)
    gate.open()

    with pytest.raises(error):
        refused()
    assert writer().new_value == 2
    assert store.values("s") == {"k": b"2"}


def test_a_compare_and_set_that_misses_waits_for_the_value_that_it_found(engine: Engine, store: GatedStore) -> None:
    gate = Gate()
    store.at_save = gate
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()

    missed = in_thread(lambda: engine.compare_and_set("s", "k", 1, 3))
    until_held(engine, 1)
    gate.open()

    assert missed().current == 2
    writer()


def test_a_refusal_whose_commit_fails_says_so(engine: Engine, store: GatedStore) -> None:
    gate = Gate()

    def fail() -> None:
        gate()
        broken()

    store.at_save = fail
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()
    refused = in_thread(lambda: engine.set("s", "k", 3, if_revision=1))
    until_held(engine, 1)
    gate.open()

    for call in (writer, refused):
        with pytest.raises(StorageError, match="on fire"):
            call()
    store.at_save = lambda: None
    assert engine.set("s", "k", 3, if_revision=1).revision == 2


def test_a_refusal_is_answered_at_once_where_everything_is_on_disk(engine: Engine, store: GatedStore) -> None:
    store.at_save = broken  # it would fail if anything were saved
    with pytest.raises(Conflict):
        engine.set("s", "k", 3, if_revision=7)
    assert not engine.compare_and_set("s", "k", 5, 6).swapped


@pytest.mark.parametrize("keys", [["k", "other"], ["other"]])
def test_a_turn_on_several_keys_waits_if_one_of_them_is_not_on_disk(
    keys: list[str], engine: Engine, store: GatedStore
) -> None:
    gate = Gate()
    store.at_save = gate
    writer = in_thread(lambda: engine.set("s", "k", 2))
    gate.wait_until_reached()
    actor = engine._scopes["s"]

    class Both(turns.Get, frozen=True):
        """A read of several keys."""

        @property
        def keys(self) -> tuple[str, ...]:
            return tuple(keys)

    reader = in_thread(lambda: actor.run(Both("k")))
    if "k" in keys:
        until_held(engine, 1)
    else:
        assert reader() == b"2"  # these keys are all on disk
    everything = in_thread(lambda: engine.keys("s"))
    until_held(engine, len(keys))
    gate.open()
    assert reader() == b"2"
    assert everything() == ["k"]
    writer()


def test_a_batch_of_100_costs_one_save_and_its_events_go_out_together(engine: Engine, store: GatedStore) -> None:
    seen, gate = Seen(), Gate()
    engine.on_change(scope="s")(seen)
    before = engine.stats().saves
    store.at_save = gate

    def write() -> None:
        with engine.batch("s") as batch:
            for number in range(100):
                batch.set(f"k{number}", number)

    writer = in_thread(write)
    gate.wait_until_reached()
    assert seen.events == []
    gate.open()
    writer()

    assert engine.stats().saves - before == 1
    assert [event.revision for event in seen.wait_for(100)] == list(range(2, 102))
    store.at_save = broken
    with pytest.raises(StorageError, match="on fire"):
        write()
    engine.drain(PATIENCE_S)
    assert len(seen.events) == 100
    assert engine.get("s", "k99") == 99


def until_held(engine: Engine, count: int) -> None:
    """Wait until so many answers are held back, beside those of the commit that is under way."""
    actor = engine._scopes["s"]
    assert isinstance(actor, LocalScope)
    gate = actor._gate
    assert gate is not None
    until(lambda: len(gate._waiting) == count, f"{len(gate._waiting)} answers are held, not {count}")


# ------------------------------------------------------------------------------------------------- for one call only


@pytest.fixture
def patient(store: GatedStore, open_engine: Callable[..., Engine]) -> Engine:
    """An engine that saves some scopes after seconds only."""
    return open_engine(
        store=store, scopes=[{"prefix": "s", "durability": "commit"}, {"name": "m", "durability": "memory"}]
    )


def test_a_durable_write_is_answered_when_it_is_in_the_store(patient: Engine, store: GatedStore) -> None:
    patient.set("users", "before", 1)
    assert "users" not in store.rows

    patient.set("users", "k", 2, durable=True)
    assert store.values("users") == {"before": b"1", "k": b"2"}
    assert patient.modify("users", "k", lambda value: value + 1, durable=True).new_value == 3
    assert store.values("users")["k"] == b"3"
    asyncio.run(patient.aio.set("users", "k", 4, durable=True))
    assert store.values("users")["k"] == b"4"


def test_durable_writes_that_wait_together_share_one_save(patient: Engine, store: GatedStore) -> None:
    gate = Gate()
    store.at_save = gate
    first = in_thread(lambda: patient.set("users", "first", 1, durable=True))
    gate.wait_until_reached()
    before = patient.stats().saves
    replies = [
        patient.ask(messages.Set("users", str(number), number, durable=True), block=False) for number in range(100)
    ]
    assert not any(reply.done for reply in replies)
    gate.open()

    first()
    for reply in replies:
        reply.get(timeout=PATIENCE_S)
    assert patient.stats().saves - before <= 3
    assert len(store.values("users")) == 101


def test_a_durable_write_that_cannot_be_saved_says_that_it_is_in_memory(patient: Engine, store: GatedStore) -> None:
    store.at_save = broken
    with pytest.raises(StorageError, match=r"is in memory, and saving it has failed.*on fire") as failed:
        patient.set("users", "k", 1, durable=True)
    assert failed.value.code == "SET_ERROR"
    assert patient.get("users", "k") == 1
    store.at_save = lambda: None
    patient.flush()
    assert store.values("users") == {"k": b"1"}


def test_where_a_write_cannot_be_durable_or_is_anyway(patient: Engine, store: GatedStore) -> None:
    with pytest.raises(Unsupported):
        patient.set("m", "k", 1, durable=True)
    assert patient.get("m", "k") is None
    patient.set("m", "k", 1, durable=False)
    patient.set("s", "k", 1, durable=True)
    with pytest.raises(DeserializationError, match="durability is `commit`"):
        patient.set("s", "k", 2, durable=False)
    assert store.values("s") == {"k": b"1"}
    with Engine() as engine, pytest.raises(Unsupported):
        engine.set("users", "k", 1, durable=True)
