"""Revisions, conditions, transactions, ranges and deadlines of a scope that lives in another engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from second_engine import PATIENCE_S, OpenBridge, RemoteProcess, Seen

from scopestate import Engine, messages, ops
from scopestate.errors import (
    Conflict,
    DeserializationError,
    IdempotencyMismatch,
    InvalidCursor,
    Unsupported,
    UpdateRefused,
    WouldDeadlock,
)
from scopestate.ops.transactions import Transaction
from scopestate.ops.writes import DELETE, KEEP


@pytest.fixture
def engine(remote: RemoteProcess, open_bridge: OpenBridge) -> Engine:
    return open_bridge(remote.url)


@pytest.fixture
def other(remote: RemoteProcess, open_bridge: OpenBridge) -> Engine:
    """Another engine on the same scopes."""
    return open_bridge(remote.url)


def test_an_entry_has_the_revision_of_the_other_engine(engine: Engine, other: Engine) -> None:
    written = engine.set("s", "k", {"n": 1}, if_absent=True)
    entry = other.entry("s", "k")

    assert entry is not None
    assert (entry.value, entry.revision, entry.expires_at) == ({"n": 1}, written.revision, None)
    assert engine.entry("s", "absent") is None


def test_plain_writes_have_the_revision_of_the_other_engine(engine: Engine, other: Engine) -> None:
    other.set("s", "another", 1)
    written = engine.set("s", "k", {"n": 1})
    assert written.revision == 2
    assert engine.set("s", "k", {"n": 2}, if_revision=written.revision).revision == 3
    updated = engine.update("s", "k", [ops.Increment("n", 1), ops.Increment("", 1)])
    assert (updated.revision, len(updated.errors)) == (4, 1)
    assert "revision" not in updated.to_json()
    assert engine.call("state::set", {"scope": "s", "key": "k", "value": 1}) == {
        "old_value": {"n": 3},
        "new_value": 1,
    }


def test_a_conflict_is_the_error_of_this_side(engine: Engine, other: Engine) -> None:
    engine.set("s", "k", 1)
    seen = engine.entry("s", "k")
    assert seen is not None
    other.set("s", "k", 2)

    attempts: list[Callable[[], object]] = [
        lambda: engine.set("s", "k", 3, if_revision=seen.revision),
        lambda: engine.update("s", "k", [ops.Increment("", 1)], if_revision=seen.revision),
        lambda: engine.delete("s", "k", if_revision=seen.revision),
    ]
    for attempt in attempts:
        with pytest.raises(Conflict) as caught:
            attempt()
        found = caught.value
        assert (found.scope, found.key, found.expected_revision) == ("s", "k", seen.revision)
        assert found.revision > seen.revision
    assert engine.get("s", "k") == 2


def test_compare_and_set(engine: Engine, other: Engine) -> None:
    events = Seen()
    engine.on_change()(events)
    engine.set("s", "k", None)

    assert not engine.compare_and_set("s", "k", 5, 6).swapped
    assert engine.compare_and_set("s", "k", None, 6).swapped
    missed = other.compare_and_set("s", "k", 5, 7)

    assert (missed.swapped, missed.current) == (False, 6)
    engine.drain(PATIENCE_S)
    assert [(event.event_type, event.new_value) for event in events.events] == [
        ("state:created", None),
        ("state:updated", 6),
    ]


def test_modify_is_computed_again_when_another_engine_writes(engine: Engine, other: Engine) -> None:
    engine.set("s", "n", 1)
    found: list[int] = []

    def add(value: int) -> int:
        found.append(value)
        if len(found) == 1:
            # On a thread of its own: a call of any engine by the function itself is refused.
            thread = threading.Thread(target=other.set, args=("s", "n", 10))
            thread.start()
            thread.join(PATIENCE_S)
        return value + 1

    result = engine.modify("s", "n", add)

    assert found == [1, 10]
    assert (result.old_value, result.new_value, engine.get("s", "n")) == (10, 11, 11)
    assert result.revision == engine.entry("s", "n").revision  # type: ignore[union-attr]


def test_modify_may_delete_keep_and_raise(engine: Engine) -> None:
    engine.set("s", "k", 1)

    assert engine.modify("s", "k", lambda value: KEEP).new_value == 1
    assert engine.modify("s", "absent", lambda value: KEEP, default=3).new_value is None
    with pytest.raises(ZeroDivisionError):
        engine.modify("s", "k", lambda value: value / 0)
    assert engine.modify("s", "k", lambda value: DELETE).old_value == 1
    assert engine.get("s", "k") is None
    assert engine.modify("s", "k", lambda value: value, default=7).new_value == 7


def test_modify_gives_up_with_a_conflict(engine: Engine, other: Engine) -> None:
    def lose(value: int) -> int:
        thread = threading.Thread(target=other.update, args=("s", "n", [ops.Increment("", 1)]))
        thread.start()
        thread.join(PATIENCE_S)
        return 0

    engine.set("s", "n", 1)
    with pytest.raises(Conflict):
        engine.modify("s", "n", lose)
    assert engine.get("s", "n") > 10


@pytest.mark.parametrize("engines", [1, 2])
def test_no_increment_is_lost(engine: Engine, other: Engine, engines: int) -> None:
    def work(mine: Engine) -> None:
        for _ in range(25):
            mine.modify("s", "n", lambda value: value + 1, 0)

    threads = [threading.Thread(target=work, args=((engine, other)[number % engines],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)

    assert engine.get("s", "n") == 100


def test_money_that_is_moved_stays_the_same(engine: Engine, other: Engine) -> None:
    for name in "abcd":
        engine.set("bank", name, 100)

    def move(mine: Engine, number: int) -> None:
        source, target = "abcd"[number % 4], "abcd"[(number + 1) % 4]
        for _ in range(10):

            def transfer(tx: Transaction) -> None:
                tx[source] -= 1
                tx[target] += 1

            mine.transact("bank", transfer)

    threads = [threading.Thread(target=move, args=((engine, other)[number % 2], number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)

    assert sum(engine.list("bank")) == 400
    assert engine.list("bank") == [100] * 4


def test_transact_reads_its_own_writes_and_fires_one_event_for_each_key(engine: Engine) -> None:
    events = Seen()
    engine.on_change()(events)
    engine.set("s", "a", 1)
    engine.set("s", "gone", None)

    def work(tx: Transaction) -> list[str]:
        tx["b"] = tx["a"] + 1
        tx["b"] += 1
        del tx["gone"]
        tx.set("timed", 1, ttl=60)
        return tx.keys()

    assert engine.transact("s", work) == ["a", "b", "timed"]
    engine.drain(PATIENCE_S)
    assert [(event.event_type, event.key, event.new_value) for event in events.events[2:]] == [
        ("state:created", "b", 3),
        ("state:deleted", "gone", None),
        ("state:created", "timed", 1),
    ]
    assert 50 < (engine.ttl("s", "timed") or 0) <= 60


def test_transact_is_done_again_when_a_key_comes_that_it_has_listed(engine: Engine, other: Engine) -> None:
    engine.set("s", "a", 1)
    calls: list[list[str]] = []

    def work(tx: Transaction) -> None:
        calls.append(tx.keys())
        if len(calls) == 1:
            thread = threading.Thread(target=other.set, args=("s", "b", 2))
            thread.start()
            thread.join(PATIENCE_S)
        tx["count"] = len(calls[-1])

    engine.transact("s", work)

    assert calls == [["a"], ["a", "b"]]
    assert engine.get("s", "count") == 2


def test_a_transaction_may_read_more_keys_than_it_may_write(engine: Engine) -> None:
    with engine.batch("s") as first:
        for number in range(900):
            first.set(f"k{number:04}", number)
    with engine.batch("s") as second:
        for number in range(900, 1_100):
            second.set(f"k{number:04}", number)

    def work(tx: Transaction) -> None:
        tx["sum"] = sum(value for _, value in tx.items())

    engine.transact("s", work)

    assert engine.get("s", "sum") == sum(range(1_100))


def test_what_the_function_raises_aborts_everything_and_a_call_of_the_engine_is_refused(engine: Engine) -> None:
    def fail(tx: Transaction) -> None:
        tx["a"] = 1
        raise KeyError("mine")

    def call(tx: Transaction) -> None:
        tx["a"] = 1
        engine.get("s", "a")

    with pytest.raises(KeyError, match="mine"):
        engine.transact("s", fail)
    with pytest.raises(WouldDeadlock):
        engine.transact("s", call)
    assert engine.get("s", "a") is None
    engine.set("s", "a", 2)  # the scope serves others


def test_transact_with_an_idempotency_key_is_done_once(engine: Engine, other: Engine) -> None:
    engine.set("s", "balance", 10)

    def pay(tx: Transaction) -> dict[str, int]:
        if tx["balance"] < 10:
            raise ValueError("not enough")
        tx["balance"] -= 10
        return {"left": tx["balance"]}

    assert engine.transact("s", pay, idempotency_key="order-1") == {"left": 0}
    assert other.transact("s", pay, idempotency_key="order-1") == {"left": 0}
    assert engine.get("s", "balance") == 0
    with pytest.raises(ValueError, match="not enough"):
        engine.transact("s", pay, idempotency_key="order-2")
    engine.set("s", "other", 1, idempotency_key="order-3")
    with pytest.raises(IdempotencyMismatch):
        engine.transact("s", pay, idempotency_key="order-3")


def test_a_write_with_an_idempotency_key_is_done_once(engine: Engine, other: Engine) -> None:
    events = Seen()
    engine.on_change()(events)
    first = engine.update("s", "n", [ops.Increment("", 1)], idempotency_key="i")
    again = engine.update("s", "n", [ops.Increment("", 1)], idempotency_key="i")

    assert (first.replayed, again.replayed, again.revision) == (False, True, first.revision)
    with pytest.raises(IdempotencyMismatch) as caught:
        other.set("s", "n", 5, idempotency_key="i")
    assert (caught.value.scope, caught.value.idempotency_key) == ("s", "i")
    engine.drain(PATIENCE_S)
    assert len(events.events) == 1


def test_a_batch_is_whole_or_not_at_all(engine: Engine) -> None:
    events = Seen()
    engine.on_change()(events)
    with engine.batch("s") as batch:
        batch.delete("b")  # it does not exist yet: this changes nothing
        batch.set("a", 1)
        batch.set("b", {"n": 1})
        batch.update("b", [ops.Increment("n", 1)])
        batch.delete("absent")
    engine.drain(PATIENCE_S)
    assert [(event.key, event.new_value) for event in events.wait_for(2)] == [("a", 1), ("b", {"n": 2})]

    with pytest.raises(UpdateRefused) as refused, engine.batch("s") as batch:
        batch.set("a", 5)
        batch.update("a", [ops.Increment("n", 1)])
    assert (refused.value.scope, refused.value.errors[0].index) == ("s", 1)
    with pytest.raises(Conflict) as conflict, engine.batch("s") as batch:
        batch.check("a", absent=True)
        batch.set("c", 1)
    assert (conflict.value.scope, conflict.value.key, conflict.value.expected_revision) == ("s", "a", 0)
    assert engine.keys("s") == ["a", "b"]
    assert engine.get("s", "a") == 1


def test_an_atomic_update_is_refused_as_a_whole(engine: Engine) -> None:
    engine.set("s", "k", {"n": 1})

    with pytest.raises(UpdateRefused) as caught:
        engine.update("s", "k", [ops.Increment("n", 1), ops.Increment("", 1)], atomic=True)

    assert [error.op_index for error in caught.value.errors] == [1]
    assert engine.get("s", "k") == {"n": 1}


def test_ranges_and_pages(engine: Engine) -> None:
    for number in range(25):
        engine.set("s", f"k{number:02}", number)

    assert engine.keys("s", start="k03", limit=2) == ["k03", "k04"]
    assert engine.items("s", prefix="k1", reverse=True, limit=1) == [("k19", 19)]
    assert engine.values("s", end="k02") == [0, 1]
    assert engine.count("s", prefix="k2") == 5
    entries = engine.entries("s", prefix="k0", limit=1)
    assert [(entry.key, entry.value) for entry in entries] == [("k00", 0)]
    assert entries[0].revision == engine.entry("s", "k00").revision  # type: ignore[union-attr]
    pages = list(engine.pages("s", limit=10))
    assert [len(page.entries) for page in pages] == [10, 10, 5]
    assert [entry.value for page in pages for entry in page.entries] == list(range(25))
    with pytest.raises(InvalidCursor):
        list(engine.pages("other", limit=10, cursor=pages[0].cursor))


def test_a_range_that_is_deleted_fires_an_event_for_each_key_in_order(engine: Engine) -> None:
    for key in "cab":
        engine.set("s", key, key)
    events = Seen()
    engine.on_change()(events)

    assert engine.delete_range("s", prefix="") == 3

    engine.drain(PATIENCE_S)
    assert [(event.event_type, event.key, event.old_value) for event in events.events] == [
        ("state:deleted", key, key) for key in "abc"
    ]


def test_deadlines_are_the_other_engines(engine: Engine) -> None:
    engine.set("s", "k", 1, ttl=60)

    assert 50 < (engine.ttl("s", "k") or 0) <= 60
    assert engine.touch("s", "k", ttl=600)
    assert (engine.ttl("s", "k") or 0) > 500
    assert engine.touch("s", "k", ttl=None)
    assert engine.ttl("s", "k") is None
    assert not engine.touch("s", "absent", ttl=5)


def test_events_of_keys_that_expire_arrive(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine, events = open_bridge(remote.url, events="remote"), Seen()
    engine.on_change(events=("expired",))(events)
    engine.set("s", "forever", 1)  # the registration is in effect when this has its answer

    began_ms = time.time_ns() // 1_000_000
    engine.set("s", "k", {"n": 1}, ttl=0.05)

    (event,) = events.wait_for(1)
    assert (event.event_type, event.key, event.old_value, event.new_value) == ("state:expired", "k", {"n": 1}, None)
    assert event.expired_at is not None
    assert event.expired_at >= began_ms + 50
    assert event.late_ms is not None


def test_durable_is_answered_by_the_other_engine(engine: Engine, open_bridge: OpenBridge, tmp_path: Path) -> None:
    remote = RemoteProcess(tmp_path)
    try:
        stored = open_bridge(remote.url)
        assert stored.set("s", "durable", 1, durable=True).revision > 0
        assert stored.modify("s", "durable", lambda value: value + 1, durable=True).new_value == 2
        stored.close()
    finally:
        remote.stop()
    with pytest.raises(Unsupported):
        engine.set("s", "k", 1, durable=True)  # that engine keeps its scopes in memory only
    assert engine.get("s", "k") is None


def test_tasks_and_messages_do_the_same(engine: Engine) -> None:
    async def work() -> None:
        await engine.aio.set("s", "n", 1, if_absent=True)
        await asyncio.gather(*[engine.aio.modify("s", "n", lambda value: value + 1) for _ in range(5)])
        assert await engine.aio.transact("s", lambda tx: tx["n"]) == 6

    asyncio.run(work())
    waiting = [
        engine.ask(messages.Modify("s", "n", lambda value: value * 2), block=False),
        engine.ask(messages.Set("s", "n", 1), block=False),
        engine.ask(messages.Modify("s", "n", lambda value: value + 1), block=False),
        engine.ask(messages.Transact("s", lambda tx: tx.get("n")), block=False),
        engine.ask(messages.Get("s", "n"), block=False),
    ]
    assert [reply.get(timeout=PATIENCE_S) for reply in waiting][3:] == [2, 2]


def test_bad_input_is_refused_on_this_side(engine: Engine) -> None:
    with pytest.raises(DeserializationError):
        engine.set("s", "k", 1, if_revision=-1)
    with pytest.raises(DeserializationError):
        engine.set("s", "k", 1, ttl=1, keep_ttl=True)


def test_engine_call_reaches_the_other_engine(engine: Engine) -> None:
    call: Callable[..., Any] = lambda name, **fields: engine.call(f"state::{name}", {"scope": "s", **fields})  # noqa: E731 - short
    assert call("compare-and-set", key="k", value=1) == {"swapped": True}
    assert call("compare-and-set", key="k", value=2) == {"swapped": False, "current": 1}
    assert call("transaction", ops=[{"type": "set", "key": "b", "value": 2}])["committed"]
    refused = call("transaction", checks=[{"key": "k", "absent": True}], ops=[])
    assert (refused["committed"], refused["conflicts"][0]["key"], refused["errors"]) == (False, "k", [])
    first = call("list_entries", limit=1)
    assert (first["entries"], first["total"], first["offset"]) == ([["b", 2]], 2, 0)
    assert call("list_entries", limit=1, cursor=first["next_cursor"])["entries"] == [["k", 1]]
    by_seek = call("list_entries", limit=1, prefix="")
    assert call("list_entries", limit=1, prefix="", cursor=by_seek["next_cursor"])["entries"] == [["k", 1]]
    assert call("list_keys") == {"keys": ["b", "k"]}
    assert call("count") == {"count": 2}
    assert call("touch", key="k", ttl_ms=5000) == {"touched": True}
    assert call("get-entry", key="k")["value"] == 1
    assert call("delete-range", prefix="") == {"deleted": 2, "more": False}
