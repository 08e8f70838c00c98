"""What happens to live engines when the process forks, exits or is told to end."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from scopestate.engine import Engine

log = logging.getLogger("scopestate.engine")

_live: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()
_guard = threading.RLock()  # reentrant: a signal handler may open or close an engine in the middle of another opening
_hooked = False

LAST_RESORT_S: Final = 1.0
"""How long a process whose main thread is stuck outlives its engines after SIGTERM."""


def watch_over(engine: Engine) -> None:
    """Close `engine` at interpreter exit if nobody has, and refuse it in forked children."""
    global _hooked  # noqa: PLW0603 - hooks are per process
    with _guard:
        _live.add(engine)
        if not _hooked:
            _hooked = True
            atexit.register(_close_all, "the interpreter exits")
            os.register_at_fork(after_in_child=_after_fork)


def release(engine: Engine) -> None:
    """`engine` is closed: nothing is left to do for it."""
    with _guard:
        _live.discard(engine)


def close_on_sigterm() -> None:
    """Have SIGTERM close every engine before it ends the process, unless the program has its own handler.

    By default SIGTERM ends a process on the spot, with no exit hooks: up to `save_interval_ms` of acknowledged writes
    would be lost. The process still ends by the signal, with the status that supervisors expect. Works from the main
    thread only, as Python's signals do; elsewhere nothing changes, which is logged.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _Termination())
    else:
        log.warning(
            "an engine was opened off the main thread, where Python sets no signal handler: SIGTERM would end the "
            "process without saving; open the first engine on the main thread, or handle SIGTERM yourself"
        )


class _Termination:
    """The SIGTERM handler: closes on a thread of its own, because the main thread may be in the middle of a turn."""

    def __init__(self) -> None:
        self._closing = False
        self._closed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._closed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._closing:
            self._closing = True
            threading.Thread(target=self._close_then_end, name="scopestate-sigterm").start()

    def _close_then_end(self) -> None:
        _close_all("SIGTERM")
        self._closed = True
        os.kill(os.getpid(), signal.SIGTERM)  # handled on the main thread, which then lets the signal through
        threading.Event().wait(LAST_RESORT_S)
        os._exit(128 + signal.SIGTERM)


def _close_all(why: str) -> None:
    with _guard:
        engines = list(_live)
    for engine in engines:
        try:
            engine.close()
        except Exception:
            log.exception("closing an engine because %s failed", why)


def _after_fork() -> None:
    global _guard  # noqa: PLW0603 - another thread may have held it at the fork: the child starts with a free one
    _guard = threading.RLock()
    if isinstance(signal.getsignal(signal.SIGTERM), _Termination):
        # The child ends as it would have: it has no engine to close, and its parent may have been closing one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for engine in list(_live):
        engine.disown()
    _live.clear()
