"""An engine with the durable trigger `work` in a process of its own, which tells of each event that it handles.

As a program its arguments, in JSON, are the configuration, whether the first handler hangs, and `ack_wait`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

PATIENCE_S = 60.0


class DurableProcess:
    """The process, as the test sees it. A context manager."""

    def __init__(self, server: Any, *, hangs: bool = False, ack_wait: float = 30.0, **options: Any) -> None:
        """`hangs`: its handler tells of the event, and does not end before `end_handler`."""
        from event_engines import config

        arguments = [json.dumps(config(server, revisions=True, **options)), json.dumps(hangs), json.dumps(ack_wait)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )
        self._told: list[Any] = []
        assert self.read() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def read(self) -> Any:
        """Return the next thing it tells: `[key, value, attempt]` of an event."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def told(self) -> list[Any]:
        """Stop the process cleanly, and return its output that was not read yet."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        return [json.loads(line) for line in self.process.stdout]

    def end_handler(self) -> None:
        """Let the handler that hangs end."""
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()

    def freeze(self) -> None:
        """Let no code of it run any more."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the process continue."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


def tell(what: Any) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the engine until the process is asked to end."""
    from scopestate import Delivery, Engine, StateEvent

    config, hangs, ack_wait = (json.loads(argument) for argument in sys.argv[1:4])
    gate = threading.Event()
    if not hangs:
        gate.set()

    def handle(event: StateEvent, delivery: Delivery) -> None:
        tell([event.key, event.new_value, delivery.attempt])
        gate.wait()

    with Engine.from_config(config) as engine:
        engine.on_change(scope="s", durable="work", ack_wait=ack_wait)(handle)
        tell("ready")
        for line in sys.stdin:
            if line.strip() == "end":
                break
            gate.set()


if __name__ == "__main__":
    main()
