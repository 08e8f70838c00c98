"""The attempts to deliver one event: condition, function, time limits, retries, reports."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.functions import close_unrun, is_awaitable, is_unrun
from scopestate.actors.loops import Continue, OnLoop, Overdue, Pending, Thrown
from scopestate.actors.shapes import EventBatch, Item, events_of
from scopestate.actors.turn import TurnActor
from scopestate.errors import HandlerTimeout
from scopestate.ops.results import DeliveryFailure
from scopestate.ops.values import class_name

if TYPE_CHECKING:
    from scopestate.actors.lanes import Run
    from scopestate.actors.services import HandlerServices
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

LONGEST_BACKOFF_S: Final = 60.0


class Attempts(TurnActor):
    """An actor that calls the function of one trigger. `HandlerActor` says when, and for which events.

    These methods may run on several threads at a time, each for a `Run` of its own.
    """

    runs_program = True

    def __init__(self, trigger: Trigger, services: HandlerServices) -> None:
        super().__init__(services.dispatcher)
        self._services = services
        self._bare = True
        """True: the function gets the event as it is."""
        self._watched: dict[Run, None] = {}
        """Runs of plain functions that have a time limit."""
        self._looks_s = math.inf
        """When a timer next checks whether one of them is overdue; inf: no timer is set."""
        self.trigger = trigger
        """May be replaced by a trigger with the same filters, which applies from the next event."""
        self.active = True
        """False once the trigger is unregistered. Events that wait are then dropped."""
        self.apart = False
        """True while the function is known to block. The actor then gives its claim back during the calls."""
        self.delivered = self.skipped = self.failed = self.retried = self.dropped = self.timeouts = 0

    @property
    def name(self) -> str:
        return f"handler of trigger {self.trigger.trigger_id!r}"

    def is_overdue(self) -> bool:
        """True while a plain function runs past its time limit."""
        return any(run.overdue and run.deadline is not None for run in list(self._watched))

    # ------------------------------------------------------------------------------------------------- attempts

    # The turn drives these coroutines. They await Pending objects only, and never raise.

    def _carry_on(self, run: Run) -> Pending | None:
        """Begin or continue a run, up to its end or its next wait, and return what it waits for. Never raises."""
        if run.delivery is None:
            trigger = self.trigger
            if trigger.condition_function_id is None:
                try:
                    result = self._call(trigger.function_id, run)
                except BaseException as problem:  # noqa: BLE001 - user code may raise anything
                    run.delivery = self._finish(run, trigger.function_id, None, problem)
                else:
                    if result is None:
                        run.outcome = "delivered"
                        return None
                    run.delivery = self._finish(run, trigger.function_id, result)
            else:
                run.delivery = self._deliver(run, trigger)
        return self._step(run)

    def _step(self, run: Run) -> Pending | None:
        delivery, value, error = run.delivery, run.value, run.error
        run.value = run.error = None
        if isinstance(error, GeneratorExit):
            value, error = Thrown(error), None
        try:
            return delivery.send(value) if error is None else delivery.throw(error)  # type: ignore[union-attr]  # set
        except StopIteration:
            run.delivery = None
        except BaseException as problem:
            run.delivery = None
            if is_from_outside(problem):
                run.passing = problem
            else:
                self._note("failed")
                log.exception("a delivery of %s failed unexpectedly", self.name)
        return None

    async def _deliver(self, run: Run, trigger: Trigger) -> None:
        """Condition, then handler, with retries."""
        condition: str = trigger.condition_function_id  # type: ignore[assignment]  # only called if it is set
        if isinstance(run.event, EventBatch):
            await self._ask_for_each(run, run.event, condition)
        else:
            await self._ask(run, condition)
        if run.outcome:
            return
        if not self.active:  # unregistered while the condition ran
            run.outcome = "dropped"
            self._note("dropped")
            return
        await self._finish(run, trigger.function_id, *self._outcome_of_call(run, trigger.function_id))

    async def _ask(self, run: Run, condition: str) -> None:
        """Call the condition. If the handler must not be called, the run has an outcome afterwards."""
        run.asking = True
        try:
            verdict = self._call(condition, run)
            if type(verdict) is not bool:
                verdict = await self._outcome_of(run, condition, verdict)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything; a worker thread outlives it
            run.outcome = "failed"
            self._report(run, condition, error, final=True)
            return
        finally:
            run.asking = False
        if verdict is False:
            run.outcome = "skipped"

    async def _ask_for_each(self, run: Run, batch: EventBatch, condition: str) -> None:
        """Call the condition with each event of a batch, and remove the events for which it returns false."""
        let_through = []
        for event in batch:
            run.event = event
            await self._ask(run, condition)
            if not run.outcome:
                let_through.append(event)
            elif run.outcome == "skipped":
                self._note("skipped")
            run.outcome = ""
        batch[:] = let_through
        run.event = batch
        if not let_through:
            run.outcome = "dropped"  # each event was counted and reported by itself

    def _argument(self, run: Run) -> Any:
        """Return the argument for a function: an event with the metadata, or a list of events, new for each attempt."""
        item = run.event
        metadata = None if run.asking else self.trigger.metadata
        for event in events_of(item):
            event.metadata = metadata
        return list(item) if isinstance(item, EventBatch) else item

    def _outcome_of_call(self, run: Run, function_id: str) -> tuple[Any, BaseException | None]:
        try:
            return self._call(function_id, run), None
        except BaseException as error:  # noqa: BLE001 - as above
            return None, error

    async def _finish(self, run: Run, function_id: str, result: Any, error: BaseException | None = None) -> None:
        """Finish an attempt whose call gave `result` or raised `error`, and retry as often as `pause_after` says."""
        while True:
            if error is None:
                try:
                    if result is not None:
                        await self._outcome_of(run, function_id, result)
                    run.outcome = "delivered"
                    return
                except BaseException as problem:  # noqa: BLE001 - as above
                    error = problem
            pause_s = self.pause_after(run, error)
            if pause_s is None:
                run.outcome = "failed"
            self._report(run, function_id, error, final=pause_s is None)
            result = error = None  # otherwise this frame and the traceback would refer to each other
            if pause_s is None:
                return
            self._note("retried")
            run.attempt += 1
            await Pause(pause_s)
            if not self.active:  # unregistered during the pause
                run.outcome = "dropped"
                self._note("dropped")
                return
            result, error = self._outcome_of_call(run, function_id)

    def pause_after(self, run: Run, error: BaseException) -> float | None:
        """Return the seconds until the next attempt of a run that has failed; None: the run is given up."""
        limits = self._services.limits
        if run.attempt >= limits.handler_attempts or issubclass(type(error), HandlerTimeout) or not self.active:
            return None
        doublings = min(run.attempt - 1, 64)  # far more than LONGEST_BACKOFF_S needs; 2.0**1024 would raise
        return min(limits.handler_backoff_s * 2.0**doublings, LONGEST_BACKOFF_S)

    def _call(self, function_id: str, run: Run) -> Any:
        """Call a function. The result of a coroutine function must still be awaited."""
        services = self._services
        function = services.functions.get(function_id)
        timeout_s = services.limits.handler_timeout_s
        event = run.event if self._bare else self._argument(run)
        if timeout_s and not function.is_async:
            return self._call_watched(function.target, function_id, run, event, timeout_s)
        return function.target(event)

    async def _outcome_of(self, run: Run, function_id: str, result: Any) -> Any:
        """Return the result of a function, awaited if it is awaitable."""
        if is_awaitable(result):
            return await self._on_loop(run, function_id, result)
        if is_unrun(result):
            raise TypeError(
                f"function {function_id!r} returned a {class_name(result)}, whose code has not run and never will: "
                "return a value or a coroutine"
            )
        return result

    async def _on_loop(self, run: Run, function_id: str, result: Awaitable[Any]) -> Any:
        """Await the result of a function, on the event loop that the function belongs to."""
        services = self._services
        timeout_s = services.limits.handler_timeout_s
        run.overdue = False
        try:
            function = services.functions.get(function_id)
            loop = function.loop or services.loop_thread.get()
        except BaseException:
            close_unrun(result)
            raise
        what = f"the handler {function_id!r} of trigger {self.trigger.trigger_id!r}"
        try:
            return await OnLoop(result, loop, services.loop_calls, what, timeout_s)
        except Overdue as error:
            self._note("timeouts")
            raise HandlerTimeout(function_id, timeout_s) from error

    def _report(
        self, run: Run, function_id: str, error: BaseException, *, final: bool, event: Item | None = None
    ) -> None:
        """Report a failed attempt.

        `event`: set if the report must be made on another thread, because this one must not run code of the program.
        """
        if issubclass(type(error), HandlerTimeout) and run.overdue:
            return  # reported when it became overdue
        events = events_of(run.event if event is None else event)
        for number, one in enumerate(events):
            if final:
                self._note("failed")
            failure = DeliveryFailure(
                self.trigger.trigger_id, function_id, one, error, run.attempt, final, batched=len(events)
            )
            if event is not None:
                self._services.reporter.report(failure)
            elif number:
                self._services.tell_hooks(failure)  # one line in the log is enough
            else:
                self._services.report(failure)

    def _note(self, name: str) -> None:
        """Count what several threads may count at the same time."""
        self._services.exclusive.run(self._add_one, name)

    def _add_one(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)

    # --------------------------------------------------------------------------------------- overdue plain functions

    def _call_watched(
        self, target: Callable[[Any], Any], function_id: str, run: Run, event: Any, timeout_s: float
    ) -> Any:
        """Call a plain function. Nothing can stop it, so it is reported while it runs if it exceeds its time limit."""
        run.overdue = False
        run.function_id = function_id
        run.deadline = deadline = self._dispatcher.monotonic() + timeout_s
        self._watched[run] = None
        if deadline < self._looks_s:
            # One timer for each handler, not for each event: it is set for the earliest deadline. A timer that was set
            # before a reload, for a longer time limit, would fire too late.
            self._looks_s = deadline
            self._dispatcher.call_later(timeout_s, weakly(self._look_at_deadlines))
        try:
            result = target(event)
        except BaseException as error:
            if run.overdue:
                raise HandlerTimeout(function_id, timeout_s) from error
            raise
        finally:
            run.deadline = None
            del self._watched[run]
        if run.overdue:
            raise HandlerTimeout(function_id, timeout_s)
        return result

    def _look_at_deadlines(self) -> None:
        # Cleared before the deadlines are read, so a call that begins in between is seen here or sets its own timer.
        self._looks_s = math.inf
        now, next_s = self._dispatcher.monotonic(), math.inf
        for run in list(self._watched):
            deadline, event = run.deadline, run.event
            if deadline is None or run.overdue:
                continue
            if deadline > now:
                next_s = min(next_s, deadline)
                continue
            self._note("timeouts")
            error = HandlerTimeout(run.function_id, self._services.limits.handler_timeout_s)
            self._report(run, run.function_id, error, final=True, event=event)
            run.overdue = True
        if next_s < self._looks_s:
            self._looks_s = next_s
            self._dispatcher.call_later(next_s - now, weakly(self._look_at_deadlines))


class Pause:
    """A pause without a thread, between two attempts."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def __await__(self) -> Generator[Pause, Any, None]:
        yield self

    def start(self, go_on: Continue) -> None:
        """Never called: the turn itself makes the run pause."""
        raise NotImplementedError
