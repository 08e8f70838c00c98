"""The built-in functions: one row for each, with everything that the rest of the program must know of it.

`engine.call`, the server, its access rules and the schemas of `engine.functions()` read the row. CONTRIBUTING says what
else a new function needs, under "A new operation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from scopestate.errors import DeserializationError, ScopestateError
from scopestate.ops import convert_ops, messages, turns
from scopestate.ops.messages import Message
from scopestate.ops.results import ListGroupsResult, SetResult, UpdateResult
from scopestate.ops.values import class_name, json_type

Right = Literal["read", "write", "list"]


class BuiltIn(NamedTuple):
    """One built-in function."""

    function_id: str
    message: type[Message]
    turn: type[turns.Turn[Any]] | None
    """What it does on one scope; None: it answers for all scopes."""
    method: str
    """The method of `Engine` and of `engine.aio` that does it: its arguments are the fields of the message."""
    request: str
    """The reference's name of its input, in the schemas."""
    response: tuple[str, Any] | None = None
    """The reference's name of its result, and the type; None: a bare value."""
    to_json: Callable[[Any], Any] = lambda answer: answer
    """Makes plain JSON data of what the method returns."""

    @property
    def right(self) -> Right:
        """The right that it needs on the scope in its input; `list`: none, it answers with the readable scopes."""
        return "list" if self.turn is None else "write" if self.turn.writes else "read"


def _plain(result: SetResult) -> dict[str, Any]:
    return result.to_json()


_UPDATED: Final = Annotated[UpdateResult, msgspec.Meta(description="Result of an atomic update operation")]

BUILT_IN: Final[dict[str, BuiltIn]] = {
    row.function_id: row
    for row in (
        BuiltIn(turns.Delete.function_id, messages.Delete, turns.Delete, "delete", "StateDeleteInput"),
        BuiltIn(turns.Get.function_id, messages.Get, turns.Get, "get", "StateGetInput"),
        BuiltIn(turns.List.function_id, messages.List, turns.List, "list", "StateGetGroupInput"),
        BuiltIn(
            "state::list_groups", messages.ListGroups, None, "list_groups", "StateListGroupsInput",
            ("StateListGroupsResult", ListGroupsResult), lambda groups: ListGroupsResult(groups=groups),
        ),
        BuiltIn(
            turns.Set.function_id, messages.Set, turns.Set, "set", "StateSetInput", ("SetResult", SetResult), _plain
        ),
        BuiltIn(
            turns.Update.function_id, messages.Update, turns.Update, "update", "StateUpdateInput",
            ("UpdateResult", _UPDATED), _plain,
        ),
    )
}  # fmt: skip
"""Function id -> its row, in the order of the API reference."""

_OF_MESSAGE: Final = {row.message: row for row in BUILT_IN.values()}


def function_of(message: object) -> BuiltIn:
    """Return the function that a public message asks for. Raises DeserializationError if it is not a message."""
    row = _OF_MESSAGE.get(type(message))  # type: ignore[arg-type]  # an unknown type has no row
    if row is None:
        raise turns.no_message(message)
    return row


def from_payload(function_id: str, payload: object) -> Message:
    """Return the message for the input of a built-in function. Raises as `fields_of`."""
    return BUILT_IN[function_id].message(*fields_of(function_id, payload))


def fields_of(function_id: str, payload: object) -> list[Any]:
    """Read the input of a built-in function: the fields of its message, in order. Fields beyond those are ignored.

    Raises DeserializationError, worded as in iii-state, if a field is missing or has the wrong type; nothing has
    happened then. `function_id` must be one of BUILT_IN.
    """
    try:
        if not isinstance(payload, Mapping):
            raise misfit(function_id, f"expected an object, got {json_type(payload)}")
        return [read(function_id, payload, field) for field, read in _FIELDS[function_id]]
    except ScopestateError:
        raise
    except Exception as error:
        # A mapping, text or op of a class of the program's own, whose hooks raise.
        raise misfit(function_id, f"reading the input failed with {class_name(error)}") from error


def misfit(function_id: str, problem: str) -> DeserializationError:
    """Return the error for input that does not fit `function_id` (docs/protocol.md, section 4.4)."""
    return DeserializationError(f"Failed to deserialize input for {function_id}: {problem}")


def _text(function_id: str, payload: Mapping[str, Any], field: str) -> str:
    if field not in payload:
        raise misfit(function_id, f"missing field `{field}`")
    text = payload[field]
    if not issubclass(type(text), str):  # not isinstance, which believes the `__class__` of a mock
        raise misfit(function_id, f"invalid type: expected a string, got {json_type(text)} - at `$.{field}`")
    return str.__str__(text)  # of a subclass, what it holds


def _value(function_id: str, payload: Mapping[str, Any], field: str) -> Any:
    """`value`, or `data` as its alias; both together are a duplicate (docs/semantics.md, section 2)."""
    if field in payload:
        if "data" in payload:
            raise misfit(function_id, "duplicate field `value`: give either `value` or its alias `data`")
        return payload[field]
    if "data" in payload:
        return payload["data"]
    raise misfit(function_id, "missing field `value`")


def _ops(function_id: str, payload: Mapping[str, Any], field: str) -> Any:
    if field not in payload:
        raise misfit(function_id, "missing field `ops`")
    try:
        return convert_ops(payload[field])
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error


_READERS: Final[dict[str, Callable[[str, Mapping[str, Any], str], Any]]] = {
    "scope": _text,
    "key": _text,
    "value": _value,
    "ops": _ops,
}
"""Field of a message -> what reads it."""

_FIELDS: Final = {
    function_id: [(field, _READERS[field]) for field in row.message.__struct_fields__]
    for function_id, row in BUILT_IN.items()
}
"""Function id -> the fields of its message, each with its reader."""
