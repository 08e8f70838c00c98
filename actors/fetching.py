"""How a durable trigger takes events from its consumer into its lanes, and what it holds until they are over."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import size_of
from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, Held, HeldGroup, Outcome, members_of
from scopestate.actors.containment import Log
from scopestate.actors.dispatcher import weakly
from scopestate.actors.handler import HandlerActor
from scopestate.actors.lanes import NO_LANE, Barrier, Lanes, Run
from scopestate.actors.services import HandlerServices
from scopestate.actors.shapes import EventBatch, Item, Shape, positions_of
from scopestate.actors.shared_consumer import ENDED
from scopestate.errors import StorageError
from scopestate.ops.results import StateEvent
from scopestate.signals import Guard

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
    from scopestate.actors.durable_attempt import Attempt
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

MOST_ACTIVE: Final = 4096
"""Deliveries that a trigger holds to be handled now. Not counted: those that wait for a retry, and those after them."""
MOST_HELD: Final = 100_000
"""Deliveries that a trigger holds in all; further events stay in the journal."""
MOST_HELD_BYTES: Final = 64 << 20
"""Approximate bytes of the values of these. Above that, it fetches nothing until some of them are over."""
FETCHED: Final = 256
"""Events that are fetched at a time."""
NEAR_S: Final = 1.0
"""`drain` waits for a retry that is due within this time, not for one that is later."""
TROUBLE_S: Final = 2.0
"""Pause after the store or the connection has failed."""


class _WaitingBarrier:
    """A barrier, and what it still waits for."""

    __slots__ = ("barrier", "left", "mark")

    def __init__(self, barrier: Barrier, mark: int) -> None:
        self.barrier = barrier
        self.mark = mark
        self.left: set[int] | None = None
        """Positions; None: not everything up to the mark was fetched when it was last looked at."""


class Fetching(HandlerActor):
    """The part of `DurableHandler` between its consumer and the attempts: what it fetches, holds and lets go.

    Its events come from a consumer, not from the router. An event that was given up may hold back its lane. Events that
    wait are not lost when the engine closes.
    """

    def __init__(self, trigger: Trigger, services: HandlerServices, port: ConsumerPort, clock: Clock) -> None:
        super().__init__(trigger, services)
        self.port = port
        self._clock = clock
        self._incoming: deque[Held] = deque()
        """Events that were fetched and are not in a lane yet."""
        self._in_shape: dict[int, Held] = {}
        """Position -> the event that is debounced, or waits for its batch."""
        self._attempts: dict[Attempt, None] = {}
        """Attempts that have begun."""
        self._blocked: dict[int, Run] = {}
        """Position -> the run that was given up and holds back its lane."""
        self._lacking = False
        """True: the function was not registered at the last look-up."""
        self._counted_at = -1
        """The value of `taken` when the held deliveries were last counted."""
        self._again = False
        """True: since the last check, there may be something to fetch."""
        self._lost: list[frozenset[int]] = []
        self._next_port: ConsumerPort | None = None
        self._exclusive = Guard()
        self._barriers: list[_WaitingBarrier] = []
        self._stopped = False

    def replace(self, trigger: Trigger) -> None:
        """Begin, or continue with another trigger of the same name: its function, its filters, its options."""
        self._note_shape(trigger)
        self.trigger = trigger
        self.active = True
        self._lacking = False
        self.begins_at_once = self.port.notes_at_once
        self.port.start(trigger, self.wake_up, self.lost, self.running)

    def running(self) -> dict[int, int]:
        """Return the attempts that are running: position -> number. From any thread."""
        attempts = [attempt for attempt in list(self._attempts) if not attempt.lost]
        return {one.event.position: attempt.number for attempt in attempts for one in members_of(attempt.item)}

    def retired(self) -> None:
        if not self._stopped:
            self._dispatcher.submit_program(self._let_go)

    def _let_go(self) -> None:
        """Its trigger was unregistered: other engines may have what it has not begun."""
        if not self.active:
            self.port.stop()

    def move_to(self, port: ConsumerPort) -> None:
        """Take the events from another port from now on, which has the same events. Running attempts continue."""
        self._next_port = port
        self.wake_up()

    def _move(self, port: ConsumerPort) -> None:
        """Within a turn, so that nothing is fetched at the same time."""
        before, self._next_port = self.port, None
        # First: outcomes from here on are not reported to the other place, but are among `unsent`, or left behind.
        running = self.running()
        unsent = before.hand_over()
        before.stop()
        waits = {one.position for one in unsent if one.verdict in ("retry", "held")}
        self._lost.append(frozenset(self._held_positions()).difference(waits, running))
        self._lose()
        self.begins_at_once = port.notes_at_once
        known = {**{one.position: ENDED for one in unsent}, **running}
        try:
            if self.active and not self._stopped:
                port.start(self.trigger, self.wake_up, self.lost, lambda: {**known, **self.running()})
        finally:
            known.clear()
            self.port = port  # only now: an outcome counts if the port knows that the attempt is running
            port.ended(unsent + before.left_behind())
            self._exclusive.run(self._mark_again)

    def _mark_again(self) -> None:
        """The marks of barriers are those of another port."""
        for waiting in self._barriers:
            waiting.mark, waiting.left = self.port.mark(), None

    def forget(self) -> None:
        """Its consumer is forgotten: nothing that is here counts any more."""
        self.lost(self._held_positions())

    def _held_positions(self) -> list[int]:
        runs = [*self._runs_under_way(), *list(self._aside)]
        held = [one.event.position for run in runs for one in members_of(run.item)]
        return held + list(self._in_shape) + [item.event.position for item in self._incoming.copy()]

    def stop(self) -> None:
        """Begin no more attempts. What is running may end; its outcome is noted. Idempotent."""
        self._stopped = True
        self.port.stop()
        self.wake_up()

    def depth(self) -> int:
        return len(self._aside) + len(self._incoming) + len(self._in_shape)

    def is_busy(self) -> bool:
        return bool(self._attempts)

    def is_overdue(self) -> bool:
        return any(attempt.late for attempt in list(self._attempts))

    def waiting(self) -> int:
        """None of them is lost when the engine closes."""
        return 0

    def waiting_events(self) -> list[StateEvent]:
        return []

    def abandon(self, reason: str) -> None:
        del reason  # they are delivered at the next start

    def under_way(self) -> list[StateEvent]:
        return []  # as above: none of them is lost

    def abandon_under_way(self) -> None:
        pass

    def tell(self, message: Any) -> None:
        if not isinstance(message, Barrier):
            raise TypeError(f"a durable handler takes events from its consumer, not {message!r:.80}")
        self._exclusive.run(self._barriers.append, _WaitingBarrier(message, self.port.mark()))
        self.wake_up()

    def withdraw(self, item: object) -> None:
        self._exclusive.run(self._withdraw, item)

    def _withdraw(self, item: object) -> None:
        self._barriers = [waiting for waiting in self._barriers if waiting.barrier is not item]

    def status_from(self, status: ConsumerStatus) -> ConsumerStatus:
        """Return how far the consumer has come, with this engine's part of the work."""
        return ConsumerStatus(
            status.name,
            status.lag_events,
            status.lag_seconds,
            len(self._attempts),
            self.depth(),
            status.dead,
            status.paused,
            self.trigger.trigger_id if self.active else None,
        )

    def wake_up(self) -> None:
        """Check for work in a turn. From any thread."""
        self._again = self._asked = True
        self._stuck = False
        if self._claim and not self._looking:
            self._look_soon()
        self.wake()

    # ------------------------------------------------------------------------------------------- what may begin

    def _may_begin(self) -> bool:
        return self.active and not self._stopped and self.port.paused() is None

    def _can_fetch(self) -> bool:
        lanes = self._lanes
        if not self._may_begin():
            return False
        if len(self._in_shape) >= MOST_HELD:
            return False
        if lanes is None:
            return not self._in_shape or self.offered - self.taken < MOST_HELD_BYTES
        held = len(lanes.aside)
        active = held - lanes.behind_pauses
        if held and self._lacking:
            return False  # those that are held look for the function again
        if lanes.running >= self.trigger.concurrency or held >= MOST_HELD or active >= MOST_ACTIVE:
            return False
        return self.offered - self.taken < MOST_HELD_BYTES or self._has_room(lanes, active)

    def _has_room(self, lanes: Lanes, active: int) -> bool:
        """Count again what it holds, if that is too much and nothing but pauses is left. Not all of it has begun."""
        if active or self._incoming or self._in_shape or self.taken == self._counted_at:
            return False
        self._counted_at = self.taken
        held = sum([size_of(run.event) for run in list(lanes.aside)])
        self.offered = self.taken + held
        return held < MOST_HELD_BYTES

    def _has_work(self) -> bool:
        if super()._has_work() or self._lost or self._next_port is not None:
            return True
        return not self._stuck and (bool(self._incoming) or (self._again and self._can_fetch()))

    def _has_more(self) -> bool:
        return super()._has_more() or bool(self._incoming or self._again)

    def _may_block_others(self) -> bool:
        lanes = self._lanes
        if self._shape is not None and self._is_due():
            return True
        return bool(self._incoming or self._again or (lanes is not None and (lanes.going or lanes.has_ready())))

    def tell_taken(self) -> None:
        """These events do not come from the router, which counts what waits."""

    def _hear(self) -> None:
        super()._hear()
        if self._lost:
            self._lose()
        if self._next_port is not None:
            self._move(self._next_port)

    def _next(self) -> Run | None:
        lanes = self._lanes
        if self._may_begin() or (lanes is not None and lanes.going):
            run = super()._next()
            if run is not None:
                return run
        else:
            self._stuck = True
        if self._barriers:
            self._look_at_barriers()
        return None

    def _take(self) -> Run | None:
        incoming = self._incoming
        while True:
            lanes = self._lanes
            if lanes is not None and lanes.order != self.trigger.order:
                if lanes.running:
                    self._stuck = True
                    return None
                self._sort_again(lanes)
            if self._shaped:
                return self._take_shaped()
            if not incoming and not self._fetch():
                return None if lanes is self._lanes or self._lanes is None else self._lanes.next_ready()
            item = incoming.popleft()
            blocked = None if item.blocked else self._blocked.pop(item.event.position, None)
            if blocked is not None:
                # It is replayed: it goes where it was.
                blocked.item = item
                blocked.event = item.event
                self._open_lanes().resume(blocked)
                return self._open_lanes().next_ready()
            run = Run()
            run.event, run.item = item.event, item
            if self._enter(run):
                return run

    # ---------------------------------------------------------------------------------------------- debounce and batch

    def _fill(self, shape: Shape, now_s: float) -> None:
        """Take what was fetched into the shape. What was tried before goes by itself: it may be what ends processes."""
        incoming = self._incoming
        while incoming or self._fetch():
            item = incoming.popleft()
            position = item.event.position
            if item.attempts or item.due_ms or item.blocked:
                self._open_lanes().enter_ready(self._run_of_group(item.event, [item]))
            elif self.trigger.matches(item.event):
                self._in_shape[position] = item
                shape.add(item.event, now_s)  # which needs it no more, perhaps, but here it is kept
            else:
                self.taken += size_of(item.event)
                self._pass_over(position)
        if self._barriers or len(self._in_shape) >= MOST_HELD or self.offered - self.taken >= MOST_HELD_BYTES:
            shape.flush()

    def _run_of(self, item: Item) -> Run | None:
        positions = positions_of(item)  # before some are passed over
        here = self._in_shape
        taken = self.taken + sum([size_of(here[position].event) for position in positions if position in here])
        run = super()._run_of(item)
        held = [here.pop(position) for position in positions if position in here]
        run = self._run_of_group(run.event, held) if run is not None and held else None
        self.taken = taken if run is None else taken - size_of(run.event)
        return run

    def _run_of_group(self, item: Item, members: list[Held]) -> Run:
        """Return the run of several events, or of one in a list."""
        run = Run()
        first = members[0]
        if self.trigger.batch is not None and not isinstance(item, EventBatch):
            item = EventBatch([item])
        run.event = item
        run.item = HeldGroup(
            item,  # type: ignore[arg-type]  # a batch has what is asked of an event here
            max(one.attempts for one in members),
            first.first_ms,
            max(one.due_ms for one in members),
            first.error,
            any(one.cut_off for one in members),
            first.blocked,
            members,
        )
        return run

    def passed_over(self, events: list[StateEvent]) -> None:
        for position in [position for event in events for position in positions_of(event)]:
            if self._in_shape.pop(position, None) is not None:
                self._pass_over(position)

    def _pass_over(self, position: int) -> None:
        """Note that this event is not delivered, and need not be."""
        self._tell_port((Outcome(position, "done"),))
        self._note("skipped")
        if self._barriers:
            self._discard(position)

    def _fetch(self) -> bool:
        """Fetch events if there is room for them. False: there are none."""
        if not self._again or not self._can_fetch():
            return False
        self._again = False
        try:
            found = self.port.fetch(FETCHED)
        except StorageError as error:
            log.error("consumer %r: reading events failed and will be retried: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
            self._dispatcher.call_later(TROUBLE_S, weakly(self.wake_up))
            return False
        if self._lost:
            self._lose()  # now: it may be delivered again, and is among the events that were found
        self._incoming += found
        self.offered += sum([size_of(item.event) for item in found])
        self._again = self._again or bool(found)
        return bool(found)

    def _sort_again(self, before: Lanes) -> None:
        """Sort what waits into the lanes of another order. While nothing runs."""
        runs = sorted(before.aside, key=lambda run: run.item.event.position)
        self._lanes = None
        self._blocked.clear()
        lanes = self._open_lanes()
        for run in runs:
            run.paused = run.entered = False
            if lanes.enter(run):
                lanes.put_first(run)

    def wait_s(self, run: Run) -> float:
        return self.wait_for(run.item)

    def wait_for(self, item: Held) -> float:
        """Return for how many seconds an event must still wait; inf: until it is replayed or purged."""
        if item.blocked:
            return math.inf
        return (item.due_ms - self._clock.now_ms()) / 1000 if item.due_ms else 0.0

    def _pause(self, run: Run) -> None:
        attempt = run.extra
        if attempt is not None and attempt.over and attempt.lost:
            run.pending = None
            self._end(run)
            return
        pause = run.pending
        if pause.delay_s < math.inf:  # type: ignore[union-attr]  # it is a pause
            super()._pause(run)
            return
        run.pending = None
        run.news = "resumed"
        self.taken -= size_of(run.event)
        self._lanes.pause(run)  # type: ignore[union-attr]  # it is in there
        self._blocked[run.item.event.position] = run

    def lost(self, positions: Sequence[int]) -> None:
        """These deliveries are not this engine's any more. From any thread."""
        lost = frozenset(positions)
        for attempt in list(self._attempts):
            attempt.lose(lost)
        self._lost += (lost,)
        self.wake_up()

    def _lose(self) -> None:
        batch = self._lost[:]
        self._counted_at = -1
        self._lacking = False  # those that look for it may be among them
        lost = frozenset[int]().union(*batch)
        left = [item for item in self._incoming if item.event.position not in lost]
        self._incoming.clear()
        self._incoming += left
        for position in lost.intersection(self._in_shape):
            del self._in_shape[position]
        lanes = self._lanes
        for run in self._runs_under_way():
            if run.extra is not None:
                run.extra.lose(lost)  # its attempt may have ended, and the run not have come back to wait for the next
        for run in [] if lanes is None else [run for run in lanes.aside if _is_lost(run.item, lost)]:
            self._blocked.pop(run.item.event.position, None)
            if run.paused:
                self._end(run)
            else:
                lanes.aside.pop(run, None)  # type: ignore[union-attr]  # it leaves its lane when its turn comes
        del self._lost[: len(batch)]

    def _tell_port(self, outcomes: Sequence[Outcome]) -> None:
        port = self.port
        port.ended(outcomes)
        if self.port is not port and (late := port.left_behind()):
            self.port.ended(late)  # the port was exchanged in between

    # ----------------------------------------------------------------------------------------------------------- drain

    def ended(self, run: Run) -> None:
        if self._barriers:
            for one in members_of(run.item):
                self._discard(one.event.position)

    def _discard(self, position: int) -> None:
        """One delivery is over: some barriers may have nothing left to wait for."""
        for waiting in self._exclusive.run(self._barriers.copy):
            if waiting.left is not None:
                waiting.left.discard(position)
                if not waiting.left:
                    self._arrives(waiting)

    def _look_at_barriers(self) -> None:
        """Complete the barriers that have nothing left to wait for. Within the turn."""
        goes_on = self._may_begin()
        running = (one.event.position for attempt in list(self._attempts) for one in members_of(attempt.item))
        near = self._near() if goes_on else set(running)
        for waiting in self._exclusive.run(self._barriers.copy):
            if waiting.left is not None:
                waiting.left &= near
            elif not goes_on or self.port.reached(waiting.mark):
                waiting.left = set(near)
            if waiting.left is not None and not waiting.left:
                self._arrives(waiting)

    def _arrives(self, waiting: _WaitingBarrier) -> None:
        self.withdraw(waiting.barrier)
        waiting.barrier.arrive(self)

    def _near(self) -> set[int]:
        """Return the positions of events here that wait neither for long nor for a caller."""
        lanes, near_ms = self._lanes, self._clock.now_ms() + int(NEAR_S * 1000)
        near = {item.event.position for item in self._incoming}
        near.update(self._in_shape)
        if lanes is not None:
            far = {run for run in lanes.begun if run.paused and not self._is_near(run, near_ms)}
            held_back = {run.lane for run in far if run.lane is not NO_LANE}
            here = [*lanes.begun, *lanes.aside]
            here = [run for run in here if run not in far and run.lane not in held_back]
            near.update(one.event.position for run in here for one in members_of(run.item))
        return near

    @staticmethod
    def _is_near(run: Run, near_ms: int) -> bool:
        item: Held = run.item
        return not item.blocked and item.due_ms <= near_ms


def _is_lost(item: Held, lost: frozenset[int]) -> bool:
    """Return whether nothing of it is this engine's any more."""
    if isinstance(item, HeldGroup):
        item.members = [one for one in item.members if one.event.position not in lost]
        return not item.members
    return item.event.position in lost
