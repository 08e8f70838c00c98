"""Containing exceptions of the program's code: such an exception ends one call and nothing else.

The rule (docs/design/0009-isolation.md): handlers, conditions, functions, hooks, callbacks and logging filters may
raise anything. The exception is reported, and the engine continues. Only exceptions that such code did not raise itself
are passed on: Ctrl-C and exceptions of signal handlers, both on the main thread, and `Ended` of a deterministic
dispatcher.
"""

from __future__ import annotations

import functools
import inspect
import logging
import signal
import threading
from collections.abc import Callable
from threading import get_ident
from types import CodeType, FunctionType, MethodType, TracebackType
from typing import Any, Final

from scopestate.ops.values import class_name


class Ended(BaseException):
    """Raised in a waiting turn when its dispatcher ends. Not an Exception: code under test must not catch it."""


def is_from_outside(error: BaseException) -> bool:
    """Tell whether `error` must reach the caller, because the running code did not raise it itself."""
    kind = type(error)  # `isinstance` may call code of the program: its `__class__`
    if issubclass(kind, Ended):
        return True
    if get_ident() != threading.main_thread().ident:
        return False  # Python runs signal handlers on the main thread only
    return issubclass(kind, KeyboardInterrupt) or _is_of_signal_handler(error)


def _is_of_signal_handler(error: BaseException) -> bool:
    """Tell whether the traceback has a frame of an installed signal handler, such as one that calls `sys.exit()`."""
    codes = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    traceback: TracebackType | None = _traceback_of(error)
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


_traceback_of: Final = vars(BaseException)["__traceback__"].__get__
"""Returns `error.__traceback__`, even if the class of `error` redefines that name."""


def _code_of(handler: object) -> CodeType | None:
    """Return the code that Python runs when it calls `handler`, without running it."""
    for _ in range(100):  # limited: a chain may contain itself
        kind = type(handler)
        if kind is FunctionType:
            return handler.__code__  # type: ignore[attr-defined,no-any-return]  # of a function
        if kind is MethodType:
            handler = handler.__func__  # type: ignore[attr-defined]  # of a method
        elif issubclass(kind, functools.partial):
            handler = functools.partial.func.__get__(handler)  # a slot of that class
        else:
            handler = inspect.getattr_static(kind, "__call__", None)
            if type(handler) not in (FunctionType, functools.partial):
                return None
    return None


def described(error: BaseException) -> str:
    """Return the text of any exception, even if its `__str__` raises."""
    try:
        return str.__str__(str(error))
    except BaseException as problem:
        if is_from_outside(problem):
            raise
        return f"(its text could not be read: {class_name(problem)})"


def contained(action: Callable[[], object], what: str, log: Log) -> None:
    """Call `action()`. If it raises, log "`what` failed" and return."""
    try:
        action()
    except BaseException as error:
        if is_from_outside(error):
            raise
        log.exception("%s failed", what)


class Log:
    """A standard logger. Exceptions of its filters and handlers, which belong to the program, are dropped."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, text: str, *args: object, **options: Any) -> None:
        """As `logging.Logger.debug`."""
        self._write(logging.DEBUG, text, args, options)

    def warning(self, text: str, *args: object, **options: Any) -> None:
        """As `logging.Logger.warning`."""
        self._write(logging.WARNING, text, args, options)

    def error(self, text: str, *args: object, **options: Any) -> None:
        """As `logging.Logger.error`."""
        self._write(logging.ERROR, text, args, options)

    def exception(self, text: str, *args: object, **options: Any) -> None:
        """As `logging.Logger.exception`."""
        self._write(logging.ERROR, text, args, {"exc_info": True, **options})

    def _write(self, level: int, text: str, args: tuple[object, ...], options: dict[str, Any]) -> None:
        try:
            self._logger.log(level, text, *args, stacklevel=3, **options)
        except BaseException as error:
            if is_from_outside(error):
                raise
            # This exception cannot be reported, because logging itself has failed.
