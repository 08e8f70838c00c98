"""The engine's own event loop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from scopestate.signals import join

if TYPE_CHECKING:
    import asyncio


class LoopThread:
    """An event loop on a thread of its own, for coroutine functions registered outside any loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first call starts its thread."""
        import asyncio  # noqa: PLC0415 - takes 20 ms, which programs without coroutines need not spend

        with self._guard:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
                thread.start()
                # Only now: a start that was interrupted is done again.
                self._loop, self._thread = loop, thread
            return self._loop

    def close(self) -> None:
        """Cancel what still runs there, end the thread and close the loop. Idempotent."""
        with self._guard:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None:
                return
            if not loop.is_closed():
                loop.call_soon_threadsafe(loop.stop)
            self._loop = self._thread = None
        if thread is not threading.current_thread():
            join(thread, 5.0)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        import asyncio  # noqa: PLC0415 - as above

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
