"""The queue between threads whose wait with a time limit ends."""

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
"""`get_within` waits no longer: `SimpleQueue.get` raises OverflowError for a limit that the system cannot count."""

_FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, getattr(signal, "SIGBUS", 0)})
_HELD_BACK: Final = frozenset(int(number) for number in signal.valid_signals() - _FAULTS)


class Inbox(Generic[T]):
    """A `queue.SimpleQueue` without `get(timeout=...)`, which may wait for ever on CPython 3.11 and 3.12.

    That method computes the time left whenever it has taken the queue's lock or a signal has arrived, and treats a
    negative result as "no limit". It takes the lock without waiting if the last item was taken without waiting, so a
    limit of a few microseconds is enough. `get_within` rules out both. ruff bans `queue.SimpleQueue` everywhere else.

    These honour their time limit on every version, and are used directly: `lock.acquire`, which checks for a negative
    rest; `Event.wait` and `Condition.wait`, which rest on it; `Thread.join`; `queue.Queue.get`, which checks as well.

    `put` is one call into C, from any thread: no signal can cut it in two, and it may interrupt any other method.
    """

    __slots__ = ("_items", "empty", "get", "get_nowait", "put", "qsize")

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()  # noqa: TID251 - wrapped here, once
        # The queue's own methods. Refused: methods of ours, which a signal could cut in two.
        self.put: Callable[[T], None] = self._items.put
        self.get: Callable[[], T] = self._items.get
        self.get_nowait: Callable[[], T] = self._items.get_nowait
        self.empty: Callable[[], bool] = self._items.empty
        self.qsize: Callable[[], int] = self._items.qsize

    def get_within(self, timeout_s: float | None) -> T:
        """Return the next item; raises Empty after `timeout_s` seconds. None: no limit.

        For an inbox that one thread takes from, which is not the main thread: signals wait until this returns.
        """
        items = self._items
        try:
            return items.get_nowait()  # on an empty queue this takes the lock, so that `get` cannot without waiting
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
        """As `get_within`, for an inbox that many threads take from. It may wait longer than `idle_s`, for an item.

        That happens if another thread takes the item that has woken this one just as its time ends. So only how long
        an idle thread is kept may depend on the limit. Refused: a lock around it, to be taken for each item.
        """
        try:
            return self._items.get_nowait()
        except Empty:
            return self._items.get(timeout=idle_s)


# Windows interrupts no wait for a signal, and from CPython 3.13 on the time left is computed correctly.
if sys.version_info < (3, 13) and hasattr(_signal, "pthread_sigmask"):

    def _hold_signals_back() -> Any:
        # Not through `signal`, which makes an enum of each number: 70 us instead of 3.
        return _signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)

    def _let_signals_come(before: Any) -> None:
        _signal.pthread_sigmask(signal.SIG_SETMASK, before)

else:

    def _hold_signals_back() -> Any:
        return None

    def _let_signals_come(before: Any) -> None:
        del before
