"""Channels: one worker streams messages to another, through the server (docs/reference/protocol.md, section 7)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import uuid
from collections import deque
from typing import Final

from scopestate.errors import Overloaded
from scopestate.server.connections import BINARY, GOING, INVALID_TEXT, NORMAL, TEXT, Batches, Connection, is_text

log = logging.getLogger("scopestate.server")

DEFAULT_BUFFER: Final = 64
MAX_BUFFER: Final = 1024
"""Messages that may wait for the reader."""
BUFFER_BYTES: Final = 16 * 1024 * 1024
"""If more bytes than this wait, nothing more is read from the writer."""
TTL_S: Final = 300.0
"""Seconds that a channel waits until both of its ends are connected."""
IDLE_S: Final = 3600.0
"""A channel that was idle for this many seconds is closed."""
MAX_PER_WORKER: Final = 1_000
MAX_CHANNELS: Final = 10_000
OWNER_BYTES: Final = 64 * 1024 * 1024
"""If more bytes than this wait in all channels of one worker, nothing is read from writers whose messages wait."""


class Channel:
    """Two ends, each of which can be connected once, and the messages that wait between them."""

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
        """True once the writer has left: waiting messages are still delivered."""
        self.timer: asyncio.TimerHandle | None = None
        self.moved = 0.0
        """When a message was last delivered."""

    def put(self, message: bytes, text: bool) -> None:
        """Take a message from the writer."""
        self.waiting.append((message, text))
        self._weigh(len(message))
        self.moved = asyncio.get_running_loop().time()
        self.pump()

    def pump(self) -> None:
        """Deliver as much as the reader accepts, and pause the writer while too much waits."""
        reader, writer = self.reader, self.writer
        while self.waiting and reader is not None and reader.takes_more():
            message, text = self.waiting.popleft()
            self._weigh(-len(message))
            reader.relay(message, text)
        if writer is not None:
            full = len(self.waiting) >= self.buffer_size or self.waiting_bytes >= BUFFER_BYTES
            # Only while something waits here: then this channel's reader can let the writer continue.
            crowded = bool(self.waiting) and self.channels.bytes_of(self.owner) >= OWNER_BYTES
            writer.hold(full or crowded)
        if self.finished and not self.waiting and reader is not None:
            reader.close(NORMAL)

    def _weigh(self, size: int) -> None:
        self.waiting_bytes += size
        self.channels.weigh(self.owner, size)

    def end(self, code: int = NORMAL, reason: str = "") -> None:
        """Close both ends and forget the channel."""
        self.channels.forget(self)
        self.waiting.clear()
        self._weigh(-self.waiting_bytes)
        for connection in (self.writer, self.reader):
            if connection is not None:
                connection.close(code, reason)


class Channels:
    """Channel id -> channel. On the server's event loop only."""

    def __init__(self, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        self._by_id: dict[str, Channel] = {}
        self._of_owner: dict[str | None, dict[str, Channel]] = {}
        self._bytes: dict[str | None, int] = {}
        self._connection = (batches, max_message_bytes, max_unsent_bytes)

    def __len__(self) -> int:
        return len(self._by_id)

    def create(self, owner: str | None, buffer_size: int | None) -> Channel:
        """Make a channel. Raises Overloaded if this worker, or the server, has too many that are not finished."""
        if len(self._of_owner.get(owner, ())) >= MAX_PER_WORKER:
            raise Overloaded(f"this worker has {MAX_PER_WORKER} channels that are not finished; close some of them")
        if len(self._by_id) >= MAX_CHANNELS:
            raise Overloaded(f"the server has {MAX_CHANNELS} channels that are not finished; try again later")
        size = DEFAULT_BUFFER if buffer_size is None else max(1, min(buffer_size, MAX_BUFFER))
        channel = Channel(self, owner, size)
        self._by_id[channel.channel_id] = channel
        self._of_owner.setdefault(owner, {})[channel.channel_id] = channel
        channel.timer = asyncio.get_running_loop().call_later(TTL_S, self._look, channel)
        return channel

    def bytes_of(self, owner: str | None) -> int:
        """Bytes that wait in all channels of a worker."""
        return self._bytes.get(owner, 0)

    def weigh(self, owner: str | None, size: int) -> None:
        """Add bytes to those that wait in the channels of a worker; a negative size subtracts them."""
        total = self._bytes.get(owner, 0) + size
        if total:
            self._bytes[owner] = total
        else:
            self._bytes.pop(owner, None)

    def abandon(self, owner: str) -> None:
        """Close the channels of a lost worker that have no connected end."""
        for channel in list(self._of_owner.get(owner, {}).values()):
            if not channel.taken:
                channel.end()

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

    def _look(self, channel: Channel) -> None:
        """Close a channel whose other end was never connected, or that is idle; else check again later."""
        loop = asyncio.get_running_loop()
        if channel.writer is None or channel.reader is None:
            channel.end(GOING, "its other end never connected")
            return
        left_s = channel.moved + IDLE_S - loop.time()
        if left_s <= 0:
            channel.end(GOING, f"nothing went through it for {IDLE_S:g} s")
        else:
            channel.timer = loop.call_later(left_s, self._look, channel)

    def forget(self, channel: Channel) -> None:
        """Remove a channel that has ended."""
        if self._by_id.pop(channel.channel_id, None) is not None:
            of_owner = self._of_owner[channel.owner]
            del of_owner[channel.channel_id]
            if not of_owner:
                del self._of_owner[channel.owner]
        if channel.timer is not None:
            channel.timer.cancel()

    def end_all_of(self, owner: str, code: int, reason: str) -> None:
        """Close the channels that this worker has created."""
        for channel in list(self._of_owner.get(owner, {}).values()):
            channel.end(code, reason)

    def close(self, code: int, reason: str) -> None:
        """Close all channels."""
        for channel in list(self._by_id.values()):
            channel.end(code, reason)


class WriterEnd(Connection):
    """The end that sends."""

    def __init__(self, channel: Channel, batches: Batches, max_message_bytes: int, max_unsent_bytes: int) -> None:
        super().__init__(batches, max_message_bytes, max_unsent_bytes)
        self._channel = channel

    def on_open(self) -> None:
        self._channel.writer = self
        self._channel.moved = asyncio.get_running_loop().time()

    def on_message(self, message: bytes, text: bool) -> None:
        if text and not is_text(message):
            self.close(INVALID_TEXT, "a text message that is not UTF-8")
        else:
            self._channel.put(message, text)

    def hold(self, held: bool) -> None:
        """Stop reading from the writer, or continue."""
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
            channel.end()
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
        self._channel.moved = asyncio.get_running_loop().time()
        self._channel.pump()

    def takes_more(self) -> bool:
        """Whether the reader accepts more messages now."""
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
