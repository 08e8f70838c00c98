"""A consumer that engines share, as the engine with the store takes its events."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from scopestate import Engine
from scopestate.actors.consuming import Outcome
from scopestate.actors.holders import Holder
from scopestate.ops.triggers import Trigger


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)
    store = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    state = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": store}}}
    with Engine.from_config({"workers": [state]}) as engine:
        yield engine
    logging.getLogger("scopestate").setLevel(logging.NOTSET)


def trigger(scope: str) -> Trigger:
    return Trigger(f"t-{scope}", "f", scope=scope, durable="ship")


def holder(name: str, scope: str, since_ms: int) -> Holder:
    return Holder(name, trigger(scope), since_ms, lambda: None, lambda positions: None, lambda: 0.0)


def test_what_was_given_to_another_engine_before_it_began_does_not_begin_here(engine: Engine) -> None:
    lost: list[int] = []
    port = engine._parts.consumers._consumers.open("ship", trigger("orders"))  # type: ignore[union-attr]
    port.start(trigger("orders"), lambda: None, lost.extend, dict)
    shared = port.share()
    shared.join(holder("other", "orders", 1))
    engine.set("orders", "a", 1)
    engine.set("orders", "b", 1)
    engine.flush()
    running, idle = [item.event.position for item in port.fetch(10)]
    port.began([(running, 1)])
    assert lost == []

    shared.join(holder("newer", "others", 1 << 60))  # this engine stands by from now on
    assert lost == [idle]
    lost.clear()
    port.began([(idle, 1)])
    assert lost == [idle]

    port.stop()
    port.ended([Outcome(running, "done", 1)])
    lost.clear()
    port.began([(idle, 1)])
    assert lost == [idle]
