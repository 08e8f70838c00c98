"""Durable triggers on files: what is delivered, after restarts too, what is kept, and what engines say of consumers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Delivery, Discard, Engine, Retry, StateEvent
from scopestate.actors import durable as durable_module
from scopestate.actors import fetching as fetching_module
from scopestate.actors import journal_consumer as journal_consumer_module
from scopestate.errors import (
    Compacted,
    ConfigError,
    Conflict,
    DeserializationError,
    InvalidCursor,
    InvalidRegistration,
    StorageError,
    Unsupported,
)
from scopestate.ops import update_ops

PATIENCE_S = 60.0


class Opener:
    """Opens engines on one store, one after the other."""

    def __init__(self, path: Path, durability: str) -> None:
        self.path = path
        self.durability = durability
        self.engine: Engine | None = None

    def __call__(self, **limits: Any) -> Engine:
        self.close()
        options = {"store_method": "file_based", "file_path": str(self.path), "durability": self.durability}
        state: dict[str, Any] = {"adapter": {"name": "kv", "config": {**options, "save_interval_ms": 60_000}}}
        scopes = [{"name": "volatile", "durability": "memory"}]
        workers = [{"name": "iii-state", "config": state}]
        self.engine = Engine.from_config({"workers": workers, "scopes": scopes, "limits": limits})
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


@pytest.fixture(params=["commit", "interval"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)
    opener = Opener(tmp_path / "store", request.param)
    yield opener
    opener.close()
    logging.getLogger("scopestate").setLevel(logging.NOTSET)


def no_retry(**options: Any) -> dict[str, Any]:
    return {"retry": Retry(attempts=1), **options}


def test_each_write_is_delivered_once_it_is_on_disk(opened: Opener) -> None:
    engine = opened()
    seen: list[tuple[str, Any, str, str]] = []

    @engine.on_change(scope="orders", durable="ship")
    def ship(event: StateEvent, delivery: Delivery) -> None:
        seen.append((event.key, event.new_value, event.event_type, delivery.consumer))

    engine.set("orders", "a", 1)
    engine.set("orders", "a", 2)
    engine.delete("orders", "a")
    engine.set("others", "a", 3)
    engine.drain(PATIENCE_S)

    assert seen == [
        ("a", 1, "state:created", "ship"),
        ("a", 2, "state:updated", "ship"),
        ("a", None, "state:deleted", "ship"),
    ]
    assert engine.consumers()["ship"].lag_events == 0


def test_what_is_written_while_the_trigger_is_gone_is_delivered_when_it_is_back(opened: Opener) -> None:
    engine = opened()
    engine.register_function("f", lambda event: None)
    handle = engine.register_trigger(function_id="f", scope="orders", durable="ship")
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    handle.unregister()
    engine.set("orders", "a", 2)

    engine = opened()
    assert any("'ship' has no trigger" in problem for problem in engine.health().problems)
    engine.set("orders", "a", 3)
    assert engine.consumers()["ship"].trigger is None
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="ship")(lambda event: seen.append(event.new_value))
    engine.drain(PATIENCE_S)

    assert seen == [2, 3]
    assert engine.health().ok


def test_a_trigger_whose_function_is_not_registered_keeps_its_events(opened: Opener) -> None:
    engine = opened()
    engine.register_trigger(function_id="later", scope="orders", durable="ship", retry={"attempts": 1})
    engine.set("orders", "a", 1)
    seen = threading.Event()

    assert any("'later'" in problem for problem in engine.health().problems)
    engine.register_function("later", lambda event: seen.set())

    assert seen.wait(PATIENCE_S)
    assert engine.dead_letters().count() == 0


def test_a_renamed_trigger_is_a_new_consumer(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="one")(lambda event: None)
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    engine = opened()
    engine.on_change(scope="orders", durable="two")(lambda event: seen.append(event.new_value))
    engine.set("orders", "a", 2)
    engine.drain(PATIENCE_S)

    assert seen == [2]
    assert [status.name for status in engine.consumers()] == ["one", "two"]


def test_the_same_name_again_takes_the_place_and_keeps_what_waits(opened: Opener) -> None:
    engine = opened()
    seen: list[tuple[str, Any]] = []

    def old(event: StateEvent) -> None:
        seen.append(("old", event.new_value))
        raise OSError("away")

    engine.on_change(scope="orders", durable="ship", retry=Retry(first=30.0))(old)
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    engine.on_change(scope="orders", durable="ship")(lambda event: seen.append(("new", event.new_value)))
    engine.set("orders", "b", 2)
    engine.drain(PATIENCE_S)

    assert seen == [("old", 1), ("new", 2)]
    assert len(engine.triggers()) == 1
    assert engine.consumers()["ship"].waiting == 1


def test_a_consumer_that_begins_at_the_earliest_gets_what_the_journal_has(opened: Opener) -> None:
    engine = opened()
    engine.on_change(scope="orders", durable="slow")(lambda event: None)
    engine.consumers().pause("slow")
    for number in range(5):
        engine.set("orders", "a", number)
    engine.drain(PATIENCE_S)
    seen: list[Any] = []

    engine.on_change(scope="orders", durable="all", start="earliest")(lambda event: seen.append(event.new_value))
    engine.drain(PATIENCE_S)

    assert seen == [0, 1, 2, 3, 4]


def test_a_consumer_begins_at_the_cursor_of_a_watch(opened: Opener) -> None:
    engine = opened()
    engine.on_change(scope="orders", durable="slow")(lambda event: None)
    engine.consumers().pause("slow")
    with engine.scope("orders").watch(snapshot=False) as one, engine.watch() as many:
        engine.set("orders", "a", 1)
        cursors = [one.get(timeout=PATIENCE_S).cursor, next(many).cursor]
        engine.set("orders", "a", 2)
        engine.set("orders", "b", 3)
        engine.flush()
    seen: dict[str, list[Any]] = {"one": [], "many": []}
    for name, cursor in zip(seen, cursors, strict=True):

        def ship(event: StateEvent, name: str = name) -> None:
            seen[name].append(event.new_value)

        engine.on_change(scope="orders", durable=name, start=cursor)(ship)
    engine.drain(PATIENCE_S)

    assert {name: sorted(values) for name, values in seen.items()} == {"one": [2, 3], "many": [2, 3]}
    with Engine() as other, other.watch() as changes:
        other.set("orders", "a", 1)
        foreign = next(changes).cursor
    with pytest.raises(Compacted):
        engine.on_change(scope="orders", durable="foreign", start=foreign)(lambda event: None)
    with pytest.raises(InvalidCursor):
        engine.on_change(scope="orders", durable="damaged", start="nonsense")(lambda event: None)
    assert [status.name for status in engine.consumers()] == ["many", "one", "slow"]


def test_a_paused_consumer_keeps_its_events_over_a_restart(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []

    def ship(event: StateEvent) -> None:
        seen.append(event.new_value)

    engine.on_change(scope="orders", durable="ship")(ship)
    engine.consumers().pause("ship", "maintenance")
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    assert seen == []
    assert engine.consumers()["ship"].paused == "maintenance"

    engine = opened()
    engine.on_change(scope="orders", durable="ship")(ship)
    engine.drain(PATIENCE_S)
    assert seen == []
    assert any("maintenance" in problem for problem in engine.health().problems)
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)

    assert seen == [1]


def test_a_forgotten_consumer_is_gone_with_its_events_and_letters(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []

    def ship(event: StateEvent) -> None:
        if event.new_value == 1:
            raise Discard("no")
        seen.append(event.new_value)

    engine.on_change(scope="orders", durable="ship")(ship)
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    engine.consumers().pause("ship")
    engine.set("orders", "a", 2)
    engine.drain(PATIENCE_S)

    engine.consumers().forget("ship")
    engine.set("orders", "a", 3)
    engine.drain(PATIENCE_S)

    assert seen == [3]
    assert engine.dead_letters().count() == 0
    with pytest.raises(InvalidRegistration, match="no consumer 'other'"):
        engine.consumers().forget("other")


@pytest.mark.parametrize("start", ["earliest", "cursor"])
def test_a_forgotten_consumer_goes_on_from_then_on_wherever_it_had_begun(opened: Opener, start: str) -> None:
    engine = opened()
    engine.on_change(scope="orders", durable="slow")(lambda event: None)
    engine.consumers().pause("slow")  # so the journal keeps what the other one is given again
    if start == "cursor":
        with engine.watch(scope_prefix="", snapshot=False) as watch:
            engine.set("orders", "a", 0)
            start = watch.get(PATIENCE_S).cursor
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="ship", start=start)(lambda event: seen.append(event.new_value))
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    if start != "earliest":
        engine.consumers().forget("slow")  # and now what is behind the cursor is trimmed
        engine.set("orders", "b", 2)
        engine.drain(PATIENCE_S)
        engine.flush()

    engine.consumers().forget("ship")
    before = len(seen)
    engine.set("orders", "a", 3)
    engine.drain(PATIENCE_S)

    assert seen[before:] == [3]


def test_one_that_is_behind_reads_pages_from_disk_in_order(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="ship")(lambda event: seen.append(event.new_value))
    engine.consumers().pause("ship")
    with engine.batch("orders") as writes:
        for number in range(900):
            writes.set(f"k{number}", number)
    for burst in range(8):
        with engine.batch("orders") as writes:
            for number in range(900):
                writes.set(f"k{number}", 1000 * (burst + 1) + number)
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)

    assert len(seen) == 8100
    for number in range(0, 900, 100):
        assert [value for value in seen if value % 1000 == number] == [1000 * burst + number for burst in range(9)]


# ------------------------------------------------------------------------------------------------------- dead letters


def failing_on(bad: Any, seen: list[Any]) -> Callable[[StateEvent], None]:
    def ship(event: StateEvent) -> None:
        seen.append(event.new_value)
        if event.new_value in bad:
            raise ValueError("no address")

    return ship


def test_a_dead_letter_tells_what_happened_and_can_be_replayed(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []
    bad = {1}
    engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=2, first=0.0))(failing_on(bad, seen))
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    letters = engine.dead_letters("ship")
    (letter,) = letters.list()
    assert (letter.consumer, letter.attempts, letter.error) == ("ship", 2, "ValueError: no address")
    assert letter.event.new_value == 1
    assert "in ship" in letter.traceback
    assert letter.first_at <= letter.died_at
    assert letters.get(letter.id) == letter
    assert engine.dead_letters("other").list() == []

    bad.clear()
    assert letters.replay([letter.id]) == 1
    engine.drain(PATIENCE_S)
    assert seen == [1, 1, 1]
    assert letters.count() == 0
    assert engine.consumers()["ship"].dead == 0


def test_a_replay_resets_every_field_that_decides_when_it_is_tried(opened: Opener) -> None:
    """As strata 378, where a replayed job kept its schedule and never ran."""
    engine = opened()
    attempts: list[int] = []
    fail = [True]

    def ship(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if fail[0]:
            raise ValueError("no")

    engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=2, first=0.0))(ship)
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    before = engine.dead_letters().list()[0].first_ms
    engine.dead_letters().replay(all=True)
    engine.drain(PATIENCE_S)
    assert attempts == [1, 2, 1, 2]
    again = engine.dead_letters().list()[0]
    assert again.attempts == 2
    assert again.first_ms > before

    engine.dead_letters().replay(all=True, reset=False)
    engine.drain(PATIENCE_S)
    assert attempts[4:] == [3]

    # Over a restart between the replay and the delivery too.
    engine.consumers().pause("ship")
    engine.dead_letters().replay(all=True)
    engine = opened()
    fail[0] = False
    engine.on_change(scope="orders", durable="ship")(ship)
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert attempts[5:] == [1]


@pytest.mark.parametrize("how", ["replay", "purge", "purge after a restart"])
def test_what_blocks_its_key_is_released_by_a_replay_or_a_purge(opened: Opener, how: str) -> None:
    engine = opened()
    seen: list[Any] = []
    bad = {1}
    options = no_retry(scope="orders", durable="ship", on_giving_up="block")
    engine.on_change(**options)(failing_on(bad, seen))
    for key, value in (("a", 1), ("a", 2), ("b", 3)):
        engine.set("orders", key, value)
    engine.drain(PATIENCE_S)
    assert sorted(seen) == [1, 3]

    if "restart" in how:
        engine = opened()
        engine.on_change(**options)(failing_on(bad, seen))
        engine.set("orders", "a", 4)
        engine.drain(PATIENCE_S)
        assert sorted(seen) == [1, 3]
    bad.clear()
    if how == "replay":
        assert engine.dead_letters("ship").replay(all=True) == 1
    else:
        assert engine.dead_letters("ship").purge(all=True) == 1
    engine.drain(PATIENCE_S)

    assert [value for value in seen if value != 3] == {"replay": [1, 1, 2], "purge": [1, 2]}.get(how, [1, 2, 4])
    assert engine.dead_letters().count() == 0


def test_a_full_list_of_dead_letters_pauses_and_health_says_so(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []
    engine.on_change(**no_retry(scope="orders", durable="ship", max_dead=2))(failing_on(range(10), seen))
    for number in range(4):
        engine.set("orders", str(number), number)
    engine.drain(PATIENCE_S)

    assert engine.dead_letters().count() == 2
    assert any("dead letters is full" in problem for problem in engine.health().problems)
    engine.dead_letters().purge([letter.id for letter in engine.dead_letters().list()])
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert engine.dead_letters().count() == 2
    assert {letter.event.new_value for letter in engine.dead_letters().list()} | set(seen) == {0, 1, 2, 3}


def test_nothing_is_replayed_or_purged_by_leaving_everything_out(opened: Opener) -> None:
    engine = opened()
    for call in (engine.dead_letters().replay, engine.dead_letters().purge):
        with pytest.raises(Exception, match="takes the ids of letters, or"):
            call()


# ------------------------------------------------------------------------------------------------------- transactions


def test_a_transaction_writes_and_acknowledges_in_one_step(opened: Opener) -> None:
    engine = opened()
    problems: list[BaseException] = []

    @engine.on_change(scope="orders", durable="count", retry=Retry(attempts=2, first=0.0))
    def count(event: StateEvent, delivery: Delivery) -> None:
        with delivery.transaction("totals") as tx:
            tx.set("sum", tx.get("sum", 0) + event.new_value)
            assert tx.get("sum") >= event.new_value
            tx.update("log", [update_ops.Append("", str(event.new_value))])
            tx.set("gone", 1)
            tx.delete("gone")
        try:
            delivery.transaction("totals").__enter__()
        except Unsupported as error:
            problems.append(error)
        raise ValueError("after it: not tried again")

    for number in range(20):
        engine.set("orders", str(number % 4), number)
    engine.drain(PATIENCE_S)

    assert engine.get("totals", "sum") == sum(range(20))
    assert len(problems) == 20
    assert engine.dead_letters().count() == 0
    engine = opened()
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="count")(lambda event: seen.append(event.new_value))
    engine.drain(PATIENCE_S)
    assert seen == []
    assert engine.get("totals", "sum") == sum(range(20))


def test_a_transaction_whose_block_raises_writes_nothing_and_counts_as_a_failure(opened: Opener) -> None:
    engine = opened()
    attempts: list[int] = []

    @engine.on_change(scope="orders", durable="count", retry=Retry(attempts=2, first=0.0))
    def count(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        with delivery.transaction("totals") as tx:
            tx.set("n", delivery.attempt)
            if delivery.attempt == 1:
                raise OSError("away")

    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    assert attempts == [1, 2]
    assert engine.get("totals", "n") == 2


def test_a_conflict_of_a_transaction_is_tried_again_and_is_no_failure(opened: Opener) -> None:
    engine = opened()
    attempts: list[int] = []
    engine.set("totals", "n", 0)

    @engine.on_change(**no_retry(scope="orders", durable="count"))
    def count(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        with delivery.transaction("totals") as tx:
            n = tx.get("n")
            if len(attempts) == 1:
                engine.set("totals", "n", 10)
            tx.set("n", n + 1)

    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    assert attempts == [1, 1]
    assert engine.get("totals", "n") == 11
    assert engine.dead_letters().count() == 0


def test_a_transaction_that_caught_its_conflict_may_be_tried_again_in_the_handler(opened: Opener) -> None:
    engine = opened()
    engine.set("totals", "n", 0)

    @engine.on_change(**no_retry(scope="orders", durable="count"))
    def count(event: StateEvent, delivery: Delivery) -> None:
        for attempt in range(2):
            try:
                with delivery.transaction("totals") as tx:
                    n = tx.get("n")
                    if attempt == 0:
                        engine.set("totals", "n", 10)
                    tx.set("n", n + 1)
            except Conflict:
                continue

    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    assert engine.get("totals", "n") == 11


def test_a_transaction_in_a_coroutine(opened: Opener) -> None:
    engine = opened()

    @engine.on_change(scope="orders", durable="count", concurrency=4)
    async def count(event: StateEvent, delivery: Delivery) -> None:
        async with delivery.transaction("totals") as tx:
            tx.set("n", await tx.get("n", 0) + 1)

    for number in range(20):
        engine.set("orders", str(number), number)
    engine.drain(PATIENCE_S)

    assert engine.get("totals", "n") == 20


def test_a_transaction_that_changes_nothing_acknowledges_all_the_same(opened: Opener) -> None:
    engine = opened()
    calls: list[int] = []

    @engine.on_change(scope="orders", durable="count")
    def count(event: StateEvent, delivery: Delivery) -> None:
        calls.append(1)
        with delivery.transaction("totals") as tx:
            tx.get("n")

    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)
    engine = opened()
    engine.on_change(scope="orders", durable="count")(lambda event: calls.append(2))
    engine.drain(PATIENCE_S)

    assert calls == [1]


def test_a_transaction_needs_a_scope_that_is_saved(opened: Opener) -> None:
    engine = opened()
    problems: list[Unsupported] = []

    @engine.on_change(scope="orders", durable="count")
    def count(event: StateEvent, delivery: Delivery) -> None:
        try:
            with delivery.transaction("volatile") as tx:
                tx.set("n", 1)
        except Unsupported as error:
            problems.append(error)

    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    assert "never saved" in str(problems[0])
    assert engine.get("volatile", "n") is None


# ----------------------------------------------------------------------------------------------------------- refusals


def test_where_nothing_is_saved_a_durable_trigger_is_refused_with_what_to_do(opened: Opener) -> None:
    engine = opened()
    with pytest.raises(ConfigError, match="durability: interval"):
        engine.on_change(scope="volatile", durable="ship")(lambda event: None)
    with Engine() as memory:
        with pytest.raises(ConfigError, match="store_method: file_based"):
            memory.on_change(scope="orders", durable="ship")(lambda event: None)
        assert list(memory.consumers()) == []
        assert memory.dead_letters().list() == []
        with pytest.raises(Unsupported):
            memory.consumers().pause("ship")


# -------------------------------------------------------------------------------------------------------------- asyncio


def test_consumers_and_letters_for_asyncio(opened: Opener) -> None:
    engine = opened()
    seen: list[Any] = []
    bad = {1}
    engine.on_change(**no_retry(scope="orders", durable="ship"))(failing_on(bad, seen))
    engine.set("orders", "a", 1)
    engine.drain(PATIENCE_S)

    async def run() -> None:
        letters = engine.aio.dead_letters("ship")
        (letter,) = await letters.list()
        assert (await letters.get(letter.id)) == letter
        assert await letters.count() == 1
        await engine.aio.consumers().pause("ship")
        assert [(one.name, one.paused) for one in await engine.aio.consumers()] == [("ship", "paused by the program")]
        await engine.aio.consumers().resume("ship")
        bad.clear()
        assert await letters.replay([letter.id]) == 1
        await engine.aio.drain(PATIENCE_S)
        assert await letters.purge(all=True) == 0

    asyncio.run(run())
    assert seen == [1, 1]


def test_a_handler_that_runs_when_the_engine_closes_may_end_and_others_are_delivered_later(opened: Opener) -> None:
    engine = opened(close_grace_ms=5000)
    begun, go = threading.Event(), threading.Event()
    seen: list[Any] = []

    def ship(event: StateEvent) -> None:
        begun.set()
        assert go.wait(PATIENCE_S)
        seen.append(event.new_value)

    engine.on_change(scope="orders", durable="ship", retry=Retry(first=100.0))(ship)
    engine.set("orders", "a", 1)
    assert begun.wait(PATIENCE_S)
    closing = threading.Thread(target=engine.close)
    closing.start()
    go.set()
    closing.join(PATIENCE_S)
    opened.engine = None
    assert seen == [1]

    engine = opened()
    engine.on_change(scope="orders", durable="ship")(ship)
    engine.drain(PATIENCE_S)
    assert seen == [1]


def test_a_store_that_fails_delivers_nothing_before_it_works_again(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    seen: list[Any] = []
    engine.on_change(scope="orders", durable="ship")(lambda event: seen.append(event.new_value))
    store = engine._parts.backend.store
    assert store is not None
    real = store.save
    with monkeypatch.context() as patch:

        def broken(*given: Any) -> None:
            raise StorageError("no space left")

        patch.setattr(store, "save", broken)
        if opened.durability == "commit":
            with pytest.raises(StorageError):
                engine.set("orders", "a", 1)
        else:
            engine.set("orders", "a", 1)
            with pytest.raises(StorageError):
                engine.drain(PATIENCE_S)
        assert seen == []
    assert store.save == real
    engine.set("orders", "a", 2)
    engine.drain(PATIENCE_S)

    assert seen == ([2] if opened.durability == "commit" else [1, 2])


@pytest.mark.parametrize("handler", [lambda: None, lambda event, delivery, more: None, lambda event, *, more: None])
def test_a_handler_that_cannot_take_a_delivery_is_refused_at_once(opened: Opener, handler: Any) -> None:
    engine = opened()

    with pytest.raises(InvalidRegistration, match=r"takes \(event\), or \(event, delivery\)"):
        engine.on_change(scope="orders", durable="ship")(handler)

    assert (list(engine.consumers()), engine.triggers()) == ([], [])


def test_a_name_that_has_another_function_already_is_logged(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    engine = opened()
    engine.on_change(scope="orders", durable="ship", function_id="first")(lambda event: None)
    with caplog.at_level(logging.WARNING, "scopestate"):
        engine.register_trigger(function_id="first", scope="orders", prefix="o-", durable="ship")
        assert caplog.messages == []
        engine.on_change(scope="orders", durable="ship", function_id="second")(lambda event: None)

    [message] = caplog.messages
    assert "'ship'" in message
    assert "'second' instead of 'first'" in message


def test_what_cannot_be_is_refused_with_what_may_be(opened: Opener) -> None:
    engine = opened()

    with pytest.raises(InvalidCursor, match='as `start` give "now", "earliest", or the whole cursor'):
        engine.on_change(scope="orders", durable="ship", start="latest")(lambda event: None)
    with pytest.raises(DeserializationError, match="a datetime with a time zone, not int"):
        engine.dead_letters().purge(before=5)  # type: ignore[arg-type]


def test_a_consumer_begins_at_the_cursor_of_a_scope_with_a_long_name(opened: Opener) -> None:
    engine = opened()
    with engine.scope("s" * 1000).watch() as changes:
        cursor = changes.cursor

    engine.on_change(scope="s" * 1000, durable="ship", start=cursor)(lambda event: None)

    assert [consumer.name for consumer in engine.consumers()] == ["ship"]


def test_an_overdue_attempt_names_its_limit(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    engine = opened()
    waiting = threading.Event()

    @engine.on_change(scope="orders", durable="ship", ack_wait=0.05, retry=Retry(attempts=1))
    def ship(event: StateEvent) -> None:
        waiting.wait(PATIENCE_S)

    overdue: list[str] = []
    engine.on_error(lambda failure: (overdue.append(str(failure.error)), waiting.set()))
    with caplog.at_level(logging.ERROR, "scopestate"):
        engine.set("orders", "o-1", 1)
        engine.drain(PATIENCE_S)

    assert ["is overdue at attempt 1" in message for message in caplog.messages] == [True, False]
    assert {text.endswith("did not end within 0.05 s (ack_wait)") for text in overdue} == {True}


@pytest.mark.parametrize("options", [{}, {"debounce": 0.01}, {"batch": 3}])
def test_what_waits_in_memory_is_bounded_in_bytes(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(journal_consumer_module, "MOST_LIVE_BYTES", 2_000)
    monkeypatch.setattr(fetching_module, "MOST_HELD_BYTES", 2_000)
    monkeypatch.setattr(fetching_module, "FETCHED", 4)
    engine = opened()
    gate, seen = threading.Event(), list[Any]()

    def slow(given: Any) -> None:
        assert gate.wait(PATIENCE_S)
        seen.extend(event.new_value for event in (given if isinstance(given, list) else [given]))

    engine.on_change(scope="orders", durable="ship", **options)(slow)
    for number in range(100):
        engine.set("orders", "k", f"{number:0200}")
    engine.flush()
    handler = engine._router.triggers.handlers()[0]
    assert isinstance(handler, durable_module.DurableHandler)
    assert handler.depth() < 30
    assert len(handler.port._live) <= 10  # type: ignore[attr-defined]  # it is one of the journal
    gate.set()
    engine.drain(PATIENCE_S)

    assert [int(value) for value in seen][-1] == 99
    assert seen == sorted(seen)
    if "debounce" not in options:
        assert len(seen) == 100


def test_what_is_purged_makes_room_for_others(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching_module, "MOST_HELD_BYTES", 1_000)
    monkeypatch.setattr(fetching_module, "FETCHED", 4)
    engine = opened()
    seen: list[Any] = []
    blocks = no_retry(on_giving_up="block")

    @engine.on_change(scope="orders", durable="ship", **blocks)
    def ship(event: StateEvent) -> None:
        if event.key.startswith("bad"):
            raise ValueError("no")
        seen.append(event.key)

    for number in range(12):
        engine.set("orders", f"bad{number}", "x" * 200)
    engine.set("orders", "good", "x" * 200)
    deadline = time.monotonic() + PATIENCE_S
    while not seen:
        engine.dead_letters("ship").purge(all=True)
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert seen == ["good"]


def test_an_error_that_cannot_be_shown_is_given_up_as_any_other(opened: Opener) -> None:
    class Odd(Exception):
        @property
        def __notes__(self) -> list[str]:
            raise ValueError("it has none")

    engine = opened()
    seen: list[str] = []

    @engine.on_change(scope="orders", durable="ship", order="trigger", **no_retry())
    def ship(event: StateEvent) -> None:
        if event.key == "bad":
            raise Odd("no")
        seen.append(event.key)

    engine.set("orders", "bad", 1)
    engine.set("orders", "good", 1)
    engine.drain(PATIENCE_S)

    assert seen == ["good"]
    (letter,) = engine.dead_letters("ship").list()
    assert letter.error.startswith("Odd")
    assert "in ship" in letter.traceback


def test_a_full_list_of_dead_letters_is_noticed_although_lists_of_events_are_given_up(opened: Opener) -> None:
    engine = opened()

    @engine.on_change(scope="orders", durable="ship", batch=3, batch_wait=PATIENCE_S, max_dead=4, **no_retry())
    def ship(events: list[StateEvent]) -> None:
        raise ValueError("no")

    for number in range(15):
        engine.set("orders", f"k{number}", 1)
    engine.drain(PATIENCE_S)

    assert 4 <= engine.dead_letters("ship").count() <= 6  # the last list that had a place, and all of it
    assert "full" in (engine.consumers()["ship"].paused or "")


def test_health_does_not_wait_for_a_disk_that_a_registration_waits_for(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    engine.on_change(scope="orders", durable="ship")(lambda event: None)
    engine.consumers().pause("ship", "for the test")
    journal = engine._router.feed.journal
    waits, goes_on, create = threading.Event(), threading.Event(), journal.create_consumer  # type: ignore[union-attr]

    def slow(*given: Any) -> Any:
        waits.set()
        assert goes_on.wait(PATIENCE_S)
        return create(*given)

    monkeypatch.setattr(journal, "create_consumer", slow)
    problems: list[str] = []
    register = threading.Thread(target=lambda: engine.on_change(scope="orders", durable="bill")(lambda event: None))
    look = threading.Thread(target=lambda: problems.extend(engine.health().problems))
    register.start()
    assert waits.wait(PATIENCE_S)
    look.start()
    look.join(PATIENCE_S / 4)
    found = list(problems)
    goes_on.set()
    register.join(PATIENCE_S)
    look.join(PATIENCE_S)
    assert any("for the test" in problem for problem in found)


def test_while_its_function_is_missing_few_events_wait_in_memory(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_module, "TROUBLE_S", 0.05)
    monkeypatch.setattr(fetching_module, "FETCHED", 10)
    engine = opened()
    seen: list[Any] = []
    engine.register_function("ship", lambda event: None)
    engine.register_trigger(function_id="ship", config={"scope": "orders", "durable": "ship"})
    engine.unregister_function("ship")
    with engine.batch("orders") as writes:
        for number in range(300):
            writes.set(f"k{number}", number)
    engine.flush()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        assert engine.consumers()["ship"].waiting <= 20
        time.sleep(0.01)
    engine.register_function("ship", lambda event: seen.append(event.new_value))
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < 300:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert sorted(seen) == list(range(300))


def test_a_transaction_of_a_delivery_that_is_over_is_refused(opened: Opener) -> None:
    """Its effects would be there twice: another engine, or a transaction whose answer was lost, has acknowledged it."""
    engine = opened()
    done = threading.Event()
    positions: list[int] = []

    @engine.on_change(scope="orders", durable="ship")
    def ship(event: StateEvent, delivery: Delivery) -> None:
        positions.append(int(delivery.id.rpartition(":")[2]))
        with delivery.transaction("totals") as tx:
            tx.set("sum", tx.get("sum", 0) + event.new_value)
        done.set()

    engine.set("orders", "a", 5, durable=True)
    engine.drain(PATIENCE_S)
    assert done.is_set()
    consumers: Any = engine._parts.snapshot.consumers
    (consumer,) = consumers._by_name.values()

    with pytest.raises(Unsupported, match="was handled before"):
        consumer.transaction(positions[0], "totals")
    assert engine.get("totals", "sum") == 5
