"""One consumer of the journal: the events that it takes, the outcomes of its deliveries, and its state."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.backlog import size_of
from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, Held, Outcome
from scopestate.actors.containment import Log
from scopestate.actors.holders import Holder
from scopestate.actors.progress import Progress
from scopestate.actors.shared_consumer import HERE, SharedConsumer
from scopestate.errors import StorageError, Unsupported
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.consumers import JournalConsumers
    from scopestate.actors.interests import Interest
    from scopestate.actors.journal import ConsumerChange, Pending, SavedConsumer
    from scopestate.ops.results import StateEvent
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

MOST_LIVE: Final = 4096
"""Committed events that wait in memory for one consumer; with more it reads them from the journal."""
MOST_LIVE_BYTES: Final = 16 << 20
"""As `MOST_LIVE`, for the bytes of their values."""
PAGE: Final = 1000
"""Events that are read from the journal at a time."""
MANY_ENDED: Final = 1000
"""This many outcomes are saved at once; fewer wait for the next save, at most `consumers.SAVED_AFTER_S`."""
LOOK_AGAIN_S: Final = 0.05
"""While a consumer is behind: how soon it checks again for events whose saves have overtaken one another."""

JOURNAL_FULL: Final = "journal full"
"""The reason of a pause by the limit of the journal; the number of lost events follows."""
_TRIMMED: Final = "of its events were trimmed before it had them"
_LOST: Final = re.compile(f"{JOURNAL_FULL}; ([0-9]+) {_TRIMMED}")


class Filter(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which scopes a consumer needs, as the store keeps it: its events are kept even while it has no trigger."""

    scope: str | None = None
    scope_prefix: str | None = None

    @classmethod
    def of(cls, trigger: Trigger) -> Filter:
        """Return the filter of a trigger."""
        return cls(trigger.scope, trigger.scope_prefix)


class JournalConsumer(ConsumerPort):
    """One consumer of a store's journal.

    Committed events come from the saving actor. Events that do not fit into memory, and those that an earlier session
    has left, are read from the journal in pages. Meanwhile, new events are collected again from the moment a page is
    read: each is either on a page, or collected after it.
    """

    notes_at_once = 64

    def __init__(self, saved: SavedConsumer, owner: JournalConsumers) -> None:
        self.name = saved.name
        self.number = saved.number
        self._owner = owner
        self._journal = owner.journal
        self._exclusive = Guard()
        self._progress = Progress(saved)
        self._left = deque(self._progress.pending_at_start())
        """Positions of deliveries that an earlier session has left and that are not fetched yet."""
        self._live: deque[StateEvent] = deque()
        self._live_bytes = 0
        self._collects = False
        self._settled = owner.settled
        """Every event up to here is on disk, and was announced."""
        self._behind_to = owner.settled
        """Events up to here may be in the journal only."""
        self._ended: list[Outcome] = []
        self._paused = saved.paused
        self.trimmed = trimmed_of(saved.paused)
        """How many events it has lost because the journal was full; None: it is not paused for that reason."""
        self._max_dead = 0
        self._handler: Holder | None = None
        """Takes its events in this engine, even if its trigger was unregistered."""
        self._running: Callable[[], Mapping[int, int]] = dict
        self.trigger: Trigger | None = None
        """The trigger that takes its events; None: there is none."""
        self.filter = msgspec.json.decode(saved.filter, type=Filter) if saved.filter else Filter()
        self.interest: Interest | None = None
        self._wake: Callable[[], object] | None = None
        self._lost: Callable[[Sequence[int]], object] | None = None
        self.forgotten = False
        self.last_saved_s = 0.0
        self.reading = threading.Lock()  # on worker threads only
        self.shared: SharedConsumer | None = None
        """Says which engine handles which event; None: this engine alone takes events."""

    # ------------------------------------------------------------------------------------------------------ fetching

    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        here = Holder(HERE, trigger, self._owner.now_ms(), wake, lost, self._owner.dispatcher.monotonic)
        with self.reading:
            self._handler, self._running = here, running
            shared = self.shared
            if shared is None:
                self._wake, self._lost = wake, lost
                self.follow(trigger)
                gone = self._claim_running(running())
        if self._owner.expects_claims and self._progress.has_begun:
            self.share()
        if shared is not None:
            known = shared.here
            held = {} if known is None else {position: hold.begun for position, hold in list(known.holds.items())}
            held = {**held, **running()}
            joined = shared.join(here, [(position, attempt, 0) for position, attempt in held.items()])
            if joined is None:  # sharing has just ended
                self.start(trigger, wake, lost, running)
                return
            gone = joined
        if gone:
            lost(gone)
        wake()

    def _claim_running(self, running: Mapping[int, int]) -> list[int]:
        """Return those of the running attempts whose deliveries are over. The others are not delivered again now."""
        if not running:
            return []
        self.claim(list(running))
        return [position for position in running if position not in self._progress.open]

    def follow(self, trigger: Trigger) -> None:
        """From now on, read the events that this trigger wants."""
        self.trigger = trigger
        self._max_dead = trigger.max_dead
        wanted = Filter.of(trigger)
        if wanted != self.filter:
            self._owner.change_filter(self, wanted)

    def stop(self) -> None:
        shared = self.shared
        if shared is not None:
            shared.retire(HERE)
        else:
            self.trigger = None
            self._exclusive.run(self._forget_live)

    def share(self) -> SharedConsumer:
        """Return the object that divides its events among engines from now on. Raises StorageError."""
        with self.reading:
            if self.shared is None:
                shared = SharedConsumer(self, self._owner.now_ms, self._owner.dispatcher.monotonic)
                handler = self._handler
                if handler is not None:
                    monotonic = self._owner.dispatcher.monotonic
                    shared.expect(
                        Holder(HERE, handler.trigger, handler.since_ms, handler.wake, handler.lost, monotonic)
                    )
                # First: deliveries that end from here on are reported to both.
                self.shared = shared
                if self._owner.expects_claims and self._progress.has_begun:
                    shared.expect_claims()
                    self._owner.end_claims_in_time(shared)
                if handler is not None:
                    try:
                        shared.begin(self.open_items(), self._running())
                    except StorageError:
                        self.shared = None
                        raise
                self._wake, self._lost = shared.wake_all, shared.lose
                stopped, self.trigger = self.trigger is None, self.trigger or shared.leading
            else:
                stopped = False
        if stopped:
            self.shared.retire(HERE)
        return self.shared

    def is_served_elsewhere(self) -> bool:
        """Return whether another engine takes events of it, or may come back for what it was handling."""
        shared = self.shared
        if shared is not None:
            return shared.is_served_elsewhere
        return self._owner.expects_claims and self._progress.has_begun

    def end_sharing(self) -> None:
        """Stop sharing: from now on this engine alone takes the events."""
        shared = self.shared
        here = None if shared is None else shared.here
        if here is not None:
            self._wake, self._lost, self._handler, self.shared = here.wake, here.lost, here, None

    def open_items(self) -> list[Held]:
        """Return the deliveries that were fetched and are not over, in order."""
        positions = self._exclusive.run(self._open_positions)
        return [Held(event) for event in self._journal.read_at(positions)]

    def _open_positions(self) -> list[int]:
        self._settle_ended()
        return [position for position in self._progress.open if not self._progress.is_left(position)]

    def claim(self, positions: Sequence[int]) -> list[Held]:
        """Return those of these events that are not over and were not fetched, as fetched now."""
        if not positions:
            return []
        events = self._journal.read_at(sorted(positions))
        return self._exclusive.run(self._claim, events)

    def _claim(self, events: Sequence[StateEvent]) -> list[Held]:
        progress = self._progress
        found = []
        for event in events:
            position = event.position
            if progress.is_left(position):
                if position in self._left:
                    self._left.remove(position)
                progress.fetched(position)
                found.append(progress.held(event))
            elif progress.fetched(position):
                found.append(progress.held(event))
        return found

    def _forget_live(self) -> None:
        self._collects = False
        if self._live:
            self._behind_to = max(self._behind_to, *[event.position for event in self._live])
            self._live.clear()
            self._live_bytes = 0

    def committed(self, events: Sequence[StateEvent], size: int, settled: int) -> None:
        """Take events that are now on disk, with the bytes of their values. On the saving thread."""
        if self._exclusive.run(self._committed, events, size, settled):
            self.wake()

    def _committed(self, events: Sequence[StateEvent], size: int, settled: int) -> bool:
        self._settled = settled
        fits = len(self._live) + len(events) <= MOST_LIVE and self._live_bytes + size <= MOST_LIVE_BYTES
        if self._collects and fits:
            self._live.extend(events)
            self._live_bytes += size
            if not self._live and self._behind_to <= self._progress.floor:
                self._progress.reach(settled)
        elif events:
            self._collects = False
            self._live.clear()
            self._live_bytes = 0
            self._behind_to = max(self._behind_to, *[event.position for event in events])
        return bool(events)

    def wake(self) -> None:
        """Wake the handler: there may be something to fetch. From any thread."""
        wake = self._wake
        if wake is not None and self.trigger is not None:
            wake()

    def fetch(self, most: int) -> list[Held]:
        with self.reading:
            shared = self.shared
            if shared is None:
                return self.read(most)
        return shared.fetch(shared.here, most)

    def read(self, most: int) -> list[Held]:
        """Return the next events for all engines together; the caller holds `reading`."""
        trigger = self.trigger
        if trigger is None or self.forgotten:
            return []
        found, page = self._exclusive.run(self._fetch_live, trigger, most)
        if page is None:
            return found
        if self._left:
            return self._fetch_left(most)
        floor, settled = page
        events = self._journal.read(floor, settled, most=min(most, PAGE)) if settled > floor else []
        found, look_s = self._exclusive.run(self._take_page, trigger, events, floor, settled)
        if look_s:
            self._owner.dispatcher.call_later(look_s, self.wake)
        elif look_s is not None and not found:
            self.wake()
        return found

    def _fetch_live(self, trigger: Trigger, most: int) -> tuple[list[Held], tuple[int, int] | None]:
        """Return the events in memory; if there are none, the bounds of the page to read, or None."""
        progress, live = self._progress, self._live
        found: list[Held] = []
        self._collects = True
        if self._left or self._behind_to > progress.floor:
            return [], (progress.floor, self._settled)
        while live and len(found) < most:
            event = live.popleft()
            self._live_bytes -= size_of(event)
            if not trigger.matches(event):
                progress.passed(event.position)
            elif progress.fetched(event.position):
                found.append(progress.held(event))
        if not live:
            progress.reach(self._settled)
        return found, None

    def _fetch_left(self, most: int) -> list[Held]:
        positions = self._exclusive.run(self._take_left, min(most, PAGE))
        events = self._journal.read_at(positions)
        found = self._exclusive.run(self._hold_left, positions, events)
        if not found:
            self.wake()
        return found

    def _take_left(self, most: int) -> list[int]:
        return [self._left.popleft() for _ in range(min(most, len(self._left)))]

    def _hold_left(self, positions: list[int], events: list[StateEvent]) -> list[Held]:
        there = {event.position for event in events}
        for position in positions:
            if position not in there:
                log.error("consumer %r: the journal has lost the event at position %d", self.name, position)
                self._progress.lost(position)
        found = []
        for event in events:
            held, trigger = self._progress.held(event), self.trigger
            if trigger is None or trigger.matches(event):
                found.append(held)
            else:
                self._progress.lost(event.position)  # its trigger now has other filters
        return found

    def _take_page(
        self, trigger: Trigger, events: list[StateEvent], floor: int, settled: int
    ) -> tuple[list[Held], float | None]:
        """Return the events of a page, and after how many seconds there may be more; None: when it is woken."""
        progress = self._progress
        found = [
            progress.held(event)
            for event in events
            if (trigger.matches(event) or progress.is_left(event.position)) and progress.fetched(event.position)
        ]
        progress.reach(events[-1].position if events else settled)
        known = set(self._left)
        self._left += [position for position in progress.overlooked() if position not in known]
        if progress.floor >= self._behind_to:
            # Events that were collected since the page was requested, and are not on it, follow.
            self._live = deque([event for event in self._live if event.position > progress.floor])
            self._live_bytes = sum(map(size_of, self._live))
            return found, 0.0 if self._live else None
        # Nothing to read although there is more: one save has overtaken another.
        return found, LOOK_AGAIN_S if progress.floor == floor else 0.0

    # ------------------------------------------------------------------------------------------------------ outcomes

    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        shared = self.shared
        if shared is None:
            self.note(attempts)
            return
        here = shared.here
        gone = [position for position, _ in attempts] if here is None else shared.began(here, attempts)
        if gone and self._handler is not None:
            self._handler.lost(gone)  # they were given to another engine in the meantime

    def note(self, attempts: Sequence[tuple[int, int]]) -> None:
        """Record attempts that begin, in whichever engine."""
        number = self.number
        self._journal.note_attempts([(number, position, attempt) for position, attempt in attempts])

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        is_taken = self.shared is None
        if is_taken:
            # As `take`, without one more call for each event.
            self._ended += outcomes
            self._owner.note_ended(many=len(self._ended) >= MANY_ENDED)
        told = None
        while (shared := self.shared) is not None and shared is not told:
            # Again, if sharing has begun in between with these as open deliveries.
            here = shared.here
            if here is not None:
                shared.ended(here, outcomes, is_taken=is_taken)
            elif not is_taken:
                self.take(outcomes)
            told, is_taken = shared, True

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Record how attempts have ended, in whichever engine."""
        self._ended += outcomes
        self._owner.note_ended(many=len(self._ended) >= MANY_ENDED)

    def flush(self) -> None:
        self._owner.flush()

    def _settle_ended(self) -> None:
        ended = self._ended
        count = len(ended)
        if count:
            now_ms = self._owner.now_ms()
            for outcome in ended[:count]:
                self._progress.end(outcome, now_ms)
            del ended[:count]

    @exclusive
    def collect(self) -> ConsumerChange | None:
        """Return what the current save has to write."""
        self._settle_ended()
        return None if self.forgotten else self._progress.change()

    @exclusive
    def saved(self, change: ConsumerChange) -> None:
        """Note that the result of `collect` is on disk."""
        self._progress.saved(change)

    def transaction(self, position: int, scope: str) -> Any:
        if self._owner.durability_of(scope) == "memory":
            raise Unsupported(
                "a transaction of a delivery", f"what is written to scope {scope!r} is never saved (durability memory)"
            )
        if not self._exclusive.run(self._join, position):
            # Another engine, or a transaction whose answer was lost, has acknowledged it: no effect may happen twice.
            raise Unsupported("a delivery that is over", f"'{self.name}:{position}' was handled before")
        return ((self.number, position),)

    def _join(self, position: int) -> bool:
        self._settle_ended()
        if position not in self._progress.open:
            return False
        self._progress.join(position)
        return True

    @exclusive
    def transaction_failed(self, position: int) -> None:
        self._progress.part(position)

    @exclusive
    def is_acknowledged(self, position: int) -> bool:
        self._settle_ended()
        return position not in self._progress.open

    @exclusive
    def joined_is_saved(self, position: int) -> None:
        """Note that the transaction that acknowledges this delivery is on disk."""
        self._progress.joined_is_saved(position)

    # --------------------------------------------------------------------------------------------------------- state

    @exclusive
    def full(self, letters: int) -> bool:
        progress = self._progress
        if progress.dead >= self._max_dead:
            return True
        progress.dead += letters
        return False

    def paused(self) -> str | None:
        return self._paused

    @exclusive
    def read_from_disk(self) -> None:
        """Read from disk first: a new consumer begins before the events that are announced from now on."""
        self._behind_to = max(self._behind_to, self._settled, self._owner.feed.position)

    def pause(self, why: str) -> None:
        self.set_paused(why)
        self._journal.pause_consumer(self.number, why)

    def set_paused(self, why: str | None) -> None:
        """Record that it is paused, or not."""
        if why is None and self.trimmed:
            log.error(
                "consumer %r continues; the journal was full, and %d of its events were trimmed",
                self.name,
                self.trimmed,
            )
        self._paused, self.trimmed = why, trimmed_of(why)
        self.wake()

    @exclusive
    def behind(self) -> int:
        """Return approximately how many events wait for it, in constant time; events of other scopes are included."""
        self._settle_ended()
        return len(self._progress.open) + max(self._settled - self._progress.floor, 0)

    def pause_as_full(self) -> None:
        """Pause it, because the journal is full and it is the slowest consumer: it may lose events from now on."""
        log.error("the journal is full: consumer %r is paused, and its oldest events are trimmed", self.name)
        self.pause(JOURNAL_FULL)

    def lose(self, positions: Sequence[int]) -> bool:
        """Lose these events, its oldest ones. False: something must be saved first. On the saving thread."""
        lost = self._exclusive.run(self._losing, positions)
        if lost is None:
            return False
        why = f"{JOURNAL_FULL}; {(self.trimmed or 0) + len(lost)} {_TRIMMED}"
        self._journal.skip(self.number, positions, why)
        gone = self._exclusive.run(self._skip, positions)
        self._paused, self.trimmed = why, trimmed_of(why)
        if gone and self._lost is not None:
            self._lost(gone)
        return True

    def _losing(self, positions: Sequence[int]) -> list[int] | None:
        self._settle_ended()
        return self._progress.losing(positions)

    def _skip(self, positions: Sequence[int]) -> list[int]:
        gone = self._progress.skip(positions)
        skipped = set(positions)
        self._left = deque([position for position in self._left if position not in skipped])
        return gone

    @exclusive
    def status(self) -> ConsumerStatus:
        self._settle_ended()
        oldest = self._progress.oldest()
        after = self._progress.floor if oldest is None else min(oldest - 1, self._progress.floor)
        more, oldest_ms = self._owner.lag(after, self._progress.floor)
        lag_events = len(self._progress.open) + max(more - len(self._progress.above), 0)
        lag_ms = self._owner.now_ms() - oldest_ms if oldest_ms else 0
        return ConsumerStatus(
            self.name,
            lag_events,
            max(lag_ms, 0) / 1000,
            0,
            0,
            self._progress.dead,
            self._paused,
            None if self.trigger is None else self.trigger.trigger_id,
        )

    def mark(self) -> int:
        return self._settled

    def reached(self, mark: int) -> bool:
        return self._exclusive.run(self._reached_all, mark)

    def is_read_to(self, mark: int) -> bool:
        """Return whether every event up to a position was fetched."""
        return self.reached(mark)

    def _reached_all(self, mark: int) -> bool:
        return not (self._left or self._live) and self._progress.floor >= min(mark, self._settled)

    def reopen(self, deliveries: Sequence[Pending]) -> None:
        """Make deliveries of its dead letters again. They are fetched like those that an earlier session has left."""
        self._exclusive.run(self._reopen, deliveries)
        self._recount()
        self.wake()

    def _reopen(self, deliveries: Sequence[Pending]) -> None:
        self._settle_ended()
        known = set(self._left)
        for pending in deliveries:
            self._progress.reopen(pending)
            if pending.position not in known:
                self._left.append(pending.position)

    def purged(self, held: Sequence[int]) -> None:
        """Continue the lanes that these positions held back: dead letters were removed, perhaps also its own."""
        self._exclusive.run(self._purged, held)
        self._recount()
        if self._lost is not None and held:
            self._lost(held)

    def _purged(self, held: Sequence[int]) -> None:
        self._settle_ended()
        for position in held:
            if position in self._left:
                self._left.remove(position)
            self._progress.released(position)

    def _recount(self) -> None:
        self._progress.dead = self._journal.count_letters(self.number)


def trimmed_of(why: str | None) -> int | None:
    """Return how many events a consumer has lost to a full journal, by the reason of its pause; None: another one."""
    if why == JOURNAL_FULL:
        return 0
    found = _LOST.fullmatch(why or "")
    return int(found[1]) if found is not None else None
