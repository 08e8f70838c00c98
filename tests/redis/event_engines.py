"""Engines that share events, in this process and in another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from one_server import PATIENCE_S, Server

from scopestate import Engine, StateEvent
from scopestate.errors import ScopestateError

STREAM = "scopestate:events:state:"
COUNTER = "scopestate:count:state:"


def config(server: Server, *, limits: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Without revisions by default: an event then has its number over all scopes, which shows each gap."""
    adapter = {"name": "redis", "config": {"redis_url": server.url, "events": "shared", "revisions": False, **options}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}], "limits": limits or {}}


class Engines:
    """Opens engines that share events; closes them at the end, the last one first."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, server: Server, *, hooks: dict[str, Any] | None = None, **options: Any) -> Engine:
        return self._stack.enter_context(Engine.from_config(config(server, **options), **(hooks or {})))

    def process(self, server: Server, *, hangs: bool = False, **options: Any) -> EngineProcess:
        return self._stack.enter_context(EngineProcess(server, hangs=hangs, **options))


class Seen:
    """A handler that remembers its events; a thread can wait for them, and hold the handler up at its `gate`."""

    def __init__(self, engine: Engine, *, lasts_s: float = 0.0, **trigger: Any) -> None:
        """It is registered at the engine. `lasts_s`: how long it takes, in seconds."""
        self._lasts_s = lasts_s
        self._never = threading.Event()
        self.events: list[StateEvent] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self._changed = threading.Condition()
        engine.register_function("seen", self)
        engine.register_trigger(function_id="seen", **trigger)

    def __call__(self, event: StateEvent) -> None:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self._lasts_s:
            self._never.wait(self._lasts_s)
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    @property
    def numbers(self) -> list[int]:
        return [event.revision for event in list(self.events)]

    def wait_for(self, what: Callable[[list[StateEvent]], Any]) -> list[StateEvent]:
        """Wait until `what(events)` holds, and return all that are here."""
        with self._changed:
            assert self._changed.wait_for(lambda: what(self.events), PATIENCE_S), f"only {self.events!r:.2000}"
            return list(self.events)

    def wait_for_count(self, count: int) -> list[StateEvent]:
        return self.wait_for(lambda events: len(events) >= count)

    def wait_for_value(self, value: Any) -> list[StateEvent]:
        return self.wait_for(lambda events: any(event.new_value == value for event in events))


class EngineProcess:
    """An engine in a process of its own, which tells of each event that its trigger sees."""

    def __init__(self, server: Server, *, hangs: bool = False, **options: Any) -> None:
        """`hangs`: its handler tells of the event and never ends."""
        arguments = [json.dumps(config(server, **options)), json.dumps(hangs)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "event_process.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )
        assert self.read() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def read(self) -> Any:
        """Return the next thing it tells: `[revision, scope, key, new value]` of an event."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def write(self, scope: str, count: int) -> None:
        """Have it set key `k` of the scope to 1, 2, ... `count`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([scope, count]) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


def set_patiently(engine: Engine, scope: str, key: str, value: Any) -> None:
    """Set, again if the connection was lost: then it may be written twice."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 20)):
        try:
            engine.set(scope, key, value)
        except ScopestateError:
            pause.wait(0.05)
        else:
            return
    raise AssertionError("it could not be set")


def problems(engine: Engine) -> str:
    return "\n".join(engine.health().problems)


def drain_chains(engine: Engine) -> None:
    """Make a handler cause the next event, ten times in a row, and check that `drain` waits for the last one."""
    seen = Seen(engine, scope="end")

    def pass_on(event: Any) -> None:
        if event.new_value < 10:
            engine.set("chain", "k", event.new_value + 1)
        else:
            engine.set("end", "k", "reached")

    engine.register_function("pass_on", pass_on)
    engine.register_trigger(function_id="pass_on", scope="chain")
    for _ in range(20):
        seen.events.clear()
        engine.set("chain", "k", 0)
        engine.drain(60)
        assert [event.new_value for event in seen.events] == ["reached"]
