"""The actor that delivers one trigger's events to its function, and the one that reports failures for other threads."""

from __future__ import annotations

import copy
import math
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import Backlog, Limits, size_of
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.functions import Functions, close_unrun, is_awaitable, is_unrun
from scopestate.actors.loops import Continue, LoopCalls, LoopThread, OnLoop, Overdue, Pending
from scopestate.actors.reply import Reply
from scopestate.actors.turn import HOLDER, TurnActor
from scopestate.errors import EventNotDelivered, HandlerTimeout
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.ops.values import class_name
from scopestate.signals import Guard, certainly, exclusive
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher

log = Log("scopestate.triggers")

NOBODY: Final = -1
"""The holder of the claim while a delivery waits without a thread; no thread has this id."""

LONGEST_BACKOFF_S: Final = 60.0


class Barrier:
    """A message that goes behind the waiting events of every handler; its reply is set when all have reached it."""

    def __init__(self, handlers: list[HandlerActor], reply: Reply[None]) -> None:
        self.handlers = tuple(handlers)
        self._waiting: dict[HandlerActor, bool] = dict.fromkeys(handlers, True)
        self._exclusive = Guard()
        self._reply = reply
        self.over = False
        """True once `withdraw` was called."""
        if not handlers:
            reply.set()

    def arrive(self, handler: HandlerActor) -> None:
        """Note that `handler` has handled everything that came before."""
        if self._exclusive.run(self._is_last, handler):
            self._reply.set()

    def _is_last(self, handler: HandlerActor) -> bool:
        return self._waiting.pop(handler, None) is not None and not self._waiting and not self._reply.done

    def withdraw(self) -> None:
        """The caller has stopped waiting: take it out of the mailboxes where it still is."""
        self.over = True
        for handler in self._still():
            handler.withdraw(self)

    @exclusive
    def _still(self) -> list[HandlerActor]:
        return list(self._waiting)

    def missing(self) -> list[str]:
        """The triggers whose handlers have not reached it yet, each as `id (function id)`."""
        triggers = [handler.trigger for handler in self._still()]
        return [f"{trigger.trigger_id} ({trigger.function_id})" for trigger in triggers]


class Reporter(TurnActor):
    """Reports failures, in order, for threads that others depend on: the router's, the timer's, a closing one.

    The hooks and logging filters are code of the program, and may block. What waits for them is bounded: one more
    failure is counted and not reported, because no thread that comes here may wait for a hook that is behind.
    """

    runs_program = True

    MOST = 10_000
    """Reports that may wait."""
    MOST_BYTES = 1 << 26
    """Bytes of values that they may hold together."""

    def __init__(self, dispatcher: Dispatcher, report: Callable[[DeliveryFailure], None]) -> None:
        super().__init__(dispatcher)
        self._report = report
        self._exclusive = Guard()
        self._waiting = self._waiting_bytes = 0
        self.left_out = 0
        """Failures since the hooks were last up to date that were not reported."""

    def report(self, failure: DeliveryFailure) -> None:
        """Have `failure` reported on a worker thread, or count it if too much waits already."""
        if self._takes(size_of(failure.event)):
            self.tell(failure)

    @exclusive
    def _takes(self, size: int) -> bool:
        if self._waiting >= self.MOST or self._waiting_bytes >= self.MOST_BYTES:
            self.left_out += 1
            return False
        self._waiting += 1
        self._waiting_bytes += size
        return True

    @exclusive
    def _is_done(self, size: int) -> int:
        self._waiting -= 1
        self._waiting_bytes -= size
        if self._waiting:
            return 0
        left_out, self.left_out = self.left_out, 0
        return left_out

    def on_receive(self, message: DeliveryFailure) -> None:
        try:
            self._report(message)
        finally:
            if left_out := self._is_done(size_of(message.event)):
                log.error("%d failed deliveries were not reported: the hooks, or the log, were behind", left_out)

    def _fail(self) -> None:
        log.error("reporting a failed delivery failed", exc_info=sys.exc_info()[1])


class HandlerServices:
    """What the handlers of one engine share."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        functions: Functions,
        limits: Limits,
        loop_thread: LoopThread,
        report: Callable[[DeliveryFailure], None],
        tell_hooks: Callable[[DeliveryFailure], None] | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.functions = functions
        self.limits = limits
        self.loop_thread = loop_thread
        self.report = report
        self.tell_hooks = tell_hooks or report
        """As `report`, without a line in the log: for many events at once, which share one."""
        self.reporter = Reporter(dispatcher, report)
        """Reports from threads that must not run the hooks themselves."""
        self.backlog = Backlog(dispatcher, limits)
        self.loop_calls = LoopCalls(dispatcher, loop_thread.replace)
        """The calls in progress on event loops."""

    def on(self, dispatcher: Dispatcher) -> HandlerServices:
        """Return the same services for handlers whose turns belong to another dispatcher."""
        other = copy.copy(self)
        other.dispatcher = dispatcher
        return other


class HandlerActor(TurnActor):
    """Delivers events to one trigger's function, one at a time, in the order in which they came.

    A slow, failing or hung function holds up this trigger alone. While a coroutine runs or a retry waits, the actor
    stays claimed but keeps no thread.
    """

    runs_program = True

    def __init__(self, trigger: Trigger, services: HandlerServices) -> None:
        super().__init__(services.dispatcher)
        # A deque, unlike other mailboxes: with `drop_oldest` the router takes events out at the front.
        self._mailbox: deque[Any] = deque()  # type: ignore[assignment]
        self._services = services
        self._deadline: float | None = None
        self._running_id = ""
        self._looks_s = math.inf
        """When a timer next checks whether the running function is overdue; inf: no timer is set."""
        self._overdue = False
        self.trigger = trigger
        """May be replaced by one with the same filters; applies from the next event."""
        self.active = True
        """False once unregistered: events that wait are dropped."""
        self.delivered = self.skipped = self.failed = self.retried = self.dropped = self.timeouts = 0
        self.offered = 0
        """Bytes of the events that were ever queued. Written by the router's turn alone."""
        self.taken = 0
        """Bytes of those that have left the mailbox. Written by this actor's turn alone."""
        self._told = 0
        self.current: StateEvent | None = None
        """The event being delivered; None between deliveries."""

    @property
    def name(self) -> str:
        return f"handler of trigger {self.trigger.trigger_id!r}"

    def depth(self) -> int:
        """Events that wait."""
        return len(self._mailbox)

    def is_busy(self) -> bool:
        """True if events wait or one is being delivered."""
        return bool(self._mailbox or self._claim)

    def withdraw(self, item: object) -> None:
        """Take `item` out of the mailbox, if it is in there. From any thread."""
        while True:
            try:
                self._mailbox.remove(item)
            except IndexError:
                continue  # the mailbox was changed during the search
            except ValueError:
                pass
            return

    def is_overdue(self) -> bool:
        """True while a plain function runs past its time limit."""
        return self._overdue and self._deadline is not None

    def offer(self, event: StateEvent) -> None:
        """Queue an event, within the mailbox's bound. Called by the router's turn alone."""
        if self._services.limits.handler_when_full != "block" and not self._make_way(event):
            return
        self.put(event)
        if not self._scheduled and not self._claim:
            try:
                self._scheduled = True
                self._dispatcher.schedule_next(self)
            except BaseException:
                certainly(self.wake_anyway)
                raise

    def put(self, event: StateEvent) -> None:
        """As `offer`, with no bound, and without a worker thread being woken."""
        old, new, mailbox = event.old_json, event.new_json, self._mailbox
        size = (len(old) if old else 0) + (len(new) if new else 0)
        mailbox += (event,)
        self.offered += size
        self._services.backlog.offered += size

    def _make_way(self, event: StateEvent) -> bool:
        """Drop what `handler_when_full` says if there is no room. False if that is `event` itself."""
        if not self.is_full() and not self._services.backlog.is_over():
            return True
        if self._services.limits.handler_when_full == "reject":
            self._drop(event, "the mailbox of its handler is full and handler_when_full is reject")
            return False
        while self._drop_oldest() and self.is_full():
            pass
        return True

    def is_full(self) -> bool:
        limits = self._services.limits
        most = limits.handler_mailbox_bytes
        return len(self._mailbox) >= limits.handler_mailbox or bool(most and self.offered - self.taken >= most)

    def offer_once(self, event: StateEvent) -> None:
        """As `offer`, unless `event` is what came last."""
        if not self._mailbox or self._mailbox[-1] is not event:
            self.offer(event)

    # -------------------------------------------------------------------------------------------------- delivery

    def run_batch(self) -> None:
        self._scheduled = False
        try:
            me = get_ident()
            if self._claim.setdefault(HOLDER, me) == me:
                self._drain()
        except BaseException:
            certainly(self._recover)
            raise

    def on_receive(self, message: Any) -> Any:
        raise TypeError(f"a handler takes events from its router, not {message!r:.80}")

    def _drain(
        self, delivery: Coroutine[Pending, Any, None] | None = None, value: Any = None, error: Any = None
    ) -> None:
        """Deliver what waits, a batch at most; runs claimed, and keeps the claim while a delivery is pending."""
        mailbox = self._mailbox
        depth = -1  # what event_depth holds: setting it costs as much as a small handler
        for _ in range(self.batch):
            if delivery is None:
                try:
                    item = mailbox.popleft()
                except IndexError:
                    break
                if type(item) is Barrier:
                    item.arrive(self)
                    continue
                old, new = item.old_json, item.new_json
                self.taken += (len(old) if old else 0) + (len(new) if new else 0)
                if not self.active:
                    self.dropped += 1
                    continue
                self.current = item
                if depth != item.depth:
                    depth = item.depth
                    event_depth.set(depth + 1)
                trigger = self.trigger
                if trigger.condition_function_id is None:
                    # The first call needs no coroutine, and a plain function that returns nothing is done with it.
                    try:
                        result = self._call(trigger.function_id, item)
                    except BaseException as problem:  # noqa: BLE001 - user code may raise anything
                        delivery = self._finish(trigger.function_id, item, 1, None, problem)
                    else:
                        if result is None:
                            self.delivered += 1
                            self.current = None
                            continue
                        delivery = self._finish(trigger.function_id, item, 1, result)
                else:
                    delivery = self._deliver(trigger, item)
            elif depth < 0:
                depth = self.current.depth  # type: ignore[union-attr]  # set as long as there is a delivery
                event_depth.set(depth + 1)
            try:
                pending = delivery.send(value) if error is None else delivery.throw(error)
            except StopIteration:
                delivery = value = error = self.current = None
                continue
            except BaseException as problem:
                delivery = value = error = self.current = None
                if is_from_outside(problem):
                    self._give_back()
                    raise
                self.failed += 1
                log.exception("a delivery of %s broke off", self.name)
                continue
            self._wait_for(pending, delivery)
            return
        self._give_back()

    def _wait_for(self, pending: Pending, delivery: Coroutine[Pending, Any, None]) -> None:
        """Start what the delivery waits for, and keep the claim until it has ended."""
        self.tell_taken()
        self._claim[HOLDER] = NOBODY
        go_on = self._continuation(delivery)
        try:
            pending.start(go_on)  # with the depth still set: code on a loop runs in this context
        except BaseException as problem:
            go_on(None, problem)
            if is_from_outside(problem):
                raise
        event_depth.set(0)

    def tell_taken(self) -> None:
        """Tell the router how many bytes have left the mailbox. Within this actor's turn."""
        taken = self.taken
        if taken != self._told:
            self._services.backlog.released += (taken - self._told,)
            self._told = taken

    def _give_back(self) -> None:
        self.tell_taken()
        event_depth.set(0)
        del self._claim[HOLDER]
        self.wake()
        self._services.backlog.made_room()

    def _continuation(self, delivery: Coroutine[Pending, Any, None]) -> Continue:
        once = [delivery]

        def go_on_here(value: Any, error: BaseException | None) -> None:
            try:
                going_on = once.pop()  # one step: an outcome that comes twice goes on once
            except IndexError:
                return
            self._claim[HOLDER] = get_ident()
            self._drain(going_on, value, error)

        # The outcome comes on an event loop's or the timer's thread, which must not run code of the program.
        return lambda value, error: self._dispatcher.submit_program(lambda: go_on_here(value, error))

    # `_drain` drives these coroutines. They await Pending objects only, and never raise.

    async def _deliver(self, trigger: Trigger, event: StateEvent) -> None:
        """Condition, then handler, with retries."""
        condition: str = trigger.condition_function_id  # type: ignore[assignment]  # without one it is not called
        try:
            verdict = self._call(condition, event)
            if type(verdict) is not bool:
                verdict = await self._outcome_of(condition, verdict)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything; a worker thread outlives it
            self._report(condition, event, error, attempt=1, final=True)
            return
        if verdict is False:
            self.skipped += 1
            return
        if not self.active:  # unregistered while the condition ran
            self.dropped += 1
            return
        await self._finish(trigger.function_id, event, 1, *self._outcome_of_call(trigger.function_id, event))

    def _outcome_of_call(self, function_id: str, event: StateEvent) -> tuple[Any, BaseException | None]:
        try:
            return self._call(function_id, event), None
        except BaseException as error:  # noqa: BLE001 - as above
            return None, error

    async def _finish(
        self, function_id: str, event: StateEvent, attempt: int, result: Any, error: BaseException | None = None
    ) -> None:
        """Finish an attempt whose call gave `result` or raised `error`, and retry as often as the limits allow."""
        limits = self._services.limits
        while True:
            if error is None:
                try:
                    if result is not None:
                        await self._outcome_of(function_id, result)
                    self.delivered += 1
                    return
                except BaseException as problem:  # noqa: BLE001 - as above
                    error = problem
            final = attempt >= limits.handler_attempts or issubclass(type(error), HandlerTimeout) or not self.active
            self._report(function_id, event, error, attempt=attempt, final=final)
            result = error = None  # or this frame and the traceback would keep each other
            if final:
                return
            self.retried += 1
            await self.pause_after(attempt)
            attempt += 1
            if not self.active:  # unregistered during the pause
                self.dropped += 1
                return
            result, error = self._outcome_of_call(function_id, event)

    def pause_after(self, attempt: int) -> Awaitable[None]:
        """Return an awaitable for the pause between a failed attempt and the next."""
        doublings = min(attempt - 1, 64)  # far more than LONGEST_BACKOFF_S needs; 2.0**1024 would raise
        return self.later(min(self._services.limits.handler_backoff_s * 2.0**doublings, LONGEST_BACKOFF_S))

    def later(self, delay_s: float) -> Awaitable[None]:
        """Return an awaitable that ends after `delay_s` seconds, and needs no thread."""
        return _Later(self._dispatcher, delay_s)

    def _call(self, function_id: str, event: StateEvent) -> Any:
        """Call a function. The result of a coroutine function must still be awaited."""
        services = self._services
        function = services.functions.get(function_id)
        timeout_s = services.limits.handler_timeout_s
        if timeout_s and not function.is_async:
            return self._call_watched(function.target, function_id, event, timeout_s)
        return function.target(event)

    async def _outcome_of(self, function_id: str, result: Any) -> Any:
        """Return the result of a function, awaited if it is awaitable."""
        if is_awaitable(result):
            return await self._on_loop(function_id, result)
        if is_unrun(result):
            raise TypeError(
                f"function {function_id!r} returned a {class_name(result)}, whose code has not run and never would: "
                "return a value or a coroutine"
            )
        return result

    async def _on_loop(self, function_id: str, result: Awaitable[Any]) -> Any:
        """Await the result of a function, on the event loop that the function belongs to."""
        services = self._services
        timeout_s = services.limits.handler_timeout_s
        self._overdue = False
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
            self.timeouts += 1
            raise HandlerTimeout(function_id, timeout_s) from error

    def _report(
        self,
        function_id: str,
        event: StateEvent,
        error: BaseException,
        *,
        attempt: int,
        final: bool,
        later: bool = False,
    ) -> None:
        """Report a failed attempt. `later`: on another thread, because this one must not run code of the program."""
        if issubclass(type(error), HandlerTimeout) and self._overdue:
            return  # reported when it became overdue
        if final:
            self.failed += 1
        failure = DeliveryFailure(self.trigger.trigger_id, function_id, event, error, attempt, final)
        if later:
            self._services.reporter.report(failure)
        else:
            self._services.report(failure)

    # --------------------------------------------------------------------------------------- overdue plain functions

    def _call_watched(self, target: Callable[[Any], Any], function_id: str, event: StateEvent, timeout_s: float) -> Any:
        """Call a plain function, which nothing can stop: that it exceeds its time limit is reported while it runs."""
        self._overdue = False
        self._running_id = function_id
        self._deadline = self._dispatcher.monotonic() + timeout_s
        if self._deadline < self._looks_s:
            # One timer for each handler, not for each event: it follows the deadline. A timer that was set before a
            # reload, for a longer time limit, would come too late.
            self._looks_s = self._deadline
            self._dispatcher.call_later(timeout_s, weakly(self._look_at_deadline))
        try:
            result = target(event)
        except BaseException as error:
            if self._overdue:
                raise HandlerTimeout(function_id, timeout_s) from error
            raise
        finally:
            self._deadline = None
        if self._overdue:
            raise HandlerTimeout(function_id, timeout_s)
        return result

    def _look_at_deadline(self) -> None:
        # Cleared before the deadline is read: a call that begins in between is seen here or sets its own timer.
        self._looks_s = math.inf
        deadline, event = self._deadline, self.current
        if deadline is None or event is None or self._overdue:
            return
        left_s = deadline - self._dispatcher.monotonic()
        if left_s > 0:
            self._looks_s = deadline
            self._dispatcher.call_later(left_s, weakly(self._look_at_deadline))
            return
        self.timeouts += 1
        error = HandlerTimeout(self._running_id, self._services.limits.handler_timeout_s)
        self._report(self._running_id, event, error, attempt=1, final=True, later=True)
        self._overdue = True

    # ---------------------------------------------------------------------------------------------- events not tried

    def _drop_oldest(self) -> bool:
        """Drop the event that has waited longest. False if no event waits."""
        mailbox = self._mailbox
        for _ in range(len(mailbox)):
            try:
                item = mailbox.popleft()
            except IndexError:
                return False
            if type(item) is not Barrier:
                size = size_of(item)
                self.offered -= size
                self._services.backlog.offered -= size
                self._drop(
                    item, "newer events came while its handler's mailbox was full (handler_when_full: drop_oldest)"
                )
                return True
            mailbox += (item,)
        return False

    def _drop(self, event: StateEvent, reason: str, *, logged: bool = True) -> None:
        self.dropped += 1
        error = EventNotDelivered(
            f"event {event.revision} of scope {event.scope!r}, key {event.key!r} reached no handler: {reason}"
        )
        failure = DeliveryFailure(
            self.trigger.trigger_id, self.trigger.function_id, event, error, attempt=0, final=True
        )
        if logged:
            self._services.reporter.report(failure)
        else:
            self._services.tell_hooks(failure)

    def waiting(self) -> int:
        """How many events wait for their delivery; none once unregistered."""
        return len(self.waiting_events()) if self.active else 0

    def waiting_events(self) -> list[StateEvent]:
        """The events that wait for their delivery, approximately: other threads may add and take some."""
        return [item for item in self._mailbox.copy() if type(item) is StateEvent]

    def abandon(self, reason: str) -> None:
        """Report each waiting event to the hooks as not delivered. The closing engine logs how many there were."""
        mailbox = self._mailbox
        while True:
            try:
                item = mailbox.popleft()
            except IndexError:
                return
            if type(item) is Barrier:
                item.arrive(self)
            elif self.active:
                self._drop(item, reason, logged=False)

    def abandon_current(self) -> None:
        """Report the event whose delivery has begun and not ended, as `abandon` does. After the grace time."""
        event = self.current
        if event is None or self._overdue:
            return  # it was reported when it became overdue
        error = EventNotDelivered(
            f"event {event.revision} of scope {event.scope!r}, key {event.key!r} was still being handled when the "
            "engine closed: its handler may or may not have done its work"
        )
        self.failed += 1
        trigger = self.trigger
        self._services.tell_hooks(
            DeliveryFailure(trigger.trigger_id, trigger.function_id, event, error, attempt=1, final=True)
        )


class _Later:
    """A pause without a thread."""

    def __init__(self, dispatcher: Dispatcher, delay_s: float) -> None:
        self._dispatcher = dispatcher
        self._delay_s = delay_s

    def __await__(self) -> Generator[_Later, Any, None]:
        yield self

    def start(self, go_on: Continue) -> None:
        self._dispatcher.call_later(self._delay_s, lambda: go_on(None, None))
