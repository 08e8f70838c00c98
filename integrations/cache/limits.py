"""The limits of a cache, and its counts of hits and misses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from scopestate.errors import DeserializationError
from scopestate.signals import Guard, exclusive

ENTRY_BYTES: Final = 100
"""Bytes counted for an entry in addition to its key and value."""
PAGE: Final = 500
"""Keys that one step of a walk over a cache reads or removes."""
_WALK: Final = "walk"
_GOAL: Final = 0.9
"""How full a cache is after culling, as a part of its limit."""

Sized = tuple[int, str, int]
"""Revision, key and bytes of an entry. The lowest revision was stored the longest ago."""


class Limits:
    """The limits of a cache, and when to check them.

    A check reads all entries. So writes are counted, and the check is made when they might have filled the cache: after
    an eighth of a limit at the latest, because other processes write too. The counts need no lock: if one of two
    concurrent writes is not counted, the next check comes a little later.
    """

    def __init__(self, size_limit: int | None, max_entries: int | None) -> None:
        for name, limit in (("size_limit", size_limit), ("max_entries", max_entries)):
            if limit is not None and (type(limit) is not int or limit < 1):
                raise DeserializationError(f"`{name}` is a whole number of 1 or more, or None, not {limit!r:.40}")
        self._bytes = math.inf if size_limit is None else size_limit
        self._entries = math.inf if max_entries is None else max_entries
        self._bounded = size_limit is not None or max_entries is not None
        self._walk: dict[str, object] = {}
        """The ticket of the current walk."""
        self._bytes_left = self._entries_left = 0.0
        self.end(0, 0)

    def written(self, size: int) -> bool:
        """Note a write of `size` bytes; return whether it is time for a check."""
        self._bytes_left -= size + ENTRY_BYTES
        self._entries_left -= 1
        return self._bytes_left < 0 or self._entries_left < 0

    def begin(self, ticket: object) -> bool:
        """Begin a check. Returns False if another thread or task makes one, or if there is no limit.

        The caller ends it with `release` and the same ticket, even if this raises the exception of a signal handler.
        """
        return self._bounded and self._walk.setdefault(_WALK, ticket) is ticket

    def release(self, ticket: object) -> None:
        """End the check that `begin` started with this ticket. May be repeated: see `certainly`."""
        if self._walk.get(_WALK) is ticket:
            del self._walk[_WALK]

    def end(self, count: int, size: int) -> None:
        """Note how many entries and bytes there are after a walk."""
        self._bytes_left = _pause(self._bytes, size)
        self._entries_left = _pause(self._entries, count)

    def forget(self) -> None:
        """In a forked child: forget a walk of the parent."""
        self._walk = {}

    def surplus(self, entries: list[Sized]) -> Iterator[list[Sized]]:
        """Yield the entries to remove, a page at a time; nothing if the limits hold."""
        count, size = len(entries), sum([one[2] for one in entries])
        if count <= self._entries and size <= self._bytes:
            return
        piece: list[Sized] = []
        for entry in sorted(entries):
            if count <= self._entries * _GOAL and size <= self._bytes * _GOAL:
                break
            piece.append(entry)
            count, size = count - 1, size - entry[2]
            if len(piece) == PAGE:
                yield piece
                piece = []
        if piece:
            yield piece


def _pause(limit: float, held: float) -> float:
    return limit if limit == math.inf else max(limit / 64, min(limit / 8, limit - held))


class CacheStats(NamedTuple):
    """How often `get` of this object has found a key or not, since counting began or was reset."""

    hits: int
    misses: int


class Counts:
    """Counts hits and misses, from any thread."""

    def __init__(self) -> None:
        self._exclusive = Guard()
        self._hits = self._misses = 0

    @exclusive
    def count(self, *, found: bool) -> None:
        """Count one."""
        if found:
            self._hits += 1
        else:
            self._misses += 1

    @exclusive
    def read(self, *, reset: bool) -> CacheStats:
        """Return the counts."""
        found = CacheStats(self._hits, self._misses)
        if reset:
            self._hits = self._misses = 0
        return found

    def forget(self) -> None:
        """In a forked child: do not wait for threads of the parent."""
        self._exclusive = Guard()
