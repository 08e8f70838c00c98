"""What an engine says about its functions and trigger types: the API reference, generated from the structs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from scopestate.actors.functions import Function, Functions
from scopestate.actors.triggers import Trigger
from scopestate.ops import messages
from scopestate.ops.results import ListGroupsResult, SetResult, StateEvent, UpdateResult
from scopestate.ops.values import decode, encode

_IDS: Final = {kind: function_id for function_id, kind in messages.FUNCTION_IDS.items()}

_REQUESTS: Final = {
    "state::delete": "StateDeleteInput",
    "state::get": "StateGetInput",
    "state::list": "StateGetGroupInput",
    "state::list_groups": "StateListGroupsInput",
    "state::set": "StateSetInput",
    "state::update": "StateUpdateInput",
}
"""Function id -> the reference's name of its input."""

_RESPONSES: Final[dict[str, tuple[str, Any]]] = {
    "state::list_groups": ("StateListGroupsResult", ListGroupsResult),
    "state::set": ("SetResult", SetResult),
    "state::update": (
        "UpdateResult",
        Annotated[UpdateResult, msgspec.Meta(description="Result of an atomic update operation")],
    ),
}
"""Function id -> the reference's name of its result, and the result; the others return bare values."""


def function_id_of(message: messages.Message) -> str:
    """Return the id of the built-in function that a message belongs to."""
    return _IDS[type(message)]


def builtin(function_id: str, call: Callable[[str, object], Any]) -> Function:
    """Return the registration of a built-in function."""
    return Function(function_id, lambda payload: call(function_id, payload), builtin=True)


def made_id(handler: Callable[..., Any], functions: Functions) -> str:
    """Return an id for a function that was given none: its module and name, numbered if that is taken."""
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    return functions.free_id(f"{getattr(handler, '__module__', None) or 'python'}::{name}")


def functions(registered: Functions) -> list[dict[str, Any]]:
    """Describe the built-in functions as the API reference does, then the registered ones in order of registration.

    Of a registered function no schema is known: `{}` says that anything goes.
    """
    described: list[dict[str, Any]] = decode(_builtin_functions())
    described += [
        _entry(function.function_id, function.description) for function in registered.all() if not function.builtin
    ]
    return described


def trigger_types() -> list[dict[str, Any]]:
    """Describe the trigger type `state` as the API reference does."""
    described: list[dict[str, Any]] = decode(_builtin_trigger_types())
    return described


def _entry(function_id: str, description: str | None, request: Any = None, response: Any = None) -> dict[str, Any]:
    return {
        "name": function_id,
        "description": description,
        "metadata": {},
        "request_schema": request or {},
        "response_schema": response or {},
    }


# Made when first asked for, which keeps the import fast, and kept as bytes: each caller gets a copy of their own.


@functools.cache
def _builtin_functions() -> bytes:
    from scopestate.schemas import schema, summary  # noqa: PLC0415 - see above

    return encode(
        [
            _entry(
                function_id,
                summary(message),
                schema(_REQUESTS[function_id], message),
                schema(*_RESPONSES[function_id]) if function_id in _RESPONSES else None,
            )
            for function_id, message in messages.FUNCTION_IDS.items()
        ]
    )


@functools.cache
def _builtin_trigger_types() -> bytes:
    from scopestate.schemas import schema  # noqa: PLC0415 - see above

    return encode(
        [
            {
                "name": "state",
                "description": "State trigger",
                "metadata": {},
                "invocation_schema": schema("StateTriggerConfig", Trigger),
                "return_schema": schema("StateCallRequest", StateEvent),
            }
        ]
    )
