"""The table of commands, and the entry point `main`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import scopestate
from scopestate.cli.arguments import usage_error
from scopestate.cli.commands import OUTLINES, Outline
from scopestate.cli.terminal import (
    EXIT_CODES,
    Exit,
    errors_to_exit_codes,
    let_go,
    out,
    prepare_output,
    standard_output,
)


class Commands(TyperGroup):
    """The commands. If the output of one cannot be written, the exit codes are the same for all."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {str(outline.name): outline for outline in OUTLINES}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is used."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Outline) else command, rest

    def make_context(self, info_name: Any, args: list[str], *more: Any, **extra: Any) -> Any:
        """Read the arguments. This is where help is printed."""
        self._as_json = "--json" in args
        with _output_may_end(), _wrong_usage(as_json=self._as_json):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        prepare_output()
        with _output_may_end(), _wrong_usage(as_json=self._as_json):
            return super().invoke(ctx)


@contextmanager
def _wrong_usage(*, as_json: bool) -> Iterator[None]:
    """Report wrong usage in the style of the other errors. Typer would print a box, even into a log."""
    try:
        yield
    except _UsageError as error:
        usage_error(error, as_json=as_json)
    except typer.Abort as error:
        # Typer raises it for Ctrl-C at a prompt, and at the end of standard input.
        if isinstance(error.__context__, EOFError):
            usage_error(typer.BadParameter("the question was not answered; --yes answers it"), as_json=as_json)
        raise typer.Exit(Exit.INTERRUPTED) from None


_UsageError: Any = typer.BadParameter.__base__
"""Its name is not public: until 0.26 Typer used Click's class, and now has its own."""


@contextmanager
def _output_may_end() -> Iterator[None]:
    """Turn errors of writing without `out`, as help and rich do, into exit codes."""
    with errors_to_exit_codes(as_json=False):
        try:
            yield
        except OSError as error:
            if error.filename is not None:
                raise
            with standard_output():
                raise


app = typer.Typer(
    name="scopestate",
    invoke_without_command=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Scoped key-value state: serve an engine, call or watch a running one, check configurations and stores.",
    epilog=EXIT_CODES,
    cls=Commands,
)


def _print_version(asked: bool) -> None:
    if asked:
        with errors_to_exit_codes(as_json=False):
            out(f"scopestate {scopestate.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Scoped key-value state: serve an engine, call or watch a running one, check configurations and stores."""
    if context.invoked_subcommand is None:
        from scopestate.cli.start import welcome  # noqa: PLC0415 - not needed by the commands

        welcome()


def main() -> None:
    """Run the command line. The entry point of the console script."""
    prepare_output()
    # With the fixed name that shell completion expects; under `python -m scopestate` it would differ.
    try:
        app(prog_name="scopestate")
    except BrokenPipeError:  # of a completion: the shell has gone on. Commands handle their own.
        let_go(sys.stdout)


if __name__ == "__main__":
    main()
