"""Where the suite runs: each place a scope can be kept, opened in the same way, and what is said of its differences."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine, StateEvent
from scopestate.config import from_mapping

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""

PLACES = ("memory", "interval", "commit", "redis", "follower")

LAST = "no such key"
"""Its event ends what `Events.take` waits for."""

lasting = pytest.mark.parametrize("place", [place for place in PLACES if place != "memory"], indirect=True)
"""For a test of what the next engine finds: nothing is left of an engine in memory."""
shared = pytest.mark.parametrize("place", [place for place in PLACES if place in ("redis", "follower")], indirect=True)
"""For a test of two engines that use one place at the same time."""
restarted = pytest.mark.parametrize(
    "place", [place for place in PLACES if place not in ("memory", "follower")], indirect=True
)
"""As `lasting`, for what would go on in the engine that a follower follows."""

LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
"""A deadline that has passed: what is written with it has expired at once."""
IN_AN_HOUR = datetime.now(UTC) + timedelta(hours=1)


@dataclass(frozen=True)
class Facts:
    """What differs between the places, as docs/reference/state.md says it."""

    saves: bool = False
    """`durable=True` waits for the disk; elsewhere it is refused."""
    outlives: bool = True
    """The next engine at the same place finds what this one has left."""
    inserted_order: bool = True
    """`list` gives values in the order in which their keys were first set; else by key."""


FACTS = {
    "memory": Facts(outlives=False),
    "interval": Facts(saves=True),
    "commit": Facts(saves=True),
    "redis": Facts(inserted_order=False),
    "follower": Facts(saves=True),
}


class Place:
    """One place for the length of a test. Every engine that it opens is closed with it."""

    def __init__(self, name: str, folder: Path, redis_url: Callable[[], str]) -> None:
        self.name = name
        self.facts = FACTS[name]
        self._folder = folder
        self._redis_url = redis_url
        self._stack = ExitStack()
        self._owner: Engine | None = None
        self._newest: Engine
        self._config: dict[str, Any] = {}
        self.opened_redis = False
        """The server has been emptied for this test."""

    def __repr__(self) -> str:
        return f"<Place {self.name}>"

    @property
    def local(self) -> bool:
        """The scopes are in the memory of the engine that is called."""
        return self.name in ("memory", "interval", "commit")

    def open(self, **sections: Any) -> Engine:
        """Open an engine; `sections` are those of a configuration file.

        The owner of a follower's directory has those of the first call too. More than one engine may be open on Redis,
        and more than one follower; elsewhere close the one before.
        """
        adapter: dict[str, Any]
        match self.name:
            case "memory":
                adapter = {"name": "kv"}
            case "redis":
                adapter = {"name": "redis", "config": {"redis_url": self._redis_url()}}
            case durability:
                kv = {
                    "store_method": "file_based",
                    "file_path": str(self._folder / "store"),
                    "save_interval_ms": 50,
                    "durability": "interval" if durability == "follower" else durability,
                }
                adapter = {"name": "kv", "config": kv}
        config = self._config = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}], **sections}
        if self.name == "follower" and self._owner is None:
            self._owner = self._stack.enter_context(Engine.from_config(config))
        self._newest = self._stack.enter_context(Engine.from_config(config))
        return self._newest

    def reconfigure(self, **sections: Any) -> None:
        """Give the engine that keeps the scopes other sections: the newest one, or the one that it follows."""
        (self._owner or self._newest).reconfigure(from_mapping({**self._config, **sections}))

    def saves(self, engine: Engine) -> int:
        """Return how often the engine, or the one that it follows, has saved."""
        return (self._owner or engine).stats().saves

    def close(self) -> None:
        self._stack.close()


class Events:
    """The events of a scope, as (type, key, old value, new value)."""

    def __init__(self, engine: Engine, scope: str) -> None:
        self._engine = engine
        self._scope = scope
        self._changed = threading.Condition()
        self.seen: list[StateEvent] = []
        engine.register_function(f"test::{id(self)}", self._note)
        engine.register_trigger(function_id=f"test::{id(self)}", scope=scope)

    def _note(self, event: StateEvent) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def take(self) -> list[tuple[str, str, Any, Any]]:
        """Wait for every event so far; return them, and begin anew.

        The last one is that of a delete which removes nothing: events of a scope come in order.
        """
        self._engine.delete(self._scope, LAST)
        with self._changed:
            assert self._changed.wait_for(lambda: any(event.key == LAST for event in self.seen), PATIENCE_S), self.seen
        return [brief(event) for event in self.take_whole() if event.key != LAST]

    def take_whole(self) -> list[StateEvent]:
        """Return what has come so far as the events themselves, and begin anew."""
        with self._changed:
            seen, self.seen = self.seen, []
            return seen

    def wait_for(self, count: int) -> list[StateEvent]:
        """Wait until there are `count` events; return what there is."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen) >= count, PATIENCE_S), f"{self.seen} of {count}"
            return list(self.seen)


def brief(event: StateEvent) -> tuple[str, str, Any, Any]:
    """Return the four facts of an event that the tests compare."""
    return event.event_type.removeprefix("state:"), event.key, event.old_value, event.new_value


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition is true. Fails with `what` if it takes too long."""
    pause, end = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        pause.wait(0.001)


def together(*jobs: Callable[[], object]) -> None:
    """Run each job on a thread of its own, begun at the same moment; raise what one of them raised."""
    start = threading.Barrier(len(jobs))
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            start.wait(PATIENCE_S)
            job()
        except BaseException as failure:  # noqa: BLE001 - raised below, on the thread of the test
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]
