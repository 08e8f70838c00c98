"""Which delivery of a durable trigger is next: lanes, pauses between attempts, and lanes that are held back. Pure."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from scopestate.actors.consuming import Held
    from scopestate.ops.triggers import Order

_IDLE: Final = 0
_READY: Final = 1
_RUNNING: Final = 2
_PARKED: Final = 3
_BLOCKED: Final = 4


class Lane:
    """Deliveries that are handled one after the other. The first one is that whose turn it is."""

    __slots__ = ("due_ms", "items", "name", "state")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.items: deque[Held] = deque()
        self.state = _IDLE
        self.due_ms = 0
        """While it is parked: when its first delivery is tried again."""


class Schedule:
    """The deliveries that one consumer holds, in lanes, and which of them may begin.

    Not for several threads at once: the runtime calls it under its guard. Times are in milliseconds since the epoch.
    """

    def __init__(self, order: Order) -> None:
        self.order: Order = order
        self._lanes: dict[Hashable, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._parked: list[tuple[int, int, Lane]] = []
        self._blocked: dict[int, Lane] = {}
        """Position of the first delivery -> lane, of those that are held back."""
        self._numbers = itertools.count()
        self.held = 0
        """Deliveries that are here: waiting, running, parked or held back."""
        self.running = 0
        self._waiting_long = 0
        """Deliveries in lanes that are parked or held back."""

    @property
    def active(self) -> int:
        """Deliveries that do not wait for a moment, or for a caller."""
        return self.held - self._waiting_long

    def __len__(self) -> int:
        return self.held

    def has_ready(self) -> bool:
        """Return whether a delivery may begin that does not wait for a moment."""
        return bool(self._ready)

    def add(self, item: Held) -> None:
        """Put a delivery behind those of its lane; one that was given up and held its lane back goes where it was."""
        event = item.event
        if self._blocked and not item.blocked and (blocked := self._blocked.pop(event.position, None)) is not None:
            self._waiting_long -= len(blocked.items)
            blocked.items[0] = item
            self._offer(blocked)
            return
        order = self.order
        name: Hashable
        if order == "key":
            name = (event.scope, event.key)
        elif order == "scope":
            name = event.scope
        elif order == "none":
            name = event.position
        else:
            name = None
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
        lane.items.append(item)
        self.held += 1
        if lane.state == _IDLE:
            self._offer(lane)
        elif lane.state >= _PARKED:
            self._waiting_long += 1

    def take(self, now_ms: int) -> Lane | None:
        """Return a lane whose first delivery begins now; None if there is none."""
        parked = self._parked
        while parked and parked[0][0] <= now_ms:
            due_ms, _, lane = heapq.heappop(parked)
            if lane.state == _PARKED and lane.due_ms == due_ms:
                self._waiting_long -= len(lane.items)
                lane.state = _READY
                self._ready.append(lane)
        if not self._ready:
            return None
        lane = self._ready.popleft()
        lane.state = _RUNNING
        self.running += 1
        return lane

    def give_back(self, lane: Lane) -> None:
        """The delivery that `take` has returned did not begin."""
        self.running -= 1
        lane.state = _READY
        self._ready.appendleft(lane)

    def over(self, lane: Lane) -> None:
        """The first delivery of a lane, which was running, is over: the lane goes on with the next."""
        self.running -= 1
        self.held -= 1
        lane.items.popleft()
        self._offer(lane)

    def again(self, lane: Lane, due_ms: int) -> None:
        """The first delivery of a lane, which was running, is tried again at `due_ms`."""
        self.running -= 1
        lane.items[0].due_ms = due_ms
        self._park(lane, due_ms)

    def block(self, lane: Lane) -> None:
        """The first delivery of a lane, which was running, was given up: it holds the lane back."""
        self.running -= 1
        lane.items[0].blocked = True
        self._hold_back(lane)

    def release(self, position: int) -> bool:
        """The dead letter at `position` was purged: the lane that it holds back goes on. False if it holds none."""
        lane = self._blocked.pop(position, None)
        if lane is None:
            return False
        self._waiting_long -= len(lane.items)
        self.held -= 1
        lane.items.popleft()
        self._offer(lane)
        return True

    def drop(self, positions: set[int]) -> None:
        """Forget deliveries that have not begun."""
        for lane in list(self._lanes.values()):
            first = 1 if lane.state == _RUNNING else 0
            left = [
                item for index, item in enumerate(lane.items) if index < first or item.event.position not in positions
            ]
            if len(left) == len(lane.items):
                continue
            self.held -= len(lane.items) - len(left)
            if lane.state == _BLOCKED:
                del self._blocked[lane.items[0].event.position]
            if lane.state >= _PARKED:
                self._waiting_long -= len(lane.items)
            elif lane.state == _READY:
                self._ready.remove(lane)
            lane.items = deque(left)
            if lane.state != _RUNNING:
                self._offer(lane)

    def reorder(self, order: Order) -> None:
        """Sort what is here into the lanes of another order. While nothing runs."""
        items = sorted(self.items(), key=lambda item: item.event.position)
        self.order = order
        self._lanes.clear()
        self._ready.clear()
        self._parked.clear()
        self._blocked.clear()
        self.held = self._waiting_long = 0
        for item in items:
            self.add(item)

    def items(self) -> Iterator[Held]:
        """Return all deliveries that are here."""
        return itertools.chain.from_iterable([lane.items for lane in self._lanes.values()])

    def next_due_ms(self) -> int | None:
        """Return when the first parked lane goes on; None if there is none."""
        parked = self._parked
        while parked and (parked[0][2].state != _PARKED or parked[0][2].due_ms != parked[0][0]):
            heapq.heappop(parked)
        return parked[0][0] if parked else None

    def parked(self) -> int:
        """Return how many lanes wait for a moment, or for a caller."""
        return sum(lane.state in (_PARKED, _BLOCKED) for lane in self._lanes.values())

    def positions_before(self, due_ms: int) -> set[int]:
        """Return the positions of what is here and need not wait beyond `due_ms`, or for a caller, as it is now."""
        return {
            item.event.position
            for lane in self._lanes.values()
            if lane.state != _BLOCKED and (lane.state != _PARKED or lane.due_ms <= due_ms)
            for item in lane.items
        }

    def _offer(self, lane: Lane) -> None:
        """The first delivery of a lane has changed, and none is running."""
        if not lane.items:
            lane.state = _IDLE
            del self._lanes[lane.name]
            return
        first = lane.items[0]
        if first.blocked:
            self._hold_back(lane)
        elif first.due_ms:
            self._park(lane, first.due_ms)
        else:
            lane.state = _READY
            self._ready.append(lane)

    def _hold_back(self, lane: Lane) -> None:
        lane.state = _BLOCKED
        self._blocked[lane.items[0].event.position] = lane
        self._waiting_long += len(lane.items)

    def _park(self, lane: Lane, due_ms: int) -> None:
        lane.state = _PARKED
        self._waiting_long += len(lane.items)
        lane.due_ms = due_ms
        heapq.heappush(self._parked, (due_ms, next(self._numbers), lane))
