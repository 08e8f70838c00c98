"""Giving the events that engines share through Redis to the handlers of this one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.dispatcher import Dispatcher
from scopestate.actors.handler import Barrier, HandlerActor
from scopestate.actors.router import EventRouter
from scopestate.persistence.redis.reading import Event

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend


class Arrivals:
    """Gives the events that engines publish in Redis to the router of this one: the outlet of the reader."""

    def __init__(self, adapter: RedisBackend, router: EventRouter, dispatcher: Dispatcher) -> None:
        self._adapter = adapter
        self._router = router
        self._dispatcher = dispatcher
        self._room: threading.Event | None = None
        self._interrupted = False

    # ------------------------------------------------------------------------------------------- the engine's side

    def catch_up(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes are here; False if that took longer than `timeout_s`."""
        adapter, reader = self._adapter, self._adapter.reader
        if reader is None:
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # In this order: a restart in between is seen below.
            restarts, latest, number = reader.restarts, adapter.latest, adapter.published
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not reader.catch_up(number, restarts, left_s, look=latest < number):
                return False
            if reader.restarts == restarts:
                if adapter.latest == latest:
                    adapter.latest = number  # checked, so not again the next time
                return True
            # Redis was flushed, so the numbers start again: this number now belongs to another event.

    def stop(self) -> None:
        """Stop taking events; those that are here may still be handled and acknowledged. Idempotent."""
        if self._adapter.reader is not None:
            self._adapter.reader.stop()

    def end(self) -> None:
        """Stop acknowledging: events that are not handled by now are left to other engines. Idempotent."""
        if self._adapter.reader is not None:
            self._adapter.reader.end()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def publish(self, event: Event, *, here: bool) -> tuple[tuple[HandlerActor, ...], HandlerActor | None] | None:
        """Give an event to the router, as `EventRouter.arrive`; wait while a handler is full.

        None if that was interrupted.
        """
        while not self._interrupted:
            try:
                return self._router.arrive(*event, here=here)
            except HandlerFull as full:
                room = self._room = threading.Event()
                self._router.backlog.when_room(room.set, full)
                # Checked after the assignment: an interruption either sees `room`, or is seen here.
                if not self._interrupted:
                    room.wait()
                self._router.backlog.stop_waiting(room.set)
        return None

    def when_handled(self, handlers: Iterable[HandlerActor], callback: Callable[[], object]) -> None:
        """Call `callback()` when these handlers have handled what was published so far, retries included."""
        behind = list(handlers)
        if not behind:
            callback()
            return
        reply = self._dispatcher.reply()
        reply.when_done(lambda _: callback())
        self._router.tell(Barrier(behind, reply))

    def has_triggers(self) -> bool:
        """False if there is no trigger."""
        return bool(self._router.triggers)

    def interrupt(self) -> None:
        """Stop `publish` from waiting."""
        self._interrupted = True
        room = self._room
        if room is not None:
            room.set()
