"""The conformance cases, and the comparison they ask for. `README.md` beside this file describes their shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine, ScopestateError

Call = Callable[[str, Any], Any]
"""Calls a function by its id, with its input; returns its result."""

HERE = Path(__file__).resolve().parent


def load(name: str) -> Any:
    """Load a JSON file of this directory; 1, 1.0 and true stay three different values."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def same(a: object, b: object) -> bool:
    """Compare as JSON does: type by type, all the way down. 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(item, b[key]) for key, item in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b


VECTORS: list[dict[str, Any]] = load("vectors.json")
SCENARIOS: list[dict[str, Any]] = load("scenarios.json")["scenarios"]
TRIGGER_CASES: list[dict[str, Any]] = load("scenarios.json")["trigger_cases"]


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


def run_trigger_case(
    engine: Engine, case: dict[str, Any], made_of: Callable[[Callable[[Any], Any]], Callable[..., Any]] = lambda it: it
) -> None:
    """Register what a trigger case has, make its write, and check who was called. `made_of`: wraps the condition."""
    handled: list[Any] = []
    asked: list[Any] = []
    condition = case.get("condition", {})

    def decide(event: Any) -> Any:
        asked.append(event)
        if condition.get("fails"):
            raise RuntimeError("the condition fails")
        return condition.get("returns")

    def handle(event: Any) -> None:
        handled.append(event)

    if not condition.get("unregistered"):
        engine.register_function("c::f", made_of(decide))
    engine.register_function("h", handle)
    if not case["registers"]:
        with pytest.raises(ScopestateError) as refusal:
            engine.register_trigger(function_id="h", config=case["config"])
        assert refusal.value.code == "registration_error"
        assert engine.triggers() == []
        return
    engine.register_trigger(function_id="h", config=case["config"])

    engine.set(case["event"]["scope"], case["event"]["key"], {"a": 1})
    engine.drain(timeout=20)

    assert len(handled) == (1 if case["handler_runs"] else 0)
    if "condition" in case and not condition.get("unregistered"):
        assert len(asked) == (0 if condition.get("must_not_be_called") else 1)
