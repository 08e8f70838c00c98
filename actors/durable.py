"""The runtime of durable triggers: it calls their handlers, event by event, until each delivery is over."""

from __future__ import annotations

import inspect
import math
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from scopestate.actors.attempts import Pause
from scopestate.actors.backlog import size_of
from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, Held, HeldGroup, Outcome, members_of
from scopestate.actors.containment import Log, contained, described
from scopestate.actors.dispatcher import weakly
from scopestate.actors.functions import ObservedFunction, close_unrun, is_awaitable, is_unrun, plain_target, takes_two
from scopestate.actors.handler import HandlerActor
from scopestate.actors.lanes import NO_LANE, Barrier, Lanes, Run
from scopestate.actors.loops import OnLoop, Overdue, Pending
from scopestate.actors.services import HandlerServices
from scopestate.actors.shapes import EventBatch, Item, Shape, events_of, positions_of
from scopestate.actors.shared_consumer import ENDED
from scopestate.errors import Conflict, EventLoopDetected, HandlerTimeout, StorageError, Unsupported
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.transactions import DeliveryBatch
from scopestate.ops.values import class_name
from scopestate.signals import Guard

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
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
CONFLICT_S: Final = 0.02
"""A delivery waits at most this long before it is tried again after a conflict of its transaction."""
LONGEST_TEXT: Final = 16_384
"""Characters of an error, and of a traceback, that a dead letter keeps."""

_RETRY: Final = Retry()


class CutOff(Exception):
    """The reason for giving up a delivery if every attempt at it ended with its process."""

    def __init__(self, attempts: int) -> None:
        super().__init__(
            f"the process ended or was killed during the last attempt of {attempts}: the handler may be the cause"
        )


Counted = Literal["", "delivered", "skipped", "failed", "retried", "dropped"]
TransactionMaker = Callable[["Attempt", str], Any]


class Attempt:
    """One call of the handler with one event. The `Delivery` that the handler gets calls it."""

    __slots__ = (
        "call", "counted", "due_s", "event", "handler", "item", "late", "lost", "number", "over", "pause",
        "transaction_of", "turn",
    )  # fmt: skip

    def __init__(self, handler: DurableHandler, item: Held) -> None:
        self.handler = handler
        self.item = item
        self.event: Any = item.event
        """What the function gets: an event, or a list of events."""
        self.number = item.attempts + 1
        self.due_s = math.inf
        """When it is overdue, by the dispatcher's clock; inf until the function is called."""
        self.pause: Pause | None = None
        """The pause before the next attempt with the same event; None: there is no pause."""
        self.counted: Counted = ""
        """What it counts as."""
        self.call: OnLoop | None = None
        """What it waits for on an event loop."""
        self.late = False
        """True: it is overdue, and what the function returns or raises does not count."""
        self.lost = False
        """True: the delivery is no longer this engine's, and the outcome does not count."""
        self.over = False
        self.transaction_of: Literal["open", "failed", "done", "unknown"] | None = None
        """What became of its transaction; None: it has had none."""
        self.turn: DeliveryBatch | None = None
        """The commit of its transaction."""

    @property
    def position(self) -> int:
        """The number of its event."""
        return self.item.event.position

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """See `Delivery.extend`."""
        del delivery
        self.refuse_if_over()
        self.due_s = self.handler._dispatcher.monotonic() + seconds
        if self.call is not None:
            self.call.due_s = self.due_s
        self.handler.watch(self.due_s, seconds)

    def transaction(self, delivery: Delivery, scope: str) -> Any:
        """See `Delivery.transaction`."""
        del delivery
        self.refuse_if_over()
        if isinstance(self.item, HeldGroup):
            raise Unsupported(
                "a transaction of several events", "with `debounce` or `batch` a delivery acknowledges more than one"
            )
        make = self.handler.make_transaction
        if make is None:
            raise Unsupported("a transaction of a delivery", "this engine has no scopes of its own")
        return make(self, scope)

    def open_transaction(self) -> None:
        """Note that its transaction is open. Raises Unsupported if it has had one that wrote, or may have written."""
        self.refuse_if_over()
        if self.transaction_of not in (None, "failed"):
            raise Unsupported(
                "a second transaction of one delivery",
                f"the first one acknowledges {self.id!r}: write everything in it, to one scope",
            )
        self.transaction_of = "open"

    def lose(self, lost: frozenset[int]) -> None:
        """Some deliveries are not this engine's any more. Their outcome does not count."""
        item = self.item
        if isinstance(item, HeldGroup):
            item.members = [one for one in item.members if one.event.position not in lost]
            self.lost = self.lost or not item.members
        elif self.position in lost:
            self.lost = True

    @property
    def id(self) -> str:
        """The id of its delivery."""
        return f"{self.handler.port.name}:{self.position}"

    def refuse_if_over(self) -> None:
        """Raise Unsupported for an attempt that does not count any more."""
        if self.late or self.over or self.lost:
            why = "it took longer than `ack_wait`, and is tried again" if self.late else "it has ended"
            raise Unsupported("a delivery whose attempt is over", f"{self.id!r}: {why}")


class _WaitingBarrier:
    """A barrier, and what it still waits for."""

    __slots__ = ("barrier", "left", "mark")

    def __init__(self, barrier: Barrier, mark: int) -> None:
        self.barrier = barrier
        self.mark = mark
        self.left: set[int] | None = None
        """Positions; None: not everything up to the mark was fetched when it was last looked at."""


class DurableHandler(HandlerActor):
    """Calls the function of one durable trigger. Its events come from a consumer, not from the router.

    As in every handler, lanes decide what may begin, and one turn at a time takes it. The differences: an attempt is
    noted before it begins, and its outcome before its lane goes on; pauses survive a restart; an event that was given
    up may hold back its lane; and events that wait are not lost when the engine closes.
    """

    keeps_runs = True
    make_transaction: TransactionMaker | None = None

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
        self._target: tuple[object, bool] = (None, False)
        self.call: Callable[[str, Attempt], Any] | None = None
        """Calls the function, or the condition, with this id in place of the handler: for the trigger of a worker."""
        self.loops_cut = 0

    # ---------------------------------------------------------------------------------------- what the engine asks

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

    # -------------------------------------------------------------------------------------------------------- attempts

    def begin(self, runs: list[Run]) -> list[Run]:
        self._lacking = self.call is None and self._lacks_function(self.trigger)
        if self._lacking:
            return self._put_off(runs)
        attempts = [Attempt(self, run.item) for run in runs]
        most = (self.trigger.retry or _RETRY).attempts
        for attempt in attempts:
            if attempt.item.cut_off and attempt.number > most:
                attempt.number -= 1  # it is given up, not begun
        # Together, because a write for each costs as much as the rest. Not those that were tried before: if the process
        # ends in one of them again and again, the others must not be given up with it.
        if not self._note_begun([attempt for attempt in attempts if not attempt.item.attempts]):
            return self._put_off(runs)
        for run, attempt in zip(runs, attempts, strict=True):
            run.extra = attempt
            self._attempts[attempt] = None
            for lost in self._lost:  # since it was noted
                attempt.lose(lost)
        return runs

    def _note_begun(self, attempts: list[Attempt]) -> bool:
        """Note attempts that are about to begin, together. False if that has failed."""
        if not attempts:
            return True
        try:
            self.port.began(
                [(one.event.position, attempt.number) for attempt in attempts for one in members_of(attempt.item)]
            )
        except StorageError as error:
            log.error("consumer %r: an attempt could not be recorded, so it waits: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
            return False
        now_ms = self._clock.now_ms()
        for attempt in attempts:
            if not attempt.item.first_ms:
                attempt.item.first_ms = now_ms
        return True

    def _put_off(self, runs: list[Run]) -> list[Run]:
        """They count as not begun, and are begun again after a pause."""
        for run in runs:
            run.item.due_ms = self._clock.now_ms() + int(TROUBLE_S * 1000)
            run.pending = Pause(TROUBLE_S)
            self._pause(run)
        return []

    def _carry_on(self, run: Run) -> Pending | None:
        attempt: Attempt = run.extra
        if run.delivery is None:
            self._call_first(run, attempt)
        if run.delivery is not None:
            pending = self._step(run)
            if pending is not None:
                return pending
            if not attempt.over:
                # It broke off, or something passes through this thread that no handler has raised.
                self._take_back(attempt)
        counted = attempt.counted
        if counted in ("delivered", "skipped"):
            run.outcome = counted  # the turn counts it
        elif counted:
            for _ in events_of(run.event):
                self._note(counted)
        return attempt.pause

    def _call_first(self, run: Run, attempt: Attempt) -> None:
        """Make an attempt: all of it, or `Run.delivery` is the rest."""
        item, trigger = attempt.item, self.trigger
        if 0 < item.attempts < attempt.number and not self._note_begun([attempt]):
            item.due_ms = self._clock.now_ms() + int(TROUBLE_S * 1000)
            self._take_back(attempt, TROUBLE_S)
            return
        attempt.due_s = self._dispatcher.monotonic() + trigger.ack_wait
        if attempt.due_s < self._looks_s:
            self.watch(attempt.due_s, trigger.ack_wait)
        event = item.event
        attempt.event = self._own_copy(event, trigger)
        if attempt.number == item.attempts:
            self._attempt_ended(attempt, trigger, CutOff(attempt.number))
        elif event.depth > self._services.limits.max_event_depth:
            self._attempt_ended(attempt, trigger, self._loop_cut(trigger, event))
        elif attempt.lost or not (isinstance(item, HeldGroup) or trigger.matches(event)):
            self._attempt_ended(attempt, trigger, None, skipped=True)
        elif trigger.condition_function_id is not None:
            run.delivery = self._ask_first(attempt, trigger, trigger.condition_function_id)
        else:
            try:
                result = self._call_durable(trigger.function_id, attempt)
            except BaseException as error:  # noqa: BLE001 - user code may raise anything
                self._attempt_ended(attempt, trigger, error)
            else:
                if result is None:
                    self._attempt_ended(attempt, trigger, None)
                else:
                    run.delivery = self._await_it(attempt, trigger, result)

    @staticmethod
    def _own_copy(item: Item, trigger: Trigger) -> Any:
        """Return an event, or a list of events, that the function may change."""
        copies = [event.copy() for event in events_of(item)]
        metadata = trigger.metadata
        for event in copies:
            event.metadata = metadata
        return copies if isinstance(item, EventBatch) else copies[0]

    def _lacks_function(self, trigger: Trigger) -> bool:
        """Return whether a function that it calls is not registered: then its events wait, and health reports it."""
        find = self._services.functions.find
        condition = trigger.condition_function_id
        return find(trigger.function_id) is None or (condition is not None and find(condition) is None)

    def problem(self) -> str | None:
        """Return what keeps its deliveries from being made, as text; None if nothing does."""
        trigger = self.trigger
        if self.active and self._lacks_function(trigger):
            return (
                f"the function {trigger.function_id!r}, or the condition, of durable trigger {self.port.name!r} is not "
                "registered: its events wait"
            )
        return None

    def _call_durable(self, function_id: str, attempt: Attempt) -> Any:
        """Call the function of the trigger. The result of a coroutine function must still be awaited."""
        if self.call is not None:
            return self.call(function_id, attempt)
        target = self._services.functions.get(function_id).target
        known, takes_delivery = self._target
        if known is not target:
            takes_delivery = type(target) is ObservedFunction or takes_two(target)
            self._target = (target, takes_delivery)
        if takes_delivery:
            return target(attempt.event, self.delivery_of(attempt))  # type: ignore[call-arg]  # as its signature says
        return target(attempt.event)

    def delivery_of(self, attempt: Attempt) -> Delivery:
        """Return what the handler gets beside the event."""
        item = attempt.item
        return Delivery(
            self.port.name,
            item.event.position,
            attempt.event,
            attempt.number,
            item.first_ms,
            self.trigger.metadata,
            attempt,
        )

    async def _ask_first(self, attempt: Attempt, trigger: Trigger, condition: str) -> None:
        """Condition, then handler."""
        call = self.call or (lambda name, one: self._services.functions.get(name).target(one.event))
        given = attempt.event
        let_through = list[StateEvent]()
        try:
            for event in given if isinstance(given, list) else [given]:
                attempt.event = event
                verdict = call(condition, attempt)
                if type(verdict) is not bool:
                    verdict = await self._awaited(attempt, condition, verdict)
                if verdict is not False:
                    let_through.append(event)
        except BaseException as error:  # noqa: BLE001 - as above
            attempt.event = given
            self._attempt_ended(attempt, trigger, error, function_id=condition)
            return
        attempt.event = let_through if isinstance(given, list) else given
        if not let_through:
            self._attempt_ended(attempt, trigger, None, skipped=True)
            return
        try:
            result = self._call_durable(trigger.function_id, attempt)
        except BaseException as error:  # noqa: BLE001 - as above
            self._attempt_ended(attempt, trigger, error)
        else:
            await self._await_it(attempt, trigger, result)

    async def _await_it(self, attempt: Attempt, trigger: Trigger, result: Any) -> None:
        try:
            if result is not None:
                await self._awaited(attempt, trigger.function_id, result)
        except BaseException as error:  # noqa: BLE001 - as above
            self._attempt_ended(attempt, trigger, error)
        else:
            self._attempt_ended(attempt, trigger, None)

    async def _awaited(self, attempt: Attempt, function_id: str, result: Any) -> Any:
        """Return the result of a function, awaited on the event loop of the function if it is awaitable."""
        if not is_awaitable(result):
            if is_unrun(result):
                raise TypeError(
                    f"function {function_id!r} returned a {class_name(result)}, whose code has not run and never "
                    "will: return a value or a coroutine"
                )
            return result
        services = self._services
        try:
            loop = services.functions.get(function_id).loop or services.loop_thread.get()
        except BaseException:
            close_unrun(result)
            raise
        what = f"the handler {function_id!r} of trigger {self.trigger.trigger_id!r}"
        left_s = max(attempt.due_s - self._dispatcher.monotonic(), 0.001)
        attempt.call = call = OnLoop(result, loop, services.loop_calls, what, left_s)
        try:
            return await call
        except Overdue as error:
            self._note("timeouts")
            raise HandlerTimeout(function_id, self.trigger.ack_wait, "ack_wait") from error
        finally:
            attempt.call = None

    def _loop_cut(self, trigger: Trigger, event: StateEvent) -> EventLoopDetected:
        self.loops_cut += 1
        return EventLoopDetected(
            f"event {event.revision} of scope {event.scope!r}, key {event.key!r} was caused by a chain of "
            f"{event.depth} handlers, more than max_event_depth = {self._services.limits.max_event_depth}: it was not "
            f"delivered to {trigger.function_id!r}; does a handler write what fires it?"
        )

    # -------------------------------------------------------------------------------------------------------- outcomes

    def _attempt_ended(
        self,
        attempt: Attempt,
        trigger: Trigger,
        error: BaseException | None,
        *,
        skipped: bool = False,
        function_id: str | None = None,
    ) -> None:
        """Note how an attempt has ended. On a worker thread."""
        if attempt.lost:
            attempt.over = True
            attempt.counted = "dropped"
            del self._attempts[attempt]
            return
        if self._stopped and error is not None:
            # The engine is closing: it may have been cancelled by that, and is delivered at the next start.
            self._take_back(attempt)
            return
        if attempt.late and attempt in self._attempts:
            error = HandlerTimeout(trigger.function_id, trigger.ack_wait, "ack_wait")
        if attempt.turn is not None:
            self._resolve(attempt)
        if error is None:
            self._conclude(attempt, Outcome(attempt.item.event.position, "done"), "skipped" if skipped else "delivered")
        elif attempt.transaction_of == "done":
            # It is acknowledged, with what it has written.
            self._report_failure(function_id or trigger.function_id, attempt, error, final=True)
            self._conclude(attempt, Outcome(attempt.position, "done"), "failed")
        else:
            self._fail_attempt(attempt, trigger, error, function_id or trigger.function_id)

    def _resolve(self, attempt: Attempt) -> None:
        """Find out what became of a transaction whose end was not told. After this its turn cannot happen any more."""
        turn = attempt.turn
        assert turn is not None  # the caller has looked
        happened = turn.fence.setdefault("won", "end") == "turn"
        if attempt.transaction_of not in ("open", "unknown"):
            return
        attempt.transaction_of = "failed"
        if happened:
            # It was changed in memory, or is just being changed. A commit that holds it back ends with this.
            try:
                self.port.flush()
            except StorageError as error:
                log.debug("saving a transaction of %r: %s", attempt.id, error)
            if self.port.is_acknowledged(attempt.position):
                attempt.transaction_of = "done"
                return
        self.port.transaction_failed(attempt.position)

    def _fail_attempt(self, attempt: Attempt, trigger: Trigger, error: BaseException, function_id: str) -> None:
        item, retry = attempt.item, trigger.retry or _RETRY
        position, now_ms = item.event.position, self._clock.now_ms()
        pause_s = pause_of(error, retry, attempt.number, self._random(), conflict=attempt.turn is not None)
        if pause_s is not None:
            counts = not isinstance(error, RetryLater) and not _is_own_conflict(error, attempt)
            if counts:
                item.attempts = attempt.number
                self._report_failure(function_id, attempt, error, final=False)
            item.error = text_of(error)
            due_ms = now_ms + max(math.ceil(pause_s * 1000), 0)
            outcome = Outcome(position, "retry", item.attempts, item.first_ms, due_ms, item.error)
            self._conclude(attempt, outcome, "retried")
            return
        if self.port.full(len(members_of(item))):
            self._pause_when_full(attempt, trigger)
            return
        item.attempts = attempt.number
        item.error = text_of(error)
        self._report_failure(function_id, attempt, error, final=True)
        blocks = trigger.on_giving_up == "block" and not isinstance(error, Discard)
        verdict = Outcome(
            position,
            "held" if blocks else "dead",
            attempt.number,
            item.first_ms,
            0,
            item.error,
            traceback_of(error),
            item.event,
        )
        self._conclude(attempt, verdict, "failed")

    def _report_failure(self, function_id: str, attempt: Attempt, error: BaseException, *, final: bool) -> None:
        if attempt.late and not final:
            return  # it was reported when it became overdue
        report = self._services.report
        if isinstance(error, Discard):
            # A decision of the handler is not a failure.
            log.warning("event %s is discarded by %r: %s", attempt.id, function_id, described(error))
            report = self._services.tell_hooks
        for failure in self._failures(function_id, attempt, error, final=final):
            contained(partial(report, failure), "reporting a failed delivery", log)
            report = self._services.tell_hooks  # one line in the log is enough

    def _failures(
        self, function_id: str, attempt: Attempt, error: BaseException, *, final: bool
    ) -> list[DeliveryFailure]:
        """Return the report of each event of an attempt that has failed."""
        events = events_of(attempt.item.event)
        trigger_id = self.trigger.trigger_id
        return [
            DeliveryFailure(trigger_id, function_id, event, error, attempt.number, final, len(events))
            for event in events
        ]

    def _pause_when_full(self, attempt: Attempt, trigger: Trigger) -> None:
        """The list of dead letters is full: nothing more is given up, so nothing more is begun."""
        why = f"its list of dead letters is full (max_dead = {trigger.max_dead}): replay or purge them, then resume it"
        log.error("consumer %r is paused: %s", self.port.name, why)
        try:
            self.port.pause(why)
        except StorageError as error:
            log.error("could not record that consumer %r is paused: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
        self._take_back(attempt)

    def _conclude(self, attempt: Attempt, outcome: Outcome, counted: Counted) -> None:
        """End an attempt: its lane continues, or waits."""
        item = attempt.item
        # Before the lane continues: a save must not contain the next event of the lane without this one.
        self._tell_port((outcome,) if type(item) is Held else _for_each(outcome, item))
        if outcome.verdict == "retry":
            item.due_ms = outcome.due_ms
            attempt.pause = Pause(max(self.wait_for(item), 0.0))
        elif outcome.verdict == "held":
            item.blocked = True
            attempt.pause = Pause(math.inf)
        attempt.over = True
        attempt.counted = counted
        del self._attempts[attempt]

    def _tell_port(self, outcomes: Sequence[Outcome]) -> None:
        port = self.port
        port.ended(outcomes)
        if self.port is not port and (late := port.left_behind()):
            self.port.ended(late)  # the port was exchanged in between

    def _take_back(self, attempt: Attempt, pause_s: float = 0.0) -> None:
        """It counts as not begun, and is begun again when it may, after a pause."""
        attempt.pause = Pause(pause_s)
        attempt.over = True
        self._attempts.pop(attempt, None)

    def _random(self) -> float:
        return self._dispatcher.random()

    # --------------------------------------------------------------------------------------------------------- overdue

    def watch(self, due_s: float, delay_s: float) -> None:
        """Look at the running attempts at `due_s`, unless that is done before."""
        if due_s < self._looks_s:
            self._looks_s = due_s
            self._dispatcher.call_later(delay_s, weakly(self._look_at_attempts))

    def _look_at_attempts(self) -> None:
        self._looks_s = math.inf
        now_s = self._dispatcher.monotonic()
        for attempt in self._overdue_now(now_s):
            self._note("timeouts")
            trigger = self.trigger
            error = HandlerTimeout(trigger.function_id, trigger.ack_wait, "ack_wait")
            for failure in self._failures(trigger.function_id, attempt, error, final=False):
                self._services.reporter.report(failure)

    def _overdue_now(self, now_s: float) -> list[Attempt]:
        late: list[Attempt] = []
        due_s = math.inf
        for attempt in list(self._attempts):
            if attempt.late or attempt.call is not None:
                continue  # what is on an event loop is cancelled there
            if attempt.due_s <= now_s:
                attempt.late = True
                late.append(attempt)
            else:
                due_s = min(due_s, attempt.due_s)
        if due_s < math.inf:
            self.watch(due_s, due_s - now_s)
        return late

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


def _for_each(outcome: Outcome, item: Held) -> list[Outcome]:
    """Return the outcome of each event that was delivered as part of one."""
    return [
        msgspec.structs.replace(
            outcome, position=one.event.position, event=None if outcome.event is None else one.event
        )
        for one in members_of(item)
    ]


def pause_of(error: BaseException, retry: Retry, attempt: int, random: float, *, conflict: bool) -> float | None:
    """Return the seconds before the next attempt; None: there is none, the delivery is given up. Pure."""
    if isinstance(error, RetryLater):
        return error.seconds
    if isinstance(error, (Discard, EventLoopDetected, CutOff)):
        return None
    if conflict and isinstance(error, Conflict):
        return CONFLICT_S * random
    # What is no Exception, such as the end of an event loop, says nothing about the event; nor does a time limit.
    always = isinstance(error, HandlerTimeout) or not isinstance(error, Exception)
    if retry.tries_again(attempt, error) or (always and attempt < retry.attempts):
        return retry.pause_s(attempt, random)
    return None


def _is_own_conflict(error: BaseException, attempt: Attempt) -> bool:
    return attempt.turn is not None and isinstance(error, Conflict)


def text_of(error: BaseException) -> str:
    """Return class and text of an error, as dead letters keep it."""
    return f"{class_name(error)}: {described(error)}"[:LONGEST_TEXT]


def misfit_of(target: Callable[..., Any]) -> str | None:
    """Return why a function cannot handle deliveries; None if it can, or if that cannot be told."""
    target = plain_target(target)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*(None, None) if takes_two(target) else (None,))
    except TypeError as error:
        return f"the handler of a durable trigger takes (event), or (event, delivery): {error}"
    return None


def traceback_of(error: BaseException) -> str:
    """Return where an error was raised, as dead letters keep it; "" if that is not known."""
    if error.__traceback__ is None:
        return ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - it may call code of the error's class, and of those that it was caused by
        text = "".join(traceback.format_tb(error.__traceback__))
    return text[-LONGEST_TEXT:]
