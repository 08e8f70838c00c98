"""What a handler waits for without a thread: calls onto event loops from other threads."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol

Continue = Callable[[Any, BaseException | None], None]
"""Takes what the awaited thing gave: a value, or an error."""


class Pending(Protocol):
    """Something a handler's turn waits for without a thread."""

    def start(self, go_on: Continue) -> None:
        """Begin; call `go_on` once, from any thread, with the outcome."""


class Overdue(Exception):
    """The awaitable took longer than its time limit. Not TimeoutError, which it may raise by itself."""


class OnLoop:
    """An awaitable that runs on an event loop while the actor that awaits it keeps no thread."""

    def __init__(
        self,
        awaitable: Awaitable[Any],
        loop: asyncio.AbstractEventLoop,
        timeout_s: float = 0.0,
    ) -> None:
        self._awaitable = awaitable
        self._loop = loop
        self._timeout_s = timeout_s

    def __await__(self) -> Generator[OnLoop, Any, Any]:
        return (yield self)

    def start(self, go_on: Continue) -> None:
        # The context of the caller, so that code on the loop knows how deep in events it is.
        context = contextvars.copy_context()
        try:
            self._loop.call_soon_threadsafe(lambda: self._begin(go_on), context=context)
        except RuntimeError as error:
            close = getattr(self._awaitable, "close", None)
            if close is not None:
                close()
            go_on(None, RuntimeError(f"the event loop it belongs to is closed: {error}"))

    def _begin(self, go_on: Continue) -> None:
        task = asyncio.ensure_future(self._awaitable)
        overdue = False

        def expire() -> None:
            nonlocal overdue
            overdue = True
            task.cancel()

        timer = self._loop.call_later(self._timeout_s, expire) if self._timeout_s else None

        def finished(task: asyncio.Future[Any]) -> None:
            if timer is not None:
                timer.cancel()
            if overdue:
                if not task.cancelled():
                    task.exception()  # whatever it made of the cancellation, asyncio need not complain about it
                go_on(None, Overdue(f"not done within {self._timeout_s:g} s"))
            elif task.cancelled():
                go_on(None, asyncio.CancelledError("the task was cancelled"))
            elif (error := task.exception()) is not None:
                go_on(None, error)
            else:
                go_on(task.result(), None)

        task.add_done_callback(finished)
