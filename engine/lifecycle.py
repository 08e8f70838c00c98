"""What happens to open engines when the process forks, exits or gets a signal (docs/design/0011-ends-of-a-process.md).

A process ends in one of these ways, and each has its hook here:

- the main program returns: `threading` runs its exit hooks (`_before_executors_end`), waits for non-daemon threads, and
  then `atexit` hooks run (`_at_exit`);
- a worker of `multiprocessing` returns, which ends by `os._exit`: its finalizers run (`_at_end_of_worker`);
- a signal whose default action ends the process at once: `_Termination` replaces the default action;
- a signal that the host program handles while it runs, and whose handler it removes at its end: `_Guest` saves before
  the host's handler runs, and keeps the default action from coming back.

SIGKILL and calls of `os._exit` and `os.exec*` have no hook: they lose what durability `interval` may lose.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.dispatcher import start_thread
from scopestate.actors.snapshot import Flush
from scopestate.signals import Guard, join, wait_for

if TYPE_CHECKING:
    from scopestate.actors.ports import Backend
    from scopestate.engine import Engine

log = logging.getLogger("scopestate.engine")

LAST_RESORTS: Final = 10
"""How often, and how many tenths of a second apart, the main thread is told to end once the engines are closed after a
signal. Then it is stuck, and the process ends without it."""
SAVE_FIRST_S: Final = 3.0
"""Longest time in seconds that the host's signal handler is delayed by the save before it."""
PROMPT_S: Final = 0.02
"""The interval of saves after that, in seconds."""
DROPPED_S: Final = 20.0
"""Seconds that an engine waits for a dropped one that still holds the same store."""
RESEND_S: Final = 0.05
"""How long a signal may stay unnoticed in a worker of `multiprocessing` before it is sent again."""
SHARE_S: Final = 0.25
"""Shortest grace time of each engine when several share one, in seconds."""

_ENDS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGBREAK") if hasattr(signal, name)
)
"""Signals that end a process normally. They are handled if their action is the default."""
_WORKER_LIBRARIES: Final = ("multiprocessing", "multiprocess", "billiard")
"""Libraries whose workers end by `os._exit`, after what was registered with their `util.Finalize`."""
_EXECUTORS: Final = ("concurrent.futures.thread", "concurrent.futures.process")

_live: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()
_stores: Final[dict[int, Backend]] = {}
"""id of an engine -> its backend, for as long as it is not closed."""
_dropped: Final[set[Engine]] = set()
_exclusive = Guard()
_hooked = False
_ahead_of: frozenset[str] = frozenset()
_finalized: set[str] = set()
_leaving = False
"""True once the main program is over."""
_ended_by: int | None = None
"""A signal that arrived while the interpreter was exiting. The exit hook ends the process with it."""
_noted: tuple[int, int] | None = None
"""Both ends of the pipe into which the interpreter writes signals, in a worker of `multiprocessing`."""
_on_main: list[Any] = []
_real_signal = signal.signal


# -------------------------------------------------------------------------------------------------- opening and closing


def watch_over(engine: Engine) -> None:
    """Close `engine` at the end of the process if the program does not, and refuse it in forked children."""
    _exclusive.run(_watch_over, engine)


def _watch_over(engine: Engine) -> None:
    global _hooked  # noqa: PLW0603 - hooks are per process
    _live.add(engine)
    hold_backend(engine)
    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_after_fork)
    for library in _WORKER_LIBRARIES:
        util = sys.modules.get(f"{library}.util")
        if util is not None and library not in _finalized:
            _finalized.add(library)
            # Last: by then children have ended and queues are flushed.
            util.Finalize(None, _at_end_of_worker, exitpriority=-100)
    stay_ahead_of_executors()


def hold_backend(engine: Engine) -> None:
    """Keep the files and connections of an engine: dropped together with it, they would close before it can save."""
    if engine._parts.backend.keeps:
        _stores[id(engine)] = engine._parts.backend


def release(engine: Engine) -> None:
    """Forget `engine`, which is closed."""
    _stores.pop(id(engine), None)
    _exclusive.run(_live.discard, engine)


def close_dropped(engine: Engine) -> None:
    """Close an engine that the program has dropped without close(). Called by its finalizer, on any thread.

    A finalizer may run in the middle of anything, even of a turn of this engine or of `threading`'s own code. So
    another thread closes the engine, and one C call starts that thread. The exit hook waits for it.
    """
    _dropped.add(engine)
    if not start_thread(functools.partial(_close_now, engine)):
        log.debug("no thread could be started for an engine that was dropped: the exit hook closes it")
    warnings.warn(f"an engine was dropped without close(): {engine!r}", ResourceWarning, stacklevel=2, source=engine)


def wait_for_dropped() -> bool:
    """Wait until engines that were dropped are closed. Returns False if there were none."""
    if not _dropped:
        return False
    wait_for(_are_closed, DROPPED_S)
    return True


def _are_closed(slice_s: float) -> bool:
    deadline = time.monotonic() + slice_s
    while _dropped and time.monotonic() < deadline:
        time.sleep(0.001)
    return not _dropped


def _close_now(engine: Engine) -> None:
    try:
        engine.close()
    except Exception:
        log.exception(
            "closing an engine that was dropped without close() failed; changes that it had not saved are lost"
        )
    _dropped.discard(engine)


def stay_ahead_of_executors() -> None:
    """Deliver events at exit while executors still take work. Called again when functions are registered.

    Executors register their end with `threading._register_atexit`, and so does this: hooks run last in, first out, so
    this one must be registered after theirs. The name is private, but no public hook runs early enough: `atexit` runs
    when all executors have ended. Without it, handlers that need an executor fail at exit and are reported, as on
    CPython 3.12.0 and 3.12.1, which start no threads by then.
    """
    import concurrent.futures.thread  # noqa: F401, PLC0415 - for its hook; it takes 2 ms, which `import scopestate` need not

    global _ahead_of  # noqa: PLW0603 - hooks are per process
    loaded = frozenset(name for name in _EXECUTORS if name in sys.modules)
    if loaded == _ahead_of:
        return
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):  # the interpreter is already exiting
            register(_before_executors_end)
    _ahead_of = loaded


def close_on_signals() -> None:
    """Close every engine when a signal ends the process, unless the program handles the signal itself.

    By default such a signal ends the process at once, without exit hooks: up to `save_interval_ms` of acknowledged
    writes would be lost. The process still ends by the signal, with the status that supervisors expect.
    """
    if threading.current_thread() is threading.main_thread():
        _take_signals()
    elif not all(isinstance(signal.getsignal(number), (_Termination, _Guest)) for number in _ENDS):
        _on_main_thread(_take_signals)


def _take_signals() -> None:
    for number in _ENDS:
        handler = signal.getsignal(number)
        if handler is signal.SIG_DFL:
            _real_signal(number, _termination)
        elif number == signal.SIGTERM and callable(handler) and not isinstance(handler, (_Termination, _Guest)):
            # SIGTERM only: programs use the others for other things (SIGHUP: read the configuration again).
            _real_signal(number, _Guest(handler))
    _send_lost_signals_again()


def _send_lost_signals_again() -> None:
    """In a worker of `multiprocessing`, make sure that each signal is noticed, even during a wait.

    `Pool.terminate()` sends SIGTERM once and then waits for its worker, whose main thread sleeps without a time limit.
    The default action would end it at once. With a handler, a signal between the interpreter's last check and the sleep
    is not noticed, and both wait without end. So the interpreter's C code writes each signal to a pipe, and a thread
    sends it again until it is handled. Only in such workers, and only if the descriptor is unused: a process has one.
    """
    global _noted  # noqa: PLW0603 - as above
    processes = sys.modules.get("multiprocessing.process")
    if _noted is not None or processes is None or processes.parent_process() is None or os.name == "nt":
        return
    here, there = os.pipe()
    os.set_blocking(there, False)
    before = signal.set_wakeup_fd(there, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(here)
        os.close(there)
        return
    _noted = (here, there)
    threading.Thread(target=_send_again, args=(here,), name="scopestate-signals", daemon=True).start()


def _send_again(here: int) -> None:
    while numbers := os.read(here, 64):
        for number in numbers:
            while number in _ENDS and not _termination.begun and isinstance(signal.getsignal(number), _Termination):
                time.sleep(RESEND_S)
                if not _termination.begun:
                    os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------------------------------- the hooks


def _before_executors_end() -> None:
    global _leaving  # noqa: PLW0603 - as above
    _leaving = True
    for engine in _engines():
        try:
            engine._closing.deliver_early()
        except Exception:
            log.exception("delivering events before the interpreter exits failed")


def _at_exit() -> None:
    global _leaving  # noqa: PLW0603 - as above
    _leaving = True
    _close_all("the interpreter exits")
    if _ended_by is not None:
        _end_by(_ended_by)


def _at_end_of_worker() -> None:
    """Close at the end of a worker of `multiprocessing`, which then waits for its threads and calls `os._exit`."""
    if not _leaving:
        with contextlib.suppress(RuntimeError):
            # Not a daemon, so the worker waits for this thread, which waits for the others: they may still write.
            threading.Thread(target=_close_behind_threads, name="scopestate-close", daemon=False).start()
            return
    _close_all("its worker process ends")


def _close_behind_threads() -> None:
    me, main = threading.current_thread(), threading.main_thread()
    while any(not thread.daemon and thread not in (me, main) for thread in threading.enumerate()):
        time.sleep(0.005)  # `join` would fail for a thread that is about to start
    _close_all("its worker process ends")


def _engines() -> list[Engine]:
    """Return the open engines. Followers of another engine of this process come first, or they would take it over."""
    engines = list(dict.fromkeys([*_exclusive.run(lambda: list(_live)), *list(_dropped)]))
    return sorted(engines, key=lambda engine: engine._parts.backend.store is not None)


def _close_all(why: str) -> None:
    engines = _engines()
    # Flush all first: a handler of one engine may use up the time in which the others would save.
    for engine in engines if len(engines) > 1 else ():
        with contextlib.suppress(Exception):  # reported when it is closed
            engine.flush()
    deadline: float | None = None
    for engine in engines:
        # All engines share one grace time.
        grace_s = engine._limits.close_grace_s
        deadline = deadline or time.monotonic() + grace_s
        left_s = max(deadline - time.monotonic(), SHARE_S)
        try:
            engine._close(min(grace_s, left_s))
        except Exception:
            log.exception("closing an engine because %s failed", why)


# ----------------------------------------------------------------------------------------------------------- signals


class _Termination:
    """Handles a signal that ends the process. It closes on a new thread, as the interrupted one may be in a turn."""

    def __init__(self) -> None:
        self.begun = False
        self._closed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _ended_by  # noqa: PLW0603 - as above
        if self._closed:
            _end_by(number)
        elif not self.begun:
            self.begun = True
            try:
                threading.Thread(target=self._close_then_end, args=(number,), name="scopestate-signal").start()
            except RuntimeError as error:
                # No more threads can be started. At exit the hook closes; otherwise it is done here.
                log.debug("no thread for signal %d: %s", number, error)
                _ended_by = number
                if not _leaving:
                    _at_exit()

    def _close_then_end(self, number: int) -> None:
        _close_all(signal.Signals(number).name)
        self._closed = True
        # Counted: if the machine stops the process for a second, the main thread still gets its time.
        for _ in range(LAST_RESORTS):
            # The main thread handles it and then ends the process. Sent repeatedly: a signal between the main thread's
            # last check and the beginning of a wait is not noticed.
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        os._exit(128 + number)


class _Guest:
    """Handles SIGTERM if the host program does: saves, calls the host's handler, and keeps the default action away.

    Hosts like uvicorn finish their work, restore the previous handler, and raise the signal again. For an engine that
    was opened in between, the previous handler is the default action, which ends the process at once. So from the
    first SIGTERM on, `signal.signal` installs `_termination` instead of the default action.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _save_first()
        signal.signal = _signal  # type: ignore[assignment]  # same parameters as the original
        self.handler(number, frame)


@functools.wraps(_real_signal)
def _signal(number: Any, handler: Any) -> Any:
    if handler == signal.SIG_DFL and number == signal.SIGTERM and _live:
        handler = _termination
    return _real_signal(number, handler)


def _save_first() -> None:
    """Save everything, and often from now on: it is unknown how the host will end the process."""
    try:
        thread = threading.Thread(target=_flush_all, name="scopestate-signal", daemon=True)
        thread.start()
    except RuntimeError:
        return  # the interpreter is exiting, and the hook saves
    # With a time limit: this thread may be in the turn that the save waits for.
    join(thread, SAVE_FIRST_S)


def _flush_all() -> None:
    for engine in _engines():
        try:
            snapshot = engine._parts.snapshot
            snapshot.set_interval(PROMPT_S)
            # Refused: `engine.flush()`. It fails at once while another thread closes the engine and may not have saved
            # yet, as with an engine that was just dropped.
            snapshot.ask(Flush()).get()
        except Exception as error:  # noqa: BLE001 - saving is tried again, and logs the problem at ERROR
            log.debug("saving at a signal: %s", error)


def _end_by(number: int) -> None:
    _real_signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


_termination = _Termination()


_WAKING_S: Final = 0.15
"""Seconds for which to try to wake the main thread. If it waits in its event loop, it makes the call when the loop
continues."""


def _on_main_thread(work: Callable[[], object]) -> None:
    """Call `work()` on the main thread, the only one that can set signal handlers.

    The C API has a function for this. The main thread makes the call at its next instruction; if it sleeps on a lock,
    as in `thread.join()`, a signal without effect wakes it. The signal is sent again until the call is made: one that
    comes just before the sleep does not wake the thread, and neither does one whose handler is removed before the
    thread has run. Returns after `_WAKING_S` at the latest; the call is then made when the main thread wakes.
    """
    import ctypes  # noqa: PLC0415 - backends that keep state have it loaded
    import faulthandler  # noqa: PLC0415 - needed here only

    called: list[bool] = []

    def call(_: object) -> int:
        try:
            work()
        except Exception:
            log.exception("setting signal handlers failed")
        called.append(True)
        return 0

    pending = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(call)
    _on_main.append(pending)  # the interpreter may call it at any later time
    if ctypes.pythonapi.Py_AddPendingCall(pending, None):
        log.warning(
            "an engine was opened off the main thread, which is too busy to set a signal handler: SIGTERM would end "
            "the process without saving; open the first engine on the main thread, or handle SIGTERM yourself"
        )
        return
    number = getattr(signal, "SIGURG", None)
    main = threading.main_thread().ident
    if number is None or main is None or signal.getsignal(number) is not signal.SIG_DFL:
        return
    # The only handler that Python can install from any thread. Its output is discarded, and it is removed at once.
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        faulthandler.register(number, nowhere, all_threads=False)
        signal.siginterrupt(number, True)
        try:
            pause_s, deadline = 0.001, time.monotonic() + _WAKING_S
            while not called and time.monotonic() < deadline:
                signal.pthread_kill(main, number)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
        finally:
            faulthandler.unregister(number)


# -------------------------------------------------------------------------------------------------------------- fork


def _after_fork() -> None:
    global _exclusive, _leaving, _termination, _ended_by, _ahead_of, _noted  # noqa: PLW0603 - the state of the child
    _exclusive = Guard()  # another thread may have held the old one
    _leaving, _ended_by, _ahead_of = False, None, frozenset()
    _finalized.clear()
    if _noted is not None:
        # Otherwise the signals of this child would be written to the pipe of its parent.
        before = signal.set_wakeup_fd(-1)
        if before != _noted[1]:
            signal.set_wakeup_fd(before)  # it belongs to another library
        for end in _noted:
            os.close(end)
        _noted = None
    signal.signal = _real_signal
    for number in _ENDS:
        # The child has no engine to close, so signals end it as they would without one.
        handler = signal.getsignal(number)
        if isinstance(handler, _Termination):
            _real_signal(number, signal.SIG_DFL)
        elif isinstance(handler, _Guest):
            _real_signal(number, handler.handler)
    _termination = _Termination()
    for engine in [*_live, *_dropped]:
        engine.disown()
    _dropped.clear()
    _stores.clear()
    _live.clear()
