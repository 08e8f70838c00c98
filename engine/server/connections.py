"""WebSocket connections on picows: whole messages in, messages out, within bounds (docs/design/0020-websockets.md).

picows parses frames. Everything beyond one frame is left to its listeners: fragments, UTF-8, close handshakes.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from typing import Any, Final

import picows

from scopestate.wire.bounded_log import BoundedLog

log = logging.getLogger("scopestate.server")

TEXT: Final = picows.WSMsgType.TEXT
BINARY: Final = picows.WSMsgType.BINARY
CONTINUATION: Final = picows.WSMsgType.CONTINUATION
PING: Final = picows.WSMsgType.PING
PONG: Final = picows.WSMsgType.PONG
CLOSE: Final = picows.WSMsgType.CLOSE

NORMAL: Final = 1000
GOING: Final = 1012
"""The close code of a stopping server: the Python SDK 0.11.6 never reconnects after 1000 or 1001
(docs/reference/protocol.md 9)."""
PROTOCOL_ERROR: Final = 1002
INVALID_TEXT: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009

CLOSE_GRACE_S: Final = 2.0
"""Seconds that the other side may take to answer a close frame before the connection is aborted."""
TURN: Final = 256
"""Messages of one connection that are handled in a row before other connections and other threads run."""
HIGH_WATER: Final = 1024 * 1024
"""If more bytes than this are unsent, nothing is read from that worker."""


GATHERED: Final = 256 * 1024
"""If more bytes than this are gathered, they are written: the limits on unsent bytes count only written bytes."""


class Batches:
    """Gathers outgoing messages while many are handled in a row, so that each connection is written to once."""

    __slots__ = ("_dirty", "begun", "log", "open")

    def __init__(self) -> None:
        self.open = False
        self.begun: dict[Connection, None] | None = None
        """During a fan-out, the connections that have been written to; None at other times."""
        self.log = BoundedLog(log)
        """For log lines that clients cause. One log for all connections of a server, because its limits are for all."""
        self._dirty: list[Connection] = []

    def add(self, connection: Connection) -> None:
        """Note that this connection has gathered something."""
        self._dirty.append(connection)

    def begin_fan_out(self) -> bool:
        """Gather the messages that follow, except the first one of each connection, which is written at once.

        Returns False, with nothing done, if messages are gathered already. Otherwise the caller calls `finish`.
        """
        if self.open:
            return False
        self.open, self.begun = True, {}
        return True

    def finish(self) -> None:
        """Write what was gathered."""
        self.open, self.begun = False, None
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()


class Registry:
    """The open connections."""

    def __init__(self) -> None:
        self._standing: dict[Connection, None] = {}
        self._emptied: asyncio.Event | None = None

    def __len__(self) -> int:
        return len(self._standing)

    def all(self) -> list[Connection]:
        """Return the connections, in the order in which they were opened."""
        return list(self._standing)

    def add(self, connection: Connection) -> None:
        """Add a connection that has been opened."""
        self._standing[connection] = None

    def remove(self, connection: Connection) -> None:
        """Remove a connection that is lost."""
        self._standing.pop(connection, None)
        if self._emptied is not None and not self._standing:
            self._emptied.set()

    async def wait_until_empty(self) -> None:
        """Wait until no connection is open."""
        self._emptied = asyncio.Event()
        if self._standing:
            await self._emptied.wait()


class Connection(picows.WSListener):
    """Messages over one connection. Subclasses take them in `on_message`. On the server's event loop only."""

    def __init__(self, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        self._batches = batches
        self._max_message_bytes = max_message_bytes
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: picows.WSTransport | None = None
        self._socket: Any = None
        self._closing = False
        self._plain = True
        """Whether a whole text message can be handled at once: no message is waiting or incomplete."""
        self._deferring = False
        """Whether a new message has to wait for earlier ones."""
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._fragments_text: bool | None = None
        self._turn = TURN
        self._backlog: deque[tuple[bytes, bool]] = deque()
        self._scheduled = False
        self._reading = True
        self._full = False
        self._held = False
        """Whether messages wait until `resume_messages` is called."""
        self._unsent_seen = 0
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._registry = Registry()

    def belong_to(self, registry: Registry) -> None:
        """Stay in `registry` as long as the connection is open."""
        self._registry = registry

    # --------------------------------------------------------------------------------------------- for subclasses

    def on_open(self) -> None:
        """The connection is open."""

    def on_message(self, message: bytes, text: bool) -> None:
        """Handle one whole message. Text has not been checked to be UTF-8."""

    def on_lost(self) -> None:
        """The connection is lost; called once."""

    # ----------------------------------------------------------------------------------------------------- sending

    def send(self, message: bytes) -> None:
        """Send a text message. If too many bytes already wait, the connection is closed."""
        if self._closing:
            return
        if self._full and self._socket.get_write_buffer_size() > self._max_unsent_bytes:
            self.close(POLICY, f"it reads too slowly: more than {self._max_unsent_bytes} bytes wait for it")
            return
        batches = self._batches
        if batches.open:
            if not self._gathered:
                begun = batches.begun
                if begun is not None and self not in begun:
                    begun[self] = None
                    self._transport.send(TEXT, message)  # type: ignore[union-attr]  # set until it closes
                    return
                batches.add(self)
            self._gathered.append(message)
            self._gathered_bytes += len(message)
            if self._gathered_bytes > GATHERED:
                self.flush()
        else:
            self._transport.send(TEXT, message)  # type: ignore[union-attr]  # set until it closes

    def pause_messages(self) -> None:
        """Handle no further messages until `resume_messages` is called, as the last one takes a while."""
        self._held = True
        self._look()
        self._pause()

    def resume_messages(self) -> None:
        """Continue after `pause_messages`."""
        self._held = False
        self._schedule()

    def flush(self) -> None:
        """Write what was gathered, in one system call."""
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if self._closing or not gathered:
            return
        if len(gathered) == 1:
            self._transport.send(TEXT, gathered[0])  # type: ignore[union-attr]
            return
        framed: list[bytes] = []
        add, header_of = framed.append, _headers.get
        for message in gathered:
            size = len(message)
            add(header_of(size) or _header(size))
            add(message)
        self._socket.write(b"".join(framed))

    def close(self, code: int, reason: str = "") -> None:
        """Send a close frame and stop reading; abort the connection if the close frame is not answered soon."""
        if self._closing or self._transport is None:
            return
        self.flush()
        self._closing = True
        self._look()
        self._backlog.clear()
        if code not in (NORMAL, GOING):
            self._batches.log.warning("%s: closing its connection with code %d: %s", self, code, reason)
        # At most 123 bytes, without cutting a character.
        self._transport.send_close(code, reason.encode()[:123].decode(errors="ignore").encode())  # type: ignore[arg-type]
        self._resume()  # to receive the answer
        asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self.abort)

    def abort(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._closing = True
            self._look()
            self._transport.disconnect(graceful=False)

    def unsent(self) -> int:
        """Return how many bytes wait until the other side reads."""
        return 0 if self._transport is None else int(self._socket.get_write_buffer_size())

    def look_for_progress(self) -> None:
        """Abort the connection of a worker that has read nothing since the last check. For a timer."""
        if self._transport is not None and self._transport.is_close_frame_sent and not self._closing:
            self.abort()  # picows has closed it for a broken frame, and waits until the rest is read
            return
        if not self._full:
            self._unsent_seen = 0
            return
        unsent = self._socket.get_write_buffer_size()
        if unsent and unsent == self._unsent_seen:
            self.close(POLICY, f"it reads nothing, although {unsent} bytes wait for it")
            self.abort()
        self._unsent_seen = unsent

    # --------------------------------------------------------------------------------------------- picows calls these

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self._transport = transport
        self._socket = transport.underlying_transport
        self._socket.set_write_buffer_limits(high=HIGH_WATER)
        self._registry.add(self)
        self.on_open()

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        last = frame.last_in_buffer
        if frame.msg_type == TEXT and frame.fin and not (frame.rsv1 or frame.rsv2 or frame.rsv3):
            if self._plain and self._turn:
                if not last:
                    self._batches.open = True
                self._turn -= 1
                self.on_message(frame.get_payload_as_bytes(), True)
            elif self._deferring:  # the rest of a long pipeline
                self._backlog.append((frame.get_payload_as_bytes(), True))
            else:
                self._take_rare(transport, frame)
        else:
            self._take_rare(transport, frame)
        if last:
            self._turn = TURN
            if self._batches.open:
                self._batches.finish()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self._registry.remove(self)
        if not self._closing:
            self._work_off_all()
        self._closing = True
        self._look()
        self._transport = None
        self._backlog.clear()
        self._fragments.clear()
        self._gathered.clear()
        self.on_lost()

    def pause_writing(self) -> None:
        self._full = True
        self._look()
        self._pause()

    def resume_writing(self) -> None:
        self._full = False
        self._schedule()

    # ---------------------------------------------------------------------------------------------------- receiving

    def _take_rare(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Handle any frame except a whole text message that can be handled at once."""
        kind = frame.msg_type
        if self._closing:
            if kind == CLOSE:
                transport.disconnect()
        elif frame.rsv1 or frame.rsv2 or frame.rsv3:
            self.close(PROTOCOL_ERROR, "a reserved bit is set, but no extension was agreed on")
        elif kind == PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif kind == CLOSE:
            self._work_off_all()
            self._closing = True
            self._look()
            code = int(frame.get_close_code())  # type: ignore[call-overload]  # the C enum is a number
            transport.send_close(code or NORMAL)  # type: ignore[arg-type]
            transport.disconnect()
            asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self.abort)
        elif kind == CONTINUATION:
            if self._fragments_text is None:
                self.close(PROTOCOL_ERROR, "a continuation of nothing")
            else:
                self._take_fragment(frame)
        elif kind in (TEXT, BINARY):
            if self._fragments_text is not None:
                self.close(PROTOCOL_ERROR, "a new message began before the last one had ended")
            elif frame.fin:
                self._take(frame.get_payload_as_bytes(), kind == TEXT)
            else:
                self._fragments_text = kind == TEXT
                self._look()
                self._take_fragment(frame)

    def _take_fragment(self, frame: picows.WSFrame) -> None:
        payload = frame.get_payload_as_bytes()
        self._fragment_bytes += len(payload)
        # Each piece counts 100 bytes more than its payload: empty pieces must not be free.
        if self._fragment_bytes + 100 * len(self._fragments) > self._max_message_bytes:
            self.close(TOO_BIG, f"a message of more than {self._max_message_bytes} bytes")
            return
        self._fragments.append(payload)
        if frame.fin:
            message, text = b"".join(self._fragments), bool(self._fragments_text)
            self._fragments.clear()
            self._fragment_bytes, self._fragments_text = 0, None
            self._look()
            self._take(message, text)

    def _take(self, message: bytes, text: bool) -> None:
        """Handle a message now, or later if this connection has used up its turn."""
        if self._turn and not self._backlog and not self._full and not self._held:
            self._turn -= 1
            self.on_message(message, text)
        else:
            self._backlog.append((message, text))
            self._look()
            self._pause()
            self._schedule()

    def _look(self) -> None:
        """Recompute how the next whole text message is handled."""
        in_order = not self._closing and self._fragments_text is None
        waiting = bool(self._backlog)
        self._plain = in_order and not waiting and not self._full and not self._held
        self._deferring = in_order and waiting

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._work_off)

    def _work_off(self) -> None:
        """Handle as many waiting messages as one turn allows."""
        self._scheduled = False
        backlog, take, on_message = self._backlog, self._backlog.popleft, self.on_message
        self._batches.open = len(backlog) > 1
        for _ in range(min(TURN, len(backlog))):
            if self._full or self._held or not backlog:
                break
            message, text = take()
            on_message(message, text)
        if self._batches.open:
            self._batches.finish()
        if self._full or self._held or self._closing:
            return
        if backlog:
            self._schedule()
        else:
            self._look()
            self._resume()

    def _work_off_all(self) -> None:
        """Handle all messages that were read before the worker left."""
        while self._backlog and not self._closing:
            self.on_message(*self._backlog.popleft())
        self._look()

    def _pause(self) -> None:
        if self._reading and self._socket is not None and not self._closing:
            self._reading = False
            self._socket.pause_reading()

    def _resume(self) -> None:
        if not self._reading and self._transport is not None and not self._socket.is_closing():
            self._reading = True
            self._socket.resume_reading()


def is_text(message: bytes) -> bool:
    """Return whether a message is valid UTF-8, as text must be."""
    try:
        return message.isascii() or message.decode() is not None
    except UnicodeDecodeError:
        return False


_headers: Final[dict[int, bytes]] = {}
"""Size of a message -> its frame header; answers come in few sizes."""


def _header(size: int) -> bytes:
    """Return the frame header of a whole text message from server to client (RFC 6455, section 5.2)."""
    if size < 126:
        header = struct.pack("!BB", 0x81, size)
    elif size < 65536:
        header = struct.pack("!BBH", 0x81, 126, size)
    else:
        return struct.pack("!BBQ", 0x81, 127, size)
    if size < 1024:
        _headers[size] = header
    return header
