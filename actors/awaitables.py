"""What functions of the program return: values, awaitables, and what only looks like either."""

from __future__ import annotations

import inspect
import types
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeGuard


def is_awaitable(result: object) -> TypeGuard[Awaitable[Any]]:
    """True if `result` is of a class whose instances can be awaited. Its own attributes are not asked: a proxy or a
    mock has every one."""
    kind = type(result)
    if kind is types.GeneratorType:
        return inspect.isawaitable(result)  # those of `types.coroutine` can be
    return any("__await__" in vars(base) for base in _bases_of(kind))


_bases_of: Final[Callable[[type], tuple[type, ...]]] = type.__dict__["__mro__"].__get__
"""`kind.__mro__`, without asking what the metaclass of `kind` answers."""


def is_unrun(result: object) -> bool:
    """True for a generator: nothing of its code has run, and nothing would run it."""
    return type(result) in (types.GeneratorType, types.AsyncGeneratorType)


def close_unrun(result: object) -> None:
    """Close a coroutine that never began: Python would complain that it was never awaited."""
    if type(result) is types.CoroutineType and inspect.getcoroutinestate(result) == inspect.CORO_CREATED:
        result.close()
