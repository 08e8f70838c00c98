"""The engine describes itself as the API reference at the end of the specification does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jsonschema
import msgspec
import pytest
from conformance import load, same

from scopestate import Engine
from scopestate.errors import DeserializationError
from scopestate.ops.triggers import OPTIONS

PUBLISHED: dict[str, Any] = load("catalogue.json")
"""What clients of iii-state 0.11.6 are told of the functions and of the trigger type."""


ADDED = {"atomic", "durable", "expires_at", "idempotency_key", "if_absent", "if_revision", "keep_ttl", "ttl_ms"}
"""Optional fields of the reference's functions that scopestate adds."""
TOLD = {"revision", "replayed"}
"""Optional fields of their results."""


def of_the_reference(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the descriptions of the six functions without the fields that are optional and new."""
    six = functions[:6]
    for function in six:
        for schema, added in ((function["request_schema"], ADDED), (function["response_schema"], TOLD)):
            assert not added & set(schema.get("required", ()))
            for name in added & set(schema.get("properties", ())):
                del schema["properties"][name]
    return six


class Order(msgspec.Struct):
    total: int


def test_a_function_shows_the_schemas_of_its_types(engine: Engine) -> None:
    @engine.register_function("shop::rate", request=Order, response=dict[str, float])
    def rate(order: Any) -> Any:
        return {"rate": order["total"] / 2}

    described = engine.functions()[-1]
    assert described["request_schema"]["$defs"]["Order"]["properties"] == {"total": {"type": "integer"}}
    assert described["response_schema"] == {"type": "object", "additionalProperties": {"type": "number"}}
    described["request_schema"].clear()
    assert engine.functions()[-1]["request_schema"]
    assert engine.call("shop::rate", {"total": 3}) == {"rate": 1.5}
    with pytest.raises(DeserializationError, match="not a type"):
        engine.register_function("shop::other", rate, request=object())


def test_a_scope_shows_the_schema_of_its_rule() -> None:
    name = {"type": "string"}
    with Engine.from_config({"scopes": [{"name": "a", "schema": name}, {"name": "b", "type": int}]}) as engine:
        assert engine.schema("a") == name
        assert engine.schema("b") == {"type": "integer"}
        assert engine.schema("c") is None


def test_the_six_functions_are_described_as_in_the_reference_with_optional_fields(engine: Engine) -> None:
    assert same(of_the_reference(engine.functions()), PUBLISHED["functions"])


def test_the_new_fields_are_described_where_they_can_be_given(engine: Engine) -> None:
    described = {entry["name"]: entry["request_schema"].get("properties", {}) for entry in engine.functions()}

    assert {name: ADDED & set(fields) for name, fields in list(described.items())[:6]} == {
        "state::delete": {"if_revision", "if_absent", "durable", "idempotency_key"},
        "state::get": set(),
        "state::list": set(),
        "state::list_groups": set(),
        "state::set": ADDED - {"atomic"},
        "state::update": ADDED,
    }
    assert list(described)[6:] == [
        "state::compare-and-set",
        "state::count",
        "state::delete-range",
        "state::get-entry",
        "state::list_entries",
        "state::list_keys",
        "state::touch",
        "state::transaction",
        "state::changes",
        "state::flush",
        "engine::consumers::list",
        "engine::consumers::pause",
        "engine::consumers::resume",
        "engine::consumers::forget",
        "engine::dead-letters::list",
        "engine::dead-letters::get",
        "engine::dead-letters::replay",
        "engine::dead-letters::purge",
        "engine::dead-letters::count",
    ]


def test_the_trigger_type_is_described_as_in_the_reference(engine: Engine) -> None:
    assert same(without_ours(engine.trigger_types()), PUBLISHED["triggers"])


def test_what_the_reference_does_not_have_is_described_beside_it(engine: Engine) -> None:
    [state] = engine.trigger_types()

    events = state["invocation_schema"]["properties"]["events"]
    assert events["items"]["enum"] == ["created", "updated", "deleted", "expired"]
    jsonschema.validate({"scope": "s", "events": ["expired"]}, state["invocation_schema"])
    everything: dict[str, Any] = {
        "scope_prefix": "s",
        "prefix": "o-",
        "only_if_changed": True,
        "fields": ["status"],
        "order": "key",
        "concurrency": 3,
        "durable": "ship",
        "retry": {"attempts": 3, "first": 0.5},
        "ack_wait": 60,
        "start": "earliest",
        "on_giving_up": "block",
        "max_dead": 10,
        "debounce": 0.5,
        "debounce_max": 5,
        "batch": 100,
        "batch_wait": 0.2,
        "metadata": {"team": "shipping"},
    }
    jsonschema.validate(everything, state["invocation_schema"])
    assert set(state["invocation_schema"]["properties"]) == set(OPTIONS)
    assert "required" not in state["invocation_schema"]
    for name, wrong in (("order", "keys"), ("retry", 3), ("debounce", "1s"), ("fields", "status"), ("metadata", [])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: wrong}, state["invocation_schema"])
    told = state["return_schema"]
    assert told["definitions"]["StateEventType"]["enum"][-1] == "state:expired"
    assert not {"expired_at", "late_ms"} & set(told["required"])


def without_ours(types: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the descriptions without what only scopestate has."""
    [state] = types
    given = state["invocation_schema"]["properties"]
    for name in set(given) - {"scope", "key", "condition_function_id"}:
        del given[name]
    for name in ("expired_at", "late_ms"):
        del state["return_schema"]["properties"][name]
    state["return_schema"]["definitions"]["StateEventType"]["enum"].remove("state:expired")
    return types


def test_registered_functions_follow_in_order_of_registration(engine: Engine) -> None:
    engine.register_function("z::last", print, description="Prints")
    engine.register_function("a::first", print)

    assert [entry["name"] for entry in engine.functions()[-2:]] == ["z::last", "a::first"]
    assert engine.functions()[-2] == {
        "name": "z::last",
        "description": "Prints",
        "metadata": {},
        "request_schema": {},
        "response_schema": {},
    }
    assert engine.functions()[-1]["description"] is None


def test_a_description_may_be_changed_by_its_reader_without_harm(engine: Engine) -> None:
    engine.functions()[0]["request_schema"].clear()
    engine.trigger_types()[0]["return_schema"].clear()

    assert same(of_the_reference(engine.functions()), PUBLISHED["functions"])
    assert same(without_ours(engine.trigger_types()), PUBLISHED["triggers"])


@pytest.mark.parametrize("scenario", load("scenarios.json")["scenarios"], ids=lambda scenario: scenario["name"])
def test_the_schemas_accept_what_the_engine_accepts_and_returns(scenario: dict[str, Any], engine: Engine) -> None:
    described = {entry["name"]: entry for entry in engine.functions()}
    for step in scenario["steps"]:
        if "error_code" in step:
            continue
        function = described[step["call"]]
        if "data" not in step["input"]:  # the alias is not in the reference's schema
            jsonschema.validate(step["input"], function["request_schema"])
        jsonschema.validate(engine.call(step["call"], step["input"]), function["response_schema"])
        if step["event"] is not None:
            jsonschema.validate(step["event"], engine.trigger_types()[0]["return_schema"])


def test_schemas_are_not_made_by_the_import() -> None:
    code = "import sys; from scopestate import Engine; sys.exit('scopestate.catalogue' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
