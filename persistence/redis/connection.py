"""One connection to a Redis server: redis-py makes it; then commands and replies use its socket directly."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import hiredis
from redis.connection import AbstractConnection
from redis.exceptions import RedisError

from scopestate.persistence.connections.connection import NOT_ALL, Broken

_CHUNK: Final = 1 << 16

PASSING: Final = frozenset({"LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "JOURNALFULL"})
"""Refusals of a server that will accept the command later, and has not begun it."""


class Refusal(Exception):
    """An error reply of the server: a value like any other until its owner decides what it means."""

    @property
    def text(self) -> str:
        """The text of the error reply."""
        return str(self.args[0])

    @property
    def word(self) -> str:
        """The first word, which names the kind: `WRONGTYPE`, `MOVED`, ..."""
        return self.text.split(" ", 1)[0]


pack_text: Final[Callable[[tuple[Any, ...]], bytes]] = hiredis.pack_command
"""As `pack`, for parts that contain no number: used for every call, where checking each part would cost time."""


def pack(parts: tuple[Any, ...]) -> bytes:
    """Return a command as the bytes to send. Parts are str, bytes or int."""
    if int in map(type, parts):
        # hiredis (3.5) turns numbers into text in a way that looks for signals, and does not expect a handler that
        # raises: Ctrl-C at that moment would be a segmentation fault.
        parts = tuple([str(part) if type(part) is int else part for part in parts])
    packed: bytes = hiredis.pack_command(parts)
    return packed


class Connection:
    """A connection that is ready for commands. One thread at a time uses it; `close` may come from any."""

    def __init__(self, dialled: AbstractConnection, address: str, timeout_s: float) -> None:
        """`timeout_s`: longest wait for the server, at each step of sending and receiving."""
        self.address = address
        self.timeout_s = timeout_s
        self._dialled = dialled  # keeps the socket open
        sock: Any = dialled._get_socket()
        self._sock = sock
        sock.settimeout(timeout_s)
        # Tells at once whether there is something to receive: called before every write that is sent alone.
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        self._poll = poll.poll
        room = select.poll()
        room.register(sock, select.POLLOUT)
        self._poll_room = room.poll
        self._decrypted: Callable[[], int] | None = sock.pending if isinstance(sock, ssl.SSLSocket) else None
        self._send = sock.sendall
        self._receive = sock.recv
        self._reader = hiredis.Reader(protocolError=Broken, replyError=Refusal, notEnoughData=NOT_ALL)
        self._has_data = self._reader.has_data
        self.next_reply: Callable[[], Any] = self._reader.gets
        """Returns the next complete reply, else NOT_ALL. Values are bytes, int, None, list, Refusal."""

    def send(self, data: bytes) -> None:
        """Send commands. Raises Broken; then some of them may have arrived."""
        try:
            self._send(data)
        except OSError as error:
            raise self._broken(error) from error

    def send_now(self, data: bytes) -> int:
        """Send what can be sent without waiting, and return how many bytes that is. Raises Broken. Not with TLS."""
        try:
            return self._sock.send(data) if self._poll_room(0) else 0
        except OSError as error:
            raise self._broken(error) from error

    def plain_fd(self) -> int | None:
        """Return the file descriptor that an event loop can wait for; None with TLS, which has a buffer of its own."""
        return None if self._decrypted is not None else self._sock.fileno()

    def receive(self) -> None:
        """Wait for bytes and receive them; then call `next_reply`. Raises Broken."""
        try:
            data = self._receive(_CHUNK)
        except OSError as error:
            raise self._broken(error) from error
        if not data:
            self.close()
            raise Broken("the server closed the connection")
        self._reader.feed(data)

    def exchange(self, command: bytes) -> Any:
        """Send one command and wait for its reply, which may be a Refusal. Raises Broken."""
        # As `send` and `receive`, written inline: a single caller uses this, for which each further call costs time.
        try:
            self._send(command)
            next_reply, feed, receive = self.next_reply, self._reader.feed, self._receive
            while True:
                data = receive(_CHUNK)
                if not data:
                    self.close()
                    raise Broken("the server closed the connection")
                feed(data)
                reply = next_reply()
                if reply is not NOT_ALL:
                    return reply
        except OSError as error:
            raise self._broken(error) from error

    def call(self, *parts: Any) -> Any:
        """Send a command and return its reply. Raises Refusal and Broken."""
        reply = self.exchange(pack(parts))
        if isinstance(reply, Refusal):
            raise reply
        return reply

    def wait_at_most(self, timeout_s: float) -> None:
        """Change the longest wait from now on, as a blocking command needs."""
        self.timeout_s = timeout_s
        self._sock.settimeout(timeout_s)

    def readable(self) -> bool:
        """True if `receive` would not wait."""
        return bool(self._poll(0)) or (self._decrypted is not None and self._decrypted() > 0)

    def is_stale(self) -> bool:
        """True if the server has closed it, or sent an unexpected answer. Call it while no answer is awaited."""
        # As `readable`, written inline: it is called before each write that is sent alone.
        decrypted = self._decrypted
        return bool(self._poll(0)) or self._has_data() or (decrypted is not None and decrypted() > 0)

    def close(self) -> None:
        """Close it. Idempotent; a thread that waits in it gets Broken."""
        try:
            self._dialled.disconnect()  # type: ignore[no-untyped-call]
        except (OSError, RedisError):
            self._sock.close()

    def shut(self) -> None:
        """Make a thread that waits in it, now or later, get Broken; that thread then closes the connection."""
        with suppress(OSError):  # it is already gone
            self._sock.shutdown(socket.SHUT_RDWR)

    def _broken(self, error: OSError) -> Broken:
        self.close()
        if isinstance(error, TimeoutError):
            return Broken(f"no answer within {self.timeout_s:g} s")
        return Broken(str(error) or type(error).__name__)
