"""Event loops: the engine's own, and calls onto loops from other threads."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol

Continue = Callable[[Any, BaseException | None], None]
"""Takes what the awaited thing gave: a value, or an error."""


class Pending(Protocol):
    """Something a handler's turn waits for without a thread."""

    def start(self, go_on: Continue) -> None:
        """Begin; call `go_on` once, from any thread, with the outcome."""


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
        awaitable = asyncio.wait_for(self._awaitable, self._timeout_s) if self._timeout_s else self._awaitable
        task = asyncio.ensure_future(awaitable)

        def finished(task: asyncio.Future[Any]) -> None:
            if task.cancelled():
                go_on(None, asyncio.CancelledError("the task was cancelled"))
            elif (error := task.exception()) is not None:
                go_on(None, error)
            else:
                go_on(task.result(), None)

        task.add_done_callback(finished)


class LoopThread:
    """An event loop on a thread of its own, for coroutine functions registered outside any loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first call starts its thread."""
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    def owns_this_thread(self) -> bool:
        """True on the loop's own thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Cancel what still runs there, end the thread and close the loop. Idempotent."""
        with self._guard:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(timeout=5.0)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
