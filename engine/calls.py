"""Call functions by id: the built-in ones and those that the program has registered."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from scopestate.actors.containment import described, is_from_outside
from scopestate.actors.functions import Function, running_loop
from scopestate.actors.loops import LoopReply, OnLoop
from scopestate.errors import (
    DeserializationError,
    FunctionFailed,
    InvalidValue,
    RemoteFailure,
    SerializationError,
    WouldDeadlock,
)
from scopestate.ops.values import class_name, decode, encode

if TYPE_CHECKING:
    import asyncio

    from scopestate.actors.reply import Reply
    from scopestate.actors.services import HandlerServices


def plain_payload(function_id: str, payload: object) -> Any:
    """Return a copy of `payload` as plain JSON data. Raises DeserializationError if it is not JSON."""
    try:
        return decode(encode(payload))
    except InvalidValue as error:
        raise DeserializationError(f"Failed to deserialize input for {function_id}: {error}") from error


def plain_result(function_id: str, result: object) -> Any:
    """Return a copy of `result` as plain JSON data. Raises SerializationError if it is not JSON."""
    try:
        return decode(encode(result))
    except InvalidValue as error:
        raise SerializationError(f"function {function_id!r} returned what JSON cannot hold: {error}") from error


class Caller:
    """Runs registered functions for waiting callers: threads, and tasks of event loops."""

    def __init__(self, services: HandlerServices) -> None:
        self._services = services

    def call(self, function: Function, payload: object) -> Any:
        """Call a registered function on this thread; a coroutine function on its event loop, while this thread waits.

        Raises FunctionFailed, whose cause is what the function raises, and WouldDeadlock if this thread runs the event
        loop that the coroutine needs.
        """
        data = plain_payload(function.function_id, payload)
        if not function.is_async:
            return self._finish(function, lambda: (function.target(data), None))
        loop = function.loop or self._services.loop_thread.get()
        if loop is running_loop():
            raise WouldDeadlock(
                f"function {function.function_id!r} runs on the event loop of this thread, which would be "
                "blocked until it ends: use `await engine.aio.call(...)` here"
            )
        return self._finish(function, lambda: self._wait_for(function, function.target(data), loop))

    def _wait_for(self, function: Function, awaitable: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> Outcome:
        reply: Reply[Outcome] = self._services.dispatcher.reply()
        self._on_loop(function, awaitable, loop).start(lambda *outcome: reply.set(outcome))
        return reply.get()

    def _on_loop(self, function: Function, awaitable: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> OnLoop:
        services = self._services
        what = f"a call of the function {function.function_id!r}"
        return OnLoop(awaitable, loop, services.loop_calls, what, stopped_s=services.limits.call_timeout_s)

    async def call_async(self, function: Function, payload: object) -> Any:
        """Call a registered function without blocking this event loop: a plain function runs on a worker thread."""
        data = plain_payload(function.function_id, payload)
        import asyncio  # noqa: PLC0415 - as above

        try:
            outcome = await self._begun(function, data)
        except BaseException as error:
            if running_loop() is None or is_from_outside(error):
                raise  # a dropped coroutine is closed outside of any loop
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            outcome = None, error
        return _result(function, outcome)

    async def _begun(self, function: Function, data: Any) -> Outcome:
        import asyncio  # noqa: PLC0415 - as above

        services = self._services
        reply = LoopReply()
        outcome: Outcome
        if not function.is_async:
            context = contextvars.copy_context()
            services.dispatcher.submit_program(lambda: _answer(reply, lambda: context.run(function.target, data)))
            outcome = await reply.future
            return outcome
        loop = function.loop or services.loop_thread.get()
        if loop is reply.loop:
            return await function.target(data), None
        call = self._on_loop(function, function.target(data), loop)
        call.start(lambda *outcome: reply.set(outcome))
        try:
            outcome = await reply.future
        except asyncio.CancelledError:
            call.cancel()
            raise
        return outcome

    def _finish(self, function: Function, work: Callable[[], Outcome]) -> Any:
        try:
            outcome = work()
        except BaseException as error:
            if is_from_outside(error):
                raise
            outcome = None, error
        return _result(function, outcome)


Outcome = tuple[Any, BaseException | None]
"""What a function returned, or raised. It is passed as a value because a future takes no StopIteration, a task that
raises SystemExit ends its event loop, and a KeyboardInterrupt that a function has raised on another thread is not the
Ctrl-C of this one."""


def _answer(reply: LoopReply, work: Callable[[], Any]) -> None:
    outcome: Outcome
    try:
        outcome = work(), None
    except BaseException as error:
        if is_from_outside(error):
            raise
        outcome = None, error
    reply.set(outcome)


def _result(function: Function, outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise _failure(function, error) from error
    return plain_result(function.function_id, value)


def _failure(function: Function, error: BaseException) -> FunctionFailed:
    kind = type(error)
    if issubclass(kind, RemoteFailure):
        failure: RemoteFailure = error  # type: ignore[assignment]  # by its class: `isinstance` asks the error itself
        if failure.function_id == function.function_id:
            return failure  # it failed in another process: keep the code that was sent
    return FunctionFailed(function.function_id, f"{class_name(error)}: {described(error)}")
