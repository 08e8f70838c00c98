"""Interrupting code at every place where CPython could deliver a signal, one place at a time."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class Interruption(Exception):
    """The exception of a program's signal handler: an ordinary one, such as that of a time limit."""


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
    opcodes = _Monitored(place) if sys.version_info >= (3, 13) else _Traced(place)

    def handle(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGINT, handle)
    try:
        with warnings.catch_warnings():
            # A connection that SQLite has opened and `work` has not yet stored is lost to an interruption in between.
            warnings.filterwarnings("ignore", "unclosed database", ResourceWarning)
            opcodes.start()
            work()
            opcodes.stop()
            _place_for_a_signal()  # for one that came with the last opcode
    except error:
        pass
    except Exception as raised:
        if not isinstance(raised.__cause__, error):
            raise  # else it is what callers are told about code of theirs that raised
    finally:
        opcodes.end()
        signal.signal(signal.SIGINT, before)
    assert opcodes.count, "this CPython does not show its opcodes"
    return opcodes.count >= place


class _Traced:
    """Counts the opcodes of this thread by `sys.settrace`, and marks SIGINT as arrived before one of them."""

    def __init__(self, place: int) -> None:
        self.count = 0
        self._place = place
        self._trap = _Trap()
        self._before = sys.gettrace()
        # One object, which lives as long as this: CPython 3.11 holds no reference to the trace function that it calls
        # next. It makes an object for the frame first, which may collect garbage. The callbacks of that are traced too:
        # if `place` is in one of them, tracing has ended by the time of that call.
        self._tracer = self._look

    def start(self) -> None:
        # CPython 3.12 looks here, when tracing begins, whether opcodes are wanted at all.
        sys._getframe().f_trace_opcodes = True
        sys._getframe(1).f_trace_opcodes = True
        sys.settrace(self._tracer)

    def stop(self) -> None:
        sys.settrace(None)

    def end(self) -> None:
        sys.settrace(self._before)
        del self._tracer  # it refers to this object

    def _look(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename == __file__:
            return None  # not of the work
        if event == "call":
            frame.f_trace_opcodes = True
        elif event == "opcode":
            self.count += 1
            if self.count == self._place:
                # From here on nothing is traced: this function would be a place to deliver the signal at.
                sys.settrace(None)
                -self._trap  # type: ignore[operator]  # noqa: B018 - see _Trap
                return None
        return self._tracer


class _Monitored:
    """As `_Traced`, by `sys.monitoring`: CPython 3.13.0 traces no opcodes of the functions that a function calls."""

    def __init__(self, place: int) -> None:
        self.count = 0
        self._place = place
        self._trap = _Trap()
        self._thread = threading.get_ident()

    def start(self) -> None:
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.DEBUGGER_ID, "interrupting")
        monitoring.register_callback(monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION, self._look)
        monitoring.set_events(monitoring.DEBUGGER_ID, monitoring.events.INSTRUCTION)

    def stop(self) -> None:
        # Twice: what has been marked for the callback in running code stays so until the code is entered again.
        sys.monitoring.register_callback(sys.monitoring.DEBUGGER_ID, sys.monitoring.events.INSTRUCTION, None)
        sys.monitoring.set_events(sys.monitoring.DEBUGGER_ID, 0)

    def end(self) -> None:
        if sys.monitoring.get_tool(sys.monitoring.DEBUGGER_ID) is not None:
            self.stop()
            sys.monitoring.free_tool_id(sys.monitoring.DEBUGGER_ID)

    def _look(self, code: CodeType, offset: int) -> None:
        # Events come from all threads, and from the methods here that begin and end it.
        if threading.get_ident() == self._thread and code.co_filename != __file__:
            self.count += 1
            if self.count == self._place:
                self.stop()
                -self._trap  # type: ignore[operator]  # noqa: B018 - see _Trap
