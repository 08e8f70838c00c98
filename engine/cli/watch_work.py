"""The work of `scopestate watch`: print each change as it happens."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

import msgspec
import typer
from rich.text import Text

from scopestate.cli.arguments import given_text
from scopestate.cli.client import with_client
from scopestate.cli.terminal import ReaderGone, json_text, out, print_rich, shown, standard_error
from scopestate.errors import (
    Compacted,
    ConnectionLost,
    Forbidden,
    FunctionNotFound,
    InvalidCursor,
    NotConnected,
    RemoteFailure,
    ScopestateError,
    Unsupported,
)
from scopestate.wire.client import Client
from scopestate.wire.refusals import refusal_of

FOREVER_S: Final = 86_400.0 * 365
_KINDS: Final = ["created", "updated", "deleted", "expired"]
"""All named, because a worker that names no kinds gets `state:deleted` for an expired key."""

_WAIT_MS: Final = 30_000
"""Milliseconds that the engine is asked to wait for a change."""
_MOST: Final = 1_000
"""Changes requested at a time."""
_NULL: Final = msgspec.Raw(b"null")
_ABSENT: Final = msgspec.Raw()

_COLOURS: Final = {
    "state:created": "green",
    "state:updated": "yellow",
    "state:deleted": "red",
    "state:expired": "magenta",
}


def watch(
    scope: str | None,
    key: str | None,
    prefix: str | None,
    since: str | None,
    count: int,
    url: str,
    token: str | None,
    ca_file: str | None,
    *,
    snapshot: bool,
    resync: bool,
    cursors: bool,
    as_json: bool,
) -> None:
    """See `watch.watch`."""
    _check_options(scope, key, prefix, since, snapshot=snapshot, resync=resync)
    given = {"scope": scope, "key": key, "prefix": prefix}
    filters: dict[str, Any] = {
        name: given_text(value, f"--{name}") for name, value in given.items() if value is not None
    }
    readable = sys.stdout is not None and sys.stdout.isatty() and not as_json
    watched = _Watch(
        filters,
        _Lines(count, readable=readable, cursors=cursors),
        None if since is None else given_text(since, "--since"),
        snapshot=snapshot,
        resync=resync,
    )
    with_client(
        url,
        token,
        watched.follow,
        as_json=as_json,
        timeout_s=FOREVER_S,
        ca_file=ca_file,
        on_change=watched.on_change,
        on_trigger_refused=watched.end,
    )


def _check_options(
    scope: str | None, key: str | None, prefix: str | None, since: str | None, *, snapshot: bool, resync: bool
) -> None:
    if key is not None and prefix is not None:
        raise typer.BadParameter("give --key or --prefix, not both")
    if snapshot and since is not None:
        raise typer.BadParameter("give --snapshot or --since, not both")
    if (snapshot or resync) and scope is None:
        raise typer.BadParameter(f"{'--snapshot' if snapshot else '--resync'} needs --scope")


class _Lines:
    """Prints events, and counts until there are enough."""

    def __init__(self, count: int, *, readable: bool, cursors: bool) -> None:
        """`count`: total of events to print; 0: no limit."""
        self._count = count
        self._readable = readable
        self._cursors = cursors
        self._printed = 0

    def print_event(self, payload: bytes) -> bool:
        """Print an event that a trigger has delivered; return whether that was enough. Raises as `out`."""
        if self._readable:
            print_rich(event_line(msgspec.json.decode(payload)))
        else:
            out(json_text(payload))
        return self._count_one()

    def print_change(self, change: _Change) -> bool:
        """Print a change as an event; return whether that was enough."""
        event: dict[str, Any] = {
            "type": "state",
            "event_type": change.event_type,
            "scope": change.scope,
            "key": change.key,
            "old_value": change.old_value or _NULL,
            "new_value": change.value or _NULL,
        }
        if change.expired_at is not None:
            event |= {"expired_at": change.expired_at, "late_ms": change.late_ms}
        if change.initial:
            event["initial"] = True
        if self._readable:
            line = event_line(msgspec.json.decode(msgspec.json.encode(event)))
            if self._cursors:
                line.append(f"  {shown(change.cursor, keep='')}", style="dim")
            print_rich(line)
        else:
            if self._cursors:
                event |= {"revision": change.revision, **({"cursor": change.cursor} if change.cursor else {})}
            out(json_text(msgspec.json.encode(event)))
        return self._count_one()

    def print_mark(self, kind: str, words: str, **facts: str) -> None:
        """Print something that is not a change; for programs, an object with this `type`."""
        if self._readable:
            print_rich(Text(shown(words), style="dim"))
        else:
            out(json_text(msgspec.json.encode({"type": kind, **facts})))

    def _count_one(self) -> bool:
        self._printed += 1
        return self._printed == self._count


class _Change(msgspec.Struct):
    kind: str
    scope: str
    key: str
    revision: int
    cursor: str = ""
    value: msgspec.Raw = _ABSENT
    old_value: msgspec.Raw = _ABSENT
    initial: bool = False
    expired_at: int | None = None
    late_ms: int | None = None

    @property
    def event_type(self) -> str:
        """The type of the event that this change fired."""
        if self.kind == "put":
            return "state:updated" if self.old_value else "state:created"
        return {"delete": "state:deleted", "expire": "state:expired"}.get(self.kind, f"state:{self.kind}")


class _Changes(msgspec.Struct):
    changes: list[_Change]
    cursor: str
    more: bool


class _Watch:
    """A watch: prints changes until there are enough, it is refused, or the output has no reader."""

    def __init__(
        self, filters: dict[str, Any], lines: _Lines, since: str | None, *, snapshot: bool, resync: bool
    ) -> None:
        self._filters = filters
        self._lines = lines
        self._cursor = since
        self._needed = [
            option
            for option, given in (
                ("--since", since is not None),
                ("--snapshot", snapshot),
                ("--resync", resync),
                ("--prefix", "prefix" in filters),
            )
            if given
        ]
        """Options that need `state::changes`."""
        self._snapshot = snapshot
        self._resync = resync
        self._notes = standard_error()
        self._connections = 0
        self._told = False

    @cached_property
    def _over(self) -> asyncio.Future[None]:
        """A future that is done when the watch is over. Made on the event loop."""
        return asyncio.get_running_loop().create_future()

    async def follow(self, client: Client) -> None:
        """Watch until the watch is over."""
        following = asyncio.ensure_future(self._follow(client))
        following.add_done_callback(self._ended)
        try:
            with _reader_watched(lambda: self.end(ReaderGone())):
                await self._over
        finally:
            following.cancel()

    def _ended(self, following: asyncio.Future[None]) -> None:
        if not (following.cancelled() or self._over.done()):
            error = following.exception()
            if error is None:
                self._over.set_result(None)
            else:
                self._over.set_exception(error)

    async def _follow(self, client: Client) -> None:
        if self._needed or await self._knows_changes(client):
            await self._poll(client)
        else:
            await self._by_trigger(client)

    # ------------------------------------------------------------------------------------------------- by polling

    async def _knows_changes(self, client: Client) -> bool:
        """Return whether the engine has `state::changes`, and the token may call it."""
        try:
            self._take(await self._ask(client, wait_ms=0))
        except RemoteFailure as error:
            if error.code in (FunctionNotFound.code, Forbidden.code):
                return False
            raise
        return True

    async def _poll(self, client: Client) -> None:
        while True:
            try:
                # The first answer comes at once, to say where the watch begins.
                found = await self._ask(client, wait_ms=_WAIT_MS if self._told else 0)
            except (ConnectionLost, NotConnected):
                if not client.connections or client.was_refused:
                    raise
                continue
            except RemoteFailure as error:
                self._compacted_or_raise(error, client)
                continue
            if self._take(found):
                return
            if not self._told:
                self._told = True
                self._notes.print(f"watching {client.url}", markup=False, style="dim")

    async def _ask(self, client: Client, wait_ms: int) -> _Changes:
        asked = {**self._filters, "limit": _MOST, "wait_ms": wait_ms}
        if self._cursor is not None:
            asked["cursor"] = self._cursor
        elif self._snapshot:
            asked["snapshot"] = True
        result = await client.call_raw("state::changes", msgspec.json.encode(asked))
        return msgspec.json.decode(result or b"null", type=_Changes)

    def _take(self, found: _Changes) -> bool:
        """Print the changes found; return whether that was enough."""
        initial = True
        for change in found.changes:
            if self._snapshot and not change.initial:
                self._synced()
            initial = change.initial
            enough = self._lines.print_change(change)
            self._cursor = change.cursor or self._cursor
            if enough:
                return True
        self._cursor = found.cursor
        if self._snapshot and not (found.more and initial):
            self._synced()
        return False

    def _synced(self) -> None:
        self._snapshot = False
        self._lines.print_mark("synced", "these are all keys; changes follow")

    def _begin_anew(self, reason: str) -> None:
        self._cursor, self._snapshot = None, True
        self._lines.print_mark("resync", f"all keys again: {reason}", reason=reason)

    def _compacted_or_raise(self, error: RemoteFailure, client: Client) -> None:
        """Start again after a compaction, if that was asked for. Otherwise raise the error of the watch."""
        if error.code in (FunctionNotFound.code, Forbidden.code) and not self._told:
            if error.code == FunctionNotFound.code:
                raise Unsupported(self._needed[0], f"the engine at {client.url} is iii or an older scopestate")
            raise error
        refusal = refusal_of(error)
        if isinstance(refusal, Compacted) and self._resync:
            self._begin_anew(refusal.reason)
        elif isinstance(refusal, InvalidCursor) and self._snapshot and self._cursor is not None:
            self._begin_anew("the connection was lost")
        else:
            raise refusal or error

    # ----------------------------------------------------------------------------------------------- by a trigger

    async def _by_trigger(self, client: Client) -> None:
        """Register a trigger and wait for the end of the watch."""
        function_id = f"scopestate::watch::{os.urandom(8).hex()}"
        client.register_function(function_id, self._on_event, description="scopestate watch", ordered=True)
        client.register_trigger("state", function_id, {**self._filters, "events": _KINDS})
        # The server handles messages in order: once it answers this call, the trigger is in place
        # (docs/reference/protocol.md, section 1, "Order"). A refusal is an answer too.
        try:
            await client.call_raw("engine::functions::list", b"{}")
        except RemoteFailure as error:
            if error.code != Forbidden.code:
                raise
        if not self._over.done():
            self._notes.print(f"watching {client.url}", markup=False, style="dim")
        await self._over

    async def _on_event(self, payload: bytes) -> bytes | None:
        if self._over.done():
            return None
        try:
            if self._lines.print_event(payload):
                self._over.set_result(None)
        except (ReaderGone, ScopestateError) as error:
            self.end(error)
        return None

    def on_change(self, connected: bool, reason: str) -> None:
        """Report that the connection was lost or reopened."""
        if connected:
            self._connections += 1
            if self._connections > 1:
                self._notes.print("reconnected", markup=False, style="green")
        elif self._connections and reason != "this client is closed":
            self._notes.print(shown(f"{reason}; reconnecting"), markup=False, style="red")

    def end(self, error: Exception) -> None:
        """End the watch with an error."""
        if not self._over.done():
            self._over.set_exception(error)


@contextmanager
def _reader_watched(gone: Callable[[], object]) -> Iterator[None]:
    """Call `gone` when the program that reads standard output ends, even while there is nothing to write."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = sys.stdout.fileno()
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISFIFO(kind) and not stat.S_ISSOCK(kind):
            raise OSError("not a pipe, so it has no reader")
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and a closed other side are always reported

        def ready() -> None:
            loop.remove_reader(descriptor)
            if poll.poll(0):
                gone()

        loop.add_reader(descriptor, ready)
    except (AttributeError, OSError, ValueError, NotImplementedError):
        # No standard output, or a system without poll: the next write will fail instead.
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


def event_line(event: dict[str, Any]) -> Text:
    """Return an event as a line for people."""
    kind = str(event.get("event_type"))
    line = Text()
    line.append(kind.removeprefix("state:").ljust(8), style=_COLOURS.get(kind, ""))
    line.append(shown(f"{event.get('scope')} / {event.get('key')}  ", keep=""), style="bold")
    if kind != "state:created":
        line.append(_short(event.get("old_value")), style="dim")
    if kind == "state:updated":
        line.append(" -> ")
    if kind not in ("state:deleted", "state:expired"):
        line.append(_short(event.get("new_value")))
    return line


def _short(value: Any) -> str:
    text = json_text(msgspec.json.encode(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
