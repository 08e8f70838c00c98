"""Debounce and batches: events of one trigger that wait to be delivered as one event, or together.

Pure bookkeeping, within the turn of a handler: no threads, no clock (docs/design/0048-filters-and-shapes.md).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from heapq import heappop, heappush
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from scopestate.ops.results import EventType, StateEvent
from scopestate.ops.triggers import Order, Trigger

ALL: Final = ""
"""The group of all events, if the order of a trigger does not divide them further."""


class EventBatch(list[StateEvent]):
    """Events that a handler gets together. Like a single event, it has a lane, a depth and a size."""

    __slots__ = ("depth", "key", "position", "positions", "revision", "scope", "size")

    def __init__(self, events: Iterable[StateEvent]) -> None:
        super().__init__(events)
        first = self[0]
        self.scope = first.scope
        self.key = first.key
        self.revision = first.revision
        self.position = first.position
        self.depth = max(event.depth for event in self)
        self.size = sum(map(_size, self))
        """Bytes of the values of the events."""
        self.positions = [position for event in self for position in positions_of(event)]
        """The positions of all events that went into it, including those that a condition removes later."""


Item = StateEvent | EventBatch
"""What is delivered at once."""


def events_of(item: Item) -> list[StateEvent]:
    """Return the events of a delivery: one, or those of a batch."""
    return item if isinstance(item, EventBatch) else [item]


def positions_of(item: Item) -> list[int]:
    """Return the positions in the journal of all events that a delivery stands for: they are acknowledged together."""
    if isinstance(item, EventBatch):
        return item.positions
    positions: list[int] | None = item.__dict__.get(_POSITIONS)
    return [item.position] if positions is None else positions


_POSITIONS: Final = "positions"
"""The attribute with the positions of a debounced event, in its `__dict__`: it is not a field of the event."""


class Settings(NamedTuple):
    """How the events of a trigger are shaped."""

    debounce: float | None
    debounce_max: float
    batch: int | None
    batch_wait: float
    order: Order


def settings_of(trigger: Trigger) -> Settings | None:
    """Return how events are shaped; None: they are delivered one by one."""
    if trigger.debounce is None and trigger.batch is None:
        return None
    longest = math.inf if trigger.debounce_max is None else trigger.debounce_max
    return Settings(trigger.debounce, longest, trigger.batch, trigger.batch_wait, trigger.order)


class _Held(msgspec.Struct):
    """The newest event of a key that is debounced, and the time of the first."""

    event: StateEvent
    first_s: float
    last_s: float


class Shape:
    """The events of one trigger that were taken and are not delivered yet.

    They are added by `add` and taken out by `pop`, once they are due and their lane is free. Times are those of the
    dispatcher's clock, in seconds.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._by_last: OrderedDict[tuple[str, str], _Held] = OrderedDict()
        """(scope, key) -> its event, ordered by the last change, the oldest first."""
        self._by_first: OrderedDict[tuple[str, str], _Held] = OrderedDict()
        """The same, ordered by the first change that waits, the oldest first."""
        self._groups: dict[Hashable, deque[tuple[float, StateEvent]]] = {}
        """Lane -> the events that wait for its batch, each with the time at which it came."""
        self._timed: list[tuple[float, int, Hashable]] = []
        """A heap of times at which a group is due. An outdated entry does no harm."""
        self._ready: OrderedDict[Hashable, None] = OrderedDict()
        """The groups that are due."""
        self._out: deque[StateEvent] = deque()
        """Single events that are due."""
        self._count = 0
        self._look = True
        """True if `pop` may find something whatever the time is."""
        self.waiting = 0
        """The number of events in the shape; several debounced ones of one key count as one."""

    def add(self, event: StateEvent, now_s: float) -> int:
        """Take an event. Returns how many bytes of values are not needed any more."""
        self._look = True
        if self.settings.debounce is None:
            self._group(event, now_s)
            self.waiting += 1
            return 0
        name = (event.scope, event.key)
        held = self._by_first.get(name)
        if held is None:
            held = _Held(_merged(None, event), now_s, now_s)
            self._by_first[name] = self._by_last[name] = held
            freed = 0
            self.waiting += 1
        else:
            before = _size(held.event) + _size(event)
            held.event = _merged(held.event, event)
            held.last_s = now_s
            self._by_last.move_to_end(name)
            freed = before - _size(held.event)
        return freed

    def due_s(self) -> float:
        """Return when the next event or group becomes due; inf if none will."""
        due_s = self._timed[0][0] if self._timed else math.inf
        if self._by_first:
            last, first = next(iter(self._by_last.values())), next(iter(self._by_first.values()))
            due_s = min(due_s, last.last_s + self._quiet_s, first.first_s + self.settings.debounce_max)
        return due_s

    def flush(self) -> None:
        """Make everything due now."""
        self._look = True
        self._release(math.inf)
        for lane, group in self._groups.items():
            self._groups[lane] = deque((-math.inf, event) for _, event in group)
            self._ready[lane] = None

    def pop(self, now_s: float, is_free: Callable[[Hashable], bool]) -> Item | None:
        """Take out the next delivery that is due, and whose lane is free; None if there is none."""
        self._release(now_s)
        if self._out:
            self.waiting -= 1
            return self._out.popleft()
        timed = self._timed
        while timed and timed[0][0] <= now_s:
            due_s, _, lane = heappop(timed)
            group = self._groups.get(lane)
            if group and group[0][0] + self.settings.batch_wait <= due_s:
                self._ready[lane] = None
        for lane in self._ready:
            if is_free(lane):
                return self._take(lane, now_s)
        self._look = False
        return None

    def look_again(self) -> None:
        """Note that a lane may have become free."""
        self._look = True

    def events(self) -> list[StateEvent]:
        """Return the events in the shape, approximately: the holder of the claim may add and take some."""
        held = [one.event for one in self._by_first.copy().values()]
        grouped = [event for group in list(self._groups.values()) for _, event in group.copy()]
        return [*held, *self._out.copy(), *grouped]

    def is_due(self, now_s: float) -> bool:
        """Return whether `pop` may find something."""
        return self._look or self.due_s() <= now_s

    # ------------------------------------------------------------------------------------------------------------

    @property
    def _quiet_s(self) -> float:
        return self.settings.debounce or 0.0

    def _release(self, now_s: float) -> None:
        """Release the keys that have been debounced for long enough."""
        if self.settings.debounce is None:
            return
        by_last, by_first, quiet_s, longest_s = self._by_last, self._by_first, self._quiet_s, self.settings.debounce_max
        while by_last:
            name, held = next(iter(by_last.items()))
            if held.last_s + quiet_s > now_s:
                name, held = next(iter(by_first.items()))
                if held.first_s + longest_s > now_s:
                    return
            del by_last[name], by_first[name]
            if self.settings.batch is None:
                self._out.append(held.event)
            else:
                self._group(held.event, now_s if now_s != math.inf else held.last_s)

    def _group(self, event: StateEvent, now_s: float) -> None:
        """Put an event into the group of its lane."""
        order = self.settings.order
        lane = event.scope if order == "scope" else (event.scope, event.key) if order == "key" else ALL
        group = self._groups.get(lane)
        if group is None:
            group = self._groups[lane] = deque()
            self._time(now_s, lane)
        group.append((now_s, event))
        if len(group) >= (self.settings.batch or 1):
            self._ready[lane] = None

    def _time(self, first_s: float, lane: Hashable) -> None:
        self._count += 1  # lanes need not be comparable
        heappush(self._timed, (first_s + self.settings.batch_wait, self._count, lane))

    def _take(self, lane: Hashable, now_s: float) -> EventBatch:
        """Take a batch out of a group."""
        group, most = self._groups[lane], self.settings.batch or 1
        taken = [event for _, event in islice(group, most)]
        for _ in taken:
            group.popleft()
        if not group:
            del self._groups[lane], self._ready[lane]
        elif len(group) < most and group[0][0] + self.settings.batch_wait > now_s:
            del self._ready[lane]
            self._time(group[0][0], lane)
        self.waiting -= len(taken)
        return EventBatch(taken)


def _merged(before: StateEvent | None, event: StateEvent) -> StateEvent:
    """Return the one event that stands for two of the same key.

    Its kind describes the change from before the first to after the last.
    """
    made = event.copy()
    if before is None:
        made.coalesced = 1
        return made
    if event.position:
        positions = made.__dict__[_POSITIONS] = positions_of(before)
        positions.append(event.position)
    made.old_json = before.old_json
    made.coalesced = before.coalesced + 1
    made.depth = max(before.depth, event.depth)
    if event.new_json is not None:
        kind: EventType = "state:created" if before.old_json is None else "state:updated"
        made.event_type = kind
    return made


def _size(event: StateEvent) -> int:
    return len(event.old_json or b"") + len(event.new_json or b"")
