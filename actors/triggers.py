"""The table of triggers: which handlers get the event of a write."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from scopestate.errors import InvalidRegistration
from scopestate.ops.results import EventType
from scopestate.ops.triggers import Trigger
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor


def wanting(handlers: tuple[HandlerActor, ...], kind: EventType) -> tuple[HandlerActor, ...]:
    """Return the handlers whose triggers want events of this type."""
    return tuple([handler for handler in handlers if handler.trigger.wants(kind)])


class Bucket:
    """The handlers with one pair of filters, in order of registration."""

    __slots__ = ("listed", "members")

    def __init__(self) -> None:
        self.members: dict[int, HandlerActor] = {}
        """Number of registration -> handler."""
        self.listed: list[tuple[HandlerActor, ...]] = []
        """Empty, or one tuple of all members. Each change of `members` puts a new empty list here."""

    def all(self) -> tuple[HandlerActor, ...]:
        """Return the handlers. The tuple is made once, not at each of 100,000 registrations. Needs no guard."""
        # The list first: if a registration comes in between, the tuple goes into a list that is no longer used.
        listed = self.listed
        if not listed:
            listed.append(tuple(self.members.values()))
        return listed[0]


class Watchers(dict[str | None, Bucket]):
    """The triggers on one scope: key filter (None: every key) -> handlers."""

    __slots__ = ("anywhere", "held")

    def __init__(self, anywhere: Watchers | None = None) -> None:
        super().__init__()
        self.anywhere: Watchers = self if anywhere is None else anywhere
        """The triggers without a scope filter."""
        self.held = False
        """True while a scope in memory has this table."""

    def match(self, key: str) -> tuple[HandlerActor, ...]:
        """Return the handlers for a write to `key` of this scope, in order of registration. Needs no guard."""
        anywhere = self.anywhere
        if not anywhere:
            table = self
        elif not self:
            table = anywhere
        else:
            return self._merged(key)
        one, every = table.get(key), table.get(None)
        if every is None:
            return () if one is None else one.all()
        return every.all() if one is None else self._merged(key)

    def _merged(self, key: str) -> tuple[HandlerActor, ...]:
        numbered: dict[int, HandlerActor] = {}
        for table in (self, self.anywhere):
            for name in (key, None):
                bucket = table.get(name)
                if bucket is not None:
                    numbered.update(bucket.members.copy())
        return tuple(numbered[number] for number in sorted(numbered))


class TriggerTable:
    """The triggers of one engine. Methods may be called from any thread.

    A scope looks up its triggers within the turn that writes, so the point is exact: a trigger sees every write whose
    turn begins after `register` has returned, and none that begins after `unregister` has (docs/semantics.md 8.7).
    """

    def __init__(self, make: Callable[[Trigger], HandlerActor]) -> None:
        """`make` makes the actor that delivers the events of a trigger."""
        self._make = make
        # Reentrant: a signal handler may write to a new scope while this thread is making one.
        self._exclusive = Guard()
        self._numbers = itertools.count(1)
        self._by_id: dict[str, tuple[int, HandlerActor]] = {}
        self._by_scope: dict[str, Watchers] = {}
        self._anywhere = Watchers()
        self._nothing = Watchers(self._anywhere)
        self._retired = Counts()
        self._retiring: list[HandlerActor] = []
        self._most_retiring = 64
        self.selective = False
        """True if a trigger was ever registered that wants some kinds of events only."""

    def __bool__(self) -> bool:
        """False if no trigger is registered."""
        return bool(self._by_id)

    # ---------------------------------------------------------------------------------------------- registration

    @exclusive
    def register(self, trigger: Trigger, make: Callable[[Trigger], HandlerActor] | None = None) -> HandlerActor:
        """Add the trigger; one with the same id is replaced. `make`: instead of the table's own."""
        known = self._by_id.get(trigger.trigger_id)
        if trigger.events is not None:
            self.selective = True
        if known is not None:
            handler = known[1]
            if (handler.trigger.scope, handler.trigger.key) == (trigger.scope, trigger.key):
                handler.trigger = trigger  # order and waiting events are kept
                return handler
            self._remove(*known)
        number = next(self._numbers)
        handler = (make or self._make)(trigger)
        bucket = self._watchers(trigger).setdefault(trigger.key, Bucket())
        trigger_id, entry = trigger.trigger_id, (number, handler)
        unlisted: list[tuple[HandlerActor, ...]] = []
        # No call or loop between these lines, as in `ScopeActor._write`: a trigger that is listed also fires.
        bucket.members[number] = handler
        bucket.listed = unlisted
        self._by_id[trigger_id] = entry
        return handler

    @exclusive
    def unregister(self, trigger_id: str) -> None:
        """Remove the trigger: no delivery begins after this has returned. Raises InvalidRegistration if unknown."""
        known = self._by_id.get(trigger_id)
        if known is None:
            raise InvalidRegistration(f"no trigger has the id {trigger_id!r}; it may have been unregistered before")
        self._remove(*known)

    @exclusive
    def discard(self, trigger: Trigger) -> None:
        """Remove the trigger if it is still the one that is registered under its id."""
        known = self._by_id.get(trigger.trigger_id)
        if known is not None and known[1].trigger is trigger:
            self._remove(*known)

    def _watchers(self, trigger: Trigger) -> Watchers:
        return self._anywhere if trigger.scope is None else self._of(trigger.scope)

    def _of(self, scope: str) -> Watchers:
        watchers = self._by_scope.get(scope)
        return self._by_scope.setdefault(scope, Watchers(self._anywhere)) if watchers is None else watchers

    def _remove(self, number: int, handler: HandlerActor) -> None:
        watchers = self._watchers(handler.trigger)
        trigger_id, key = handler.trigger.trigger_id, handler.trigger.key
        bucket = watchers[key]
        unlisted: list[tuple[HandlerActor, ...]] = []
        # No call or loop between these lines, as above.
        handler.active = False
        del bucket.members[number]
        bucket.listed = unlisted
        del self._by_id[trigger_id]
        # What it is doing now still counts, and so do the events that it drops from here on.
        self._retiring += (handler,)
        if not bucket.members:
            del watchers[key]
            scope = handler.trigger.scope
            if scope is not None and not watchers and not watchers.held:
                del self._by_scope[scope]
        if len(self._retiring) > self._most_retiring:
            busy = [handler for handler in self._retiring if handler.is_busy()]
            for done in set(self._retiring).difference(busy):
                self._retired.add(done)
            self._retiring = busy
            self._most_retiring = 2 * len(busy) + 64

    # -------------------------------------------------------------------------------------------------- look-ups

    @exclusive
    def watch(self, scope: str) -> Watchers:
        """Return the live table of the triggers on `scope`, for an actor that keeps it until `forget`."""
        watchers = self._of(scope)
        watchers.held = True
        return watchers

    @exclusive
    def forget(self, scope: str) -> None:
        """Drop the table of a scope that leaves memory, if no trigger is in it."""
        watchers = self._by_scope.get(scope)
        if watchers is not None:
            watchers.held = False
            if not watchers:
                del self._by_scope[scope]

    def watchers(self, scope: str) -> Watchers:
        """Return the triggers on `scope` as they are now, for one look-up."""
        return self._by_scope.get(scope, self._nothing)

    def find(self, trigger_id: str) -> Trigger | None:
        """Return the trigger that is registered under this id, or None."""
        known = self._by_id.get(trigger_id)
        return None if known is None else known[1].trigger

    @exclusive
    def handlers(self) -> list[HandlerActor]:
        """Return the handlers of all triggers, in order of registration."""
        return [handler for _, handler in sorted(self._by_id.values(), key=lambda entry: entry[0])]

    @exclusive
    def working(self) -> list[HandlerActor]:
        """Return the handlers of all triggers and of unregistered ones that are not done yet, in no order."""
        retiring = [handler for handler in self._retiring if handler.is_busy()]
        return [handler for _, handler in self._by_id.values()] + retiring

    def disown(self) -> None:
        """In a forked child: the guard may be held by a thread that is not here."""
        self._exclusive = Guard()

    # ------------------------------------------------------------------------------------------------ statistics

    @exclusive
    def counts(self) -> Counts:
        """Return what all handlers did so far, unregistered ones included."""
        total = Counts()
        total.add(self._retired)
        for handler in [*(handler for _, handler in self._by_id.values()), *self._retiring]:
            total.add(handler)
        return total


class Counts:
    """Totals over handlers."""

    def __init__(self) -> None:
        self.delivered = self.skipped = self.failed = self.retried = self.dropped = self.timeouts = 0

    def add(self, other: Counts | HandlerActor) -> None:
        """Add what one handler, or several, did."""
        self.delivered += other.delivered
        self.skipped += other.skipped
        self.failed += other.failed
        self.retried += other.retried
        self.dropped += other.dropped
        self.timeouts += other.timeouts
