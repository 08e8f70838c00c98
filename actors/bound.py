"""The bound of the journal: how much it may keep for durable triggers, and what happens when it is full.

The saving thread measures how much consumers still need, but only if that may have reached the limit: the last
measurement plus everything saved since is an upper bound. If the journal is full, writers wait (`block`), or the
slowest consumer is paused and loses its oldest events (`pause`). docs/design/0051-the-bound-of-the-journal.md has the
reasons.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from scopestate.actors.containment import Log
from scopestate.actors.journal import EVENT_OVERHEAD, Journal, Needed

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.feed import Feed
    from scopestate.actors.journal_consumer import JournalConsumer
    from scopestate.ops.results import StateEvent

log = Log("scopestate.triggers")

_SLACK: Final = 16
"""A full journal has room again once it is below its limit by 1/16, so that the next save does not fill it."""
_SHARE: Final = 10
"""Measuring takes at most 1/10 of the saving thread's time."""
LOOK_AGAIN_S: Final = 0.05
"""Pause before looking again, in seconds, while consumers are handling events."""
_STALE: Final = 0.9
_MOST_LOST: Final = 50_000
"""The most events that a consumer loses at a time."""


class JournalBound:
    """Keeps the journal of a store within its limits. `look` is called on the saving thread only."""

    def __init__(
        self,
        journal: Journal,
        feed: Feed,
        limits: Limits,
        dispatcher: Dispatcher,
        consumers: Mapping[int, JournalConsumer],
        save_all: Callable[[], object],
        save_soon: Callable[[float], object],
    ) -> None:
        """`save_all` saves the progress of consumers and then calls `look`. `save_soon` does so after some seconds."""
        self._journal = journal
        self._feed = feed
        self._limits = limits
        self._dispatcher = dispatcher
        self._consumers = consumers
        self._save_all = save_all
        self._save_soon = save_soon
        self._events = self._bytes = 0
        """Upper bounds of what consumers need: the last measurement plus everything saved since."""
        self._measured: Needed | None = None
        self._asked = True
        """True: the next look measures."""
        self._untrimmed = True
        """True: the journal may hold events that no consumer needs any more."""
        self._next_s = 0.0
        self.fresh = False
        """True: the save before the next look includes all progress of consumers."""
        self.problem = ""
        """Why the journal is full although consumers may be paused; "": it is not full."""

    def begin(self) -> None:
        """Call once the consumers of the store are known. Events left by earlier sessions count too."""
        if self._consumers:
            needed = self._journal.needed()
            self._events, self._bytes = needed.events, needed.bytes
            self._say(needed)

    def ask(self) -> None:
        """Make the next look measure: a limit has changed, or what consumers need. May be called from any thread."""
        self._asked = self._untrimmed = True
        self._save_all()

    def look(self, events: Sequence[StateEvent], size: int) -> None:
        """After a save with these events, check whether there is still room. `size`: bytes of their values."""
        if not self._consumers:
            if self._asked or self._feed.over:
                self._asked = False
                self._events = self._bytes = 0
                self._feed.set_room("", sys.maxsize, sys.maxsize)
            return
        if events:
            self._events += len(events)
            self._bytes += size + EVENT_OVERHEAD * len(events) + sum([len(event.key) for event in events])
        if not (self._asked or self._feed.over or self._exceeds(self._events, self._bytes)):
            if events:
                self._set_room("")
            return
        now_s = self._dispatcher.monotonic()
        if now_s < self._next_s and not self._asked:
            # The journal may be full, so writers wait until it can be measured. Refused: letting them continue. During
            # one slow disk write they would exceed the limit by everything that they write in that time.
            self._have_writers_wait()
            self._save_soon(self._next_s - now_s)
            return
        self._measure(now_s)

    def _measure(self, began_s: float) -> None:
        journal = self._journal
        self._asked = False
        try:
            needed = journal.needed()
            if self._exceeds(needed.events, needed.bytes) and (self._untrimmed or journal.behind):
                self._untrimmed = False
                journal.trim()
                needed = journal.needed()
        except BaseException:
            self._asked = self._untrimmed = True
            raise
        ended_s = self._dispatcher.monotonic()
        self._next_s = ended_s + _SHARE * (ended_s - began_s)
        self._events, self._bytes, self._measured = needed.events, needed.bytes, needed
        over = self._say(needed)
        if over and journal.behind:
            self._again()
        elif over and self._limits.journal_when_full == "pause":
            if self.fresh:
                self._make_room(needed)
            else:
                self._again()

    def _exceeds(self, events: int, size: int) -> bool:
        """Return whether the journal is full. Once full, it stays so until there is room for more than one save."""
        limits = self._limits
        most, most_bytes = limits.journal_events, limits.journal_bytes
        if self._feed.over:
            most, most_bytes = _low(most), _low(most_bytes)
        return events >= most or (most_bytes > 0 and size >= most_bytes)

    def _have_writers_wait(self) -> None:
        if self._measured is not None and self._limits.journal_when_full == "block":
            self._set_room(self._text(self._measured))

    def _say(self, needed: Needed) -> bool:
        """Make writers wait, or let them continue. Return whether the journal is full."""
        over = self._exceeds(needed.events, needed.bytes)
        if not over:
            self.problem = ""
        self._set_room(self._text(needed) if over and self._limits.journal_when_full == "block" else "")
        return over

    def _set_room(self, over: str) -> None:
        limits, feed = self._limits, self._feed
        if over:
            feed.set_room(over, 0, 0)
        elif limits.journal_when_full == "pause":
            feed.set_room("", sys.maxsize, sys.maxsize)
        else:
            most_bytes = limits.journal_bytes or sys.maxsize
            feed.set_room("", limits.journal_events - self._events, most_bytes - self._bytes)

    def _text(self, needed: Needed) -> str:
        slowest, _ = self._slowest(needed, [self._consumers[one] for one in needed.done if one in self._consumers])
        text = (
            f"the journal is full: it keeps {self._events:,} changes of {self._bytes:,} bytes for durable triggers, "
            "and writes to their scopes wait"
        )
        if slowest is not None:
            text += (
                f"; the slowest consumer is {slowest.name!r}: see why it is behind, or forget it with "
                f"`engine.consumers().forget({slowest.name!r})`"
            )
        return f"{text}; or change `journal_events`, `journal_bytes` or `journal_when_full` under `limits`"

    def _slowest(self, needed: Needed, consumers: Sequence[JournalConsumer]) -> tuple[JournalConsumer | None, float]:
        """Return the consumer that needs the largest part, and a lower bound of its part of the whole."""
        limits = self._limits
        by_bytes = bool(limits.journal_bytes) and needed.bytes >= limits.journal_bytes
        slowest, most = None, -1.0
        for consumer in consumers:
            events, size = needed.wanted[consumer.number]
            # `behind()` includes events of other scopes, and `events` includes events that were handled already.
            part = min(consumer.behind() / max(events, 1), 1.0)
            part *= size / max(needed.bytes, 1) if by_bytes else events / max(needed.events, 1)
            if part > most:
                slowest, most = consumer, part
        return slowest, most

    # ---------------------------------------------------------------------------------------------------------- pause

    def _make_room(self, needed: Needed) -> None:
        """Take the oldest events from a consumer that was paused for this purpose; without one, pause the slowest."""
        there = {number: self._consumers[number] for number in needed.done if number in self._consumers}
        paused = [one for one in there.values() if one.trimmed is not None]
        for consumer in sorted(paused, key=lambda one: one.behind(), reverse=True):
            upto = self._needed_by_others(consumer, needed)
            positions = self._journal.oldest_of(consumer.number, upto, self._excess(needed))
            if positions:
                if consumer.lose(positions):
                    self._untrimmed = True
                self._again()
                return
        others = [one for one in there.values() if one.trimmed is None]
        slowest, part = self._slowest(needed, others)
        if slowest is None:
            return
        if part * len(others) < _STALE:
            # All consumers together need less than was measured: they have handled events since.
            self._save_soon(LOOK_AGAIN_S)
            return
        if self._journal.oldest_of(slowest.number, self._journal.settled, 1):
            slowest.pause_as_full()
            self._again()
        else:
            self.problem = (
                f"the journal is full with events that dead letters of consumer {slowest.name!r} hold back: replay or "
                "purge them"
            )

    def _again(self) -> None:
        self._asked = True
        self._save_all()

    def _needed_by_others(self, consumer: JournalConsumer, needed: Needed) -> int:
        """Return the position up to which no consumer needs the events, apart from those paused because it was full."""
        upto = self._journal.settled
        for group in needed.groups:
            if consumer.number in group:
                for number in group:
                    other = self._consumers.get(number)
                    if other is not None and other.trimmed is None:
                        upto = min(upto, needed.done[number])
        return upto

    def _excess(self, needed: Needed) -> int:
        """Return how many events must be removed."""
        limits = self._limits
        excess = needed.events - _low(limits.journal_events) + 1
        if limits.journal_bytes and needed.bytes >= limits.journal_bytes:
            # As if all events had the same size.
            too_large = needed.bytes - _low(limits.journal_bytes) + 1
            excess = max(excess, -(-needed.events * too_large // needed.bytes))
        return min(max(excess, 1), _MOST_LOST)


def _low(limit: int) -> int:
    """Return the smallest size at which a full journal stays full; 0 if there is no limit."""
    return max(limit - limit // _SLACK, 1) if limit else 0
