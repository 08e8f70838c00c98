"""The arguments of a watch, checked before anything begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from scopestate.actors.interests import Among
from scopestate.actors.watcher import Filter
from scopestate.errors import Compacted, DeserializationError
from scopestate.ops.cursors import ManyCursor, ScopeCursor, read_cursor
from scopestate.ops.options import WatchOptions, refuse_unknown
from scopestate.ops.triggers import KINDS
from scopestate.ops.turns import LAST_REVISION, Range, checked_name

BUFFER: Final = 10_000
"""How many changes may wait for a watch by default.

A thread may run for 5 ms before others do. In that time a writer makes thousands of changes.
"""


class WatchSettings:
    """The checked arguments of a watch."""

    def __init__(self, scope: str | None, scope_prefix: str | None, options: WatchOptions) -> None:
        if scope is not None and scope_prefix is not None:
            raise DeserializationError("a watch takes `scope` or `scope_prefix`, not both")
        self.scope = None if scope is None else checked_name("scope", scope)
        self.scope_prefix = checked_name("scope prefix", scope_prefix or "")
        given: dict[str, Any] = {**options}
        known = given.pop("known", ())
        self.snapshot = _flag("snapshot", given.pop("snapshot", True))
        self.values = _flag("values", given.pop("values", True))
        self.everything = False
        """True: include deletes of keys that did not exist. Requested by a bridge, which fires their events."""
        self.until_end = False
        """True: it may begin while the engine closes. Requested by a follower, for the last changes."""
        self.among: Among | None = None
        """Only these of many scopes. Requested by a bridge, for its triggers."""
        self.latest = _flag("latest", given.pop("latest", False))
        self.markers = _flag("markers", given.pop("markers", False))
        self.buffer = given.pop("buffer", BUFFER)
        if type(self.buffer) is not int or self.buffer < 1:
            raise DeserializationError(f"`buffer` is a number of changes, 1 or more, not {self.buffer!r:.40}")
        compacted = given.pop("on_compacted", "raise")
        if compacted not in ("raise", "resync"):
            raise DeserializationError(f'`on_compacted` is "raise" or "resync", not {compacted!r:.40}')
        self.resync = compacted == "resync"
        self.since = given.pop("since", None)
        key, prefix = given.pop("key", None), given.pop("prefix", None)
        if key is not None and prefix is not None:
            raise DeserializationError("a watch takes `key` or `prefix`, not both")
        self.key = None if key is None else checked_name("key", key)
        self.prefix = checked_name("prefix", prefix or "")
        self.filter = Filter(self.key, self.prefix, _events(given.pop("events", None)))
        self.known = _known(known, self.scope)
        if self.known and not self.resync:
            raise DeserializationError('`known` has no effect without `on_compacted="resync"`: give both or neither')
        if given:
            refuse_unknown("watch()", given, WatchOptions)

    def within(self) -> Range:
        """Return the range of keys for a snapshot."""
        if self.key is not None:
            return Range(start=self.key, end=self.key + "\0")
        return Range(prefix=self.prefix or None)

    def cursor(self, store_id: str) -> ScopeCursor | ManyCursor | None:
        """Return the parsed `since`; None if not given. Raises InvalidCursor, and Compacted for another store."""
        since = self.since
        if since is None:
            return None
        if type(since) is int:
            if self.scope is None:
                raise DeserializationError("`since` may be a revision only in a watch of one scope: take a cursor")
            if not 0 <= since <= LAST_REVISION:
                raise DeserializationError(f"`since` is a cursor or a revision, not {since}")
            return ScopeCursor(store_id, self.scope, since)
        cursor = read_cursor(since)
        self.check_cursor(cursor)
        if cursor.store != store_id:
            raise Compacted(since, "other store")
        return cursor

    def check_cursor(self, cursor: ScopeCursor | ManyCursor) -> None:
        """Refuse a cursor of a watch of other scopes."""
        if isinstance(cursor, ScopeCursor) != (self.scope is not None) or (
            isinstance(cursor, ScopeCursor) and cursor.scope != self.scope
        ):
            raise DeserializationError(
                "`since` is the cursor of a watch of other scopes: a cursor is for watches of the same scope, or, if "
                "it is of many scopes, for any of these"
            )


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise DeserializationError(f"`{name}` is True or False, not {value!r:.40}")
    return value


def _events(events: object) -> frozenset[Any] | None:
    if events is None:
        return None
    if not isinstance(events, (list, tuple, set, frozenset)) or not events or not set(events) <= set(KINDS):
        raise DeserializationError(f"`events` is a list of {', '.join(KINDS)}, not {events!r:.60}")
    return frozenset(events)


def _known(known: Iterable[Any], scope: str | None) -> set[tuple[str, str]]:
    if scope is not None:
        return {(scope, checked_name("key", key)) for key in known}
    pairs = list(known)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DeserializationError(f"`known` of a watch of many scopes has pairs (scope, key), not {pair!r:.60}")
    return {(checked_name("scope", name), checked_name("key", key)) for name, key in pairs}
