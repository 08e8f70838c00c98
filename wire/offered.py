"""The functions that a client offers, and the calls of them that come in."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from msgspec import Raw

from scopestate.errors import MessageTooLarge, RemoteFailure
from scopestate.wire import frames
from scopestate.wire.depth import depth_in, event_depth

log = logging.getLogger("scopestate.wire.client")

Handler = Callable[[bytes], Awaitable[bytes | None]]
"""A function on offer: takes JSON, returns JSON or None for "no value"."""
Answer = Callable[[bytes], object]
"""Takes an encoded answer, and sends it if the connection that asked is still there."""


class OfferedFunctions:
    """Function id -> function. On the event loop's thread only."""

    def __init__(self) -> None:
        self._by_id: dict[str, _Function] = {}
        self._running: set[asyncio.Task[None]] = set()

    def registrations(self) -> list[bytes]:
        """Return the messages that register every function."""
        return [function.registration for function in self._by_id.values()]

    def add(self, function_id: str, handler: Handler, description: str | None, *, ordered: bool) -> bytes:
        """Offer a function, in place of one with the same id; return the message that registers it."""
        registration = frames.encode(frames.RegisterFunction(function_id, description))
        self.remove(function_id)
        self._by_id[function_id] = _Function(registration, handler, ordered=ordered)
        return registration

    def remove(self, function_id: str) -> bool:
        """Withdraw a function; calls of it that wait are dropped. False: it was not there."""
        function = self._by_id.pop(function_id, None)
        if function is None:
            return False
        function.stop()
        return True

    def invoke(self, frame: frames.InvokeFunction, answer: Answer, max_bytes: int) -> None:
        """Run the function that was called, and answer with a message of at most `max_bytes`."""
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
        """Cancel every call that runs, and begin no more."""
        for task in list(self._running):
            task.cancel()
        for function in self._by_id.values():
            function.stop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)


class _Function:
    """A function on offer."""

    __slots__ = ("handler", "registration", "runs", "waiting")

    def __init__(self, registration: bytes, handler: Handler, *, ordered: bool) -> None:
        self.registration = registration
        self.handler = handler
        self.waiting: deque[tuple[frames.InvokeFunction, Answer, int]] | None = deque() if ordered else None
        """Calls that wait for the one before them; None if they run beside each other."""
        self.runs = False
        """True while a task works through `waiting`."""

    def stop(self) -> None:
        """Begin no further call of it."""
        if self.waiting is not None:
            self.waiting.clear()


async def _run_in_order(function: _Function) -> None:
    while function.waiting:
        await _run(function, *function.waiting.popleft())
    function.runs = False


async def _run(function: _Function, frame: frames.InvokeFunction, answer: Answer, max_bytes: int) -> None:
    result: bytes | None = None
    problem: frames.ErrorBody | None = None
    event_depth.set(depth_in(frame.baggage))  # of this task; what the handler calls carries it on
    task = asyncio.current_task()
    assert task is not None
    try:
        result = await function.handler(bytes(frame.data) or b"null")
    except RemoteFailure as error:
        problem = frames.ErrorBody(error.code, error.message, error.stacktrace)
    except BaseException as error:
        # Ctrl-C reaches the program, and the end of this task or of its loop is not the function's own. Anything else,
        # `SystemExit` included, is the failure of this call: the loop of the client and the calls behind it go on.
        if isinstance(error, KeyboardInterrupt) or _is_ending(task):
            raise
        log.warning("function %s failed: %s", frame.function_id, error, exc_info=error)
        problem = frames.ErrorBody("invocation_failed", f"{type(error).__name__}: {error}")
    _reply(frame, result, problem, answer, max_bytes)


def _is_ending(task: asyncio.Task[None]) -> bool:
    """True if `task` is being cancelled, or closed from outside because its loop has ended."""
    try:
        return asyncio.current_task() is not task or task.cancelling() > 0
    except RuntimeError:  # no loop runs any more
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
        return  # it wants no answer

    def encoded(raw: Raw, problem: frames.ErrorBody | None) -> bytes:
        return frames.encode(frames.InvocationResult(invocation_id, frame.function_id, raw, problem, frame.traceparent))

    message = encoded(frames.ABSENT if result is None or problem is not None else Raw(result), problem)
    if len(message) > max_bytes:
        # The server would close the connection, and every other call on it would fail.
        error = MessageTooLarge(
            f"function {frame.function_id} was carried out, but its answer takes {len(message)} bytes and a message "
            f"may have {max_bytes}: return less at once, or raise `max_message_bytes` on both sides"
        )
        message = encoded(frames.ABSENT, frames.ErrorBody(error.code, str(error)))
    answer(message)
