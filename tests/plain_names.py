"""Writing with names and values of other string types on any engine, and what must arrive at handlers."""

from __future__ import annotations

import asyncio
import threading
from enum import Enum, IntEnum
from typing import Any

import numpy as np

from scopestate import Engine, StateEvent, messages, ops


class Name(str, Enum):  # noqa: UP042 - the older spelling: its str() is `Name.USERS`, its text is not
    USERS = "users"
    SET = "set"


class Level(IntEnum):
    HIGH = 3


class Markup(str):
    """As of template engines: shows itself in another way, and joins to more of itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Markup()"

    def __add__(self, other: str) -> Markup:
        return Markup(str.__add__(self, other))


NAMES = (Name.USERS, Markup("page"), np.str_("column"))


def odd_parts(item: object, place: str = "") -> list[str]:
    """Name each part of `item` that is no exact JSON type."""
    if type(item) is dict:
        return [
            odd for key, value in item.items() for part in (key, value) for odd in odd_parts(part, f"{place}.{key}")
        ]
    if type(item) is list:
        return [odd for index, value in enumerate(item) for odd in odd_parts(value, f"{place}[{index}]")]
    return [] if type(item) in (str, int, float, bool, type(None)) else [f"{place}: {type(item).__name__}"]


def check_that_only_plain_names_arrive(engine: Engine, patience_s: float = 30.0) -> None:
    """Write with names of other types in every way there is. `engine` may keep its scopes anywhere."""
    events: list[StateEvent] = []
    payloads: list[Any] = []
    last = threading.Event()

    @engine.on_change(function_id=Markup("test::note"))
    def note(event: StateEvent) -> None:
        events.append(event)
        if event.key == "the last one":
            last.set()

    engine.register_function(Markup("test::keep"), payloads.append, description=Markup("keeps"))
    for name in NAMES:
        engine.register_trigger(
            function_id=Markup("test::note"), trigger_id=Markup(f"of {name!r}"), scope=name, key=name
        )
        engine.set(name, name, {name: [name, Level.HIGH, np.float64(1.5)]})
        engine.update(
            name, name, [ops.Set("", {}), ops.Set(name, name), ops.Append(name, name), ops.Merge({name: 1}, [name])]
        )
        engine.update(name, name, [{Markup("type"): Name.SET, "path": name, "value": Level.HIGH}])
        engine.update(
            name, name, [ops.Increment(name, Level.HIGH), {"type": "decrement", "path": name, "by": Level.HIGH}]
        )
        assert engine.get(name, name) == {str.__str__(name): 3}
        engine.delete(name, name)
        engine.delete(name, Markup("is not there"))
        engine.ask(messages.Set(name, name, name))
        engine.call(Markup("state::set"), {Markup("scope"): name, "key": name, "value": name})
        engine.call(Markup("test::keep"), {name: [name]})
        engine.scope(name).set(name, name)
        engine.scope(name).actor_ref.ask(messages.Set(name, name, name))

        async def in_asyncio(name: str = name) -> None:
            await engine.aio.set(name, name, name)
            await engine.aio.update(name, name, [ops.Set("", name)])
            assert await engine.aio.get(name, name) == name
            await engine.aio.delete(name, name)
            await engine.aio.set(name, name, name)

        asyncio.run(in_asyncio())
    engine.set("s", "the last one", 1)
    assert last.wait(patience_s)
    engine.drain(patience_s)

    assert len(payloads) == len(NAMES)
    assert odd_parts(payloads) == []
    for event in events:
        assert odd_parts([event.scope, event.key, event.event_type, event.to_json()]) == [], event
    assert odd_parts(engine.list_groups()) == []
    assert odd_parts(engine.functions()) == []
    for handle in engine.triggers():
        trigger = handle.trigger
        assert odd_parts([handle.trigger_id, trigger.function_id, trigger.scope, trigger.key]) == []
    for name in NAMES:
        assert engine.get(str.__str__(name), str.__str__(name)) == str.__str__(name)
