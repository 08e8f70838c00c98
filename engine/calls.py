"""Calling functions by id: the built-in ones and those that the program registered."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from scopestate.actors import messages
from scopestate.actors.functions import Function, Functions, running_loop
from scopestate.actors.results import ListGroupsResult
from scopestate.errors import (
    DeserializationError,
    FunctionFailed,
    InvalidValue,
    RemoteFailure,
    SerializationError,
    WouldDeadlock,
)
from scopestate.ops.values import decode, encode

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.loop_reply import LoopReply
    from scopestate.actors.loop_thread import LoopThread


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
    """Runs registered functions for callers who wait: threads, and tasks of event loops."""

    def __init__(self, functions: Functions, loop_thread: LoopThread, dispatcher: Dispatcher) -> None:
        self._functions = functions
        self._loop_thread = loop_thread
        self._dispatcher = dispatcher

    def call(self, function: Function, payload: object) -> Any:
        """Call a registered function on this thread; a coroutine function on its event loop, while this thread waits.

        Raises FunctionFailed around whatever the function raises, and WouldDeadlock if this thread runs the very loop
        that the coroutine needs.
        """
        data = plain_payload(function.function_id, payload)
        if function.is_async:
            import asyncio  # noqa: PLC0415 - takes 20 ms, which programs without coroutines need not spend

            loop = function.loop or self._loop_thread.get()
            if loop is running_loop():
                raise WouldDeadlock(
                    f"function {function.function_id!r} runs on the event loop of this very thread, which would be "
                    "blocked until it ends: use `await engine.aio.call(...)` here"
                )
            return self._finish(
                function, lambda: asyncio.run_coroutine_threadsafe(function.target(data), loop).result()
            )
        return self._finish(function, lambda: function.target(data))

    async def call_async(self, function: Function, payload: object) -> Any:
        """Call a registered function without blocking this event loop: a plain one runs on a worker thread."""
        data = plain_payload(function.function_id, payload)
        import asyncio  # noqa: PLC0415 - as above

        from scopestate.actors.loop_reply import LoopReply  # noqa: PLC0415 - as above

        here = asyncio.get_running_loop()
        if not function.is_async:
            reply = LoopReply()
            context = contextvars.copy_context()
            self._dispatcher.submit(lambda: _answer(reply, lambda: context.run(function.target, data)))
            awaitable: Awaitable[Any] = reply.future
        else:
            loop = function.loop or self._loop_thread.get()
            awaitable = (
                function.target(data)
                if loop is here
                else asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function.target(data), loop))
            )
        try:
            result = await awaitable
        except Exception as error:
            raise _failure(function, error) from error
        return plain_result(function.function_id, result)

    def _finish(self, function: Function, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except Exception as error:
            raise _failure(function, error) from error
        return plain_result(function.function_id, result)


def to_json(message: messages.Message, answer: Any) -> Any:
    """Return the answer to a message as the reference has it: plain JSON values."""
    match message:
        case messages.Set() | messages.Update():
            return answer.to_json()
        case messages.ListGroups():
            return ListGroupsResult(groups=answer)
        case _:
            return answer


def _answer(reply: LoopReply, work: Callable[[], Any]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - the task that waits gets it
        reply.fail(error)
    else:
        reply.set(result)


def _failure(function: Function, error: BaseException) -> FunctionFailed:
    if isinstance(error, RemoteFailure) and error.function_id == function.function_id:
        return error  # it ran elsewhere and failed there: the code is the one that was sent
    return FunctionFailed(function.function_id, f"{type(error).__name__}: {error}")
