"""One worker's conversation: messages in, what to send and what to do out. No socket, no clock, no threads.

The server moves the bytes and does what is asked for; most of the protocol's rules live here, and most of its tests.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from msgspec import Raw

from scopestate.errors import DeserializationError, MessageTooLarge
from scopestate.ops.values import check, json_words
from scopestate.wire.bounded_log import BoundedLog
from scopestate.wire.depth import KEY, depth_in, with_depth
from scopestate.wire.frames import (
    ABSENT,
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
    encode,
    last_wins,
    not_in_uuid,
    read_from_worker,
)

log = logging.getLogger("scopestate.wire")

STOPPED: Final = ErrorBody("invocation_stopped", "Invocation stopped")
"""A call whose caller's or executor's connection went away (docs/protocol.md, section 4.4)."""

NO_QUEUE: Final = ErrorBody("enqueue_error", "QueueModule not loaded")

INVALID: Final = 1007
"""Close code for text that is no text (RFC 6455, section 8.1)."""
POLICY: Final = 1008
"""Close code for a worker that broke a limit. Both SDKs reconnect after it."""

_PONG: Final = encode(Pong())
_CALLER: Final = b"_caller_worker_id"
_DEPTH: Final = KEY.encode()
_as_members = msgspec.json.Decoder(dict[str, Raw]).decode


class SessionLimits(msgspec.Struct, frozen=True):
    """What one worker may have. Beyond `faults` and what it may register, its connection is closed with the reason."""

    registrations: int = 10_000
    """Functions, triggers and trigger types together."""
    registration_bytes: int = 16 * 1024 * 1024
    """Bytes of the messages that registered them."""
    calls: int = 10_000
    """Calls in progress: as many that it makes, and as many that it executes. One more is answered `OVERLOADED`."""
    call_bytes: int = 256 * 1024 * 1024
    """Bytes that the calls which it makes hold while they wait; from there on each further one is `OVERLOADED`."""
    faults: int = 1_000
    """Malformed messages and refused registrations, in excess of good messages."""
    message_bytes: int = 64 * 1024 * 1024
    """Largest message to the worker. A larger answer is an error for its call."""


class Send(msgspec.Struct):
    """To do: send this message to the worker."""

    message: bytes


class Close(msgspec.Struct):
    """To do: close the connection and say why. Nothing more is taken from the worker."""

    code: int
    reason: str


class Answered(msgspec.Struct):
    """To do: a call that this worker executed is over; give the outcome to whoever asked."""

    execution: Execution
    frame: InvocationResult


class Execution:
    """A call that a worker executes. `settle` takes its outcome, once."""

    __slots__ = ("depth", "executor", "function_id", "invocation_id", "settle")

    def __init__(
        self, executor: WorkerSession, function_id: str, invocation_id: str, settle: Settle, depth: int
    ) -> None:
        self.executor = executor
        self.function_id = function_id
        self.invocation_id = invocation_id
        self.settle = settle
        self.depth = depth
        """How many handlers deep the calls are that the worker makes while it executes this one."""

    def forget(self) -> bool:
        """Give up waiting; a late answer will be ignored. False: it was over already."""
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
"""To do: what the worker declares; it has passed the limits."""
Action = InvokeFunction | Send | Close | Answered | Registration
"""`InvokeFunction`, to do: run a function and give its outcome to `answer`; without an id nobody waits for it."""

_Register = RegisterFunction | RegisterTrigger | RegisterTriggerType
_Unregister = UnregisterFunction | UnregisterTrigger | UnregisterTriggerType


class WorkerSession:
    """The conversation with one worker, from its connection to its loss. Not for several threads at once."""

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
        """True once nothing more is taken from the worker."""
        self.executing: dict[str, Execution] = {}
        """Invocation id, as the worker knows it -> call that it executes."""
        self.waiting = 0
        """Calls of the worker that are in progress, whether or not it waits for the result."""
        self.held_bytes = 0
        """Bytes that those calls hold which could not be answered at once."""
        self.carries_depth = carries_depth
        """Whether each call that a handler of the worker makes carries the depth: our own client's do.

        The official SDKs pass baggage on where their telemetry is on and the handler is asynchronous, so a call of
        theirs without it says nothing.
        """
        self._sizes: dict[tuple[str, str], int] = {}
        self._size_before = 0
        """Bytes of what the latest registration would replace; 0: nothing."""
        self._registered_bytes = 0
        self._faults = 0

    def greeting(self) -> bytes:
        """The first message to the worker."""
        return encode(WorkerRegistered(self.worker_id))

    # ------------------------------------------------------------------------------------------- from the worker

    def receive(self, message: bytes, text: bool = True) -> Action | None:
        """Take one message and return what is to be done; None: nothing.

        What is no message is logged and dropped, without a reply (docs/protocol.md 1), until there is too much of it.
        Never raises.
        """
        if self.closed or (not text and message[:4] in TELEMETRY):
            return None
        try:
            # `Raw` does not look into the strings that it skips; passed on, bytes that are no text would break the
            # connection of whoever receives them. `isascii` is the quick test that nearly every message passes.
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
        """Return how many handlers deep a call of this worker is: 0 if no event has caused it.

        A call that carries no depth is taken to be made for what the worker was given last and is still executing. That
        is right for a handler that waits for its calls. It is too low for calls that a handler leaves behind, and too
        high for a worker that makes calls of its own while it is busy with events without a pause.
        """
        baggage = call.baggage
        if baggage is not None and KEY in baggage:
            return depth_in(baggage)
        if self.carries_depth or not self.executing:
            return 0
        return next(reversed(self.executing.values())).depth

    def hold(self, size: int, *, overrun: bool) -> None:
        """One of its calls has to wait, and holds so many bytes. `overrun`: take no other before one of them is over.

        Calls that are answered at once are not weighed: this sets what `receive` compares with anyway.
        """
        self.held_bytes += size
        if overrun or self.held_bytes > self.limits.call_bytes:
            self._max_calls = 0

    def let_go(self, size: int) -> None:
        """A call for which `hold` was called is over."""
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
            case _:  # RegisterService, Pong: of no effect
                return None

    def _refused(self, frame: InvokeFunction, message: bytes) -> Action | None:
        if not_in_uuid(frame.invocation_id or ""):
            return self._fault(message, DeserializationError(f"`invocation_id` is no UUID: {frame.invocation_id!r}"))
        problem = (
            f"{self.waiting} calls of this worker are in progress, with {self.held_bytes} bytes; wait for some of them"
        )
        return Send(self._result(frame, ErrorBody("OVERLOADED", problem)))

    def _invoked_rarely(self, frame: InvokeFunction, message: bytes) -> Action | None:
        """A call that nobody waits for, or with an `action`."""
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
                    "worker %s: a call of %r without an answer was dropped: %d of its calls are in progress",
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
                "worker %s: function %r is one called over HTTP; it was not registered", self.worker_id, frame.id
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
        """What it registers or unregisters no longer counts: it was withdrawn, or refused."""
        self._registered_bytes -= self._sizes.pop(_place(frame), 0)

    def refused(self, frame: _Register) -> Close | None:
        """The latest registration was refused: it no longer counts, but too many of them are a reason to close.

        What it would have replaced is still there, and counts.
        """
        self.forget(frame)
        if self._size_before:
            self._sizes[_place(frame)] = self._size_before
            self._registered_bytes += self._size_before
        return self._count_fault(2)  # one more than a good message, which this one was taken for, makes up for

    def _fault(self, message: bytes, error: Exception) -> Action | None:
        self._log.warning("worker %s: a message of %d bytes was dropped: %s", self.worker_id, len(message), error)
        return self._count_fault(1)

    def _unreadable(self, message: bytes, error: Exception) -> Action | None:
        """Count a message that cannot be read. If it is plainly a call, or the answer to one, that one fails at once.

        Without this, a value that is nested too deep would leave its caller waiting for the timeout.
        """
        counted = self._fault(message, error)
        # One that is JSON, but lacks a field, is dropped as iii 0.11.6 does.
        not_json = not isinstance(error, msgspec.ValidationError)
        if counted is None and not_json and _plain_trigger.search(message) is not None:
            return self._unreadable_trigger(message, error)
        found = _plain_id.findall(message)
        if counted is not None or len(found) != 1:
            return counted
        invocation_id = found[0].decode()
        problem = ErrorBody(DeserializationError.code, _why_unreadable(error))
        if _plain_call.search(message) is not None and not_in_uuid(invocation_id) is None:
            return Send(encode(InvocationResult(invocation_id, "", error=problem)))
        execution = self.executing.get(invocation_id)
        if execution is None or _plain_answer.search(message) is None:
            return None
        del self.executing[invocation_id]
        return Answered(execution, InvocationResult(invocation_id, execution.function_id, error=problem))

    @staticmethod
    def _unreadable_trigger(message: bytes, error: Exception) -> Action | None:
        """Refuse the registration of a trigger, if exactly one `id` stands in its message."""
        found = _plain_trigger_id.findall(message)
        if len(found) != 1:
            return None
        fields = {name.decode(): text.decode() for name, text in _plain_trigger_fields.findall(message)}
        refusal = ErrorBody("trigger_registration_failed", _why_unreadable(error))
        trigger_type, function_id = fields.get("trigger_type", ""), fields.get("function_id", "")
        return Send(encode(TriggerRegistrationResult(found[0].decode(), trigger_type, function_id, refusal)))

    def _count_fault(self, weight: int) -> Close | None:
        self._faults += weight
        if self._faults > self.limits.faults:
            return self.close(f"more than {self.limits.faults} malformed or refused messages")
        return None

    def close(self, reason: str, code: int = POLICY) -> Close:
        """Take no more; return what to close the connection with."""
        self.closed = True
        return Close(code, reason)

    # --------------------------------------------------------------------------------------------- to the worker

    def answer(self, call: InvokeFunction, result: bytes | None = None, error: ErrorBody | None = None) -> bytes | None:
        """Return the message with the outcome of a call of this worker; None: it does not wait for one.

        `result` None is "no value": a message without `result`. Call it exactly once per call.
        """
        self.waiting -= 1
        invocation_id = call.invocation_id
        if invocation_id is None:
            return None
        if error is None and call.traceparent is None and call.baggage is None:
            head = _answer_heads.get(call.function_id) or _head(_answer_heads, "invocationresult", call.function_id)
            if result is None:
                return b'%b%b"}' % (head, invocation_id.encode())
            message = b"".join((head, invocation_id.encode(), b'","result":', result, b"}"))
            return message if len(message) <= self._max_bytes else self._too_large(call, len(message))
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
        """As `answer`, with what another worker answered: its error or value unchanged, null as "no value"."""
        self.waiting -= 1
        if call.invocation_id is None:
            return None
        return self._fitting(
            call,
            InvocationResult(
                call.invocation_id,
                call.function_id,
                ABSENT if outcome.error is not None else value_of(outcome),
                outcome.error,
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
            error = ErrorBody(error.code[:_LONGEST_NAME], f"{error.message[:_LONGEST_TEXT]}... (cut)")
        return self._too_large(call, len(message), error)

    def _too_large(self, call: InvokeFunction, size: int, error: ErrorBody | None = None) -> bytes:
        """What takes the place of an answer that would cost the worker its connection."""
        if error is None:
            problem = MessageTooLarge(
                f"the call was carried out, but its answer takes {size} bytes and a message to this worker may have "
                f"{self._max_bytes}: read less at once (state::get key by key, smaller values, smaller scopes), or "
                "raise `max_message_bytes` on both sides"
            )
            error = ErrorBody(problem.code, str(problem))
        # The id alone tells the worker which call this is; the name of the function may be what is too long.
        return encode(InvocationResult(call.invocation_id or "", call.function_id[:_LONGEST_NAME], error=error))

    def execute(
        self,
        function_id: str,
        data: Raw,
        settle: Settle,
        *,
        invocation_id: str | None = None,
        traceparent: str | None = None,
        baggage: str | None = None,
        metadata: Raw = ABSENT,
        depth: int = 0,
    ) -> tuple[Execution, bytes] | None:
        """Have the worker execute a function: return the call's record and the message to send.

        `depth`: how many handlers deep the calls are that it makes for this one.

        None if it has too many in progress. A message always has an id, so that the worker always answers; the caller's
        unless the worker is executing one with the same id. Raises MessageTooLarge.
        """
        executing = self.executing
        if len(executing) >= self.limits.calls:
            return None
        if invocation_id is None or invocation_id in executing:
            invocation_id = fresh_id()
        if traceparent is None and baggage is None and not metadata:
            head = _call_heads.get(function_id) or _head(_call_heads, "invokefunction", function_id)
            end = b',"baggage":"%b=%d"}' % (_DEPTH, depth) if depth else b"}"
            message = b"".join((head, invocation_id.encode(), b'","data":', data or NULL, end))
        else:
            if depth:
                baggage = with_depth(baggage, depth)
            message = encode(
                InvokeFunction(function_id, data or NULL, invocation_id, None, traceparent, baggage, metadata)
            )
        if len(message) > self._max_bytes:
            raise MessageTooLarge(
                f"a call of {function_id[:_LONGEST_NAME]!r} takes {len(message)} bytes, and a message to its worker "
                f"may have {self._max_bytes}: send less at once, or raise `max_message_bytes` on both sides"
            )
        execution = Execution(self, function_id, invocation_id, settle, depth)
        executing[invocation_id] = execution
        return execution, message

    def end(self) -> Iterator[Execution]:
        """The connection is gone: yield every call that the worker was executing, each of which has to be settled."""
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


_plain_id: Final = re.compile(rb'"invocation_id"\s*:\s*"([0-9a-fA-F-]{32,36})"')
_plain_call: Final = re.compile(rb'"type"\s*:\s*"invokefunction"')
_plain_answer: Final = re.compile(rb'"type"\s*:\s*"invocationresult"')

_plain_trigger: Final = re.compile(rb'"type"\s*:\s*"registertrigger"')
_plain_trigger_id: Final = re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"')
_plain_trigger_fields: Final = re.compile(rb'"(trigger_type|function_id)"\s*:\s*"([^"\\]{1,200})"')

_answer_heads: Final[dict[str, bytes]] = {}
_call_heads: Final[dict[str, bytes]] = {}
_MOST_HEADS: Final = 1_000
_LONGEST_NAME: Final = 200
"""Function ids up to this length have their heads kept, and are named in full in an error."""
_LONGEST_TEXT: Final = 500


def _head(heads: dict[str, bytes], kind: str, function_id: str) -> bytes:
    """Return how a message begins, up to its invocation id: encoding that anew takes half of the message's time."""
    head = b'{"type":"%b","function_id":%b,"invocation_id":"' % (kind.encode(), encode(function_id))
    if len(function_id) <= _LONGEST_NAME:
        if len(heads) >= _MOST_HEADS:
            heads.clear()  # functions that are gone make room; those that are called are back at once
        heads[function_id] = head
    return head


def _why_unreadable(error: Exception) -> str:
    return "the message is nested too deep" if isinstance(error, RecursionError) else json_words(error)[:_LONGEST_TEXT]


def stopped(execution: Execution) -> InvocationResult:
    """The outcome of a call whose worker is gone."""
    return InvocationResult(execution.invocation_id, execution.function_id, error=STOPPED)


def value_of(outcome: InvocationResult) -> Raw:
    """The value of an answer; absent and null are both "no value" (docs/protocol.md, section 4.2)."""
    return ABSENT if outcome.result == NULL else outcome.result


def with_caller(data: Raw, worker_id: str) -> Raw:
    """Return `data` with the member `_caller_worker_id`, if it is an object; else as it is."""
    text = bytes(data)
    if not text.startswith(b"{"):
        return data
    caller = b'"%b":%b' % (_CALLER, encode(worker_id))
    if _CALLER not in text and b"\\" not in text:
        inside = text[1:-1]
        return Raw(b"{%b%b%b}" % (inside, b"," if inside.strip() else b"", caller))
    # It may be there already, even with an escape in its name: a second one would leave it to the reader which counts.
    members: dict[str, Any] = _as_members(text)
    members[_CALLER.decode()] = worker_id
    return Raw(encode(members))


_prefix: Final = "{:.8}-{:.4}-4{:.3}-8000-".format(*(os.urandom(4).hex() for _ in range(3)))
_numbers: Final = itertools.count(int.from_bytes(os.urandom(4), "big"))


def fresh_id() -> str:
    """Return a UUID that no other call has: a random part per process, and a number. Ten times as fast as `uuid4`."""
    return f"{_prefix}{next(_numbers):012x}"


_PASSED_ON: Final = (
    "config",
    "metadata",
    "request_format",
    "response_format",
    "trigger_request_format",
    "call_request_format",
)


def _unfit(frame: _Register) -> str | None:
    """Say what no value may be in a registration: others get these fields as they came."""
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
