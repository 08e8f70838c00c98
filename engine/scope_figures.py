"""The figures of an engine for `engine::metrics` and `scopestate top`, with those of single scopes."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.config import RedisOptions
from scopestate.errors import ScopestateError, Unsupported
from scopestate.ops.plain import Plain
from scopestate.ops.ranges import State
from scopestate.ops.turns import Range
from scopestate.persistence.local import LocalBackend

if TYPE_CHECKING:
    from scopestate.engine import Engine

MOST_ASKED: Final = 200
"""Scopes in Redis or in another engine that are read at a time: each takes two calls."""
SAMPLE: Final = 1_000
"""Values of a scope that are measured; the size of a larger scope is estimated from them."""
_NOTHING: Final = Range(limit=0)


MOST_SCOPES: Final = 100
"""The number of largest scopes that are reported, and of the most written ones."""


def figures_of(engine: Engine, scopes: ScopeFigures) -> dict[str, Any]:
    """Return the figures of an engine as JSON values. From any thread, but one call at a time for `scopes`.

    Figures that cannot be read, for example because Redis is down, are left out, and `problem` says why.
    """
    from scopestate import __version__  # noqa: PLC0415 - of the package that imports this module

    stats, health = engine.stats(), engine.health()
    consumers: list[dict[str, Any]] = []
    found: tuple[int, list[ScopeFigure]] = (0, [])
    problem = None
    try:
        found = scopes.read(MOST_SCOPES)
        if stats.sharing is None or stats.sharing.role != "follower":  # the owner reports them
            consumers = [one.to_dict() for one in engine.consumers()]
    except ScopestateError as error:
        problem = str(error)
    return {
        "version": __version__,
        "time_ms": time.time_ns() // 1_000_000,
        "state": engine._parts.config.adapter.config.described(),
        "health": health.to_dict(),
        "stats": stats.to_dict(),
        "problem": problem,
        "consumers": consumers,
        "scope_count": found[0],
        "scopes": [one.to_dict() for one in found[1]],
    }


class ScopeFigure(Plain, msgspec.Struct, frozen=True):
    """One scope."""

    scope: str
    keys: int
    bytes: int | None
    """Size of its values as JSON, estimated for more than 1,000 keys; None: the values are not in this engine."""
    revision: int | None
    """The number of its last write; None: it is not known."""
    writes_per_s: float | None
    """Writes per second since the previous reading; None in the first reading."""


class ScopeFigures:
    """Reads the figures of an engine's scopes, and compares them with the reading before.

    From any thread, but one reading at a time.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._before: dict[str, int] = {}
        self._read_at: float | None = None

    def read(self, most: int) -> tuple[int, list[ScopeFigure]]:
        """Return the number of scopes, and at most `most` of the largest and of the most written ones.

        Only local scopes that are in memory count: reading the figures loads none. Raises ScopestateError.
        """
        found = self._local() if isinstance(self._engine._parts.backend, LocalBackend) else self._elsewhere()
        now = self._clock()
        since_s = None if self._read_at is None else now - self._read_at
        rates: dict[str, float] = {}
        if since_s:
            # A scope that was not there before may have been loaded since: its writes were not made in this time.
            rates = {
                scope: max(revision - self._before.get(scope, revision), 0) / since_s
                for scope, (_, revision) in found.items()
                if revision is not None
            }
        self._before = {scope: revision for scope, (_, revision) in found.items() if revision is not None}
        self._read_at = now
        largest = heapq.nlargest(most, found, key=lambda scope: found[scope][0])
        busiest = heapq.nlargest(most, filter(rates.get, rates), key=rates.__getitem__)
        chosen = dict.fromkeys([*largest, *busiest])
        figures = [
            ScopeFigure(scope, found[scope][0], self._size(scope), found[scope][1], rates.get(scope))
            for scope in chosen
        ]
        return len(found), figures

    def _local(self) -> dict[str, tuple[int, int | None]]:
        return {
            actor.scope: (actor.key_count(), actor.last_revision())
            for actor in list(self._engine._parts.directory.values())
        }

    def _elsewhere(self) -> dict[str, tuple[int, int | None]]:
        engine = self._engine
        numbered = isinstance(engine._parts.config.adapter.config, RedisOptions)  # others report no revision
        found: dict[str, tuple[int, int | None]] = {}
        for scope in engine.list_groups()[:MOST_ASKED]:
            revision: int | None = None
            if numbered:
                with suppress(Unsupported):  # `revisions: false`
                    revision = engine._run(scope, State(_NOTHING))[0]
            found[scope] = (engine.count(scope), revision)
        return found

    def _size(self, scope: str) -> int | None:
        actor = self._engine._parts.directory.get(scope)
        values = None if actor is None else actor.values_in_memory()
        if values is None:
            return None
        step = max(len(values) // SAMPLE, 1)
        sample = values[::step]
        return sum(map(len, sample)) * len(values) // len(sample) if sample else 0
