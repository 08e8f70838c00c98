"""The calls of a client, in both directions: those that it makes, and those of the functions that it offers."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from msgspec import Raw

from scopestate.errors import CallTimeout, MessageTooLarge, NotConnected, RemoteFailure, ScopestateError
from scopestate.ops.trace_context import TracedDepth, read_context
from scopestate.wire import frames
from scopestate.wire.depth import depth_in, event_depth
from scopestate.wire.features import LIST, Features, Needs, learn_features, may_change

log = logging.getLogger("scopestate.wire.client")

# ------------------------------------------------------------------------------------------- calls that it makes

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Called with the outcome of a call: the result as JSON (None: no value), or an error."""


class PendingCall:
    """One call, from `post` to its outcome."""

    __slots__ = ("done", "frame", "function_id", "invocation_id", "needs", "sent", "timeout_s", "timer")

    def __init__(
        self,
        function_id: str,
        payload: bytes,
        done: Done,
        timeout_s: float,
        depth: int = 0,
        needs: Needs | None = None,
    ) -> None:
        self.function_id = function_id
        self.needs = needs
        """What the other engine must be able to do. If it cannot, the call is not sent."""
        self.invocation_id = str(uuid.uuid4())
        self.done: Done | None = done
        """None once the outcome was delivered, or is no longer wanted."""
        self.frame = frames.call_text(function_id, self.invocation_id, payload, depth)
        self.sent = False
        self.timeout_s = timeout_s
        self.timer: asyncio.TimerHandle | None = None


class PendingCalls:
    """The calls in progress. Used on the event loop's thread only.

    A call that was not sent survives a lost connection and is sent on the next one. A call that was sent fails: its
    answer can no longer arrive, and it may have been carried out.

    A call that needs a feature of the other engine waits until that engine has said what it can do. It is asked once on
    each connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str = "",
        wake: Callable[[], object] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """`wake()` is called when there is something to send again. `describe()` says more about the other engine."""
        self._loop = loop
        self._url = url
        self._describe = describe or (lambda: "")
        self._wake = wake or (lambda: None)
        self._by_id: dict[str, PendingCall] = {}
        self.unsent: deque[PendingCall] = deque()
        self._features: Features | None = None
        self._asked: PendingCall | None = None
        self._parked: list[PendingCall] = []
        """Calls that wait for the features."""

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, call: PendingCall, wait_s: float, why_not: Callable[[], str | None], *, first: bool = False) -> None:
        """Queue a call. It fails if it is not sent within `wait_s`; `why_not()` says why there is no connection.

        `first`: before those that wait.
        """
        self._by_id[call.invocation_id] = call
        if first:
            self.unsent.appendleft(call)
        else:
            self.unsent.append(call)
        call.timer = self._loop.call_later(wait_s, self._not_sent, call, wait_s, why_not)

    def next_to_send(self) -> PendingCall | None:
        """Return the next call to send and mark it as sent: from here on it may be carried out."""
        while self.unsent:
            call = self.unsent.popleft()
            if call.done is not None and (call.needs is None or self._is_supported(call, call.needs)):
                call.sent = True
                if call.timer is not None:
                    call.timer.cancel()
                call.timer = self._loop.call_later(call.timeout_s, self._no_answer, call)
                return call
        return None

    def _is_supported(self, call: PendingCall, needs: Needs) -> bool:
        """Return whether a call may be sent. If not, it is settled, or waits for the features."""
        if self._features is not None:
            refusal = self._features.refusal(needs, self._url)
            if refusal is not None:
                self.settle(call, None, refusal)
            return refusal is None
        self._parked.append(call)
        if self._asked is None:
            asked = self._asked = PendingCall(LIST, b"{}", self._learn, call.timeout_s)
            self._by_id[asked.invocation_id] = asked
            self.unsent.appendleft(asked)
        return False

    def _learn(self, result: bytes | None, error: ScopestateError | None) -> None:
        self._features = learn_features(result, error)
        self._asked = None
        self._go_on()

    def _go_on(self) -> None:
        self.unsent.extendleft(reversed(self._parked))
        self._parked.clear()
        self._wake()

    def forget_features(self) -> None:
        """The connection is lost: the next one may be to another engine."""
        asked, self._features, self._asked = self._asked, None, None
        if asked is not None:
            self.forget(asked)
        self._go_on()

    def answer(self, result: frames.InvocationResult) -> None:
        """Deliver an answer to its call. The answer to a call that has ended is dropped."""
        call = self._by_id.get(result.invocation_id)
        if call is None or not call.sent:
            log.debug("dropped the answer to a call that is not in progress: %s", result.invocation_id)
            return
        # Absent and null differ: a missing key, and a stored null (docs/reference/protocol.md, section 4.2).
        failure = failure_of(result, call.function_id)
        self.settle(call, bytes(result.result) or None if failure is None else None, failure)

    def fail_sent(self, error: Callable[[PendingCall], ScopestateError]) -> None:
        """Fail every call that was sent: its connection is lost."""
        for call in [call for call in self._by_id.values() if call.sent]:
            self.settle(call, None, error(call))

    def send_again(self, wait_s: float, why_not: Callable[[], str | None]) -> None:
        """Queue every call that was sent again, before those that wait: the server has begun none of them."""
        for call in reversed([call for call in self._by_id.values() if call.sent and call.done is not None]):
            call.sent = False
            if call.timer is not None:
                call.timer.cancel()
            self.add(call, wait_s, why_not, first=True)

    def fail_unsent(self, error: Callable[[], ScopestateError]) -> None:
        """Fail every call that was not sent."""
        for call in [call for call in self._by_id.values() if not call.sent]:
            self.settle(call, None, error())
        self.unsent.clear()
        self._parked.clear()

    def forget(self, call: PendingCall) -> None:
        """Remove a call without an outcome."""
        call.done = None
        self._by_id.pop(call.invocation_id, None)
        if call.timer is not None:
            call.timer.cancel()

    def settle(self, call: PendingCall, result: bytes | None, error: ScopestateError | None) -> None:
        """Deliver the outcome."""
        done = call.done
        self.forget(call)
        if done is not None:
            try:
                done(result, error)
            except Exception:
                log.exception("delivering the answer to %s failed", call.function_id)

    def _not_sent(self, call: PendingCall, wait_s: float, why_not: Callable[[], str | None]) -> None:
        reason = why_not()
        if reason is None:
            self.settle(call, None, CallTimeout(call.function_id, wait_s, False, self._describe()))
        else:
            self.settle(call, None, NotConnected(f"{reason}; waited {wait_s:g} s, nothing was sent"))

    def _no_answer(self, call: PendingCall) -> None:
        late = CallTimeout(
            call.function_id, call.timeout_s, True, self._describe(), may_be_applied=may_change(call.function_id)
        )
        self.settle(call, None, late)


def failure_of(result: frames.InvocationResult, function_id: str) -> RemoteFailure | None:
    """Return the error in an answer; None if the call has succeeded."""
    error = result.error
    if error is None:
        return None
    failure = RemoteFailure(function_id, error.code, error.message, error.stacktrace)
    failure.details = _details_in(error)
    return failure


def _details_in(error: frames.ErrorBody) -> dict[str, Any] | None:
    try:
        details = msgspec.json.decode(error.details) if error.details else None
    except (msgspec.DecodeError, RecursionError):
        return None
    return details if isinstance(details, dict) else None


# ----------------------------------------------------------------------------------------- functions that it offers

Handler = Callable[[bytes], Awaitable[bytes | None]]
"""A function that the client offers: takes JSON, returns JSON, or None for "no value"."""
Answer = Callable[[bytes], object]
"""Sends an encoded answer, if the connection that the call came from is still open."""


class OfferedFunctions:
    """The functions by id. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._by_id: dict[str, _Function] = {}
        self._running: set[asyncio.Task[None]] = set()

    def registrations(self) -> list[bytes]:
        """Return the messages that register every function."""
        return [function.registration for function in self._by_id.values()]

    def add(self, function_id: str, handler: Handler, description: str | None, *, ordered: bool) -> bytes:
        """Add a function, replacing one with the same id; return the message that registers it."""
        registration = frames.encode(frames.RegisterFunction(function_id, description))
        self.remove(function_id)
        self._by_id[function_id] = _Function(registration, handler, ordered=ordered)
        return registration

    def remove(self, function_id: str) -> bool:
        """Remove a function and drop its queued calls. Returns False if it was not there."""
        function = self._by_id.pop(function_id, None)
        if function is None:
            return False
        function.stop()
        return True

    def invoke(self, frame: frames.InvokeFunction, answer: Answer, max_bytes: int) -> None:
        """Run the called function and send its answer, a message of at most `max_bytes`."""
        function = self._by_id.get(frame.function_id)
        if function is None:
            problem = frames.ErrorBody("function_not_found", f"Function {frame.function_id} not found")
            _reply(frame, None, problem, answer, max_bytes)
        elif function.waiting is not None:
            function.waiting.append((frame, answer, max_bytes))
            if not function.runs:
                function.runs = True
                self._spawn(_run_in_order(function))
        else:
            self._spawn(_run(function, frame, answer, max_bytes))

    def close(self) -> None:
        """Cancel the running calls and drop the queued ones."""
        for task in list(self._running):
            task.cancel()
        for function in self._by_id.values():
            function.stop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)


class _Function:
    """A function with its queued calls."""

    __slots__ = ("handler", "registration", "runs", "waiting")

    def __init__(self, registration: bytes, handler: Handler, *, ordered: bool) -> None:
        self.registration = registration
        self.handler = handler
        self.waiting: deque[tuple[frames.InvokeFunction, Answer, int]] | None = deque() if ordered else None
        """Calls queued after the running one; None if calls run concurrently."""
        self.runs = False
        """True while a task runs the calls of `waiting`."""

    def stop(self) -> None:
        """Drop the queued calls."""
        if self.waiting is not None:
            self.waiting.clear()


def depth_of(frame: frames.InvokeFunction) -> int:
    """Return how many handlers deep a call of the server is, with the trace that it is part of."""
    depth = depth_in(frame.baggage)
    if frame.traceparent is None:
        return depth
    return TracedDepth.of(depth, read_context(frame.traceparent, frame.tracestate))


async def _run_in_order(function: _Function) -> None:
    while function.waiting:
        await _run(function, *function.waiting.popleft())
    function.runs = False


async def _run(function: _Function, frame: frames.InvokeFunction, answer: Answer, max_bytes: int) -> None:
    result: bytes | None = None
    problem: frames.ErrorBody | None = None
    # In this task's context: calls that the handler makes carry it.
    event_depth.set(depth_of(frame))
    task = asyncio.current_task()
    assert task is not None
    try:
        result = await function.handler(bytes(frame.data) or b"null")
    except RemoteFailure as error:
        problem = frames.ErrorBody(error.code, error.message, error.stacktrace)
    except BaseException as error:
        # Ctrl-C is for the program, and the function does not cause the end of this task or of its loop. Anything else,
        # `SystemExit` included, is a failure of this call alone: the client's loop and the queued calls continue.
        if isinstance(error, KeyboardInterrupt) or _is_ending(task):
            raise
        log.warning("function %s failed: %s", frame.function_id, error, exc_info=error)
        problem = frames.ErrorBody("invocation_failed", f"{type(error).__name__}: {error}")
    _reply(frame, result, problem, answer, max_bytes)


def _is_ending(task: asyncio.Task[None]) -> bool:
    """Tell whether `task` is being cancelled, or closed because its loop has ended."""
    try:
        return asyncio.current_task() is not task or task.cancelling() > 0
    except RuntimeError:  # no loop is running
        return True


def _reply(
    frame: frames.InvokeFunction,
    result: bytes | None,
    problem: frames.ErrorBody | None,
    answer: Answer,
    max_bytes: int,
) -> None:
    invocation_id = frame.invocation_id
    if invocation_id is None:
        return  # the caller wants no answer

    def encoded(raw: Raw, problem: frames.ErrorBody | None) -> bytes:
        return frames.encode(frames.InvocationResult(invocation_id, frame.function_id, raw, problem, frame.traceparent))

    message = encoded(frames.ABSENT if result is None or problem is not None else Raw(result), problem)
    if len(message) > max_bytes:
        # Sending it would make the server close the connection, and every other call on it would fail.
        error = MessageTooLarge(
            f"function {frame.function_id} was carried out, but its answer takes {len(message)} bytes and a message "
            f"may take {max_bytes}: return less at once, or raise `max_message_bytes` on both sides"
        )
        message = encoded(frames.ABSENT, frames.ErrorBody(error.code, str(error)))
    answer(message)
