"""Triggers with filters on prefixes and on what has changed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scopestate import Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import Config, from_mapping
from scopestate.errors import InvalidRegistration


@pytest.mark.parametrize("known", [True, False], ids=["a scope in memory", "a new scope"])
def test_a_scope_prefix_covers_scopes_that_are_there_and_those_that_come(engine: Engine, known: bool) -> None:
    if known:
        engine.set("orders:1", "a", 0)
    seen: list[tuple[str, str, Any]] = []
    engine.on_change(scope_prefix="orders:", prefix="a")(
        lambda event: seen.append((event.scope, event.key, event.new_value))
    )

    for scope, key in (("orders:1", "a1"), ("orders:1", "b"), ("orders", "a"), ("orders:2", "a2")):
        engine.set(scope, key, 1)
    engine.drain()

    assert seen == [("orders:1", "a1", 1), ("orders:2", "a2", 1)]


def test_the_same_value_is_no_change_for_a_trigger_that_compares(engine: Engine) -> None:
    changed: list[Any] = []
    status: list[Any] = []
    every: list[Any] = []
    engine.on_change(scope="s", only_if_changed=True)(lambda event: changed.append(event.revision))
    engine.on_change(scope="s", fields=["status"])(lambda event: status.append(event.revision))
    engine.on_change(scope="s")(lambda event: every.append(event.revision))

    engine.set("s", "k", {"status": "new", "n": 1})
    engine.set("s", "k", {"n": 1, "status": "new"})
    engine.set("s", "k", {"n": 2, "status": "new"})
    engine.set("s", "k", {"n": 2, "status": "new"})
    engine.delete("s", "k")
    engine.delete("s", "k")
    engine.drain()

    assert (changed, status, every) == ([1, 3, 5], [1, 5], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("options", [{"debounce": 60}, {"batch": 10, "batch_wait": 60}])
@pytest.mark.parametrize("end", ["drain", "close"])
def test_what_is_held_back_is_delivered_by_a_drain_and_by_the_close(
    engine: Engine, options: dict[str, Any], end: str
) -> None:
    seen: list[Any] = []

    @engine.on_change(scope="s", **options)
    async def note(what: Any) -> None:
        seen.extend(what if type(what) is list else [what])

    for number in range(3):
        engine.set("s", f"k{number}", number)
    getattr(engine, end)()

    assert [event.new_value for event in seen] == [0, 1, 2]


def test_metadata_reaches_the_handler_and_not_the_condition(engine: Engine) -> None:
    asked: list[Any] = []
    told: list[Any] = []

    def condition(event: Any) -> bool:
        asked.append(event.metadata)
        return True

    def note(event: Any) -> None:
        told.append(event.metadata)
        event.metadata["team"] = "changed"

    engine.on_change(scope="s", condition=condition, metadata={"team": "x"})(note)
    engine.set("s", "k", 1)
    engine.set("s", "k", 2)
    engine.drain()

    assert asked == [None, None]
    assert told == [{"team": "changed"}, {"team": "changed"}]
    assert told[0] is not told[1]


def test_a_wrong_option_registers_nothing(engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="`order` of a trigger is one of"):
        engine.on_change(scope="s", order="keys")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"on_change\(\) got an unexpected keyword argument 'debonce': did you mean 'debo"
    ):
        engine.on_change(scope="s", debonce=1)  # type: ignore[call-arg]

    assert engine.triggers() == []


def test_a_reload_changes_how_events_are_delivered_and_keeps_those_that_wait() -> None:
    functions = {"f": "json:loads"}
    seen: list[Any] = []

    def configured(**options: Any) -> Config:
        return from_mapping({"functions": functions, "triggers": [{"function_id": "f", "scope": "s", **options}]})

    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    with Engine(configured(debounce=3600), dispatcher=dispatcher) as engine:
        engine.register_function("f", seen.append)
        [before] = engine.triggers()
        engine.set("s", "a", 1)
        engine.set("s", "a", 2)
        dispatcher.run_until_idle()

        engine.reconfigure(msgspec.structs.replace(configured(batch=2, batch_wait=3600), functions={}))
        [after] = engine.triggers()
        engine.set("s", "b", 1)
        engine.set("s", "c", 1)
        dispatcher.run_until_idle()

    assert before.trigger_id == after.trigger_id
    assert after.trigger.batch == 2
    told = [[event.key for event in what] if type(what) is list else (what.key, what.coalesced) for what in seen]
    assert told == [("a", 2), ["b", "c"]]
