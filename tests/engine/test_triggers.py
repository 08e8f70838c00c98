"""Triggers: registering them, which writes they see, and in which order their handlers run."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from watching import PATIENCE_S, Failures, Gate, LoopThread, Seen, in_thread

from scopestate import Engine, StateEvent
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.errors import EngineClosed, InvalidRegistration
from scopestate.ops import Increment
from scopestate.ops.functions import DESCRIBED

PLACES = [(scope, key) for scope in ("users", "Users", "", "u") for key in ("profile", "PROFILE", "")]


# ------------------------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize("scope", [None, "users", ""])
@pytest.mark.parametrize("key", [None, "profile", ""])
def test_filters_are_exact_and_none_matches_everything(scope: str | None, key: str | None, engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope=scope, key=key)(seen)

    for place in PLACES:
        engine.set(*place, 1)

    engine.drain(timeout=PATIENCE_S)
    assert [(event.scope, event.key) for event in seen.events] == [
        place for place in PLACES if scope in (None, place[0]) and key in (None, place[1])
    ]


def test_filters_by_name_and_as_the_raw_object_are_the_same(engine: Engine) -> None:
    named = engine.register_trigger(function_id="f", scope="s", key="k", condition_function_id="c", trigger_id="a")
    raw = engine.register_trigger(
        function_id="f", config={"scope": "s", "key": "k", "condition_function_id": "c"}, trigger_id="b"
    )

    assert (named.trigger.scope, named.trigger.key, named.trigger.condition_function_id) == ("s", "k", "c")
    assert (raw.trigger.scope, raw.trigger.key, raw.trigger.condition_function_id) == ("s", "k", "c")
    assert repr(raw) == "<TriggerHandle 'b' -> 'f'>"


def test_kinds_of_events_by_name_and_in_the_raw_object_are_the_same(engine: Engine) -> None:
    named = engine.register_trigger(function_id="f", events={"expired", "created"})
    raw = engine.register_trigger(function_id="f", config={"events": ["expired", "created", "expired"]})

    assert named.trigger.events == raw.trigger.events == ("created", "expired")
    assert engine.register_trigger(function_id="f", config={"events": None}).trigger.events is None


def test_a_trigger_that_is_replaced_wants_what_the_new_one_names(engine: Engine) -> None:
    seen = Seen()
    engine.register_function("f", seen)
    engine.register_trigger(function_id="f", trigger_id="t")
    engine.set("s", "k", 1)
    engine.register_trigger(function_id="f", trigger_id="t", events=("deleted",))
    engine.set("s", "k", 2)
    engine.delete("s", "k")

    engine.drain(timeout=PATIENCE_S)
    assert [event.event_type for event in seen.events] == ["state:created", "state:deleted"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"function_id": ""}, "function_id"),
        ({"function_id": None}, "function_id"),
        ({"function_id": "f", "trigger_id": ""}, "trigger_id"),
        ({"function_id": "f", "trigger_id": 5}, "trigger_id"),
        ({"function_id": "f", "scope": 5}, "`scope`.*number"),
        ({"function_id": "f", "key": ["k"]}, "`key`.*array"),
        ({"function_id": "f", "condition_function_id": True}, "`condition_function_id`.*boolean"),
        ({"function_id": "f", "config": None}, "object"),
        ({"function_id": "f", "config": []}, "object"),
        ({"function_id": "f", "config": {"scope": 5}}, "`scope`"),
        ({"function_id": "f", "config": {}, "scope": "s"}, "not both"),
        ({"function_id": "f", "events": "expired"}, "`events`.*list.*string"),
        ({"function_id": "f", "events": []}, "never fire"),
        ({"function_id": "f", "events": ["state:expired"]}, "'state:expired'; the kinds are created, updated"),
        ({"function_id": "f", "config": {"events": [["expired"]]}}, "not a string"),
        ({"function_id": "f", "config": {"events": {}}}, "`events`.*object"),
    ],
)
def test_a_trigger_that_makes_no_sense_is_refused_whole(arguments: dict[str, Any], words: str, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match=words) as refused:
        engine.register_trigger(**arguments)

    assert refused.value.code == "registration_error"
    assert engine.triggers() == []


def test_a_field_that_nobody_knows_is_ignored_but_not_in_silence(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    engine.register_function("h", seen)
    with caplog.at_level(logging.WARNING, "scopestate.triggers"):
        engine.register_trigger(function_id="h", config={"scpoe": "users"})
    engine.set("other", "k", 1)

    assert len(seen.wait_for(1)) == 1
    assert "scpoe" in caplog.text
    assert "scope" in caplog.text


# -------------------------------------------------------------------------------------------------------- registration


def test_a_trigger_may_name_a_function_that_comes_later(engine: Engine) -> None:
    failures, seen = Failures(), Seen()
    engine.on_error(failures)
    engine.register_trigger(function_id="later", scope="s")
    engine.set("s", "a", 1)
    failures.wait_for(1)

    engine.register_function("later", seen)
    engine.set("s", "b", 1)

    assert [event.key for event in seen.wait_for(1)] == ["b"]
    assert failures.all[0].error.code == "function_not_found"  # type: ignore[attr-defined]


def test_a_made_id_is_unique_and_a_given_one_is_kept(engine: Engine) -> None:
    handles = [engine.register_trigger(function_id="f") for _ in range(10)]
    given = engine.register_trigger(function_id="f", trigger_id="mine")

    assert len({handle.trigger_id for handle in handles}) == 10
    assert given.trigger_id == "mine"
    assert [handle.trigger_id for handle in engine.triggers()] == [*(handle.trigger_id for handle in handles), "mine"]


def test_the_same_id_again_replaces_the_trigger(engine: Engine) -> None:
    old, new = Seen(), Seen()
    engine.register_function("old", old)
    engine.register_function("new", new)
    engine.register_trigger(function_id="old", scope="s", trigger_id="t")
    engine.register_trigger(function_id="new", scope="s", trigger_id="t")
    engine.set("s", "k", 1)

    new.wait_for(1)
    engine.drain(timeout=PATIENCE_S)
    assert old.events == []
    assert len(engine.triggers()) == 1


def test_replacing_with_other_filters_moves_the_trigger(engine: Engine) -> None:
    seen = Seen()
    engine.register_function("h", seen)
    engine.register_trigger(function_id="h", scope="a", key="k", trigger_id="t")
    engine.register_trigger(function_id="h", scope="b", trigger_id="t")

    engine.set("a", "k", 1)
    engine.set("b", "k", 1)

    engine.drain(timeout=PATIENCE_S)
    assert [event.scope for event in seen.events] == ["b"]


def test_events_that_wait_outlive_a_replacement_with_the_same_filters(engine: Engine) -> None:
    gate, new = Gate(), Seen()
    engine.register_function("old", gate)
    engine.register_function("new", new)
    engine.register_trigger(function_id="old", scope="s", trigger_id="t")
    for key in ("a", "b", "c"):
        engine.set("s", key, 1)
    gate.wait_until_reached()

    engine.register_trigger(function_id="new", scope="s", trigger_id="t")
    gate.open()

    assert [event.key for event in new.wait_for(2)] == ["b", "c"]
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().dropped == 0


def test_unregistering_drops_what_waits_and_lets_what_runs_end(engine: Engine) -> None:
    gate, keys = Gate(), list[str]()

    def handler(event: StateEvent) -> None:
        keys.append(event.key)
        gate()

    engine.register_function("h", handler)
    handle = engine.register_trigger(function_id="h", scope="s")
    for key in ("a", "b", "c"):
        engine.set("s", key, 1)
    gate.wait_until_reached()

    handle.unregister()
    gate.open()
    engine.set("s", "d", 1)

    engine.drain(timeout=PATIENCE_S)  # waits for the one that runs, although its trigger is gone
    assert keys == ["a"]
    assert (engine.stats().deliveries, engine.stats().dropped) == (1, 2)
    assert engine.triggers() == []


def test_figures_of_triggers_that_come_and_go_are_kept(engine: Engine) -> None:
    for number in range(300):
        engine.register_function("h", Seen())
        handle = engine.register_trigger(function_id="h", scope="s")
        engine.set("s", "k", number)
        engine.drain(timeout=PATIENCE_S)
        handle.unregister()

    assert engine.stats().deliveries == 300


def test_unregistering_twice_is_an_error(engine: Engine) -> None:
    handle = engine.register_trigger(function_id="h")
    handle.unregister()

    with pytest.raises(InvalidRegistration, match="unregistered before"):
        handle.unregister()


def test_a_trigger_sees_every_write_after_its_registration_and_none_after_its_end(engine: Engine) -> None:
    for number in range(50):
        engine.set("s", "before", number)
        seen = Seen()
        engine.register_function("h", seen)
        handle = engine.register_trigger(function_id="h", scope="s")
        engine.set("s", "during", number)
        engine.drain(timeout=PATIENCE_S)
        handle.unregister()
        engine.set("s", "after", number)
        engine.drain(timeout=PATIENCE_S)
        assert seen.keys == ["during"]


def test_triggers_on_a_scope_find_it_whether_it_is_in_memory_or_not(engine: Engine) -> None:
    seen = Seen()
    engine.set("old", "k", 1)
    engine.on_change(scope="old")(seen)
    engine.on_change(scope="new")(seen)

    engine.set("old", "k", 2)
    engine.set("new", "k", 2)

    engine.drain(timeout=PATIENCE_S)
    assert sorted(event.scope for event in seen.events) == ["new", "old"]


def test_a_closed_engine_takes_no_registrations(engine: Engine) -> None:
    engine.close()

    for call in (
        lambda: engine.register_function("f", print),
        lambda: engine.register_trigger(function_id="f"),
        lambda: engine.on_change()(print),
    ):
        with pytest.raises(EngineClosed):
            call()


# ----------------------------------------------------------------------------------------------------------- on_change


def test_on_change_returns_the_function_itself(engine: Engine) -> None:
    def handler(event: StateEvent) -> None:
        """A handler."""

    assert engine.on_change(scope="s")(handler) is handler
    assert [entry["name"] for entry in engine.functions()[-1:]] == [f"{__name__}::{handler.__qualname__}"]


@pytest.mark.parametrize("misplaced", ["users", lambda event: None], ids=["a scope", "without parentheses"])
def test_on_change_says_how_it_is_written(misplaced: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match=r"write `@engine\.on_change\(scope=\.\.\., key=\.\.\.\)`"):
        engine.on_change(misplaced)

    assert engine.triggers() == []


@pytest.mark.parametrize("misplaced", ["ada", lambda event: None], ids=["a key", "without parentheses"])
def test_on_change_of_a_scope_says_how_it_is_written(misplaced: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match=r"write `@scope\.on_change\(key=\.\.\.\)`"):
        engine.scope("users").on_change(misplaced)

    assert engine.triggers() == []


def test_on_change_of_a_scope_refuses_wrong_options_before_it_has_a_function(engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="`events` of a trigger"):
        engine.scope("users").on_change(events="updated")  # type: ignore[arg-type]


def test_handlers_with_the_same_name_do_not_replace_each_other(engine: Engine) -> None:
    seen = [Seen(), Seen(), Seen()]
    for one in seen:
        engine.on_change()(lambda event, one=one: one(event))

    engine.set("s", "k", 1)

    for one in seen:
        one.wait_for(1)
    assert len({entry["name"] for entry in engine.functions()}) == len(DESCRIBED) + 3


def test_on_change_takes_an_id_a_condition_and_the_id_of_one(engine: Engine) -> None:
    seen, other = Seen(), Seen()
    engine.register_function("is_big", lambda event: event["new_value"] > 5)
    engine.on_change(scope="s", condition="is_big", function_id="app::big")(seen)
    engine.on_change(scope="s", condition=lambda event: event.new_value <= 5)(other)

    for value in (1, 9, 5, 6):
        engine.set("s", str(value), value)

    engine.drain(timeout=PATIENCE_S)
    assert (seen.keys, other.keys) == (["9", "6"], ["1", "5"])
    assert "app::big" in [entry["name"] for entry in engine.functions()]


def test_a_function_that_handles_events_can_be_called_by_id_too(engine: Engine) -> None:
    @engine.on_change(scope="s", function_id="app::keys")
    def keys(event: Any) -> list[str]:
        return sorted(event)

    assert engine.call("app::keys", {"b": 1, "a": 2}) == ["a", "b"]


# ----------------------------------------------------------------------------------------------------------- conditions


def condition_of(kind: str, answer: Callable[[Any], Any]) -> Callable[..., Any]:
    async def later(event: Any) -> Any:
        await asyncio.sleep(0)
        return answer(event)

    return answer if kind == "plain" else later


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_only_false_skips_the_handler(kind: str, engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="s", condition=condition_of(kind, lambda event: event.new_value))(seen)

    for key, answer in enumerate([True, False, 0, "", None, [], {}, "false", 0.0]):
        engine.set("s", str(key), answer)

    engine.drain(timeout=PATIENCE_S)
    assert seen.keys == ["0", "2", "3", "4", "5", "6", "7", "8"]
    assert engine.stats().skipped == 1


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_failing_condition_skips_its_own_handler_and_is_reported(kind: str, open_engine: Any) -> None:
    failures, mistaken, other = Failures(), Seen(), Seen()
    engine = open_engine(on_error=failures, limits={"handler_attempts": 3})

    def fail(event: Any) -> bool:
        raise LookupError(event.key)

    engine.register_function("fails", condition_of(kind, fail))
    engine.on_change(scope="s", condition="fails", function_id="mistaken")(mistaken)
    engine.on_change(scope="s")(other)
    engine.set("s", "k", 1)

    engine.drain(timeout=PATIENCE_S)
    assert (mistaken.keys, other.keys) == ([], ["k"])
    [failure] = failures.all
    assert isinstance(failure.error, LookupError)
    assert (failure.function_id, failure.final, failure.attempt) == ("fails", True, 1)
    assert engine.stats().failures == 1


def test_a_condition_that_is_not_registered_skips_the_handler(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)
    engine.on_change(condition="nobody")(seen)
    engine.set("s", "k", 1)

    engine.drain(timeout=PATIENCE_S)
    assert seen.events == []
    assert [failure.function_id for failure in failures.all] == ["nobody"]


def test_conditions_and_handlers_run_off_the_writers_thread(engine: Engine) -> None:
    threads = set[int]()
    engine.on_change(condition=lambda _: threads.add(threading.get_ident()))(
        lambda _: threads.add(threading.get_ident())
    )

    engine.set("s", "k", 1)
    engine.drain(timeout=PATIENCE_S)

    assert threads
    assert threading.get_ident() not in threads


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_events_of_a_scope_reach_a_handler_in_the_order_of_the_writes(kind: str, engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="s")(condition_of(kind, seen))

    def write() -> None:
        for _ in range(100):
            engine.update("s", "n", [Increment("", 1)])

    for wait in [in_thread(write) for _ in range(4)]:
        wait()
    engine.drain(timeout=PATIENCE_S)

    assert [event.revision for event in seen.events] == list(range(1, 401))
    assert [event.new_value for event in seen.events] == list(range(1, 401))


class OneWorker(ThreadDispatcher):
    """Runs ready handlers in the order in which the router made them ready."""

    MOST = 1


def test_handlers_are_given_an_event_in_order_of_registration() -> None:
    order: list[str] = []
    filters = [
        ("any 1", {}),
        ("key", {"key": "k"}),
        ("both", {"scope": "s", "key": "k"}),
        ("any 2", {}),
        ("s", {"scope": "s"}),
    ]
    with Engine(dispatcher=OneWorker()) as engine:
        for name, wanted in filters:
            engine.register_function(name, lambda _, name=name: order.append(name))
            engine.register_trigger(function_id=name, **wanted)
        engine.register_function("other", lambda _: order.append("never"))
        engine.register_trigger(function_id="other", scope="t")
        engine.set("s", "k", 1)
        engine.drain(timeout=PATIENCE_S)

    assert order == [name for name, _ in filters]


def test_handlers_of_the_same_function_each_get_the_event(engine: Engine) -> None:
    seen = Seen()
    engine.register_function("h", seen)
    for _ in range(3):
        engine.register_trigger(function_id="h", scope="s")

    engine.set("s", "k", 1)

    assert len(seen.wait_for(3)) == 3


# -------------------------------------------------------------------------------------------- handlers that are asyncio


def test_a_coroutine_handler_runs_on_the_loop_it_was_registered_on(engine: Engine, loop_thread: LoopThread) -> None:
    seen, loops = Seen(), set[Any]()

    async def handler(event: StateEvent) -> None:
        loops.add(asyncio.get_running_loop())
        await engine.aio.set("derived", event.key, event.new_value)
        seen(event)

    loop_thread.do(lambda: engine.on_change(scope="s")(handler) and None)
    engine.set("s", "k", 1)

    seen.wait_for(1)
    assert loops == {loop_thread.loop}
    assert engine.get("derived", "k") == 1


def test_a_plain_function_that_returns_an_awaitable_is_awaited(engine: Engine) -> None:
    seen = Seen()

    async def later(event: StateEvent) -> None:
        seen(event)

    def plain(event: StateEvent) -> Any:
        return later(event)

    engine.on_change()(plain)
    engine.set("s", "k", 1)

    assert len(seen.wait_for(1)) == 1


def test_a_handler_whose_loop_is_closed_fails_and_others_go_on(open_engine: Any) -> None:
    failures, seen = Failures(), Seen()
    engine = open_engine(on_error=failures)

    async def handler(event: StateEvent) -> None:
        """Never runs: its loop is gone."""

    async def register() -> None:
        engine.on_change(function_id="orphan")(handler)

    asyncio.run(register())
    engine.on_change()(seen)
    engine.set("s", "k", 1)

    engine.drain(timeout=PATIENCE_S)
    assert seen.keys == ["k"]
    assert [failure.function_id for failure in failures.all] == ["orphan"]
    assert "closed" in str(failures.all[0].error)
