"""`scopestate console`: the web console of a running engine, or of the engine of a file, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson
from scopestate.cli.client import CaFile, Token
from scopestate.wire.address import DEFAULT_URL


def console(
    source: Annotated[
        str,
        typer.Argument(
            metavar="[FILE | URL]",
            envvar="SCOPESTATE_URL",
            show_envvar=False,
            help="Configuration file (.yaml), or address of a running engine: ws://, wss:// or ws+unix:///path.",
        ),
    ] = DEFAULT_URL,
    write: Annotated[bool, typer.Option("--write", "-w", help="Let the console change the state.")] = False,
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port on this machine; 0: any free port.")
    ] = 0,
    open_browser: Annotated[bool, typer.Option("--open", "-o", help="Open the address in a browser.")] = False,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Show an engine in a browser on this machine, until SIGINT, SIGTERM or SIGHUP.

    It prints an address that admits one browser, once. At a terminal, Enter prints another address. Without --write the
    console changes nothing. With a FILE whose directory a running engine has open, that engine is shown; otherwise the
    command opens it, without the functions and triggers of the file.
    """
    from scopestate.cli import console_work  # noqa: PLC0415 - help and completion do not need it

    console_work.console(source, port, token, ca_file, write=write, open_browser=open_browser, as_json=as_json)
