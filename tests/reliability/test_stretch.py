"""Several changes of one turn happen as one: at every opcode, at every allocation, and for threads that read."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from effort import size
from reliability.conftest import OpenEngine
from reliability.figures import record
from reliability.interrupting import Interruption, interrupt_at
from reliability.living import PATIENCE_S, InThread, saved, start_child, until
from reliability.stretches import KEYS, LATER, any_turn, check, content, scope_of, watched

from scopestate.ops import transactions as tx
from scopestate.ops import turns
from scopestate.ops.values import decode

# As in test_interruption.py: an exception of a signal handler inside a weakref callback is dropped, with this warning.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DURABILITIES = ["memory", "interval", "commit"]


# ------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.timeout(300)  # thousands of interruptions, on a busy machine
def test_a_turn_of_several_changes_interrupted_at_any_opcode_is_whole_or_has_not_happened(
    open_engine: OpenEngine, tmp_path: Path, durability: str, error: type[BaseException]
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    for key in KEYS[:4]:
        engine.set("s", key, 0)
    actor = scope_of(engine)
    actor._expect = lambda: None  # type: ignore[method-assign]  # expired keys would be removed during a check
    draw = random.Random(f"{durability} {error.__name__}")
    places = 0
    # Each opcode of a batch; of the others every fifth, beginning at another one each time. Fewer in the suite.
    for kind in range(7):
        step = size(3, 1) if kind == 6 else size(12, 5)
        for place in itertools.count(1 + draw.randrange(step), step):
            turn = any_turn(draw, place, kind)
            reached = interrupt_at(place, lambda: actor.run(turn), error)  # noqa: B023 - runs at once
            until(lambda: not actor._claim and not actor._mailbox, f"stuck at opcode {place} of {turn}")
            check(actor, seen.wait_for(actor._sequence), f"opcode {place} of {turn}")
            places += 1
            if not reached:
                break
    engine.drain(PATIENCE_S)
    engine.flush()
    expected = actor._sequence, dict(content(actor).values)
    InThread(engine.close).result()
    if durability != "memory":
        assert saved(tmp_path / "store", "s") == expected
    assert places > size(120, 300)
    record(f"several changes, interrupted at each opcode: {durability}, {error.__name__}", places=places)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("method", ["modify", "transact", "batch"])
def test_a_call_with_a_function_interrupted_at_any_opcode_leaves_the_scope_usable(
    open_engine: OpenEngine, method: str, durability: str, error: type[BaseException]
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "a", 0)
    engine.set("s", "b", 0)
    actor = scope_of(engine)

    def move(transaction: tx.Transaction) -> None:
        transaction["a"] = transaction["a"] - 1
        transaction["b"] = transaction["b"] + 1

    def call() -> None:
        if method == "modify":
            engine.modify("s", "a", lambda value: value - 1)
        elif method == "transact":
            engine.transact("s", move)
        else:
            with engine.batch("s") as batch:
                batch.set("a", -1)
                batch.set("b", 1)

    for place in itertools.count(1 + (error is Interruption), size(8, 3)):
        reached = interrupt_at(place, call, error)
        until(lambda: not actor._claim and not actor._mailbox, f"stuck at opcode {place}")
        check(actor, seen.wait_for(actor._sequence), f"opcode {place}")
        if method != "modify":
            assert sum(engine.list("s")) == 0
        assert InThread(lambda: engine.set("t", "k", 1)).result() is not None
        if not reached:
            return


# ------------------------------------------------------------------------------------------------------- no memory


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_commit_without_memory_has_happened_whole_or_not_at_all(tmp_path: Path, kept: bool, count: int) -> None:
    """With one allocation refused, and with all of them from some moment on."""
    durability = "interval" if kept else "memory"
    process = start_child("memory", tmp_path / "store", durability, count)
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    refused = int(output)
    assert refused > 1000
    record(f"memory refused within commits: {'kept' if kept else 'not kept'}, {count}", refusals=refused)


def test_what_waits_for_a_commit_is_not_lost_without_memory(tmp_path: Path) -> None:
    process = start_child("memory", tmp_path / "store", "commit", 1)
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    refused = int(output)
    assert refused > 1000
    record("memory refused while a commit is taken", refusals=refused)


# -------------------------------------------------------------------------------------------------- threads that read


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("timed", [False, True])
def test_threads_that_read_meanwhile_see_all_of_a_transaction_or_nothing(open_engine: OpenEngine, timed: bool) -> None:
    engine = open_engine()
    names = [f"k{number}" for number in range(10)]
    engine.scope("s")
    actor = scope_of(engine)
    deadline = LATER if timed else turns.NO_DEADLINE
    over, seen = threading.Event(), [0, 0, 0]

    def write(number: int) -> None:
        data = b"%d" % number
        steps: list[tx.Step] = [tx.SetStep(name, data, deadline) for name in names]
        # A key that exists in every second one: creations and removals belong to it as well.
        steps.append(tx.SetStep("even", data) if number % 2 == 0 else tx.DeleteStep("even"))
        actor.run(tx.Batch(tuple(steps)))

    def read(which: int) -> None:
        while not over.is_set():
            first, last, again = engine.get("s", "k0"), engine.get("s", "k9"), engine.get("s", "k0")
            assert first <= last <= again
            values = actor.values_now()
            if values is not None:
                numbers = {int(data) for data in values}
                assert len(numbers) == 1
                assert len(values) == (11 if numbers.pop() % 2 == 0 else 10)
            seen[which] += 1

    write(0)
    readers = [InThread(lambda which=which: read(which)) for which in range(3)]  # type: ignore[misc]  # bound now
    for number in range(1, 4_001):
        write(number)
        if any(not reader.thread.is_alive() for reader in readers):
            break
    until(lambda: min(seen) > 50, "a reader does not get on")
    over.set()
    for reader in readers:
        reader.result()
    record(f"threads that read beside transactions: {'with' if timed else 'without'} deadlines", reads=sum(seen))


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("durability", ["memory", "interval"])
def test_8_threads_increment_a_number_10_000_times_each_by_modify(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)

    def work() -> None:
        for _ in range(10_000):
            engine.modify("s", "n", lambda value: value + 1, default=0)

    together([work] * 8)
    assert engine.get("s", "n") == 80_000
    entry = engine.entry("s", "n")
    assert entry is not None
    assert entry.revision == 80_000


@pytest.mark.parametrize("durability", DURABILITIES)
def test_8_threads_move_money_and_a_ninth_finds_the_sum_in_every_snapshot(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    engine = open_engine(durability)
    with engine.batch("s") as batch:
        for account in range(100):
            batch.set(f"{account:02}", 1_000)
    over, snapshots, moves = threading.Event(), [0], 1_500 if durability != "commit" else 150

    def move(which: int) -> None:
        draw = random.Random(which)
        for _ in range(moves):
            one, other = (f"{account:02}" for account in draw.sample(range(100), 2))
            amount = draw.randint(1, 100)

            def transfer(transaction: tx.Transaction, one: str = one, other: str = other, amount: int = amount) -> None:
                transaction[one] = transaction[one] - amount
                transaction[other] = transaction[other] + amount

            engine.transact("s", transfer)

    def look() -> None:
        while not over.is_set():
            assert sum(engine.list("s")) == 100_000
            assert sum(value for _, value in engine.items("s")) == 100_000
            assert sum(entry.value for entry in engine.entries("s")) == 100_000
            snapshots[0] += 1

    ninth = InThread(look)
    together([lambda which=which: move(which) for which in range(8)])  # type: ignore[misc]  # bound now
    until(lambda: snapshots[0] > 5 or not ninth.thread.is_alive(), "no snapshot is taken")
    over.set()
    ninth.result()
    expected = dict(engine.items("s"))
    assert sum(expected.values()) == 100_000
    engine.close()
    if durability != "memory":
        _, values = saved(tmp_path / "store", "s")
        assert {key: decode(data) for key, data in values.items()} == expected
    record(f"money moved by 8 threads: {durability}", moves=8 * moves, snapshots=snapshots[0])


def together(works: list[Callable[[], Any]]) -> None:
    """Do all of it at the same time, each on a thread."""
    threads = [InThread(work) for work in works]
    for thread in threads:
        thread.thread.join(100)
        thread.result()
