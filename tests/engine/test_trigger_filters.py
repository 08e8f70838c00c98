"""Triggers with filters on prefixes and on what has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from scopestate import Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import Config, from_mapping
from scopestate.errors import ConfigError, DeserializationError, InvalidCursor, InvalidRegistration


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


@pytest.fixture
def on_file(open_engine: Any, tmp_path: Path) -> Callable[[], Engine]:
    """Open an engine on a store; again after it was closed."""
    return lambda: cast(
        Engine, open_engine(adapter={"store_method": "file_based", "file_path": str(tmp_path / "store")})
    )


def test_a_durable_trigger_has_the_same_filters(on_file: Callable[[], Engine]) -> None:
    engine = on_file()
    seen: list[Any] = []
    engine.on_change(scope_prefix="shop:", prefix="o-", fields=["status"], events=("updated",), durable="c")(
        lambda event: seen.append((event.scope, event.key, event.revision))
    )
    for scope, key, value in (
        ("shop:1", "o-1", {"status": "new"}),
        ("shop:1", "o-1", {"status": "new", "n": 1}),
        ("shop:1", "o-1", {"status": "paid"}),
        ("shop:1", "x", {"status": "paid"}),
        ("other", "o-1", {"status": "paid"}),
        ("shop:2", "o-2", 1),
        ("shop:2", "o-2", {"status": "paid"}),
    ):
        engine.set(scope, key, value)
    engine.drain(timeout=20)

    assert sorted(seen) == [("shop:1", "o-1", 3), ("shop:2", "o-2", 2)]


def test_what_a_durable_trigger_holds_back_is_delivered_after_a_restart(on_file: Callable[[], Engine]) -> None:
    engine = on_file()
    engine.register_trigger(function_id="f", scope="s", durable="c", batch=10, batch_wait=3600)  # no function yet
    for number in range(3):
        engine.set("s", f"k{number}", number)
    engine.close()

    engine = on_file()
    seen: list[Any] = []
    engine.on_change(scope="s", durable="c", batch=10, batch_wait=3600, function_id="f", metadata={"a": 1})(seen.append)
    engine.drain(timeout=20)

    assert [[event.key for event in batch] for batch in seen] == [["k0", "k1", "k2"]]
    assert seen[0][0].metadata == {"a": 1}
    engine.set("s", "k3", 3)
    engine.drain(timeout=20)
    assert [event.key for event in seen[-1]] == ["k3"]


def test_a_file_without_a_store_cannot_have_a_durable_trigger() -> None:
    with pytest.raises(ConfigError, match="needs a store that outlives the process") as caught:
        Engine.from_config({"triggers": [{"function_id": "f"}, {"function_id": "f", "durable": "c"}]})

    assert caught.value.key == "triggers[1].durable"
    with Engine() as engine:
        with pytest.raises(ConfigError):
            engine.reconfigure(
                from_mapping({"limits": {"handler_attempts": 3}, "triggers": [{"function_id": "f", "durable": "c"}]})
            )
        assert engine.triggers() == []
        assert engine._limits.handler_attempts == 1


def test_a_durable_trigger_that_is_no_longer_in_the_file_keeps_its_consumer(tmp_path: Path) -> None:
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path / "store")}}
    workers = [{"name": "iii-state", "config": {"adapter": adapter}}]
    entry = {"function_id": "f", "scope": "s", "durable": "c"}
    seen: list[Any] = []
    with Engine.from_config({"workers": workers, "triggers": [entry]}) as engine:
        engine.register_function("f", lambda event: seen.append(event.key))
        engine.set("s", "a", 1)
        engine.drain(timeout=20)

        engine.reconfigure(from_mapping({"workers": workers}))
        engine.set("s", "b", 1)
        engine.drain(timeout=20)
        assert (seen, engine.triggers()) == (["a"], [])

        engine.reconfigure(from_mapping({"workers": workers, "triggers": [{**entry, "order": "scope"}]}))
        engine.drain(timeout=20)
        assert seen == ["a", "b"]


@pytest.mark.parametrize("option", ["scope", "key", "prefix", "scope_prefix", "fields"])
@pytest.mark.parametrize("durable", [None, "name"])
def test_a_filter_that_is_not_unicode_is_refused(engine: Engine, option: str, durable: str | None) -> None:
    value: Any = ["a", "\udcff"] if option == "fields" else "\udcff"

    with pytest.raises(InvalidRegistration, match=rf"`{option}` of a trigger has half of a surrogate pair"):
        engine.on_change(**{option: value, "durable": durable})(print)


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.consumers().pause("\udcff"),
        lambda engine: engine.consumers().pause("name", "\udcff"),
        lambda engine: engine.consumers().resume("\udcff"),
        lambda engine: engine.consumers().forget("\udcff"),
        lambda engine: engine.dead_letters("\udcff"),
        lambda engine: engine.dead_letters().list(after="\udcff"),
        lambda engine: engine.dead_letters().get("\udcff"),
        lambda engine: engine.dead_letters().replay(["\udcff"]),
        lambda engine: engine.dead_letters().purge(["\udcff"]),
    ],
)
def test_a_name_of_a_consumer_or_letter_that_is_not_unicode_is_refused(
    engine: Engine, call: Callable[[Engine], object]
) -> None:
    with pytest.raises(DeserializationError, match="has half of a surrogate pair"):
        call(engine)


def test_a_cursor_that_is_not_ascii_is_damaged(engine: Engine) -> None:
    with pytest.raises(InvalidCursor, match="damaged"):
        next(iter(engine.pages("s", cursor="\udcff")))
