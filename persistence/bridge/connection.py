"""One WebSocket connection for calls: whole messages in and out, driven by one thread, without an event loop.

Frames are read and written here: a text message is a header and its JSON. The handshake is in `dialling.py`.
"""

from __future__ import annotations

import functools
import os
import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.connections.pump import PATIENCE_S
from scopestate.wire.options import GOING, GOODBYE

try:
    from websockets.speedups import apply_mask
except ImportError:  # pragma: no cover - where the library has no C part
    from websockets.utils import apply_mask

_CHUNK: Final = 1 << 16
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_WHOLE_TEXT: Final = 0x80 | _TEXT
_PIECE: Final = 100
"""Bytes that are counted for each fragment of a message in addition to its payload: empty ones must not be free."""
_PART: Final = 1 << 20
_AGAIN: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_NO_MASK: Final = b"\0\0\0\0"
_MASKS: Final = 1024
"""Masks that are drawn at once: asking the system for each takes longer than masking."""
_AT_ONCE: Final = getattr(socket, "MSG_DONTWAIT", 0)
_BY_SYSTEM: Final = bool(_AT_ONCE) and sys.platform in {"linux", "darwin"} and struct.calcsize("l") == 8
"""True where the system ends a wait for a socket itself: that saves a system call for each answer."""


class Ended(Broken):
    """The other side has closed the connection with a close frame."""

    def __init__(self, text: str, *, goodbye: bool) -> None:
        super().__init__(text)
        self.goodbye = goodbye
        """True if it has answered every call that it has begun."""


class BridgeConnection:
    """A connection that is ready for calls. One thread at a time uses it; `wait`, `shut` and `close` from any.

    What the other side may do wrong (bad frames, messages that are too large) ends this connection and nothing else.
    """

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        *,
        timeout_s: float,
        max_bytes: int,
        most_sent: int,
        received: bytes = b"",
        masked: bool = True,
    ) -> None:
        """`timeout_s`: longest wait for the other side to read what is sent. `max_bytes`: largest message that may
        come; `most_sent`: largest that the other side takes. `received`: bytes that came after the handshake. `masked`:
        False if nothing between the two sides could mistake a message for something else: then the mask is zero, which
        is valid and costs nothing.
        """
        self.address = address
        self.most_sent = most_sent
        self._sock = sock
        self._max_bytes = max_bytes
        self._masked = masked
        self._masks = b""
        self._decrypted: Callable[[], int] | None = sock.pending if isinstance(sock, ssl.SSLSocket) else None
        self._waits_itself = _BY_SYSTEM and self._decrypted is None
        """True if `recv` itself waits for a moment; else it never waits."""
        sock.settimeout(None if self._waits_itself else 0.0)
        if self._waits_itself:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(PATIENCE_S))
        self._timeout_s = timeout_s
        self._readable = _poll(sock)
        self._send: Callable[[bytes], int] = (
            functools.partial(_send_at_once, sock.send) if self._waits_itself else sock.send
        )
        self._receive = sock.recv
        self._buffer = bytearray()
        """The beginning of a frame."""
        self._needed = 0
        """Bytes that `_buffer` must hold before it is parsed again."""
        self._messages: deque[bytes] = deque()
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._fragmented = False
        self._owed = b""
        """Control frames to send: before the next message, or when there is room."""
        self._midway = False
        """True while the rest of a message is still to be sent."""
        self._ending: Broken | None = None
        """Why no more can come; raised once the messages before it were taken."""
        self._closed = False
        if received:
            self._feed(received)

    # --------------------------------------------------------------------------------------------------------- sending

    def frame(self, message: bytes) -> bytes:
        """Return a text message as the bytes to send."""
        size = len(message)
        if size < 126:
            header = bytes((_WHOLE_TEXT, 0x80 | size))
        elif size < 65536:
            header = struct.pack("!BBH", _WHOLE_TEXT, 0x80 | 126, size)
        else:
            header = struct.pack("!BBQ", _WHOLE_TEXT, 0x80 | 127, size)
        if not self._masked:
            return b"".join((header, _NO_MASK, message))
        masks = self._masks or os.urandom(4 * _MASKS)
        mask, self._masks = masks[:4], masks[4:]
        return b"".join((header, mask, apply_mask(message, mask)))

    def send(self, data: bytes) -> None:
        """Send frames. Raises Broken; then some of them may have arrived."""
        if self._owed:
            data = data + self._owed if self._midway else self._owed + data
            self._owed = b""
        sent = self._try_to_send(data)
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])
        self._midway = False

    def _send_rest(self, rest: memoryview) -> None:
        """Send as the other side reads, and receive at the same time: it may have to send before it reads more."""
        until = time.monotonic() + self._timeout_s
        while rest:
            self._midway = True
            left = until - time.monotonic()
            if left <= 0:
                self.close()
                raise Broken("the other engine does not read what is sent")
            if _is_there(self._sock, left):
                self.receive()
            if sent := self._try_to_send(bytes(rest[:_PART])):
                rest = rest[sent:]
                until = time.monotonic() + self._timeout_s

    def send_now(self, data: bytes) -> int:
        """Send what can be sent without waiting, and return how many bytes that is. Raises Broken. Not with TLS."""
        self._pay()
        if self._owed and not self._midway:
            return 0
        sent = self._try_to_send(data)
        self._midway = sent < len(data) and (sent > 0 or self._midway)
        return sent

    def owe(self, message: bytes) -> None:
        """Send a message once that needs no wait, and before any later message."""
        self._owe(self.frame(message))

    def _owe(self, frame: bytes) -> None:
        if self._closed:
            return
        self._owed += frame
        if len(self._owed) > _CHUNK:
            raise self._fail(1008, "it sends pings and reads no answers")
        self._pay()

    def _pay(self) -> None:
        if self._owed and not self._midway:
            sent = self._try_to_send(self._owed)
            self._owed = self._owed[sent:]

    def _try_to_send(self, data: bytes) -> int:
        try:
            return self._send(data)
        except _AGAIN:
            return 0
        except OSError as error:
            raise self._broken(error) from error

    # ------------------------------------------------------------------------------------------------------- receiving

    def exchange(self, data: bytes) -> Any:
        """Send frames and return the next message; NOT_ALL if none comes within a moment. Raises Broken."""
        self.send(data)
        return self.next_within_moment()

    def next_within_moment(self) -> Any:
        """Return the next message; NOT_ALL if none comes within a moment. Raises Broken."""
        messages = self._messages
        while not messages:
            if self._ending is not None:
                raise self._end()
            if not self._waits_itself and not self.wait(PATIENCE_S, None):
                return NOT_ALL
            try:
                data = self._receive(_CHUNK)
            except _AGAIN:
                return NOT_ALL
            except OSError as error:
                raise self._broken(error) from error
            if not data:
                self._ending = Broken("the other engine closed the connection")
            else:
                self._feed(data)
        return messages.popleft()

    def receive(self) -> None:
        """Receive what is there; then call `next_message`.

        Call it only if the connection is `readable`. Raises Broken.
        """
        try:
            data = self._receive(_CHUNK)
        except _AGAIN:
            return
        except OSError as error:
            raise self._broken(error) from error
        if data:
            self._feed(data)
        else:
            self._ending = self._ending or Broken("the other engine closed the connection")
        if self._ending is not None and not self._messages:
            raise self._end()

    def next_message(self) -> Any:
        """Return the next complete message, else NOT_ALL. Raises Broken after the last one."""
        if self._messages:
            return self._messages.popleft()
        if self._ending is not None:
            raise self._end()
        return NOT_ALL

    def readable(self) -> bool:
        """True if `receive` would not wait."""
        return bool(self._readable(0)) or (self._decrypted is not None and self._decrypted() > 0)

    def wait(self, timeout_s: float | None, fd: int | None) -> bool:
        """Wait until there is something to receive, `fd` can be read, or the time is over. Whether there is something.

        With `fd` any thread may wait, even while another one uses the connection. A connection that was shut has
        something to receive.
        """
        if self._closed or (self._decrypted is not None and self._decrypted() > 0):
            return True
        try:
            if fd is None:
                return bool(self._readable(-1 if timeout_s is None else max(0, round(timeout_s * 1000))))
            here = self._sock.fileno()
            return here < 0 or here in _wait(here, fd, timeout_s)
        except (OSError, ValueError):
            return True  # it was closed in the meantime

    def is_stale(self) -> bool:
        """True if the other side has closed it.

        Receives what is there, answers pings. Call it while nothing is sent.
        """
        if self._ending is None and not self._readable(0) and (self._decrypted is None or not self._decrypted()):
            return False
        try:
            while self._ending is None and self.readable():
                self.receive()
            self._pay()
        except Broken:
            return True
        return self._ending is not None

    def fileno(self) -> int:
        """Return the descriptor of the socket; -1 if it is closed."""
        return self._sock.fileno()

    def plain_fd(self) -> int | None:
        """Return the file descriptor that an event loop can wait for; None if data may wait that it does not show."""
        return self._sock.fileno() if self._waits_itself else None

    # ---------------------------------------------------------------------------------------------------------- frames

    def _feed(self, data: bytes) -> None:
        """Parse bytes: complete messages are appended to `_messages`."""
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < self._needed:
                return
            data = bytes(buffer)
            buffer.clear()
        size, at = len(data), 0
        while self._ending is None and size - at >= 2:
            first, length = data[at], data[at + 1]
            begin = at + 2
            if length >= 126:
                begin = at + (4 if length == 126 else 10)
                if length > 127:
                    self._note(self._fail(1002, "a frame of a server is masked"))
                    return
                if size < begin:
                    break
                length = int.from_bytes(data[at + 2 : begin])
            if length > self._max_bytes:
                self._note(self._fail(1009, f"a message of more than {self._max_bytes} bytes"))
                return
            end = begin + length
            if end > size:
                self._needed = end - at
                buffer += data[at:]
                return
            if first == _WHOLE_TEXT and not self._fragmented:
                self._messages.append(data[begin:end])
            else:
                self._take_rare(first, data[begin:end])
            at = end
        if at < size and self._ending is None:
            self._needed = size - at + 1
            buffer += data[at:]

    def _take_rare(self, first: int, payload: bytes) -> None:
        """Handle any frame that is not a whole text message."""
        kind, last = first & 0x0F, bool(first & 0x80)
        if first & 0x70:
            self._note(self._fail(1002, "a reserved bit is set, but no extension was agreed on"))
        elif kind >= _CLOSE and (len(payload) > 125 or not last):
            self._note(self._fail(1002, "a control frame that is too long, or in pieces"))
        elif kind == _CLOSE:
            self._take_close(payload)
        elif kind == _PING:
            try:
                self._owe(self._control(_PONG, payload))
            except Broken as error:
                self._note(error)
        elif kind == _PONG:
            pass
        elif kind in (_TEXT, _BINARY) and not self._fragmented:
            self._fragmented = True
            self._take_fragment(payload, last=last)
        elif kind == _CONTINUATION and self._fragmented:
            self._take_fragment(payload, last=last)
        else:
            self._note(self._fail(1002, f"an unexpected frame of kind {kind}"))

    def _take_fragment(self, payload: bytes, *, last: bool) -> None:
        self._fragment_bytes += len(payload) + (0 if last else _PIECE)
        if self._fragment_bytes > self._max_bytes:
            self._note(self._fail(1009, f"a message of more than {self._max_bytes} bytes"))
            return
        self._fragments.append(payload)
        if last:
            self._messages.append(b"".join(self._fragments))
            self._fragments.clear()
            self._fragmented, self._fragment_bytes = False, 0

    def _take_close(self, payload: bytes) -> None:
        code = int.from_bytes(payload[:2]) if len(payload) >= 2 else 1005
        reason = payload[2:].decode(errors="replace")
        with suppress(Broken):
            self._owe(self._control(_CLOSE, payload[:2]))
        self._note(
            Ended(
                f"the other engine closed the connection: {code}{' ' if reason else ''}{reason}",
                goodbye=(code, reason) == (GOING, GOODBYE),
            )
        )

    def _control(self, kind: int, payload: bytes) -> bytes:
        return bytes((0x80 | kind, 0x80 | len(payload))) + _NO_MASK + payload

    # --------------------------------------------------------------------------------------------------------- its end

    def close(self) -> None:
        """Close it. Idempotent; a thread that waits in it gets Broken."""
        self._closed = True
        self._sock.close()

    def shut(self) -> None:
        """Make a thread that waits in it, now or later, get Broken; that thread then closes the connection."""
        with suppress(OSError):  # it is gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    def _note(self, ending: Broken) -> None:
        if self._ending is None:
            self._ending = ending

    def _fail(self, code: int, why: str) -> Broken:
        """Close the connection, because the other side violates the protocol, and return the error."""
        with suppress(OSError):
            if not (self._midway or self._owed):
                self._send(self._control(_CLOSE, code.to_bytes(2)))
        return Broken(f"the other engine does not keep to the protocol: {why}")

    def _end(self) -> Broken:
        self.close()
        assert self._ending is not None
        return self._ending

    def _broken(self, error: OSError) -> Broken:
        """Close it, and return why. Messages that came before still count: they may say what was not begun."""
        if not self._closed:
            self._closed = True
            with suppress(OSError, ValueError):
                while self._ending is None and self.readable() and (data := self._receive(_CHUNK)):
                    self._feed(data)
        self.close()
        return self._ending or Broken(str(error) or type(error).__name__)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), max(1, round(seconds % 1 * 1e6)))


def _send_at_once(send: Callable[[bytes, int], int], data: bytes) -> int:
    return send(data, _AT_ONCE)


if hasattr(select, "poll"):

    def _poll(sock: socket.socket) -> Callable[[int], Any]:
        """Return a function that tells whether there is something to receive."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return poll.poll

    def _wait(here: int, fd: int, timeout_s: float | None) -> list[int]:
        """Wait for one of two descriptors, and return those that can be read."""
        poll = select.poll()
        poll.register(here, select.POLLIN)
        poll.register(fd, select.POLLIN)
        return [found for found, _ in poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)]

    def _is_there(sock: socket.socket, timeout_s: float) -> bool:
        """Wait until there is something to receive, or room to send. Return whether there is something to receive."""
        poll = select.poll()
        poll.register(sock, select.POLLIN | select.POLLOUT)
        return any(event & ~select.POLLOUT for _, event in poll.poll(timeout_s * 1000))

else:  # pragma: no cover - Windows

    def _poll(sock: socket.socket) -> Callable[[int], Any]:
        return lambda timeout_ms: select.select([sock], [], [], None if timeout_ms < 0 else timeout_ms / 1000)[0]

    def _wait(here: int, fd: int, timeout_s: float | None) -> list[int]:
        return select.select([here, fd], [], [], timeout_s)[0]

    def _is_there(sock: socket.socket, timeout_s: float) -> bool:
        return bool(select.select([sock], [sock], [], timeout_s)[0])
