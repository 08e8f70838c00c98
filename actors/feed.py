"""The feed of one engine: it numbers the changes of all scopes, keeps the newest in memory, and gives them to watches.

A scope is *fed* while its changes are wanted: by a watch, by a `history` rule, or by a durable trigger. A write of a
fed scope enters its event into `incoming`, in the stretch that changes memory: the order there is the one order of all
changes. `number` gives them their positions, puts them into the *ring*, and hands them to the watches that want them.
docs/design/0044-the-feed.md has the reasons.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby, takewhile
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from scopestate.actors.containment import Log, contained
from scopestate.actors.dispatcher import weakly
from scopestate.actors.fed_scope import FedScope, Hold
from scopestate.actors.interests import Interest, Interests, What
from scopestate.actors.journal import History, Journal, Past, Rules
from scopestate.actors.ports import Durability
from scopestate.actors.watcher import Watcher, changes_of
from scopestate.ops.cursors import ManyCursor, ManyCursors, ScopeCursor
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.gate import Batch
    from scopestate.actors.triggers import TriggerTable
    from scopestate.ops.changes import Change
    from scopestate.ops.results import StateEvent

log = Log("scopestate.triggers")

RING_EVENTS: Final = 100_000
RING_BYTES: Final = 64 << 20
"""The most bytes that the ring holds. The newest change is always there."""
OVERHEAD: Final = 500
"""Bytes that a change in the ring takes in addition to its new value. Its old value is usually that of an earlier
change."""
SAVE_BYTES: Final = 16 << 20
"""If this many bytes wait to be written into the journal, they are saved before the interval is over."""
MOST_UNSAVED_BYTES: Final = 256 << 20
"""If this many bytes wait, because saving is slow or fails, writers wait."""
MOST_INCOMING: Final = 10_000
"""Changes that may wait for their positions if nothing else needs them."""
SOONEST_S: Final = 1.0
"""The shortest pause between two looks for watches that have ended."""
PRIMED_EVENTS: Final = 1_000
"""How many of the newest changes in the journal are read when this engine follows another one."""
PRIMED_S: Final = 15.0
"""For how long every scope is fed then. Watches of the earlier engine return within that time, or need a `history`
rule."""
LINGER_S: Final = 60.0
"""How long a scope stays fed after its last watch ended, for a watch that returns with its cursor."""


class Feed:
    """The changes of all fed scopes of one engine, in one order.

    Thread rules: scopes write `incoming` in their stretches; `number` and what is below it run on worker threads, where
    no signal handler can interrupt them; all other methods may be called from any thread. A guard keeps them apart.
    """

    over = ""
    """Why writes to the scopes of durable triggers wait: the journal is full. "": they do not."""
    primed = 0
    """The position after which `prime` has entered everything."""
    _room = _room_bytes = sys.maxsize
    """How many changes, and bytes, may be unsaved before the journal is full."""

    def __init__(self, dispatcher: Dispatcher, wake: Callable[[], object], triggers: TriggerTable) -> None:
        """`wake` makes a worker thread call `number` soon."""
        self.incoming: dict[int, StateEvent] = {}
        """id -> event, in the order of the changes. A dict: an entry can be removed again without allocating memory."""
        self.awaited: dict[object, None] = {}
        """The watches that wait for a change, and this feed itself if there are durable triggers."""
        self.position = 0
        """The last position that was assigned."""
        self.epoch = 0
        self.store_id = ""
        self.cursors = ManyCursors("", 0)
        """Makes the cursors of watches of many scopes."""
        self.journal: Journal | None = None
        self._rules: Rules | None = None
        """What the journal must keep."""
        self.past: Past | None = None
        """Where to read changes that the ring no longer has; None: nowhere."""
        self._numbered_elsewhere = False
        self.now_ms: Callable[[], int] = lambda: 0
        self._dispatcher = dispatcher
        self._wake = wake
        self._triggers = triggers
        triggers.is_fed = self.is_wanted
        self._history: Callable[[str], History | None] = lambda scope: None
        self._kept: Callable[[str], Durability] = lambda scope: "memory"
        self._exclusive = Guard()
        self._interests = Interests()
        self._scopes: dict[str, FedScope] = {}
        self._behind: dict[str, FedScope] = {}
        """The scopes that may have changes that no save has taken. Looking at every scope would delay each save."""
        self._many: tuple[Watcher, ...] = ()
        self._ring: deque[StateEvent] = deque()
        self._ring_bytes = 0
        self._floor = 0
        """Changes up to this position are not in the ring."""
        self._shown = 0
        """The position up to which watches of many scopes have everything."""
        self._later: list[StateEvent] = []
        """Changes after one that is not settled."""
        self._holds: dict[Hold, int] = {}
        """Running commits, with the position of their first change."""
        self.save_soon: Callable[[list[str]], object] = lambda scopes: None
        """Called to save these scopes before the interval is over."""
        self._soon: dict[str, None] = {}
        self._unsaved = 0
        """Approximate bytes of the changes that must be written into the journal."""
        self._unsaved_events = 0
        self._commits = False
        """True if there was a scope whose changes are not counted in `_unsaved`, because commits save them."""
        self.full = False
        """True if too many bytes are unsaved, or the journal is full."""
        self.made_room: Callable[[], object] = lambda: None
        """Called to tell waiting writers that there may be room."""
        self._committed: list[Callable[[Sequence[StateEvent]], object]] = []
        self._dropped: list[Watcher] = []
        """Watches that are no longer referenced."""
        self._timer: Timer | None = None
        self._ended = False
        self.entered = 0
        """Changes that were numbered."""

    def connect(
        self,
        store_id: str,
        journal: Journal | None,
        now_ms: Callable[[], int],
        history: Callable[[str], History | None],
        kept: Callable[[str], Durability],
    ) -> None:
        """Make it the feed of this store. `history` returns the rule of a scope, `kept` when it is on disk."""
        self.store_id, self.journal, self.now_ms = store_id, journal, now_ms
        self.past = journal
        self._history, self._kept = history, kept
        if journal is not None:
            self.epoch = journal.epoch
            self.position = journal.first
            self._give_rules()
        self.cursors = ManyCursors(store_id, self.epoch)
        self._floor = self._shown = self.position

    def prime(self) -> None:
        """Begin where the engine that had the store before has ended: with the newest changes of the journal.

        Watches of that engine are about to come with their cursors, even for scopes of which no change is kept: every
        scope is fed for a while. Called before the first change of this engine. Raises StorageError.
        """
        journal = self.journal
        if journal is None:
            return
        events, behind = journal.newest(PRIMED_EVENTS)
        self._exclusive.run(self._prime, events, behind)
        self._exclusive.run(self._let_linger, self.want(None, began=behind), PRIMED_S)

    def _let_linger(self, interest: Interest, time_s: float) -> None:
        interest.users -= 1
        interest.ended_s = self._dispatcher.monotonic() + time_s - LINGER_S
        self._arm(time_s)

    def _prime(self, events: list[StateEvent], behind: int) -> None:
        self._scopes.clear()
        self._behind.clear()
        self._ring.clear()
        self._floor = self.primed = behind
        self._ring.extend(events)
        # Not the revisions of the scopes: only the journal can tell whether a crash took back a revision.
        self._ring_bytes = sum([len(event.new_json or b"") for event in events]) + OVERHEAD * len(events)

    def connect_elsewhere(self, store_id: str, past: Past, epoch: int, position: int) -> None:
        """Make it the feed of changes that are numbered elsewhere: `arrive` enters them, with their positions."""
        self.past = past
        self._numbered_elsewhere = True
        self.begin_anew(store_id, epoch, position, "")

    @exclusive
    def begin_anew(
        self, store_id: str, epoch: int, position: int, why: str, concerns: Callable[[str], bool] = lambda scope: True
    ) -> None:
        """Continue after this position; the changes before it are not complete. Watches end with the reason.

        `concerns` returns whether changes of a scope are missing; a watch of one scope without missing changes goes on.
        """
        self.store_id, self.epoch, self.position = store_id, epoch, position
        self.cursors = ManyCursors(store_id, epoch)
        self._ring.clear()
        self._ring_bytes = 0
        self._floor = self._shown = position
        self._interests.begin_at(position)
        watchers = [watcher for watcher in self.watchers() if watcher.scope is None or concerns(watcher.scope)]
        for scope in [name for name in self._scopes if concerns(name)]:
            del self._scopes[scope]
            self._behind.pop(scope, None)
        for watcher in watchers if why else ():
            watcher.broken = why
        deliver_to(watchers)

    def arrive(self, scope: str, position: int, make: Callable[[], StateEvent | None]) -> None:
        """Enter a change that was numbered elsewhere, in order. `make` makes its event, if it is wanted."""
        deliver_to(self._exclusive.run(self._arrive, scope, position, make))

    def _arrive(self, scope: str, position: int, make: Callable[[], StateEvent | None]) -> list[Watcher]:
        woken: list[Watcher] = []
        if position <= self.position:
            return woken  # it came before, and its reader was interrupted at that time
        event = make() if self.is_wanted(scope) else None
        self.position = position
        events: list[StateEvent] = []
        if event is not None:
            events.append(event)
            self.entered += 1
            fed = self._scopes.get(scope) or self._make_scope(scope)
            fed.begins_at(event.revision - 1)
            self._enter(fed, events, woken)
        self._show(events, woken)
        self._forget_dropped()
        return woken

    def pass_over(self, scopes: Iterable[str], position: int) -> bool:
        """Go on to a position without the changes before it, which are of these scopes. False if any of them is wanted.

        For many changes that were numbered elsewhere: `arrive` takes some microseconds for each.
        """
        return self._exclusive.run(self._pass_over, scopes, position)

    def _pass_over(self, scopes: Iterable[str], position: int) -> bool:
        if any(self.is_wanted(scope) for scope in scopes):
            return False
        if position > self.position:
            self.position = position
            self._show([], [])
            self._forget_dropped()
        return True

    # ------------------------------------------------------------------------------------------------------ interests

    def is_wanted(self, scope: str | None) -> bool:
        """Return whether the changes of a scope are wanted; None: of every scope, even one made later."""
        if scope is None:
            return self._interests.want_all()
        return self._interests.want(scope) or self._history(scope) is not None

    def is_journaled(self, scope: str) -> bool:
        """Return whether the changes of a scope are kept on disk."""
        if self.journal is None or self._kept(scope) == "memory":
            return False
        return self._history(scope) is not None or bool(self._interests.consumers(scope))

    def want(
        self, scope: str | None, prefix: str = "", consumer: int | None = None, *, began: int | None = None
    ) -> Interest:
        """Feed a scope, or all scopes with a prefix, from the next turn of each on.

        `began`: every change of them after this position was entered already, or there was none.
        """
        interest, new = self._exclusive.run(self._want, (scope, prefix, consumer), began)
        if new:
            self._feed(interest)
        return interest

    def _want(self, what: What, began: int | None) -> tuple[Interest, bool]:
        found = self._interests.get(what)
        if found is not None:
            found.users += 1
            return found, False
        # Changes that were entered before are not for it.
        if began is None and not self._numbered_elsewhere:
            self.position += 1
            if not self._holds:
                # Otherwise the cursor of a watch that has seen nothing yet would be before the start of its interest.
                self._shown = self.position
        interest = self._interests.add(what, self.position if began is None else began)
        interest.users = 1
        self._await_durable()
        return interest, True

    def unwant(self, interest: Interest) -> None:
        """End an interest: of a durable trigger at once, of a watch after a while, in which it may return."""
        self._exclusive.run(self._unwant, interest)
        if interest.consumer is not None and not interest.users:
            self._feed(interest)

    def _unwant(self, interest: Interest) -> None:
        interest.users -= 1
        if interest.users:
            return
        interest.ended_s = self._dispatcher.monotonic()
        if interest.consumer is not None:
            self._end_interest(interest)
        else:
            self._arm(LINGER_S)

    def _end_interest(self, interest: Interest) -> None:
        self._interests.remove(interest)
        self._await_durable()
        # Changes that are not entered from now on come after every cursor that was handed out before.
        if not self._numbered_elsewhere:
            self.position += 1

    def _await_durable(self) -> None:
        """Make writers wake the router if there are durable triggers."""
        if self._interests.durable:
            self.awaited[self] = None
        else:
            self.awaited.pop(self, None)

    def _feed(self, interest: Interest) -> None:
        """Apply what is wanted now to the scopes that an interest is about."""
        if interest.consumer is not None:
            self._give_rules()
        self._triggers.refeed(interest.scope)
        if interest.consumer is not None or not interest.users:
            self._exclusive.run(self._refresh, interest.scope)

    def history_changed(self) -> None:
        """Apply rules of the configuration that have changed."""
        self._give_rules()
        self._triggers.refeed(None)
        self._exclusive.run(self._refresh, None)

    def _refresh(self, only: str | None) -> None:
        """Forget the scopes that are not fed any more, and note which ones are journaled. `only`: one scope."""
        for name in list(self._scopes) if only is None else [only]:
            scope = self._scopes.get(name)
            if scope is None:
                continue
            scope.awaited = bool(self._consumers(name))
            if not self.is_wanted(name):
                self._count_saved(scope.unsaved)
                del self._scopes[name]
                self._behind.pop(name, None)
            elif scope.journaled != (journaled := self.is_journaled(name)):
                if scope.unsaved:
                    scope.unsaved_from = scope.unsaved[0].position
                scope.journaled, scope.begin = journaled, None
                self._count_saved(scope.unsaved)
                scope.unsaved.clear()

    def _consumers(self, scope: str) -> Collection[int]:
        return self._interests.consumers(scope)

    def _give_rules(self) -> None:
        if self.journal is None:
            return
        self._rules = Rules(self._history, self._consumers)
        weak = weakref.ref(self)

        def rules() -> Rules | None:
            feed = weak()
            return None if feed is None else feed._rules

        # A weak reference: the store lives until it has saved what a dropped engine has left in memory.
        self.journal.follow(rules)

    def on_committed(self, callback: Callable[[Sequence[StateEvent]], object]) -> None:
        """Call it after each save with the journaled changes that are on disk now, in order. On the saving thread."""
        self._committed.append(callback)

    # ------------------------------------------------------------------------------------------------------ numbering

    def is_waited_for(self) -> bool:
        """True if there is a change to number, and a sleeping watch or a durable trigger may want it."""
        return bool(self.incoming and self.awaited)

    def number(self) -> None:
        """Assign positions to the changes that were entered, and pass them on. On a worker thread."""
        if self.incoming or self._dropped:
            deliver_to(self._exclusive.run(self._number))
            if self._soon:
                soon, self._soon = self._soon, {}
                self.save_soon(list(soon))

    def _number(self) -> list[Watcher]:
        woken: list[Watcher] = []
        incoming = self.incoming
        while incoming:
            batch = list(incoming.values())
            self._give_positions(batch)
            runs = [
                (self._scopes.get(name) or self._make_scope(name), list(group))
                for name, group in groupby(batch, _scope_of)
            ]
            # Up to here, everything can be repeated if memory is refused.
            for scope, events in runs:
                self._note_unsaved(scope, events)
            deque(map(incoming.__delitem__, map(id, batch)), 0)
            try:
                for scope, events in runs:
                    self._enter(scope, events, woken)
                self._show(batch, woken)
            except BaseException:
                self._lose_all()
                raise
        self._forget_dropped()
        return woken

    def _lose_all(self) -> None:
        """Break all watches: memory was refused in the middle, so no watch knows what it has. Each must begin again."""
        self._ring.clear()
        self._later.clear()
        self._ring_bytes, self._floor, self._shown = 0, self.position, self.position
        for scope in self._scopes.values():
            scope.ring.clear()
            scope.floor = None
        for watcher in self.watchers():
            watcher.lost = watcher.lost or 1

    def _give_positions(self, events: Sequence[StateEvent]) -> None:
        position = self.position
        for event in events:
            position += 1
            event.position = position
        self.position = position
        self.entered += len(events)

    def _make_scope(self, name: str) -> FedScope:
        scope = FedScope(name, self.store_id, self._kept(name), journaled=self.is_journaled(name))
        scope.many = tuple([watcher for watcher in self._many if watcher.wants_scope(name)])
        scope.awaited = bool(self._consumers(name))
        self._commits = self._commits or scope.kept == "commit"
        self._scopes[name] = scope
        return scope

    def _note_unsaved(self, scope: FedScope, events: list[StateEvent]) -> None:
        """Keep changes of an interval scope for the save that writes them. A second time it does nothing."""
        scope.begins_at(events[0].revision - 1)
        if scope.kept != "interval":
            return
        self._behind[scope.name] = scope
        if scope.awaited:
            self._soon[scope.name] = None
        if not scope.journaled:
            if scope.unsaved_from is None:
                scope.unsaved_from = events[0].position
            return
        unsaved = scope.unsaved
        if unsaved and unsaved[-1].revision >= events[0].revision:
            last = unsaved[-1].revision
            events = [event for event in events if event.revision > last]
        size = sum([len(event.new_json or b"") for event in events]) + OVERHEAD * len(events)
        unsaved.extend(events)
        self._unsaved += size
        self._unsaved_events += len(events)
        if self._unsaved_events > self._room or self._unsaved - OVERHEAD * self._unsaved_events > self._room_bytes:
            # The save measures it, and knows more.
            self.over = self.over or "the journal is full with what is to be saved"
            self._soon[scope.name] = None
        self.full = bool(self.over) or self._unsaved >= MOST_UNSAVED_BYTES
        if self._unsaved > SAVE_BYTES:
            self._soon[scope.name] = None

    def _enter(self, scope: FedScope, events: list[StateEvent], woken: list[Watcher]) -> None:
        """Put changes of one scope into the ring, and hand them to its watches."""
        scope.ring.extend(events)
        by_key = scope.by_key
        if by_key:
            made = changes_of(events, scope.cursors)
            for watcher in by_key.get(None, ()):
                watcher.take(scope.name, made, woken)
            if len(by_key) > 1 or None not in by_key:
                for change in made:
                    for watcher in by_key.get(change.key, ()):
                        watcher.take(scope.name, (change,), woken)
        # After the watches got them: one that finds nothing to read may continue from here.
        scope.last = events[-1].revision

    def _show(self, events: list[StateEvent], woken: list[Watcher]) -> None:
        """Put settled changes into the ring and hand them to watches of many scopes, after all earlier changes."""
        if self._later or self._holds:
            self._later += events
            self._later.sort(key=_position)
            first = min(self._holds.values(), default=self.position + 1)
            count = bisect_right(self._later, first - 1, key=_position)
            events = self._later[:count]
            del self._later[:count]
        self._ring.extend(events)
        self._ring_bytes += sum([len(event.new_json or b"") for event in events]) + OVERHEAD * len(events)
        if self._many and events:
            everything = any(watcher.everything for watcher in self._many)
            made = changes_of(events, self.cursors, everything=everything)
            for name, group in groupby(made, _scope_of):
                watchers = self._scopes[name].many if name in self._scopes else ()
                changes = list(group) if watchers else []
                for watcher in watchers:
                    watcher.take(name, _real(changes) if everything and not watcher.everything else changes, woken)
        # As for a scope: after the watches got them. Positions that were never shown are passed too.
        self._shown = self.position if not self._holds else min(self._holds.values()) - 1
        if len(self._ring) > RING_EVENTS or self._ring_bytes > RING_BYTES:
            self._trim()

    def _trim(self) -> None:
        """Remove the oldest changes from the ring, an eighth more than is necessary."""
        ring, scopes = self._ring, self._scopes
        too_large = self._ring_bytes > RING_BYTES
        most, most_bytes = RING_EVENTS * 7 // 8, RING_BYTES * 7 // 8
        while len(ring) > 1 and (len(ring) > most or self._ring_bytes > most_bytes):
            event = ring.popleft()
            self._ring_bytes -= len(event.new_json or b"") + OVERHEAD
            self._floor = event.position
            scope = scopes.get(event.scope)
            if scope is not None and scope.ring and scope.ring[0] is event:
                scope.ring.popleft()
                scope.floor = event.revision
        if too_large:
            # Changes that wait for a watch may take no more memory than the ring does.
            for watcher in self.watchers():
                watcher.drop_up_to(self._floor)

    def watchers(self) -> list[Watcher]:
        """Return all watches."""
        found = list(self._many)
        for scope in self._scopes.values():
            for group in scope.by_key.values():
                found += group
        return found

    # -------------------------------------------------------------------------------------------------------- commits

    def hold(self, events: list[StateEvent]) -> Hold | None:
        """Assign positions to the changes of a commit that begins. They are not shown before `settle`."""
        return self._exclusive.run(self._hold, events) if events else None

    def _hold(self, events: list[StateEvent]) -> Hold:
        held = Hold(events)
        name = events[0].scope
        scope = self._scopes.get(name) or self._make_scope(name)
        scope.begins_at(events[0].revision - 1)
        self._give_positions(events)
        self._holds[held] = events[0].position
        return held

    def settle(self, held: Hold) -> None:
        """Show the changes of a commit, which is on disk. A second call does nothing."""
        deliver_to(self._exclusive.run(self._settle, held, shown=True))

    def drop(self, held: Hold) -> None:
        """Drop the changes of a failed commit: their positions stay unused. A second call does nothing."""
        deliver_to(self._exclusive.run(self._settle, held, shown=False))

    def _settle(self, held: Hold, *, shown: bool) -> list[Watcher]:
        woken: list[Watcher] = []
        if self._holds.pop(held, None) is None:
            return woken
        try:
            if shown:
                name = held.events[0].scope
                self._enter(self._scopes.get(name) or self._make_scope(name), held.events, woken)
            self._show(held.events if shown else [], woken)
        except BaseException:
            self._lose_all()
            raise
        return woken

    # ---------------------------------------------------------------------------------------------------------- saves

    @exclusive
    def take(self, scope: str, revision: int) -> tuple[list[StateEvent], int | None]:
        """Return the numbered changes of an interval scope up to a revision that no save has taken, for the journal.

        And the revision after which all of them were entered. An empty list, and None, for a scope that is not
        journaled.
        """
        fed = self._scopes.get(scope)
        if fed is None:
            return [], None
        if fed.unsaved_from is not None:
            left = [event for event in reversed(fed.ring) if event.revision > revision] if fed.last > revision else []
            if not left:
                fed.unsaved_from = None
            elif not fed.journaled:
                fed.unsaved_from = max(fed.unsaved_from, left[-1].position)
        if not fed.journaled:
            return [], None
        unsaved = fed.unsaved
        if unsaved and unsaved[-1].revision <= revision:
            taken = list(unsaved)
            unsaved.clear()
            return taken, fed.begin
        taken = list(takewhile(lambda event: event.revision <= revision, unsaved))
        for _ in taken:
            unsaved.popleft()
        return taken, fed.begin

    @exclusive
    def take_held(self, batch: Batch) -> tuple[list[StateEvent], int | None]:
        """As `take`, for the changes of a commit. It may be called again."""
        fed = self._scopes.get(batch.actor.scope)
        if fed is None or not fed.journaled or batch.held is None:
            return [], None
        return batch.held.events, fed.begin

    @exclusive
    def settled(self, batches: Sequence[Batch] = ()) -> int:
        """Return the position up to which everything is on disk once these commits and all results of `take` are."""
        done = {batch.held for batch in batches}
        first = self.position + 1
        for scope in list(self._behind.values()):
            if scope.unsaved:
                first = min(first, scope.unsaved[0].position)
            if scope.unsaved_from is not None:
                first = min(first, scope.unsaved_from)
            elif not scope.unsaved:
                del self._behind[scope.name]
        held = [position for hold, position in self._holds.items() if hold not in done]
        return min([first, *held]) - 1

    def must_wait(self, scope: str) -> bool:
        """Return whether a write to a scope must wait because too many changes are not saved yet."""
        if not self.full:
            return False
        fed = self._scopes.get(scope)
        if self.over and (bool(self._consumers(scope)) if fed is None else fed.awaited) and self.is_journaled(scope):
            return True
        return fed is not None and fed.journaled and fed.kept == "interval" and self._unsaved >= MOST_UNSAVED_BYTES

    def set_room(self, over: str, events: int, size: int) -> None:
        """Record why the journal is full ("": it is not), and how much more it may get. On the saving thread."""
        self._exclusive.run(self._set_room, over, events, size)
        if not self.full:
            self.made_room()

    def _set_room(self, over: str, events: int, size: int) -> None:
        self.over, self._room, self._room_bytes = over, events, size
        self.full = bool(over) or self._unsaved >= MOST_UNSAVED_BYTES

    def committed(self, events: Sequence[StateEvent]) -> None:
        """Note that these journaled changes are on disk; they are in order of position. For the actor that saves."""
        if events:
            self._exclusive.run(self._count_saved, events)
        for callback in self._committed:
            contained(lambda callback=callback: callback(events), "reporting saved changes", log)  # type: ignore[misc]  # mypy cannot infer a default argument

    def _count_saved(self, events: Collection[StateEvent]) -> None:
        if not self._unsaved:
            return
        saved = len(events)
        if self._commits:
            scopes = self._scopes
            saved = sum(1 for event in events if (fed := scopes.get(event.scope)) is None or fed.kept == "interval")
        # Their bytes are assumed to be average: adding them up takes as long as saving half of them.
        left = max(0, self._unsaved_events - saved)
        self._unsaved = self._unsaved * left // self._unsaved_events
        self._unsaved_events = left
        if self.full:
            self.full = bool(self.over) or self._unsaved >= MOST_UNSAVED_BYTES
            self.made_room()

    # -------------------------------------------------------------------------------------------------------- watches

    def add(self, watcher: Watcher, owner: object) -> None:
        """Give a watch the changes from now on. It is forgotten when nothing refers to `owner` any more."""
        dropped = self._dropped
        watcher.owner = weakref.ref(owner, lambda _: dropped.append(watcher))
        wanted = [(watcher.scope, watcher.scope_prefix)] if watcher.among is None else watcher.among.wanted
        watcher.interests = [self.want(scope, prefix) for scope, prefix in wanted]
        self._exclusive.run(self._add, watcher)
        self._arm(LINGER_S)  # it may be dropped without a close

    def _add(self, watcher: Watcher) -> None:
        if watcher.scope is None:
            self._many = (*self._many, watcher)
            for name, scope in self._scopes.items():
                if watcher.wants_scope(name):
                    scope.many = (*scope.many, watcher)
        else:
            scope = self._scopes.get(watcher.scope) or self._make_scope(watcher.scope)
            scope.by_key = {**scope.by_key, watcher.key: (*scope.by_key.get(watcher.key, ()), watcher)}
        watcher.ending = self._ended

    def remove(self, watcher: Watcher) -> None:
        """Give a watch no more changes. Its scopes stay fed for a while. Idempotent."""
        self._exclusive.run(self._remove, watcher)

    def _remove(self, watcher: Watcher) -> None:
        self.awaited.pop(watcher, None)
        if not watcher.interests:
            return
        if watcher.scope is None:
            self._many = _without(self._many, watcher)
            for scope in self._scopes.values():
                if watcher in scope.many:
                    scope.many = _without(scope.many, watcher)
        elif (found := self._scopes.get(watcher.scope)) is not None:
            left = _without(found.by_key.get(watcher.key, ()), watcher)
            found.by_key = {key: group for key, group in found.by_key.items() if key != watcher.key}
            if left:
                found.by_key[watcher.key] = left
        interests, watcher.interests = watcher.interests, []
        for interest in interests:
            self._unwant(interest)

    def _forget_dropped(self) -> None:
        while self._dropped:
            self._remove(self._dropped.pop())

    def _arm(self, delay_s: float) -> None:
        if self._timer is None and not self._ended:
            self._timer = self._dispatcher.call_later(delay_s, weakly(self._ring_timer))

    def _ring_timer(self) -> None:
        self._dispatcher.submit(self.forget_unused)

    def forget_unused(self) -> None:
        """Stop feeding the scopes whose last watch ended a while ago. Called from time to time."""
        self._timer = None
        gone, next_s = self._exclusive.run(self._end_interests)
        # Those in many scopes together: each of them would go through all scopes.
        for scope in {interest.scope for interest in gone}:
            self._triggers.refeed(scope)
            self._exclusive.run(self._refresh, scope)
        if next_s is not None:
            self._arm(next_s)

    def _end_interests(self) -> tuple[list[Interest], float | None]:
        self._forget_dropped()
        now_s = self._dispatcher.monotonic()
        gone: list[Interest] = []
        left: list[float] = []
        for interest in self._interests.unused():
            left_s = interest.ended_s + LINGER_S - now_s
            if left_s > 0:
                left.append(left_s)
            else:
                gone.append(interest)
                self._end_interest(interest)
        if left or self.watchers():
            left.append(LINGER_S)
        return gone, max(min(left), SOONEST_S) if left else None

    @exclusive
    def from_ring(self, watcher: Watcher, cursor: ScopeCursor | ManyCursor) -> list[StateEvent] | None:
        """Begin a new watch after the changes in the ring, and return those of them that are after the cursor.

        None: the ring does not reach back that far, and the watch has not begun.
        """
        if isinstance(cursor, ScopeCursor):
            scope = self._scopes[cursor.scope]
            revision = cursor.revision or 0
            if scope.floor is None or revision < scope.floor:
                return None
            found = [*takewhile(lambda event: event.revision > revision, reversed(scope.ring))][::-1]
            watcher.begin({cursor.scope: found[-1].revision if found else revision})
            return found
        position, among = cursor.position or 0, watcher.among
        wanted = [(None, watcher.scope_prefix)] if among is None else among.before()
        covered = all(self._interests.cover(scope, prefix, position) for scope, prefix in wanted)
        if not self._has_saved(cursor.epoch, position) or not self._floor <= position <= self.position or not covered:
            return None
        found = [*takewhile(lambda event: event.position > position, reversed(self._ring))][::-1]
        watcher.begin({}, found[-1].position if found else position)
        return [event for event in found if watcher.wants_scope(event.scope)]

    def _has_saved(self, epoch: int, position: int) -> bool:
        """Return whether the changes up to a position of an epoch exist."""
        return epoch == self.epoch or (self.journal is not None and not self.journal.was_lost(epoch, position))

    @exclusive
    def begin_at(self, watcher: Watcher, revisions: dict[str, int], position: int) -> None:
        """Begin a watch that has the changes up to these revisions or this position: from a snapshot, or from now."""
        if watcher.scope is not None:
            scope = self._scopes[watcher.scope]
            revision = revisions[watcher.scope]
            if scope.floor is None:
                # Not `begin`: there may be changes without a position, from before the watch, that the journal gets.
                scope.floor = revision
        watcher.begin(revisions, position)

    def shown(self) -> int:
        """Return the position up to which watches of many scopes have everything."""
        return self._shown

    def scope(self, name: str) -> FedScope:
        """Return the feed's record of a watched scope."""
        return self._scopes[name]

    def last_of(self, name: str) -> int:
        """Return the revision up to which watches of a scope have everything; 0 if that is not known."""
        scope = self._scopes.get(name)
        return 0 if scope is None else scope.last

    def look_soon(self) -> None:
        """Make a worker thread number the changes that were entered. From any thread."""
        if self.incoming:
            self._wake()

    def end(self) -> None:
        """End the watches after the changes that they have: the engine has closed. Idempotent."""
        self.number()
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        watchers = self._exclusive.run(self.watchers)
        for watcher in watchers:
            watcher.ending = True
        deliver_to(watchers)

    @property
    def ended(self) -> bool:
        """True once watches end."""
        return self._ended

    def disown(self) -> None:
        """In a forked child: the guard may be held by a thread that is not here."""
        self._exclusive = Guard()
        self._ended = True
        self.incoming.clear()  # no thread here would number them, and watches wait for that before they end
        for watcher in self.watchers():
            watcher.ending = True


def _real(changes: list[Change]) -> list[Change]:
    """Return the changes without deletes of keys that did not exist."""
    return [change for change in changes if change.json is not None or change.old_json is not None]


def deliver_to(watchers: Iterable[Watcher]) -> None:
    """Wake those that wait."""
    for watcher in watchers:
        watcher.wake()


_position: Final = attrgetter("position")
_scope_of: Final = attrgetter("scope")


def _without(group: tuple[Watcher, ...], watcher: Watcher) -> tuple[Watcher, ...]:
    return tuple([one for one in group if one is not watcher])
