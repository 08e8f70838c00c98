"""The engine's own event loop."""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.containment import Log
from scopestate.signals import Guard, exclusive, join

if TYPE_CHECKING:
    import asyncio

log = Log("scopestate.triggers")

CANCEL_GRACE_S: Final = 1.0
"""How long coroutines that are cancelled when the loop ends may take to end."""


_Running = tuple["asyncio.AbstractEventLoop | None", threading.Thread | None]


class LoopThread:
    """An event loop on a thread of its own, for coroutine functions registered outside any loop.

    Code that ends the loop (a task that raises SystemExit, `loop.stop()`) does not end the thread: the loop runs on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._exclusive = Guard()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ending: set[asyncio.AbstractEventLoop] = set()

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first call, and one after its end, starts a thread."""
        loop = self._loop
        return loop if loop is not None and not loop.is_closed() else self._begin()

    @exclusive
    def _begin(self) -> asyncio.AbstractEventLoop:
        import asyncio  # noqa: PLC0415 - takes 20 ms, which programs without coroutines need not spend

        if self._loop is None or self._loop.is_closed():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
            thread.start()
            # Only now: a start that was interrupted is done again.
            self._loop, self._thread = loop, thread
        return self._loop

    @exclusive
    def _take(self, wanted: asyncio.AbstractEventLoop | None) -> _Running:
        """Take the loop and its thread out of use; nothing if it is not `wanted`. None wants any."""
        loop, thread = self._loop, self._thread
        if wanted is not None and loop is not wanted:
            return None, None
        self._loop = self._thread = None
        return loop, thread

    def replace(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give up `loop`, if it is the one in use: it is blocked. What comes next gets a new one."""
        if self._take(loop)[0] is None:
            return
        log.error(
            "the engine's event loop is blocked by a coroutine that does not give way; it is given up, and a new one "
            "serves what comes next"
        )
        self._end(loop)

    def close(self) -> None:
        """Cancel what still runs there, end the thread and close the loop. Idempotent."""
        loop, thread = self._take(None)
        if loop is None or thread is None:
            return
        self._end(loop)
        if thread is not threading.current_thread():
            join(thread, 5.0)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ending.add(loop)
        try:
            loop.call_soon_threadsafe(loop.stop)
        except RuntimeError:
            return  # closed already

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio  # noqa: PLC0415 - as above

        asyncio.set_event_loop(loop)
        try:
            while loop not in self._ending:
                self._run_until_stopped(loop)
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                self._finish(loop, asyncio.wait(left, timeout=CANCEL_GRACE_S))
            self._finish(loop, loop.shutdown_asyncgens())
        finally:
            loop.close()
            self._ending.discard(loop)

    @staticmethod
    def _finish(loop: asyncio.AbstractEventLoop, rest: Coroutine[Any, Any, Any]) -> None:
        try:
            loop.run_until_complete(rest)
        except BaseException as error:
            log.exception("%s at the end of the engine's event loop", type(error).__name__)

    @staticmethod
    def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        except BaseException as error:
            log.exception(
                "%s got out of a task or callback on the engine's event loop, which runs on", type(error).__name__
            )
