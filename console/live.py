"""Live changes: the page, and the stream of server-sent events that its script reads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from scopestate.console.asked import Answer, Asked, Shown
from scopestate.console.rendering import link, preview
from scopestate.console.security import Message, Receive, Scope, Send
from scopestate.console.texts import one_line
from scopestate.engine import Engine
from scopestate.integrations.sse import HEADERS, StreamOptions, Watched, WatchStream, open_stream
from scopestate.ops.changes import Change
from scopestate.ops.results import EventName

LetIn = Callable[[], Awaitable[bool]]

KINDS: Final[tuple[EventName, ...]] = ("created", "updated", "deleted", "expired")
LONGEST_S: Final = 600.0
"""Seconds after which a stream ends. The browser then connects again and, if it is still let in, continues where it
was."""
CHECK_S: Final = 15.0
"""Seconds after which a stream is checked again: it ends if its browser is not let in any more."""
SHARE: Final = 4
"""One client can have at most one in this many of the streams."""
BUFFER: Final = 5_000
"""Changes that may wait for a slow client. With more, its stream ends, and continues when it connects again."""


def changes(asked: Asked) -> Answer:
    """Show changes as they happen."""
    query = asked.query
    chosen = [kind for kind in KINDS if kind in query.getlist("events")] or list(KINDS)
    filters = {name: query.get(name) or None for name in ("scope", "scope_prefix", "prefix")}
    address = link("stream", **filters, events=",".join(chosen) if len(chosen) < len(KINDS) else None)
    facts = {
        "filters": filters,
        "kinds": KINDS,
        "chosen": chosen,
        "stream": address,
        "unwatchable": asked.engine._parts.backend.unwatchable,
    }
    return Shown("changes.html", facts)


class Streams:
    """The open streams of one console. Their number is limited."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of_client: Counter[str] = Counter()

    async def open(self, request: Request, engine: Engine, is_let_in: LetIn) -> Response:
        """Begin a stream, or refuse it if there are too many. Raises what a watch raises.

        `is_let_in` tells whether the browser that sent the request may still read the stream.
        """
        client = request.client.host if request.client is not None else ""
        if self._of_client.total() >= self._most or self._of_client[client] >= max(1, self._most // SHARE):
            said = "Too many streams of live changes are open. Close other pages of the console.\n"
            return PlainTextResponse(said, 503, {"Retry-After": "10"})
        self._of_client[client] += 1
        try:
            watched, options = _watched(request, engine)
            stream = await open_stream(
                watched,
                request.headers.get("Last-Event-ID"),
                # A new EventSource sends no id: a page that was hidden continues with the cursor in its address.
                since=request.query_params.get("since") or None,
                data=_shown,
                retry_ms=2_000,
                **options,
            )
        except BaseException:
            self._end(client)
            raise
        return _Stream(stream, is_let_in, lambda: self._end(client))

    def _end(self, client: str) -> None:
        self._of_client[client] -= 1
        if self._of_client[client] <= 0:
            del self._of_client[client]


def _watched(request: Request, engine: Engine) -> tuple[Watched, dict[str, Any]]:
    query = request.query_params
    options: StreamOptions = {"snapshot": False, "buffer": BUFFER}
    if "key" in query:
        options["key"] = query["key"]
    elif query.get("prefix"):
        options["prefix"] = query["prefix"]
    wanted = query.get("events", "").split(",")
    chosen = [kind for kind in KINDS if kind in wanted]
    if chosen:
        options["events"] = chosen
    if query.get("scope") or "key" in query:
        return engine.scope(query.get("scope", "")), dict(options)
    return engine, {**options, "scope_prefix": query.get("scope_prefix") or None}


def _shown(change: Change) -> dict[str, Any]:
    """Return the data of a change that the script shows. All of it is text, for `textContent`."""
    created = change.kind == "put" and change.old_json is None
    return {
        "kind": "created" if created else {"put": "updated", "delete": "deleted", "expire": "expired"}[change.kind],
        "scope": one_line(change.scope[:200]) or "(empty)",
        "key": one_line(change.key[:200]) or "(empty)",
        "revision": change.revision,
        "value": preview(change.json),
        "entry": link("entry", scope=change.scope, key=change.key),
    }


class _Stream(Response):
    """A stream as the answer to a request."""

    def __init__(self, stream: WatchStream, is_let_in: LetIn, ended: Callable[[], object]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["Content-Length"]
        self._stream = stream
        self._is_let_in = is_let_in
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, as ASGI says."""
        try:
            await self._stream(
                scope, _bounded(receive, LONGEST_S, self._is_let_in), _with_cursors(send), self.raw_headers
            )
        finally:
            self._ended()


def _with_cursors(send: Send) -> Send:
    """Return a `send` that adds an event `cursor` to an id without an event.

    A browser keeps such an id for its own reconnection and does not show it to the script. The script needs the cursor
    too, as it closes the stream of a hidden page, perhaps before the first change.
    """

    async def send_cursor(message: Message) -> None:
        if message.get("body", b"").startswith(b"id: "):
            message = {**message, "body": b"event: cursor\ndata: {}\n" + message["body"]}
        await send(message)

    return send_cursor


def _bounded(receive: Receive, longest_s: float, is_let_in: LetIn) -> Callable[[], Awaitable[Message]]:
    """Return a `receive` that reports a disconnected client after `longest_s` seconds at the latest.

    And earlier if `is_let_in` says that it may not read the stream any more.
    """
    clock = asyncio.get_running_loop().time
    ends = clock() + longest_s

    async def receive_or_end() -> Message:
        received = asyncio.ensure_future(receive())
        try:
            while not received.done():
                await asyncio.wait([received], timeout=min(CHECK_S, max(ends - clock(), 0.0)))
                if not received.done() and (clock() >= ends or not await is_let_in()):
                    return {"type": "http.disconnect"}
            return received.result()
        finally:
            received.cancel()

    return receive_or_end
