"""Running commands, for the tests of the command line."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from typer.testing import CliRunner

from scopestate.cli.app import app

PATIENCE_S = 60.0


class Result:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process. An exception that is not the command's own way to end fails the test."""
    result = CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def in_terminal(*arguments: str, **environment: str | None) -> str:
    """Run a command in a terminal, and return what was printed there. None: a variable is not set."""
    wanted = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50", **environment}
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "scopestate", *arguments]
    with subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={name: value for name, value in wanted.items() if value is not None},
    ) as process:
        os.close(slave)
        told = b""
        try:
            while piece := os.read(master, 65536):
                told += piece
        except OSError:
            pass  # Linux says so when the last program that has the terminal open has ended
        finally:
            os.close(master)
        process.wait(PATIENCE_S)
    return told.decode()


class Program:
    """A command as a program of its own."""

    started: ClassVar[list[Program]] = []

    def __init__(self, *arguments: str, cwd: Path | None = None, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scopestate", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "200", **environment},
        )
        Program.started.append(self)

    def line(self) -> str:
        """Wait for the next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def error_line(self) -> str:
        """Wait for the next line that it prints on standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip("\n")

    def signal(self, number: int) -> Result:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> Result:
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return Result(self.process.returncode, out, err)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate(timeout=PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
