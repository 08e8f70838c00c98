"""`scopestate top`: the figures of an engine, live."""

from __future__ import annotations

from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson
from scopestate.cli.client import CaFile, Token, Url
from scopestate.wire.address import DEFAULT_URL


def top(
    where: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHERE]",
            help="Directory of a store, a configuration file (.yaml), or the address of a running engine (ws://...) or "
            "of Redis (redis://...); without it, the engine at --url.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, max=3600, help="Seconds between readings.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the figures of one interval and end.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Show an engine live: health, calls per second, scopes by size and rate, saves, consumers, workers.

    Needs the extra `tui`; --once does not, nor does a pipe, which gets one JSON object. Keys: q quits, ? shows the
    others. If the engine goes away, the view waits until it is back.
    """
    from scopestate.cli import top_work  # noqa: PLC0415 - help and completion do not need it

    top_work.top(where, interval, url, token, ca_file, once=once, as_json=as_json)
