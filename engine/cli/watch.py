"""The command `watch`: print each change as it happens."""

from __future__ import annotations

from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson
from scopestate.cli.client import CaFile, Token, Url
from scopestate.wire.address import DEFAULT_URL


def watch(
    scope: Annotated[str | None, typer.Option("--scope", "-s", help="Only this scope.")] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="Only this key.")] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", "-p", help="Only keys with this prefix.", metavar="TEXT")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Begin after this cursor, not now.", metavar="CURSOR")
    ] = None,
    snapshot: Annotated[bool, typer.Option("--snapshot", help="Begin with the current values; needs --scope.")] = False,
    resync: Annotated[
        bool,
        typer.Option("--resync", help="If changes are gone, continue with the current values; needs --scope."),
    ] = False,
    cursors: Annotated[
        bool, typer.Option("--cursors", "-c", help="Include the cursor and the revision of each change.")
    ] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after this many events; 0: no limit.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Print each change as it happens, on one line, until interrupted.

    On a terminal the lines are for people; in a pipe, or with --json, each is the event as JSON. If the connection is
    lost, the command reconnects and continues after the last change that it printed. If changes in between are gone,
    it ends with exit code 8, or, with --resync, prints all current values.

    An engine that cannot tell what was missed, such as iii, can be watched as well: changes without a connection are
    not shown then, which standard error says.
    """
    from scopestate.cli import watch_work  # noqa: PLC0415 - help and completion do not need it

    watch_work.watch(
        scope,
        key,
        prefix,
        since,
        count,
        url,
        token,
        ca_file,
        snapshot=snapshot,
        resync=resync,
        cursors=cursors,
        as_json=as_json,
    )
