"""The messages of the six functions, read from Python or from JSON.

One definition serves the actor-message API (`engine.ask(messages.Set(...))`), `engine.call`, the wire, and the
schemas that `engine.functions()` returns. Source: the API reference, and docs/semantics.md 2 for what is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from scopestate.errors import DeserializationError, ScopestateError
from scopestate.ops import UpdateOp, convert_ops
from scopestate.ops.values import class_name, json_type


class Set(msgspec.Struct, frozen=True):
    """Set a value in state."""

    scope: str
    key: str
    value: Any
    """Any JSON value, None included."""


class Get(msgspec.Struct, frozen=True):
    """Get a value from state."""

    scope: str
    key: str


class Delete(msgspec.Struct, frozen=True):
    """Delete a value from state."""

    scope: str
    key: str


class Update(msgspec.Struct, frozen=True):
    """Update a value in state."""

    scope: str
    key: str
    ops: tuple[UpdateOp, ...]
    """Applied in order to one working copy, then written once (docs/semantics.md, section 3)."""


class List(msgspec.Struct, frozen=True):
    """Get a group from state."""

    scope: str


class ListGroups(msgspec.Struct, frozen=True):
    """List all state groups."""


Message = Set | Get | Delete | Update | List | ListGroups

FUNCTION_IDS: Final[dict[str, type[Message]]] = {
    "state::delete": Delete,
    "state::get": Get,
    "state::list": List,
    "state::list_groups": ListGroups,
    "state::set": Set,
    "state::update": Update,
}
"""Function id -> its message, in the order of the API reference."""


def from_payload(function_id: str, payload: object) -> Message:
    """Read the input of a built-in function. Fields beyond the known ones are ignored.

    Raises DeserializationError, worded as in iii-state, if a field is missing or has the wrong type; nothing has
    happened then. `function_id` must be one of FUNCTION_IDS.
    """
    try:
        return _read(function_id, FUNCTION_IDS[function_id], payload)
    except ScopestateError:
        raise
    except Exception as error:
        # A mapping, text or op of somebody's own class, whose hooks raise.
        raise misfit(function_id, f"reading the input failed with {class_name(error)}") from error


def _read(function_id: str, kind: type[Message], payload: object) -> Message:
    if not isinstance(payload, Mapping):
        raise misfit(function_id, f"expected an object, got {json_type(payload)}")
    if kind is ListGroups:
        return ListGroups()
    scope = _text(function_id, payload, "scope")
    if kind is List:
        return List(scope)
    key = _text(function_id, payload, "key")
    if kind is Set:
        return Set(scope, key, _value(function_id, payload))
    if kind is Update:
        if "ops" not in payload:
            raise misfit(function_id, "missing field `ops`")
        try:
            return Update(scope, key, convert_ops(payload["ops"]))
        except DeserializationError as error:
            raise misfit(function_id, str(error)) from error
    return Delete(scope, key) if kind is Delete else Get(scope, key)


def misfit(function_id: str, problem: str) -> DeserializationError:
    """The error for input that does not fit `function_id` (docs/protocol.md, section 4.4)."""
    return DeserializationError(f"Failed to deserialize input for {function_id}: {problem}")


def _text(function_id: str, payload: Mapping[str, Any], field: str) -> str:
    if field not in payload:
        raise misfit(function_id, f"missing field `{field}`")
    text = payload[field]
    if not issubclass(type(text), str):  # not isinstance, which believes the `__class__` of a mock
        raise misfit(function_id, f"invalid type: expected a string, got {json_type(text)} - at `$.{field}`")
    return str.__str__(text)  # of a subclass, what it holds


def _value(function_id: str, payload: Mapping[str, Any]) -> Any:
    """`value`, or `data` as its alias; both together are a duplicate (docs/semantics.md, section 2)."""
    if "value" in payload:
        if "data" in payload:
            raise misfit(function_id, "duplicate field `value`: give either `value` or its alias `data`")
        return payload["value"]
    if "data" in payload:
        return payload["data"]
    raise misfit(function_id, "missing field `value`")
