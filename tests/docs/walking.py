"""Follows a page as a reader does: saves its files, runs its commands, and compares what they print.

A block ```LANGUAGE NAME is saved as the file NAME. A block ```sh is run, line by line. A block ```text output after it
is what the commands have printed; `...` stands for any text. `uvicorn` and `curl -N` keep running in the background:
the former until the next server or the end of the walk, the latter until it has printed what the page shows.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ports import free_port
from reliability.living import untraced_environment

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200.0
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"(?:mkdir|cd|python3? -m venv|source|pip install) ")
PORT = "8000"
"""The port that pages use. A walk takes a free one."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    name: str
    text: str
    place: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, each with its line."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match["language"], match["name"] or "", match["text"], f"{page.name}:{line}")


def has_commands(page: Path) -> bool:
    """Return whether a page shows what its commands print."""
    found = list(blocks(page))
    return any(
        one.language == "sh" and (two.language, two.name) == ("text", "output")
        for one, two in itertools.pairwise(found)
    )


class Walk:
    """One reader in one folder. Leave it by `close()`, which stops the server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = str(free_port())
        self._server: subprocess.Popen[str] | None = None
        self._log: list[str] = []
        self._environment = untraced_environment()
        for name in [name for name in self._environment if name.startswith("PYTEST_")]:
            del self._environment[name]  # of the run that this walk is part of
        self._environment |= {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), self._environment.get("PATH", ""))),
            "PYTEST_ADDOPTS": "-p no:asyncio",  # it warns of each project that does not set it up
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def follow(self, page: Path) -> None:
        """Do everything that the page says. Raises AssertionError with the place at the first difference."""
        printed = before = ""
        streamed: str | None = None
        for block in blocks(page):
            if block.language == "sh":
                printed, streamed = "", None
                for line in block.text.splitlines():
                    command = line.replace(PORT, self._port)
                    if "curl" in command and " -N " in command:
                        streamed = command
                    else:
                        printed += self._run(command, block.place)
            elif (block.language, block.name) == ("text", "output"):
                if before != "sh":
                    continue  # what a block of Python prints, which tests/test_docs.py runs
                expected = block.text.replace(PORT, self._port)
                if streamed is not None:
                    printed = self._stream(streamed, len(expected.splitlines()))
                assert _matches(expected, printed), (
                    f"{block.place} shows\n{expected}\nand what is printed is\n{printed}"
                )
                printed = ""
            elif block.name:
                self.save([block])
            before = block.language

    def save(self, files: Iterable[Block]) -> None:
        """Save the files among these blocks."""
        for block in files:
            if block.name and block.language != "text":
                (self._folder / block.name).write_text(block.text.replace(PORT, self._port), encoding="utf-8")

    def serve(self, command: str) -> str:
        """Start a web server in place of the last one, and return its address when it takes requests."""
        self.close()
        self._log = []
        self._server = subprocess.Popen(
            [*shlex.split(command), "--port", self._port],
            cwd=self._folder, env=self._environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started = threading.Event()
        threading.Thread(target=self._read_log, args=(self._server, started), daemon=True).start()
        assert started.wait(PATIENCE_S), f"{command} does not start"
        assert self._server.poll() is None, f"{command}: {''.join(self._log)}"
        return f"http://127.0.0.1:{self._port}"

    def close(self) -> None:
        """Stop the server, as Ctrl-C does."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            try:
                self._server.wait(PATIENCE_S)
            finally:
                if self._server.poll() is None:
                    os.killpg(self._server.pid, signal.SIGKILL)
            self._server = None

    def _run(self, command: str, place: str) -> str:
        words = shlex.split(command, comments=True)
        if not words:
            return ""
        if SET_UP.match(command):
            _check_extras(words)
            return ""
        if words[0] == "uvicorn":
            self.serve(command)
            return ""
        done = subprocess.run(
            command, shell=True, cwd=self._folder, env=self._environment,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        failed = done.returncode != 0 and done.stderr  # a program that ends with another status on purpose says nothing
        assert not failed, f"{place}: {command}: {done.stderr}"
        printed = done.stdout
        return printed if not printed or printed.endswith("\n") else printed + "\n"

    def _read_log(self, server: subprocess.Popen[str], started: threading.Event) -> None:
        assert server.stderr is not None
        with server.stderr as log:
            for line in log:
                self._log.append(line)
                if "Application startup complete" in line:
                    started.set()
        started.set()  # it has ended

    def _stream(self, command: str, lines: int) -> str:
        """Return the first lines of a command that does not end on its own."""
        with subprocess.Popen(
            shlex.split(command), cwd=self._folder, env=self._environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                return "".join(process.stdout.readline() for _ in range(lines))
            finally:
                process.kill()


def _matches(expected: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, printed) is not None


def _check_extras(words: list[str]) -> None:
    """Fail if a command installs an extra that does not exist."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        known = set(tomllib.load(file)["project"]["optional-dependencies"])
    for word in words:
        if found := re.fullmatch(r"scopestate\[(.+)\]", word):
            assert set(found[1].split(",")) <= known, word
