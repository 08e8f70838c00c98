"""Durable triggers over Redis: one engine of all handles each event, whatever dies, and in the order of its key."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from durable_process import DurableProcess
from event_engines import STREAM, Engines, problems
from one_server import PATIENCE_S
from servers import Server, StartServer, wait_until

from scopestate import Delivery, Discard, Engine, Retry, RetryLater, StateEvent, ops
from scopestate.errors import Compacted, ConfigError, StorageError

QUICK = Retry(attempts=3, first=0.01, factor=1.0, jitter=0.0)


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def open_one(engines: Engines, server: Server, **options: Any) -> Engine:
    return engines.open(server, **{"revisions": True, **options})


class Handled:
    """A handler that remembers what it was given."""

    def __init__(self, engine: Engine, name: str = "ship", beside: Handled | None = None, **options: Any) -> None:
        """`beside`: another one, with which it shares what it remembers."""
        self.seen: list[tuple[str, Any, int]] = [] if beside is None else beside.seen
        self.ids: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: dict[str, int] = {}
        """Key -> how many attempts with it fail."""
        self._counts: Counter[str] = Counter()
        engine.on_change(durable=name, **{"retry": QUICK, **options})(self._handle)

    def _handle(self, event: StateEvent, delivery: Delivery) -> None:
        assert self.gate.wait(PATIENCE_S)
        self.seen.append((event.key, event.new_value, delivery.attempt))
        self.ids.append(delivery.id)
        self._counts[event.key] += 1
        if self._counts[event.key] <= self.fails.get(event.key, 0):
            raise ValueError("not yet")

    def wait_for(self, count: int) -> list[tuple[str, Any, int]]:
        wait_until(lambda: len(self.seen) >= count, lambda: f"only {self.seen!r:.2000}")
        return list(self.seen)


def idle(engine: Engine, name: str = "ship") -> bool:
    consumers = engine._parts.consumers
    assert consumers is not None
    status = consumers._consumers.status(name)
    return status is not None and status.lag_events == 0


# -------------------------------------------------------------------------------------------------------- one of all


def test_each_event_goes_to_one_engine_and_each_key_is_in_order(redis_server: Server, engines: Engines) -> None:
    opened = [open_one(engines, redis_server) for _ in range(3)]
    handled = [Handled(engine, scope="s") for engine in opened]
    for number in range(300):
        opened[number % 3].set("s", f"k{number % 10}", number)
    wait_until(lambda: sum(len(one.seen) for one in handled) >= 300, "all handled")
    wait_until(lambda: idle(opened[0]), "all acknowledged")
    together = [each for one in handled for each in one.seen]
    assert sorted(value for _, value, _ in together) == list(range(300))
    assert {attempt for _, _, attempt in together} == {1}
    for one in handled:
        for key in {key for key, _, _ in one.seen}:
            values = [value for other, value, _ in one.seen if other == key]
            assert values == sorted(values)


def test_two_names_each_get_every_event_and_an_engine_without_the_trigger_takes_none(
    valkey: Server, engines: Engines
) -> None:
    writer, one = open_one(engines, valkey), open_one(engines, valkey)
    first, second = Handled(one, "first"), Handled(one, "second")
    for number in range(20):
        writer.set("s", "k", number)
    for handled in (first, second):
        assert [value for _, value, _ in handled.wait_for(20)] == list(range(20))


def test_what_is_written_while_no_engine_is_there_is_handled_later(valkey: Server, engines: Engines) -> None:
    writer, one = open_one(engines, valkey), open_one(engines, valkey)
    Handled(one)
    one.close()
    for number in range(5):
        writer.set("s", "k", number)
    again = Handled(open_one(engines, valkey))
    assert [value for _, value, _ in again.wait_for(5)] == list(range(5))


def test_a_consumer_begins_at_the_cursor_of_a_watch(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    cursors: dict[str, str] = {}
    with one.watch(snapshot=False) as many, one.watch("s", snapshot=False) as alone:
        for number in range(6):
            one.set("s", "k", number)
            many.get(PATIENCE_S)
            alone.get(PATIENCE_S)
            if number == 2:
                cursors = {"many": many.cursor, "alone": alone.cursor}
    for name, cursor in cursors.items():
        assert [value for _, value, _ in Handled(one, name, start=cursor).wait_for(3)] == [3, 4, 5]
    assert len(Handled(one, "earliest", start="earliest").wait_for(6)) == 6
    wait_until(lambda: idle(one, "earliest"), "handled")
    assert one.stats().store["events_missed"] == 0
    valkey.ask("XTRIM", STREAM, "MAXLEN", 2)
    for name, cursor in cursors.items():
        with pytest.raises(Compacted, match="no longer kept"):
            Handled(one, f"late-{name}", start=cursor)


def test_a_failing_key_holds_back_only_itself_also_on_other_engines(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    retry = Retry(attempts=5, first=0.2, factor=1.0)
    first = Handled(one, retry=retry)
    second = Handled(two, beside=first, retry=retry)
    first.fails["bad"] = second.fails["bad"] = 2
    for number in range(4):
        one.set("s", "bad", number)
        one.set("s", f"good{number}", number)
    wait_until(lambda: idle(one), "all handled")
    seen = [each for each in first.seen if each[0] == "bad"]
    values = [value for _, value, _ in seen]
    assert values == sorted(values)
    assert [attempt for _, value, attempt in seen if value == 0] == [1, 2, 3]
    assert set(values) == {0, 1, 2, 3}
    assert len([each for each in first.seen if each[0] != "bad"]) == 4


def test_a_delivery_keeps_its_id_and_its_first_time_over_attempts(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    told: list[tuple[str, int, int]] = []

    @one.on_change(durable="ship", retry=QUICK, metadata={"to": "the moon"})
    def ship(event: StateEvent, delivery: Delivery) -> None:
        told.append((delivery.id, delivery.attempt, delivery.first_ms))
        assert delivery.metadata == {"to": "the moon"}
        if delivery.attempt < 3:
            raise ValueError("no")

    one.set("s", "k", 1)
    wait_until(lambda: len(told) == 3, "three attempts")
    assert [attempt for _, attempt, _ in told] == [1, 2, 3]
    assert len({name for name, _, _ in told}) == len({first for _, _, first in told}) == 1
    assert told[0][0].startswith("ship:")


def test_retry_later_does_not_count_and_discard_gives_up_at_once(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    told: list[tuple[str, int]] = []

    @one.on_change(durable="ship", retry=QUICK)
    def ship(event: StateEvent, delivery: Delivery) -> None:
        told.append((event.key, delivery.attempt))
        if event.key == "late" and told.count(("late", 1)) < 3:
            raise RetryLater(0.01)
        if event.key == "bad":
            raise Discard("no such order")

    one.set("s", "late", 1)
    one.set("s", "bad", 1)
    wait_until(lambda: idle(one), "all handled")
    assert told.count(("late", 1)) == 3
    assert told.count(("bad", 1)) == 1
    consumers: Any = one._parts.consumers
    (letter,) = consumers.letters(None, 10, None)
    assert letter.event.key == "bad"
    assert "no such order" in letter.error


def test_an_error_whose_text_is_not_unicode_is_kept_as_any_other(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)

    @one.on_change(durable="ship", retry=QUICK)
    def ship(event: StateEvent) -> None:
        raise Discard("\ud800") if event.key == "a" else FileNotFoundError(2, "No such file", "\udcff.txt")

    one.set("s", "a", 1)
    one.set("s", "b", 1)
    wait_until(lambda: one.dead_letters("ship").count() == 2, "both given up")
    assert [letter.error for letter in sorted(one.dead_letters("ship").list(), key=lambda one: one.event.key)] == [
        "Discard: \\ud800",
        "FileNotFoundError: [Errno 2] No such file: '\\udcff.txt'",
    ]


def test_what_is_given_up_can_be_replayed(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    handled = Handled(one)
    handled.fails["k"] = 3
    one.set("s", "k", 1)
    consumers: Any = one._parts.consumers
    wait_until(lambda: consumers.count("ship") == 1, "a dead letter")
    (letter,) = consumers.letters("ship", 10, None)
    assert (letter.attempts, letter.event.new_value) == (3, 1)
    assert "ValueError: not yet" in letter.error
    assert consumers.replay("ship", [letter.id], reset=True) == 1
    assert handled.wait_for(4)[3] == ("k", 1, 1)
    assert set(handled.ids) == {letter.id}
    wait_until(lambda: idle(one), "handled")
    assert consumers.count(None) == 0


def test_with_block_a_key_waits_for_its_letter(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    handled = Handled(one, on_giving_up="block", retry=Retry(attempts=1))
    handled.fails["k"] = 1
    for number in range(3):
        one.set("s", "k", number)
    one.set("s", "other", 9)
    consumers: Any = one._parts.consumers
    wait_until(lambda: consumers.count("ship") == 1, "a dead letter")
    wait_until(lambda: ("other", 9, 1) in handled.seen, "the other key")
    one.set("s", "last", 1)
    wait_until(lambda: ("last", 1, 1) in handled.seen, "a later event")
    assert [each for each in handled.seen if each[0] == "k"] == [("k", 0, 1)]
    consumers.replay("ship", None, reset=True)
    wait_until(lambda: idle(one), "all handled")
    assert [value for key, value, _ in handled.seen if key == "k"] == [0, 0, 1, 2]


def test_pause_and_resume_count_for_every_engine(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    handled = [Handled(one), Handled(two)]
    consumers: Any = two._parts.consumers
    assert consumers.pause("ship", "for now")
    wait_until(lambda: "for now" in problems(one), lambda: problems(one))
    for number in range(5):
        one.set("s", f"k{number}", number)
    status = consumers.status("ship")
    assert (status.paused, status.lag_events) == ("for now", 5)
    assert not any(each.seen for each in handled)
    assert consumers.resume("ship")
    wait_until(lambda: idle(one), "all handled")
    assert consumers.names() == ["ship"]
    assert sum(len(each.seen) for each in handled) == 5


def test_a_consumer_without_an_engine_is_reported(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    Handled(one, "gone")
    one.close()
    two = open_one(engines, valkey)
    wait_until(lambda: "'gone'" in problems(two), lambda: problems(two))


def test_a_trigger_that_is_unregistered_leaves_its_events_to_others(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    one.register_function("nothing", lambda event: None)
    trigger = one.register_trigger(function_id="nothing", durable="ship")
    trigger.unregister()
    for number in range(3):
        one.set("s", "k", number)
    assert len(Handled(two).wait_for(3)) == 3


def test_drain_waits_for_durable_deliveries_of_own_writes(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    handled = Handled(one)
    for number in range(50):
        one.set("s", f"k{number}", number)
    one.drain(PATIENCE_S)
    assert len(handled.seen) == 50


def test_events_of_this_engine_only_cannot_be_durable(valkey: Server, engines: Engines) -> None:
    local = engines.open(valkey, events="local")
    with pytest.raises(ConfigError, match="shared"):
        Handled(local)


# ------------------------------------------------------------------------------------------------- a transaction


def test_a_transaction_of_a_delivery_writes_and_acknowledges_in_one_step(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)

    def count(event: StateEvent, delivery: Delivery) -> None:
        with delivery.transaction("counts") as tx:
            tx.set(event.key, (tx.get(event.key) or 0) + 1)
        if event.new_value % 3 == 0:
            raise ValueError("behind the transaction nothing is delivered again")

    for engine in (one, two):
        engine.on_change(scope="s", durable="count", retry=QUICK)(count)
    for number in range(60):
        one.set("s", f"k{number % 3}", number)
    wait_until(lambda: idle(one, "count"), "all handled")
    assert dict(one.scope("counts").items()) == {"k0": 20, "k1": 20, "k2": 20}
    assert one._parts.consumers.count(None) == 0  # type: ignore[union-attr]


def test_a_transaction_without_revisions_is_refused_by_its_name(valkey: Server, engines: Engines) -> None:
    engine = open_one(engines, valkey, revisions=False)
    engine.on_error(lambda failure: None)

    @engine.on_change(scope="s", durable="ship", retry=Retry(attempts=1))
    def ship(event: StateEvent, delivery: Delivery) -> None:
        with delivery.transaction("stock") as tx:
            tx.set("n", 1)

    engine.set("s", "k", 1)
    engine.drain(PATIENCE_S)

    [letter] = engine.dead_letters("ship").list()
    assert letter.error.startswith("Unsupported: `delivery.transaction` is not supported: scope 'stock' is in Redis")


def test_a_transaction_that_raises_writes_nothing_and_is_tried_again(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    attempts: list[int] = []

    @one.on_change(scope="s", durable="count", retry=QUICK)
    def count(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        with delivery.transaction("counts") as tx:
            tx.set("n", delivery.attempt)
            if delivery.attempt == 1:
                raise ValueError("no")

    one.set("s", "k", 1)
    wait_until(lambda: idle(one, "count"), "handled")
    assert attempts == [1, 2]
    assert one.get("counts", "n") == 2


def test_a_transaction_of_a_delivery_that_another_engine_has_writes_nothing(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    errors: list[BaseException] = []
    entered, go = threading.Event(), threading.Event()

    @one.on_change(scope="s", durable="count", retry=QUICK, ack_wait=60)
    def count(event: StateEvent, delivery: Delivery) -> None:
        try:
            with delivery.transaction("counts") as tx:
                tx.set("n", 1)
                entered.set()
                assert go.wait(PATIENCE_S)
        except BaseException as error:
            errors.append(error)
            raise

    one.set("s", "k", 1)
    assert entered.wait(PATIENCE_S)
    (held,) = valkey.ask("KEYS", "scopestate:consumer:state::count:held:*")
    valkey.ask("DEL", held)
    go.set()
    wait_until(lambda: errors, "an error")
    assert isinstance(errors[0], StorageError)
    assert one.get("counts", "n") is None


# ---------------------------------------------------------------------------------------------------------- kills


def test_the_events_of_a_killed_engine_go_to_another_one_as_the_next_attempt(
    redis_server: Server, engines: Engines
) -> None:
    """A consumer that dies between delivery and acknowledgement (taskiq-redis 130)."""
    one = open_one(engines, redis_server)
    with DurableProcess(redis_server, hangs=True, ack_wait=0.5) as there:
        for number in range(5):
            one.set("s", "k", number)
        assert there.read() == ["k", 0, 1]
        there.kill()
    handled = Handled(one, "work", scope="s")
    assert handled.wait_for(5) == [("k", 0, 2), *[("k", number, 1) for number in range(1, 5)]]


def test_a_frozen_engine_loses_its_events_and_what_it_says_later_does_not_count(
    valkey: Server, engines: Engines
) -> None:
    one = open_one(engines, valkey)
    with DurableProcess(valkey, hangs=True, ack_wait=0.5) as there:
        one.set("s", "k", 1)
        assert there.read() == ["k", 1, 1]
        there.freeze()
        handled = Handled(one, "work", scope="s")
        assert handled.wait_for(1) == [("k", 1, 2)]
        wait_until(lambda: idle(one, "work"), "acknowledged")
        there.thaw()
        there.end_handler()
        one.set("s", "k", 2)
        wait_until(lambda: idle(one, "work"), "the next one handled")
    assert [value for _, value, _ in handled.seen].count(1) == 1


def test_engines_and_server_are_killed_and_every_committed_event_is_handled_in_the_order_of_its_key(
    start_server: StartServer, engines: Engines
) -> None:
    """The short form of `redis_kills.py`, which does it fifty times."""
    from redis_kills import run

    server = start_server(persistent=True)
    assert run(server, seed=1, kills=4, events=300) == []


# ----------------------------------------------------------------------------------------------------- the journal


def test_the_stream_is_bounded_behind_consumers_that_are_up_to_date(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey, events_kept=100)
    handled = Handled(one)
    for number in range(1500):
        one.set("s", f"k{number % 5}", number)
    wait_until(lambda: idle(one), "all handled")
    wait_until(lambda: int(valkey.ask("XLEN", STREAM)) < 300, "the stream trimmed")
    assert len(handled.seen) == 1500


def test_a_full_journal_refuses_writes_by_name_until_the_consumer_goes_on(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey, journal_events=20, call_timeout_ms=2000)
    handled = Handled(one, concurrency=1, order="trigger")
    handled.gate.clear()
    with pytest.raises(StorageError, match="journal_events"):
        for number in range(100):
            one.set("s", "k", number)
    refused = number
    assert one.get("s", "k") == refused - 1
    handled.gate.set()
    wait_until(lambda: idle(one), "all handled")
    assert [value for _, value, _ in handled.seen] == list(range(refused))


def test_with_pause_what_is_lost_is_counted_and_told(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey, journal_events=20, journal_when_full="pause")
    handled = Handled(one, concurrency=1, order="trigger")
    handled.gate.clear()
    one.set("s", "k", "first")
    wait_until(lambda: not idle(one), "the first one taken")
    for number in range(500):
        one.set("s", "k", number)
    handled.gate.set()
    wait_until(lambda: idle(one), "what is left handled")
    assert handled.seen[-1][1] == 499
    lost = 501 - len(handled.seen)
    assert lost > 0
    backend: Any = one._parts.backend
    # Fewer events are kept than were written, so the reader of the shared events may have been too slow as well.
    assert one.stats().store["events_missed"] == lost + backend.reader.missed
    assert "were trimmed" in problems(one)


def test_a_flush_is_reported_and_later_events_are_handled(redis_server: Server, engines: Engines) -> None:
    one = open_one(engines, redis_server)
    handled = Handled(one)
    one.set("s", "k", 1)
    handled.wait_for(1)
    redis_server.ask("FLUSHALL")
    one.set("s", "k", 2)
    assert handled.wait_for(2)[1] == ("k", 2, 1)
    assert handled.ids[0] != handled.ids[1]
    assert "flushed" in problems(one)


def test_two_processes_and_two_engines_share_the_work(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    handled = [Handled(engine, "work", scope="s") for engine in (one, two)]
    with DurableProcess(valkey) as third, DurableProcess(valkey) as fourth:
        for number in range(200):
            one.set("s", f"k{number % 20}", number)
        one.update("s", "last", [ops.Set("", True)])
        wait_until(lambda: idle(one, "work"), "all handled")
        told = [*third.told(), *fourth.told(), *[list(each) for each in handled[0].seen + handled[1].seen]]
    by_key: dict[str, list[int]] = defaultdict(list)
    for key, value, _ in told:
        by_key[key].append(value)
    assert sum(len(values) for values in by_key.values()) == 201
    assert all(len(values) == len(set(values)) for values in by_key.values())


def test_an_event_reaches_an_idle_handler_quickly(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    handled = Handled(two)
    took: list[float] = []
    for number in range(20):
        began = time.monotonic()
        one.set("s", "k", number)
        handled.wait_for(number + 1)
        took.append(time.monotonic() - began)
    assert sorted(took)[2] < 0.5  # the others may be held up by a busy machine
