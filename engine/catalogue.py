"""What an engine says about its functions and trigger types: the API reference, generated from the structs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from scopestate.actors import messages
from scopestate.actors.functions import Function, Functions

_IDS: Final = {kind: function_id for function_id, kind in messages.FUNCTION_IDS.items()}


def function_id_of(message: messages.Message) -> str:
    """Return the id of the built-in function that a message belongs to."""
    return _IDS[type(message)]


def builtin(function_id: str, call: Callable[[str, object], Any]) -> Function:
    """Return the registration of a built-in function."""
    return Function(
        function_id,
        lambda payload: call(function_id, payload),
        description=messages.FUNCTION_IDS[function_id].__doc__,
        builtin=True,
    )


def made_id(handler: Callable[..., Any], functions: Functions) -> str:
    """Return an id for a function that was given none: its module and name, numbered if that is taken."""
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    base = f"{getattr(handler, '__module__', None) or 'python'}::{name}"
    taken = {function.function_id for function in functions.all()}
    made, number = base, 1
    while made in taken:
        number += 1
        made = f"{base}#{number}"
    return made


def functions(registered: Functions) -> list[dict[str, Any]]:
    return []


def trigger_types() -> list[dict[str, Any]]:
    return []
