"""KeyboardInterrupt at every place of a batch, a transaction or a `modify`: all of it has happened, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from effort import size
from reliability.conftest import OpenEngine
from reliability.figures import record
from reliability.interrupting import interrupt_at
from reliability.living import PATIENCE_S, InThread, Seen, until

from scopestate import Engine, ops
from scopestate.actors.callbacks import IN_CALLBACK

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAMES = ("a", "b", "c")


def by_batch(engine: Engine, number: int) -> None:
    with engine.batch("s") as b:
        for name in NAMES:
            b.set(name, number)


def by_steps(engine: Engine, number: int) -> None:
    with engine.batch("s") as b:
        b.check("a", value=engine.get("s", "a"))
        b.update("a", [ops.Set("", number)])
        b.delete("b")
        b.set("b", number, ttl=1000)
        b.set("c", number)


def by_function(engine: Engine, number: int) -> None:
    def write(tx: Any) -> None:
        for name in NAMES:
            tx[name] = number

    engine.transact("s", write)


def by_mapping(engine: Engine, number: int) -> None:
    engine.mapping("s").update(dict.fromkeys(NAMES, number))


WRITES: list[Callable[[Engine, int], None]] = [by_batch, by_steps, by_function, by_mapping]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("durability", ["memory", "commit"])
def test_a_transaction_interrupted_at_any_opcode_is_whole(
    open_engine: OpenEngine, tmp_path: Path, durability: str, write: Callable[[Engine, int], None]
) -> None:
    engine = open_engine(durability)
    seen = Seen()
    engine.register_function("watch", seen)
    engine.register_trigger(function_id="watch", scope="s")
    by_batch(engine, 0)
    actor = engine._scopes["s"]
    step = size(4, 1)
    for place in itertools.count(1 + WRITES.index(write) % step, step):
        before = engine.get("s", "a")
        reached = interrupt_at(place, lambda: write(engine, place), KeyboardInterrupt)  # noqa: B023 - runs at once
        until(lambda: not actor._claim and not actor._mailbox, f"stuck at opcode {place}")
        assert IN_CALLBACK == {}, f"the engine is refused to this thread, from opcode {place} on"
        values = engine.values("s")
        assert values in ([before] * 3, [place] * 3), f"half of it at opcode {place}"
        if not reached:
            break
    engine.drain(PATIENCE_S)
    events = seen.wait_for(actor._sequence)
    assert [event.revision for event in events] == list(range(1, actor._sequence + 1))
    whole = [{event.key for event in events[first : first + 3]} for first in range(0, len(events), 3)]
    assert whole == [set(NAMES)] * len(whole)
    InThread(engine.close).result()
    record(f"transactions interrupted at each opcode: {durability}, {write.__name__}", places=place)


def test_a_modify_interrupted_at_any_opcode_has_happened_or_not(open_engine: OpenEngine) -> None:
    engine = open_engine("memory")
    engine.set("s", "n", 0)
    for place in itertools.count(1):
        before = engine.get("s", "n")
        reached = interrupt_at(place, lambda: engine.modify("s", "n", lambda n: n + 1), KeyboardInterrupt)
        assert IN_CALLBACK == {}
        assert engine.get("s", "n") in (before, before + 1)
        if not reached:
            break
    assert engine.modify("s", "n", lambda n: n + 1).new_value == engine.get("s", "n")
