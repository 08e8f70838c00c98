"""The command `scopestate`: serve an engine, call one, watch one, look after its files. Needs the extra `cli`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from scopestate import cli_calls, cli_config, cli_store
from scopestate.cli_common import EXIT_CODES, Exit
from scopestate.cli_serve import serve
from scopestate.cli_watch import watch

app = typer.Typer(
    name="scopestate",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Scoped key-value state: serve an engine, call one, watch one, look after its files.",
    epilog=EXIT_CODES,
)

_ENGINE = "A running engine"
_FILES = "Files"

app.command("serve")(serve)
_NEGATIVE = {"ignore_unknown_options": True}
"""For commands that take JSON: -5 is a number there, not an option."""
for _name, _function, _settings in (
    ("get", cli_calls.get, {}),
    ("set", cli_calls.set_, _NEGATIVE),
    ("delete", cli_calls.delete, {}),
    ("update", cli_calls.update, {}),
    ("list", cli_calls.list_, {}),
    ("list-groups", cli_calls.list_groups, {}),
    ("call", cli_calls.call, _NEGATIVE),
    ("watch", watch, {}),
):
    app.command(_name, rich_help_panel=_ENGINE, epilog=EXIT_CODES, context_settings=_settings)(_function)
app.add_typer(cli_config.app, name="config", rich_help_panel=_FILES)
app.add_typer(cli_store.app, name="store", rich_help_panel=_FILES)


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"scopestate {installed_version()}\n")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Scoped key-value state: serve an engine, call one, watch one, look after its files."""


def installed_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("scopestate")
    except PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """Run the command line; for the console script."""
    try:
        app()
    except BrokenPipeError:
        # Whoever read our output has gone, as in `scopestate watch | head`. Python would complain at exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)


if __name__ == "__main__":
    main()
