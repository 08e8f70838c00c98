"""A watch as server-sent events: an ASGI application for one request, for any framework.

The modules for Starlette, FastAPI and Litestar have `watch_response`, which returns it as one of their responses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, MutableMapping
from contextlib import suppress
from typing import Any, Final, Literal, TypeAlias, TypedDict, Unpack

import msgspec

from scopestate.aio import AioEngine
from scopestate.engine import Engine
from scopestate.errors import (
    Compacted,
    DeserializationError,
    EngineClosed,
    InvalidCursor,
    SchemaViolation,
    ScopestateError,
    WatchOverrun,
)
from scopestate.handles import AioScope, Scope
from scopestate.integrations._web_server import server_ends
from scopestate.ops.changes import Change
from scopestate.ops.results import EventName
from scopestate.watching import AioChanges

__all__ = ["HEADERS", "ResponseOptions", "StreamOptions", "WatchStream", "Watched", "open_stream"]

log = logging.getLogger("scopestate.integrations")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# For type checkers there are four types; a handle may be typed, with any type.
Watched: TypeAlias = Scope | AioScope | Engine | AioEngine
"""What can be watched: a handle on one scope, or an engine for many scopes."""

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back until its buffer is full
}
"""Headers of the response."""

CHUNK: Final = 64 * 1024
"""With this many bytes, events are sent at once instead of being joined with others that are ready."""
LAST_WORDS_S: Final = 1.0
"""Seconds that sending the end of a response that is cut off may take: the client may no longer be reading."""


class StreamOptions(TypedDict, total=False):
    """Options of a stream."""

    key: str | None
    """Only this key."""
    prefix: str | None
    """Only keys with this prefix."""
    events: Collection[EventName] | None
    """Only changes of these kinds; None: all. The entries of a snapshot are always sent."""
    snapshot: bool
    """True (default): a client that does not resume first gets the existing entries."""
    latest: bool
    """True: of the changes that wait for a slow client, only the newest of each key is kept, so the stream does not
    end."""
    buffer: int
    """How many changes may wait for a slow client; with more, the stream ends. Default: 10,000."""


class ResponseOptions(StreamOptions, total=False):
    """The options of a framework's `watch_response`: see `open_stream`."""

    since: str | None
    scope_prefix: str | None
    on_compacted: Literal["resync", "raise"]
    data: Callable[[Change], object] | None
    heartbeat_s: float
    retry_ms: int | None


class _Data(msgspec.Struct):
    """The data of an event, as JSON."""

    scope: str
    key: str
    revision: int
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    initial: bool | msgspec.UnsetType = msgspec.UNSET


async def open_stream(
    watched: Watched,
    last_event_id: str | None = None,
    *,
    since: str | None = None,
    scope_prefix: str | None = None,
    on_compacted: Literal["resync", "raise"] = "resync",
    data: Callable[[Change], object] | None = None,
    heartbeat_s: float = 15.0,
    retry_ms: int | None = None,
    **options: Unpack[StreamOptions],
) -> WatchStream:
    """Begin to watch, and return the stream of server-sent events: an ASGI application that answers one request.

    `watched` is a handle on a scope, or an engine for all scopes or those with `scope_prefix`. `last_event_id` is the
    header `Last-Event-ID` of the request: with it, the stream continues after that event. `since` is a cursor that does
    the same for a request without the header.

    Each change is an event `put`, `delete` or `expire`, with a JSON object as data: `scope`, `key`, `revision`, and the
    `value` of a `put`. Its id is the cursor after the change. A snapshot begins with the event `resync` (its data
    has the `reason`), at which a client must drop its entries; the entries of the snapshot are `put` events with
    `"initial": true`, and the event `synced` ends it. A client that cannot continue from its id gets `resync` and a
    snapshot (only `resync` if `snapshot` is false); with `on_compacted="raise"` this raises Compacted or InvalidCursor
    instead.

    With a typed handle, its `on_invalid` decides about values that do not fit. If it raises, a warning is logged and
    the client gets the event `invalid` with `scope` and `key`.

    `data(change)` replaces the data: a string is sent as it is, other values as JSON, and for None the event is left
    out. It runs on the event loop. After `heartbeat_s` without an event a comment is sent, so that no proxy ends the
    connection. `retry_ms` tells the client how long to wait before it connects again.

    The stream ends when the client disconnects, when the engine closes, when the server is told to end (uvicorn, and
    gunicorn's ASGI workers), and when more than `buffer` changes wait for a slow client. Except in the first case the
    client should connect again. Raises what a watch raises, before the stream begins, so the API can answer with the
    error.
    """
    if not heartbeat_s > 0:
        raise DeserializationError(f"`heartbeat_s` is a number of seconds above 0, not {heartbeat_s!r:.40}")
    handle = watched if isinstance(watched, AioEngine | AioScope) else watched.aio
    if scope_prefix is not None:
        if isinstance(handle, AioScope):
            raise DeserializationError("`scope_prefix` is for a stream of an engine, not of one scope")
        options["scope_prefix"] = scope_prefix  # type: ignore[typeddict-unknown-key]  # of `AioEngine.watch`
    stream = WatchStream(handle, options, data, heartbeat_s, retry_ms, resync=on_compacted == "resync")
    await stream._begin(last_event_id or since)
    return stream


class WatchStream:
    """The changes of a watch as server-sent events: an ASGI application for one request, made by `open_stream`."""

    def __init__(
        self,
        handle: AioScope | AioEngine,
        options: StreamOptions,
        data: Callable[[Change], object] | None,
        heartbeat_s: float,
        retry_ms: int | None,
        *,
        resync: bool,
    ) -> None:
        self._handle = handle
        self._options = options
        self._data = data
        self._heartbeat_s = heartbeat_s
        self._retry_ms = retry_ms
        self._resync = resync
        self._changes: AioChanges
        self._reason: str | None = None
        """Why the stream does not continue from the client's id; None: it does."""
        self._told = ""
        """The last id that was sent to the client."""
        self._in_snapshot = False
        """True while the client waits for the end of a snapshot."""

    # ------------------------------------------------------------------------------------------------------- watching

    async def _begin(self, since: str | None) -> None:
        """Begin to watch after a cursor, or from the start."""
        if since is not None:
            try:
                await self._watch(since=since)
            except (Compacted, InvalidCursor, DeserializationError) as error:
                if not self._resync:
                    raise
                reason = error.reason if isinstance(error, Compacted) else "another watch"
                await self._begin_anew("damaged" if isinstance(error, InvalidCursor) else reason)
            else:
                self._told = since
                # The cursor of a snapshot's entry starts the whole snapshot again.
                self._reason = "within a snapshot" if self._changes.in_snapshot else None
        else:
            await self._begin_anew("begin")

    async def _begin_anew(self, reason: str) -> None:
        await self._watch()
        self._reason, self._told = reason, ""

    async def _watch(self, **since: str) -> None:
        watch: Any = (
            self._handle.watch
        )  # for type checkers, that of an engine and that of a scope have nothing in common
        self._changes = watch(**self._options, **since)
        try:
            await self._changes.__aenter__()
        except BaseException:
            self._changes.close()
            raise

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the stream in pieces of whole events, until the watch ends.

        It does not watch the client or the server: it is for a framework that does.
        """
        if self._retry_ms is not None:
            yield b"retry: %d\n\n" % self._retry_ms
        while True:
            yield self._first()
            try:
                async for piece in self._pieces():
                    yield piece
                return
            except (EngineClosed, WatchOverrun):
                return
            except Compacted as error:  # the rest of the missed changes was removed while they were read
                if not self._resync:
                    return
                self._changes.close()
                await self._begin_anew(error.reason)
            except ScopestateError as error:
                log.warning("a stream of events has ended: %s: %s", type(error).__name__, error)
                return

    def _first(self) -> bytes:
        """Return the events before the first change."""
        snapshot = self._options.get("snapshot", True)
        if self._reason is None or (self._reason == "begin" and not snapshot):
            return self._mark() or b":\n\n"
        # The id is empty: a client that loses the connection within the snapshot gets all of it again.
        begins = _event("resync", msgspec.json.encode({"reason": self._reason}), "")
        self._in_snapshot = True
        return begins + self._end_of_snapshot()

    def _end_of_snapshot(self) -> bytes:
        """Return the event `synced` if the snapshot has just been read to its end."""
        if not self._in_snapshot or self._changes.in_snapshot:
            return b""
        self._in_snapshot = False
        self._told = self._changes.cursor
        return _event("synced", b"{}", self._told)

    def _mark(self) -> bytes:
        """Return an id without an event, which updates the client's id; empty if it is up to date."""
        cursor = self._changes.cursor
        if cursor == self._told or not cursor:
            return b""
        self._told = cursor
        return b"id: %s\n\n" % cursor.encode()

    async def _pieces(self) -> AsyncIterator[bytes]:
        changes = self._changes
        while True:
            try:
                piece = await self._next(self._heartbeat_s)
            except TimeoutError:
                moved = b"" if changes.in_snapshot else self._end_of_snapshot() or self._mark()
                yield b":\n" + (moved or b"\n")
                continue
            while changes.has_ready and len(piece) < CHUNK:
                try:
                    piece += await self._next(0)
                except TimeoutError:
                    break
                except (EngineClosed, WatchOverrun):
                    yield piece
                    raise
            if piece:
                yield piece

    async def _next(self, within_s: float) -> bytes:
        """Return the event of the next change. Raises TimeoutError if none comes within `within_s` seconds."""
        initial = self._changes.in_snapshot
        try:
            change = await self._changes.get(within_s)
        except SchemaViolation as violation:
            # From a typed handle. A stream that ended here would end here again after the client has reconnected.
            log.warning("a stream of events leaves out a value: %s", violation)
            data = msgspec.json.encode({"scope": violation.scope, "key": violation.key})
            return self._event("invalid", data, None if initial else self._changes.cursor)
        return self._event(change.kind, self._data_of(change), None if change.initial else change.cursor)

    def _event(self, name: str, data: bytes | None, cursor: str | None) -> bytes:
        """Return an event, and the end of the snapshot if it is due; `cursor` is None within a snapshot."""
        if cursor is None:
            return (b"" if data is None else _event(name, data)) + self._end_of_snapshot()
        self._told = cursor
        event = b"id: %s\n\n" % cursor.encode() if data is None else _event(name, data, cursor)
        if not self._in_snapshot:
            return event
        self._in_snapshot = False  # a typed handle has skipped its last entries
        return _event("synced", b"{}") + event

    def _data_of(self, change: Change) -> bytes | None:
        if self._data is not None:
            given = self._data(change)
            if given is None:
                return None
            return given.encode() if isinstance(given, str) else msgspec.json.encode(given)
        shown = _Data(change.scope, change.key, change.revision)
        if change.json is not None:
            shown.value = msgspec.Raw(change.json)
        if change.initial:
            shown.initial = True
        return msgspec.json.encode(shown)

    # ---------------------------------------------------------------------------------------------------------- as ASGI

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        """Answer the request. `headers` are those of the response; without it, `HEADERS`."""
        if headers is None:
            headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        try:
            with suppress(OSError):  # the client has disconnected: each server raises its own error, all of this type
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if scope["method"] != "HEAD":
                    await _first_of(self._send_all(send), _client_gone(receive), server_ends())
                async with asyncio.timeout(LAST_WORDS_S):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._changes.close()

    async def _send_all(self, send: Send) -> None:
        async for piece in self.events():
            await send({"type": "http.response.body", "body": piece, "more_body": True})


def _event(name: str, data: bytes, cursor: str | None = None) -> bytes:
    """Return one event. Each line of its data, with any line ending, becomes a line `data:`."""
    parts = [b"event: ", name.encode(), b"\n"]
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))
    parts += [b"data: ", data, b"\n"]
    if cursor is not None:
        parts += [b"id: ", cursor.encode(), b"\n"] if cursor else [b"id\n"]
    return b"".join([*parts, b"\n"])


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Wait for the first of these to end, and cancel the others. Raises what one of them has raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in done:
        if isinstance(outcome, Exception):
            raise outcome
