"""`scopestate` without a command, and `scopestate completion`."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Final, Literal

import typer
from rich.text import Text

# `--show-completion` prints the same scripts. But that option guesses the shell from the parent process.
from typer._completion_shared import get_completion_script

import scopestate
from scopestate.cli.terminal import errors_to_exit_codes, out, print_rich

_FIRST: Final = (
    ("scopestate serve", "start an engine; its state is in memory until you give it a file"),
    ('scopestate set users ada \'{"name": "Ada"}\'', "write a value, from a second terminal"),
    ("scopestate watch", "see each change as it happens"),
)
_MORE: Final = (
    ("scopestate --help", "every command"),
    ("scopestate COMMAND --help", "its options, with examples"),
    ("scopestate completion bash", "completion for the Tab key; also zsh and fish"),
)
_IN_SOURCE: Final = "the folder docs of the source distribution; in Python: help(scopestate)"


def welcome() -> None:
    """Say what this is, which commands come first, and where the documentation is."""
    text = Text.assemble(("scopestate", "bold"), f" {scopestate.__version__}: shared state for Python services\n")
    width = max(len(command) for command, _ in (*_FIRST, *_MORE))
    for heading, commands in (("Begin with", _FIRST), ("Then", _MORE)):
        text.append(f"\n{heading}\n")
        for command, does in commands:
            text.append(f"  {command:<{width}}", "cyan").append(f"  {does}\n")
    text.append(f"\nDocumentation: {documentation()}")
    with errors_to_exit_codes(as_json=False):
        print_rich(text)


def documentation() -> str:
    """Return the address of the documentation, if the installed package names one."""
    try:
        urls = metadata.metadata("scopestate").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # run from source, not installed
        return _IN_SOURCE
    named: dict[str, str] = dict(url.split(", ", 1) for url in urls)
    return named.get("Documentation", _IN_SOURCE)


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.", metavar="bash|zsh|fish")],
) -> None:
    """Print the script that lets a shell complete commands and options.

    bash: eval "$(scopestate completion bash)" in ~/.bashrc

    zsh: eval "$(scopestate completion zsh)" in ~/.zshrc, after compinit

    fish: scopestate completion fish > ~/.config/fish/completions/scopestate.fish
    """
    with errors_to_exit_codes(as_json=False):
        out(get_completion_script(prog_name="scopestate", complete_var="_SCOPESTATE_COMPLETE", shell=shell))
