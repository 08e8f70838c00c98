"""The table of triggers: which handlers get the event of a write."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar

from scopestate.errors import InvalidRegistration
from scopestate.ops.results import EventType
from scopestate.ops.triggers import Trigger
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor

T = TypeVar("T")


def wanting(
    handlers: tuple[HandlerActor, ...], kind: EventType, old: bytes | None, new: bytes | None
) -> tuple[HandlerActor, ...]:
    """Return the handlers whose triggers may want an event: its kind fits, and so does whether the value differs.

    Comparisons that need decoding are left to `Trigger.differs`, which is not called on the writer's thread.
    """
    same = old == new
    return tuple(
        [handler for handler in handlers if (trigger := handler.trigger).wants(kind) and not (same and trigger.sifts)]
    )


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
        # Read the list first: if a registration comes in between, the tuple goes into a list that is no longer used.
        listed = self.listed
        if not listed:
            listed.append(tuple(self.members.values()))
        return listed[0]


class Prefixes(Generic[T]):
    """Objects by a prefix of a name. Finding those that fit takes one look-up for each length that a prefix has.

    `put` and `pop` run under the guard of the table; `find` needs none.
    """

    __slots__ = ("_by_length",)

    def __init__(self) -> None:
        self._by_length: tuple[tuple[int, dict[str, T]], ...] = ()

    def __bool__(self) -> bool:
        return any(things for _, things in self._by_length)

    def find(self, name: str) -> list[T]:
        """Return the objects under all prefixes of this name, the shortest prefix first."""
        size = len(name)
        found = []
        for length, things in self._by_length:
            if length > size:
                break
            thing = things.get(name[:length])
            if thing is not None:
                found.append(thing)
        return found

    def get(self, prefix: str) -> T | None:
        """Return the object under exactly this prefix."""
        return next((things.get(prefix) for length, things in self._by_length if length == len(prefix)), None)

    def put(self, prefix: str, thing: T) -> None:
        """Put an object under a prefix."""
        size = len(prefix)
        things = next((things for length, things in self._by_length if length == size), None)
        if things is None:
            things = {}
            # With an empty dict first, which does no harm if a signal handler raises after this line.
            self._by_length = tuple(sorted((*self._by_length, (size, things)), key=itemgetter(0)))
        things[prefix] = thing

    def pop(self, prefix: str) -> None:
        """Forget the object under exactly this prefix, if there is one."""
        for length, things in self._by_length:
            if length == len(prefix):
                things.pop(prefix, None)
                if not things:
                    self._by_length = tuple(pair for pair in self._by_length if pair[1])


class Watchers(dict[str | None, Bucket]):
    """The triggers on one scope: key filter (None: every key) -> handlers.

    If the turn of a scope finds neither the key nor None here, nor in `anywhere`, the write has no event, and the turn
    looks no further. So the bucket under None exists, even if empty, as long as there are other places to look.
    """

    __slots__ = ("anywhere", "fed", "groups", "held", "prefixes")

    def __init__(self, anywhere: Watchers | None = None, groups: tuple[Watchers, ...] = ()) -> None:
        super().__init__()
        self.anywhere: Watchers = self if anywhere is None else anywhere
        """The triggers without a scope filter."""
        self.groups = groups
        """The tables of the scope prefixes that this scope begins with."""
        self.prefixes: Prefixes[Bucket] | None = None
        """The triggers with a key prefix; None if there has been none yet."""
        self.fed = False
        """True while the changes of the scope are entered into the feed."""
        self.held = False
        """True while a scope in memory has this table."""
        self.settle()

    def has_any(self) -> bool:
        """False if no write to this scope has a handler, so that there is nothing to match. Needs no guard."""
        return bool(self or self.anywhere)

    def match(self, key: str) -> tuple[HandlerActor, ...]:
        """Return the handlers for a write to `key` of this scope, in order of registration. Needs no guard."""
        anywhere = self.anywhere
        if self.groups or self.prefixes is not None or anywhere.prefixes is not None:
            return _merged(self._fitting(key))
        if not anywhere:
            table = self
        elif not self:
            table = anywhere
        else:
            return _merged(self._fitting(key))
        one, every = table.get(key), table.get(None)
        if every is None:
            return () if one is None else one.all()
        return every.all() if one is None else _merged([one, every])

    def _fitting(self, key: str) -> list[Bucket]:
        """Return the buckets whose filters a write to `key` fits."""
        found: list[Bucket] = []
        anywhere = self.anywhere
        for table in (self, *self.groups, anywhere) if anywhere is not self else (self,):
            for name in (key, None):
                bucket = table.get(name)
                if bucket is not None:
                    found.append(bucket)
            if table.prefixes is not None:
                found += table.prefixes.find(key)
        return found

    # -------------------------------------------------------------------------------------- under the table's guard

    def bucket(self, trigger: Trigger) -> Bucket:
        """Return the bucket of triggers with the key filter of this one; make it if it does not exist."""
        if trigger.prefix is None:
            return self.setdefault(trigger.key, Bucket())
        if self.prefixes is None:
            self.prefixes = Prefixes()
        bucket = self.prefixes.get(trigger.prefix)
        if bucket is None:
            bucket = Bucket()
            self.prefixes.put(trigger.prefix, bucket)
            self.settle()
        return bucket

    def drop(self, trigger: Trigger) -> None:
        """Forget the bucket of triggers with the key filter of this one if it is empty."""
        if trigger.prefix is None:
            bucket = self.get(trigger.key)
            if bucket is not None and not bucket.members:
                del self[trigger.key]
        elif self.prefixes is not None:
            bucket = self.prefixes.get(trigger.prefix)
            if bucket is not None and not bucket.members:
                self.prefixes.pop(trigger.prefix)
                if not self.prefixes:
                    self.prefixes = None
        self.settle()

    def settle(self) -> None:
        """Make a bucket under None if a write must look further, or forget it if it is empty and not needed."""
        if self.fed or self.groups or self.prefixes is not None:
            self.setdefault(None, Bucket())
        else:
            every = self.get(None)
            if every is not None and not every.members:
                del self[None]

    def is_idle(self) -> bool:
        """True if the scope has no triggers of its own, and its changes are not fed."""
        if self.fed or self.prefixes is not None:
            return False
        return not self or (len(self) == 1 and None in self and not self[None].members)


def _merged(buckets: list[Bucket]) -> tuple[HandlerActor, ...]:
    """Return the handlers of all of them, in order of registration."""
    if len(buckets) == 1:
        return buckets[0].all()
    numbered: dict[int, HandlerActor] = {}
    for bucket in buckets:
        if bucket.members:
            numbered.update(bucket.members.copy())
    return tuple([numbered[number] for number in sorted(numbered)])


def _place(trigger: Trigger) -> tuple[str | None, ...]:
    """Return the filters that decide in which bucket a trigger is, and how its handler gets its events."""
    return trigger.scope, trigger.key, trigger.scope_prefix, trigger.prefix, trigger.durable


class TriggerTable:
    """The triggers of one engine. Methods may be called from any thread.

    A scope looks up its triggers within the turn that writes, so the moment is exact: a trigger sees every write whose
    turn begins after `register` has returned, and none that begins after `unregister` has (docs/reference/semantics.md
    8.7).
    """

    def __init__(self, make: Callable[[Trigger], HandlerActor]) -> None:
        """`make` makes the actor that delivers the events of a trigger."""
        self._make = make
        # Reentrant: a signal handler may write to a new scope while this thread is making one.
        self._exclusive = Guard()
        self._numbers = itertools.count(1)
        self.registered: dict[str, tuple[int, HandlerActor]] = {}
        """trigger id -> the number of its registration, and its handler."""
        self.version = 0
        """Rises whenever a trigger is added or removed."""
        self._by_scope: dict[str, Watchers] = {}
        self._by_scope_prefix: Prefixes[Watchers] = Prefixes()
        self._anywhere = Watchers()
        self._nothing = Watchers(self._anywhere)
        self.durable = Bucket()
        """The handlers of durable triggers. They take committed events, so no write looks for them."""
        self.is_fed: Callable[[str | None], bool] = lambda scope: False
        """Tells whether the changes of a scope are entered into the feed; of None: those of every scope."""
        self._retired = Counts()
        self._retiring: list[HandlerActor] = []
        self._most_retiring = 64
        self.selective = False
        """True if a trigger was ever registered that does not want every event of its keys."""
        self.sifting = False
        """True if a trigger was ever registered that compares values."""

    def __bool__(self) -> bool:
        """False if no trigger is registered."""
        return bool(self.registered)

    def has_plain(self) -> bool:
        """Return whether a trigger is registered that is not durable."""
        return len(self.registered) > len(self.durable.members)

    def plain(self) -> list[HandlerActor]:
        """Return the handlers of the triggers that are not durable, in order of registration."""
        return [handler for handler in self.handlers() if handler.trigger.durable is None]

    def plain_places(self, most: int) -> set[tuple[str | None, str]] | None:
        """Return which scopes the triggers that are not durable are about: each a name, or None and a prefix.

        None: more than `most`.
        """
        found: set[tuple[str | None, str]] = set()
        for _, handler in list(self.registered.values()):
            trigger = handler.trigger
            if trigger.durable is None:
                found.add((trigger.scope, "" if trigger.scope is not None else trigger.scope_prefix or ""))
                if len(found) > most:
                    return None
        return found

    # ---------------------------------------------------------------------------------------------- registration

    @exclusive
    def register(self, trigger: Trigger, make: Callable[[Trigger], HandlerActor] | None = None) -> HandlerActor:
        """Add the trigger; one with the same id is replaced. `make`: instead of the table's own."""
        known = self.registered.get(trigger.trigger_id)
        self.sifting = self.sifting or trigger.sifts
        self.selective = self.selective or trigger.sifts or trigger.events is not None
        if known is not None:
            handler = known[1]
            if _place(handler.trigger) == _place(trigger):
                handler.change(trigger)  # order and waiting events are kept
                return handler
            self._remove(*known)
        number = next(self._numbers)
        handler = (make or self._make)(trigger)
        bucket = self._bucket(trigger)
        trigger_id, entry = trigger.trigger_id, (number, handler)
        unlisted: list[tuple[HandlerActor, ...]] = []
        # No call or loop between these lines, as in `ScopeActor._write`: a trigger that is listed also fires.
        bucket.members[number] = handler
        bucket.listed = unlisted
        self.registered[trigger_id] = entry
        self.version += 1
        return handler

    @exclusive
    def enter(self, trigger: Trigger, handler: HandlerActor) -> None:
        """Add a durable trigger with its handler, which may have had another trigger of the same name before."""
        for number, other in list(self.registered.values()):
            if other is handler or other.trigger.trigger_id == trigger.trigger_id:
                self._remove(number, other)
        if handler in self._retiring:
            self._retiring = [other for other in self._retiring if other is not handler]
        handler.trigger = trigger
        handler.active = True
        number = next(self._numbers)
        self.durable.members[number] = handler
        self.durable.listed = []
        self.registered[trigger.trigger_id] = (number, handler)

    @exclusive
    def unregister(self, trigger_id: str) -> None:
        """Remove the trigger: no delivery begins after this has returned. Raises InvalidRegistration if unknown."""
        known = self.registered.get(trigger_id)
        if known is None:
            raise InvalidRegistration(f"no trigger has the id {trigger_id!r}; it may have been unregistered before")
        self._remove(*known)

    @exclusive
    def discard(self, trigger: Trigger) -> None:
        """Remove the trigger if it is still the one that is registered under its id."""
        known = self.registered.get(trigger.trigger_id)
        if known is not None and known[1].trigger is trigger:
            self._remove(*known)

    def _bucket(self, trigger: Trigger) -> Bucket:
        """Return the bucket for a trigger that is to be registered."""
        if trigger.durable is not None:
            return self.durable
        if trigger.scope is not None:
            table = self._of(trigger.scope)
        elif trigger.scope_prefix is not None:
            table = self._group(trigger.scope_prefix)
        else:
            table = self._anywhere
        return table.bucket(trigger)

    def _of(self, scope: str) -> Watchers:
        watchers = self._by_scope.get(scope)
        if watchers is None:
            watchers = Watchers(self._anywhere, tuple(self._by_scope_prefix.find(scope)))
            watchers = self._by_scope.setdefault(scope, watchers)
        return watchers

    def _group(self, prefix: str) -> Watchers:
        """Return the table of the triggers with a scope prefix.

        A new table is linked from the tables of the scopes that fit.
        """
        group = self._by_scope_prefix.get(prefix)
        if group is None:
            group = Watchers()
            self._by_scope_prefix.put(prefix, group)
        if not group:
            # Even if it is not new: a signal handler may have raised here before. An empty group does no harm.
            for scope, watchers in list(self._by_scope.items()):
                if scope.startswith(prefix):
                    if not any(other is group for other in watchers.groups):
                        watchers.groups += (group,)
                    watchers.settle()
        return group

    def _remove(self, number: int, handler: HandlerActor) -> None:
        trigger = handler.trigger
        bucket = self._bucket(trigger)
        trigger_id = trigger.trigger_id
        unlisted: list[tuple[HandlerActor, ...]] = []
        # No call or loop between these lines, as above.
        handler.active = False
        del bucket.members[number]
        bucket.listed = unlisted
        del self.registered[trigger_id]
        self.version += 1
        # The counts still include what it is doing now, and the events that it drops from here on.
        self._retiring += (handler,)
        handler.retired()
        if not bucket.members and trigger.durable is None:
            self._tidy(trigger)
        if len(self._retiring) > self._most_retiring:
            busy = [handler for handler in self._retiring if handler.is_busy()]
            for done in set(self._retiring).difference(busy):
                self._retired.add(done)
            self._retiring = busy
            self._most_retiring = 2 * len(busy) + 64

    def _tidy(self, trigger: Trigger) -> None:
        """Forget the tables for the filters of a trigger, if no other trigger has them."""
        scope, prefix = trigger.scope, trigger.scope_prefix
        if scope is not None:
            watchers = self._of(scope)
            watchers.drop(trigger)
            if watchers.is_idle() and not watchers.held:
                del self._by_scope[scope]
        elif prefix is not None:
            group = self._group(prefix)
            group.drop(trigger)
            if group.is_idle():
                for name, watchers in list(self._by_scope.items()):
                    if name.startswith(prefix):
                        watchers.groups = tuple([other for other in watchers.groups if other is not group])
                        watchers.settle()
                # Last: if a signal handler raises before, the next registration finds the group, and links it again.
                self._by_scope_prefix.pop(prefix)
        else:
            self._anywhere.drop(trigger)

    # -------------------------------------------------------------------------------------------------- look-ups

    @exclusive
    def watch(self, scope: str) -> Watchers:
        """Return the live table of the triggers on `scope`, for an actor that keeps it until `forget`."""
        watchers = self._of(scope)
        watchers.held = True
        if self.is_fed(scope):
            watchers.fed = True
            watchers.settle()
        return watchers

    @exclusive
    def refeed(self, scope: str | None) -> None:
        """Make the writes of a scope, or of every scope, prepare their events for the feed too, or stop that."""
        if scope is None:
            self._anywhere.fed = self.is_fed(None)
            self._anywhere.settle()
        for name in list(self._by_scope) if scope is None else [scope]:
            watchers = self._by_scope.get(name)
            if watchers is not None and watchers.held:
                watchers.fed = self.is_fed(name)
                watchers.settle()

    @exclusive
    def forget(self, scope: str) -> None:
        """Drop the table of a scope that leaves memory, if no trigger is in it."""
        watchers = self._by_scope.get(scope)
        if watchers is not None:
            watchers.held = watchers.fed = False
            watchers.settle()
            if watchers.is_idle():
                del self._by_scope[scope]

    def watchers(self, scope: str) -> Watchers:
        """Return the triggers on `scope` as they are now, for one look-up."""
        watchers = self._by_scope.get(scope)
        if watchers is not None:
            return watchers
        groups = self._by_scope_prefix.find(scope)
        return Watchers(self._anywhere, tuple(groups)) if groups else self._nothing

    def find(self, trigger_id: str) -> Trigger | None:
        """Return the trigger that is registered under this id, or None."""
        known = self.registered.get(trigger_id)
        return None if known is None else known[1].trigger

    def handler(self, trigger_id: str) -> HandlerActor | None:
        """Return the handler of the trigger that is registered under this id, or None."""
        known = self.registered.get(trigger_id)
        return None if known is None else known[1]

    @exclusive
    def handlers(self) -> list[HandlerActor]:
        """Return the handlers of all triggers, in order of registration."""
        return [handler for _, handler in sorted(self.registered.values(), key=lambda entry: entry[0])]

    @exclusive
    def working(self) -> list[HandlerActor]:
        """Return the handlers of all triggers and of unregistered ones that are not done yet, in no order."""
        retiring = [handler for handler in self._retiring if handler.is_busy()]
        return [handler for _, handler in self.registered.values()] + retiring

    def disown(self) -> None:
        """In a forked child: the guard may be held by a thread that is not here."""
        self._exclusive = Guard()

    # ------------------------------------------------------------------------------------------------ statistics

    @exclusive
    def counts(self) -> Counts:
        """Return the totals of all handlers, including unregistered ones."""
        total = Counts()
        total.add(self._retired)
        for handler in [*(handler for _, handler in self.registered.values()), *self._retiring]:
            total.add(handler)
        return total


class Counts:
    """Totals over handlers."""

    def __init__(self) -> None:
        self.delivered = self.skipped = self.failed = self.retried = self.dropped = self.timeouts = 0

    def add(self, other: Counts | HandlerActor) -> None:
        """Add the counts of one handler, or the totals of several."""
        self.delivered += other.delivered
        self.skipped += other.skipped
        self.failed += other.failed
        self.retried += other.retried
        self.dropped += other.dropped
        self.timeouts += other.timeouts
