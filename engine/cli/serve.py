"""`scopestate serve`: its arguments. The work is in `serving`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson
from scopestate.cli.serving import Level, run


def serve(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; without it: state in memory, default address.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on, instead of the file's.")] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", min=0, max=65535, help="Port, instead of the file's; 0: any free port."),
    ] = None,
    log_level: Annotated[Level, typer.Option("--log-level", help="What to log on standard error.")] = "info",
    as_json: AsJson = False,
) -> None:
    """Serve an engine to workers and bridges until SIGINT, SIGTERM or SIGHUP.

    It then stops gracefully: fired events reach their handlers, and everything is saved. A second signal stops it at
    once. Changes to the file apply while it runs. With --json, a line of JSON on standard output says where it listens.
    """
    run(config, host, port, log_level, as_json=as_json)
