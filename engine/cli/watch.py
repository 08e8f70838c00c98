"""The command `watch`: print each change as it happens."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.text import Text

from scopestate.cli.client import CaFile, Token, Url, with_client
from scopestate.cli.terminal import (
    AsJson,
    ReaderGone,
    given_text,
    json_text,
    out,
    print_rich,
    shown,
    standard_error,
)
from scopestate.errors import Forbidden, RemoteFailure, ScopestateError
from scopestate.wire.client import Client
from scopestate.wire.options import DEFAULT_URL

FOREVER_S: Final = 86_400.0 * 365
_KINDS: Final = ["created", "updated", "deleted", "expired"]
"""Named, because a worker that names no kinds gets `state:deleted` for a key that has expired."""

_COLOURS: Final = {
    "state:created": "green",
    "state:updated": "yellow",
    "state:deleted": "red",
    "state:expired": "magenta",
}


def watch(
    scope: Annotated[str | None, typer.Option("--scope", "-s", help="Only this scope.")] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="Only this key.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after this many events; 0: no limit.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Print each change as it happens, on one line, until interrupted.

    On a terminal the lines are for people; in a pipe, or with --json, each is the event as JSON. If the connection is
    lost, the command reconnects and says so on standard error: changes in between are not shown.
    """
    given = {"scope": scope, "key": key}
    filters: dict[str, Any] = {
        name: given_text(value, f"--{name}") for name, value in given.items() if value is not None
    }
    filters["events"] = _KINDS
    readable = sys.stdout is not None and sys.stdout.isatty() and not as_json
    watched = _Watch(filters, count, readable=readable)
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


class _Watch:
    """A watch: prints events until there are enough, the trigger is refused, or the output has no reader."""

    def __init__(self, filters: dict[str, Any], count: int, *, readable: bool) -> None:
        """`count`: events to print before it ends; 0: no limit."""
        self._filters = filters
        self._count = count
        self._readable = readable
        self._notes = standard_error()
        self._printed = 0
        self._connections = 0

    @cached_property
    def _over(self) -> asyncio.Future[None]:
        """Done when the watch is over. Made on the event loop."""
        return asyncio.get_running_loop().create_future()

    async def follow(self, client: Client) -> None:
        """Register the trigger and wait for the end of the watch."""
        function_id = f"scopestate::watch::{os.urandom(8).hex()}"
        client.register_function(function_id, self._on_event, description="scopestate watch", ordered=True)
        client.register_trigger("state", function_id, self._filters)
        # The server handles messages in order: once it answers this call, the trigger is in place
        # (docs/protocol.md, section 1, "Order"). A refusal is an answer too.
        try:
            await client.call_raw("engine::functions::list", b"{}")
        except RemoteFailure as error:
            if error.code != Forbidden.code:
                raise
        if not self._over.done():
            self._notes.print(f"watching {client.url}", markup=False, style="dim")
        with _reader_watched(lambda: self.end(ReaderGone())):
            await self._over

    async def _on_event(self, payload: bytes) -> bytes | None:
        if self._over.done():
            return None
        try:
            if self._readable:
                print_rich(event_line(msgspec.json.decode(payload)))
            else:
                out(json_text(payload))
        except (ReaderGone, ScopestateError) as error:
            self.end(error)
            return None
        self._printed += 1
        if self._printed == self._count:
            self._over.set_result(None)
        return None

    def on_change(self, connected: bool, reason: str) -> None:
        """Report a connection that was lost or made again."""
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
        # No standard output, or a system without poll: the next write will notice.
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
