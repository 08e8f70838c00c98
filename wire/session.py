"""The conversation with one worker: takes messages, returns what to do. No socket, no clock, no threads.

The server moves the bytes and carries out the actions. Most rules of the protocol are here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from msgspec import Raw

from scopestate.errors import DeserializationError, MessageTooLarge
from scopestate.ops.trace_context import TracedDepth, context_of, read_context
from scopestate.ops.values import check, json_words
from scopestate.wire.bounded_log import BoundedLog
from scopestate.wire.depth import KEY, depth_in, with_depth
from scopestate.wire.frames import (
    ABSENT,
    LONGEST_NAME,
    NULL,
    TELEMETRY,
    Enqueue,
    ErrorBody,
    FromWorker,
    InvocationResult,
    InvokeFunction,
    Ping,
    Pong,
    RegisterFunction,
    RegisterTrigger,
    RegisterTriggerType,
    TriggerRegistrationResult,
    UnregisterFunction,
    UnregisterTrigger,
    UnregisterTriggerType,
    WorkerRegistered,
    answer_text,
    call_text,
    encode,
    fresh_id,
    glimpse,
    last_wins,
    not_in_uuid,
    read_from_worker,
)

log = logging.getLogger("scopestate.wire")

STOPPED: Final = ErrorBody("invocation_stopped", "Invocation stopped")
"""The outcome of a call whose caller or executor has disconnected (docs/reference/protocol.md, section 4.4)."""

NO_QUEUE: Final = ErrorBody("enqueue_error", "QueueModule not loaded")

INVALID: Final = 1007
"""Close code for a text message that is not UTF-8 (RFC 6455, section 8.1)."""
POLICY: Final = 1008
"""Close code for a worker that exceeded a limit. Both SDKs reconnect after it."""

_PONG: Final = encode(Pong())


class SessionLimits(msgspec.Struct, frozen=True):
    """The limits of one worker. Exceeding `faults` or a limit of registrations closes its connection."""

    registrations: int = 10_000
    """Functions, triggers and trigger types together."""
    registration_bytes: int = 16 * 1024 * 1024
    """Size of the messages that registered them, in bytes."""
    calls: int = 10_000
    """Calls in progress: this many that it makes, and as many that it executes. Any further call is answered
    `OVERLOADED`."""
    call_bytes: int = 256 * 1024 * 1024
    """Bytes held by calls of the worker that wait. Above this, further calls are answered `OVERLOADED`."""
    faults: int = 1_000
    """Malformed messages and refused registrations tolerated beyond the number of valid messages."""
    message_bytes: int = 64 * 1024 * 1024
    """Largest message to the worker, in bytes. A larger answer is replaced by an error."""


class Send(msgspec.Struct):
    """Action: send this message to the worker."""

    message: bytes


class Close(msgspec.Struct):
    """Action: close the connection with this reason. The session takes no further message."""

    code: int
    reason: str


class Answered(msgspec.Struct):
    """Action: a call that this worker executed has ended; pass the outcome on to its caller."""

    execution: Execution
    frame: InvocationResult


class Execution(msgspec.Struct, eq=False):
    """A call that a worker executes. `settle` is called once, with its outcome."""

    executor: WorkerSession
    function_id: str
    invocation_id: str
    settle: Settle
    depth: int
    """The event depth of calls that the worker makes while it executes this one."""

    def forget(self) -> bool:
        """Stop waiting; a late answer will be ignored. Returns False if the call has ended already."""
        executing = self.executor.executing
        if executing.get(self.invocation_id) is not self:
            return False
        del executing[self.invocation_id]
        return True


Settle = Callable[[InvocationResult], object]
Registration = (
    RegisterFunction
    | UnregisterFunction
    | RegisterTrigger
    | UnregisterTrigger
    | RegisterTriggerType
    | UnregisterTriggerType
    | TriggerRegistrationResult
)
"""Action: carry out this declaration of the worker. It is within the limits."""
Action = InvokeFunction | Send | Close | Answered | Registration
"""`InvokeFunction` as an action: call the function and give the outcome to `answer`. Without an id no answer is
sent."""

_Register = RegisterFunction | RegisterTrigger | RegisterTriggerType
_Unregister = UnregisterFunction | UnregisterTrigger | UnregisterTriggerType


class WorkerSession:
    """The conversation with one worker, from its connection to its end. Not thread-safe."""

    def __init__(
        self,
        worker_id: str,
        limits: SessionLimits = SessionLimits(),  # noqa: B008 - immutable
        bounded_log: BoundedLog | None = None,
        *,
        carries_depth: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.limits = limits
        self._log = bounded_log or BoundedLog(log)
        self._max_calls = limits.calls
        self._max_bytes = limits.message_bytes
        self.closed = False
        """True once no further message is taken."""
        self.executing: dict[str, Execution] = {}
        """The calls that the worker executes, by the invocation id it was given."""
        self.waiting = 0
        """Number of calls that the worker makes, including those without a result."""
        self.held_bytes = 0
        """Bytes held by those of these calls that could not be answered at once."""
        self.carries_depth = carries_depth
        """Whether calls made by a handler of the worker always carry the event depth, as those of our client do.

        The official SDKs copy the baggage only if their telemetry is on and the handler is asynchronous: a call
        without it may still come from a handler.
        """
        self._sizes: dict[tuple[str, str], int] = {}
        self._size_before = 0
        """Size of the registration that the latest one replaced; 0 if it was new."""
        self._registered_bytes = 0
        self._faults = 0

    def greeting(self) -> bytes:
        """Return the first message to the worker."""
        return encode(WorkerRegistered(self.worker_id))

    # ------------------------------------------------------------------------------------------- from the worker

    def receive(self, message: bytes, text: bool = True) -> Action | None:
        """Take one message and return the action for it; None if there is nothing to do. Never raises.

        A malformed message is logged and dropped, without a reply (docs/reference/protocol.md 1). Too many of them
        close the connection.
        """
        if self.closed or (not text and message[:4] in TELEMETRY):
            return None
        try:
            # `Raw` does not check the text that it skips. Passed on, bytes that are not UTF-8 would break the
            # receiver's connection. `isascii` is a quick test that nearly every message passes.
            if not message.isascii():
                message.decode()
            try:
                frame = read_from_worker(message)
            except msgspec.ValidationError:
                frame = last_wins(read_from_worker, message)
        except UnicodeDecodeError as error:
            return (
                self.close(f"a text message that is not UTF-8: {error}", INVALID)
                if text
                else self._fault(message, error)
            )
        except (msgspec.DecodeError, RecursionError) as error:
            return None if not message or message.isspace() else self._unreadable(message, error)
        if self._faults:
            self._faults -= 1
        if type(frame) is InvokeFunction:
            invocation_id = frame.invocation_id
            if invocation_id is None or frame.action is not None or frame.metadata:
                return self._invoked_rarely(frame, message)
            if not_in_uuid(invocation_id) is None and self.waiting < self._max_calls:
                self.waiting += 1
                return frame
            return self._refused(frame, message)
        return self._receive_rare(frame, message)

    def depth_of(self, call: InvokeFunction) -> int:
        """Return the event depth of a call of this worker, with its trace; 0 if no event caused the call.

        A call without a depth is attributed to the newest call that the worker is executing. That is right for a
        handler that waits for the calls it makes. It is too low for calls that outlive their handler, and too high for
        a worker that makes unrelated calls while it is always busy with events.
        """
        depth = self._depth_of(call.baggage)
        if call.traceparent is None:
            return depth
        return TracedDepth.of(depth, read_context(call.traceparent, call.tracestate))

    def _depth_of(self, baggage: str | None) -> int:
        if baggage is not None and KEY in baggage:
            return depth_in(baggage)
        if self.carries_depth or not self.executing:
            return 0
        return next(reversed(self.executing.values())).depth

    def hold(self, size: int, *, overrun: bool) -> None:
        """Record that a call of the worker has to wait, and holds `size` bytes.

        `overrun`: refuse further calls until one of those that wait has ended. Calls that are answered at once cost
        nothing: this sets the limit that `receive` checks anyway.
        """
        self.held_bytes += size
        if overrun or self.held_bytes > self.limits.call_bytes:
            self._max_calls = 0

    def let_go(self, size: int) -> None:
        """Record the end of a call for which `hold` was called."""
        self.held_bytes -= size
        if self.held_bytes <= self.limits.call_bytes:
            self._max_calls = self.limits.calls

    def _receive_rare(self, frame: FromWorker, message: bytes) -> Action | None:
        match frame:
            case InvocationResult(invocation_id=invocation_id):
                execution = self.executing.pop(invocation_id, None)
                return None if execution is None else Answered(execution, frame)
            case RegisterFunction() | RegisterTrigger() | RegisterTriggerType():
                return self._register(frame, len(message))
            case UnregisterFunction() | UnregisterTrigger() | UnregisterTriggerType():
                self.forget(frame)
                return frame
            case Ping():
                return Send(_PONG)
            case TriggerRegistrationResult():
                return frame
            case _:  # RegisterService and Pong have no effect
                return None

    def _refused(self, frame: InvokeFunction, message: bytes) -> Action | None:
        if not_in_uuid(frame.invocation_id or ""):
            return self._fault(message, DeserializationError(f"`invocation_id` is not a UUID: {frame.invocation_id!r}"))
        problem = (
            f"{self.waiting} calls of this worker are in progress, with {self.held_bytes} bytes; wait for some of them"
        )
        return Send(self._result(frame, ErrorBody("OVERLOADED", problem)))

    def _invoked_rarely(self, frame: InvokeFunction, message: bytes) -> Action | None:
        """Handle a call without an id, with an `action`, or with metadata."""
        invocation_id = frame.invocation_id
        if invocation_id is not None and not_in_uuid(invocation_id):
            return self._refused(frame, message)
        if frame.metadata:
            try:
                check(bytes(frame.metadata))
            except DeserializationError as error:
                problem = ErrorBody(error.code, f"`metadata`: {error}")
                return None if invocation_id is None else Send(self._result(frame, problem))
            if invocation_id is not None and frame.action is None:
                if self.waiting >= self._max_calls:
                    return self._refused(frame, message)
                self.waiting += 1
                return frame
        if type(frame.action) is not Enqueue:  # Void, or no id
            if self.waiting >= self._max_calls:
                self._log.warning(
                    "worker %s: dropped a call of %r that expects no answer: %d calls of the worker are in progress",
                    self.worker_id,
                    frame.function_id,
                    self.waiting,
                )
                return None
            self.waiting += 1
            frame.invocation_id = None
            return frame
        return None if invocation_id is None else Send(self._result(frame, NO_QUEUE))

    def _register(self, frame: _Register, size: int) -> Action | None:
        if isinstance(frame, RegisterFunction) and frame.invocation not in (ABSENT, NULL):
            self._log.warning(
                "worker %s: function %r was not registered: functions called over HTTP are not supported",
                self.worker_id,
                frame.id,
            )
            return self._count_fault(2)
        problem = _unfit(frame)
        if problem is not None:
            self._log.warning("worker %s: %r was not registered: %s", self.worker_id, frame.id, problem)
            counted = self._count_fault(2)
            if counted is None and isinstance(frame, RegisterTrigger):
                refusal = ErrorBody("trigger_registration_failed", problem)
                answer = TriggerRegistrationResult(frame.id, frame.trigger_type, frame.function_id, refusal)
                return Send(encode(answer))
            return counted
        place = _place(frame)
        self._size_before = self._sizes.get(place, 0)
        self._registered_bytes += size - self._size_before
        self._sizes[place] = size
        limits = self.limits
        if len(self._sizes) > limits.registrations:
            return self.close(f"more than {limits.registrations} functions and triggers registered")
        if self._registered_bytes > limits.registration_bytes:
            return self.close(f"functions and triggers of more than {limits.registration_bytes} bytes registered")
        return frame

    def forget(self, frame: _Register | _Unregister) -> None:
        """Stop counting a registration that was removed or refused."""
        self._registered_bytes -= self._sizes.pop(_place(frame), 0)

    def refused(self, frame: _Register) -> Close | None:
        """Record that the latest registration was refused. The one that it would have replaced stays and still counts.

        Returns the action if the worker has had too many refusals.
        """
        self.forget(frame)
        if self._size_before:
            self._sizes[_place(frame)] = self._size_before
            self._registered_bytes += self._size_before
        return self._count_fault(2)  # one fault, and one for having counted as a valid message

    def _fault(self, message: bytes, error: Exception) -> Action | None:
        self._log.warning("worker %s: a message of %d bytes was dropped: %s", self.worker_id, len(message), error)
        return self._count_fault(1)

    def _unreadable(self, message: bytes, error: Exception) -> Action | None:
        """Count a message that cannot be read. If it is clearly a call, an answer or a trigger, fail that at once.

        Without this, a value that is nested too deep would leave its caller waiting for the timeout.
        """
        counted = self._fault(message, error)
        seen = None if counted is not None else glimpse(message, error)
        if seen is None:
            return counted
        reason = _why_unreadable(error)
        if seen.kind == "trigger":
            refusal = ErrorBody("trigger_registration_failed", reason)
            return Send(encode(TriggerRegistrationResult(seen.id, seen.trigger_type, seen.function_id, refusal)))
        problem = ErrorBody(DeserializationError.code, reason)
        if seen.kind == "call":
            return Send(encode(InvocationResult(seen.id, "", error=problem)))
        execution = self.executing.pop(seen.id, None)
        if execution is None:
            return None
        return Answered(execution, InvocationResult(seen.id, execution.function_id, error=problem))

    def _count_fault(self, weight: int) -> Close | None:
        self._faults += weight
        if self._faults > self.limits.faults:
            return self.close(f"more than {self.limits.faults} malformed or refused messages")
        return None

    def close(self, reason: str, code: int = POLICY) -> Close:
        """Take no further message; return the action that closes the connection."""
        self.closed = True
        return Close(code, reason)

    # --------------------------------------------------------------------------------------------- to the worker

    def answer(self, call: InvokeFunction, result: bytes | None = None, error: ErrorBody | None = None) -> bytes | None:
        """Return the message with the outcome of a call of this worker; None if the worker expects no answer.

        `result` None means "no value": the message has no `result`. To be called once for each call.
        """
        self.waiting -= 1
        invocation_id = call.invocation_id
        if invocation_id is None:
            return None
        if error is None and call.traceparent is None and call.baggage is None:
            message = answer_text(call.function_id, invocation_id, result)
            if result is None or len(message) <= self._max_bytes:
                return message
            return self._too_large(call, len(message))
        return self._fitting(
            call,
            InvocationResult(
                invocation_id,
                call.function_id,
                ABSENT if result is None else Raw(result),
                error,
                call.traceparent,
                call.baggage,
            ),
        )

    def pass_on(self, call: InvokeFunction, outcome: InvocationResult) -> bytes | None:
        """As `answer`, with the answer of another worker: its error or value unchanged, null as "no value"."""
        self.waiting -= 1
        if call.invocation_id is None:
            return None
        return self._fitting(
            call,
            InvocationResult(
                call.invocation_id,
                call.function_id,
                ABSENT if outcome.error is not None else value_of(outcome),
                _without_details(outcome.error),
                outcome.traceparent or call.traceparent,
                outcome.baggage or call.baggage,
            ),
        )

    def _fitting(self, call: InvokeFunction, answer: InvocationResult) -> bytes:
        message = encode(answer)
        if len(message) <= self._max_bytes:
            return message
        error = answer.error
        if error is not None:
            error = ErrorBody(error.code[:LONGEST_NAME], f"{error.message[:_LONGEST_TEXT]}... (cut)")
        return self._too_large(call, len(message), error)

    def _too_large(self, call: InvokeFunction, size: int, error: ErrorBody | None = None) -> bytes:
        """Return the error that replaces an answer which is too large: the worker would close the connection."""
        if error is None:
            problem = MessageTooLarge(
                f"the call was carried out, but its answer takes {size} bytes and a message to this worker may take "
                f"{self._max_bytes}: read less at once (state::get key by key, smaller values, smaller scopes), or "
                "raise `max_message_bytes` on both sides"
            )
            error = ErrorBody(problem.code, str(problem))
        # The function id is cut, because it may be the part that is too long. The worker only needs the invocation id.
        return encode(InvocationResult(call.invocation_id or "", call.function_id[:LONGEST_NAME], error=error))

    def execute(
        self,
        function_id: str,
        data: Raw,
        settle: Settle,
        *,
        invocation_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        baggage: str | None = None,
        metadata: Raw = ABSENT,
        depth: int = 0,
    ) -> tuple[Execution, bytes] | None:
        """Begin a call that the worker executes: return its record and the message to send.

        None: it has too many calls.

        `depth`: the event depth of calls that the worker makes for this one; the trace that it carries goes into the
        message, unless `traceparent` names one. The message always has an id, so that the
        worker always answers: the caller's, unless the worker is executing a call with the same id. Raises
        MessageTooLarge.
        """
        executing = self.executing
        if len(executing) >= self.limits.calls:
            return None
        if invocation_id is None or invocation_id in executing:
            invocation_id = fresh_id()
        if traceparent is None and baggage is None and not metadata:
            message = call_text(function_id, invocation_id, data, depth)
        else:
            if depth:
                baggage = with_depth(baggage, depth)
            context = context_of(depth) if traceparent is None else None
            if context is not None:
                traceparent, tracestate = context.traceparent, context.tracestate or None
            message = encode(
                InvokeFunction(
                    function_id, data or NULL, invocation_id, None, traceparent, baggage, metadata, tracestate
                )
            )
        if len(message) > self._max_bytes:
            raise MessageTooLarge(
                f"a call of {function_id[:LONGEST_NAME]!r} takes {len(message)} bytes, and a message to its worker "
                f"may take {self._max_bytes}: send less at once, or raise `max_message_bytes` on both sides"
            )
        # Without the trace: the worker itself says which of its calls belong to it.
        execution = Execution(self, function_id, invocation_id, settle, int(depth))
        executing[invocation_id] = execution
        return execution, message

    def end(self) -> Iterator[Execution]:
        """End the session: yield every call that the worker was executing. The caller settles each."""
        self.closed = True
        while self.executing:
            yield self.executing.popitem()[1]

    @staticmethod
    def _result(frame: InvokeFunction, error: ErrorBody) -> bytes:
        return encode(
            InvocationResult(
                frame.invocation_id or "", frame.function_id, ABSENT, error, frame.traceparent, frame.baggage
            )
        )


_LONGEST_TEXT: Final = 500


def _why_unreadable(error: Exception) -> str:
    return "the message is nested too deep" if isinstance(error, RecursionError) else json_words(error)[:_LONGEST_TEXT]


def stopped(execution: Execution) -> InvocationResult:
    """Return the outcome of a call whose worker has disconnected."""
    return InvocationResult(execution.invocation_id, execution.function_id, error=STOPPED)


def value_of(outcome: InvocationResult) -> Raw:
    """Return the value of an answer. Absent and null both mean "no value" (docs/reference/protocol.md, section 4.2)."""
    return ABSENT if outcome.result == NULL else outcome.result


_PASSED_ON: Final = (
    "config",
    "metadata",
    "request_format",
    "response_format",
    "trigger_request_format",
    "call_request_format",
)


def _unfit(frame: _Register) -> str | None:
    """Return what is wrong with a field of a registration that is passed on unchanged; None if nothing is."""
    for name in _PASSED_ON:
        text = getattr(frame, name, ABSENT)
        if text:
            try:
                check(bytes(text))
            except DeserializationError as error:
                return f"`{name}`: {error}"
    return None


def _place(frame: _Register | _Unregister) -> tuple[str, str]:
    return type(frame).__name__.lower().removeprefix("un").removeprefix("register"), frame.id


def _without_details(error: ErrorBody | None) -> ErrorBody | None:
    """Return an error of a worker without its details, which only the server itself may set."""
    return msgspec.structs.replace(error, details=ABSENT) if error is not None and error.details else error
