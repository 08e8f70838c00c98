"""The history that watches in a cluster read: the changes of one scope after a revision, or why they are gone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from redis.crc import key_slot

from scopestate.actors.journal import MOST_EVENTS, Gone
from scopestate.ops.results import StateEvent
from scopestate.persistence.redis.connection import Connection
from scopestate.persistence.redis.history import StreamHistory, read_life
from scopestate.persistence.redis.script import Shape


class ClusterHistory:
    """The streams as the journal of watches. Its methods may wait for a server, and raise StorageError.

    Changes in different slots have no common order. So a cursor of many scopes is valid only in the engine that gave
    it, and only as far back as that engine's ring reaches.
    """

    def __init__(self, shape: Shape, visit: Callable[[bytes], AbstractContextManager[Connection]]) -> None:
        """`visit` returns a connection to the server that has a key."""
        self._shape = shape
        self._visit = visit

    def read(self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS) -> list[StateEvent]:
        """Return no changes: `gone` has already reported that they are not known."""
        del after, upto, most
        return []

    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS
    ) -> list[StateEvent]:
        """Return the events of a scope after the revision `after`, up to revision `upto`, in order.

        Their positions are 0.
        """
        found = self._of(scope).read_scope(scope, after, upto, most=most)
        for event in found:
            event.position = 0  # each engine numbers events itself: see `ClusterArrivals`
        return found

    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        """Return why changes of many scopes after a position are not known: the streams have no common order."""
        del epoch, position, scope, prefix
        return "trimmed"

    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        """Return why `read_scope(scope, revision)` would miss changes; None if it would not."""
        past = self._of(scope)
        gone = past.gone_in_scope(scope, revision)
        if gone is not None:
            return gone
        shape = self._shape_of(scope)
        with self._visit(shape.stream.encode()) as connection:
            base = read_life(connection, shape).base
        # Revisions are about the time. If the slot was flushed after it, its stream is new and complete.
        return "trimmed" if 0 < revision < base and not past.read_scope(scope, 0, revision, most=1) else None

    def oldest(self, scope: str) -> tuple[int, int] | None:
        """Return None: this is not known without reading the stream."""
        del scope
        return None

    def _shape_of(self, scope: str) -> Shape:
        return self._shape.in_slot(key_slot(self._shape.key_of(scope)))

    def _of(self, scope: str) -> StreamHistory:
        shape = self._shape_of(scope)

        def visit() -> AbstractContextManager[Any]:
            return self._visit(shape.stream.encode())

        return StreamHistory(shape, visit)
