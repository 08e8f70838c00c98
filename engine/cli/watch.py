"""`scopestate watch`: changes as they happen."""

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

from scopestate.cli.common import (
    FOREVER_S,
    AsJson,
    CaFile,
    ReaderGone,
    Token,
    Url,
    given_text,
    json_text,
    out,
    print_rich,
    shown,
    standard_error,
    with_client,
)
from scopestate.errors import Forbidden, RemoteFailure, ScopestateError
from scopestate.wire.client import Client
from scopestate.wire.options import DEFAULT_URL

_COLOURS: Final = {"state:created": "green", "state:updated": "yellow", "state:deleted": "red"}


def watch(
    scope: Annotated[str | None, typer.Option("--scope", "-s", help="Only this scope.")] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="Only this key.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many events; 0: never.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Print every change as it happens, one line each, until interrupted.

    At a terminal the lines are for people; in a pipe, or with --json, each is the event as JSON. A lost connection is
    made again, which standard error tells: changes in between are not shown.
    """
    readable = sys.stdout is not None and sys.stdout.isatty() and not as_json
    notes = standard_error()
    filters = {
        name: given_text(value, f"--{name}") for name, value in (("scope", scope), ("key", key)) if value is not None
    }

    seen = _Seen(count)

    async def follow(client: Client) -> None:
        async def on_event(payload: bytes) -> bytes | None:
            if not seen.enough.done():
                try:
                    if readable:
                        print_rich(event_line(msgspec.json.decode(payload)))
                    else:
                        out(json_text(payload))
                except (ReaderGone, ScopestateError) as error:
                    seen.end(error)
                else:
                    seen.one_more()
            return None

        function_id = f"scopestate::watch::{os.urandom(8).hex()}"
        client.register_function(function_id, on_event, description="scopestate watch", ordered=True)
        client.register_trigger("state", function_id, filters)
        # Once this is answered, be it with a refusal, the trigger is in place (docs/protocol.md, section 1, "Order").
        try:
            await client.call_raw("engine::functions::list", b"{}")
        except RemoteFailure as error:
            if error.code != Forbidden.code:
                raise
        if not seen.enough.done():
            notes.print(f"watching {client.url}", markup=False, style="dim")
        with _reader_watched(lambda: seen.end(ReaderGone())):
            await seen.enough

    def on_change(connected: bool, reason: str) -> None:
        if connected:
            seen.connections += 1
            if seen.connections > 1:
                notes.print("connected again", markup=False, style="green")
        elif seen.connections and reason != "this client is closed":
            notes.print(shown(f"{reason}; connecting again"), markup=False, style="red")

    with_client(
        url,
        token,
        follow,
        as_json=as_json,
        timeout_s=FOREVER_S,
        ca_file=ca_file,
        on_change=on_change,
        on_trigger_refused=seen.end,
    )


class _Seen:
    """How many events came, and the end of the watch: enough of them, or a refusal."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._came = 0
        self.connections = 0

    @cached_property
    def enough(self) -> asyncio.Future[None]:
        """Done when the watch is over. Made on the event loop."""
        return asyncio.get_running_loop().create_future()

    def one_more(self) -> None:
        self._came += 1
        if self._came == self._wanted:
            self.enough.set_result(None)

    def end(self, error: Exception) -> None:
        if not self.enough.done():
            self.enough.set_exception(error)


@contextmanager
def _reader_watched(gone: Callable[[], object]) -> Iterator[None]:
    """Call `gone` when the program that reads standard output ends, even if there is nothing to write."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = sys.stdout.fileno()
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISFIFO(kind) and not stat.S_ISSOCK(kind):
            raise OSError("not a pipe: nothing reads it")
        look = select.poll()
        look.register(descriptor, 0)  # errors and the end of the other side are always told

        def ready() -> None:
            loop.remove_reader(descriptor)
            if look.poll(0):
                gone()

        loop.add_reader(descriptor, ready)
    except (AttributeError, OSError, ValueError, NotImplementedError):
        # No standard output, or a system that cannot tell: the next line that is written will.
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
    if kind != "state:deleted":
        line.append(_short(event.get("new_value")))
    return line


def _short(value: Any) -> str:
    text = json_text(msgspec.json.encode(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
