"""What a shared consumer knows of the engines that handle its events: which events each holds, in which lanes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from scopestate.actors.consuming import Held, Outcome
from scopestate.actors.pace import Pace
from scopestate.ops.triggers import Trigger

if TYPE_CHECKING:
    pass


class Source(Protocol):
    """The source of a shared consumer's events, which also gets their outcomes: a consumer of the journal."""

    name: str
    number: int
    forgotten: bool
    """True: the consumer is gone, and outcomes of its events no longer count."""
    reading: threading.Lock
    """Held while events are read and sorted, so that they are sorted in the order in which they are read."""

    def read(self, most: int) -> list[Held]:
        """As `ConsumerPort.fetch`; the caller holds `reading`."""

    def open_items(self) -> list[Held]:
        """Return the deliveries that were fetched and are not over, in order."""

    def claim(self, positions: Sequence[int]) -> list[Held]:
        """Return those of these events that are not over and were not fetched, as fetched now."""

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """As `ConsumerPort.ended`, for outcomes that count."""

    def note(self, attempts: Sequence[tuple[int, int]]) -> None:
        """As `ConsumerPort.began`."""

    def follow(self, trigger: Trigger) -> None:
        """From now on, read the events that this trigger wants."""

    def transaction(self, position: int, scope: str) -> Any:
        """As `ConsumerPort.transaction`."""

    def transaction_failed(self, position: int) -> None:
        """As `ConsumerPort.transaction_failed`."""

    def full(self, letters: int) -> bool:
        """As `ConsumerPort.full`."""

    def flush(self) -> None:
        """As `ConsumerPort.flush`."""

    def is_acknowledged(self, position: int) -> bool:
        """As `ConsumerPort.is_acknowledged`."""

    def paused(self) -> str | None:
        """As `ConsumerPort.paused`."""

    def is_read_to(self, mark: int) -> bool:
        """Return whether every event up to a position was fetched."""

    def end_sharing(self) -> None:
        """Stop sharing: from now on this engine alone takes the events."""


class Holder:
    """One engine that takes events of a consumer."""

    def __init__(
        self,
        name: str,
        trigger: Trigger,
        since_ms: int,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        monotonic: Callable[[], float],
    ) -> None:
        """`wake` and `lost` as of `ConsumerPort.start`."""
        self.name = name
        self.trigger = trigger
        self.since_ms = since_ms
        """When its program registered the trigger, in milliseconds since the epoch. The latest one applies."""
        self.wake = wake
        self.lost = lost
        self.holds: dict[int, Hold] = {}
        self.active = 0
        """How many of its events are in lanes that do not wait for another attempt."""
        self.lanes = 0
        """How many such lanes these are: those that it can handle side by side."""
        self.given: deque[Held] = deque()
        """Events that it gets before any others: replayed ones that hold back their lanes, and those left over."""
        self.pace = Pace(monotonic)
        self.is_hungry = False
        """True: its last fetch found too little."""
        self.stands_by = False
        """True: a newer trigger wants other events, or another order."""
        self.is_leaving = False
        """True: it gets no more events, and stops being a holder once it holds none."""

    def room(self) -> int:
        """Return how many more events it may hold."""
        return self.pace.room(self.trigger, self.active, self.lanes)


class Hold:
    """One event that an engine holds."""

    __slots__ = ("begun", "fence", "holder", "item", "lane", "serial", "waits")

    def __init__(self, item: Held, holder: Holder, lane: SharedLane, begun: int = 0) -> None:
        self.item = item
        self.holder = holder
        self.lane = lane
        self.begun = begun
        """The attempt that is running; 0: none is."""
        self.serial = 0
        """The number of the engine's message that reported the attempt; 0: it has ended."""
        self.fence: dict[str, str] | None = None
        """The fence of the transaction of its attempt (`ops.transactions.DeliveryBatch`)."""
        self.waits = False
        """True: it waits for its next attempt, or holds back its lane."""


class Early(NamedTuple):
    """What begins and ends in this engine while its consumer begins to be shared."""

    begun: dict[int, int]
    """Position -> attempt."""
    ended: list[Outcome]


class SharedLane:
    """Events that must be handled one after the other, by one engine at a time."""

    __slots__ = ("holders", "holds", "name", "parked", "waits")

    def __init__(self, name: Any) -> None:
        self.name = name
        self.holders: dict[Holder, int] = {}
        """How many of its events each engine holds. More than one engine may: what they were handling under another
        owner."""
        self.holds: dict[int, Hold] = {}
        self.parked: dict[int, Held] = {}
        """In the order in which they must be handled; all of them come after the held events."""
        self.waits = 0
        """How many of the held events wait for another attempt."""

    def is_open_to(self, holder: Holder) -> bool:
        """Return whether no other engine holds an event of it."""
        return not self.holders or (len(self.holders) == 1 and holder in self.holders)

    def add(self, holder: Holder, by: int) -> None:
        """Count an event that an engine holds, or no longer holds."""
        before = self.holders.pop(holder, 0)
        count = before + by
        if count:
            self.holders[holder] = count
        if not self.waits:
            holder.active += by
            holder.lanes += bool(count) - bool(before)
