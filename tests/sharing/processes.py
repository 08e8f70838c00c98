"""Processes that share a directory: what the tests of sharing have in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scopestate import Engine

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""


def shared(directory: Path | str, *, durability: str = "commit", **options: Any) -> dict[str, Any]:
    """Return the configuration of an engine on `directory`; a section such as `limits` or `scopes` goes beside it."""
    sections = {name: options.pop(name) for name in ("limits", "scopes", "triggers", "functions") if name in options}
    kv = {"store_method": "file_based", "file_path": str(directory), "durability": durability, **options}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}], **sections}


def wait_until(true: Callable[[], object], what: str = "") -> None:
    """Wait until `true()` is."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, what or "it did not happen in time"
        pause.wait(0.002)


def role_of(engine: Engine) -> str:
    """Return `owner` or `follower`."""
    status = engine.stats().sharing
    assert status is not None
    return status.role


class Process:
    """Another process with an engine on a directory. It executes commands: see `sharing_process.py`."""

    def __init__(self, directory: Path | str, *, wait: bool = True, **options: Any) -> None:
        self._program = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("sharing_process.py")),
                json.dumps(shared(directory, **options)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )
        self.pid = self._program.pid
        self.role = ""
        """`owner` or `follower` when it had opened its engine; otherwise the error that it got."""
        if wait:
            self.wait_open()

    def wait_open(self) -> str:
        """Wait until its engine is open, or refused; return its role, or the error."""
        if not self.role:
            self.role = self._read()
        return self.role

    def do(self, code: str) -> Any:
        """Run Python code there, with `engine` and `kept`, a dict; return the value of `answer`, as JSON."""
        self.begin(code)
        return self.end()

    def begin(self, code: str) -> None:
        """As `do`, without waiting; `end` returns the answer."""
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps(code) + "\n")
        self._program.stdin.flush()

    def end(self) -> Any:
        """Return the answer of the oldest code that was begun. Raises RuntimeError if it raised."""
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def _read(self) -> Any:
        assert self._program.stdout is not None
        line = self._program.stdout.readline()
        assert line, f"process {self.pid} has ended: {self._program.poll()}"
        return json.loads(line)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._program.kill()
        self.wait()

    def send(self, number: signal.Signals) -> None:
        self._program.send_signal(number)

    def close(self) -> int:
        """Have it close its engine and end; return its exit status."""
        if self._program.poll() is None and self._program.stdin is not None and not self._program.stdin.closed:
            self._program.stdin.close()
        return self.wait()

    def wait(self) -> int:
        """Wait for its end."""
        status = self._program.wait(PATIENCE_S)
        for stream in (self._program.stdin, self._program.stdout):
            if stream is not None:
                stream.close()
        return status
