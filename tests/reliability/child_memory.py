"""A program that is refused memory within commits. Usage: child_memory.py DIRECTORY DURABILITY COUNT.

With durability `commit`, it is refused memory while a scope hands over what waits for a commit.

It prints how often memory was refused. It is a process of its own with one thread, since memory is refused to every
thread: the one in which a test process listens to its test runner would end, and the run would never end.
"""

from __future__ import annotations

import _testcapi
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reliability.living import settings
from reliability.stretches import any_turn, check, scope_of, watched

from scopestate import Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.local import LocalScope
from scopestate.actors.reply import Envelope, Reply, deliver
from scopestate.config import from_mapping
from scopestate.ops import turns

DIRECTORY, DURABILITY, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3])


@contextmanager
def without_memory(begin: int) -> Iterator[None]:
    """Refuse COUNT allocations, after a number of successful ones."""
    _testcapi.set_nomemory(begin, begin + COUNT)
    try:
        yield
    finally:
        _testcapi.remove_mem_hooks()


def view_of(actor: LocalScope) -> Any:
    """Return the view that the scope gives to a turn."""
    seen: list[Any] = []

    class Look(turns.Get, frozen=True):
        def decide(self, view: turns.View) -> turns.Effects[bytes | None]:
            seen.append(view)
            return (), None

    actor.run(Look("a"))
    return seen[0]


def refusals(engine: Engine) -> int:
    """Commit 200 turns, each once for every allocation that it makes, with that one refused; return how many were."""
    watched(engine)
    actor = scope_of(engine)
    routed: list[Any] = []
    actor._outbox, actor._registry, actor._incoming = routed, {}, {}
    actor._expect = lambda: None  # type: ignore[method-assign]  # expired keys stay until a write removes them
    engine.set("s", "a", 0)
    draw = random.Random(COUNT)
    refused = 0
    for number in range(200):
        turn = any_turn(draw, number)
        for begin in itertools.count():
            stored, _ = turn.decide(view_of(actor))
            before = dict(actor._values or {}), actor._sequence
            try:
                with without_memory(begin):
                    actor._store(stored)
            except MemoryError:
                refused += 1
                check(actor, [event for _, event in routed], f"allocation {begin} of {turn}")
                assert list(actor._incoming.values()) == [event for _, event in routed]
                if actor._sequence != before[1]:
                    break  # it has happened; what comes after it was refused
                assert dict(actor._values or {}) == before[0]
                continue
            break
    return refused


def refusals_of_batches(engine: Engine) -> int:
    """Take 50 batches, each once for every allocation that it makes, as `refusals` does."""
    watched(engine)
    actor = scope_of(engine)
    gate = actor._gate
    assert gate is not None
    engine._snapshot.commit_soon = lambda: None  # type: ignore[method-assign]  # the batches are taken here
    refused = 0
    for number in range(1, 51):
        key = f"k{number % 7}"
        actor.send(Envelope(turns.Set(key, b"%d" % number), Reply()))
        for begin in itertools.count():
            try:
                with without_memory(begin):
                    batch = gate._take_batch()
            except MemoryError:
                refused += 1
                assert actor.is_dirty((key,)), f"allocation {begin}"
                assert [len(waiting) for waiting in (gate.outbox, gate.incoming, gate._waiting)] == [1, 1, 1]
                continue
            break
        assert batch.collected is not None
        assert [(name, row.json) for name, row in batch.collected.change().entries.items() if row is not None] == [
            (key, b"%d" % number)
        ]
        assert [event.new_value for event in batch.log] == [number]
        engine._parts.backend.store.save([batch.collected.change()])
        deliver(batch.settle())
    return refused


if __name__ == "__main__":
    opened = Engine(
        from_mapping(settings(DURABILITY, DIRECTORY)), dispatcher=DeterministicDispatcher(1, switch=0, busy=0)
    )
    try:
        print(refusals_of_batches(opened) if DURABILITY == "commit" else refusals(opened))  # noqa: T201 - the answer to the test
    finally:
        opened.close()
