"""The runtime of durable triggers: it calls their handlers, event by event, until each delivery is over."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.attempts import Pause
from scopestate.actors.consuming import ConsumerPort, Held, HeldGroup, Outcome, members_of
from scopestate.actors.containment import Log, contained, described
from scopestate.actors.dispatcher import weakly
from scopestate.actors.durable_attempt import Attempt, Counted, CutOff, pause_of, text_of, traceback_of
from scopestate.actors.fetching import TROUBLE_S, Fetching
from scopestate.actors.functions import ObservedFunction, close_unrun, is_awaitable, is_unrun, takes_two
from scopestate.actors.lanes import Run
from scopestate.actors.loops import OnLoop, Overdue, Pending
from scopestate.actors.services import HandlerServices
from scopestate.actors.shapes import EventBatch, Item, events_of
from scopestate.errors import EventLoopDetected, HandlerTimeout, StorageError
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.values import class_name

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

_RETRY: Final = Retry()

TransactionMaker = Callable[[Attempt, str], Any]


class DurableHandler(Fetching):
    """Calls the function of one durable trigger. Its events come from a consumer, not from the router.

    As in every handler, lanes decide what may begin, and one turn at a time takes it. The differences: an attempt is
    noted before it begins, and its outcome before its lane goes on; pauses survive a restart; an event that was given
    up may hold back its lane; and events that wait are not lost when the engine closes.
    """

    keeps_runs = True
    make_transaction: TransactionMaker | None = None

    def __init__(self, trigger: Trigger, services: HandlerServices, port: ConsumerPort, clock: Clock) -> None:
        super().__init__(trigger, services, port, clock)
        self._target: tuple[object, bool] = (None, False)
        self.call: Callable[[str, Attempt], Any] | None = None
        """Calls the function, or the condition, with this id in place of the handler: for the trigger of a worker."""
        self.loops_cut = 0

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
            counts = not isinstance(error, RetryLater) and not attempt.is_own_conflict(error)
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


def _for_each(outcome: Outcome, item: Held) -> list[Outcome]:
    """Return the outcome of each event that was delivered as part of one."""
    return [
        msgspec.structs.replace(
            outcome, position=one.event.position, event=None if outcome.event is None else one.event
        )
        for one in members_of(item)
    ]
