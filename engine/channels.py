"""Channels: one worker streams messages to another, through the server (docs/protocol.md, section 7)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import uuid
from collections import deque
from typing import Final

from scopestate.connections import BINARY, GOING, INVALID_TEXT, NORMAL, TEXT, Batches, Connection, is_text
from scopestate.errors import Overloaded

log = logging.getLogger("scopestate.server")

DEFAULT_BUFFER: Final = 64
MAX_BUFFER: Final = 1024
"""Messages that may wait for the reader."""
BUFFER_BYTES: Final = 16 * 1024 * 1024
"""Bytes from which on nothing more is read from the writer."""
TTL_S: Final = 300.0
"""How long a channel waits for both of its ends."""
MAX_PER_WORKER: Final = 1_000


class Channel:
    """Two ends, each of which can be taken once, and what waits between them."""

    def __init__(self, channels: Channels, owner: str | None, buffer_size: int) -> None:
        self.channels = channels
        self.owner = owner
        self.channel_id = str(uuid.uuid4())
        self.write_key = secrets.token_urlsafe(24)
        self.read_key = secrets.token_urlsafe(24)
        self.buffer_size = buffer_size
        self.taken: set[str] = set()
        self.writer: WriterEnd | None = None
        self.reader: ReaderEnd | None = None
        self.waiting: deque[tuple[bytes, bool]] = deque()
        self.waiting_bytes = 0
        self.finished = False
        """True once the writer has gone: what waits is still delivered."""
        self.timer: asyncio.TimerHandle | None = None

    def put(self, message: bytes, text: bool) -> None:
        """Take a message from the writer."""
        self.waiting.append((message, text))
        self.waiting_bytes += len(message)
        self.pump()

    def pump(self) -> None:
        """Deliver as much as the reader takes; hold the writer back while too much waits."""
        reader, writer = self.reader, self.writer
        while self.waiting and reader is not None and reader.takes_more():
            message, text = self.waiting.popleft()
            self.waiting_bytes -= len(message)
            reader.relay(message, text)
        if writer is not None:
            writer.hold(len(self.waiting) >= self.buffer_size or self.waiting_bytes >= BUFFER_BYTES)
        if self.finished and not self.waiting and reader is not None:
            reader.close(NORMAL)

    def end(self, code: int = NORMAL, reason: str = "") -> None:
        """Close both ends and forget the channel."""
        self.channels.forget(self)
        self.waiting.clear()
        for connection in (self.writer, self.reader):
            if connection is not None:
                connection.close(code, reason)


class Channels:
    """Channel id -> channel. On the server's event loop only."""

    def __init__(self, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        self._by_id: dict[str, Channel] = {}
        self._connection = (batches, max_message_bytes, max_unsent_bytes)

    def create(self, owner: str | None, buffer_size: int | None) -> Channel:
        """Make a channel. Raises Overloaded if this worker has too many that are not finished."""
        if sum(channel.owner == owner for channel in self._by_id.values()) >= MAX_PER_WORKER:
            raise Overloaded(f"this worker has {MAX_PER_WORKER} channels that are not finished; close some of them")
        size = DEFAULT_BUFFER if buffer_size is None else max(1, min(buffer_size, MAX_BUFFER))
        channel = Channel(self, owner, size)
        self._by_id[channel.channel_id] = channel
        channel.timer = asyncio.get_running_loop().call_later(TTL_S, self._expire, channel)
        return channel

    def take(self, channel_id: str, key: str, direction: str) -> Connection | None:
        """Return the connection for one end, once; None for a wrong id or key, or an end that is taken."""
        channel = self._by_id.get(channel_id)
        if channel is None or direction not in ("read", "write") or direction in channel.taken:
            return None
        wanted = channel.write_key if direction == "write" else channel.read_key
        if not hmac.compare_digest(wanted.encode(), key.encode("utf-8", "surrogateescape")):
            return None
        channel.taken.add(direction)
        return WriterEnd(channel, *self._connection) if direction == "write" else ReaderEnd(channel, *self._connection)

    def _expire(self, channel: Channel) -> None:
        if channel.writer is None or channel.reader is None:
            channel.end(GOING, "its other end never came")

    def forget(self, channel: Channel) -> None:
        """A channel is over."""
        self._by_id.pop(channel.channel_id, None)
        if channel.timer is not None:
            channel.timer.cancel()

    def close(self, code: int, reason: str) -> None:
        """Close all of them."""
        for channel in list(self._by_id.values()):
            channel.end(code, reason)


class WriterEnd(Connection):
    """The end that sends."""

    def __init__(self, channel: Channel, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        super().__init__(batches, max_message_bytes, max_unsent_bytes)
        self._channel = channel

    def on_open(self) -> None:
        self._channel.writer = self

    def on_message(self, message: bytes, text: bool) -> None:
        if text and not is_text(message):
            self.close(INVALID_TEXT, "a text message that is not UTF-8")
        else:
            self._channel.put(message, text)

    def hold(self, held: bool) -> None:
        """Read no more from it, or go on."""
        if held != self._full:
            self._full = held
            self._look()
            if held:
                self._pause()
            else:
                self._schedule()

    def on_lost(self) -> None:
        channel = self._channel
        channel.writer = None
        channel.finished = True
        if channel.reader is None and "read" in channel.taken:
            channel.channels.forget(channel)
        channel.pump()

    def __str__(self) -> str:
        return f"the writer of channel {self._channel.channel_id}"


class ReaderEnd(Connection):
    """The end that receives; what it sends is ignored."""

    def __init__(self, channel: Channel, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        super().__init__(batches, max_message_bytes, max_unsent_bytes)
        self._channel = channel

    def on_open(self) -> None:
        self._channel.reader = self
        self._channel.pump()

    def takes_more(self) -> bool:
        """Whether it reads as fast as messages come."""
        return not self._full and not self._closing

    def relay(self, message: bytes, text: bool) -> None:
        """Send a message of the writer unchanged."""
        if self._transport is not None and not self._closing:
            self._transport.send(TEXT if text else BINARY, message)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._channel.pump()

    def on_lost(self) -> None:
        self._channel.reader = None
        self._channel.end()

    def __str__(self) -> str:
        return f"the reader of channel {self._channel.channel_id}"
