"""What a signal may do to the main thread, and the patterns that hold.

A signal handler runs on the main thread, between two instructions, and may raise (as Ctrl-C does). Three rules:

1. **No bare `with lock` where the main thread may come.** Up to CPython 3.13 an exception could not arrive between
   taking a lock and entering the block; from 3.14 on it can, and the lock is then taken for ever
   (python/cpython#148874). `Guard` notes in one step who has it, so that whatever happens it can be given back.
2. **No wait without limit.** A signal that arrives between the interpreter's last look and the sleep of a lock is
   noticed only when the sleep ends. `wait_for` sleeps in slices; a program that waits for signals uses `SignalPipe`.
3. **What must not be cut in two is one stretch of assignments** (docs/design/0004-interruption.md), or is done again
   until it has gone through: `certainly`.

tests/reliability/test_signals.py guards the first two, tests/reliability/test_interruption.py the third.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Concatenate, Final, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SLICE_S: Final = 0.5
"""The longest sleep of a wait: a signal that came just before it is handled as late as this."""

_HOLDER: Final = "holder"
_FIRST_PAUSE_S: Final = 0.00005
_LONGEST_PAUSE_S: Final = 0.002


class Guard:
    """Mutual exclusion for short pieces of work, reentrant for a thread; no exception can leave it taken.

    The holder is noted in one C call (`dict.setdefault`), with a ticket of its own for each entry: after any exception
    `run` knows whether this entry holds it. Others wait by sleeping a little: what is guarded takes microseconds.
    Refused: `RLock` with `try: acquire()`, which cannot tell its own hold from that of the code it has interrupted.
    """

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: dict[str, list[int]] = {}

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` while no other thread is in here, and return what it returns."""
        ticket, tickets = [get_ident()], self._tickets
        try:
            if tickets.setdefault(_HOLDER, ticket) is not ticket:
                if tickets.get(_HOLDER) == ticket:
                    return work(*args, **kwargs)  # this thread has it already, further out
                self._queue(ticket, None)
            result = work(*args, **kwargs)
            del tickets[_HOLDER]
            return result
        except BaseException:
            certainly(lambda: self.give_back(ticket))
            raise

    def take(self, timeout_s: float) -> list[int] | None:
        """Take it, waiting for at most `timeout_s` seconds. Returns what `give_back` needs, None if it was not free."""
        ticket = [get_ident()]
        return ticket if self._queue(ticket, time.monotonic() + timeout_s) else None

    def give_back(self, ticket: list[int]) -> None:
        """End the hold of `ticket`, if it has one. Idempotent."""
        if self._tickets.get(_HOLDER) is ticket:
            del self._tickets[_HOLDER]

    def is_mine(self) -> bool:
        """True if this thread is in here."""
        return self._tickets.get(_HOLDER) == [get_ident()]

    def _queue(self, ticket: list[int], deadline: float | None) -> bool:
        pause_s = _FIRST_PAUSE_S
        while self._tickets.setdefault(_HOLDER, ticket) is not ticket:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return True


class _Guarded(Protocol):
    _exclusive: Guard


Self_ = TypeVar("Self_", bound=_Guarded)


def exclusive(method: Callable[Concatenate[Self_, P], T]) -> Callable[Concatenate[Self_, P], T]:
    """Let one thread at a time into the methods so decorated of an object, by its `Guard`, `_exclusive`."""

    @functools.wraps(method)
    def guarded(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._exclusive.run(method, self, *args, **kwargs)

    return guarded


def certainly(action: Callable[[], object]) -> None:
    """Do `action`, again if it is cut short: the first interruption is already on its way to the caller.

    `action` must be harmless to repeat. Bounded, so that an action that always fails does not hang the thread.
    """
    for _ in range(1000):
        try:
            action()
        except BaseException:  # noqa: BLE001, S112 - a second Ctrl-C adds nothing to the first
            continue
        return


def wait_for(wait: Callable[[float], bool | None], timeout_s: float | None = None) -> bool:
    """Call `wait(seconds)`, for a slice of the time each, until it returns True or `timeout_s` is over.

    `wait` is `lock.acquire` by its timeout, `event.wait`, or the like. Returns whether it came true.
    """
    if timeout_s is not None and timeout_s <= SLICE_S:
        return bool(wait(max(timeout_s, 0.0)))
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = SLICE_S if deadline is None else min(SLICE_S, deadline - time.monotonic())
        if wait(max(left_s, 0.0)):
            return True
        if left_s < SLICE_S:
            return False


def join(thread: threading.Thread, timeout_s: float | None = None) -> bool:
    """Wait for the end of a thread; False if it lives on after `timeout_s`."""

    def ended(slice_s: float) -> bool:
        thread.join(slice_s)
        return not thread.is_alive()

    return wait_for(ended, timeout_s)


class SignalPipe:
    """How the main thread waits for signals: none is lost, however it falls in with the beginning of the wait.

    The interpreter's own C code writes a byte at each signal (`signal.set_wakeup_fd`), before Python code knows of
    it. For a program that owns its main thread: there is one such descriptor for each process.
    """

    def __init__(self) -> None:
        import socket  # noqa: PLC0415 - only `serve` waits so, and it costs every import of scopestate milliseconds

        self._here, self._there = socket.socketpair()
        for end in (self._here, self._there):
            end.setblocking(False)
        self._before: int | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Be woken by signals while the block runs. On the main thread."""
        before = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            self._here.close()
            self._there.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until a signal has come since the last call, or for `timeout_s` seconds."""
        import select  # noqa: PLC0415 - as above; loaded by now

        select.select([self._here], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            while self._here.recv(4096):
                pass
