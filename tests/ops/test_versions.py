"""Versions of values and JSON schemas, without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scopestate.ops.json_schema import BadSchema, JsonSchema
from scopestate.ops.value_types import Misfit
from scopestate.ops.versions import Versions


def up(value: Any, version: int) -> Any:
    return {**value, f"from{version}": True}


def test_a_value_is_brought_to_the_current_version_step_by_step() -> None:
    versions = Versions(3, "v", up)

    assert json.loads(versions.current(b'{"a":1}')) == {"a": 1, "from1": True, "from2": True, "v": 3}
    assert json.loads(versions.current(b'{"a":1,"v":2}')) == {"a": 1, "from2": True, "v": 3}
    assert versions.current(b'{"v":3}') == b'{"v":3}'
    assert versions.current(b'{"v":4}') == b'{"v":4}'
    assert versions.is_too_new(b'{"v":3}') is None
    assert versions.is_too_new(b'{"v":4}') is not None


@pytest.mark.parametrize("wrong", [b'{"v":0}', b'{"v":"2"}', b'{"v":true}', b'{"v":1.5}', b'{"v":null}'])
def test_a_version_is_a_number(wrong: bytes) -> None:
    with pytest.raises(Misfit, match="whole number") as caught:
        Versions(3, "v", up).of(wrong)
    assert caught.value.path == "$.v"


@pytest.mark.parametrize(
    ("upgrade", "reason"),
    [
        (lambda value, version: 1 / 0, "the upgrade from version 1 raised ZeroDivisionError"),
        (lambda value, version: [value], "returned list"),
        (lambda value, version: {"a": {1, 2}}, "is not JSON"),
        (lambda value, version: (yield), "plain function"),
    ],
)
def test_an_upgrade_that_goes_wrong_says_so(upgrade: Any, reason: str) -> None:
    with pytest.raises(Misfit, match=reason):
        Versions(2, "v", upgrade).current(b"[1]")


def test_a_schema_is_a_type_of_values() -> None:
    schema = JsonSchema("names", {"items": {"type": "string"}, "$defs": {"any": True}})

    assert schema.encode(["a"]) == b'["a"]'
    assert schema.decode(b'["a"]') == ["a"]
    assert schema == JsonSchema("names", schema.json_schema())
    assert hash(schema) == hash(JsonSchema("names", schema.json_schema()))
    assert schema != JsonSchema("others", schema.json_schema())
    with pytest.raises(Misfit) as caught:
        schema.encode(["a", 7])
    assert caught.value.path == "$[1]"


def test_a_long_value_does_not_make_a_long_message() -> None:
    with pytest.raises(Misfit) as caught:
        JsonSchema("short", {"maxLength": 3}).check(json.dumps("x" * 100_000).encode())
    assert len(caught.value.reason) < 500


def test_a_schema_that_cannot_be_applied_refuses_the_value() -> None:
    endless = JsonSchema("endless", {"$ref": "#"})

    with pytest.raises(Misfit, match="could not be applied: RecursionError"):
        endless.check(b"1")


def test_what_is_too_deep_to_compile_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5_000):
        schema = {"not": schema}
    with pytest.raises(BadSchema, match="too deep"):
        JsonSchema("deep", schema)
