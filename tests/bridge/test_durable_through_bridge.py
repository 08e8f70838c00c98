"""Durable triggers through a bridge: what one engine gets, and how several share the events of one name."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from second_engine import PATIENCE_S, OpenBridge

from scopestate import Delivery, Discard, Engine, Retry, RetryLater, StateEvent
from scopestate.errors import Compacted, ConfigError, InvalidRegistration, RemoteFailure, Unsupported
from scopestate.ops import handed
from scopestate.ops.triggers import Trigger
from scopestate.persistence.bridge.deliveries import RemotePort
from scopestate.server.holding import _Place
from scopestate.server.server import Server


@pytest.fixture(params=["commit", "interval"])
def there(request: pytest.FixtureRequest, tmp_path: Path, nothing_left_behind: None) -> Iterator[Engine]:
    """The engine at the other end, on files."""
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)
    store = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "durability": request.param}
    state = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": store}}}
    with Engine.from_config({"workers": [state]}) as engine:
        yield engine
    logging.getLogger("scopestate").setLevel(logging.NOTSET)


@pytest.fixture
def url(there: Engine) -> Iterator[str]:
    with Server(there, port=0) as server:
        yield server.url


class Handled:
    """A handler for several engines, which notes what each of them was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.running: Counter[str] = Counter()
        self.overlaps: list[str] = []
        self._changed = threading.Condition()

    def on(
        self,
        engine: Engine,
        name: str,
        work: Callable[[StateEvent], object] = lambda event: None,
        **options: Any,
    ) -> None:
        @engine.on_change(scope="orders", durable="ship", function_id="ship", **options)
        def ship(event: StateEvent) -> None:
            with self._changed:
                self.running[event.key] += 1
                if self.running[event.key] > 1:
                    self.overlaps.append(event.key)
            try:
                work(event)
            finally:
                with self._changed:
                    self.running[event.key] -= 1
                    self.seen.append((name, event.key, event.new_value))
                    self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, PATIENCE_S), self.seen

    def by(self, name: str) -> int:
        return sum(one == name for one, _, _ in self.seen)

    def values(self, key: str) -> list[Any]:
        return [value for _, one, value in self.seen if one == key]


def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)


def test_each_write_is_delivered_with_its_facts(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    seen: list[tuple[StateEvent, Delivery]] = []

    @here.on_change(scope="orders", durable="ship", metadata={"to": "Ada"})
    async def ship(event: StateEvent, delivery: Delivery) -> None:
        seen.append((event, delivery))

    there.set("orders", "a", 1)
    here.set("orders", "a", None)
    there.delete("orders", "a")
    here.drain(PATIENCE_S)

    events = [event for event, _ in seen]
    assert [(one.event_type, one.old_value, one.new_value, one.existed) for one in events] == [
        ("state:created", None, 1, False),
        ("state:updated", 1, None, True),
        ("state:deleted", None, None, True),
    ]
    assert [one.revision for one in events] == [1, 2, 3]
    assert [one.attempt for _, one in seen] == [1, 1, 1]
    assert [one.id for _, one in seen] == [f"ship:{event.position}" for event in events]
    assert {str(one.metadata) for _, one in seen} == {"{'to': 'Ada'}"}
    assert [(one.name, one.lag_events) for one in here.consumers()] == [("ship", 0)]


def test_a_failing_handler_is_tried_again_and_given_up_at_last(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    here = open_bridge(url)
    attempts: list[tuple[str, int]] = []
    failures: list[str] = []
    here.on_error(lambda failure: failures.append(f"{failure.event.key} {failure.attempt} {failure.final}"))

    @here.on_change(scope="orders", durable="ship", retry=Retry(attempts=2, first=0.01, on=ValueError))
    def ship(event: StateEvent, delivery: Delivery) -> None:
        attempts.append((event.key, delivery.attempt))
        if event.key == "later" and len([one for one in attempts if one[0] == "later"]) == 1:
            raise RetryLater(0.01)
        if event.key == "discard":
            raise Discard("not ours")
        if event.key == "bad":
            raise ValueError("no")
        if event.key == "other":
            raise KeyError("x")

    for key in ("bad", "later", "discard", "other", "good"):
        there.set("orders", key, 1)
    here.drain(PATIENCE_S)

    assert sorted(attempts) == [
        ("bad", 1), ("bad", 2), ("discard", 1), ("good", 1), ("later", 1), ("later", 1), ("other", 1)
    ]  # fmt: skip
    assert sorted(failures) == ["bad 1 False", "bad 2 True", "discard 1 True", "other 1 True"]
    letters = here.dead_letters("ship").list()
    assert [(one.event.key, one.error, one.attempts) for one in sorted(letters, key=lambda one: one.event.key)] == [
        ("bad", "ValueError: no", 2),
        ("discard", "Discard: not ours", 1),
        ("other", "KeyError: 'x'", 1),
    ]
    assert all(one.event.position and one.event.new_value == 1 for one in letters)
    assert "raise ValueError" in next(one.traceback for one in letters if one.event.key == "bad")
    assert here.dead_letters().get(letters[0].id) == letters[0]
    assert here.dead_letters().get("999") is None
    assert here.dead_letters("ship").purge([letters[0].id]) == 1
    assert here.dead_letters("ship").replay(all=True) == 2
    here.drain(PATIENCE_S)
    assert there.dead_letters().count() == 2


def test_an_error_whose_text_is_not_unicode_is_reported_as_any_other(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    here = open_bridge(url)
    handled: list[str] = []

    @here.on_change(scope="orders", durable="ship", retry=Retry(attempts=2, first=0.01))
    def ship(event: StateEvent) -> None:
        if event.key == "bad":
            raise FileNotFoundError(2, "No such file", "\udcff.txt")
        handled.append(event.key)

    there.set("orders", "bad", 1)
    there.set("orders", "good", 1)
    here.drain(PATIENCE_S)

    assert handled == ["good"]
    (letter,) = here.dead_letters("ship").list()
    assert (letter.attempts, letter.error) == (2, "FileNotFoundError: [Errno 2] No such file: '\\udcff.txt'")


def test_no_engine_can_take_the_place_of_the_one_that_has_the_store(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    backend: Any = open_bridge(url)._parts.backend
    handled = Handled()
    handled.on(there, "there")
    joining = {"trigger_id": "t", "function_id": "f", "config": {"scope": "orders"}, "since_ms": 1}

    with pytest.raises(RemoteFailure, match=r"length >= 1 - at `\$.holder`"):
        backend.call_and_wait(handed.JOIN, msgspec.json.encode({"consumer": "ship", "holder": "", **joining}))

    there.set("orders", "a", 1)
    handled.wait(1)


def test_of_several_outcomes_of_an_attempt_the_first_counts_and_long_texts_are_cut(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    backend: Any = open_bridge(url)._parts.backend
    joining = {"trigger_id": "t", "function_id": "f", "config": {"scope": "orders"}, "since_ms": 1}

    def say(function_id: str, /, **fields: Any) -> Any:
        told = {"consumer": "ship", "holder": "other", **fields}
        return msgspec.json.decode(backend.call_and_wait(function_id, msgspec.json.encode(told)))

    say(handed.JOIN, **joining)
    there.set("orders", "a", 1)
    there.set("orders", "b", 1)
    positions = [event["position"] for _ in "ab" for event in say(handed.TAKE, most=1, wait_ms=5_000)["events"]]
    say(handed.NOTE, began=[[position, 1] for position in positions], serial=1)
    long = {"error": "e" * 1_000_000, "traceback": "t" * 1_000_000}
    one = [{"position": positions[0], "verdict": verdict, **long} for verdict in ("dead", "done", "retry", "dead")]
    other = [{"position": positions[1], "verdict": verdict} for verdict in ("done", "dead")]

    say(handed.NOTE, ended=[*one, *other, *one])

    there.flush()
    (letter,) = there.dead_letters("ship").list()
    assert letter.event.key == "a"
    assert (len(letter.error), len(letter.traceback)) == (16_384, 16_384)
    assert there.consumers()["ship"].lag_events == 0


def test_a_fault_in_one_consumer_leaves_the_others_to_go_on(
    there: Engine, url: str, open_bridge: OpenBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = open_bridge(url)
    others: list[str] = []
    keep = RemotePort.keep

    def keep_or_fail(port: RemotePort) -> None:
        if port.name == "ship":
            raise RuntimeError("a fault of the program")
        keep(port)

    monkeypatch.setattr(RemotePort, "keep", keep_or_fail)
    here.on_change(scope="orders", durable="ship")(lambda event: None)
    here.on_change(scope="orders", durable="bill")(lambda event: others.append(event.key))
    for key in ("a", "b", "c"):
        there.set("orders", key, 1)
        until(lambda key=key: key in others)  # type: ignore[misc]  # mypy infers no type for the default

    until(lambda: "a fault of the program" in "".join(here.health().problems))
    until(lambda: here.consumers()["bill"].lag_events == 0)


def test_a_transaction_writes_and_acknowledges_in_one_step(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    attempts: list[int] = []

    @here.on_change(scope="orders", durable="plain", retry=Retry(attempts=3, first=0.01))
    def plain(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        with delivery.transaction("totals") as tx:
            tx.set("plain", tx.get("plain", 0) + 1)
            if event.key == "o-3" and delivery.attempt == 1:
                raise ValueError("nothing of it")
        with pytest.raises(Unsupported):
            delivery.transaction("totals").__enter__()
        if event.key == "o-4":
            raise ValueError("too late: it is acknowledged")

    @here.on_change(scope="orders", durable="loop")
    async def loop(event: StateEvent, delivery: Delivery) -> None:
        async with delivery.transaction("totals") as tx:
            tx.set("loop", await tx.get("loop", 0) + 1)

    for number in range(20):
        there.set("orders", f"o-{number}", 1)
    here.drain(PATIENCE_S)

    assert (there.get("totals", "plain"), there.get("totals", "loop")) == (20, 20)
    assert max(attempts) == 2
    assert sum(one.lag_events for one in there.consumers()) == 0


def test_an_attempt_that_is_over_has_no_transaction(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    refused: list[str] = []
    over = threading.Event()

    @here.on_change(scope="orders", durable="ship", ack_wait=0.05, retry=Retry(attempts=2, first=0))
    def ship(event: StateEvent, delivery: Delivery) -> None:
        if delivery.attempt == 2:
            return
        until(lambda: delivery._runtime.late)  # type: ignore[attr-defined]  # as the runtime has it
        try:
            delivery.transaction("totals")
        except Unsupported as error:
            refused.append(str(error))
        over.set()

    there.set("orders", "a", 1)
    assert over.wait(PATIENCE_S)
    here.drain(PATIENCE_S)
    assert "ack_wait" in refused[0]
    assert there.consumers()["ship"].lag_events == 0


def test_extend_gives_an_attempt_more_time(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    for ack_wait_s in (0.2, 2.0, 10.0):  # on a busy machine the handler may not begin within the first
        attempts = extended_attempts(there, here, ack_wait_s)
        if attempts == [1]:
            break
    assert attempts == [1]


def extended_attempts(there: Engine, here: Engine, ack_wait_s: float) -> list[int]:
    """Return the attempts at an event whose handler takes longer than `ack_wait`, and asks for more time."""
    attempts: list[int] = []

    @here.on_change(scope="orders", durable=f"ship within {ack_wait_s}", ack_wait=ack_wait_s)
    async def ship(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        delivery.extend(PATIENCE_S)
        await asyncio.sleep(2 * ack_wait_s)

    there.set("orders", f"a {ack_wait_s}", 1)
    here.drain(PATIENCE_S)
    return attempts


def test_several_engines_share_the_work_and_keep_the_order_of_each_key(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    handled = Handled()
    engines = {"there": there, "one": open_bridge(url), "two": open_bridge(url)}
    busy: set[str] = set()

    def work_on(name: str) -> Callable[[StateEvent], object]:
        """Return a handler that waits until each engine has an event: the first cannot handle them all."""

        def work(event: StateEvent) -> None:
            busy.add(name)
            until(lambda: len(busy) == len(engines))

        return work

    for name, engine in engines.items():
        handled.on(engine, name, work_on(name))
    for number in range(300):
        there.set("orders", f"o-{number % 60}", number)  # more keys than two engines hold at a time
    handled.wait(300)

    assert len(handled.seen) == 300
    assert handled.overlaps == []
    for key in range(60):
        assert handled.values(f"o-{key}") == list(range(key, 300, 60))
    assert all(handled.by(name) > 0 for name in engines), Counter(name for name, _, _ in handled.seen)
    engines["two"].drain(PATIENCE_S)
    assert [one.lag_events for one in there.consumers()] == [0]


def test_a_slow_engine_leaves_the_rest_to_others(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    handled, gate = Handled(), threading.Event()
    one, two = open_bridge(url), open_bridge(url)
    handled.on(one, "one", lambda event: gate.wait(PATIENCE_S))
    for number in range(8):
        there.set("orders", f"slow-{number}", number)
    until(lambda: sum(handled.running.values()) == 8)
    handled.on(two, "two")
    for number in range(100):
        there.set("orders", f"o-{number}", number)
    until(lambda: handled.by("two") >= 84)  # the first engine holds a few more than it can handle
    gate.set()
    handled.wait(108)
    assert len(handled.seen) == 108


def test_an_engine_that_closes_leaves_its_events_to_others(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    handled = Handled()
    one = open_bridge(url)
    handled.on(one, "one")
    there.set("orders", "a", 1)
    handled.wait(1)
    one.close()
    there.set("orders", "a", 2)
    there.set("orders", "b", 3)
    assert any("no trigger here" in problem for problem in there.health().problems)
    two = open_bridge(url)
    handled.on(two, "two")
    handled.wait(3)
    assert handled.by("two") == 2
    assert handled.values("a") == [1, 2]
    assert there.health().ok


def test_a_trigger_that_is_unregistered_leaves_its_events_to_others(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    handled, gate = Handled(), threading.Event()
    one = open_bridge(url)
    for name, engine in (("there", there), ("one", one)):
        handled.on(engine, name, lambda event: gate.wait(PATIENCE_S))
    for number in range(40):
        there.set("orders", f"o-{number}", number)
    until(lambda: sum(handled.running.values()) == 16)
    next(handle for handle in there.triggers()).unregister()
    next(handle for handle in one.triggers()).unregister()
    gate.set()
    handled.wait(16)
    assert len(handled.seen) == 16
    two = open_bridge(url)
    handled.on(two, "two")
    handled.wait(40)
    two.drain(PATIENCE_S)
    assert len(handled.seen) == 40
    assert handled.by("two") == 24


def test_other_filters_under_one_name_count_from_the_newest_on(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    one, two = open_bridge(url), open_bridge(url)
    seen: list[tuple[str, str]] = []
    one.on_change(scope="old", durable="ship")(lambda event: seen.append(("one", event.scope)))
    there.set("old", "a", 1)
    one.drain(PATIENCE_S)
    two.on_change(scope="new", durable="ship")(lambda event: seen.append(("two", event.scope)))
    for number in range(20):
        there.set("new", f"k{number}", number)
    two.drain(PATIENCE_S)
    assert seen == [("one", "old"), *[("two", "new")] * 20]
    assert any("stands by" in problem for problem in one.health().problems)
    two.close()
    there.set("old", "b", 1)
    until(lambda: len(seen) == 22)
    assert seen[-1] == ("one", "old")
    assert one.health().ok


def test_pause_resume_and_forget_reach_every_engine(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    handled = Handled()
    one, two = open_bridge(url), open_bridge(url)
    handled.on(one, "one")
    handled.on(two, "two")
    handle = one.triggers()[0]
    handle.pause()
    assert handle.paused
    assert there.consumers()["ship"].paused == "paused by the program"
    until(lambda: two.triggers()[0].paused)
    there.set("orders", "a", 1)
    there.drain(PATIENCE_S)
    assert handled.seen == []
    there.consumers().resume("ship")
    handled.wait(1)
    until(lambda: not handle.paused)
    with pytest.raises(InvalidRegistration):
        one.consumers().pause("other")

    two.consumers().forget("ship")
    until(lambda: [one.name for one in there.consumers()] == ["ship"])  # its triggers are there
    until(lambda: one.health().ok and two.health().ok)
    one.drain(PATIENCE_S)
    there.set("orders", "a", 2)
    handled.wait(2)
    assert handled.values("a") == [1, 2]


def test_a_letter_that_holds_back_its_key_is_replayed_where_it_waits(
    there: Engine, url: str, open_bridge: OpenBridge
) -> None:
    one, two = open_bridge(url), open_bridge(url)
    seen: list[Any] = []
    works = threading.Event()

    def ship(event: StateEvent) -> None:
        if event.new_value == 1 and not works.is_set():
            raise ValueError("not yet")
        seen.append(event.new_value)

    for engine in (one, two):
        engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=1), on_giving_up="block")(ship)
    for value in (1, 2, 3):
        there.set("orders", "a", value)
    there.set("orders", "b", 4)
    two.drain(PATIENCE_S)
    assert seen == [4]
    until(lambda: two.dead_letters("ship").count() == 1)
    works.set()
    two.dead_letters("ship").replay(all=True)
    until(lambda: seen == [4, 1, 2, 3])
    one.drain(PATIENCE_S)
    assert there.dead_letters().count() == 0


def test_batches_and_debounced_events(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    batches: list[list[Any]] = []
    newest: list[tuple[Any, Any, int]] = []

    @here.on_change(scope="orders", durable="batches", batch=10, batch_wait=0.5)
    def in_batches(events: list[StateEvent]) -> None:
        batches.append([event.new_value for event in events])

    @here.on_change(scope="orders", durable="newest", debounce=0.05)
    def at_rest(event: StateEvent) -> None:
        newest.append((event.old_value, event.new_value, event.coalesced))

    for number in range(15):
        there.set("orders", "a", number)
    until(lambda: sum(map(len, batches)) == 15)  # drain() would not wait for a batch to fill
    here.drain(PATIENCE_S)
    assert [value for batch in batches for value in batch] == list(range(15))
    assert len(batches) <= 5
    assert newest[-1][1] == 14
    assert sum(count for _, _, count in newest) == 15
    assert [one.lag_events for one in there.consumers()] == [0, 0]


def test_conditions_run_where_they_are_registered(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    here = open_bridge(url)
    seen: list[str] = []
    here.on_change(scope="orders", durable="ship", condition=lambda event: event.new_value > 1)(
        lambda event: seen.append(event.key)
    )
    there.set("orders", "a", 1)
    there.set("orders", "b", 2)
    here.drain(PATIENCE_S)
    assert seen == ["b"]
    assert here._parts.router.triggers.counts().skipped == 1


def test_triggers_of_a_file_and_where_a_consumer_begins(there: Engine, url: str, open_bridge: OpenBridge) -> None:
    one = open_bridge(url)
    handled = Handled()
    handled.on(one, "one")
    there.set("orders", "a", 1)
    one.drain(PATIENCE_S)
    one.consumers().pause("ship")
    there.set("orders", "b", 2)
    seen: list[str] = []
    one.on_change(scope="orders", durable="all", start="earliest")(lambda event: seen.append(event.key))
    one.drain(PATIENCE_S)
    assert "b" in seen
    with Engine() as other, other.watch("orders") as changes, pytest.raises(Compacted):
        one.on_change(scope="orders", durable="none", start=changes.cursor)(print)


def test_an_engine_without_a_store_says_so(open_bridge: OpenBridge) -> None:
    with Engine() as plain, Server(plain, port=0) as server:
        here = open_bridge(server.url)
        with pytest.raises(ConfigError, match="no store"):
            here.on_change(scope="orders", durable="ship")(print)
        assert here.triggers() == []
        assert list(here.consumers()) == []


def test_a_bridge_without_a_connection_registers_and_says_what_is_missing(
    there: Engine, open_bridge: OpenBridge
) -> None:
    here = open_bridge("ws://127.0.0.1:9", connect_wait_ms=50)
    trigger = here.on_change(scope="orders", durable="ship")(print)
    assert trigger is print
    assert any("'ship' gets no events" in problem for problem in here.health().problems)
    assert isinstance(here.triggers()[0].trigger, Trigger)


def test_what_was_held_goes_on_after_a_lost_connection(there: Engine, open_bridge: OpenBridge) -> None:
    server = Server(there, port=0).start()
    handled, gate = Handled(), threading.Event()
    here = open_bridge(server.url)
    handled.on(here, "here", lambda event: gate.wait(PATIENCE_S))
    for value in range(3):
        there.set("orders", "a", value)
    until(lambda: sum(handled.running.values()) == 1)
    port = server.port
    server.stop()
    server = Server(there, port=port).start()
    there.set("orders", "b", 4)
    until(lambda: handled.running["b"] == 1)
    gate.set()
    here.drain(PATIENCE_S)
    assert handled.values("a") == [0, 1, 2]
    assert handled.overlaps == []
    here.close()
    server.stop()


@pytest.mark.parametrize(
    "note",
    [
        {"ended": [{"position": 0, "verdict": "retry", "attempts": 1, "due_ms": 10**30}]},
        {"ended": [{"position": 0, "verdict": "retry", "attempts": 10**30}]},
        {"ended": [{"position": 0, "verdict": "retry", "first_ms": -(10**30)}]},
        {"ended": [{"position": 0, "verdict": "dead", "first_ms": 10**30}]},
        {"began": [[0, 2**40]]},
        {"began": [[0, -1]]},
    ],
    ids=["due_ms", "attempts", "first_ms", "letter", "began", "negative"],
)
def test_numbers_that_no_store_can_hold_are_refused_and_saving_goes_on(
    there: Engine, url: str, open_bridge: OpenBridge, note: dict[str, Any]
) -> None:
    backend: Any = open_bridge(url)._parts.backend
    held = {"consumer": "ship", "holder": "bad"}
    trigger = {"trigger_id": "t", "function_id": "f", "config": {"scope": "orders"}, "since_ms": 1}

    def say(function_id: str, /, **fields: Any) -> Any:
        return msgspec.json.decode(backend.call_and_wait(function_id, msgspec.json.encode({**held, **fields})))

    say(handed.JOIN, **trigger)
    there.set("orders", "a", 1)
    taken = say(handed.TAKE, most=1, wait_ms=5_000)
    position = taken["events"][0]["position"]

    with pytest.raises(RemoteFailure, match="Failed to deserialize input"):
        say(
            handed.NOTE,
            ended=[{**one, "position": position} for one in note.get("ended", ())],
            began=[[position, attempt] for _, attempt in note.get("began", ())],
            serial=1,
        )

    assert "is_holder" not in say(handed.NOTE, ended=[{"position": position, "verdict": "retry", "attempts": 1}])
    there.flush()


def test_a_trigger_that_is_registered_again_does_not_wait_for_the_poll_before(
    there: Engine, url: str, open_bridge: OpenBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handed, "LONGEST_WAIT_MS", 100_000)
    here = open_bridge(url, call_timeout_ms=200_000)
    first, second = Handled(), Handled()
    first.on(here, "first", ack_wait=400)
    there.set("orders", "a", 1)
    first.wait(1)

    second.on(here, "second", ack_wait=400)
    began = time.monotonic()
    there.set("orders", "b", 2)
    second.wait(1)

    assert second.values("b") == [2]
    assert time.monotonic() - began < 50  # that poll waits for 100 s


def test_what_is_lost_while_it_is_told_is_told_once() -> None:
    loop = asyncio.new_event_loop()
    shared: Any = None
    place = _Place(loop, shared, None)
    told: list[int] = []

    class Meanwhile(list[int]):
        def __iter__(self) -> Iterator[int]:
            told.extend(place.take_lost())
            return super().__iter__()

    place.note_lost([1])
    place.note_lost(Meanwhile([2]))

    assert told + place.take_lost() == [1, 2]
    loop.close()


def test_a_connection_takes_events_for_a_limited_number_of_triggers(
    there: Engine, url: str, open_bridge: OpenBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.server.holding.MOST_HOLDERS", 2)
    backend: Any = open_bridge(url)._parts.backend

    def join(holder: str) -> None:
        trigger = {"trigger_id": "t", "function_id": "f", "config": {"scope": "orders"}, "since_ms": 1}
        asked = {"consumer": "ship", "holder": holder, **trigger}
        backend.call_and_wait(handed.JOIN, msgspec.json.encode(asked))

    join("one")
    join("two")
    join("two")
    with pytest.raises(RemoteFailure, match="takes events for 2 durable triggers already"):
        join("three")
