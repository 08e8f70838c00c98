"""The table of commands, and the entry point `main`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import scopestate
from scopestate.cli import cache, config, consumers, listing, start, state, store, top, watch
from scopestate.cli.console import console
from scopestate.cli.serve import serve
from scopestate.cli.terminal import (
    EXIT_CODES,
    Exit,
    errors_to_exit_codes,
    out,
    prepare_output,
    standard_output,
    usage_error,
)


class Commands(TyperGroup):
    """The commands. If the output of one cannot be written, the exit codes are the same for all."""

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
            usage_error(typer.BadParameter("the question got no answer; --yes answers it"), as_json=as_json)
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

_ENGINE = "A running engine"
_FILES = "Files"

app.command("serve")(serve)
app.command("console", epilog=EXIT_CODES)(console)
_NEGATIVE = {"ignore_unknown_options": True}
"""For commands that take JSON, in which -5 is a number and not an option."""
for _name, _function, _settings in (
    ("get", state.get, {}),
    ("set", state.set_, _NEGATIVE),
    ("delete", state.delete, {}),
    ("update", state.update, {}),
    ("touch", state.touch, {}),
    ("transaction", state.transaction, {}),
    ("keys", state.keys, {}),
    ("entries", state.entries, {}),
    ("count", state.count, {}),
    ("delete-range", state.delete_range, {}),
    ("list", state.list_, {}),
    ("list-groups", state.list_groups, {}),
    ("call", state.call, _NEGATIVE),
    ("watch", watch.watch, {}),
    ("workers", listing.workers, {}),
    ("functions", listing.functions, {}),
    ("triggers", listing.triggers, {}),
):
    app.command(_name, rich_help_panel=_ENGINE, epilog=EXIT_CODES, context_settings=_settings)(_function)
app.command("top", rich_help_panel=_ENGINE, epilog=EXIT_CODES)(top.top)
app.add_typer(consumers.consumers, name="consumers", rich_help_panel=_ENGINE)
app.add_typer(consumers.dead_letters, name="dead-letters", rich_help_panel=_ENGINE)
app.add_typer(config.app, name="config", rich_help_panel=_FILES)
app.add_typer(store.app, name="store", rich_help_panel=_FILES)
app.add_typer(cache.app, name="cache", rich_help_panel=_FILES)
app.command("completion")(start.completion)


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
        start.welcome()


def main() -> None:
    """Run the command line. The entry point of the console script."""
    prepare_output()
    # With the fixed name that shell completion expects; under `python -m scopestate` it would differ.
    app(prog_name="scopestate")


if __name__ == "__main__":
    main()
