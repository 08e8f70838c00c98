"""Functions by id: registering them, calling them, and what becomes of their mistakes."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conformance import same
from watching import LoopThread, in_thread

from scopestate import Engine
from scopestate.config import Config, FunctionRef
from scopestate.errors import (
    ConfigError,
    DeserializationError,
    FunctionFailed,
    FunctionNotFound,
    InvalidRegistration,
    ScopestateError,
    SerializationError,
    WouldDeadlock,
)
from scopestate.ops.functions import BUILT_IN_IDS


def double(payload: Any) -> Any:
    return payload * 2


async def double_later(payload: Any) -> Any:
    await asyncio.sleep(0)
    return payload * 2


def scaled(factor: int, payload: Any) -> Any:
    return payload * factor


async def scaled_later(factor: int, payload: Any) -> Any:
    return payload * factor


class Doubler:
    def __call__(self, payload: Any) -> Any:
        return payload * 2

    def method(self, payload: Any) -> Any:
        return payload * 2

    async def method_later(self, payload: Any) -> Any:
        return payload * 2


class DoublerLater:
    async def __call__(self, payload: Any) -> Any:
        return payload * 2


TARGETS = {
    "plain": double,
    "lambda": lambda payload: payload * 2,
    "partial": functools.partial(scaled, 2),
    "callable object": Doubler(),
    "bound method": Doubler().method,
    "coroutine function": double_later,
    "partial of a coroutine function": functools.partial(scaled_later, 2),
    "partial of a partial": functools.partial(functools.partial(scaled_later), 2),
    "object with a coroutine call": DoublerLater(),
    "bound coroutine method": Doubler().method_later,
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_anything_that_takes_a_payload_can_be_registered_and_called(target: Callable[..., Any], engine: Engine) -> None:
    assert engine.register_function("app::double", target) is target

    assert engine.call("app::double", 21) == 42
    assert asyncio.run(engine.aio.call("app::double", 21)) == 42


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_each_of_them_can_handle_events(target: Callable[..., Any], engine: Engine) -> None:
    handled = threading.Event()
    engine.register_function("app::note", lambda _: handled.set())
    engine.register_function("app::double", target)
    engine.register_trigger(function_id="app::note", condition_function_id="app::double", trigger_id="broken condition")
    engine.register_function("app::same", lambda event: event["new_value"])
    engine.register_trigger(function_id="app::double", condition_function_id="app::same")

    engine.set("s", "k", 1)
    engine.drain(timeout=20)

    # An event is no number, so each one fails once as a condition and once as a handler: it was called both times.
    assert engine.stats().failures == 2
    assert not handled.is_set()


def test_register_function_is_a_decorator_too(engine: Engine) -> None:
    @engine.register_function("app::add", description="Adds one")
    def add(payload: int) -> int:
        return payload + 1

    assert add(1) == 2
    assert engine.call("app::add", 1) == 2
    assert engine.functions()[-1]["description"] == "Adds one"


def test_a_function_needs_no_payload_and_no_result(engine: Engine) -> None:
    given: list[Any] = []
    engine.register_function("app::note", given.append)

    assert engine.call("app::note") is None
    assert given == [None]


def test_the_same_id_again_replaces(engine: Engine) -> None:
    engine.register_function("app::f", lambda _: "old")
    engine.register_function("app::f", lambda _: "new")

    assert engine.call("app::f") == "new"
    assert [entry["name"] for entry in engine.functions()].count("app::f") == 1


def test_an_unregistered_function_is_gone(engine: Engine) -> None:
    engine.register_function("app::f", double)
    engine.unregister_function("app::f")

    for attempt in (lambda: engine.call("app::f", 1), lambda: engine.unregister_function("app::f")):
        with pytest.raises(FunctionNotFound, match="app::f") as refused:
            attempt()
        assert refused.value.function_id == "app::f"
    with pytest.raises(FunctionNotFound):
        asyncio.run(engine.aio.call("app::f", 1))
    assert len(engine.functions()) == len(BUILT_IN_IDS)


def test_built_in_functions_can_be_neither_replaced_nor_unregistered(engine: Engine) -> None:
    for function_id in ("state::set", "state::list_groups"):
        with pytest.raises(InvalidRegistration, match="built in"):
            engine.register_function(function_id, double)
        with pytest.raises(InvalidRegistration, match="built in"):
            engine.unregister_function(function_id)
    with pytest.raises(InvalidRegistration, match="built in"):
        engine.on_change(function_id="state::set")(double)

    assert engine.call("state::set", {"scope": "s", "key": "k", "value": 1}) == {"old_value": None, "new_value": 1}
    assert engine.triggers() == []


def test_a_configured_function_cannot_take_a_built_in_id_and_the_store_is_free_afterwards(tmp_path: Path) -> None:
    section = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path / "store")}}
    workers = [{"name": "iii-state", "config": {"adapter": section}}]
    good = Engine.from_config({"workers": workers})
    config = good._parts.config
    good.close()
    bad = Config(config.adapter, {"state::get": FunctionRef("m:double", double)})

    with pytest.raises(ConfigError, match="built in"):
        Engine(bad)

    Engine.from_config({"workers": workers}).close()


@pytest.mark.parametrize("config", ["engine.yaml", {}, Path("engine.yaml")], ids=repr)
def test_a_file_or_a_mapping_is_for_from_config(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"use Engine\.from_config\(\.\.\.\)"):
        Engine(config)


@pytest.mark.parametrize("function_id", ["", None, 5, b"f"], ids=repr)
def test_an_id_is_a_text_that_is_not_empty(function_id: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="non-empty string"):
        engine.register_function(function_id, double)


async def _async_generator(payload: Any) -> Any:
    yield payload


def _generator(payload: Any) -> Any:
    yield payload


@pytest.mark.parametrize("target", [_generator, _async_generator, functools.partial(_generator, 1)])
def test_a_generator_is_refused_because_calling_it_runs_nothing(target: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="has a `yield` in it"):
        engine.register_function("app::f", target)


@pytest.mark.parametrize("target", [5, "double", {"a": 1}], ids=repr)
def test_what_cannot_be_called_is_refused(target: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="not callable"):
        engine.register_function("app::f", target)


# ------------------------------------------------------------------------------------------------------------ calls


def test_a_function_gets_and_gives_copies(engine: Engine) -> None:
    kept: list[Any] = []

    def keep(payload: Any) -> Any:
        kept.append(payload)
        return payload

    engine.register_function("app::keep", keep)
    payload = {"list": [1]}

    result = engine.call("app::keep", payload)
    kept[0]["list"].append(2)

    assert payload == {"list": [1]}
    assert result == {"list": [1]}


def test_numbers_keep_their_type_on_the_way(engine: Engine) -> None:
    engine.register_function("app::same", lambda payload: payload)

    assert same(engine.call("app::same", [1, 1.0, True, -0.0]), [1, 1.0, True, -0.0])


def test_a_payload_that_is_not_json_is_refused_before_the_function_runs(engine: Engine) -> None:
    called: list[Any] = []
    engine.register_function("app::f", called.append)

    for call in (
        lambda: engine.call("app::f", {"x": math.nan}),
        lambda: asyncio.run(engine.aio.call("app::f", {1: 1})),
    ):
        with pytest.raises(DeserializationError, match="app::f"):
            call()
    assert called == []


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_result_that_is_not_json_is_the_functions_mistake(kind: str, engine: Engine) -> None:
    def plain(_: Any) -> Any:
        return {"x": [object()]}

    async def later(_: Any) -> Any:
        return plain(_)

    engine.register_function("app::f", plain if kind == "plain" else later)

    for call in (lambda: engine.call("app::f"), lambda: asyncio.run(engine.aio.call("app::f"))):
        with pytest.raises(SerializationError, match=r"app::f.*\$\.x\[0\]") as refused:
            call()
        assert refused.value.code == "serialization_error"


def test_what_a_function_raises_is_the_cause_of_what_its_caller_sees(engine: Engine) -> None:
    mistake = ValueError("no such thing")

    def plain(_: Any) -> Any:
        raise mistake

    async def later(_: Any) -> Any:
        raise mistake

    for target in (plain, later):
        engine.register_function("app::f", target)
        for call in (lambda: engine.call("app::f"), lambda: asyncio.run(engine.aio.call("app::f"))):
            with pytest.raises(FunctionFailed, match=r"app::f.*ValueError.*no such thing") as failed:
                call()
            assert failed.value.code == "invocation_failed"
            assert failed.value.function_id == "app::f"
            assert failed.value.__cause__ is mistake


def test_an_error_of_the_engine_inside_a_function_is_the_functions_failure(engine: Engine) -> None:
    engine.register_function("app::f", lambda _: engine.set("s", "k", math.nan))

    with pytest.raises(FunctionFailed) as failed:
        engine.call("app::f")

    assert isinstance(failed.value.__cause__, DeserializationError)


def test_functions_may_call_the_engine_and_each_other(engine: Engine) -> None:
    engine.register_function("app::inner", lambda payload: engine.set("s", "k", payload).to_json())
    engine.register_function("app::outer", lambda payload: engine.call("app::inner", payload))

    assert engine.call("app::outer", 5) == {"old_value": None, "new_value": 5}


# ------------------------------------------------------------------------------------------ on which thread they run


def test_a_plain_function_runs_on_the_callers_thread(engine: Engine) -> None:
    engine.register_function("app::thread", lambda _: threading.get_ident())

    assert engine.call("app::thread") == threading.get_ident()


def test_from_asyncio_a_plain_function_runs_on_a_worker_and_blocks_no_loop(engine: Engine) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(_: Any) -> int:
        reached.set()
        assert go_on.wait(20)
        return threading.get_ident()

    async def main() -> int:
        call = asyncio.create_task(engine.aio.call("app::wait"))
        await asyncio.to_thread(reached.wait, 20)
        go_on.set()  # the loop is free to do this
        result: int = await call
        return result

    engine.register_function("app::wait", wait)

    assert asyncio.run(main()) != threading.get_ident()


def test_a_coroutine_function_runs_on_the_loop_it_was_registered_on(engine: Engine, loop_thread: LoopThread) -> None:
    async def where(_: Any) -> bool:
        return asyncio.get_running_loop() is loop_thread.loop

    loop_thread.do(lambda: engine.register_function("app::where", where) and None)

    assert engine.call("app::where") is True
    assert asyncio.run(engine.aio.call("app::where")) is True
    assert loop_thread.do(lambda: engine.aio.call("app::where")) is True


def test_one_registered_outside_any_loop_runs_on_the_engines_own(engine: Engine) -> None:
    async def where(_: Any) -> str:
        return threading.current_thread().name

    engine.register_function("app::where", where)

    assert engine.call("app::where") == asyncio.run(engine.aio.call("app::where")) == "scopestate-loop"


def test_calling_a_coroutine_function_from_its_own_loop_is_refused_at_once(engine: Engine) -> None:
    async def main() -> Any:
        engine.register_function("app::double", double_later)
        with pytest.raises(WouldDeadlock, match=r"aio\.call") as refused:
            engine.call("app::double", 1)
        assert refused.value.code == "DEADLOCK"
        return await engine.aio.call("app::double", 1)

    assert asyncio.run(main()) == 2


def test_another_threads_loop_may_be_waited_for(engine: Engine, loop_thread: LoopThread) -> None:
    loop_thread.do(lambda: engine.register_function("app::double", double_later) and None)

    async def main() -> Any:
        return engine.call("app::double", 1)  # blocks this loop, as asked; the other one works

    assert asyncio.run(main()) == 2


def test_threads_may_register_and_call_at_the_same_time(engine: Engine) -> None:
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait(20)
        for turn in range(50):
            engine.register_function(f"app::f{number}", functools.partial(scaled, turn))
            assert engine.call(f"app::f{number}", 2) == 2 * turn
            assert len(engine.functions()) > len(BUILT_IN_IDS)

    for wait in [in_thread(functools.partial(work, number)) for number in range(8)]:
        wait()
    assert len(engine.functions()) == len(BUILT_IN_IDS) + 8


PLAIN_CALLS: list[tuple[str, Any]] = [
    ("state::set", {"scope": "s", "key": "k", "value": {"n": 1}}),
    ("state::set", {"scope": "s", "key": "k", "data": None}),
    ("state::set", {"scope": "s", "key": "k", "other": 1}),
    ("state::set", {"scope": "s", "key": 1, "value": 1}),
    ("state::set", {"scope": "s", "key": "k", "value": float("nan")}),
    ("state::set", {"scope": "s", "key": "k", "value": object()}),
    ("state::set", {"scope": "s", "key": chr(0xD800), "value": 1}),
    ("state::get", {"scope": "s", "key": "k"}),
    ("state::get", {"scope": "s", "key": "absent"}),
    ("state::get", {"scope": "s", "other": 1}),
    ("state::update", {"scope": "s", "key": "n", "ops": [{"type": "increment", "path": "", "by": 1}]}),
    ("state::update", {"scope": "s", "key": "n", "ops": [{"type": "increment", "path": "x", "by": 1}]}),
    ("state::update", {"scope": "s", "key": "n", "ops": [{"type": "no such op"}]}),
    ("state::update", {"scope": "s", "key": "n", "ops": 5}),
    ("state::list", {"scope": "s"}),
    ("state::list", {"scope": None}),
    ("state::list_groups", {}),
    ("state::delete", {"scope": "s", "key": "k"}),
    ("state::delete", {"scope": "s", "key": "k"}),
]


def outcomes(engine: Engine, more: dict[str, Any]) -> list[Any]:
    """Make the plain calls with a field that is not known, or without; return what each gives or raises."""
    found: list[Any] = []
    for function_id, payload in PLAIN_CALLS:
        try:
            found.append(engine.call(function_id, {**payload, **more}))
        except ScopestateError as error:
            found.append((type(error), error.code, str(error)))
    return found


def test_the_short_way_of_plain_calls_does_what_the_table_says() -> None:
    with Engine() as short, Engine() as table:
        assert outcomes(short, {}) == outcomes(table, {"unknown": 1})
