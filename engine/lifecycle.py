"""What happens to live engines when the process forks, exits or is told to end (docs/design/0011-ends-of-a-process.md).

A process ends in one of these ways, and each has its hook here:

- the main program is over: `threading`'s exit hooks run first (`_before_executors_end`), then non-daemon threads are
  waited for, then `atexit` hooks run (`_at_exit`);
- a worker of `multiprocessing` is over, which ends by `os._exit`: its finalizers run (`_at_end_of_worker`);
- a signal whose default ends the process on the spot: `_Termination` takes the place of the default;
- a signal that the host program handles while it runs, and gives back at its end: `_Guest` saves before the host's
  handler runs, and sees that the default does not come back.

SIGKILL, `os._exit` and `os.exec*` of the program's own have none: they lose what `interval` may lose.
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

LAST_RESORT_S: Final = 1.0
"""How long a process whose main thread is stuck outlives its engines after a signal that ends it."""
SAVE_FIRST_S: Final = 3.0
"""How long a signal handler of the host is kept waiting for what is saved before it."""
PROMPT_S: Final = 0.02
"""The interval of saves from then on."""
DROPPED_S: Final = 20.0
"""How long an engine that opens the same store waits for one that was dropped."""
RESEND_S: Final = 0.05
"""How long a signal may stay unnoticed in a worker of `multiprocessing` before it is sent again."""
SHARE_S: Final = 0.25
"""Grace time that each engine has at least, where several share one."""

_ENDS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGBREAK") if hasattr(signal, name)
)
"""Signals that end a process in the ordinary course of things: taken if their default action stands."""
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
"""A signal that came when the interpreter was on its way out: it ends the process behind the exit hook."""
_noted: tuple[int, int] | None = None
"""Both ends of the pipe in which the interpreter notes signals, in a worker of `multiprocessing`."""
_on_main: list[Any] = []
_real_signal = signal.signal


# -------------------------------------------------------------------------------------------------- opening and closing


def watch_over(engine: Engine) -> None:
    """Close `engine` at the end of the process if the program does not, and refuse it in forked children."""
    _exclusive.run(_watch_over, engine)


def _watch_over(engine: Engine) -> None:
    global _hooked  # noqa: PLW0603 - hooks are per process
    _live.add(engine)
    if engine._parts.backend.keeps:
        # Files and connections that are dropped with the engine would be closed before it can save.
        _stores[id(engine)] = engine._parts.backend
    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_after_fork)
    for library in _WORKER_LIBRARIES:
        util = sys.modules.get(f"{library}.util")
        if util is not None and library not in _finalized:
            _finalized.add(library)
            # The last of all: children have ended by then, and queues are flushed.
            util.Finalize(None, _at_end_of_worker, exitpriority=-100)
    stay_ahead_of_executors()


def release(engine: Engine) -> None:
    """`engine` is closed: nothing is left to do for it."""
    _stores.pop(id(engine), None)
    _exclusive.run(_live.discard, engine)


def close_dropped(engine: Engine) -> None:
    """Close an engine that the program has dropped without close(). Called by its finalizer, on any thread.

    A finalizer may run in the middle of anything, also of a turn of this very engine or of `threading`'s own code: so
    another thread closes, and it is started by one C call. Until it is done, the exit hook waits for it.
    """
    _dropped.add(engine)
    if not start_thread(functools.partial(_close_now, engine)):
        log.debug("no thread for an engine that was dropped: the exit hook closes it")
    warnings.warn(f"an engine was dropped without close(): {engine!r}", ResourceWarning, stacklevel=2, source=engine)


def wait_for_dropped() -> bool:
    """Wait for engines that were dropped to be closed; False if there were none."""
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
        log.exception("closing an engine that was dropped without close() failed; what it had not saved is lost")
    _dropped.discard(engine)


def stay_ahead_of_executors() -> None:
    """Have events delivered at exit while executors still take work. Called again when functions are registered.

    Executors end by `threading._register_atexit`, and so do we: the hooks run last in, first out, so ours must come
    after theirs. Private, but nothing public comes early enough: `atexit` runs when all executors have ended.
    Without it, handlers that need an executor fail at exit and are reported, as on CPython 3.12.0 and 3.12.1, which
    start no threads by then.
    """
    import concurrent.futures.thread  # noqa: F401, PLC0415 - for its hook; 2 ms that `import scopestate` need not take

    global _ahead_of  # noqa: PLW0603 - hooks are per process
    loaded = frozenset(name for name in _EXECUTORS if name in sys.modules)
    if loaded == _ahead_of:
        return
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):  # it exits already
            register(_before_executors_end)
    _ahead_of = loaded


def close_on_signals() -> None:
    """Have the signals that end a process close every engine first, unless the program handles them itself.

    By default they end a process on the spot, with no exit hooks: up to `save_interval_ms` of acknowledged writes would
    be lost. The process still ends by the signal, with the status that supervisors expect.
    """
    if threading.current_thread() is threading.main_thread():
        _take_signals()
    else:
        _on_main_thread(_take_signals)


def _take_signals() -> None:
    for number in _ENDS:
        handler = signal.getsignal(number)
        if handler is signal.SIG_DFL:
            _real_signal(number, _termination)
        elif number == signal.SIGTERM and callable(handler) and not isinstance(handler, (_Termination, _Guest)):
            # SIGTERM only: the others mean other things to other programs (SIGHUP: read your configuration).
            _real_signal(number, _Guest(handler))
    _send_lost_signals_again()


def _send_lost_signals_again() -> None:
    """In a worker of `multiprocessing`: have each signal noticed, at whatever moment of a wait it comes.

    `Pool.terminate()` sends SIGTERM once, then waits for its worker, whose main thread sleeps without a time limit. By
    default the signal would end it on the spot. With a handler it can fall between the interpreter's last look and the
    sleep, and both wait for ever. So the interpreter's C code notes each signal in a pipe, and a thread sends it again
    until it is handled. Only in such workers, and only where nothing else uses the descriptor: a process has just one.
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
    """A worker of `multiprocessing` has done its work: what follows is a wait for its threads, then `os._exit`."""
    if not _leaving:
        with contextlib.suppress(RuntimeError):
            # Not a daemon: that wait is for this thread too, which waits for the others, as they may still write.
            threading.Thread(target=_close_behind_threads, name="scopestate-close", daemon=False).start()
            return
    _close_all("its worker process ends")


def _close_behind_threads() -> None:
    me, main = threading.current_thread(), threading.main_thread()
    while any(not thread.daemon and thread not in (me, main) for thread in threading.enumerate()):
        time.sleep(0.005)  # not joined: one that is about to start cannot be
    _close_all("its worker process ends")


def _engines() -> list[Engine]:
    return list(dict.fromkeys([*_exclusive.run(lambda: list(_live)), *list(_dropped)]))


def _close_all(why: str) -> None:
    engines = _engines()
    # All of them first: a handler of one engine may use up the time that the others have for their saves.
    for engine in engines if len(engines) > 1 else ():
        with contextlib.suppress(Exception):  # told when it is closed
            engine.flush()
    deadline: float | None = None
    for engine in engines:
        # One grace time for all, which run side by side: not one after the other.
        grace_s = engine._limits.close_grace_s
        deadline = deadline or time.monotonic() + grace_s
        left_s = max(deadline - time.monotonic(), SHARE_S)
        try:
            engine._close(min(grace_s, left_s))
        except Exception:
            log.exception("closing an engine because %s failed", why)


# ----------------------------------------------------------------------------------------------------------- signals


class _Termination:
    """Handles a signal that ends the process: closes on a thread of its own, as this one may be in a turn."""

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
                # No thread starts any more. On the way out the exit hook closes; else it must be done here.
                log.debug("no thread for signal %d: %s", number, error)
                _ended_by = number
                if not _leaving:
                    _at_exit()

    def _close_then_end(self, number: int) -> None:
        _close_all(signal.Signals(number).name)
        self._closed = True
        ends = time.monotonic() + LAST_RESORT_S
        while time.monotonic() < ends:
            # Handled on the main thread, which then lets it through. Again and again: one may fall between the main
            # thread's last look at its signals and the beginning of a wait.
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        os._exit(128 + number)


class _Guest:
    """Handles SIGTERM where a host program does: saves, calls the host's handler, and keeps the default away.

    Hosts like uvicorn finish their work, give the signal back to whom they took it from, and raise it again. An engine
    that was opened in between finds the default there, which ends the process on the spot. So from the first SIGTERM on
    `signal.signal` puts `_termination` where the default is asked for.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _save_first()
        signal.signal = _signal  # type: ignore[assignment]  # it takes what the original takes
        self.handler(number, frame)


@functools.wraps(_real_signal)
def _signal(number: Any, handler: Any) -> Any:
    if handler == signal.SIG_DFL and number == signal.SIGTERM and _live:
        handler = _termination
    return _real_signal(number, handler)


def _save_first() -> None:
    """Save everything, and often from now on: nothing is known of how the host ends the process."""
    try:
        thread = threading.Thread(target=_flush_all, name="scopestate-signal", daemon=True)
        thread.start()
    except RuntimeError:
        return  # the interpreter exits, and its hook saves
    # Bounded: this thread may be in the middle of the very turn that the save waits for.
    join(thread, SAVE_FIRST_S)


def _flush_all() -> None:
    for engine in _engines():
        try:
            snapshot = engine._parts.snapshot
            snapshot.set_interval(PROMPT_S)
            # Refused: `engine.flush()`. It ends at once while another thread closes the engine, which may not have
            # saved yet: an engine that was dropped a moment ago, for one.
            snapshot.ask(Flush()).get()
        except Exception as error:  # noqa: BLE001 - saving goes on, and says at ERROR what is wrong
            log.debug("saving at a signal: %s", error)


def _end_by(number: int) -> None:
    _real_signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


_termination = _Termination()


def _on_main_thread(work: Callable[[], object]) -> None:
    """Have `work()` called on the main thread: Python sets signal handlers nowhere else.

    By the C API's own way of doing that. The main thread comes to it at its next instruction; if it sleeps on a lock,
    as in `thread.join()`, a signal without effect wakes it.
    """
    import ctypes  # noqa: PLC0415 - adapters that keep something have it loaded
    import faulthandler  # noqa: PLC0415 - needed here only

    def call(_: object) -> int:
        try:
            work()
        except Exception:
            log.exception("setting signal handlers failed")
        return 0

    pending = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(call)
    _on_main.append(pending)  # for as long as the interpreter may call it
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
    # The only handler that Python installs from any thread. It writes where nothing is read, and is gone right after.
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        faulthandler.register(number, nowhere, all_threads=False)
        signal.siginterrupt(number, True)
        try:
            signal.pthread_kill(main, number)
            time.sleep(0.001)
        finally:
            faulthandler.unregister(number)


# -------------------------------------------------------------------------------------------------------------- fork


def _after_fork() -> None:
    global _exclusive, _leaving, _termination, _ended_by, _ahead_of, _noted  # noqa: PLW0603 - the child has its own
    _exclusive = Guard()  # another thread may have held it at the fork
    _leaving, _ended_by, _ahead_of = False, None, frozenset()
    _finalized.clear()
    if _noted is not None:
        # Else the signals of this child would be noted in its parent's pipe.
        before = signal.set_wakeup_fd(-1)
        if before != _noted[1]:
            signal.set_wakeup_fd(before)  # another library's
        for end in _noted:
            os.close(end)
        _noted = None
    signal.signal = _real_signal
    for number in _ENDS:
        # The child ends as it would have: it has no engine to close, and its parent may have been closing one.
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
