"""Back-pressure: limits of an engine, the bytes of events that wait for handlers, and writers that wait for room."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from scopestate.actors.containment import Log, contained
from scopestate.actors.shapes import EventBatch, Item
from scopestate.errors import Overloaded

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.handler import HandlerActor

log = Log("scopestate.triggers")

_GONE: Final = object()


class Limits(msgspec.Struct):
    """The current limits: one object for each engine, read without locks, which a reload changes.

    `config.LimitsConfig` says what each means.
    """

    max_value_bytes: int = 0
    """0: no limit. At most the largest value that the store can hold."""
    max_batch_bytes: int = 8 << 20
    longest_name: int = sys.maxsize
    """Characters of the longest scope or key that the store can hold."""
    scope_mailbox: int = 10_000
    scope_mailbox_bytes: int = 1 << 26
    """0: no limit."""
    handler_mailbox: int = 100_000
    handler_mailbox_bytes: int = 1 << 26
    """0: no limit."""
    events_bytes: int = 1 << 28
    """0: no limit."""
    handler_when_full: Literal["block", "drop_oldest", "reject"] = "block"
    handler_timeout_s: float = 0.0
    """0: no limit."""
    handler_attempts: int = 1
    handler_backoff_s: float = 0.1
    max_event_depth: int = 1000
    call_timeout_s: float | None = 30.0
    """None: no limit."""
    journal_events: int = 1_000_000
    journal_bytes: int = 1 << 30
    """0: no limit."""
    journal_when_full: Literal["block", "pause"] = "block"
    close_grace_s: float = 5.0
    passivate_after_s: float = 300.0
    """0: never."""
    max_resident_bytes: int = 0
    """0: no limit."""


class Tally:
    """A counter that any thread may increment without losing an increment: `add()`."""

    __slots__ = ("_count", "add")

    def __init__(self) -> None:
        self._count = itertools.count()  # advanced in C, in one step; `+= 1` on an attribute takes several steps
        self.add = self._count.__next__

    def value(self) -> int:
        """Return the count."""
        return int(repr(self._count)[len("count(") : -1])


class HandlerFull(Overloaded):
    """A handler must catch up before this write: wait for `Backlog.when_room`, then try again.

    The engine's own calls do so; only a caller that asks a scope through its Pykka ref receives it.
    """

    def __init__(self, scope: str, progress: int, journal: str = "") -> None:
        """`journal`: why the journal is full, if that is the reason."""
        super().__init__(
            f"{journal or 'a handler that must see this write is full'}; nothing was written to scope {scope!r}: "
            "try again"
        )
        self.journal = journal
        self.progress = progress
        """`Backlog.progress` before the handler was found full."""


def no_room(scope: str, full: HandlerFull) -> str:
    """Return the message of the error if a handler, or the journal, did not make room in time."""
    if full.journal:
        return f"nothing was written to scope {scope!r} within call_timeout_ms: {full.journal}"
    return (
        f"nothing was written to scope {scope!r}: the mailbox of a handler that must get its event is full and "
        "did not empty within call_timeout_ms; see handler_mailbox, handler_mailbox_bytes, "
        "events_bytes, handler_when_full and handler_timeout_ms under `limits`; or, of a scope whose changes are kept, "
        "too many of them are not saved yet: `health()` says whether saving fails"
    )


class Backlog:
    """The bytes of the events that wait for handlers, and the writers that wait for room.

    No lock is needed, because each counter has one writer: the router's turn adds the bytes that it offers to a
    handler, and a handler reports the bytes that it has taken through `released`. Each copy of an event counts. Copies
    share their values, so if that sum exceeds the limit, the values themselves are counted, each once.
    """

    def __init__(self, dispatcher: Dispatcher, limits: Limits) -> None:
        self._dispatcher = dispatcher
        self._limits = limits
        self.working: Callable[[], Iterable[HandlerActor]] = list
        """Returns all handlers that may have events waiting. Set by the router."""
        self.largest = 0
        """Approximate bytes of the largest event since the router's mailbox was last empty."""
        self.allowance = 0
        """While the events in the router's mailbox have fewer bytes than this, no limit in bytes is reached."""
        self.offered = 0
        """Bytes ever offered to handlers. Written within the router's turns only."""
        self._taken = 0
        self.released: list[int] = []
        """Bytes that have left the mailboxes of handlers since the router's last turn."""
        self._recount_above = 0
        """Up to this many waiting bytes, in which each copy counts, the values need not be counted themselves."""
        self._over_above = -1
        """Above this many waiting bytes, `events_bytes` is exceeded; -1: it was not exceeded when last counted."""
        self._writers: dict[Callable[[], object], int] = {}
        self.progress = 0
        """Changes whenever handlers have made progress."""
        self.blocked = Tally()
        """Writes that found a handler's mailbox full and had to wait."""
        self.refused = Tally()
        """Calls that were refused because a mailbox was full."""

    # ------------------------------------------------------------------------------------------------------ bytes

    def begin_turn(self, events: int) -> None:
        """Call when the router takes this many events out of its mailbox. Within its turn."""
        self.allowance -= events * self.largest
        released = self.released
        count = len(released)
        if count:
            self._taken += sum(released[:count])
            del released[:count]

    def end_turn(self, *, idle: bool) -> None:
        """Call when the router has passed these events on. `idle`: its mailbox is empty."""
        if idle:
            self.largest = 0
        self.allowance = self._smallest_limit() - (self.offered - self._taken)

    def _smallest_limit(self) -> int:
        limits = self._limits
        return min(limits.handler_mailbox_bytes or sys.maxsize, limits.events_bytes or sys.maxsize)

    def queued(self, mailbox: list[Any]) -> int:
        """Return the bytes of the events in the router's mailbox if there are many; 0 for a few: they leave it soon."""
        if len(mailbox) * self.largest * 4 < self._smallest_limit():
            return 0
        return sum(size_of(item[1]) for item in mailbox[:] if type(item) is tuple)

    def is_over(self, queued: int = 0) -> bool:
        """True if the events that wait, for all handlers together, have more bytes than `events_bytes`."""
        limit = self._limits.events_bytes
        if not limit or self.offered - self._taken + queued < limit:
            return False
        waiting = self.offered - self._taken - sum(self.released) + queued
        if waiting < limit:
            return False
        if self._over_above >= 0:
            if waiting > self._over_above:
                return True
        elif waiting <= self._recount_above:
            return False
        real = self._real_bytes() + queued
        if real >= limit:
            self._over_above = waiting - limit // 16
            return True
        self._over_above, self._recount_above = -1, waiting + limit - real
        return False

    def _real_bytes(self) -> int:
        values: dict[int, int] = {}
        for handler in self.working():
            if handler.offered > handler.taken:
                for item in handler.waiting_events():
                    for value in (item.old_json, item.new_json):
                        if value is not None:
                            values[id(value)] = len(value)
        return sum(values.values())

    # ----------------------------------------------------------------------------------------------------- waiting

    def when_room(self, callback: Callable[[], object], full: HandlerFull | None = None, size: int = 0) -> None:
        """Call `callback()`, on any thread, after some handler has made progress.

        `full`: what the failed attempt raised; progress made since that attempt counts too. `size`: bytes of the values
        that wait with the callback, if no caller waits for it.
        """
        self._writers[callback] = size
        if full is not None and full.progress != self.progress:
            # The progress came before the callback was in the table, and there may be no further progress to call it.
            self._dispatcher.submit(self.made_room)

    def stop_waiting(self, callback: Callable[[], object]) -> None:
        """Remove a callback given to `when_room`, if it is still there, because its caller has given up."""
        self._writers.pop(callback, None)

    def has_waiting_room(self) -> bool:
        """False if so much waits for room already that a sender which does not block must be refused."""
        writers, limits = self._writers, self._limits
        most = limits.scope_mailbox_bytes or sys.maxsize
        return len(writers) < limits.scope_mailbox and sum(list(writers.values())) < most

    def made_room(self) -> None:
        """Call when a handler has made progress: notifies the writers that wait."""
        self.progress += 1
        # Callbacks are removed from one table, one atomic pop at a time, so one that is added during the loop is not
        # lost. Each callback that is present now is called once. If its handler is still full, it is added again.
        writers = self._writers
        if not writers:
            return
        for callback in list(writers):
            if writers.pop(callback, _GONE) is not _GONE:
                contained(callback, "telling a writer that a handler has made room", log)


def size_of(event: Item) -> int:
    """Return the bytes of the values of an event, or of all events of a batch."""
    if isinstance(event, EventBatch):
        return event.size
    return len(event.old_json or b"") + len(event.new_json or b"")
