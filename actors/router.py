"""The actor that hands events to the handlers whose triggers match."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final, NoReturn

from scopestate.actors.containment import Log, contained
from scopestate.actors.handler import Barrier, DeliveryFailure, HandlerActor, HandlerServices, Trigger, size_of
from scopestate.actors.turn import HOLDER, TurnActor
from scopestate.errors import EventLoopDetected, InvalidRegistration, Overloaded
from scopestate.ops.results import EventType, StateEvent
from scopestate.signals import Guard, certainly, exclusive

log = Log("scopestate.triggers")

_GONE: Final = object()


class Bucket:
    """The handlers with one pair of filters, in order of registration."""

    __slots__ = ("_all", "changes", "members")

    def __init__(self) -> None:
        self.members: dict[int, HandlerActor] = {}
        """Number of registration -> handler."""
        self.changes = 0
        """How often `members` was changed, under the router's guard."""
        self._all: tuple[int, tuple[HandlerActor, ...]] = (0, ())

    def all(self) -> tuple[HandlerActor, ...]:
        """Return the handlers; made once, not at each of 100,000 registrations. Read without the guard."""
        changes, handlers = self._all
        if changes != self.changes:
            # Kept with the number of changes that it knows of: a registration meanwhile makes it out of date.
            changes = self.changes
            handlers = tuple(self.members.values())
            self._all = (changes, handlers)
        return handlers


class Watchers(dict[str | None, Bucket]):
    """Key filter (None: every key) -> handlers."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        super().__init__()
        self.held = False
        """True while a scope in memory has this table."""


class Routed:
    """Answered with None when every event that was fired before it is in the mailboxes of its handlers."""


class HandlerFull(Overloaded):
    """A handler must catch up before this write: wait for `TriggerRouter.when_room`, then try again.

    The engine's own calls do so; only who asks a scope through its Pykka ref gets to see it.
    """

    def __init__(self, scope: str, progress: int) -> None:
        super().__init__(
            f"a handler that must see this write to scope {scope!r} is full; nothing was written: try again"
        )
        self.progress = progress
        """`TriggerRouter.progress` before the handler was found full."""


class TriggerRouter(TurnActor):
    """Matches scope and key filters, and passes events on to handler actors.

    A scope looks up its triggers within the turn that writes, so the point is exact: a trigger sees every write whose
    turn begins after `register` has returned, and none that begins after `unregister` has (docs/semantics.md 8.7).
    A write that matches nothing costs that look-up and no more. What matches is left in this actor's mailbox in the
    order of the scope's writes, and its turns, on worker threads, fan it out to the handlers.
    """

    batch = 256

    def __init__(self, services: HandlerServices) -> None:
        super().__init__(services.dispatcher)
        self._services = services
        services.made_room = self.made_room
        services.note_offered = self._note_offered
        services.is_over = self.is_over
        self._offered = 0
        """Bytes ever offered to handlers, each copy of an event counted. Written within this actor's turns alone."""
        self._taken = 0
        self._released: list[int] = []
        """Bytes that have left mailboxes since this actor's last turn."""
        services.note_taken = self._released.append
        self._look_at = 0
        """While not more than so many bytes wait, each copy counted, the values need not be counted one by one."""
        self._over_above = -1
        """While more wait, it is over its limit; -1: it was not when last looked at."""
        self.largest = 0
        """Bytes of the largest event since the mailbox was last empty, about."""
        # Reentrant: a signal handler may write to a new scope while this thread is making one.
        self._exclusive = Guard()
        self._numbers = itertools.count(1)
        self._by_id: dict[str, tuple[int, HandlerActor]] = {}
        self._by_scope: dict[str, Watchers] = {}
        self.anywhere = Watchers()
        """Key filter (None: every key) -> handlers of the triggers without a scope filter."""
        self._waiting_for_room: dict[Callable[[], object], int] = {}
        self.progress = 0
        """Changes whenever handlers have made progress."""
        self.routed = 0
        """Events that had at least one trigger."""
        self.loops_cut = 0
        self._cascades = itertools.count()
        self._blocked = itertools.count()
        self._refused = itertools.count()
        self._retired = _Counts()
        self._retiring: list[HandlerActor] = []
        self._most_retiring = 64

    # ---------------------------------------------------------------------------------------------- registration

    @exclusive
    def register(
        self, trigger: Trigger, make: Callable[[Trigger, HandlerServices], HandlerActor] = HandlerActor
    ) -> HandlerActor:
        """Add the trigger; one with the same id is replaced. From any thread. `make` makes the actor that delivers."""
        known = self._by_id.get(trigger.trigger_id)
        if known is not None:
            handler = known[1]
            if (handler.trigger.scope, handler.trigger.key) == (trigger.scope, trigger.key):
                handler.trigger = trigger  # order and waiting events are kept
                return handler
            self._remove(*known)
        number = next(self._numbers)
        handler = make(trigger, self._services)
        bucket = self._watchers(trigger).setdefault(trigger.key, Bucket())
        trigger_id, entry = trigger.trigger_id, (number, handler)
        # No call or loop between these lines, as in `ScopeActor._write`: a trigger that is listed also fires.
        bucket.members[number] = handler
        bucket.changes += 1
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
        """Remove the trigger if it is still this very one that is registered under its id."""
        known = self._by_id.get(trigger.trigger_id)
        if known is not None and known[1].trigger is trigger:
            self._remove(*known)

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

    @exclusive
    def watchers_of(self, scope: str) -> Watchers:
        """Return the live table of triggers on `scope`: key filter (None: every key) -> handlers."""
        watchers = self._by_scope.setdefault(scope, Watchers())
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

    def _watchers(self, trigger: Trigger) -> Watchers:
        return self.anywhere if trigger.scope is None else self._by_scope.setdefault(trigger.scope, Watchers())

    def _remove(self, number: int, handler: HandlerActor) -> None:
        watchers = self._watchers(handler.trigger)
        trigger_id, key = handler.trigger.trigger_id, handler.trigger.key
        bucket = watchers[key]
        # No call or loop between these lines, as above.
        handler.active = False
        del bucket.members[number]
        bucket.changes += 1
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

    def disown(self) -> None:
        """In a forked child: the guard may be held by a thread that is not here."""
        self._exclusive = Guard()

    # -------------------------------------------------------------------------------------------------- matching

    def targets(self, scope: str, watch: Watchers, key: str, depth: int) -> tuple[HandlerActor, ...]:
        """Return the handlers for a write to `scope`, whose own watchers are `watch`, in order of registration.

        Called within the scope's turn. Raises HandlerFull if one of them must catch up first, and Overloaded if it is a
        handler that writes, `depth` handlers deep: it might be waiting for itself.
        """
        found = [bucket for bucket in (watch.get(key), watch.get(None)) if bucket is not None]
        if self.anywhere:
            found += [bucket for bucket in (self.anywhere.get(key), self.anywhere.get(None)) if bucket is not None]
        if len(found) == 1:
            handlers = found[0].all()
        else:
            numbered = {number: handler for bucket in found for number, handler in list(bucket.members.items())}
            handlers = tuple(numbered[number] for number in sorted(numbered))
        limits = self._services.limits
        progress = self.progress
        room = limits.handler_mailbox - len(self._mailbox)
        if room <= 0 or limits.handler_when_full == "block":
            most = limits.handler_mailbox_bytes or sys.maxsize
            queued = self._queued_bytes() if self.largest else 0
            for handler in handlers:
                if len(handler._mailbox) >= room or handler.offered - handler.taken + queued >= most:
                    self._refuse(scope, handlers, depth, progress)
            if self.is_over(queued):
                self._refuse(scope, handlers, depth, progress)
        if depth:
            self.note_cascade()  # before the event is in the mailbox, or `drain` could miss it
        return handlers

    def _refuse(self, scope: str, handlers: tuple[HandlerActor, ...], depth: int, progress: int) -> NoReturn:
        me = get_ident()
        # A finalizer may write on a thread that is in the middle of such a turn.
        within = any(actor._claim.get(HOLDER) == me for actor in (self, *handlers))
        if depth or within:
            self.count_refusal()
            raise Overloaded(
                f"a handler's mailbox is full, and this write to scope {scope!r} comes from a handler; nothing was "
                "written: waiting might be waiting for itself"
            )
        next(self._blocked)
        raise HandlerFull(scope, progress)

    # ------------------------------------------------------------------------------------------------------ bytes

    def _note_offered(self, size: int) -> None:
        self._offered += size

    def _queued_bytes(self) -> int:
        """Bytes of the events in this actor's own mailbox, if they are many: else 0, as it has them for a moment."""
        mailbox, limits = self._mailbox, self._services.limits
        smallest = min(limits.handler_mailbox_bytes or sys.maxsize, limits.events_bytes or sys.maxsize)
        if len(mailbox) * self.largest * 4 < smallest:
            return 0
        return sum(size_of(item[1]) for item in mailbox[:] if type(item) is tuple)

    def is_over(self, queued: int = 0) -> bool:
        """True if events that wait for all handlers together hold more bytes than `events_bytes`."""
        limit = self._services.limits.events_bytes
        if not limit or self._offered - self._taken + queued < limit:
            return False
        waiting = self._offered - self._taken - sum(self._released) + queued
        if waiting < limit:
            return False
        if self._over_above >= 0:
            if waiting > self._over_above:
                return True
        elif waiting <= self._look_at:
            return False
        # Each copy counts in `waiting`, but copies share their values: those are counted here, one by one.
        real = self._real_bytes() + queued
        if real >= limit:
            self._over_above = waiting - limit // 16
            return True
        self._over_above, self._look_at = -1, waiting + limit - real
        return False

    def _real_bytes(self) -> int:
        values: dict[int, int] = {}
        for handler in self.working():
            if handler.offered > handler.taken:
                for item in handler._mailbox.copy():
                    if type(item) is StateEvent:
                        for value in (item.old_json, item.new_json):
                            if value is not None:
                                values[id(value)] = len(value)
        return sum(values.values())

    def count_refusal(self) -> None:
        """Note that a call was refused because a mailbox was full. From any thread."""
        next(self._refused)

    def refused(self) -> int:
        """How many calls were refused because a mailbox was full."""
        return _value(self._refused)

    def blocked(self) -> int:
        """How often a write found a handler's mailbox full and had to wait."""
        return _value(self._blocked)

    def note_cascade(self) -> None:
        """Note that a handler is about to fire an event. From any thread."""
        next(self._cascades)

    def fired_by_handlers(self) -> int:
        """How many events handlers have fired, or are about to have fired."""
        return _value(self._cascades)

    def when_room(self, callback: Callable[[], object], full: HandlerFull | None = None, size: int = 0) -> None:
        """Call `callback()`, on any thread, after some handler has made progress.

        `full`: progress since then counts too, for callers who did not come here before they tried. `size`: bytes of
        values that wait with it, where no caller does.
        """
        self._waiting_for_room[callback] = size
        if full is not None and full.progress != self.progress:
            # The progress that was waited for came before the callback was on the list: no other may follow.
            self._dispatcher.submit(self.made_room)

    def has_waiting_room(self) -> bool:
        """False if so many wait for room already that a sender who does not wait himself must be refused."""
        waiting, limits = self._waiting_for_room, self._services.limits
        most = limits.scope_mailbox_bytes or sys.maxsize
        return len(waiting) < limits.scope_mailbox and sum(list(waiting.values())) < most

    def stop_waiting(self, callback: Callable[[], object]) -> None:
        """Forget a callback given to `when_room`, if it is still there: the caller that waited has given up."""
        self._waiting_for_room.pop(callback, None)

    def made_room(self) -> None:
        """Some handler has made progress: tell those who wait."""
        self.progress += 1
        # Always the same table, one atomic pop at a time: a callback added meanwhile is never in one left behind.
        # Those that are here now, once each: one that finds its handler still full comes back, to the end.
        waiting = self._waiting_for_room
        if not waiting:
            return
        for callback in list(waiting):
            if waiting.pop(callback, _GONE) is not _GONE:
                contained(callback, "telling a writer that a handler has made room", log)

    # --------------------------------------------------------------------------------------------------- routing

    def has_triggers(self) -> bool:
        """False if no trigger is registered."""
        return bool(self._by_id)

    def publish(
        self, scope: str, key: str, old: bytes | None, new: bytes | None, sequence: int, depth: int, *, here: bool
    ) -> tuple[tuple[HandlerActor, ...], HandlerActor | None]:
        """Hand on the event of a change that was made elsewhere, and return its handlers. From any thread, one at a
        time: events are delivered in the order of these calls.

        `here`: the second thing returned may be a handler that has the event already, and whose `run_batch` the caller
        must call, as soon as other threads can go on without it: the handler may take long.

        Raises HandlerFull if one of the handlers must catch up first.
        """
        watch, anywhere = self._by_scope.get(scope), self.anywhere
        if not anywhere and (not watch or (key not in watch and None not in watch)):
            return (), None
        # Depth 0, whatever it was: this write is done, so it may wait, and whoever cascades has counted it.
        handlers = self.targets(scope, watch or Watchers(), key, 0)
        if not handlers:
            return (), None
        kind: EventType = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
        event = StateEvent(kind, scope, key, old, new, sequence, depth)
        if here and len(handlers) == 1 and self._give_to_idle(handlers[0], event):
            return handlers, handlers[0]
        self.largest = max(self.largest, size_of(event))
        mailbox = self._mailbox
        mailbox += ((handlers, event),)
        self.wake()
        return handlers, None

    def _give_to_idle(self, handler: HandlerActor, event: StateEvent) -> bool:
        """Put the event into the handler's mailbox if neither it nor this router has anything else to do.

        The way through a worker thread costs 30 us, as much as all the rest of a delivery. Not for a handler whose
        turns belong to the thread of an event loop.
        """
        if handler._dispatcher is not self._dispatcher or event.depth > self._services.limits.max_event_depth:
            return False
        claim, me = self._claim, get_ident()
        if claim.setdefault(HOLDER, me) != me:
            return False
        try:
            if self._mailbox or handler._mailbox or handler._claim or handler._scheduled:
                return False
            self.routed += 1
            handler._scheduled = True  # by the caller, who runs it
            handler._mailbox.append(event)
            size = size_of(event)
            handler.offered += size
            self._offered += size
            return True
        finally:
            del claim[HOLDER]
            self.wake()

    def _drain_mailbox(self) -> None:
        mailbox = self._mailbox
        batch = mailbox[: self.batch]
        # As many as were taken: more may have come meanwhile.
        del mailbox[: len(batch)]
        released = self._released
        count = len(released)
        self._taken += sum(released[:count])
        del released[:count]
        self._handle_all(batch, self._pass_on)
        if not mailbox:
            self.largest = 0
        if batch:
            # Not for nothing: a writer that finds its handler still full wakes this actor, and would be told at once.
            self.made_room()

    def _pass_on(self, item: Any) -> None:
        if type(item) is tuple:
            self._route(*item)
        else:
            self._handle(item)

    def _route(self, handlers: tuple[HandlerActor, ...], event: StateEvent) -> None:
        self.routed += 1
        if event.depth > self._services.limits.max_event_depth:
            self._cut_loop(handlers, event)
            return
        if len(handlers) == 1:
            self._offer(handlers[0], event)
            return
        # All copied before the first handler gets its own: what one does to its event reaches no other.
        for handler, own in zip(handlers, [event.copy() for _ in handlers], strict=True):
            self._offer(handler, own)

    def _offer(self, handler: HandlerActor, event: StateEvent) -> None:
        try:
            handler.offer(event)
        except MemoryError:
            # The write has happened, so its event must not be lost; the mailbox may have it already.
            certainly(lambda: handler.offer_once(event))
            certainly(handler.wake_anyway)

    def _cut_loop(self, handlers: tuple[HandlerActor, ...], event: StateEvent) -> None:
        self.loops_cut += 1
        for handler in handlers:
            trigger = handler.trigger
            error = EventLoopDetected(
                f"event {event.sequence} of scope {event.scope!r}, key {event.key!r} was caused by a chain of "
                f"{event.depth} handlers, more than max_event_depth = {self._services.limits.max_event_depth}: it was "
                f"not delivered to {trigger.function_id!r}; does a handler write what fires it?"
            )
            handler.failed += 1
            self._services.reporter.report(
                DeliveryFailure(trigger.trigger_id, trigger.function_id, event, error, attempt=0, final=True)
            )

    def withdraw(self, item: object) -> None:
        super().withdraw(item)
        if isinstance(item, Barrier):
            item.withdraw()

    def on_receive(self, message: Any) -> Any:
        if type(message) is Routed:
            return None
        if type(message) is Barrier:
            for handler in message.handlers:
                if not message.over:
                    handler.tell(message)
            if message.over:
                message.withdraw()  # in case that came in between
            return None
        raise TypeError(f"a router takes events from scopes, not {message!r:.80}")

    # ------------------------------------------------------------------------------------------------ statistics

    @exclusive
    def counts(self) -> _Counts:
        """Return what all handlers did so far, unregistered ones included."""
        total = _Counts()
        total.add(self._retired)
        for handler in [*(handler for _, handler in self._by_id.values()), *self._retiring]:
            total.add(handler)
        return total


class _Counts:
    """Totals over handlers."""

    def __init__(self) -> None:
        self.delivered = self.skipped = self.failed = self.retried = self.dropped = self.timeouts = 0

    def add(self, other: _Counts | HandlerActor) -> None:
        self.delivered += other.delivered
        self.skipped += other.skipped
        self.failed += other.failed
        self.retried += other.retried
        self.dropped += other.dropped
        self.timeouts += other.timeouts


def _value(counter: itertools.count[int]) -> int:
    """What an `itertools.count` will give next. It is advanced in C, in one step; `+= 1` on an attribute is several."""
    return int(repr(counter)[len("count(") : -1])
