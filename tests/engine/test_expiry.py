"""Keys expire at their deadline: in virtual time, whatever happens to clocks, scopes, handlers and stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, ScopeRule
from scopestate.ops.results import StateEvent

Open = Callable[..., Engine]


class World:
    """Engines on one store, one after another, in virtual time."""

    def __init__(self, directory: Path, durability: str) -> None:
        self.directory, self.durability = directory, durability
        self.dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
        self.seen: list[StateEvent] = []
        self.engine: Engine = None  # type: ignore[assignment]  # until it is opened

    def open(self, rules: tuple[ScopeRule, ...] = (), watch: bool = True, **limits: Any) -> Engine:
        kv = KvOptions()
        if self.durability != "memory":
            kv = KvOptions("file_based", str(self.directory), 1000, self.durability)  # type: ignore[arg-type]
        config = Config(AdapterConfig("kv", kv), scopes=rules, limits=LimitsConfig(**limits))
        self.engine = Engine(config, dispatcher=self.dispatcher, handle_sigterm=False)
        if watch:
            self.engine.on_change()(self.seen.append)
        return self.engine

    def end(self) -> None:
        """Close the engine, and let a new process begin at the same time of day."""
        self.engine.close()
        wall_s = self.dispatcher.wall_s()
        self.dispatcher = DeterministicDispatcher(1, switch=0, busy=0, wall_s=wall_s)

    def told(self) -> list[tuple[str, str, int]]:
        """Return (kind, key, revision) of the events since the last call."""
        told = [(event.event_type.removeprefix("state:"), event.key, event.revision) for event in self.seen]
        self.seen.clear()
        return told


@pytest.fixture(params=["memory", "interval", "commit"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store", request.param)
    yield world
    world.engine.close()


@pytest.fixture(params=["interval", "commit"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store", request.param)
    yield world
    world.engine.close()


def test_a_key_is_absent_from_its_deadline_on_and_its_event_follows(world: World) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=10)
    engine.set("s", "b", 2)
    world.dispatcher.advance(9.999)
    assert engine.get("s", "a") == 1
    world.told()

    world.dispatcher._now += 0.001  # nothing has run at the deadline yet
    assert engine.get("s", "a") is None
    assert engine.list("s") == [2]
    assert world.told() == []
    world.dispatcher.advance(0.05)

    [event] = world.seen
    assert (event.event_type, event.key, event.old_value, event.new_value) == ("state:expired", "a", 1, None)
    assert (event.revision, event.late_ms) == (3, 0)
    assert engine.stats().expired == 1
