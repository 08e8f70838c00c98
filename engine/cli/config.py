"""`scopestate config`: check a configuration file, show what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson

app = typer.Typer(no_args_is_help=True, help="Check a configuration file, or show what it means.")


@app.command("check")
def check_(
    file: Annotated[Path, typer.Argument(help="The YAML file.")],
    registered_later: Annotated[
        bool,
        typer.Option(
            "--registered-later", help="Triggers may name functions that workers or the program register later."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report every mistake in a file, with line and key. Exit code 3 if there are any.

    Mistakes are what `serve` refuses, and triggers for functions that are not in the file, for which `serve` only logs
    a warning. The functions that the file names are imported, from the current folder too.
    """
    from scopestate.cli import config_work  # noqa: PLC0415 - help and completion do not need it

    config_work.check(file, registered_later=registered_later, as_json=as_json)


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="The YAML file; without it, the built-in defaults.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a configuration as the engine reads it: variables expanded, defaults filled in, secrets masked."""
    from scopestate.cli import config_work  # noqa: PLC0415 - help and completion do not need it

    config_work.show(file, as_json=as_json)
