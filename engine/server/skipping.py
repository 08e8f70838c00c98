"""Connections whose messages are dropped as they arrive, so that almost nothing is kept in memory.

picows gathers a whole frame before it passes it on, up to the largest message that a worker may send. For
telemetry, and for a connection without a valid token, that would waste memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import picows

from scopestate.server.connections import NORMAL, POLICY, PROTOCOL_ERROR, Batches, Connection

if TYPE_CHECKING:
    from scopestate.server.access import Access

CHUNK: Final = 16 * 1024
"""Bytes read from one connection in a row."""
UNSENT: Final = 64 * 1024
"""If more bytes than this (answers to pings) are unsent, nothing is read."""
MAX_REFUSED_BYTES: Final = 256 * 1024
"""Bytes that a connection without a valid token may send before it is aborted."""

_CLOSE: Final = 0x8
_PING: Final = 0x9
_FIRST_CONTROL: Final = 0x8


class BadFrame(Exception):
    """Not a frame that a client may send (RFC 6455, section 5)."""


class FrameSkipper:
    """Reads the frames of a client and keeps only the short ones that control the connection."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._opcode = 0
        self._mask = b""
        self._left = 0
        """Bytes of the payload that have not come yet."""
        self._payload = bytearray()

    def feed(self, data: memoryview) -> list[tuple[int, bytes]]:
        """Take received bytes; return opcode and payload of each complete control frame. Raises BadFrame."""
        control: list[tuple[int, bytes]] = []
        at, end, head = 0, len(data), self._head
        while at < end:
            if self._left:
                part = min(self._left, end - at)
                if self._opcode >= _FIRST_CONTROL:
                    self._payload += data[at : at + part]
                self._left -= part
                at += part
            else:
                size = _head_size(head)
                part = min(size - len(head), end - at)
                head += data[at : at + part]
                at += part
                if size == 2 and len(head) == 2:
                    _check(head)
                if len(head) < _head_size(head):
                    continue
                self._begin(head)
                head.clear()
            if not self._left and self._opcode >= _FIRST_CONTROL:
                masked = bytes(self._payload)
                control.append((self._opcode, bytes(byte ^ self._mask[i & 3] for i, byte in enumerate(masked))))
                self._payload.clear()
                self._opcode = 0
        return control

    def _begin(self, head: bytearray) -> None:
        """Handle a complete frame header."""
        opcode, length = head[0] & 0x0F, head[1] & 0x7F
        if length >= 126:
            length = int.from_bytes(head[2:-4])
        self._opcode, self._mask, self._left = opcode, bytes(head[-4:]), length


def _check(head: bytearray) -> None:
    """Raise BadFrame if the first two bytes begin a frame that no client may send."""
    opcode, length = head[0] & 0x0F, head[1] & 0x7F
    if head[0] & 0x70 or not head[1] & 0x80 or 0x2 < opcode < _FIRST_CONTROL or opcode > 0xA:
        raise BadFrame("a reserved bit or opcode is set, or the frame is not masked")
    if opcode >= _FIRST_CONTROL and (length > 125 or not head[0] & 0x80):
        raise BadFrame("a control frame is too long, or in pieces")


def _head_size(head: bytearray) -> int:
    """Return the length of a frame header, as far as it follows from the bytes received."""
    if len(head) < 2:
        return 2
    length = head[1] & 0x7F
    return 6 + (8 if length == 127 else 2 if length == 126 else 0)


class SkippingProtocol(asyncio.BufferedProtocol):
    """Reads from an open connection instead of picows, which does everything else."""

    _buffer = memoryview(bytearray(CHUNK))
    """One buffer for all connections: its content is used at once, on the thread of the event loop."""

    def __init__(self, connection: SkippingConnection, behind: Any) -> None:
        self._connection = connection
        self._behind = behind
        self._skipper = FrameSkipper()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._connection.count(nbytes)
        try:
            for opcode, payload in self._skipper.feed(self._buffer[:nbytes]):
                self._connection.control(opcode, payload)
        except BadFrame as error:
            self._connection.close(PROTOCOL_ERROR, str(error))
            self._connection.abort()

    def eof_received(self) -> bool | None:
        return self._behind.eof_received()  # type: ignore[no-any-return]  # picows' protocol has no types

    def connection_lost(self, exc: Exception | None) -> None:
        self._behind.connection_lost(exc)

    def pause_writing(self) -> None:
        self._behind.pause_writing()

    def resume_writing(self) -> None:
        self._behind.resume_writing()


class SkippingConnection(Connection):
    """A connection that answers pings and the close handshake, and nothing else."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches, 0, UNSENT)

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        super().on_ws_connected(transport)
        self._socket.set_write_buffer_limits(high=UNSENT)
        self._socket.set_protocol(SkippingProtocol(self, self._socket.get_protocol()))

    def count(self, size: int) -> None:
        """Count received bytes."""

    def control(self, opcode: int, payload: bytes) -> None:
        """Handle a control frame."""
        transport = self._transport
        if transport is None:
            return
        if opcode == _PING and not self._closing:
            transport.send_pong(payload)
        elif opcode == _CLOSE:
            if not self._closing:
                self._closing = True
                transport.send_close(int.from_bytes(payload[:2]) or NORMAL)  # type: ignore[arg-type]  # as in Connection
            transport.disconnect()


class Telemetry(SkippingConnection):
    """The telemetry sink: everything is dropped, nothing is answered (docs/reference/protocol.md, section 11)."""

    def __init__(self, access: Access | None, batches: Batches) -> None:
        super().__init__(batches)
        self.access = access

    def __str__(self) -> str:
        return "a telemetry connection"


class Refusing(SkippingConnection):
    """A connection without a valid token. It gets an error and is closed (docs/reference/protocol.md, section 2.2)."""

    def __init__(self, message: bytes, batches: Batches) -> None:
        super().__init__(batches)
        self._message = message
        self._came = 0

    def on_open(self) -> None:
        self.send(self._message)
        self.close(POLICY, "authentication failed")

    def count(self, size: int) -> None:
        self._came += size
        if self._came > MAX_REFUSED_BYTES:
            self.abort()

    def __str__(self) -> str:
        return "a connection without a valid token"
