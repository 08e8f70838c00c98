"""What the engine tests share: handlers that remember, gates that hold code up, stores that block or fail on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from scopestate import DeliveryFailure, StateEvent, StorageError
from scopestate.ops import turns
from scopestate.ops.results import UpdateResult
from scopestate.persistence import Row, ScopeChange, ScopeState, Store

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""


def until(holds: Callable[[], object]) -> None:
    """Wait until `holds()` is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.005)


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

    @property
    def keys(self) -> list[str]:
        return [event.key for event in self.events]

    def take(self) -> list[dict[str, Any]]:
        """Return what is here as plain dicts, and forget it."""
        with self._changed:
            events, self.events = self.events, []
        return [event.to_json() for event in events]


class Failures:
    """A hook that remembers the failures reported to it."""

    def __init__(self) -> None:
        self.all: list[DeliveryFailure] = []
        self._changed = threading.Condition()

    def __call__(self, failure: DeliveryFailure) -> None:
        with self._changed:
            self.all.append(failure)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[DeliveryFailure]:
        """Wait until `count` failures are here, and return all that are."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, PATIENCE_S), f"{len(self.all)} of {count}"
            return list(self.all)


class Gate:
    """Holds up whoever passes until it is opened; says when somebody has come to it."""

    def __init__(self) -> None:
        self._reached = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, _: object = None) -> None:
        self._reached.release()
        assert self._open.wait(PATIENCE_S), "nobody opened the gate"

    def wait_until_reached(self) -> None:
        assert self._reached.acquire(timeout=PATIENCE_S), "nobody came to the gate"

    def open(self) -> None:
        self._open.set()


class SlowUpdate(turns.Update, frozen=True):
    """A turn that stops in its middle."""

    within: Callable[[], object]
    """Called there; what it raises, the turn raises."""

    def decide(self, view: turns.View) -> turns.Effects[UpdateResult]:
        self.within()
        return super().decide(view)


class GatedStore(Store):
    """A store in memory that keeps, and can be made to block or to fail at loading, listing and saving."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Row]] = {}
        self.revisions: dict[str, int] = {}
        self.at_load: Callable[[], None] = lambda: None
        self.at_scopes: Callable[[], None] = lambda: None
        self.at_save: Callable[[], None] = lambda: None
        self.closed = False

    def values(self, scope: str) -> dict[str, bytes]:
        """Return what is saved of a scope: key -> JSON."""
        return {key: row.json for key, row in self.rows[scope].items()}

    def load(self, scope: str) -> ScopeState:
        self.at_load()
        return ScopeState.of(self.rows.get(scope, {}), self.revisions.get(scope, 0))

    def scopes(self) -> list[str]:
        self.at_scopes()
        return [scope for scope, rows in self.rows.items() if rows]

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self.at_save()
        for change in batch:
            rows = self.rows.setdefault(change.scope, {})
            self.revisions[change.scope] = change.revision
            for key, row in change.entries.items():
                if row is None:
                    rows.pop(key, None)
                    continue
                before = rows.get(key)
                if before is not None and before.created != row.created:
                    del rows[key]
                rows[key] = row

    def close(self) -> None:
        self.closed = True


def broken() -> None:
    """A fault for a `GatedStore`."""
    raise StorageError("the disk is on fire")


class LoopThread:
    """An event loop that runs on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="test-loop")
        self._thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def do(self, work: Callable[[], Any]) -> Any:
        """Call `work()` in a task on the loop and return its result; awaits it if it is awaitable."""

        async def call() -> Any:
            result = work()
            return await result if hasattr(result, "__await__") else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start `work()` on a thread; the function returned waits for its result or raises its error."""
    outcome: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as raised:  # noqa: BLE001 - handed to the thread that waits
            error.append(raised)

    thread = threading.Thread(target=run, name="test-caller")
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the thread does not end"
        if error:
            raise error[0]
        return outcome[0]

    return result


def in_steps(coroutine: Any) -> Any:
    """Run a coroutine that must not suspend: by hand, without its event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise AssertionError("it suspended")
