"""The runtime of durable triggers: it calls their handlers, event by event, until each delivery is over."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, Held, Outcome
from scopestate.actors.containment import Log, contained, described, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.functions import close_unrun, is_awaitable, is_unrun
from scopestate.actors.handler import HandlerActor
from scopestate.actors.lanes import Barrier
from scopestate.actors.loops import OnLoop, Overdue, Pending
from scopestate.actors.schedule import Lane, Schedule
from scopestate.actors.services import HandlerServices
from scopestate.errors import Conflict, EventLoopDetected, HandlerTimeout, StorageError, Unsupported
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.transactions import DeliveryBatch
from scopestate.ops.values import class_name
from scopestate.signals import Guard, certainly
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

MOST_ACTIVE: Final = 4096
"""Deliveries that a trigger holds to be handled now. Those that wait for a retry, and what is behind them, are not
counted."""
MOST_HELD: Final = 100_000
"""Deliveries that a trigger holds in all; further events stay in the journal."""
FETCHED: Final = 256
"""Events that are fetched at a time."""
NEAR_S: Final = 1.0
"""`drain` waits for a retry that is due within this time, not for one that is later."""
TROUBLE_S: Final = 2.0
"""Pause after the store or the connection has failed."""
FIRST_LOOK_S: Final = 0.001
LONGEST_LOOK_S: Final = 0.064
"""How long events of other lanes wait behind a call before another thread takes them; longer while calls are quick."""
CONFLICT_S: Final = 0.02
"""At most so long a delivery waits before it is tried again after a conflict of its transaction."""
LONGEST_TEXT: Final = 16_384
"""Characters of an error, and of a traceback, that a dead letter keeps."""

TransactionMaker = Callable[["Attempt", str], Any]


class Attempt:
    """One call of the handler with one event. It stands behind the `Delivery` that the handler gets."""

    __slots__ = (
        "call", "due_s", "event", "handler", "item", "lane", "late", "lost", "number", "over", "transaction_of", "turn",
    )  # fmt: skip

    def __init__(self, handler: DurableHandler, lane: Lane, item: Held, due_s: float) -> None:
        self.handler = handler
        self.lane = lane
        self.item = item
        self.event = item.event
        self.number = item.attempts + 1
        self.due_s = due_s
        """When it is overdue, by the dispatcher's clock."""
        self.call: OnLoop | None = None
        """What it waits for on an event loop."""
        self.late = False
        """True: it is overdue. What the function says from here on does not count."""
        self.lost = False
        """True: it is not this engine's any more, and its outcome does not count."""
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

    @property
    def id(self) -> str:
        """The id of its delivery."""
        return f"{self.handler.port.name}:{self.position}"

    def refuse_if_over(self) -> None:
        """Raise Unsupported for an attempt that does not count any more."""
        if self.late or self.over or self.lost:
            why = "it took longer than `ack_wait`, and is tried again" if self.late else "it has ended"
            raise Unsupported("a delivery whose attempt is over", f"{self.id!r}: {why}")


class DurableHandler(HandlerActor):
    """Calls the function of one durable trigger, with several events side by side.

    What waits, and in which order, is in its `Schedule`; a guard keeps that consistent. Worker threads take the next
    delivery, call the function and note the outcome: one thread as long as calls are quick, and another one as soon as
    events of other lanes have waited behind a call. A delivery that awaits something keeps its lane, and no thread.
    """

    make_transaction: TransactionMaker | None = None

    def __init__(self, trigger: Trigger, services: HandlerServices, port: ConsumerPort, clock: Clock) -> None:
        super().__init__(trigger, services)
        self.port = port
        self._clock = clock
        self._exclusive = Guard()
        self._held = Schedule(trigger.order)
        self._attempts: dict[Attempt, None] = {}
        """Those that are running."""
        self._threads = 0
        """Worker threads that take deliveries, or are about to."""
        self._taken = 0
        self._again = False
        """True: something may be fetched since that was last looked at."""
        self._fetching = False
        self._spread_s = 0.0
        """The time until the next look whether another thread is needed; 0: none is planned."""
        self._spread_taken = 0
        self._due_timer_ms = math.inf
        self._barriers: list[tuple[Barrier, int, set[int] | None]] = []
        self._stopped = False
        self._target: tuple[object, bool] = (None, False)
        self.call: Callable[[str, Attempt], Any] | None = None
        """Calls the function, or the condition, with this id in place of the handler: for the trigger of a worker."""
        self.loops_cut = 0

    # ---------------------------------------------------------------------------------------- what the engine asks

    def replace(self, trigger: Trigger) -> None:
        """Begin, or go on with another trigger of the same name: its function, its filters, its options."""
        self.trigger = trigger
        self.active = True
        self.port.start(trigger, self.wake_up, self.lost)

    def forget(self) -> None:
        """Its consumer is forgotten: nothing that is here counts any more."""
        positions = self._exclusive.run(lambda: [item.event.position for item in self._held.items()])
        self.lost(positions)

    def stop(self) -> None:
        """Begin no more attempts. What is running may end; its outcome is noted. Idempotent."""
        self._stopped = True
        self.port.stop()
        self.check_barriers()

    def depth(self) -> int:
        return len(self._held) - len(self._attempts)

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
        self._exclusive.run(self._barriers.append, (message, self.port.mark(), None))
        self.wake_up()

    def withdraw(self, item: object) -> None:
        self._exclusive.run(self._withdraw, item)

    def _withdraw(self, item: object) -> None:
        self._barriers = [entry for entry in self._barriers if entry[0] is not item]

    def status(self) -> ConsumerStatus:
        """Return how far the consumer is, with what this engine does of it."""
        status = self.port.status()
        running = len(self._attempts)
        return ConsumerStatus(
            status.name,
            status.lag_events,
            status.lag_seconds,
            running,
            max(len(self._held) - running, 0),
            status.dead,
            status.paused,
            self.trigger.trigger_id if self.active else None,
        )

    # ------------------------------------------------------------------------------------------------- whose turn it is

    def wake_up(self) -> None:
        """There may be something to do. From any thread."""
        if self._exclusive.run(self._needs_thread):
            try:
                self._submit()
            except BaseException:
                certainly(lambda: self._exclusive.run(self._thread_ends))
                raise

    def _needs_thread(self) -> bool:
        self._again = True
        if self._threads or self._stopped:
            return False
        self._threads = 1
        return True

    def _submit(self) -> None:
        self._dispatcher.submit_program(self._work)

    def _thread_ends(self) -> None:
        self._threads -= 1

    def _work(self) -> None:
        """Take deliveries as long as there are any. On a worker thread."""
        try:
            self._take_some()
        except BaseException:
            certainly(lambda: self._exclusive.run(self._thread_ends))
            raise

    def _take_some(self) -> None:
        for _ in range(self.batch):
            attempt = self._exclusive.run(self._take_next)
            if attempt is not None:
                self._try(attempt)
            elif not self._fetch():
                if self._barriers:
                    self.check_barriers()
                if self._exclusive.run(self._may_leave):
                    self._set_due_timer()
                    event_depth.set(0)
                    return
        event_depth.set(0)
        self._submit()  # others may need this thread first

    def _may_leave(self) -> bool:
        if self._again and self._can_fetch():
            return False
        self._threads -= 1
        return True

    def _may_begin(self) -> bool:
        return self.active and not self._stopped and self.port.paused() is None

    def _take_next(self) -> Attempt | None:
        schedule, trigger = self._held, self.trigger
        if len(self._attempts) >= trigger.concurrency or not self._may_begin():
            return None
        if schedule.order != trigger.order:
            if self._attempts:
                return None  # until what runs in the old order has ended
            schedule.reorder(trigger.order)
        lane = schedule.take(self._clock.now_ms())
        if lane is None:
            return None
        attempt = Attempt(self, lane, lane.items[0], self._dispatcher.monotonic() + trigger.ack_wait)
        self._attempts[attempt] = None
        self._taken += 1
        if schedule.has_ready() and not self._spread_s and len(self._attempts) < trigger.concurrency:
            self._plan_spread(FIRST_LOOK_S)
        if attempt.due_s < self._looks_s:
            self.watch(attempt.due_s, trigger.ack_wait)
        return attempt

    def _fetch(self) -> bool:
        """Fetch events if there is room for them. True: there may be something to begin now."""
        if not self._exclusive.run(self._may_fetch):
            return False
        found: list[Held] = []
        try:
            found = self.port.fetch(FETCHED)
        except StorageError as error:
            log.error("consumer %r: reading events failed, it is tried again: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
            self._dispatcher.call_later(TROUBLE_S, weakly(self.wake_up))
        finally:
            self._exclusive.run(self._add, found)
        return bool(found)

    def _can_fetch(self) -> bool:
        schedule = self._held
        return (
            not self._fetching
            and self._may_begin()
            and len(self._attempts) < self.trigger.concurrency
            and schedule.active < MOST_ACTIVE
            and len(schedule) < MOST_HELD
        )

    def _may_fetch(self) -> bool:
        if not self._again or not self._can_fetch():
            return False
        self._again, self._fetching = False, True
        return True

    def _add(self, found: Sequence[Held]) -> None:
        self._fetching = False
        for item in found:
            self._held.add(item)
        if found:
            self._again = True

    def lost(self, positions: Sequence[int]) -> None:
        """These deliveries are not this engine's any more."""
        self._exclusive.run(self._lose, frozenset(positions))
        self.wake_up()

    def _lose(self, positions: frozenset[int]) -> None:
        self._held.drop(set(positions))
        for attempt in self._attempts:
            if attempt.position in positions:
                attempt.lost = True

    # ---------------------------------------------------------------------------------------------------- more threads

    def _plan_spread(self, delay_s: float) -> None:
        self._spread_s, self._spread_taken = delay_s, self._taken
        self._dispatcher.call_later(delay_s, weakly(self._spread))

    def _spread(self) -> None:
        for _ in range(self._exclusive.run(self._threads_needed)):
            self._submit()

    def _threads_needed(self) -> int:
        """Return how many threads to add: as many again, while calls last and others wait behind them."""
        delay_s, self._spread_s = self._spread_s, 0.0
        if not self._held.has_ready() or not self._may_begin():
            return 0
        room = self.trigger.concurrency - len(self._attempts)
        if room <= 0:
            return 0
        if self._taken != self._spread_taken:
            self._plan_spread(min(2 * delay_s, LONGEST_LOOK_S))
            return 0
        more = min(max(self._threads, 1), room)
        self._threads += more
        self._plan_spread(FIRST_LOOK_S)
        return more

    def _set_due_timer(self) -> None:
        """Have a thread go on when the first pause is over."""
        delay_s = self._exclusive.run(self._next_pause_s)
        if delay_s is not None:
            self._dispatcher.call_later(delay_s, weakly(self._due))

    def _next_pause_s(self) -> float | None:
        due_ms = self._held.next_due_ms()
        if due_ms is None or due_ms >= self._due_timer_ms or self._stopped:
            return None
        self._due_timer_ms = due_ms
        return max((due_ms - self._clock.now_ms()) / 1000, 0.0)

    def _due(self) -> None:
        self._due_timer_ms = math.inf
        self.wake_up()

    # -------------------------------------------------------------------------------------------------------- attempts

    def _try(self, attempt: Attempt) -> None:
        """Make an attempt: all of it, or up to where it waits for something."""
        item, trigger = attempt.item, self.trigger
        event = item.event
        if self._lacks_function(trigger):
            self._exclusive.run(self._put_off, attempt)
            return
        try:
            self.port.began([(event.position, attempt.number)])
        except StorageError as error:
            log.error("consumer %r: an attempt could not be noted, so it waits: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
            self._exclusive.run(self._put_off, attempt)
            return
        if not item.first_ms:
            item.first_ms = self._clock.now_ms()
        attempt.event = event = event.copy()
        if trigger.metadata_json is not None:
            event.metadata = trigger.metadata
        event_depth.set(event.depth + 1)
        if event.depth > self._services.limits.max_event_depth:
            self._attempt_ended(attempt, trigger, self._loop_cut(trigger, event))
        elif not trigger.matches(event):
            self._attempt_ended(attempt, trigger, None, skipped=True)
        elif trigger.condition_function_id is not None:
            self._drive(attempt, self._ask_first(attempt, trigger, trigger.condition_function_id))
        else:
            self._call_it(attempt, trigger)

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

    def _call_it(self, attempt: Attempt, trigger: Trigger) -> None:
        try:
            result = self._call_durable(trigger.function_id, attempt)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self._attempt_ended(attempt, trigger, error)
        else:
            if result is None:
                self._attempt_ended(attempt, trigger, None)
            else:
                self._drive(attempt, self._await_it(attempt, trigger, result))

    def _call_durable(self, function_id: str, attempt: Attempt) -> Any:
        """Call the function of the trigger. The result of a coroutine function must still be awaited."""
        if self.call is not None:
            return self.call(function_id, attempt)
        target = self._services.functions.get(function_id).target
        known, takes_delivery = self._target
        if known is not target:
            takes_delivery = takes_two(target)
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
        try:
            call = self.call or (lambda name, one: self._services.functions.get(name).target(one.event))
            verdict = call(condition, attempt)
            if type(verdict) is not bool:
                verdict = await self._awaited(attempt, condition, verdict)
        except BaseException as error:  # noqa: BLE001 - as above
            self._attempt_ended(attempt, trigger, error, function_id=condition)
            return
        if verdict is False:
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
                    "would: return a value or a coroutine"
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
            self.timeouts += 1
            raise HandlerTimeout(function_id, self.trigger.ack_wait) from error
        finally:
            attempt.call = None

    def _drive(
        self,
        attempt: Attempt,
        work: Coroutine[Pending, Any, None],
        value: Any = None,
        error: BaseException | None = None,
    ) -> None:
        """Go on with an attempt until it is over, or waits for something without a thread."""
        try:
            pending = work.send(value) if error is None else work.throw(error)
        except StopIteration:
            return
        except BaseException as problem:
            if is_from_outside(problem):
                raise
            log.exception("a delivery of %s broke off", self.name)
            self._attempt_ended(attempt, self.trigger, problem)
            return
        once = [work]

        def go_on(value: Any, error: BaseException | None) -> None:
            try:
                going_on = once.pop()  # one step: an outcome that comes twice goes on once
            except IndexError:
                return
            event_depth.set(attempt.event.depth + 1)
            self._drive(attempt, going_on, value, error)
            event_depth.set(0)
            self.wake_up()

        # The outcome comes on an event loop's or the timer's thread, which must not run code of the program.
        later = self._dispatcher.submit_program
        try:
            pending.start(lambda value, error: later(lambda: go_on(value, error)))
        except BaseException as problem:
            later(partial(go_on, None, problem))
            if is_from_outside(problem):
                raise

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
            self._exclusive.run(self._move_on, attempt, Outcome(attempt.position, "done"), "dropped")
            return
        if self._stopped and error is not None:
            # The engine is closing: it may have been cancelled by that, and is delivered at the next start.
            self._exclusive.run(self._take_back, attempt)
            return
        if attempt.late and attempt in self._attempts:
            error = HandlerTimeout(trigger.function_id, trigger.ack_wait)
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
        item, retry = attempt.item, trigger.retry or Retry()
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
        if self.port.full():
            self._pause_when_full(attempt, trigger)
            return
        item.attempts = attempt.number
        item.error = text_of(error)
        self._report_failure(function_id, attempt, error, final=True)
        blocks = trigger.on_giving_up == "block" and not isinstance(error, Discard)
        where = "".join(traceback.format_exception(error))[-LONGEST_TEXT:] if error.__traceback__ is not None else ""
        verdict = Outcome(
            position, "held" if blocks else "dead", attempt.number, item.first_ms, 0, item.error, where, item.event
        )
        self._conclude(attempt, verdict, "failed")

    def _report_failure(self, function_id: str, attempt: Attempt, error: BaseException, *, final: bool) -> None:
        if attempt.late and not final:
            return  # it was reported when it became overdue
        failure = DeliveryFailure(self.trigger.trigger_id, function_id, attempt.event, error, attempt.number, final)
        contained(lambda: self._services.report(failure), "reporting a failed delivery", log)

    def _pause_when_full(self, attempt: Attempt, trigger: Trigger) -> None:
        """The list of dead letters is full: nothing more is given up, so nothing more is begun."""
        why = f"its list of dead letters is full (max_dead = {trigger.max_dead}): replay or purge them, then resume it"
        log.error("consumer %r is paused: %s", self.port.name, why)
        try:
            self.port.pause(why)
        except StorageError as error:
            log.error("noting that consumer %r is paused failed: %s", self.port.name, error)  # noqa: TRY400 - the text says it all
        self._exclusive.run(self._take_back, attempt)

    def _conclude(self, attempt: Attempt, outcome: Outcome, counted: str) -> None:
        if attempt not in self._attempts:
            return
        # Before the lane goes on: a save must not have the next one of it without this one.
        self.port.ended((outcome,))
        self._exclusive.run(self._move_on, attempt, outcome, counted)
        if self._barriers:
            self.check_barriers()

    def _move_on(self, attempt: Attempt, outcome: Outcome, counted: str) -> None:
        """The attempt is over: its lane goes on, or waits."""
        del self._attempts[attempt]
        attempt.over = True
        setattr(self, counted, getattr(self, counted) + 1)
        schedule, lane = self._held, attempt.lane
        if outcome.verdict == "retry":
            schedule.again(lane, outcome.due_ms)
        elif outcome.verdict == "held":
            schedule.block(lane)
        else:
            schedule.over(lane)

    def _take_back(self, attempt: Attempt) -> None:
        """It counts as not begun, and waits until something wakes this handler."""
        if self._attempts.pop(attempt, self) is not self:
            attempt.over = True
            self._held.give_back(attempt.lane)

    def _put_off(self, attempt: Attempt) -> None:
        """It counts as not begun, and is begun again after a pause."""
        if self._attempts.pop(attempt, self) is not self:
            attempt.over = True
            self._held.again(attempt.lane, self._clock.now_ms() + int(TROUBLE_S * 1000))

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
        for attempt in self._exclusive.run(self._overdue_now, now_s):
            self.timeouts += 1
            trigger = self.trigger
            error = HandlerTimeout(trigger.function_id, trigger.ack_wait)
            self._services.reporter.report(
                DeliveryFailure(trigger.trigger_id, trigger.function_id, attempt.event, error, attempt.number, False)
            )

    def _overdue_now(self, now_s: float) -> list[Attempt]:
        late: list[Attempt] = []
        due_s = math.inf
        for attempt in self._attempts:
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

    def check_barriers(self) -> None:
        """Let those arrive that have nothing left to wait for."""
        if not self._barriers:
            return
        reached = {mark: self.port.reached(mark) for _, mark, _ in list(self._barriers)}
        for barrier in self._exclusive.run(self._arrived, reached):
            barrier.arrive(self)

    def _arrived(self, reached: dict[int, bool]) -> list[Barrier]:
        goes_on = self._may_begin()
        if goes_on:
            near = self._held.positions_before(self._clock.now_ms() + int(NEAR_S * 1000))
        else:
            near = {attempt.position for attempt in self._attempts}
        arrived: list[Barrier] = []
        left: list[tuple[Barrier, int, set[int] | None]] = []
        for barrier, mark, known in self._barriers:
            fetched = known is not None or not goes_on or (reached.get(mark, False) and not self._fetching)
            remaining = (near if known is None else known & near) if fetched else None
            if remaining is not None and not remaining:
                arrived.append(barrier)
            else:
                left.append((barrier, mark, remaining))
        self._barriers = left
        return arrived


def pause_of(error: BaseException, retry: Retry, attempt: int, random: float, *, conflict: bool) -> float | None:
    """Return the seconds before the next attempt; None: there is none, the delivery is given up. Pure."""
    if isinstance(error, RetryLater):
        return error.seconds
    if isinstance(error, (Discard, EventLoopDetected)):
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


def takes_two(target: Callable[..., Any]) -> bool:
    """Return whether a handler takes the delivery beside the event: by its parameters without a default."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]
    return len(needed) >= 2 or any(one.name == "delivery" and one.kind in kinds for one in parameters)
