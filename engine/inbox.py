"""A queue between threads whose timeouts work on every Python version."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed does not describe it
import queue
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

Empty = queue.Empty

LONGEST_WAIT_S: Final = 86_400.0
"""The longest wait of `get_within`: `SimpleQueue.get` raises OverflowError for very large limits."""

_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, getattr(signal, "SIGBUS", 0)})
_HELD_BACK: Final = frozenset(int(number) for number in signal.valid_signals() - _FAULTS)


class Inbox(Generic[T]):
    """A `queue.SimpleQueue` without `get(timeout=...)`, which may wait without end on CPython 3.11 and 3.12.

    That method computes the remaining time when it has taken the queue's lock and when a signal has arrived, and treats
    a negative result as "no limit". It takes the lock without waiting if the last item was taken without waiting: then
    a limit of a few microseconds is enough for the bug. `get_within` excludes both cases. ruff bans
    `queue.SimpleQueue` everywhere else.

    These honour their time limit on every version and are used directly: `lock.acquire`, which checks for a negative
    remainder; `Event.wait` and `Condition.wait`, which use it; `Thread.join`; `queue.Queue.get`, which checks too.

    `put` is one C call, from any thread: no signal can interrupt it, and it may interrupt any other method.
    """

    __slots__ = ("_items", "empty", "get", "get_nowait", "put", "qsize")

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()  # noqa: TID251 - wrapped here, once
        # The queue's own methods. Refused: methods in Python, which a signal could interrupt.
        self.put: Callable[[T], None] = self._items.put
        self.get: Callable[[], T] = self._items.get
        self.get_nowait: Callable[[], T] = self._items.get_nowait
        self.empty: Callable[[], bool] = self._items.empty
        self.qsize: Callable[[], int] = self._items.qsize

    def get_within(self, timeout_s: float | None) -> T:
        """Return the next item. Raises Empty after `timeout_s` seconds; None: no limit.

        For an inbox with one reader, which is not the main thread: signals are delayed until this returns.
        """
        items = self._items
        try:
            return items.get_nowait()  # takes the lock of an empty queue, so that `get` has to wait for it
        except Empty:
            if timeout_s is None:
                return items.get()
            if timeout_s <= 0:
                raise
        before = _hold_signals_back()
        try:
            return items.get(timeout=min(timeout_s, LONGEST_WAIT_S))
        finally:
            _let_signals_come(before)

    def get_or_idle(self, idle_s: float) -> T:
        """As `get_within`, for an inbox with many readers. It may wait longer than `idle_s`.

        That happens if another thread takes the item that has woken this one just when its time ends. So use the limit
        only to decide how long an idle thread is kept. Refused: a lock around it, which each item would have to take.
        """
        try:
            return self._items.get_nowait()
        except Empty:
            return self._items.get(timeout=idle_s)


# On Windows signals do not interrupt waits, and from CPython 3.13 on the remaining time is computed correctly.
if sys.version_info < (3, 13) and hasattr(_signal, "pthread_sigmask"):

    def _hold_signals_back() -> Any:
        # Not through `signal`, which makes an enum member of each number: 70 us instead of 3.
        return _signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)

    def _let_signals_come(before: Any) -> None:
        _signal.pthread_sigmask(signal.SIG_SETMASK, before)

else:

    def _hold_signals_back() -> Any:
        return None

    def _let_signals_come(before: Any) -> None:
        del before
