"""One watch as the feed sees it: which changes it wants, and which wait to be read."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from scopestate.ops.changes import Change, ChangeKind, CursorMaker

if TYPE_CHECKING:
    from scopestate.actors.interests import Among, Interest
    from scopestate.actors.reply import ReplyTo
    from scopestate.ops.results import EventName, EventType, StateEvent

_KINDS: Final[dict[EventType, ChangeKind]] = {
    "state:created": "put",
    "state:updated": "put",
    "state:deleted": "delete",
    "state:expired": "expire",
}


def changes_of(events: Iterable[StateEvent], cursors: CursorMaker, *, everything: bool = False) -> list[Change]:
    """Return the changes that watches get for these events.

    A delete of a key that did not exist gives no change, unless `everything` is set.
    """
    return [
        Change(
            _KINDS[event.event_type],
            event.scope,
            event.key,
            event.new_json,
            event.old_json,
            event.revision,
            event.transaction or event.revision,
            False,
            event.position,
            cursors,
            event,
        )
        for event in events
        if everything or event.new_json is not None or event.old_json is not None
    ]


class Filter(msgspec.Struct, frozen=True):
    """Which changes of its scopes a watch wants."""

    key: str | None = None
    """None: every key."""
    prefix: str = ""
    events: frozenset[EventName] | None = None
    """None: every kind."""

    def wants(self, change: Change) -> bool:
        """Return whether the watch wants this change."""
        return self.wants_key(change.key) and (self.events is None or _name_of(change) in self.events)

    def wants_key(self, key: str) -> bool:
        """Return whether the watch wants changes of this key."""
        return key.startswith(self.prefix) if self.key is None else key == self.key


def _name_of(change: Change) -> EventName:
    if change.kind == "put":
        return "created" if change.old_json is None else "updated"
    return "expired" if change.kind == "expire" else "deleted"


class Watcher:
    """What one watch wants, and the changes that wait for it.

    The feed adds changes under its guard; one or more threads take them out at the other end.
    """

    __slots__ = (
        "__weakref__",
        "_begun",
        "_floors",
        "_selective",
        "among",
        "at",
        "broken",
        "buffer",
        "closed",
        "ending",
        "everything",
        "filter",
        "interests",
        "key",
        "lost",
        "newest",
        "owner",
        "pending",
        "scope",
        "scope_prefix",
        "values",
        "waiters",
    )

    def __init__(
        self,
        scope: str | None,
        scope_prefix: str,
        wanted: Filter,
        *,
        values: bool = True,
        latest: bool = False,
        everything: bool = False,
        among: Among | None = None,
        buffer: int,
    ) -> None:
        self.scope = scope
        """The scope; None: those with the prefix."""
        self.scope_prefix = scope_prefix
        self.among = among
        """Only some of the scopes with the prefix; None: all of them."""
        self.filter = wanted
        self.key = wanted.key
        self.values = values
        self.everything = everything
        """True: include deletes of keys that did not exist, which fire events. Only for watches of many scopes."""
        self.buffer = buffer
        self.pending: deque[Change] = deque()
        self.newest: dict[tuple[str, str], Change] | None = {} if latest else None
        """(scope, key) -> its newest waiting change, in the order of the changes; None: every change is wanted."""
        self._selective = bool(wanted.prefix or wanted.events is not None or (scope is None and wanted.key is not None))
        self._floors: dict[str, int] = {}
        """scope -> the revision up to which its changes are known already."""
        self._begun = False
        self.at = 0
        """The position after which a watch of many scopes has begun."""
        self.broken = ""
        """Why the changes after the waiting ones are not complete; "": they are."""
        self.lost = 0
        """How many changes waited when there were too many; 0: there never were too many."""
        self.closed = False
        self.ending = False
        """True: no more changes come."""
        self.waiters: list[ReplyTo] = []
        self.interests: list[Interest] = []
        self.owner: weakref.ref[object] | None = None

    def wants_scope(self, name: str) -> bool:
        """Return whether a watch of many scopes wants the changes of this one."""
        return name.startswith(self.scope_prefix) if self.among is None else self.among.wants(name)

    # ------------------------------------------------------------------------------------------- by the feed, guarded

    def begin(self, floors: dict[str, int], position: int = 0) -> None:
        """Begin with the changes after these revisions and this position. Earlier ones are known already."""
        came = list(self.pending) if self.newest is None else list(self.newest.values())
        self.pending.clear()
        if self.newest is not None:
            self.newest.clear()
        self._floors, self.at = floors, position
        self._add([change for change in came if self._is_new(change)])
        self._begun = True
        self._check_buffer()

    def _is_new(self, change: Change) -> bool:
        return change.revision > self._floors.get(change.scope, 0) and change.position > self.at

    def take(self, scope: str, changes: Sequence[Change], woken: list[Watcher]) -> None:
        """Add changes of one scope, in order."""
        if self.lost or self.broken or self.closed or not changes:
            return
        floor = self._floors.get(scope)
        if floor is not None and changes[0].revision <= floor:
            changes = [change for change in changes if change.revision > floor]
        if self._selective:
            wants = self.filter.wants
            changes = [change for change in changes if wants(change)]
        if not changes:
            return
        self._add(self._as_wanted(changes))
        if self._begun:
            self._check_buffer()
        if self.waiters:
            woken.append(self)

    def _as_wanted(self, changes: Sequence[Change]) -> Sequence[Change]:
        if self.values:
            return changes
        return [msgspec.structs.replace(change, json=None, old_json=None) for change in changes]

    def _add(self, changes: Sequence[Change]) -> None:
        newest = self.newest
        if newest is None:
            self.pending.extend(changes)
            return
        for change in changes:
            name = change.scope, change.key
            newest.pop(name, None)
            newest[name] = change

    def _check_buffer(self) -> None:
        """If too many changes wait, accept no more: keep as many as the buffer holds, and the rest of a transaction."""
        waiting = len(self.pending)
        if waiting <= self.buffer:
            return
        changes = list(self.pending)
        end = max(self.buffer, 1)
        while end < waiting and _same_transaction(changes[end - 1], changes[end]):
            end += 1
        if end < waiting:
            self._lose(waiting - end, waiting)

    def _lose(self, count: int, waiting: int) -> None:
        """Drop this many of the newest changes. Another thread may take the oldest at the same time."""
        self.lost = waiting
        for _ in range(count):
            try:
                self.pending.pop()
            except IndexError:
                return

    def drop_up_to(self, position: int) -> None:
        """If a change up to this position still waits, drop all waiting changes except the rest of its transaction."""
        changes = list(self.pending)
        if self.newest is not None or not changes or changes[0].position > position or self.lost:
            return
        end = 1
        while end < len(changes) and _same_transaction(changes[end - 1], changes[end]):
            end += 1
        self._lose(len(changes) - end, len(changes))

    # ----------------------------------------------------------------------------------------------- from any thread

    def peek(self) -> Change | None:
        """Return the next change without taking it; None: none waits."""
        waiting = self.pending if self.newest is None else self.newest.values()
        try:
            # The oldest waiting change. With `latest` it may have been replaced: then the next oldest.
            return min(waiting, key=_place) if self.newest is not None else self.pending[0]
        except (IndexError, ValueError, RuntimeError):
            return None

    def filtered(self, changes: Sequence[Change]) -> Sequence[Change]:
        """Return the changes that the watch wants, in the form that it wants."""
        wanted = self._as_wanted([change for change in changes if self.filter.wants(change)])
        if self.newest is None:
            return wanted
        newest = {(change.scope, change.key): change for change in wanted}
        return [change for change in wanted if newest[change.scope, change.key] is change]

    def has_next(self) -> bool:
        """True if a change waits."""
        return bool(self.pending or self.newest)

    def is_over(self) -> bool:
        """True if a reader must not wait for more."""
        return bool(self.closed or self.lost or self.broken or self.ending)

    def wake(self) -> None:
        """Wake the threads and tasks that wait."""
        waiters = self.waiters
        while waiters:
            try:
                waiter = waiters.pop()
            except IndexError:
                return
            waiter.set(None)


def _place(change: Change) -> tuple[int, int]:
    return change.position, change.revision


def _same_transaction(one: Change, other: Change) -> bool:
    return one.scope == other.scope and one.transaction == other.transaction
