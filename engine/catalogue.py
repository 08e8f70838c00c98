"""The descriptions of functions and trigger types: the API reference, generated from the structs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from scopestate.actors.functions import Function, Functions
from scopestate.actors.triggers import Trigger
from scopestate.ops.functions import BUILT_IN
from scopestate.ops.results import StateEvent
from scopestate.ops.values import decode, encode


def builtin(function_id: str, call: Callable[[str, object], Any]) -> Function:
    """Return the registration of a built-in function."""
    return Function(function_id, lambda payload: call(function_id, payload), builtin=True)


def made_id(handler: Callable[..., Any], functions: Functions) -> str:
    """Return an id for a function without one: its module and name, numbered if that is taken."""
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    return functions.free_id(f"{getattr(handler, '__module__', None) or 'python'}::{name}")


def functions(registered: Functions) -> list[dict[str, Any]]:
    """Describe the built-in functions as the API reference does, then the registered ones in order of registration.

    The schema of a registered function is not known: `{}` allows anything.
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


# Made at the first call, which keeps the import fast, and kept as bytes: each caller gets its own copy.


@functools.cache
def _builtin_functions() -> bytes:
    from scopestate.schemas import schema, summary  # noqa: PLC0415 - see above

    return encode(
        [
            _entry(
                row.function_id,
                summary(row.message),
                schema(row.request, row.message),
                None if row.response is None else schema(*row.response),
            )
            for row in BUILT_IN.values()
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
