"""Shared code of the reliability tests: settings, recording handlers, threads whose errors fail a test, processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stored import values_of

from scopestate import Engine, StateEvent
from scopestate.ops import turns
from scopestate.ops.results import SetResult
from scopestate.persistence import FileAdapter

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""

HERE = Path(__file__).parent


def settings(durability: str, directory: Path | str, *, save_interval_ms: int = 20, **sections: Any) -> dict[str, Any]:
    """Return a configuration shaped like the YAML file. `durability`: memory, interval or commit."""
    adapter: dict[str, Any] = {"store_method": "in_memory"}
    if durability != "memory":
        adapter = {
            "store_method": "file_based",
            "file_path": str(directory),
            "save_interval_ms": save_interval_ms,
            "durability": durability,
        }
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": adapter}}}
    return {"workers": [worker], **sections}


def saved(directory: Path | str, scope: str) -> tuple[int, dict[str, bytes]]:
    """Return the number of the last saved write of a scope, and its saved values as JSON."""
    adapter = FileAdapter(directory)
    try:
        assert adapter.check() == []
        state = adapter.load(scope)
        return state.revision, values_of(state)
    finally:
        adapter.close()


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
            here = self._changed.wait_for(lambda: len(self.events) >= count, PATIENCE_S)
            assert here, f"{len(self.events)} of {count} events came"
            return list(self.events)


class InThread:
    """Runs `work()` on a thread; `result()` waits, and returns what it returned or raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="test-caller", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._error = error

    def result(self) -> Any:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the thread does not end"
        if self._error is not None:
            raise self._error
        return self._value


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no event announces."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        pause.wait(0.0005)


class _Interrupted(turns.Set, frozen=True):
    """A set that calls something in the middle of its turn."""

    within: Callable[[], object]

    def decide(self, view: turns.View) -> turns.Effects[SetResult]:
        self.within()
        return super().decide(view)


def in_a_turn(engine: Engine, action: Callable[[], Any]) -> Any:
    """Call `action()` on this thread, in the middle of a turn of scope "s"."""
    outcome: list[Any] = []
    engine._scopes["s"].run(_Interrupted("turn", b"1", lambda: outcome.append(action())))
    return outcome[0]


def untraced_environment() -> dict[str, str]:
    """The environment without what makes a child measure coverage.

    Coverage's tracer is Python code with a lock: a signal or a fork in the middle of it leaves the lock taken for ever.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


def start_child(name: str, *arguments: object, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start `child_<name>.py` as a process that imports scopestate as this one does, with pipes at 0 and 1."""
    paths = [str(HERE.parent), *(path for path in sys.path if path)]
    return subprocess.Popen(
        [sys.executable, str(HERE / f"child_{name}.py"), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        env={**untraced_environment(), "PYTHONPATH": os.pathsep.join(paths)},
    )
