"""An event loop that drives a connection itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.connections.connection import Connection


_LATE_S: Final = 1.0
"""When a check is this late, another one is arranged."""


class Watch:
    """An event loop that waits for the replies of a connection itself. On the loop's thread, except `end`.

    It has a file descriptor of its own for the connection's socket, so that any thread may close the connection while
    the loop still knows it: the system may assign the number of a closed descriptor to another socket at once.
    """

    _fd = -1  # until it has one

    def __init__(
        self, loop: AbstractEventLoop, connection: Connection, fd: int, drive: Callable[[Watch], None]
    ) -> None:
        """`drive(watch)` is called when there is something to receive."""
        self.loop = loop
        self.connection = connection
        self.thread = get_ident()
        """The loop's thread, for the claim."""
        self.active = False
        """True while the loop waits for the connection."""
        self._drive = drive
        self._fd = os.dup(fd)
        self._is_soon = False
        self._checks = False
        self._due = 0.0
        """When the check is due, on the clock of the loop."""

    def start(self, timeout_s: float, check: Callable[[Watch], None]) -> None:
        """Make the loop wait for replies, and call `check(watch)` in `timeout_s` seconds."""
        if not self.active and self._fd >= 0:
            self.active = True  # first: on the main thread this may be interrupted, and `stop` follows
            self.loop.add_reader(self._fd, self._drive, self)
        # One that is overdue was interrupted, or the loop was busy: a second one does no harm.
        if not self._checks or self.loop.time() > self._due + _LATE_S:
            self.check_later(timeout_s, check)

    def stop(self) -> None:
        """Make the loop stop waiting."""
        if self.active:
            self.loop.remove_reader(self._fd)
            self.active = False

    def call_soon(self, drive: Callable[[Watch], None]) -> None:
        """Call `drive(watch)` in the next round of the loop."""
        if not self._is_soon:
            self._is_soon = True
            self.loop.call_soon(self._now, drive)

    def check_later(self, timeout_s: float, check: Callable[[Watch], None]) -> None:
        """Call `check(watch)` in `timeout_s` seconds: one timer, not one for each command."""
        # In this order: on the main thread this may be interrupted, and a second timer does no harm.
        self.loop.call_later(timeout_s, self._check, check)
        self._due = self.loop.time() + timeout_s
        self._checks = True

    def end(self) -> None:
        """Release the connection. From any thread; idempotent."""
        if get_ident() == self.thread:
            self._close()
            return
        try:
            self.loop.call_soon_threadsafe(self._close)
        except RuntimeError:
            self._close()  # the loop was closed, and has no descriptors any more

    def __del__(self) -> None:
        """Close the descriptor if the loop has ended before it could."""
        if self._fd >= 0:
            os.close(self._fd)

    def _now(self, drive: Callable[[Watch], None]) -> None:
        self._is_soon = False
        drive(self)

    def _check(self, check: Callable[[Watch], None]) -> None:
        self._checks = False
        check(self)

    def _close(self) -> None:
        if self._fd >= 0:
            if not self.loop.is_closed():
                self.stop()
            fd, self._fd = self._fd, -1
            os.close(fd)
