"""Deliveries to workers, on the server's event loop without another thread.

A handler in this process may block, so its deliveries run on worker threads. A delivery to a worker only sends a
message: switching threads twice would take five times as long as the delivery itself
(docs/design/0021-deliveries-to-workers.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Awaitable, Callable, Generator
from threading import get_ident
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from scopestate.actors.handler import HandlerActor, Hold
from scopestate.actors.lanes import Run
from scopestate.actors.loops import unwrapped
from scopestate.actors.services import HandlerServices
from scopestate.actors.turn import HOLDER
from scopestate.errors import Forbidden, HandlerTimeout, RemoteFailure
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.server.worker import TimedOut, WorkerFunction, batch_json, event_json
from scopestate.signals import certainly
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher, Timer
    from scopestate.actors.lanes import Lanes
    from scopestate.actors.loops import Continue
    from scopestate.actors.reply import Reply
    from scopestate.actors.turn import TurnActor
    from scopestate.server.hub import Hub
    from scopestate.server.state_functions import Outcome, Result
    from scopestate.server.worker import Worker
    from scopestate.wire.frames import InvocationResult


class LoopDispatcher:
    """Gives actors the thread of one event loop; time and replies come from the engine's own dispatcher.

    Code of the program must not run in these turns: it would hold up every connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, behind: Dispatcher) -> None:
        self._loop = loop
        self._behind = behind
        self._thread = get_ident()
        self._running = False
        self._closed = False
        self.waiter = behind.waiter

    def schedule(self, actor: TurnActor) -> None:
        self.submit(actor.run_batch)

    def schedule_next(self, actor: TurnActor) -> None:
        self.submit(actor.run_batch)

    def schedule_now(self, actor: TurnActor) -> None:
        self.submit(actor.run_batch)

    def submit(self, work: Callable[[], object]) -> None:
        if self._closed:
            self._behind.submit(work)
        elif get_ident() != self._thread:
            try:
                self._loop.call_soon_threadsafe(work)
            except RuntimeError:  # closed in between
                self._behind.submit(work)
        elif self._running:
            self._loop.call_soon(work)  # limits the depth of recursion
        else:
            self._running = True
            try:
                work()
            finally:
                self._running = False

    def begin_here(self) -> bool:
        """Return whether the calling thread may run a turn now. It then calls `end_here` after the turn."""
        if self._running or self._closed or get_ident() != self._thread:
            return False
        self._running = True
        return True

    def end_here(self) -> None:
        """End what `begin_here` has begun."""
        self._running = False

    def submit_to_loop(self, work: Callable[[], object]) -> None:
        """Run `work` in the next round of the loop; nothing happens if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def submit_program(self, work: Callable[[], object]) -> None:
        if self._closed:
            self._behind.submit_program(work)
        else:
            self.submit(work)

    def held(self) -> int:
        return self._behind.held()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._behind.call_later(delay_s, callback)

    def reply(self) -> Reply[Any]:
        return self._behind.reply()

    def claim(self, actor: TurnActor) -> dict[str, int]:
        return self._behind.claim(actor)

    def monotonic(self) -> float:
        return self._behind.monotonic()

    def wall_ns(self) -> int:
        return self._behind.wall_ns()

    def uptime_ns(self) -> int:
        return self._behind.uptime_ns()

    def random(self) -> float:
        return self._behind.random()

    def threads(self) -> int:
        return self._behind.threads()

    def close(self) -> None:
        """Run later work on the engine's own threads, as the loop ends."""
        self._closed = True


class WorkerHandler(HandlerActor):
    """Delivers one trigger's events to a function that usually runs in a worker. Turns run on the event loop."""

    takes_over = False

    def __init__(self, trigger: Trigger, services: HandlerServices, hub: Hub, threads: Dispatcher) -> None:
        super().__init__(trigger, services)
        self._hub = hub
        self._threads = threads
        self.answered = 0
        """Events that the worker has answered, errors included."""
        self._largest = 0
        self._full: tuple[int, float] | None = None
        """`answered`, and the time, when events first found no room; None: the worker has answered since."""
        self._dropped_before = 0
        """`dropped` at the last check."""
        self._spare: Lanes | None = None
        """The lanes that were used last, to be used again: making them takes as long as a delivery's message."""

    def offer(self, event: StateEvent) -> None:
        if self._deliver_at_once(event):
            return
        if not self.depth():
            self._largest = 0
        size = _size(event)
        self._largest = max(self._largest, size)
        super().offer(event)
        if self.depth() * self._largest > self._hub.triggers.max_waiting_bytes:
            self._hub.triggers.look_soon()

    def _deliver_at_once(self, event: StateEvent) -> bool:
        """Deliver an event within the router's turn if nothing is under way here, without queuing it.

        The same as a turn that takes it out of the mailbox, in a third of the time. False, with nothing done, in any
        case but the simple one: see `_simple_target`.
        """
        limits = self._services.limits
        if (
            self._lanes is not None
            or self._mailbox
            or self._news
            or self._claim
            or self._scheduled
            or self._shaped
            or self.paused
            or not self.active
            or limits.handler_when_full != "block"
        ):
            return False
        target = self._simple_target()
        dispatcher: LoopDispatcher = self._dispatcher  # type: ignore[assignment]  # `_make_handler` gives it this one
        if target is None or not dispatcher.begin_here():
            return False
        # No other turn of this actor can take the claim in between: all of them run on this thread.
        self._claim[HOLDER] = get_ident()
        try:
            run = Run()
            run.event = event
            lanes = self._open_lanes()
            lanes.enter(run)
            lanes.begin(run)
            self._stuck = lanes.running >= self.trigger.concurrency
            self._send_to(target, run)
        finally:
            del self._claim[HOLDER]
            dispatcher.end_here()
        try:
            self.wake()
        except MemoryError:  # raised, it would make the router offer the event again
            certainly(self.wake_anyway)
        return True

    def _open_lanes(self) -> Lanes:
        if self._lanes is None:
            spare = self._spare
            if spare is not None and spare.order == self.trigger.order:
                self._lanes, self._aside = spare, spare.aside
                return spare
            self._spare = super()._open_lanes()
        return super()._open_lanes()

    def waiting_bytes(self, *, exactly: bool) -> int:
        """Return the bytes of waiting events; without `exactly`, an upper bound, which is cheap to compute."""
        if not exactly:
            return self.depth() * self._largest
        return sum(map(_size, self.waiting_events()))

    def silent_s(self, now: float) -> float:
        """Return for how many seconds the worker has not answered although events found no room. For a timer.

        Only an answer or an empty mailbox resets it: with `drop_oldest` a mailbox that is bounded in bytes may have
        room at each check, because large events were dropped for small ones.
        """
        dropped, self._dropped_before = self.dropped - self._dropped_before, self.dropped
        if self._full is not None and (self._full[0] != self.answered or not self.depth()):
            self._full = None
        if self._full is None:
            if not (self.depth() and (dropped or self.is_full() or self._holds_up_all())):
                return 0.0
            self._full = (self.answered, now)
        return now - self._full[1]

    def _holds_up_all(self) -> bool:
        """Whether all handlers together hold as much as they may (`events_bytes`), and this one at least its share."""
        if not self._services.backlog.is_over():
            return False
        handlers = len(self._hub.engine._router.triggers.handlers())
        return (self.offered - self.taken) * handlers >= self._services.limits.events_bytes

    def _call(self, function_id: str, run: Run) -> Any:
        """Call a function with the present rights of the trigger's worker."""
        event: Any = run.event if self._bare else self._argument(run)
        owner = getattr(self.trigger, "owner", None)  # None: the program has replaced the trigger by one of its own
        if owner is not None:
            if type(event) is list:
                event = self._permitted(owner, function_id, run, event)
                if not event:
                    return None
            else:
                event = self._as_known(event)
                self._check(owner, function_id, event)
            own = self._hub.own_function(function_id)
            if own is not None:
                data = batch_json(event) if type(event) is list else event_json(event)
                return _InServer(self._hub, lambda: own(owner, Raw(data)))
        function = self._services.functions.get(function_id)
        target = function.target
        if type(target) is WorkerFunction and target.hub is self._hub:
            return _InWorker(self, target, event, None if run.asking else self.trigger.metadata_json)
        if function.is_async:
            return target(event)
        return _OnThread(target, event, self._threads)

    def _permitted(self, owner: Worker, function_id: str, run: Run, events: list[StateEvent]) -> list[StateEvent]:
        """Return the events of a batch that the worker may have now, as it expects them. Each other one fails alone."""
        permitted = []
        for event in events:
            try:
                self._check(owner, function_id, event)
            except Forbidden as error:
                self._report(run, function_id, error, final=True, event=event)
            else:
                permitted.append(self._as_known(event))
        return permitted

    def _as_known(self, event: StateEvent) -> StateEvent:
        """Return the event as the worker expects it: a trigger that names no events may know only the reference's."""
        return event.as_deleted() if event.expired_at is not None and self.trigger.events is None else event

    def _check(self, owner: Worker, function_id: str, event: StateEvent) -> None:
        if owner.access is not None:
            try:
                owner.access.check_delivery(function_id, event.scope)
            except Forbidden as error:
                self._hub.note_refusal(error)
                raise

    def _drain(self, hold: Hold) -> None:
        """Begin the deliveries that can begin, without blocking the event loop."""
        # This may run within a call from handlers, whose depth is restored afterwards.
        depth = event_depth.get()
        self._asked = False
        while True:
            self._stuck = False
            self._hear()
            run = self._next()
            if run is None:
                break
            if run.delivery is not None or not self._send(run):
                event_depth.set(run.event.depth + 1)
                self._settle(run, self._carry_on(run))
        self._give_back()
        if depth or type(depth) is not int:
            event_depth.set(depth)

    def _simple_target(self) -> WorkerFunction | None:
        """Return the function if it is in a worker, without a condition or a time limit. None in any other case."""
        services, trigger = self._services, self.trigger
        if trigger.condition_function_id is not None or services.limits.handler_timeout_s:
            return None
        function = services.functions.find(trigger.function_id)
        target = None if function is None else function.target
        return target if type(target) is WorkerFunction and target.hub is self._hub else None

    def _send(self, run: Run) -> bool:
        """Deliver in the simple case. False in any other case.

        The base class needs a coroutine for each event: that takes as long as the rest of a delivery.
        """
        target = self._simple_target()
        if target is None:
            return False
        self._send_to(target, run)
        return True

    def _send_to(self, target: WorkerFunction, run: Run) -> None:
        """Send the event of a run to a worker, whose answer ends the run."""
        trigger = self.trigger
        owner = getattr(trigger, "owner", None)
        event: Any = run.event
        try:
            if not self._bare and isinstance(event, list):
                event = list(event) if owner is None else self._permitted(owner, trigger.function_id, run, event)
                if not event:
                    run.outcome = "delivered"
                    self._settle(run, None)
                    return
            elif owner is not None:
                if owner.access is not None:
                    self._check(owner, trigger.function_id, event)
                if event.expired_at is not None:
                    event = self._as_known(event)
            target.send_event(event, functools.partial(self._settled, run), trigger.metadata_json)
        except Exception as error:  # noqa: BLE001 - goes to the delivery, which reports it
            run.delivery = self._finish(run, trigger.function_id, None, error)
            self._settle(run, self._step(run))

    def note_answer(self, outcome: InvocationResult) -> None:
        """Count an answer of the worker. A timeout is not one."""
        if type(outcome.error) is not TimedOut:
            self.answered += 1

    def _settled(self, run: Run, outcome: InvocationResult) -> None:
        self.note_answer(outcome)
        error = outcome.error
        if error is None:
            run.outcome = "delivered"
            if self._end_at_once(run):
                return
            run.news = "over"
        else:
            function_id = self.trigger.function_id
            failure = RemoteFailure(function_id, error.code, error.message, error.stacktrace)
            run.delivery, run.news = self._finish(run, function_id, None, failure), "answered"
        self._tell(run)

    def _end_at_once(self, run: Run) -> bool:
        """End a run without a turn, if nothing else is to be done here. False, with nothing done, in any other case.

        The same as a turn that hears that the run is over, in half of the time.
        """
        lanes = self._lanes
        if (
            lanes is None
            or lanes.going
            or lanes.has_ready()
            or self._mailbox
            or self._news
            or self._claim
            or self._scheduled
            or self._shaped
            or self._asked
        ):
            return False
        dispatcher: LoopDispatcher = self._dispatcher  # type: ignore[assignment]  # as above
        if not dispatcher.begin_here():
            return False
        self._claim[HOLDER] = get_ident()
        try:
            self._end(run)
            self._stuck = False
        except BaseException:  # a MemoryError: a turn ends it
            run.news = "over"
            certainly(functools.partial(self._news.append, run))
            raise
        finally:
            del self._claim[HOLDER]
            dispatcher.end_here()
            certainly(self.wake)
        self._services.backlog.made_room()
        return True

    async def _on_loop(self, run: Run, function_id: str, result: Awaitable[Any]) -> Any:
        if not isinstance(result, (_InWorker, _InServer, _OnThread)):
            return await super()._on_loop(run, function_id, result)
        try:
            return await result
        except HandlerTimeout:
            self._note("timeouts")
            raise


class _InWorker:
    """Runs the function of a delivery in a worker, while the delivery waits."""

    def __init__(
        self,
        handler: WorkerHandler,
        function: WorkerFunction,
        event: StateEvent | list[StateEvent],
        metadata: bytes | None,
    ) -> None:
        self._metadata = metadata
        self._handler = handler
        self._function = function
        self._event = event
        self._timeout_s = handler._services.limits.handler_timeout_s

    def __await__(self) -> Generator[_InWorker, Any, Any]:
        return self._function.result_for_event((yield self))

    def start(self, go_on: Continue) -> None:
        """Send the event, and call `go_on` with the outcome."""
        function = self._function
        timer: asyncio.TimerHandle | None = None

        def settle(outcome: InvocationResult) -> None:
            if timer is not None:
                timer.cancel()
            self._handler.note_answer(outcome)
            go_on(outcome, None)

        def expire() -> None:
            if function.hub.drop(execution):
                go_on(None, HandlerTimeout(function.frame.id, self._timeout_s))

        try:
            execution = function.send_event(self._event, settle, self._metadata)
        except Exception as error:  # noqa: BLE001 - goes to the delivery, which reports it
            go_on(None, error)
            return
        if self._timeout_s:
            timer = function.hub.loop.call_later(self._timeout_s, expire)


class _InServer:
    """Runs a function of the engine or the server itself, while the delivery waits."""

    def __init__(self, hub: Hub, run: Callable[[], Outcome]) -> None:
        self._hub = hub
        self._run = run

    def __await__(self) -> Generator[_InServer, Any, Any]:
        return False if (yield self) == b"false" else None

    def start(self, go_on: Continue) -> None:
        """Run it in a later round of the event loop; the copied context holds the depth of the event.

        Not at once: a write runs the router's turn, and this delivery may be started within one.
        """
        try:
            self._hub.loop.call_soon_threadsafe(self._run_now, go_on)
        except RuntimeError as error:  # the loop was closed in between
            go_on(None, error)

    def _run_now(self, go_on: Continue) -> None:
        try:
            outcome = self._run()
        except Exception as error:  # noqa: BLE001 - goes to the delivery, which reports it
            go_on(None, error)
            return
        if outcome is None or isinstance(outcome, bytes):
            go_on(outcome, None)
        else:
            self._hub.spawn(self._wait(outcome, go_on))

    @staticmethod
    async def _wait(outcome: Awaitable[Result], go_on: Continue) -> None:
        try:
            result = await outcome
        except asyncio.CancelledError:
            go_on(None, RemoteFailure("", "invocation_stopped", "Invocation stopped"))
            raise
        except Exception as error:  # noqa: BLE001 - as above
            go_on(None, error)
        else:
            go_on(result, None)


class _OnThread:
    """Runs a plain function of the program on a worker thread, while the delivery waits."""

    def __init__(self, target: Callable[[Any], Any], event: Any, threads: Dispatcher) -> None:
        self._target = target
        self._event = event
        self._threads = threads

    def __await__(self) -> Generator[_OnThread, Any, Any]:
        return unwrapped((yield self))

    def start(self, go_on: Continue) -> None:
        """Run it on a worker thread. The copied context holds the depth of the event."""
        context = contextvars.copy_context()

        def run() -> None:
            try:
                result = context.run(self._target, self._event)
            except BaseException as error:  # noqa: BLE001 - goes to the delivery, which reports it
                go_on(None, error)
            else:
                go_on(result, None)

        self._threads.submit_program(run)


def _size(event: StateEvent) -> int:
    """Return approximately how many bytes a waiting event holds."""
    return len(event.old_json or b"") + len(event.new_json or b"") + len(event.key) + 200
