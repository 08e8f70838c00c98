"""Which modules the commands import: no slow ones that they do not need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import typer
from commands import PATIENCE_S

from scopestate.cli.app import app
from scopestate.cli.commands import OUTLINES
from scopestate.server.server import Server

SLOW = {
    "asyncio",
    "picows",
    "pykka",
    "rich.console",
    "rich.live",
    "rich.markdown",
    "pydantic",
    "scopestate.config",
    "scopestate.engine",
    "scopestate.server",
    "scopestate.wire.client",
    "sqlite3",
    "ssl",
    "textual",
    "typer",
    "watchdog.observers",
    "websockets",
    "yaml",
}
"""Modules that take 5 ms or more, or stand for packages that do."""
TYPER = {"pydantic", "typer"}
"""What every command but `serve` is read with; Typer may need Pydantic."""
RICH_HELP = {"rich.console", "rich.live", "rich.markdown"}
"""What Typer needs to print help."""


PROGRAM = """
import atexit, sys
before = {*sys.modules}  # coverage, if it measures, has imported some
atexit.register(lambda: print("modules:", *(name for name in sys.modules if name not in before), file=sys.stderr))
from scopestate.__main__ import main
main()
"""


def imported(told: str) -> set[str]:
    """Return the modules that PROGRAM has listed."""
    return set(told.rpartition("modules:")[2].split())


def imported_by(*arguments: str, **environment: str) -> set[str]:
    """Run a command, and return the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return imported(done.stderr)


def commands_among(modules: set[str]) -> set[str]:
    """Return the modules of the command line that belong to single commands."""
    shared = {"app", "arguments", "client", "commands", "current_folder", "notes", "offline", "people", "terminal"}
    of_commands = {name.removeprefix("scopestate.cli.") for name in modules if name.startswith("scopestate.cli.")}
    return of_commands - shared


@pytest.mark.parametrize(
    ("arguments", "commands", "slow"),
    [
        (("--help",), set(), RICH_HELP),
        (("--version",), set(), set()),
        (("get", "--help"), {"state"}, RICH_HELP),
        (("serve", "--help"), {"serve", "serve_line", "serving"}, RICH_HELP),
        (("consumers", "--help"), {"consumers"}, RICH_HELP),
        (("config", "check", "--help"), {"config"}, RICH_HELP),
        (("store", "info", "--help"), {"store"}, RICH_HELP),
        (("cache", "import-diskcache", "--help"), {"cache"}, RICH_HELP),
        (("top", "--help"), {"top"}, RICH_HELP),
        (("watch", "--help"), {"watch"}, RICH_HELP),
        (("console", "--help"), {"console"}, RICH_HELP),
        (("workers", "--help"), {"listing"}, RICH_HELP),
        (("completion", "bash"), {"start"}, set()),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_a_command_imports_only_what_it_needs(arguments: tuple[str, ...], commands: set[str], slow: set[str]) -> None:
    modules = imported_by(*arguments)

    assert commands_among(modules) == commands
    assert modules & SLOW <= slow | TYPER


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("scopestate ", set()),
        ("scopestate store migrate --", {"store"}),
        ("scopestate get --", {"state"}),
        ("scopestate serve --", {"serve", "serving"}),
    ],
)
def test_the_tab_key_imports_only_the_command_of_the_line(line: str, commands: set[str]) -> None:
    words = line.split(" ")

    modules = imported_by(
        _SCOPESTATE_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1)
    )

    assert commands_among(modules) == commands
    assert modules & SLOW <= TYPER


def test_a_call_needs_a_connection_and_no_engine(server: Server) -> None:
    server.engine.set("users", "ada", 1)

    modules = imported_by("get", "users", "ada")

    assert commands_among(modules) == {"state"}
    assert (modules & SLOW) - TYPER == {"asyncio", "scopestate.wire.client", "ssl", "websockets"}


def test_a_server_needs_no_client_and_no_terminal() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "url" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE_S)
    modules = imported(told)

    assert commands_among(modules) == {"serve_line", "serving"}
    assert modules & SLOW <= {"asyncio", "picows", "pykka", "scopestate.config", "scopestate.engine"} | {
        "scopestate.server",
        "ssl",
        "yaml",
    }


def test_lists_show_of_each_command_what_it_says_of_itself() -> None:
    for outline in OUTLINES:
        first = (outline.load().help or "").partition("\n\n")[0].replace("\n", " ")
        assert outline.help == first


def test_each_command_is_listed() -> None:
    group = typer.main.get_command(app)

    assert list(group.commands) == [outline.name for outline in OUTLINES]  # type: ignore[attr-defined]  # a group
