"""A second scopestate process, and handlers that remember: what the bridge tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scopestate import Engine, StateEvent
from scopestate.server.server import Server

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""

OpenBridge = Callable[..., Engine]
Serve = Callable[..., Server]


class Seen:
    """A handler that remembers its events; a thread can wait for them."""

    def __init__(self) -> None:
        self.events: list[StateEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: StateEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[StateEvent]:
        """Wait until `count` events are here, and return all that are."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, PATIENCE_S), (
                f"{len(self.events)} of {count}"
            )
            return list(self.events)

    def take(self) -> list[dict[str, Any]]:
        """Return what is here as plain dicts, and forget it."""
        with self._changed:
            events, self.events = self.events, []
        return [event.to_json() for event in events]


class RemoteProcess:
    """The second process; `fresh` empties it, `kill` kills it, `start` starts it."""

    def __init__(self, store: Path | None = None) -> None:
        self._store = store
        self.port = 0
        self.url = ""
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).parent / "remote_process.py"), str(self.port)]
        if self._store is not None:
            command.append(str(self._store))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )
        self._read_url()

    def _read_url(self) -> None:
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("ws://"), f"the remote did not start: {self.url!r}"
        self.port = int(self.url.rpartition(":")[2])

    def fresh(self) -> None:
        """Replace its engine by an empty one, at the same address."""
        assert self.process.stdin is not None
        self.process.stdin.write("fresh\n")
        self.process.stdin.flush()
        self._read_url()

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def stop(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
        self._reap()

    def _reap(self) -> None:
        self.process.wait(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def bridge_config(url: str, *, limits: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    adapter = {"name": "bridge", "config": {"bridge_url": url, **options}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}], "limits": limits or {}}
