"""The way into the command line: the command alone, wrong usage, completion in real shells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from commands import PATIENCE_S, Run, in_terminal

import scopestate
from scopestate.cli import start

BIN = Path(sys.executable).parent


def test_the_command_alone_shows_the_way(cli: Run) -> None:
    alone = cli()

    assert alone.code == 0
    assert alone.out.startswith(f"scopestate {scopestate.__version__}: shared state for Python services\n")
    commands = [line.split("  ")[1] for line in alone.out.splitlines() if line.startswith("  scopestate ")]
    assert commands[:3] == ["scopestate serve", 'scopestate set users ada \'{"name": "Ada"}\'', "scopestate watch"]
    assert "Documentation: " in alone.out
    assert len(alone.out.splitlines()) < 20


def test_every_command_that_it_names_exists(cli: Run) -> None:
    named = {command.split()[1] for command, _ in start._FIRST + start._MORE}

    for command in named - {"--help", "COMMAND"}:
        assert cli(command, "--help").code == 0


def test_the_documentation_is_where_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    message = metadata.metadata("scopestate")
    message["Project-URL"] = "Documentation, https://docs.example"  # type: ignore[index]  # an email.message.Message
    monkeypatch.setattr(metadata, "metadata", lambda name: message)
    assert start.documentation() == "https://docs.example"

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert "source distribution" in start.documentation()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gett",), "No such command 'gett'. Did you mean 'get'? See `scopestate --help`"),
        (("set", "s"), "Missing argument 'key'. See `scopestate set --help`"),
        (("get", "s", "k", "--urll", "x"), "No such option: --urll"),
        (("store", "nothing"), "No such command 'nothing'. See `scopestate store --help`"),
        (("set", "s", "k", "word"), """the value is not JSON: JSON is malformed: invalid character (byte 0);"""),
    ],
)
def test_wrong_usage_is_one_line_as_every_error(arguments: tuple[str, ...], said: str, cli: Run) -> None:
    result = cli(*arguments)

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("scopestate: error: ")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_wrong_usage_is_json_for_programs(cli: Run) -> None:
    result = cli("get", "s", "--json")

    assert result.code == 2
    assert result.err == '{"error":{"code":"USAGE","message":"Missing argument \'key\'"}}\n'


def test_a_group_without_a_command_prints_its_help(cli: Run) -> None:
    result = cli("store")

    assert (result.code, result.err) == (2, "")
    assert "verify" in result.out


def test_colours_are_for_terminals_only_and_can_be_refused() -> None:
    colour = re.compile("\x1b\\[[0-9;]*3[0-9]m")
    assert colour.search(in_terminal(NO_COLOR=None))
    assert not colour.search(in_terminal(NO_COLOR="1"))
    piped = subprocess.run(
        [sys.executable, "-m", "scopestate", "gett"], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert b"\x1b" not in piped.stdout + piped.stderr


# ---------------------------------------------------------------------------------------------------------- completion


def shells() -> list[str]:
    """Return the shells of this machine whose completion is tested: bash is on each."""
    return ["bash", *filter(shutil.which, ("zsh", "fish"))]


COMPLETES = {
    "bash": """
eval "$(scopestate completion bash)"
COMP_WORDS=({words}); COMP_CWORD={last}
"$(complete -p scopestate | sed 's/.*-F \\([^ ]*\\).*/\\1/')" scopestate
printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    # `compadd`, by which zsh takes what is offered, works only within its editor: the words come from what it is given.
    "zsh": """
autoload -Uz compinit && compinit -u -d $HOME/.zcompdump
eval "$(scopestate completion zsh)"
print -r -- ${{_comps[scopestate]}}
words=({words}); CURRENT={next}
_arguments() {{ print -rl -- "$@" }}
_files() {{ print -r -- files }}
${{_comps[scopestate]}}
""",
    "fish": """
scopestate completion fish | source
complete --do-complete '{line}'
""",
}


def complete(shell: str, line: str, home: Path) -> str:
    """Have a shell complete a line, and return what it offers."""
    words = line.split()
    script = COMPLETES[shell].format(words=" ".join(words), last=len(words) - 1, next=len(words), line=line)
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *flags, "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"},
        check=False,
    )
    assert "rror" not in done.stderr, done.stderr
    return done.stdout


def test_a_shell_that_no_longer_reads_a_completion_gets_no_traceback() -> None:
    asked = {"_SCOPESTATE_COMPLETE": "complete_bash", "COMP_WORDS": "scopestate ", "COMP_CWORD": "1"}
    nobody_reads, writing = os.pipe()
    os.close(nobody_reads)
    try:
        done = subprocess.run(
            [str(BIN / "scopestate")],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
            env=os.environ | asked,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", shells())
def test_a_shell_completes_commands_and_options(shell: str, tmp_path: Path) -> None:
    commands = complete(shell, "scopestate dea", tmp_path)
    assert "dead-letters" in commands
    assert "watch" not in commands

    assert "replay" in complete(shell, "scopestate dead-letters re", tmp_path)
    assert "--snapshot" in complete(shell, "scopestate watch --sn", tmp_path)


def test_another_shell_is_wrong_usage(cli: Run) -> None:
    assert cli("completion", "csh").code == 2
