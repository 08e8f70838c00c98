"""The events that engines share through Redis: reading their stream, and giving them to the handlers of this engine.

Each engine reads every event, for triggers in memory. `consumers.py` has durable triggers, where one engine gets each.
`cluster_events.py` reads the streams of a cluster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.handler import HandlerActor
from scopestate.actors.router import EventRouter
from scopestate.errors import StorageError
from scopestate.persistence.connections.connection import Broken, Target
from scopestate.persistence.redis.connection import Connection, Refusal, pack
from scopestate.persistence.redis.damage import explain_misused
from scopestate.persistence.redis.entries import Event, state_event_of
from scopestate.persistence.redis.history import Life
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.reading import ReadingThreads
from scopestate.persistence.redis.script import Shape
from scopestate.persistence.redis.tail import COUNT, Published, Tail

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend

log = logging.getLogger("scopestate.persistence.redis")

BLOCK_S: Final = 2.0
"""How long a reader waits for the server. Then it checks whether the stream is still the one that it knows."""
_LATE_S: Final = 1.0
"""How late a server may end the wait: it looks `hz` times a second, which is 1 or more, and 10 by default."""
_SHOWN_S: Final = 600.0
"""How long `problem` returns a loss."""


class Losses:
    """The events that did not arrive. From any thread."""

    def __init__(self) -> None:
        self.missed = 0
        """Events that this engine has missed, as far as their number is known."""
        self._last: tuple[float, str] | None = None
        self._noting = threading.Lock()

    def note(self, count: int, what: str) -> None:
        """Report that `count` events did not arrive; 0 if the number is unknown."""
        # Logged first, so that the reason is in the log when the count is seen.
        log.error("%s", what)
        with self._noting:
            self._last = (time.monotonic(), what)
            self.missed += count

    def problem(self) -> str | None:
        """Return a recent loss as text."""
        if self._last is not None:
            when, what = self._last
            ago_s = time.monotonic() - when
            if ago_s < _SHOWN_S:
                return f"{what} ({ago_s:.0f} s ago; {self.missed} events missed since the engine was opened)"
        return None


class EventReader(Protocol):
    """What reads the events of all engines, as `Arrivals` uses it."""

    def catch_up_own(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes are here; False if that took longer than `timeout_s`."""

    def stop(self) -> None:
        """Stop reading: nothing is published after this has returned. Idempotent."""


class Arrivals:
    """Gives the events that engines publish in Redis to the router of this one: the outlet of the reader."""

    def __init__(self, adapter: RedisBackend, reader: EventReader, router: EventRouter) -> None:
        self._adapter = adapter
        self._reader = reader
        self._router = router
        self._room: threading.Event | None = None
        self._interrupted = False

    # ------------------------------------------------------------------------------------------- the engine's side

    def catch_up(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes are here; False if that took longer than `timeout_s`."""
        return self._reader.catch_up_own(timeout_s)

    def stop(self) -> None:
        """Stop taking events; those that are here may still be handled. Idempotent."""
        self._reader.stop()

    # ------------------------------------------------------------------------------------------ the reader's thread

    def publish(self, event: Event, *, here: bool) -> tuple[tuple[HandlerActor, ...], HandlerActor | None] | None:
        """Give an event to the router, as `EventRouter.arrive`; wait while a handler is full.

        None if that was interrupted.
        """
        while not self._interrupted:
            try:
                return self._router.arrive(
                    event.scope, event.key, event.old, event.new, event.revision, event.depth, event.expired, here=here
                )
            except HandlerFull as full:
                room = self._room = threading.Event()
                self._router.backlog.when_room(room.set, full)
                # Checked after the assignment: an interruption either sees `room`, or is seen here.
                if not self._interrupted:
                    room.wait()
                self._router.backlog.stop_waiting(room.set)
        return None

    def feed(self, tail: Tail, entry_id: bytes, fields: list[bytes], event: Event) -> None:
        """Give an event to the watches of this engine."""
        base = tail.life.base
        self._router.feed.arrive(event.scope, base + event.number, lambda: state_event_of(entry_id, fields, base))

    @property
    def is_idle(self) -> bool:
        """True if no trigger is registered. Events that were read before this was asked are for none."""
        return not self._router.triggers.has_plain() and not self._interrupted

    def pass_over(self, tail: Tail, scopes: Sequence[str], count: int) -> bool:
        """Pass over the next `count` events of a stream, which are of these scopes. False if a watch wants them."""
        return self._router.feed.pass_over(scopes, tail.life.base + tail.number + count)

    def begin_anew(self, life: Life, number: int, why: str) -> None:
        """The events go on behind this number, and those before are not complete: watches end with the reason."""
        self._router.feed.begin_anew(self._adapter.store_of(life), life.epoch, life.base + number, why)

    def note_arrivals(self) -> None:
        """The stream has new entries: durable triggers may have something to do."""
        consumers = self._adapter.durable
        if consumers is not None:
            consumers.note_arrivals()

    def interrupt(self) -> None:
        """Stop `publish` from waiting."""
        self._interrupted = True
        room = self._room
        if room is not None:
            room.set()


class Reader(ReadingThreads, Tail):
    """Reads the one stream of a server on its own connection: `open`, `start`, `stop`, in this order."""

    def __init__(self, target: Target[Connection], options: RedisOptions, shape: Shape, published: Published) -> None:
        ReadingThreads.__init__(self, target, options, shape.stream, BLOCK_S + _LATE_S + options.call_timeout_s)
        Tail.__init__(self, shape, published)
        self._arrivals: Arrivals
        self._losses = Losses()

    # ------------------------------------------------------------------------------------------- the engine's side

    def open(self) -> None:
        """Connect, and note where reading begins: everything written from now on is read.

        Raises NotConnected, and StorageError if the server refuses it.
        """
        connection = self._target.dial()
        try:
            self._begin(connection)
        except Refusal as refusal:
            error = self._explained(refusal, connection)
            connection.close()
            raise error from refusal
        except Broken as error:
            raise StorageError(f"the connection to Redis at {self._target.address} was lost: {error}") from error
        connection.wait_at_most(self._patience_s)
        self._connection = connection

    def _explained(self, refusal: Refusal, connection: Any) -> StorageError:
        def ask(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
            return [connection.call(*command) for command in commands]

        types = {self._shape.stream: b"stream", self._shape.counter: b"string"}
        return explain_misused(refusal, self._target.address, types, ask)

    def start(self, adapter: RedisBackend, router: EventRouter) -> Arrivals:
        """Start reading, and return what gives the events to the router."""
        self._arrivals = Arrivals(adapter, self, router)
        self._start_threads()
        return self._arrivals

    def published_of(self, hash_key: bytes) -> Published:
        """Return what this engine has published for a scope: all scopes have one stream here."""
        del hash_key
        return self.published

    def stop(self) -> None:
        """Stop reading: nothing is published after this has returned. Idempotent."""
        self._stopped.set()
        if self._started:
            self._arrivals.interrupt()
        self._stop_threads()
        self._tell_all()

    @property
    def missed(self) -> int:
        """Events that this engine has missed, as far as their number is known."""
        return self._losses.missed

    def problem(self) -> str | None:
        """Return the current problem as text, or a recent loss."""
        if self._why_not is not None:
            return f"events of other engines do not arrive: {self._why_not}"
        return self._losses.problem()

    def note_loss(self, count: int, what: str) -> None:
        self._losses.note(count, what)

    # ------------------------------------------------------------------------------------------------- for the bases

    @property
    def _server(self) -> str:
        address: str = self._target.address
        return address

    @property
    def _is_over(self) -> bool:
        return self._stopped.is_set()

    @property
    def _outlet(self) -> Arrivals:
        return self._arrivals

    def _look_soon(self) -> None:
        """It looks before each time that it waits for the server."""

    def _begin_feed_anew(self, life: Life, number: int, why: str) -> None:
        self._arrivals.begin_anew(life, number, why)

    def _begin_with(self, connection: Connection) -> None:
        self._look(connection)

    def _take(self, connection: Connection) -> HandlerActor | None:
        if self._looked < self._wanted:
            self._look(connection)
        if connection.is_stale():
            # An answer that came twice would be taken for the next one, and its events published again.
            raise Broken("the server has closed it, or sent an unexpected answer")
        reply = connection.exchange(
            pack(("XREAD", "COUNT", COUNT, "BLOCK", int(BLOCK_S * 1000), "STREAMS", self._shape.stream, self._id))
        )
        if reply is None:
            self._look(connection)
            return None
        if type(reply) is Refusal:
            raise reply
        entries = reply[0][1]
        self._arrivals.note_arrivals()
        here = len(entries) == 1 and not self._is_away
        return self._take_in(connection, entries, here=here)[0]
