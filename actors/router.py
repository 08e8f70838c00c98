"""The one way in for events, and the actor that passes each event to the handlers whose triggers match."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from threading import get_ident
from typing import Any, NoReturn

from scopestate.actors.backlog import HandlerFull, Tally, size_of
from scopestate.actors.containment import Log
from scopestate.actors.feed import MOST_INCOMING, Feed
from scopestate.actors.handler import HandlerActor
from scopestate.actors.lanes import Barrier
from scopestate.actors.services import HandlerServices
from scopestate.actors.triggers import TriggerTable, Watchers, wanting
from scopestate.actors.turn import HOLDER, TurnActor, is_arranging
from scopestate.errors import EventLoopDetected, Overloaded
from scopestate.ops.results import DeliveryFailure, EventType, StateEvent
from scopestate.signals import certainly

log = Log("scopestate.triggers")

Prepared = tuple[tuple[HandlerActor, ...], StateEvent]
"""An event that is ready to be published: the handlers that it goes to, and the event. An event of a fed scope may have
no handlers: it is entered into the feed, and not published.
"""
Expired = tuple[int, int]
"""For a key that has expired: its deadline, and how many milliseconds later it is removed."""


class Routed:
    """Answered with None when every event that was published before it is in the mailboxes of its handlers."""


def _differing(handlers: tuple[HandlerActor, ...], event: StateEvent) -> tuple[HandlerActor, ...]:
    """Return the handlers whose triggers want an event once its values were compared."""
    return tuple([handler for handler in handlers if handler.trigger.differs(event)])


class EventRouter(TurnActor):
    """Takes the events of all writes, and passes them on to handler actors (docs/design/0035-one-door-for-events.md).

    A write prepares its event before it happens, and publishes it when it has happened: `prepare` and `publish` are the
    only way in. A write that matches no trigger costs only a look-up in the table. Published events wait in this
    actor's mailbox in the order of the scope's writes; its turns, on worker threads, pass them to the handlers.
    """

    batch = 256

    def __init__(self, services: HandlerServices) -> None:
        super().__init__(services.dispatcher)
        self._services = services
        self._limits = services.limits
        self._wall_ns = services.dispatcher.wall_ns
        self.triggers = TriggerTable(lambda trigger: HandlerActor(trigger, services))
        self._registered = self.triggers.registered
        self.backlog = services.backlog
        self.backlog.working = self.triggers.working
        self.feed = Feed(services.dispatcher, self.wake, self.triggers)
        self.feed.made_room = self.backlog.made_room
        self._incoming = self.feed.incoming
        self.outlet: list[Prepared] = self._mailbox
        """A scope appends its prepared events here, in the stretch that no signal can interrupt; then it calls
        `wake`."""
        self._passing: list[Any] = []
        """Events that the current turn has taken out of the mailbox and not yet offered to their handlers; the next one
        is last."""
        self.routed = 0
        """Events that had at least one trigger."""
        self.loops_cut = 0
        self.cascades = Tally()
        """Events that handlers have fired, or are about to fire."""

    # ------------------------------------------------------------------------------------------- before the write

    def prepare(
        self,
        scope: str,
        watch: Watchers,
        key: str,
        old: bytes | None,
        new: bytes | None,
        revision: int,
        depth: int,
        expired: Expired | None = None,
    ) -> tuple[Prepared, ...]:
        """Return the event of a write that is about to happen, ready to be published.

        () if no trigger matches, and the scope is not fed.

        Called within the scope's turn; `watch` is the scope's own table. Raises HandlerFull if a handler must catch up
        first, and Overloaded if a handler makes the write (`depth` above 0): it might be waiting for itself. `expired`
        is given if the key is removed because its deadline has passed.
        """
        handlers = watch.match(key)
        if not handlers and not (watch.fed or watch.anywhere.fed):
            return ()
        kind: EventType = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
        expired_at = late_ms = None
        if expired is not None:
            kind = "state:expired"
            expired_at, late_ms = expired
        if self.triggers.selective:
            handlers = wanting(handlers, kind, old, new)
        if not handlers:
            if not (watch.fed or watch.anywhere.fed):
                return ()
            return (((), StateEvent(kind, scope, key, old, new, revision, depth, expired_at, late_ms, revision)),)
        backlog, limits, waiting = self.backlog, self._limits, len(self._mailbox)
        size = (len(old) if old else 0) + (len(new) if new else 0)
        backlog.largest = max(backlog.largest, size)
        room = limits.handler_mailbox - waiting - len(self._passing)
        if depth or room <= 0 or waiting * backlog.largest >= backlog.allowance:
            self._admit(scope, handlers, depth)
        elif limits.handler_when_full == "block":
            for handler in handlers:
                if len(handler._mailbox) + len(handler._aside) >= room:
                    self._admit(scope, handlers, depth)
        return ((handlers, StateEvent(kind, scope, key, old, new, revision, depth, expired_at, late_ms, revision)),)

    def prepare_fed(
        self,
        scope: str,
        watch: Watchers,
        key: str,
        old: bytes | None,
        new: bytes | None,
        revision: int,
        depth: int,
        expired: Expired | None = None,
    ) -> tuple[tuple[Prepared, ...], StateEvent, int]:
        """As `prepare`, for a fed scope: returns what is published, the event for the feed, and its key there.

        Raises HandlerFull too if too much waits to be saved.
        """
        if len(self._incoming) > MOST_INCOMING or self.feed.full:
            self.check_fed(scope, depth)
        if self._registered:
            ((handlers, event),) = prepared = self.prepare(scope, watch, key, old, new, revision, depth, expired)
            event.time_ms = self._wall_ns() // 1_000_000
            return prepared if handlers else (), event, id(event)
        kind: EventType = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
        late: Expired | tuple[None, None] = (None, None)
        if expired is not None:
            kind, late = "state:expired", expired
        expired_at, late_ms = late
        now_ms = self._wall_ns() // 1_000_000
        event = StateEvent(kind, scope, key, old, new, revision, depth, expired_at, late_ms, revision, now_ms)
        return (), event, id(event)

    def prepare_sets(
        self,
        scope: str,
        watch: Watchers,
        sets: Mapping[str, bytes],
        before: Sequence[bytes | None],
        first: int,
        depth: int,
    ) -> tuple[list[Prepared], dict[int, StateEvent]]:
        """As `prepare_fed`, for sets of several keys in one transaction, whose first one has the revision `first`."""
        last = first + len(sets) - 1
        fed = watch.fed or watch.anywhere.fed
        if fed:
            self.check_fed(scope, depth)
        now_ms = self._wall_ns() // 1_000_000 if fed else 0
        if self._registered:
            routed: list[Prepared] = []
            for revision, (key, data), old in zip(range(first, last + 1), sets.items(), before, strict=True):
                routed += self.prepare(scope, watch, key, old, data, revision, depth)
            for _, event in routed:
                event.transaction, event.time_ms = last, now_ms
            if not fed:
                return routed, {}
            return [one for one in routed if one[0]], {id(event): event for _, event in routed}
        if not fed:
            return [], {}
        events = [
            StateEvent(
                "state:created" if old is None else "state:updated",
                scope,
                key,
                old,
                data,
                revision,
                depth,
                None,
                None,
                last,
                now_ms,
            )
            for revision, (key, data), old in zip(range(first, last + 1), sets.items(), before, strict=True)
        ]
        return [], dict(zip(map(id, events), events, strict=True))

    def check_fed(self, scope: str, depth: int) -> None:
        """Refuse a write to a fed scope before it is made, as `prepare` does, if too much is not saved yet."""
        if len(self._incoming) > MOST_INCOMING and not self._scheduled:
            self.wake_anyway()  # nothing else may need the changes that were entered
        if self.feed.must_wait(scope):
            self._refuse(scope, (), depth, self.backlog.progress, self.feed.over)

    def check_room(self, scope: str, watch: Watchers, key: str, depth: int) -> None:
        """Refuse, as `prepare` does, a write that is about to be sent elsewhere: no handler may miss its event."""
        handlers = watch.match(key)
        if handlers:
            self._admit(scope, handlers, depth)

    def _admit(self, scope: str, handlers: tuple[HandlerActor, ...], depth: int) -> None:
        limits, backlog = self._limits, self.backlog
        progress = backlog.progress
        room = limits.handler_mailbox - len(self._mailbox) - len(self._passing)
        if room <= 0 or limits.handler_when_full == "block":
            most = limits.handler_mailbox_bytes or sys.maxsize
            queued = backlog.queued([*self._passing, *self._mailbox]) if backlog.largest else 0
            for handler in handlers:
                if handler.depth() >= room or handler.offered - handler.taken + queued >= most:
                    self._refuse(scope, handlers, depth, progress)
            if backlog.is_over(queued):
                self._refuse(scope, handlers, depth, progress)
        if depth:
            self.cascades.add()  # before the event is in the mailbox, or `drain` could miss it

    def _refuse(
        self, scope: str, handlers: tuple[HandlerActor, ...], depth: int, progress: int, journal: str = ""
    ) -> NoReturn:
        me = get_ident()
        # A finalizer may write on a thread that is in the middle of such a turn.
        within = any(actor._claim.get(HOLDER) == me for actor in (self, *handlers))
        if depth or within:
            self.backlog.refused.add()
            full = journal or "a handler's mailbox is full"
            raise Overloaded(
                f"{full}, and this write to scope {scope!r} comes from a handler; nothing was "
                "written: waiting might be waiting for itself"
            )
        self.backlog.blocked.add()
        raise HandlerFull(scope, progress, journal)

    # -------------------------------------------------------------------------------------------- after the write

    def publish(self, events: Iterable[Prepared]) -> None:
        """Take the events of writes that have happened: all of them, or none if this raises."""
        mailbox = self._mailbox
        mailbox += events
        try:
            self.wake()
        except MemoryError:
            certainly(self.wake_anyway)

    def prepare_late(
        self,
        scope: str,
        watch: Watchers,
        key: str,
        old: bytes | None,
        new: bytes | None,
        revision: int,
        depth: int,
        expired: Expired | None = None,
        transaction: int = 0,
        time_ms: int = 0,
    ) -> tuple[Prepared, ...]:
        """As `prepare`, for a write that has happened elsewhere: limits do not apply."""
        handlers = watch.match(key)
        kind: EventType = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
        if expired is not None:
            kind = "state:expired"
        if self.triggers.selective:
            handlers = wanting(handlers, kind, old, new)
        if not handlers:
            return ()
        expired_at, late_ms = expired or (None, None)
        event = StateEvent(kind, scope, key, old, new, revision, depth, expired_at, late_ms, transaction, time_ms)
        self.backlog.largest = max(self.backlog.largest, size_of(event))
        return ((handlers, event),)

    def arrive(
        self,
        scope: str,
        key: str,
        old: bytes | None,
        new: bytes | None,
        revision: int,
        depth: int,
        expired: Expired | None = None,
        transaction: int = 0,
        time_ms: int = 0,
        *,
        here: bool,
    ) -> tuple[tuple[HandlerActor, ...], HandlerActor | None]:
        """Publish a change that another engine may have made, and return its handlers. From any thread, one at a time:
        events are delivered in the order of these calls.

        `here`: the second item returned may be a handler that already has the event, and whose `run_batch` the caller
        must call once no other thread waits for it: the handler may take long.

        Raises HandlerFull if one of the handlers must catch up first.
        """
        watch = self.triggers.watchers(scope)
        self.check_room(scope, watch, key, 0)  # depth 0: the write has happened, so it may wait
        events = self.prepare_late(scope, watch, key, old, new, revision, depth, expired, transaction, time_ms)
        if not events:
            return (), None
        handlers, event = events[0]
        if here and self.triggers.sifting and not (handlers := _differing(handlers, event)):
            return (), None
        if here and len(handlers) == 1 and self._give_to_idle(handlers[0], event):
            return handlers, handlers[0]
        self.publish(events)
        return handlers, None

    def publish_read(self, event: StateEvent) -> None:
        """Publish an event that was read from the journal, unchanged. Limits do not apply."""
        handlers = self.triggers.watchers(event.scope).match(event.key)
        if self.triggers.selective:
            handlers = wanting(handlers, event.event_type, event.old_json, event.new_json)
        if handlers:
            self.backlog.largest = max(self.backlog.largest, size_of(event))
            self.publish(((handlers, event),))

    def _give_to_idle(self, handler: HandlerActor, event: StateEvent) -> bool:
        """Put the event into the handler's mailbox if neither it nor this router has anything else to do.

        Going through a worker thread costs 30 us, as much as the rest of a delivery. Not for a handler whose
        turns belong to the thread of an event loop.
        """
        if handler._dispatcher is not self._dispatcher or event.depth > self._limits.max_event_depth:
            return False
        claim, me = self._claim, get_ident()
        if claim.setdefault(HOLDER, me) != me:
            return False
        try:
            if self._mailbox or handler.is_busy() or handler._scheduled:
                return False
            self.routed += 1
            handler._scheduled = True  # by the caller, which runs it
            handler.put(event)
            return True
        finally:
            del claim[HOLDER]
            self.wake()

    # ---------------------------------------------------------------------------------------------------- fan-out

    def hold(self) -> None:
        """Announce that this thread runs the next turn itself, in `run_held`: no worker thread is woken for it."""
        self._scheduled = True

    def fans_out(self) -> bool:
        """Return whether the next turn has more than one delivery to make."""
        mailbox = self._mailbox
        try:
            first = mailbox[0]
        except IndexError:
            return False  # there is none, or another thread has taken it
        return len(mailbox) > 1 or (type(first) is tuple and len(first[0]) > 1)

    def run_held(self) -> None:
        """Run the turn for which this thread has called `hold`, if since then there is something to do."""
        # In this order: the second line sees an event that is published between the two. A change that only a watch
        # waits for is in the feed, and not in the mailbox.
        self._scheduled = False
        if self._mailbox or self.feed.is_waited_for():
            self.run_batch()

    def depth(self) -> int:
        """Events that wait here."""
        return len(self._mailbox)

    def wake(self) -> None:
        if (self._mailbox or self.feed.is_waited_for()) and not self._claim and (not self._scheduled or is_arranging()):
            self.wake_anyway()

    def _drain_mailbox(self) -> None:
        mailbox, backlog = self._mailbox, self.backlog
        self.feed.number()
        batch = mailbox[: self.batch]
        count = len(batch)
        backlog.begin_turn(count)
        # Other threads may write at the same time: until a handler has an event, it counts as waiting here.
        self._passing = batch[::-1]
        # As many as were copied: others may have been appended since.
        del mailbox[:count]
        try:
            self._handle_all(batch, self._pass_on)
        finally:
            self._passing = []
        backlog.end_turn(idle=not mailbox)
        if batch:
            # Only if there was progress: a writer that finds its handler still full wakes this actor, and would be
            # woken at once.
            backlog.made_room()

    def _pass_on(self, item: Any) -> None:
        self._passing.pop()
        if type(item) is not tuple:
            self._handle(item)
            return
        handlers, event = item
        if self.triggers.sifting and not (handlers := _differing(handlers, event)):
            return
        self.routed += 1
        if event.depth > self._limits.max_event_depth:
            self._cut_loop(handlers, event)
        elif len(handlers) == 1 and not event.time_ms:
            try:
                handlers[0].offer(event)
            except MemoryError:
                self._offer_again(handlers[0], event)
        else:
            # Each handler gets a copy of an event that no handler and no watch has, so a change that a handler makes to
            # its event affects nothing else. Refused: making all copies first, which delays the first delivery of many.
            pristine = event.copy()
            for handler in handlers:
                own: list[StateEvent] = []
                try:
                    own.append(pristine.copy())
                    handler.offer(own[0])
                except MemoryError:
                    if not own:
                        certainly(lambda: own.append(pristine.copy()))  # noqa: B023 - called at once
                    self._offer_again(handler, own[0])

    @staticmethod
    def _offer_again(handler: HandlerActor, event: StateEvent) -> None:
        """Offer an event again: its write has happened, so it must not be lost. The mailbox may already have it."""
        certainly(lambda: handler.offer_once(event))
        certainly(handler.wake_anyway)

    def report(self, failure: DeliveryFailure) -> None:
        """Arrange that a failure is reported to the log and the hooks.

        From any thread; hooks do not run on this one.
        """
        self._services.reporter.report(failure)

    def report_missed(self, handlers: Iterable[HandlerActor], error: Exception) -> None:
        """Report to the hooks, once for each handler, that its trigger has missed events. The caller has logged it."""
        for handler in handlers:
            trigger = handler.trigger
            event = StateEvent("state:updated", trigger.scope or "", trigger.key or "", None, None, 0)
            failure = DeliveryFailure(trigger.trigger_id, trigger.function_id, event, error, 0, True)
            self._services.reporter.report(failure, logged=True)

    def _cut_loop(self, handlers: tuple[HandlerActor, ...], event: StateEvent) -> None:
        self.loops_cut += 1
        for handler in handlers:
            trigger = handler.trigger
            error = EventLoopDetected(
                f"event {event.revision} of scope {event.scope!r}, key {event.key!r} was caused by a chain of "
                f"{event.depth} handlers, more than max_event_depth = {self._limits.max_event_depth}: it was "
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
                message.withdraw()  # in case the barrier came in between
            return None
        raise TypeError(f"a router takes events from scopes, not {message!r:.80}")
