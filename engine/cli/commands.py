"""The table of commands: the name of each, and what it does in one sentence."""

from __future__ import annotations

import importlib
from typing import Any, Final

import typer
from typer.core import TyperCommand

from scopestate.cli.terminal import EXIT_CODES


class Outline(TyperCommand):
    """What the list of commands and the completion of names show about a command.

    Its module is imported when the command is used: importing all of them takes most of a second.
    """

    def __init__(self, name: str, place: str, does: str, panel: str | None = None, *, takes_json: bool = False) -> None:
        """`place`: module in `scopestate.cli`, and name in it. `takes_json`: an argument -5 is not an option."""
        super().__init__(name, help=does, rich_help_panel=panel)
        self._name = name
        self._place = place
        self._settings = {"ignore_unknown_options": True} if takes_json else {}

    def load(self) -> Any:
        """Import the command, and return it as Typer makes it: from a function, or from a `Typer` with commands."""
        module, _, attribute = self._place.partition(":")
        found = getattr(importlib.import_module(f"scopestate.cli.{module}"), attribute)
        parent = typer.Typer()
        if isinstance(found, typer.Typer):
            parent.add_typer(found, name=self._name)
        else:
            parent.command(self._name, epilog=EXIT_CODES, context_settings=self._settings)(found)
        return typer.main.get_group(parent).commands[self._name]


_ENGINE: Final = "A running engine"
_FILES: Final = "Files"

OUTLINES: Final = (
    Outline("serve", "serve:serve", "Serve an engine to workers and bridges until SIGINT, SIGTERM or SIGHUP."),
    Outline(
        "console", "console:console", "Show an engine in a browser on this machine, until SIGINT, SIGTERM or SIGHUP."
    ),
    Outline("get", "state:get", "Print the value of a key. Exit code 6 if it does not exist.", _ENGINE),
    Outline(
        "set",
        "state:set_",
        "Set a key and print the old and the new value, with the revision if an option is given.",
        _ENGINE,
        takes_json=True,
    ),
    Outline("delete", "state:delete", "Delete a key and print the value it had; nothing if it did not exist.", _ENGINE),
    Outline(
        "update",
        "state:update",
        "Apply ops to a value in one step, and print the old and the new value. Exit code 1 if an op was refused.",
        _ENGINE,
    ),
    Outline(
        "touch",
        "state:touch",
        "Give a key another deadline, or none. Its value stays, and no event fires. Exit code 6 if it does not exist.",
        _ENGINE,
    ),
    Outline(
        "transaction",
        "state:transaction",
        "Write several keys of a scope in one step, or none of them, and print what was done.",
        _ENGINE,
    ),
    Outline(
        "keys",
        "state:keys",
        "Print the keys of a scope, each as JSON text on a line of its own, in the order of their UTF-8 bytes.",
        _ENGINE,
    ),
    Outline(
        "entries",
        "state:entries",
        "Print the keys of a scope with value, revision and deadline, each as JSON on a line of its own, in order.",
        _ENGINE,
    ),
    Outline("count", "state:count", "Print how many keys a scope has.", _ENGINE),
    Outline(
        "delete-range",
        "state:delete_range",
        'Delete the keys of a range, and print their number. --prefix "" is the whole scope.',
        _ENGINE,
    ),
    Outline(
        "list",
        "state:list_",
        "Print all values of a scope as a JSON array, in the order in which their keys were first set.",
        _ENGINE,
    ),
    Outline("list-groups", "state:list_groups", "Print the names of the scopes that hold at least one key.", _ENGINE),
    Outline(
        "call",
        "state:call",
        "Call a function and print its result as JSON; nothing if there is no value.",
        _ENGINE,
        takes_json=True,
    ),
    Outline("watch", "watch:watch", "Print each change as it happens, on one line, until interrupted.", _ENGINE),
    Outline(
        "workers",
        "listing:workers",
        "Print the workers that are connected to a running engine: name, runtime, functions, calls that they run.",
        _ENGINE,
    ),
    Outline(
        "functions",
        "listing:functions",
        "Print the functions of a running engine, with what they do: its own, the program's and those of workers.",
        _ENGINE,
    ),
    Outline(
        "triggers",
        "listing:triggers",
        "Print the triggers of a running engine: which function runs for which events.",
        _ENGINE,
    ),
    Outline(
        "top",
        "top:top",
        "Show an engine live: health, calls per second, scopes by size and rate, saves, consumers, workers.",
        _ENGINE,
    ),
    Outline("completion", "start:completion", "Print the script that lets a shell complete commands and options."),
    Outline(
        "consumers",
        "consumers:consumers",
        "Consumers of durable triggers: list, pause, resume and forget them.",
        _ENGINE,
    ),
    Outline(
        "dead-letters",
        "consumers:dead_letters",
        "Dead letters, events that a consumer has given up: list, show, replay and purge them.",
        _ENGINE,
    ),
    Outline("config", "config:app", "Check a configuration file, or show what it means.", _FILES),
    Outline("store", "store:app", "Show what a store holds, check it, copy it as JSON lines.", _FILES),
    Outline("cache", "cache:app", "Import the entries of another cache into a scopestate cache.", _FILES),
)
