"""How an engine ends: nothing acknowledged is lost, every event is delivered or reported."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING

from scopestate.actors.snapshot import Flush
from scopestate.actors.turns import Close
from scopestate.errors import EngineClosed, EngineForked, ReplyTimeout, StorageError, WouldDeadlock

if TYPE_CHECKING:
    from scopestate.parts import Parts

log = logging.getLogger("scopestate.engine")

LAST_SAVE_TRIES = 3


class Closing:
    """The end of one engine, in stages that may be interrupted and begun again.

    1. Callers are refused; handlers of events already fired still may call the engine.
    2. Those events are delivered, for `close_grace_ms` at most; what is left then is reported as not delivered.
    3. Handlers are refused too, and everything dirty is saved. If that fails, `close()` raises and may be called again.
    4. Threads end, the store is released.
    """

    def __init__(self, parts: Parts, drain: Callable[[float], None]) -> None:
        self._parts = parts
        self._drain = drain
        self._turn = threading.Lock()
        self._closer = 0
        self._delivered = False
        self.begun = False
        self.done = False

    def close(self) -> None:
        """Close, or wait for the thread that does. Raises StorageError if the last save fails; then call it again.

        Raises WouldDeadlock if this thread was interrupted in the middle of a turn, or of this very function.
        """
        if self._closer == get_ident():
            raise WouldDeadlock("this thread is closing the engine already, and was interrupted by a signal")
        with self._turn:
            try:
                self._closer = get_ident()
                if not self.done:
                    self._close()
            finally:
                self._closer = 0

    def _close(self) -> None:
        """Every step may be repeated: an interrupted close() is called again."""
        parts = self._parts
        self.begun = True
        parts.housekeeper.end()
        if not self._delivered:
            self._refuse(handlers_may=True)
            self._deliver(parts.limits.close_grace_s)
            self._delivered = True
        self._refuse(handlers_may=False)
        parts.snapshot.stop_interval()
        self._save()
        parts.loop_thread.close()
        parts.dispatcher.close()
        parts.adapter.close()
        self.done = True

    def _refuse(self, *, handlers_may: bool) -> None:
        directory = self._parts.directory
        directory.refuse(EngineClosed, handlers_may=handlers_may)
        for actor in list(directory.values()):
            actor.run(Close(handlers_may))

    def _deliver(self, grace_s: float) -> None:
        parts = self._parts
        ends = parts.dispatcher.monotonic() + grace_s
        drained = self._drained(grace_s)
        if parts.arrivals is not None:
            parts.arrivals.stop()
            if drained:
                # What came from other engines since then: there is an end to it now.
                self._drained(max(ends - parts.dispatcher.monotonic(), 0.0))
            parts.arrivals.end()
        handlers = parts.router.working()
        abandoned = sum(handler.abandon("the engine closed before its turn came") for handler in handlers)
        if abandoned:
            log.error("%d events were not delivered before the engine closed; each was reported", abandoned)
        for handler in handlers:
            handler.abandon_current()

    def _drained(self, grace_s: float) -> bool:
        try:
            self._drain(grace_s)
        except ReplyTimeout as error:
            log.error("closing without waiting any longer for handlers: %s", error)  # noqa: TRY400 - it says all
            return False
        return True

    def _save(self) -> None:
        snapshot = self._parts.snapshot
        for attempt in range(1, LAST_SAVE_TRIES + 1):
            try:
                snapshot.ask(Flush()).get()
                return
            except StorageError as error:
                if attempt == LAST_SAVE_TRIES:
                    raise StorageError(
                        f"the last save failed, {snapshot.waiting_scopes()} scopes are not on disk: {error}; they are "
                        "kept in memory: mend the cause and call close() again"
                    ) from error
                self._pause(0.05 * attempt)

    def _pause(self, delay_s: float) -> None:
        dispatcher = self._parts.dispatcher
        over = dispatcher.reply()
        dispatcher.call_later(delay_s, over.set)
        over.get()


def forked() -> EngineForked:
    """The refusal for a process that inherited an engine."""
    return EngineForked("this engine was inherited through fork and belongs to the parent process: open a new one here")
