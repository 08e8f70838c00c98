"""Durable triggers of processes that share a directory: once for all of them, over hand-overs, kills and stops."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import PATIENCE_S, Process, role_of, wait_until

from scopestate import Delivery, Engine, StateEvent, parts, sharing

Start = Callable[..., Process]
OpenEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("scopestate").setLevel(logging.NOTSET)


class Work:
    """A handler for several engines of this process. A key is never handled twice at the same time."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any, int]] = []
        self.begun: list[str] = []
        self.overlaps: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.gates: dict[str, threading.Event] = {}
        """Those of engines that have their own."""
        self._running: Counter[str] = Counter()
        self._exclusive = threading.Lock()

    def on(self, engine: Engine, name: str, **options: Any) -> None:
        def ship(event: StateEvent, delivery: Delivery) -> None:
            with self._exclusive:
                self.begun.append(event.key)
                self._running[event.key] += 1
                if self._running[event.key] > 1:
                    self.overlaps.append(event.key)
            self.gates.get(name, self.gate).wait(PATIENCE_S)
            with self._exclusive:
                self._running[event.key] -= 1
                self.seen.append((name, event.key, event.new_value, delivery.attempt))

        engine.on_change(scope="orders", durable="ship", function_id="ship", ack_wait=PATIENCE_S, **options)(ship)

    def values(self, key: str) -> list[Any]:
        return [value for _, one, value, _ in self.seen if one == key]


def test_each_event_is_handled_once_in_one_of_the_engines(open_engine: OpenEngine) -> None:
    engines = [open_engine() for _ in range(4)]
    work = Work()
    for number, engine in enumerate(engines):
        work.on(engine, f"e{number}")
    work.gate.clear()
    for number in range(400):
        engines[number % 4].set("orders", f"o-{number % 40}", number)
    wait_until(lambda: len(work.begun) >= 24)  # each of them handles eight at a time
    work.gate.set()
    engines[3].drain(PATIENCE_S)
    assert len(work.seen) == 400
    assert work.overlaps == []
    assert len({name for name, *_ in work.seen}) >= 3
    assert [one.lag_events for one in engines[2].consumers()] == [0]


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_rolling_restarts_lose_nothing_and_repeat_nothing(
    open_engine: OpenEngine, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CLAIM_S", PATIENCE_S)
    work = Work()
    engines = [open_engine(durability=durability) for _ in range(3)]
    for number, engine in enumerate(engines):
        work.on(engine, f"e{number}")
    count = 0
    for generation in range(4):
        for _ in range(50):
            engines[1].set("orders", f"o-{count % 10}", count)
            count += 1
        engines.pop(0).close()
        engines.append(open_engine(durability=durability))
        work.on(engines[-1], f"next {generation}")
    engines[0].drain(PATIENCE_S)
    for key in range(10):
        assert work.values(f"o-{key}") == list(range(key, count, 10))
    assert work.overlaps == []
    assert {attempt for *_, attempt in work.seen} == {1}


def test_what_runs_in_a_follower_goes_on_when_the_owner_closes(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CLAIM_S", PATIENCE_S)
    owner, one, two = (open_engine() for _ in range(3))
    work = Work()
    work.gate.clear()
    for name, engine in (("one", one), ("two", two)):
        work.on(engine, name)
    for number in range(12):
        owner.set("orders", f"o-{number % 6}", number)
    wait_until(lambda: len(work.begun) == 6)
    owner.close()
    wait_until(lambda: {role_of(one), role_of(two)} == {"owner", "follower"})
    (two if role_of(one) == "owner" else one).set("orders", "new", 12)
    wait_until(lambda: "new" in work.begun)
    work.gate.set()
    two.drain(PATIENCE_S)
    for key in range(6):
        assert work.values(f"o-{key}") == list(range(key, 12, 6))
    assert work.overlaps == []
    assert {attempt for *_, attempt in work.seen} == {1}


def test_what_runs_in_a_follower_is_not_given_away_while_the_next_owner_starts_to_serve(
    start: Start, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_late(name: str) -> Any:
        threading.Event().wait(parts.CLAIM_S + 0.5)
        return importlib.import_module(name)

    monkeypatch.setattr(sharing, "importlib", SimpleNamespace(import_module=import_late, util=importlib.util))
    owner = start()
    engines = {"one": open_engine(), "two": open_engine()}
    work = Work()
    for name, engine in engines.items():
        work.gates[name] = threading.Event()
        work.on(engine, name, order="key", concurrency=3)
    for number in range(6):
        engines["one"].set("orders", f"o-{number}", number)
    wait_until(lambda: len(work.begun) == 6)
    owner.kill()
    wait_until(lambda: {role_of(engine) for engine in engines.values()} == {"owner", "follower"})
    follower, new_owner = sorted(engines, key=lambda name: role_of(engines[name]))
    work.gates[new_owner].set()  # it could handle more
    engines[follower].set("orders", "o-0", 6)  # when it is served again
    work.gates[follower].set()
    engines[follower].drain(PATIENCE_S)
    assert sorted(work.begun) == ["o-0", *(f"o-{number}" for number in range(6))]
    assert work.overlaps == []
    assert {attempt for *_, attempt in work.seen} == {1}


def test_a_transaction_goes_on_over_a_hand_over(open_engine: OpenEngine) -> None:
    owner, one, two = (open_engine() for _ in range(3))
    for engine in (one, two):

        def count(event: StateEvent, delivery: Delivery) -> None:
            with delivery.transaction("totals") as tx:
                tx.set("n", tx.get("n", 0) + 1)

        engine.on_change(scope="orders", durable="count", function_id="count", order="none")(count)
    for number in range(50):
        owner.set("orders", f"o-{number}", number)
    owner.close()
    for number in range(50):
        one.set("orders", f"p-{number}", number)
    two.drain(PATIENCE_S)
    assert two.get("totals", "n") == 100


HANDLER = """
import os, threading, time
from scopestate import Retry
kept["gate"] = threading.Event()

def ship(event, delivery):
    with open(path, "ab", buffering=0) as file:
        file.write(f"{os.getpid()} begin {event.key} {event.new_value} {delivery.attempt}\\n".encode())
    if event.key.startswith("slow"):
        kept["gate"].wait(60)
    with open(path, "ab", buffering=0) as file:
        file.write(f"{os.getpid()} end {event.key} {event.new_value} {delivery.attempt}\\n".encode())

engine.on_change(scope="orders", durable="ship", ack_wait=ack_wait, retry=Retry(first=0.01))(ship)
"""


class Log:
    """What the handlers of several processes have written, line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def handle_in(self, process: Process, ack_wait: float = 30.0) -> None:
        process.do(f"path = {str(self.path)!r}; ack_wait = {ack_wait}" + HANDLER)

    def lines(self) -> list[tuple[int, str, str, int, int]]:
        """Return process, `begin` or `end`, key, value, attempt of each."""
        found = []
        for line in self.path.read_text().splitlines():
            pid, what, key, value, attempt = line.split()
            found.append((int(pid), what, key, int(value), int(attempt)))
        return found

    def of(self, key: str, what: str = "end") -> list[tuple[int, int, int]]:
        """Return process, value and attempt of the lines of a key."""
        return [(pid, value, attempt) for pid, kind, one, value, attempt in self.lines() if one == key and kind == what]


@pytest.fixture
def handled(tmp_path: Path) -> Log:
    return Log(tmp_path / "handled")


def test_a_follower_that_is_killed_leaves_its_delivery_to_another(
    open_engine: OpenEngine, start: Start, handled: Log
) -> None:
    owner = open_engine()
    one = start()
    handled.handle_in(one)
    owner.set("orders", "slow", 1)
    owner.set("orders", "slow", 2)
    wait_until(lambda: handled.of("slow", "begin"))
    two = start()
    handled.handle_in(two)
    two.do("kept['gate'].set()")
    one.kill()
    wait_until(lambda: len(handled.of("slow")) == 2)
    assert handled.of("slow") == [(two.pid, 1, 2), (two.pid, 2, 1)]
    owner.drain(PATIENCE_S)
    assert owner.consumers()["ship"].lag_events == 0


def test_what_runs_goes_on_when_the_owner_is_killed(start: Start, handled: Log) -> None:
    owner, one, two = start(), start(), start()
    for process in (one, two):
        handled.handle_in(process)
    owner.do("for number in range(3): engine.set('orders', 'slow', number, durable=True)")
    wait_until(lambda: handled.of("slow", "begin"))
    busy = one if handled.of("slow", "begin")[0][0] == one.pid else two
    owner.kill()
    other = two if busy is one else one
    other.do("engine.set('orders', 'quick', 1)")
    wait_until(lambda: handled.of("quick"))
    busy.do("kept['gate'].set()")
    other.do("kept['gate'].set()")
    wait_until(lambda: len(handled.of("slow")) == 3)
    other.do("engine.drain(60)")
    assert [value for _, value, _ in handled.of("slow")] == [0, 1, 2]
    assert handled.of("slow")[0] == (busy.pid, 0, 1)
    assert handled.of("slow", "begin")[0][2] == 1
    assert len(handled.of("slow", "begin")) == 3


def test_a_stopped_follower_loses_what_it_holds(open_engine: OpenEngine, start: Start, handled: Log) -> None:
    owner = open_engine()
    one = start()
    handled.handle_in(one, ack_wait=2.0)
    owner.set("orders", "slow", 1)
    wait_until(lambda: handled.of("slow", "begin"))
    one.send(signal.SIGSTOP)
    two = start()
    handled.handle_in(two)
    two.do("kept['gate'].set()")
    wait_until(lambda: handled.of("slow"))
    assert handled.of("slow") == [(two.pid, 1, 2)]
    one.send(signal.SIGCONT)
    one.do("kept['gate'].set()")
    owner.set("orders", "after", 2)
    wait_until(lambda: handled.of("after"))
    one.do("engine.drain(60)")
    assert [attempt for pid, _, attempt in handled.of("slow") if pid == two.pid] == [2]
    assert owner.consumers()["ship"].lag_events == 0


def test_the_owner_that_is_killed_in_its_own_delivery(start: Start, handled: Log) -> None:
    owner = start()
    handled.handle_in(owner)
    owner.do("engine.set('orders', 'slow', 1, durable=True)")
    wait_until(lambda: handled.of("slow", "begin"))
    follower = start()
    handled.handle_in(follower)
    follower.do("kept['gate'].set()")
    owner.kill()
    wait_until(lambda: handled.of("slow"))
    assert handled.of("slow") == [(follower.pid, 1, 2)]
