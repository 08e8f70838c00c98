"""The conformance cases, through every way into the engine and on every store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance import load, same
from watching import Seen

from scopestate import Engine, ScopestateError, messages

OpenEngine = Callable[..., Engine]
Call = Callable[[str, Any], Any]

VECTORS: list[dict[str, Any]] = load("vectors.json")
SCENARIOS: list[dict[str, Any]] = load("scenarios.json")["scenarios"]
TRIGGER_CASES: list[dict[str, Any]] = load("scenarios.json")["trigger_cases"]


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
        message = messages.from_payload(function_id, payload)
        return wire_form(message, engine.ask(message))

    return ask


def by_future(engine: Engine) -> Call:
    def ask(function_id: str, payload: Any) -> Any:
        message = messages.from_payload(function_id, payload)
        return wire_form(message, engine.ask(message, block=False).get(timeout=20))

    return ask


def by_method(engine: Engine) -> Call:
    """The typed methods; what is no call of them is refused where `call` refuses it."""

    def run(function_id: str, payload: Any) -> Any:
        message = messages.from_payload(function_id, payload)
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


def complaints_about(vector: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What is wrong with the result of a vector's ops."""
    found = []
    if not same(result["new_value"], vector["new"]):
        found.append(f"{vector['name']}: {result['new_value']!r:.200} instead of {vector['new']!r:.200}")
    if not same(result["old_value"], vector.get("old")):
        found.append(f"{vector['name']}: old value {result['old_value']!r:.200} instead of {vector.get('old')!r:.200}")
    if ("errors" in result) != bool(vector["errors"]):
        found.append(f"{vector['name']}: `errors` is left out exactly when there are none")
    errors = result.get("errors", [])
    if [(e["op_index"], e["code"]) for e in errors] != [(e["op_index"], e["code"]) for e in vector["errors"]]:
        found.append(f"{vector['name']}: {errors!r:.300} instead of {vector['errors']!r:.300}")
    else:
        found += [
            f"{vector['name']}: {error['message']!r} does not mention {fact!r}"
            for error, wanted in zip(errors, vector["errors"], strict=True)
            for fact in wanted["mentions"]
            if str(fact) not in error["message"]
        ]
    return found


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


def matches(result: Any, wanted: Any) -> bool:
    """Compare as the conformance cases ask: an engine may add fields to an error of an op."""
    if isinstance(wanted, dict) and isinstance(wanted.get("errors"), list):
        assert type(result["errors"]) is list
        errors = [{"op_index": e["op_index"], "code": e["code"]} for e in result["errors"]]
        result = {**result, "errors": errors}
    return same(result, wanted)


def run_step(call: Call, step: dict[str, Any]) -> None:
    """Make one call, and check its result or its error."""
    if "error_code" in step:
        with pytest.raises(ScopestateError) as refusal:
            call(step["call"], step["input"])
        assert refusal.value.code == step["error_code"]
        assert step["call"] in str(refusal.value)
    else:
        result = call(step["call"], step["input"])
        assert matches(result, step["result"]), f"{step} gave {result!r}"


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


@pytest.fixture(params=["plain condition", "coroutine condition"])
def make_condition(request: pytest.FixtureRequest) -> Callable[[dict[str, Any], Seen], Callable[..., Any]]:
    def make(what_it_does: dict[str, Any], asked: Seen) -> Callable[..., Any]:
        def plain(event: Any) -> Any:
            asked(event)
            if what_it_does.get("fails"):
                raise RuntimeError("the condition fails")
            return what_it_does.get("returns")

        async def coroutine(event: Any) -> Any:
            return plain(event)

        return plain if request.param == "plain condition" else coroutine

    return make


@pytest.mark.parametrize("case", TRIGGER_CASES, ids=lambda case: case["name"])
def test_every_trigger_case_holds(
    case: dict[str, Any], engine: Engine, make_condition: Callable[[dict[str, Any], Seen], Callable[..., Any]]
) -> None:
    handled, asked = Seen(), Seen()
    condition = case.get("condition", {})
    if not condition.get("unregistered"):
        engine.register_function("c::f", make_condition(condition, asked))
    engine.register_function("h", handled)

    if not case["registers"]:
        with pytest.raises(ScopestateError) as refusal:
            engine.register_trigger(function_id="h", config=case["config"])
        assert refusal.value.code == "registration_error"
        assert engine.triggers() == []
        return
    engine.register_trigger(function_id="h", config=case["config"])
    engine.set(case["event"]["scope"], case["event"]["key"], {"a": 1})
    engine.drain(timeout=20)

    assert len(handled.events) == (1 if case["handler_runs"] else 0)
    if "condition" in case and not condition.get("unregistered"):
        assert len(asked.events) == (0 if condition.get("must_not_be_called") else 1)
