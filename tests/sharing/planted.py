"""Faults that the proof must find: each breaks the engine of a process, and a run of such processes must fail."""

from __future__ import annotations

import random
from typing import Any

from scopestate.actors.watcher import Watcher
from scopestate.persistence.bridge.backend import BridgeBackend
from scopestate.persistence.sqlite import lock


def plant(name: str, config: dict[str, Any]) -> None:
    """Break the engine that this process is about to open with this configuration."""
    PLANTED[name](config)


def _lose_writes(config: dict[str, Any]) -> None:
    """Writes are acknowledged before they are on disk."""
    adapter = config["workers"][0]["config"]["adapter"]
    if adapter["name"] == "kv":
        adapter["config"].update(durability="interval", save_interval_ms=2000)


def _write_twice(config: dict[str, Any]) -> None:
    """A call is sent twice now and then, as if its answer had been lost."""
    call = BridgeBackend.call

    def twice(self: BridgeBackend, function_id: str, payload: bytes, done: Any, *more: Any, **others: Any) -> None:
        call(self, function_id, payload, done, *more, **others)
        if random.random() < 0.02:
            call(self, function_id, payload, lambda *outcome: None, *more, **others)

    BridgeBackend.call = twice  # type: ignore[method-assign]  # it is broken on purpose


def _read_stale(config: dict[str, Any]) -> None:
    """A read is answered with what an earlier one has found."""
    call = BridgeBackend.call
    found: dict[bytes, Any] = {}

    def stale(self: BridgeBackend, function_id: str, payload: bytes, done: Any, *more: Any, **others: Any) -> None:
        def noted(*outcome: Any) -> None:
            found[payload] = outcome
            done(*outcome)

        if function_id != "state::get":
            call(self, function_id, payload, done, *more, **others)
        elif payload in found:
            done(*found.pop(payload))
        else:
            call(self, function_id, payload, noted, *more, **others)

    BridgeBackend.call = stale  # type: ignore[method-assign]  # it is broken on purpose


def _turn_changes_round(config: dict[str, Any]) -> None:
    """Changes that come together come in the wrong order."""
    add = Watcher._add
    Watcher._add = lambda self, changes: add(self, changes[::-1])  # type: ignore[method-assign]  # on purpose


def _own_twice(config: dict[str, Any]) -> None:
    """The lock keeps no process away."""
    lock._lock = lambda descriptor: None


PLANTED = {
    "two owners": _own_twice,
    "lost writes": _lose_writes,
    "writes twice": _write_twice,
    "stale reads": _read_stale,
    "changes out of order": _turn_changes_round,
}
