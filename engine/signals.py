"""Code that stays correct when a signal handler interrupts the main thread.

A signal handler runs on the main thread, between two instructions, and may raise (as Ctrl-C does). Three rules:

1. **No bare `with lock` in code that the main thread may run.** Up to CPython 3.13 an exception could not arrive
   between taking a lock and entering the block. From 3.14 on it can, and the lock then stays taken
   (python/cpython#148874). `Guard` records its holder in one step, so it can be released after any exception.
2. **No wait without a limit.** A signal between the interpreter's last check and the sleep on a lock is noticed only
   when the sleep ends. `wait_for` sleeps in slices; a program that waits for signals uses `SignalPipe`.
3. **What must be done as a whole is one run of assignments** (docs/design/0004-interruption.md), or is repeated until
   it has succeeded: `certainly`.

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
"""The longest sleep of a wait: a signal just before it is handled after this time."""

_HOLDER: Final = "holder"
_FIRST_PAUSE_S: Final = 0.00005
_LONGEST_PAUSE_S: Final = 0.002


class Guard:
    """A lock for short sections. Reentrant; an exception cannot leave it taken.

    One C call (`dict.setdefault`) records the holder, with a ticket for each entry: after any exception `run` knows
    whether this entry holds it. Other threads poll, as a guarded section takes microseconds.
    Refused: `RLock` with `try: acquire()`, which cannot tell its own hold from that of the code it has interrupted.
    """

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: dict[str, list[int]] = {}

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` while holding the guard, and return its result."""
        ticket, tickets = [get_ident()], self._tickets
        try:
            if tickets.setdefault(_HOLDER, ticket) is not ticket:
                if tickets.get(_HOLDER) == ticket:
                    return work(*args, **kwargs)  # held by an outer call on this thread
                self._queue(ticket, None)
            result = work(*args, **kwargs)
            del tickets[_HOLDER]
            return result
        except BaseException:
            certainly(lambda: self.give_back(ticket))
            raise

    @staticmethod
    def ticket() -> list[int]:
        """Return a new ticket of this thread."""
        return [get_ident()]

    def take(self, timeout_s: float, ticket: list[int] | None = None) -> list[int] | None:
        """Take the guard within `timeout_s` seconds. Returns the ticket for `give_back`; None if it was not free.

        If a signal handler raises meanwhile, the guard may have been taken: a caller that continues after that passes
        its own ticket.
        """
        if ticket is None:
            ticket = self.ticket()
        return ticket if self._queue(ticket, time.monotonic() + timeout_s) else None

    def give_back(self, ticket: list[int]) -> None:
        """Release the guard if `ticket` holds it. Idempotent."""
        if self._tickets.get(_HOLDER) is ticket:
            del self._tickets[_HOLDER]

    def is_mine(self) -> bool:
        """Tell whether this thread holds the guard."""
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
    """Decorate a method to run while holding the object's guard, `_exclusive`."""

    @functools.wraps(method)
    def guarded(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._exclusive.run(method, self, *args, **kwargs)

    return guarded


def certainly(action: Callable[[], object]) -> None:
    """Call `action` until it is not interrupted. The first interruption is already being raised to the caller.

    `action` must be harmless to repeat. There is a limit, so that an action that always fails does not hang the thread.
    """
    for _ in range(1000):
        try:
            action()
        except BaseException:  # noqa: BLE001, S112 - a second Ctrl-C adds nothing to the first
            continue
        return


def wait_for(wait: Callable[[float], bool | None], timeout_s: float | None = None) -> bool:
    """Call `wait(seconds)` for a slice of the time, repeatedly, until it returns True or `timeout_s` has passed.

    `wait` is `lock.acquire` with a timeout, `event.wait`, or the like. Returns whether `wait` returned True.
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
    """Wait for the end of a thread. Returns False if it is still alive after `timeout_s`."""

    def ended(slice_s: float) -> bool:
        thread.join(slice_s)
        return not thread.is_alive()

    return wait_for(ended, timeout_s)


class SignalPipe:
    """Waits for signals on the main thread. It misses none, whenever they arrive.

    The interpreter's C code writes a byte for each signal (`signal.set_wakeup_fd`), before any Python handler runs.
    For a program that owns its main thread: a process has only one such descriptor.
    """

    def __init__(self) -> None:
        import socket  # noqa: PLC0415 - only `serve` needs it, and importing it takes milliseconds

        self._here, self._there = socket.socketpair()
        for end in (self._here, self._there):
            end.setblocking(False)
        self._before: int | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Let signals wake `wait` while the block runs. On the main thread."""
        before = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            self._here.close()
            self._there.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until a signal has arrived since the last call, or for `timeout_s` seconds."""
        import select  # noqa: PLC0415 - as above; loaded by now

        select.select([self._here], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            while self._here.recv(4096):
                pass
