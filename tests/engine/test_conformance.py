"""The conformance cases, through every way into the engine and on every store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance import SCENARIOS, TRIGGER_CASES, VECTORS, Call, complaints_about, run_step, run_trigger_case, same
from watching import Seen

from scopestate import Engine, messages
from scopestate.ops.functions import from_payload

OpenEngine = Callable[..., Engine]


def wire_form(message: messages.Message, answer: Any) -> Any:
    """What `call` would return for the answer to a message."""
    if isinstance(message, messages.ListGroups):
        return {"groups": answer}
    if not isinstance(message, messages.Set | messages.Update):
        return answer
    plain = {"old_value": answer.old_value, "new_value": answer.new_value}
    errors = getattr(answer, "errors", ())
    if errors:
        plain["errors"] = [{"op_index": e.op_index, "code": e.code, "message": e.message} for e in errors]
    return plain


def by_call(engine: Engine) -> Call:
    return engine.call


def by_aio(engine: Engine) -> Call:
    return lambda function_id, payload: asyncio.run(engine.aio.call(function_id, payload))


def by_message(engine: Engine) -> Call:
    def ask(function_id: str, payload: Any) -> Any:
        message = from_payload(function_id, payload)
        return wire_form(message, engine.ask(message))

    return ask


def by_future(engine: Engine) -> Call:
    def ask(function_id: str, payload: Any) -> Any:
        message = from_payload(function_id, payload)
        return wire_form(message, engine.ask(message, block=False).get(timeout=20))

    return ask


def by_method(engine: Engine) -> Call:
    """The typed methods; what is no call of them is refused where `call` refuses it."""

    def run(function_id: str, payload: Any) -> Any:
        message = from_payload(function_id, payload)
        match message:
            case messages.Set(scope=scope, key=key, value=value):
                answer: Any = engine.set(scope, key, value)
            case messages.Get(scope=scope, key=key):
                answer = engine.get(scope, key)
            case messages.Delete(scope=scope, key=key):
                answer = engine.scope(scope).delete(key)
            case messages.Update(scope=scope, key=key, ops=ops):
                answer = engine.scope(scope).update(key, ops)
            case messages.List(scope=scope):
                answer = engine.list(scope)
            case messages.ListGroups():
                answer = engine.list_groups()
        return wire_form(message, answer)

    return run


WAYS = {
    "call": by_call,
    "aio.call": by_aio,
    "ask": by_message,
    "ask, block=False": by_future,
    "methods": by_method,
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Callable[[Engine], Call]:
    return WAYS[request.param]


def test_every_vector_holds_and_its_outcome_is_there_after_a_restart(
    open_store: OpenEngine, way: Callable[[Engine], Call]
) -> None:
    engine = open_store()
    call = way(engine)
    replies = [
        engine.ask(messages.Set("vectors", vector["name"], vector["old"]), block=False)
        for vector in VECTORS
        if "old" in vector
    ]
    for reply in replies:
        reply.get(timeout=20)

    def run(vector: dict[str, Any]) -> list[str]:
        payload = {"scope": "vectors", "key": vector["name"], "ops": vector["ops"]}
        return complaints_about(vector, call("state::update", payload))

    # Side by side, so that writers share commits: one by one, 882 of them take their time on a slow disk.
    with ThreadPoolExecutor(16) as pool:
        complaints = [line for lines in pool.map(run, VECTORS) for line in lines]

    assert complaints == []
    if open_store.kind != "memory":  # type: ignore[attr-defined]
        engine.close()
        reopened = open_store()
        lost = [v["name"] for v in VECTORS if not same(reopened.get("vectors", v["name"], "lost"), v["new"])]
        assert lost == []


def play(engine: Engine, call: Call, scenario: dict[str, Any]) -> None:
    """Make the calls of a scenario, and check each one's result and event."""
    seen = Seen()
    engine.on_change()(seen)
    for step in scenario["steps"]:
        run_step(call, step)
        engine.drain(timeout=20)
        assert same(seen.take(), [] if step["event"] is None else [step["event"]]), step


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_whichever_way_the_calls_are_made(
    scenario: dict[str, Any], engine: Engine, way: Callable[[Engine], Call]
) -> None:
    play(engine, way(engine), scenario)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_on_disk_and_its_state_survives_a_restart(
    scenario: dict[str, Any], open_file_store: OpenEngine
) -> None:
    engine = open_file_store()
    play(engine, engine.call, scenario)
    before = {group: engine.list(group) for group in engine.list_groups()}
    engine.close()

    reopened = open_file_store()

    assert same({group: reopened.list(group) for group in reopened.list_groups()}, before)


@pytest.mark.parametrize("scenario", SCENARIOS[::4], ids=lambda scenario: scenario["name"])
def test_scenarios_hold_on_disk_from_asyncio(scenario: dict[str, Any], open_file_store: OpenEngine) -> None:
    engine = open_file_store()

    play(engine, by_aio(engine), scenario)


def as_coroutine(condition: Callable[[Any], Any]) -> Callable[..., Any]:
    async def coroutine(event: Any) -> Any:
        return condition(event)

    return coroutine


@pytest.mark.parametrize("made_of", [lambda plain: plain, as_coroutine], ids=["plain condition", "coroutine condition"])
@pytest.mark.parametrize("case", TRIGGER_CASES, ids=lambda case: case["name"])
def test_every_trigger_case_holds(
    case: dict[str, Any], engine: Engine, made_of: Callable[[Callable[[Any], Any]], Callable[..., Any]]
) -> None:
    run_trigger_case(engine, case, made_of)
