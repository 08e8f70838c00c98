"""The workers of a server, and what they share: the table of functions, and the calls between them."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Raw

from scopestate.actors.functions import Function, close_unrun
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    Forbidden,
    FunctionNotFound,
    InvalidRegistration,
    Overloaded,
    RemoteFailure,
    ScopestateError,
    SerializationError,
)
from scopestate.ops import polls
from scopestate.ops.handed import NOTE
from scopestate.ops.trace_context import TracedDepth, context_of
from scopestate.ops.values import check, decode, encode, parse
from scopestate.server.access import Claims
from scopestate.server.connections import GOING
from scopestate.server.engine_functions import EngineFunctions
from scopestate.server.holding import Deliveries
from scopestate.server.state_functions import Outcome, Result, StateFunctions
from scopestate.server.triggers import FUNCTIONS_AVAILABLE, WorkerTriggers
from scopestate.server.worker import TimedOut, Worker, WorkerFunction
from scopestate.wire.bounded_log import BoundedLog, shown
from scopestate.wire.depth import event_depth
from scopestate.wire.frames import (
    ABSENT,
    ErrorBody,
    InvocationResult,
    InvokeFunction,
    RegisterFunction,
    RegisterTrigger,
    RegisterTriggerType,
    TriggerRegistrationResult,
    UnregisterFunction,
    UnregisterTrigger,
    UnregisterTriggerType,
    with_caller,
)
from scopestate.wire.frames import encode as encode_frame
from scopestate.wire.refusals import details_of
from scopestate.wire.session import (
    Action,
    Answered,
    Close,
    Execution,
    Send,
    SessionLimits,
    Settle,
    WorkerSession,
    stopped,
)

if TYPE_CHECKING:
    from scopestate.engine import Engine
    from scopestate.observing import Observer, Serving
    from scopestate.server.access import Access
    from scopestate.server.channels import Channels
    from scopestate.server.connections import Batches

log = logging.getLogger("scopestate.server")

T = TypeVar("T")

WORKERS_SHARE: Final = 4
"""The calls of all workers together may hold this many times the bytes that those of one worker may."""


class Hub:
    """Knows every worker, and carries out what their sessions ask for. On one event loop's thread only."""

    def __init__(
        self,
        engine: Engine,
        channels: Channels,
        limits: SessionLimits,
        call_timeout_s: float,
        max_waiting_events: int,
        max_waiting_bytes: int = 256 * 1024 * 1024,
        *,
        batches: Batches,
        public: bool = True,
    ) -> None:
        """`batches` gathers the messages to all connections.

        `public`: the program can also call the server's functions, `engine::*`. An engine can have one such server.

        Raises InvalidRegistration if the engine already has a public server.
        """
        self.engine = engine
        self.channels = channels
        self.loop = asyncio.get_running_loop()
        self.workers: dict[str, Worker] = {}
        self.functions = engine._functions
        self.calls = 0
        """Calls that workers made so far."""
        self._limits = limits
        self._timeout_s = call_timeout_s
        self._held_bytes = 0
        """Bytes that the calls of all workers hold while they wait for their answers."""
        self._max_held_bytes = WORKERS_SHARE * limits.call_bytes
        self._deadlines: dict[Execution, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.refused = 0
        """Calls, registrations, deliveries and connections that were refused because a right was missing."""
        self.offered: Claims[WorkerFunction] = Claims("function")
        self.deliveries = Deliveries(self)
        self._state = {**StateFunctions(engine, self.deliveries.acknowledging, batches).by_id, **self.deliveries.by_id}
        self._functions_seen = b""
        self._deep = False
        """True while `event_depth` is set for the call in progress."""
        self._serving: Serving | None = None
        """The observer of the call in progress, until its end is known."""
        self.log = BoundedLog(log)
        """For log lines that workers cause; bounded."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.holds: Literal["calls", "all"] | None = None
        """Which calls of workers are no longer begun: all, or all except those by handlers. None: all are begun."""
        self.public = public
        self.act_of_worker = self.act if public else self.act_unless_held
        """The method that gets the messages of workers."""
        self.triggers = WorkerTriggers(self, max_waiting_events, max_waiting_bytes)
        self._engine_functions = EngineFunctions(self, channels)
        self._published = self._engine_functions.functions() if public else []
        if self._published and self.functions.find("engine::functions::list") is not None:
            raise InvalidRegistration("this engine has a server already: stop that one first")
        for function in self._published:
            self.functions.add(function)
        engine._hubs.append(self)

    # ---------------------------------------------------------------------------------------------- coming and going

    def connect(
        self,
        access: Access | None,
        address: str | None,
        send: Callable[[bytes], object],
        close: Callable[[int, str], object],
        message_bytes: int | None = None,
        *,
        carries_depth: bool = False,
    ) -> Worker:
        """Add a new worker; its greeting is the first message sent. `message_bytes`: the largest that it accepts."""
        limits = self._limits
        if message_bytes is not None:
            limits = msgspec.structs.replace(limits, message_bytes=message_bytes)
        session = WorkerSession(str(uuid.uuid4()), limits, self.log, carries_depth=carries_depth)
        worker = Worker(session, access, address, send, close, limited=self.public)
        self.workers[session.worker_id] = worker
        if access is not None:
            access.workers += 1
        self.log.info("worker %s connected from %s", worker.worker_id, address)
        send(session.greeting())
        self.triggers.fire_worker_event("worker_connected", worker)
        return worker

    def disconnect(self, worker: Worker) -> None:
        """Clean up after a worker, in the order of docs/reference/protocol.md section 8."""
        if self.workers.get(worker.worker_id) is not worker:
            return
        self.log.info(
            "worker %s left; it had %d functions and %d calls in progress",
            worker.worker_id,
            len(worker.functions),
            worker.session.waiting + len(worker.session.executing),
        )
        for function in list(worker.functions.values()):
            self._withdraw(function, lost=True)
        self.triggers.silence(worker)
        for execution in worker.session.end():
            self._deadlines.pop(execution, None)
            execution.settle(stopped(execution))
        for execution, size in worker.issued.items():
            self.drop(execution)
            self._held_bytes -= size
        worker.issued.clear()
        self.triggers.remove_all_of(worker)
        self.deliveries.disconnect(worker)
        self.channels.abandon(worker.worker_id)
        worker.end_polls()
        self.engine._snapshots.forget(worker.caller)
        self.engine._polls.forget(worker.caller)
        del self.workers[worker.worker_id]
        access = worker.access
        if access is not None:
            access.workers -= 1
            if not access.workers:
                self.offered.last_worker_left(access)
                self.triggers.last_worker_left(access)
        self.triggers.fire_worker_event("worker_disconnected", worker)

    async def close(self, reason: str) -> None:
        """Disconnect every worker, and leave the engine; calls in progress end with `invocation_stopped`."""
        for worker in list(self.workers.values()):
            worker.close(GOING, reason)
            self.disconnect(worker)
        for function in self._published:
            self.functions.discard(function.function_id, function.target)
        self.engine._hubs.remove(self)
        self.triggers.dispatcher.close()
        self.deliveries.close()
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------- actions

    def act(self, worker: Worker, action: Action) -> None:
        """Carry out what a worker's session asks for."""
        if type(action) is InvokeFunction:
            if (
                action.baggage is not None or action.traceparent is not None or worker.session.executing
            ) and not self._deep:
                depth = worker.session.depth_of(action)
                if depth or type(depth) is not int:
                    self._act_deep(worker, action, depth)
                    return
            self.calls += 1
            builtin = self._state.get(action.function_id)
            if builtin is not None and worker.access is None:
                # The state functions first, on the shortest path: most messages are calls of them.
                try:
                    outcome = builtin(action.data, worker)
                except Exception as error:  # noqa: BLE001 - answered; what is a bug is logged as well
                    self._fail(worker, action, error)
                    return
                if outcome is None or type(outcome) is bytes:
                    message = worker.session.answer(action, outcome)
                    if message is not None:
                        worker.send(message)
                else:
                    self._later(worker, action, outcome)  # type: ignore[arg-type]  # an awaitable, then
            else:
                self._call(worker, action)
        elif type(action) is Answered:
            self._deadlines.pop(action.execution, None)
            action.execution.settle(action.frame)
        else:
            self._act_rarely(worker, action)

    def hold(self, *, handlers_may: bool) -> None:
        """Begin no more calls, except polls. `handlers_may`: begin calls by handlers too."""
        self.holds = "calls" if handlers_may else "all"
        self.deliveries.hold()

    def act_unless_held(self, worker: Worker, action: Action) -> None:
        """As `act`, for a server whose engine may be closed while its workers continue: see `hold`."""
        if self.holds is None or type(action) is not InvokeFunction or action.invocation_id is None:
            self.act(worker, action)
        elif action.function_id == polls.FUNCTION_ID:
            # The last poll is answered when the engine has made its last change.
            if self.engine._router.feed.ended:
                worker.session.waiting -= 1
            else:
                self.act(worker, action)
        elif self.holds == "calls" and action.function_id == NOTE:
            self.act(worker, action)  # so that the work of handlers is not lost
        elif self.holds == "all" or not worker.session.depth_of(action):
            worker.session.waiting -= 1
        else:
            self.act(worker, action)

    def _act_deep(self, worker: Worker, call: InvokeFunction, depth: int) -> None:
        """Carry out a call from a handler, or with a trace: its writes and calls get this `depth`."""
        self._deep = True
        event_depth.set(depth)
        try:
            observer, context = self.engine._observer, context_of(depth)
            if observer is None or context is None or not self._runs_here(call.function_id):
                self.act(worker, call)
            else:
                self._act_observed(worker, call, observer, observer.serve(call.function_id, context))
        finally:
            event_depth.set(0)
            self._deep = False

    def _runs_here(self, function_id: str) -> bool:
        function = self.functions.find(function_id)
        return function is not None and type(function.target) is not WorkerFunction

    def _act_observed(self, worker: Worker, call: InvokeFunction, observer: Observer, serving: Serving) -> None:
        """Carry out a call with a trace: whatever it causes belongs to the span that the observer has made for it."""
        self._serving = serving
        try:
            with serving.attached():
                event_depth.set(TracedDepth.of(event_depth.get(), observer.origin()))
                self.act(worker, call)
        finally:
            if self._serving is not None:  # it is over; otherwise a task ends it
                self._serving = None
                serving.end()

    def _act_rarely(self, worker: Worker, action: Action) -> None:
        match action:
            case Send(message=message):
                worker.send(message)
            case Close(code=code, reason=reason):
                worker.close(code, reason)
            case RegisterFunction():
                self._register(worker, action)
            case UnregisterFunction(id=function_id):
                function = worker.functions.get(function_id)
                if function is not None:
                    self._withdraw(function, lost=False)
            case RegisterTrigger():
                self._register_trigger(worker, action)
            case UnregisterTrigger(id=trigger_id):
                self.triggers.unregister(worker, trigger_id)
            case RegisterTriggerType():
                self.triggers.register_type(worker, action)
            case UnregisterTriggerType(id=type_id):
                self.triggers.unregister_type(worker, type_id)
            case TriggerRegistrationResult(error=error):
                if error is not None and self.triggers.provides(worker, action.trigger_type):
                    self.log.warning("trigger %r of type %r failed: %s", action.id, action.trigger_type, error.message)

    # ----------------------------------------------------------------------------------------------------- functions

    def tell_changed_functions(self) -> None:
        """Fire `engine::functions-available` if the functions have changed since the last time."""
        infos = self._engine_functions.function_infos(None, internal=True)
        seen = encode_frame(infos)
        if seen != self._functions_seen:
            self._functions_seen = seen
            shown: dict[Access | None, dict[str, Any]] = {}

            def event_for(watcher: Worker) -> dict[str, Any]:
                # One event for all workers with the same token, as they see the same functions.
                if watcher.access not in shown:
                    infos = encode_frame(self._engine_functions.function_infos(watcher, internal=True))
                    shown[watcher.access] = {"event": "functions_changed", "functions": decode(infos)}
                return shown[watcher.access]

            self.triggers.fire(FUNCTIONS_AVAILABLE, event_for)

    def _register(self, worker: Worker, frame: RegisterFunction) -> None:
        function = WorkerFunction(self, worker, frame)
        try:
            if worker.access is not None:
                worker.access.check_register(frame.id)
            self.offered.check(frame.id, worker.access)
            known = self.functions.find(frame.id)
            if known is not None and not known.builtin and type(known.target) is not WorkerFunction:
                raise InvalidRegistration(f"{frame.id!r} is a function of the program itself: choose another id")
            self.functions.add(self._entry(function))
        except ScopestateError as error:
            worker.note_refused(frame.id, str(error))
            self.log.warning("worker %s: a function was not registered: %s", worker.worker_id, error)
            self.refuse(worker, frame, error)
            return
        self.log.debug("worker %s registered function %r", worker.worker_id, frame.id)
        worker.refused.pop(frame.id, None)
        worker.functions[frame.id] = function
        self.offered.put(frame.id, worker, function)

    def _entry(self, function: WorkerFunction) -> Function:
        return Function(function.frame.id, function, self.loop, function.frame.description)

    def _withdraw(self, function: WorkerFunction, *, lost: bool) -> None:
        """Remove a function. If another worker with the same token offers one under this id, that one serves again."""
        worker, function_id = function.worker, function.frame.id
        worker.functions.pop(function_id, None)
        self.offered.remove(function_id, worker, keep=lost)
        before = self.offered.serving(function_id)
        self.functions.discard(function_id, function, None if before is None else self._entry(before))

    def withdraw_forbidden(self, worker: Worker) -> None:
        """Remove the registrations that a worker may no longer have after the rights of its token have changed."""
        access = worker.access
        if access is None:
            return
        for function in list(worker.functions.values()):
            try:
                access.check_register(function.frame.id)
            except Forbidden as error:
                self.log.warning("worker %s: a function was withdrawn: %s", worker.worker_id, error)
                worker.note_refused(function.frame.id, str(error))
                worker.session.forget(function.frame)
                self._withdraw(function, lost=False)
        self.triggers.withdraw_forbidden(worker, access)

    def _register_trigger(self, worker: Worker, frame: RegisterTrigger) -> None:
        try:
            rest = self.triggers.register(worker, frame)
        except ScopestateError as error:
            self._refuse_trigger(worker, frame, error)
            return
        if rest is not None:
            # It waits for the disk. The worker's later messages must find it registered.
            worker.pause_messages()
            self.spawn(self._register_later(worker, frame, rest))
            return
        self.log.debug("worker %s registered trigger %r of type %r", worker.worker_id, frame.id, frame.trigger_type)

    async def _register_later(self, worker: Worker, frame: RegisterTrigger, rest: Awaitable[None]) -> None:
        try:
            await rest
        except ScopestateError as error:
            self._refuse_trigger(worker, frame, error)
        finally:
            worker.resume_messages()

    def _refuse_trigger(self, worker: Worker, frame: RegisterTrigger, error: ScopestateError) -> None:
        self.log.warning("worker %s: trigger %r was not registered: %s", worker.worker_id, frame.id, error)
        self.refuse(worker, frame, error)
        refusal = ErrorBody("trigger_registration_failed", shown(error))
        worker.send(encode_frame(TriggerRegistrationResult(frame.id, frame.trigger_type, frame.function_id, refusal)))

    def refuse(
        self, worker: Worker, frame: RegisterFunction | RegisterTrigger | RegisterTriggerType, error: Exception
    ) -> None:
        """Note a refused registration. If the worker keeps trying, its connection is closed."""
        self.note_refusal(error)
        closing = worker.session.refused(frame)
        if closing is not None:
            worker.close(closing.code, closing.reason)

    # --------------------------------------------------------------------------------------------------------- calls

    def _call(self, worker: Worker, call: InvokeFunction) -> None:
        function_id, access = call.function_id, worker.access
        try:
            if access is not None:
                access.check_call(function_id)
            builtin = self._state.get(function_id)
            if builtin is not None:
                outcome = builtin(call.data, worker)
                if outcome is None or type(outcome) is bytes:
                    worker.answer(call, outcome)
                else:
                    self._later(worker, call, outcome)  # type: ignore[arg-type]  # an awaitable, then
                return
            function = self.functions.find(function_id)
            own = self._engine_functions.by_id.get(function_id)
            if own is not None and (function is None or function.builtin):
                answer = own(worker, call.data)
                if type(answer) is bytes:
                    worker.answer(call, answer)
                else:
                    self._later(worker, call, answer)  # type: ignore[arg-type]  # an awaitable, then
                return
            if function is None:
                raise FunctionNotFound(function_id)
            target = function.target
            if type(target) is WorkerFunction and target.hub is self:
                self._forward(worker, call, target)
            else:
                self._check_held(call)
                # A copy: the data may be a small part of a large message.
                self._later(worker, call, self._call_program(worker, function_id, call.data.copy()))
        except Exception as error:  # noqa: BLE001 - as above
            self.note_refusal(error)
            self._fail(worker, call, error)

    def _fail(self, worker: Worker, call: InvokeFunction, error: Exception) -> None:
        if self._serving is not None:
            self._serving.fail(error)
        if not self.public and isinstance(error, EngineClosed) and self.engine.closed:
            # The call was not begun. Without an answer, the follower repeats it when another engine owns the directory.
            worker.session.waiting -= 1
        else:
            worker.answer(call, error=failure(call, error))

    def note_refusal(self, error: Exception) -> None:
        """Count a refusal because of a missing right."""
        if isinstance(error, Forbidden):
            self.refused += 1

    def own_function(self, function_id: str) -> Callable[[Worker, Raw], Outcome] | None:
        """Return what calls a function of the engine or server with a worker's rights; None: it is neither's."""
        state = self._state.get(function_id)
        if state is not None:
            return lambda worker, data: state(data, worker)
        return self._engine_functions.by_id.get(function_id)

    async def call_for(self, worker: Worker, function_id: str, payload: object) -> None:
        """Call a function for a trigger of this worker, with the worker's rights. Raises what the call raises."""
        if worker.access is not None:
            worker.access.check_call(function_id)
        own = self.own_function(function_id)
        if own is None:
            await self.engine.aio.call(function_id, payload)
            return
        outcome = own(worker, Raw(encode(payload)))
        if outcome is not None and not isinstance(outcome, bytes):
            await outcome

    def _forward(self, caller: Worker, call: InvokeFunction, target: WorkerFunction) -> None:
        """Let another worker execute a call, under the caller's id; the answer is passed back unparsed."""

        if call.data:
            try:
                check(bytes(call.data))
            except DeserializationError as error:
                raise DeserializationError(f"Failed to deserialize input for {call.function_id}: {error}") from error

        def settle(outcome: InvocationResult) -> None:
            self._let_go(caller, caller.issued.pop(execution, 0))
            if outcome.result:
                try:
                    check(bytes(outcome.result))
                except DeserializationError as error:
                    problem = f"{call.function_id} returned what JSON cannot hold: {error}"
                    outcome = InvocationResult(
                        outcome.invocation_id, outcome.function_id, error=ErrorBody(SerializationError.code, problem)
                    )
            message = caller.session.pass_on(call, outcome)
            if message is not None:
                caller.send(message)

        self._check_held(call)
        execution = self.execute(target, with_caller(call.data, caller.worker_id), settle, call)
        call.data = call.metadata = ABSENT  # it was sent: the message need not be kept until the answer comes
        caller.issued[execution] = self._hold(caller, call)

    def execute(
        self,
        target: WorkerFunction,
        data: Raw,
        settle: Settle,
        call: InvokeFunction | None = None,
        *,
        depth: int | None = None,
        metadata: Raw = ABSENT,
        timed: bool = True,
    ) -> Execution:
        """Send a call to the worker of `target`; `settle` gets the outcome: an answer, a loss or a timeout.

        `depth` is the number of handlers above it; by default that of the running code. `metadata` is sent next to the
        data. `timed` is False if the caller itself gives up after a time. Raises Overloaded if the worker has too many
        calls in progress, RemoteFailure if it is gone, and MessageTooLarge.
        """
        worker = target.worker
        if worker.session.closed:
            raise RemoteFailure(target.frame.id, "invocation_stopped", "Invocation stopped")
        if depth is None:
            depth = event_depth.get()
        if call is None:
            started = worker.session.execute(target.frame.id, data, settle, metadata=metadata, depth=depth)
        else:
            started = worker.session.execute(
                target.frame.id,
                data,
                settle,
                invocation_id=call.invocation_id,
                traceparent=call.traceparent,
                tracestate=call.tracestate,
                baggage=call.baggage,
                metadata=call.metadata,
                depth=depth,
            )
        if started is None:
            raise Overloaded(
                f"the worker of {target.frame.id!r} executes {len(worker.session.executing)} calls; try again later"
            )
        execution, message = started
        if self._timeout_s and timed:
            self._deadlines[execution] = self.loop.time() + self._timeout_s
            if self._timer is None:
                self._timer = self.loop.call_later(self._timeout_s, self._expire)
        worker.send(message)
        return execution

    def _expire(self) -> None:
        """Answer `TIMEOUT` for calls that took too long. All have the same time limit, so the oldest come first."""
        self._timer = None
        now = self.loop.time()
        for execution, due in list(self._deadlines.items()):
            if due > now:
                self._timer = self.loop.call_later(due - now, self._expire)
                return
            if self.drop(execution):
                text = f"function {execution.function_id!r} did not answer within {self._timeout_s:g} s"
                execution.settle(
                    InvocationResult(execution.invocation_id, execution.function_id, error=TimedOut("TIMEOUT", text))
                )

    def drop(self, execution: Execution) -> bool:
        """Stop waiting for a call. Returns False if it had already ended."""
        self._deadlines.pop(execution, None)
        return execution.forget()

    async def _call_program(self, worker: Worker, function_id: str, data: Raw) -> Result:
        """Call a function that the embedding program registered."""
        try:
            payload = decode(parse(bytes(with_caller(data, worker.worker_id)) or b"null"))
        except DeserializationError as error:
            raise DeserializationError(f"Failed to deserialize input for {function_id}: {error}") from error
        result = await self.engine.aio.call(function_id, payload)
        return None if result is None else encode(result)

    def _later(self, worker: Worker, call: InvokeFunction, outcome: Awaitable[Result]) -> None:
        size = self._hold(worker, call)
        call.data = call.metadata = ABSENT  # `outcome` has everything that it needs of them
        serving, self._serving = self._serving, None
        task = self.task_of(self._answer_later(worker, call, outcome, size, serving))
        if serving is not None:
            task.add_done_callback(lambda _: serving.end())
        task.add_done_callback(lambda _: close_unrun(outcome))  # needed if the task is cancelled before it begins
        if call.function_id == polls.FUNCTION_ID:
            worker.note_poll(task)

    def _check_held(self, call: InvokeFunction) -> None:
        """Refuse a call that has to wait if the calls of all workers already hold as many bytes as allowed."""
        if self._held_bytes + _size_of(call) > self._max_held_bytes:
            raise Overloaded(
                f"the calls of all workers that are in progress hold {self._held_bytes} bytes, and they may hold "
                f"{self._max_held_bytes}; try again later"
            )

    def _hold(self, worker: Worker, call: InvokeFunction) -> int:
        """Count the bytes that a waiting call holds, and return them, for `_let_go`."""
        size = _size_of(call)
        self._held_bytes += size
        worker.session.hold(size, overrun=self._held_bytes > self._max_held_bytes)
        return size

    def _let_go(self, worker: Worker, size: int) -> None:
        self._held_bytes -= size
        worker.session.let_go(size)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task, which is cancelled when the server stops."""
        _ = self.task_of(work)

    def task_of(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As `spawn`, and return the task."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer_later(
        self, worker: Worker, call: InvokeFunction, outcome: Awaitable[Result], size: int, serving: Serving | None
    ) -> None:
        try:
            try:
                result = await outcome
            finally:
                self._let_go(worker, size)
        except Exception as error:  # noqa: BLE001 - as above
            if serving is not None:
                serving.fail(error)
            self._fail(worker, call, error)
        else:
            worker.answer(call, result)


def _size_of(call: InvokeFunction) -> int:
    """Return approximately how many bytes a call holds."""
    return (
        len(call.data)
        + len(call.function_id)
        + len(call.baggage or "")
        + len(call.traceparent or "")
        + len(call.tracestate or "")
        + len(call.metadata)
    )


def failure(call: InvokeFunction, error: Exception) -> ErrorBody:
    """Return an error as it is sent (docs/reference/protocol.md 4.4). Errors of other kinds are bugs, and logged."""
    if isinstance(error, ScopestateError):
        return ErrorBody(error.code, str(error), getattr(error, "stacktrace", None), details_of(error))
    log.error("a call of %r failed inside the server", shown(call.function_id), exc_info=error)
    return ErrorBody("invocation_error", f"{type(error).__name__}: {error}")
