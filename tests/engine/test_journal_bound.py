"""The bound of the journal on files: what consumers need is bounded, and nothing is lost in silence."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine, Retry, StateEvent, config
from scopestate.actors.journal import Needed
from scopestate.errors import ConfigError, Overloaded
from scopestate.persistence.sqlite.journal import SavedJournal

PATIENCE_S = 60.0


class Opener:
    """Opens engines on one store, one after the other, with other limits."""

    def __init__(self, path: Path, durability: str) -> None:
        self.path = path
        self.durability = durability
        self.engine: Engine | None = None
        self.gates: list[threading.Event] = []

    def config(self, limits: dict[str, Any]) -> dict[str, Any]:
        options = {"store_method": "file_based", "file_path": str(self.path), "durability": self.durability}
        state: dict[str, Any] = {"adapter": {"name": "kv", "config": {**options, "save_interval_ms": 60_000}}}
        scopes = [{"name": "kept", "history": {"events": 1000}}]
        return {"workers": [{"name": "iii-state", "config": state}], "scopes": scopes, "limits": limits}

    def __call__(self, **limits: Any) -> Engine:
        self.close()
        self.engine = Engine.from_config(self.config(limits))
        return self.engine

    def reload(self, **limits: Any) -> None:
        assert self.engine is not None
        self.engine.reconfigure(config.from_mapping(self.config(limits)))

    def close(self) -> None:
        for gate in self.gates:
            gate.set()
        if self.engine is not None:
            self.engine.close()


@pytest.fixture(params=["commit", "interval"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)
    opener = Opener(tmp_path / "store", request.param)
    yield opener
    opener.close()
    logging.getLogger("scopestate").setLevel(logging.NOTSET)


class Held:
    """A durable trigger whose handler waits for its gate."""

    def __init__(self, opener: Opener, name: str = "ship", scope: str = "orders") -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        opener.gates.append(self.gate)
        self.seen: list[Any] = []
        assert opener.engine is not None
        opener.engine.on_change(scope=scope, durable=name, order="trigger")(self.handle)

    def handle(self, event: StateEvent) -> None:
        self.begun.set()
        assert self.gate.wait(3 * PATIENCE_S)  # longer than a write waits
        self.seen.append(event.new_value)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < until
        pause.wait(0.005)


def fill(engine: Engine, value: Any = 0, most: int = 200) -> int:
    """Write until a write is refused. Return how many there were."""
    for number in range(most):
        try:
            engine.set("orders", f"k{number}", value or number, durable=True)
        except Overloaded:
            return number
    raise AssertionError("nothing was refused")


def in_thread(action: Callable[[], object]) -> Callable[[], list[BaseException]]:
    """Run it on a thread. What is returned waits for its end, and returns what it has raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - it is returned
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> list[BaseException]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        return errors

    return wait


def waits(engine: Engine) -> Callable[[], bool]:
    engine._limits.call_timeout_s = PATIENCE_S  # not by a reload, which may make room
    before = engine.stats().blocked
    return lambda: engine.stats().blocked > before


def test_writes_to_a_full_journal_wait_and_are_refused_by_name(opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)
    held = Held(opened)
    written = fill(engine)
    assert 20 <= written <= 21

    with pytest.raises(Overloaded, match=r"journal is full: it keeps 2[01] changes.*'ship'.*journal_when_full"):
        engine.set("orders", "k0", 1)
    with pytest.raises(Overloaded, match="journal is full"), engine.scope("orders").batch() as batch:
        batch.set("a", 1)
        batch.set("b", 1)
    with pytest.raises(Overloaded, match="journal is full"):
        asyncio.run(engine.aio.set("orders", "k0", 1))
    opened.reload(journal_events=20)
    for number in range(50):
        engine.set("others", f"k{number}", number)
    assert engine.get("orders", "k0") == 0
    assert any("journal is full" in problem for problem in engine.health().problems)

    held.gate.set()
    engine.drain(PATIENCE_S)
    engine.set("orders", "k0", 1)
    engine.drain(PATIENCE_S)
    assert held.seen == [*range(written), 1]
    wait_until(lambda: engine.health().ok)


def test_what_is_handled_lets_a_write_go_on_that_waits(opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)
    held = Held(opened)
    written = fill(engine)
    blocked = waits(engine)
    done = in_thread(lambda: engine.set("orders", "late", "late"))
    wait_until(blocked)

    held.gate.set()

    assert done() == []
    engine.drain(PATIENCE_S)
    assert held.seen == [*range(written), "late"]


def test_bytes_are_bounded_too(opened: Opener) -> None:
    engine = opened(journal_bytes=50_000, call_timeout_ms=500)
    Held(opened)
    assert 4 <= fill(engine, "x" * 10_000) <= 6
    opened.reload(journal_bytes=0, call_timeout_ms=500)
    for number in range(10):
        engine.set("orders", f"k{number}", "x" * 10_000, durable=True)


def test_writers_do_not_exceed_the_bound_while_it_is_too_early_to_measure_again(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(journal_events=20, call_timeout_ms=1000)
    measure = SavedJournal.needed

    def slow(self: SavedJournal) -> Needed:
        threading.Event().wait(0.05)  # the next measurement may begin 0.5 s later
        return measure(self)

    monkeypatch.setattr(SavedJournal, "needed", slow)
    held = Held(opened)

    written = fill(engine)

    assert 20 <= written <= 21
    held.gate.set()
    engine.drain(PATIENCE_S)
    opened.reload(journal_events=20)  # with time for the write to wait
    engine.set("orders", "late", "late")
    engine.drain(PATIENCE_S)
    assert held.seen == [*range(written), "late"]


@pytest.mark.parametrize("way", ["reload", "forget", "pause"])
def test_a_write_that_waits_goes_on_when_there_is_room(way: str, opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)
    Held(opened)
    fill(engine)
    blocked = waits(engine)
    done = in_thread(lambda: engine.set("orders", "late", 1))
    wait_until(blocked)

    if way == "reload":
        opened.reload(journal_events=1000)  # the journal may be well over its bound
    elif way == "pause":
        opened.reload(journal_events=20, journal_when_full="pause")
    else:
        engine.consumers().forget("ship")

    assert done() == []
    assert engine.get("orders", "late") == 1


def test_to_forget_a_consumer_without_a_trigger_makes_room(opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)
    engine.register_function("f", lambda event: None)
    engine.register_trigger(function_id="f", scope="orders", durable="ship").unregister()
    fill(engine)
    blocked = waits(engine)
    done = in_thread(lambda: engine.set("orders", "late", 1))
    wait_until(blocked)
    engine.consumers().forget("ship")
    assert done() == []


def test_a_purge_of_what_holds_others_back_makes_room(opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)

    @engine.on_change(scope="orders", durable="ship", on_giving_up="block", retry=Retry(attempts=1))
    def ship(event: StateEvent) -> None:
        raise ValueError(event.key)

    fill(engine)
    wait_until(lambda: engine.dead_letters("ship").count() >= 20)
    blocked = waits(engine)
    done = in_thread(lambda: engine.set("orders", "late", 1))
    wait_until(blocked)
    engine.dead_letters("ship").purge(all=True)
    assert done() == []


def test_a_handler_that_writes_is_refused_at_once(opened: Opener) -> None:
    engine = opened(journal_events=20)
    errors: list[str] = []
    took: list[float] = []

    @engine.on_change(scope="commands")
    def command(event: StateEvent) -> None:
        began = time.monotonic()
        try:
            engine.set("orders", "more", 1)
        except Overloaded as error:
            errors.append(str(error))
        took.append(time.monotonic() - began)

    held = Held(opened)
    opened.reload(journal_events=20, call_timeout_ms=500)
    fill(engine)
    opened.reload(journal_events=20)
    engine.set("commands", "k", 1)
    wait_until(lambda: bool(took))
    assert "journal is full" in errors[0]
    assert "comes from a handler" in errors[0]
    assert took[0] < 10
    held.gate.set()
    engine.drain(PATIENCE_S)
    assert "more" not in engine.scope("orders")


def test_the_bound_holds_after_a_restart(opened: Opener) -> None:
    engine = opened(journal_events=20, call_timeout_ms=500)
    engine.register_function("f", lambda event: None)
    engine.register_trigger(function_id="f", scope="orders", durable="ship").unregister()
    written = fill(engine)

    engine = opened(journal_events=20, call_timeout_ms=500)
    with pytest.raises(Overloaded, match="'ship'"):
        engine.set("orders", "late", 1)
    assert engine.get("orders", "late") is None
    held = Held(opened)
    held.gate.set()
    engine.drain(PATIENCE_S)
    opened.reload(journal_events=20)  # with time for the write to wait
    engine.set("orders", "late", "late")
    engine.drain(PATIENCE_S)
    assert held.seen == [*range(written), "late"]


def test_a_history_is_bounded_by_its_own_rule(opened: Opener) -> None:
    engine = opened(journal_events=20)
    held = Held(opened, scope="kept")
    held.gate.set()
    for number in range(100):
        engine.set("kept", f"k{number}", number, durable=True)
    engine.drain(PATIENCE_S)
    assert len(held.seen) == 100


def test_a_full_journal_has_room_again_a_sixteenth_below_its_limit(opened: Opener) -> None:
    engine = opened(journal_events=32, call_timeout_ms=500)
    handled: list[Any] = []
    permits = threading.Semaphore(0)

    @engine.on_change(scope="orders", durable="ship", order="trigger")
    def ship(event: StateEvent) -> None:
        assert permits.acquire(timeout=PATIENCE_S)
        handled.append(event.new_value)

    def is_saved(count: int) -> bool:
        engine.dead_letters("ship").count()  # saves what has ended
        return len(handled) == count and engine._parts.snapshot._store.journal.size().events == written - count

    written = fill(engine)
    permits.release(written - 30)
    wait_until(lambda: is_saved(written - 30))
    with pytest.raises(Overloaded, match="journal is full"):
        engine.set("orders", "late", 1)
    permits.release(1)
    wait_until(lambda: is_saved(written - 29))
    engine._limits.call_timeout_s = PATIENCE_S
    engine.set("orders", "late", 1)
    permits.release(100)


def test_what_is_not_saved_yet_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = Opener(tmp_path / "store", "interval")
    engine = opener(journal_events=20, call_timeout_ms=500)
    Held(opener)
    engine.set("orders", "first", 1, durable=True)
    store, gate = engine._parts.snapshot._store, threading.Event()
    save = store.save

    def save_later(*what: Any) -> None:
        assert gate.wait(PATIENCE_S)
        save(*what)

    monkeypatch.setattr(store, "save", save_later)
    with pytest.raises(Overloaded, match="what is to be saved"):
        for number in range(60):
            engine.set("orders", f"k{number}", number)
            wait_until(lambda: not engine._router.feed.incoming)
    assert number < 25
    gate.set()
    wait_until(lambda: "the slowest consumer is 'ship'" in str(engine.health().problems) or engine.health().ok)
    opener.close()


# -------------------------------------------------------------------------------------------------------------- pause


def lost_by(engine: Any, consumer: str) -> int:
    """Return how many events a paused consumer says it has lost."""
    return int(engine.consumers()[consumer].paused.split()[2])


def test_the_slowest_consumer_is_paused_and_what_it_loses_is_counted(
    opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(journal_events=20, journal_when_full="pause")
    slow, quick, elsewhere = Held(opened, "slow"), Held(opened, "quick"), Held(opened, "elsewhere", "others")
    quick.gate.set()
    engine.set("others", "k", 1)
    for number in range(300):
        engine.set("orders", f"k{number}", number, durable=True)
        if number % 5 == 4:
            wait_until(lambda number=number: len(quick.seen) == number + 1)
    wait_until(lambda: "events were trimmed" in (engine.consumers()["slow"].paused or ""))
    assert engine.consumers()["quick"].paused is None
    assert engine.consumers()["elsewhere"].paused is None
    assert any("'slow' is paused: journal full; " in problem for problem in engine.health().problems)
    assert quick.seen == list(range(300))
    journal = engine._parts.snapshot._store.journal
    # One event is of `elsewhere`; the store has trimmed a moment before the consumer says so.
    wait_until(lambda: (events := journal.size().events) < 20 and lost_by(engine, "slow") == 301 - events)

    said = engine.consumers()["slow"].paused
    engine.consumers().pause("slow", "by hand")
    assert engine.consumers()["slow"].paused == said
    slow.gate.set()
    wait_until(lambda: engine.consumers()["slow"].in_flight == 0)
    running = slow.seen.copy()
    lost = lost_by(engine, "slow")
    logging.getLogger("scopestate").setLevel(logging.ERROR)
    engine.consumers().resume("slow")
    assert f"'slow' continues; the journal was full, and {lost} of its events were trimmed" in caplog.text
    elsewhere.gate.set()
    engine.drain(PATIENCE_S)
    assert slow.seen[len(running) :] == list(range(lost, 300))
    assert len(running) <= 1
    assert engine.health().ok


def test_a_pause_and_what_was_lost_outlast_a_restart(opened: Opener) -> None:
    engine = opened(journal_events=20, journal_when_full="pause")
    engine.register_function("f", lambda event: None)
    engine.register_trigger(function_id="f", scope="orders", durable="ship").unregister()
    for number in range(100):
        engine.set("orders", f"k{number}", number, durable=True)
    wait_until(lambda: "trimmed" in (engine.consumers()["ship"].paused or ""))

    engine = opened(journal_events=20, journal_when_full="pause")
    held = Held(opened)
    held.gate.set()
    for number in range(100, 200):
        engine.set("orders", f"k{number}", number, durable=True)
    wait_until(lambda: engine.consumers()["ship"].lag_events < 20)
    lost = int(engine.consumers()["ship"].paused.split()[2])
    assert held.seen == []
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert held.seen == list(range(lost, 200))
    assert engine.health().ok


def test_what_was_lost_is_not_delivered_from_memory(opened: Opener) -> None:
    engine = opened(journal_events=20, journal_when_full="pause")
    works = threading.Event()
    seen: list[Any] = []

    @engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=1000, first=0.05, factor=1, jitter=0))
    def ship(event: StateEvent) -> None:
        if not works.is_set():
            raise ValueError
        seen.append(event.new_value)

    for number in range(60):
        engine.set("orders", f"k{number}", number, durable=True)
    wait_until(lambda: "trimmed" in (engine.consumers()["ship"].paused or ""))
    wait_until(lambda: engine._parts.snapshot._store.journal.size().events < 20)
    wait_until(lambda: engine.consumers()["ship"].in_flight == 0)
    # The store has trimmed a moment before the consumer says so.
    wait_until(lambda: lost_by(engine, "ship") == 60 - engine._parts.snapshot._store.journal.size().events)
    lost = lost_by(engine, "ship")
    works.set()
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert sorted(seen) == list(range(lost, 60))


def test_consumers_of_one_scope_lose_the_same_and_nothing_in_vain(opened: Opener) -> None:
    engine = opened(journal_events=32, journal_when_full="pause")
    engine.register_function("f", lambda event: None)
    for name in ("one", "two"):
        engine.register_trigger(function_id="f", scope="orders", durable=name).unregister()
    for number in range(36):
        engine.set("orders", f"k{number}", number, durable=True)
    journal = engine._parts.snapshot._store.journal
    wait_until(lambda: journal.size().events < 32)
    lost = [int(consumer.paused.split()[2]) for consumer in engine.consumers()]
    assert max(lost) <= 36 - journal.size().events + 4


def test_bytes_are_bounded_by_a_pause_too(opened: Opener) -> None:
    engine = opened(journal_bytes=50_000, journal_when_full="pause")
    engine.register_function("f", lambda event: None)
    engine.register_trigger(function_id="f", scope="orders", durable="ship").unregister()
    for number in range(50):
        engine.set("orders", f"k{number}", "x" * 10_000, durable=True)
    wait_until(lambda: engine._parts.snapshot._store.journal.size().bytes < 50_000)
    lost = int(engine.consumers()["ship"].paused.split()[2])
    held = Held(opened)
    held.gate.set()
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert lost + len(held.seen) == 50
    assert len(held.seen) >= 4


def test_what_dead_letters_hold_back_is_not_lost(opened: Opener) -> None:
    engine = opened(journal_events=1000, journal_when_full="pause")

    @engine.on_change(scope="orders", durable="ship", on_giving_up="block", retry=Retry(attempts=1))
    def ship(event: StateEvent) -> None:
        raise ValueError(event.key)

    for count in range(1, 26):
        engine.set("orders", f"k{count}", count, durable=True)
    wait_until(lambda: engine.dead_letters("ship").count() == 25)
    # Only now: an event that has not failed when the journal is full is lost.
    opened.reload(journal_events=20, journal_when_full="pause")
    wait_until(lambda: "dead letters of consumer 'ship' hold back" in str(engine.health().problems))
    assert engine.dead_letters("ship").count() == 25
    engine.dead_letters("ship").purge(all=True)
    engine.consumers().resume("ship")
    wait_until(lambda: engine.health().ok)


def test_a_failing_event_is_lost_too_and_found_by_no_later_session(opened: Opener) -> None:
    engine = opened(journal_events=20, journal_when_full="pause")
    failed = threading.Event()

    @engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=9, first=300, jitter=0))
    def ship(event: StateEvent) -> None:
        failed.set()
        raise ValueError

    engine.set("orders", "first", 1)
    assert failed.wait(PATIENCE_S)
    for number in range(100):
        engine.set("orders", f"k{number}", number, durable=True)
    wait_until(lambda: "trimmed" in (engine.consumers()["ship"].paused or ""))
    wait_until(lambda: engine._parts.snapshot._store.journal.size().events < 20)

    engine = opened(journal_events=20, journal_when_full="pause")
    held = Held(opened)
    held.gate.set()
    lost = int(engine.consumers()["ship"].paused.split()[2])
    engine.consumers().resume("ship")
    engine.drain(PATIENCE_S)
    assert max(held.seen) == 99
    assert lost + len(set(held.seen)) == 101


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("journal_events: 0", "expected a whole number from 1 to 1000000000, found the integer 0"),
        ("journal_bytes: -1", "expected a whole number"),
        ("journal_when_full: reject", "expected `block` or `pause`, found the string 'reject'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        config.loads(f"limits:\n  scope_mailbox: 5\n  {line}\n", file="engine.yaml")
    assert str(refused.value).startswith(f"engine.yaml:3, key `limits.{line.partition(':')[0]}`: ")
