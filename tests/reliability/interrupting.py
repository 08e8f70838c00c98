"""Interrupting code at every place where CPython could deliver a signal, one place at a time."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interruption(Exception):
    """What a program's signal handler raises: an ordinary exception, such as a time limit's."""


def _place_for_a_signal() -> None:
    """At the start of a function written in Python every CPython delivers a signal; at calls in C not every one."""


class _Trap:
    """`-trap` marks SIGINT as arrived, in C, and gives CPython no chance to look at it before the next traced opcode.

    A negation that ends in a C function: a call would be a place where CPython handles signals itself.
    """

    __neg__ = ctypes.pythonapi.PyErr_SetInterrupt


def interrupt_at(place: int, work: Callable[[], Any], error: type[BaseException]) -> bool:
    """Run `work()` with SIGINT arriving just before its opcode number `place`; its handler raises `error`.

    CPython then delivers the signal where it would deliver a real one: at the next call, function start or loop end.
    Returns False if `work` has fewer opcodes than that. Main thread only; whatever `work` raises is swallowed if it is
    the interruption.
    """
    assert threading.current_thread() is threading.main_thread()
    trap = _Trap()
    count = 0

    def look(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call":
            frame.f_trace_opcodes = True
        elif event == "opcode":
            count += 1
            if count == place:
                # From here on nothing is traced: this function would be a place to deliver the signal at.
                sys.settrace(None)
                -trap  # type: ignore[operator]  # noqa: B018 - see _Trap
                return None
        return look

    def handle(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGINT, handle)
    tracing = sys.gettrace()
    try:
        with warnings.catch_warnings():
            # A connection that SQLite has opened and `work` has not yet stored is lost to an interruption in between.
            warnings.filterwarnings("ignore", "unclosed database", ResourceWarning)
            # CPython 3.12 looks here, when tracing begins, whether opcodes are wanted at all.
            sys._getframe().f_trace_opcodes = True
            sys.settrace(look)
            work()
            sys.settrace(None)
            _place_for_a_signal()  # for one that came with the last opcode
    except error:
        pass
    except Exception as raised:
        if not isinstance(raised.__cause__, error):
            raise  # else it is what callers are told about code of theirs that raised
    finally:
        sys.settrace(tracing)
        signal.signal(signal.SIGINT, before)
    return count >= place
