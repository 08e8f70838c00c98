"""How the handler of a trigger takes events that it debounces or puts in batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from scopestate.actors.attempts import Attempts
from scopestate.actors.backlog import size_of
from scopestate.actors.dispatcher import weakly
from scopestate.actors.lanes import Barrier, Lanes, Run
from scopestate.actors.shapes import EventBatch, Item, Shape, events_of, settings_of

if TYPE_CHECKING:
    from scopestate.actors.services import HandlerServices
    from scopestate.ops.results import StateEvent
    from scopestate.ops.triggers import Trigger


class Shaping(Attempts):
    """The part of `HandlerActor` between its mailbox and its lanes, for events that are not delivered one by one.

    Events stay in the mailbox until a turn takes them, so its bounds hold as for any handler. A turn moves them into
    the shape, and takes out those that are due. Events in the shape count as waiting; a barrier flushes it.
    """

    _mailbox: deque[Any]  # type: ignore[assignment]  # see HandlerActor
    _lanes: Lanes | None
    _looking: bool
    _stuck: bool
    offered: int
    taken: int

    def __init__(self, trigger: Trigger, services: HandlerServices) -> None:
        super().__init__(trigger, services)
        self._shape: Shape | None = None
        """Events that are debounced, or wait for their batch. None: they are delivered one by one."""
        self._shape_looks_s = math.inf
        """When a timer next checks them; inf: no timer is set."""
        self._note_shape(trigger)

    def _note_shape(self, trigger: Trigger) -> None:
        """Note how events are taken from now on."""
        self._shaped = settings_of(trigger) is not None or self._shape is not None
        """True: events are taken by `_take_shaped`."""
        self._bare = trigger.metadata_json is None and not self._shaped
        """True: the function gets the event unchanged."""

    def _held_back(self) -> list[StateEvent]:
        shape = self._shape
        return [] if shape is None else shape.events()

    def _held_count(self) -> int:
        shape = self._shape
        return 0 if shape is None else shape.waiting

    def _is_due(self) -> bool:
        """Return whether something may come out of the shape now."""
        shape = self._shape
        return shape is not None and shape.is_due(self._dispatcher.monotonic())

    def _take_shaped(self) -> Run | None:
        """As `HandlerActor._take`: take all waiting events, and return the next delivery that is due."""
        settings, shape = settings_of(self.trigger), self._shape
        if shape is not None and (shape.settings != settings or not self.active):
            self._flush(shape)
            self._shape = shape = None
        if self._awaits_old_order():
            return None
        if settings is None:
            self._note_shape(self.trigger)
            return self._take()
        if shape is None:
            shape = self._shape = Shape(settings)
        now_s = self._dispatcher.monotonic()
        self._fill(shape, now_s)
        while True:
            lanes = self._lanes
            item = shape.pop(now_s, _always if lanes is None else lanes.is_free)
            if item is None:
                due_s = shape.due_s()
                if due_s < self._shape_looks_s:
                    self._shape_looks_s = due_s
                    self._dispatcher.call_later(due_s - now_s, weakly(self._look_at_shape))
                return None if self._lanes is None else self._lanes.next_ready()
            run = self._run_of(item)
            if run is not None and self._enter(run):
                return run

    def _fill(self, shape: Shape, now_s: float) -> None:
        """Move waiting events into the shape, up to its limit. If the limit is reached, make everything due now."""
        mailbox, limits = self._mailbox, self._services.limits
        while shape.waiting < limits.handler_mailbox:
            try:
                item = mailbox.popleft()
            except IndexError:
                break
            if type(item) is not Barrier:
                self.taken += shape.add(item, now_s)
                continue
            self._flush(shape)
            self._reach(item)
        most = limits.handler_mailbox_bytes
        if shape.waiting >= limits.handler_mailbox or (most and self.offered - self.taken >= most):
            shape.flush()

    def _flush(self, shape: Shape) -> None:
        """Put everything in the shape into its lanes."""
        shape.flush()
        while (item := shape.pop(math.inf, _always)) is not None:
            run = self._run_of(item)
            if run is not None:
                self._open_lanes().enter_ready(run)

    def _run_of(self, item: Item) -> Run | None:
        """Return the run of a delivery from the shape; None if its changes cancel each other out."""
        trigger = self.trigger
        if trigger.sifts and trigger.debounce is not None:
            wanted = [event for event in events_of(item) if event.coalesced <= 1 or trigger.differs(event)]
            if len(wanted) < len(events_of(item)):
                size = size_of(item)
                self.passed_over([event for event in events_of(item) if not any(event is one for one in wanted)])
                if not wanted:
                    self.taken += size
                    return None
                item = EventBatch(wanted)
                self.taken += size - item.size
        run = Run()
        run.event = item
        return run

    def passed_over(self, events: list[StateEvent]) -> None:
        """Note events that are not delivered because they cancel each other out. For a subclass; within the turn."""

    def _look_at_shape(self) -> None:
        """Called by the timer: something is due."""
        self._shape_looks_s = math.inf
        if not self._claim:
            self.wake_anyway()
        elif not self._looking and self._may_block_others():
            self._look_soon()

    # ----------------------------------------------------------------------------------- what HandlerActor does

    def _take(self) -> Run | None:
        raise NotImplementedError

    def _enter(self, run: Run) -> bool:
        raise NotImplementedError

    def _open_lanes(self) -> Lanes:
        raise NotImplementedError

    def _reach(self, barrier: Barrier) -> None:
        raise NotImplementedError

    def _awaits_old_order(self) -> bool:
        raise NotImplementedError

    def _may_block_others(self) -> bool:
        raise NotImplementedError

    def _look_soon(self) -> None:
        raise NotImplementedError


def _always(lane: Hashable) -> bool:
    """Stands in for `Lanes.is_free` if every lane is free."""
    del lane
    return True
