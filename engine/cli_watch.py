"""`scopestate watch`: changes as they happen."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from scopestate.cli_common import FOREVER_S, AsJson, CaFile, Token, Url, out, standard_error, with_client
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
    readable = sys.stdout.isatty() and not as_json
    console = Console(highlight=False, soft_wrap=True)
    notes = standard_error()
    filters = {name: value for name, value in (("scope", scope), ("key", key)) if value is not None}

    async def follow(client: Client) -> None:
        enough = asyncio.Event()
        seen = 0

        async def on_event(payload: bytes) -> bytes | None:
            nonlocal seen
            if not enough.is_set():
                seen += 1
                if readable:
                    console.print(_line(msgspec.json.decode(payload)))
                else:
                    out(payload.decode())
                if seen == count:
                    enough.set()
            return None

        function_id = f"scopestate::watch::{os.urandom(8).hex()}"
        client.register_function(function_id, on_event, description="scopestate watch", ordered=True)
        client.register_trigger("state", function_id, filters)
        # Once this is answered, the trigger is in place (PROTOCOL, section 1, "Order").
        await client.call_raw("engine::functions::list", b"{}")
        notes.print(f"watching {client.url}", markup=False, style="dim")
        await enough.wait()

    def on_change(connected: bool, reason: str) -> None:
        if not connected and reason != "this client is closed":
            notes.print(f"{reason}; connecting again", markup=False, style="red")
        elif connected and on_change.once:  # type: ignore[attr-defined]
            notes.print("connected again", markup=False, style="green")
        on_change.once = True  # type: ignore[attr-defined]

    on_change.once = False  # type: ignore[attr-defined]
    with_client(url, token, follow, as_json=as_json, timeout_s=FOREVER_S, ca_file=ca_file, on_change=on_change)


def _line(event: dict[str, Any]) -> Text:
    kind = str(event.get("event_type"))
    line = Text()
    line.append(kind.removeprefix("state:").ljust(8), style=_COLOURS.get(kind, ""))
    line.append(f"{event.get('scope')} / {event.get('key')}  ", style="bold")
    if kind != "state:created":
        line.append(_short(event.get("old_value")), style="dim")
    if kind == "state:updated":
        line.append(" -> ")
    if kind != "state:deleted":
        line.append(_short(event.get("new_value")))
    return line


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}..."
