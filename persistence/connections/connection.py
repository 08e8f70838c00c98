"""What a connection must be able to do so that a connection owner can drive it."""

from __future__ import annotations

from typing import Final, Protocol, TypeVar

NOT_ALL: Final = object()
"""Returned instead of an answer that is not complete yet."""


class Broken(Exception):
    """The connection failed: no answer in time, a reset, or a violation of the protocol. It is closed already."""


class Connection(Protocol):
    """A connection over which calls can be sent. One thread at a time uses it; `close` and `shut` may come from any."""

    @property
    def address(self) -> str:
        """For messages: where it leads; never a password."""

    def send(self, data: bytes, /) -> None:
        """Send all of it. Raises Broken; then some of it may have arrived."""

    def send_now(self, data: bytes, /) -> int:
        """Send what can be sent without waiting, and return how many bytes that is. Raises Broken."""

    def receive(self) -> None:
        """Wait for bytes and take them in. Raises Broken."""

    def readable(self) -> bool:
        """True if `receive` would not wait."""

    def is_stale(self) -> bool:
        """True if the other side has closed it, so that nothing can be sent.

        Call it only while no call is in progress.
        """

    def plain_fd(self) -> int | None:
        """Return the file descriptor that an event loop can wait for; None with TLS, which has a buffer of its own."""

    def shut(self) -> None:
        """Make a thread that waits in it, now or later, get Broken; that thread then closes the connection."""

    def close(self) -> None:
        """Close it. Idempotent."""


class PatientConnection(Connection, Protocol):
    """A connection to a program whose answers may take long: see `ConnectionOwner.prompt`."""

    def wait(self, timeout_s: float | None, fd: int | None, /) -> bool:
        """Wait until there is something to receive, the descriptor `fd` can be read, or the time is over; None: never.

        Returns whether `receive` would not wait. Receives nothing itself, so any thread may call it, even while another
        thread uses the connection. A connection that is shut or closed counts as one with something to receive.
        """


T_Connection = TypeVar("T_Connection", bound=Connection)
T_Connection_co = TypeVar("T_Connection_co", bound=Connection, covariant=True)


class Target(Protocol[T_Connection_co]):
    """A server that can be dialled. Methods may be called from any thread."""

    @property
    def address(self) -> str:
        """For messages; never a password."""

    def dial(self) -> T_Connection_co:
        """Make a connection that is ready for calls. Raises NotConnected, which says why, within its time limit."""
