"""The caller's functions that run within a turn: those given to `modify` and `transact`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, TypeVar

from scopestate.errors import DeserializationError
from scopestate.ops.values import class_name

A = TypeVar("A")

Runner = Callable[[str, str, Callable[[Any], Any], Any], Any]
"""Calls a caller's function. Takes the name of the method it was given to, the scope, the function and its argument."""


def run_plainly(name: str, scope: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call the function directly: a `Runner` that adds nothing."""
    del name, scope
    return function(argument)


_NOT_PLAIN: Final = (
    inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
)
_PLAIN: Final = frozenset({dict, list, tuple, str, int, float, bool, type(None)})


def refuse_callback(name: str, function: Any) -> None:
    """Raise DeserializationError if `function` is not a plain function. `name`: the method that would call it."""
    if type(function) is FunctionType and not function.__code__.co_flags & _NOT_PLAIN:
        return  # `inspect` would take longer than the call that follows
    if not callable(function):
        raise DeserializationError(f"`{name}` takes a function, not {class_name(function)}")
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004 - an object may define it as `async def`
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise DeserializationError(
                f"the function given to `{name}` must be a plain function: nothing in it can be awaited"
            )
        if inspect.isgeneratorfunction(called):
            raise DeserializationError(
                f"the function given to `{name}` must be a plain function, not a generator function"
            )


def plain_answer(name: str, answer: A) -> A:
    """Return the result of the function given to `name`. Raises DeserializationError if it is a coroutine."""
    if type(answer) in _PLAIN:
        return answer
    if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
        answer.close()
    elif not (inspect.isawaitable(answer) or inspect.isasyncgen(answer)):
        return answer
    raise DeserializationError(f"the function of `{name}` returned a {class_name(answer)}: it must be a plain function")
