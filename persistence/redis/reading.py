"""Reading the stream of events: a thread, its connection, and what it reports."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from scopestate.errors import DeserializationError, NotConnected, StorageError
from scopestate.ops.values import parse
from scopestate.persistence.redis.connection import Broken, Connection, Refusal, Target
from scopestate.persistence.redis.dialling import Backoff
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import Shape, explain

log = logging.getLogger("scopestate.persistence.redis")

_T = TypeVar("_T")

BLOCK_S: Final = 2.0
"""How long the server may keep a reader waiting; then it looks whether the stream is still the one it knows."""
CUT_FILE: Final = "after a restart of the server with a cut AOF: Valkey 9.1.2 or later, or `aof-load-truncated no`"
"""What else may have lost events, and what to do then.

Redis 7.0 does not remove all of a transaction that is cut at the end of its append-only file. The rest becomes part of
the next one, and takes effect when the file is loaded again: it counts events that are not in the stream.
"""
_SHOWN_S: Final = 600.0
"""How long a loss stays in `problem`."""


class Event(NamedTuple):
    """One change, as the stream has it."""

    scope: str
    key: str
    old: bytes | None
    """The value as JSON; None if there was none. Null if it was something else, which somebody else had written."""
    new: bytes | None
    number: int
    """1, 2, 3, ... over all scopes of a database and prefix."""
    depth: int


def event_of(fields: list[bytes]) -> Event:
    """Return the event of a stream entry, whose fields are in the order of `script.SOURCE`.

    Raises ValueError or IndexError if the entry is none of ours.
    """
    if fields[0] != b"n" or fields[2] != b"s" or fields[4] != b"k":
        raise ValueError(f"an entry of other fields: {fields!r:.100}")
    old = new = None
    depth = 0
    for i in range(6, len(fields), 2):
        name = fields[i]
        if name == b"v":
            new = fields[i + 1]
        elif name == b"o":
            old = _as_json(fields[i + 1])
        elif name == b"d":
            depth = int(fields[i + 1])
    return Event(fields[3].decode(), fields[5].decode(), old, new, int(fields[1]), depth)


def number_of(fields: list[bytes]) -> int | None:
    """Return the number of a stream entry; None if it is none of ours."""
    try:
        return event_of(fields).number
    except (ValueError, IndexError):
        return None


def place_of(entry_id: bytes) -> tuple[int, int]:
    """Return what the ids of entries are ordered by."""
    milliseconds, _, count = entry_id.partition(b"-")
    return int(milliseconds), int(count)


def _as_json(raw: bytes) -> bytes:
    """Return another program's value as we would write it; null if it is not JSON (docs/semantics.md 7)."""
    try:
        return parse(raw)
    except DeserializationError:
        return b"null"


class Handler(Protocol):
    """Has an event."""

    def run_batch(self) -> None:
        """Handle what it has; that may take long."""


class Outlet(Protocol):
    """Where events go. A reader's thread calls it, `interrupt` comes from another one."""

    def publish(self, event: Event, *, here: bool) -> tuple[Collection[Any], Handler | None] | None:
        """Hand the event to the handlers that it concerns, and return them. Waits while one of them is full.

        `here`: the second thing returned may be a handler that the caller must run. None if it was interrupted: the
        event went nowhere.
        """

    def when_handled(self, handlers: Iterable[Any], callback: Callable[[], object]) -> None:
        """Call `callback()`, on any thread, when these have done all that was published so far."""

    def has_triggers(self) -> bool:
        """False if nobody could hear of an event."""

    def interrupt(self) -> None:
        """Let `publish` wait no more, now and later."""


class Reader(ABC):
    """Reads the stream, on a connection of its own: `open`, `start`, `stop`, `end`, in this order.

    Two threads take turns: one reads, and if what it got concerns one idle handler, it lets the other one read on and
    runs that handler itself. Waking a worker for it would cost more than the round trip. While a handler keeps one of
    the two away, the other one reads, and its events go to workers.

    A subclass says how it begins (`_begin`), goes on after the connection was lost (`_resume`), and takes the next
    entries (`_take`); all of them may raise Refusal and Broken.
    """

    def __init__(self, target: Target, options: RedisOptions, shape: Shape) -> None:
        self._target = target
        self._shape = shape
        self._patience_s = BLOCK_S + options.call_timeout_s
        self._join_s = options.connect_timeout_s + 1.0
        self._connection: Connection | None = None
        self._outlet: Outlet
        self._baton = threading.Lock()
        """Held by the thread that reads."""
        self._is_away = False
        """True while one of the two runs a handler."""
        self._is_proven = True
        """False while this connection has brought nothing: if it breaks like that, the next one waits."""
        self._started = False
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._why_not: str | None = None
        self._loss: tuple[float, str] | None = None
        self._noting = threading.Lock()
        self.missed = 0
        """Events that were lost to this engine, as far as their number is known."""
        self.restarts = 0
        """How often the numbers of the events have gone back."""

    # ------------------------------------------------------------------------------------------- the engine's side

    def open(self) -> None:
        """Connect, and note where reading begins: what is written from here on is read.

        Raises NotConnected, and StorageError if the server refuses it.
        """
        connection = self._target.dial()
        try:
            self._begin(connection)
        except Refusal as refusal:
            connection.close()
            raise explain(refusal, self._target.address, self._shape.stream.encode()) from refusal
        except Broken as error:
            raise StorageError(f"the connection to Redis at {self._target.address} was lost: {error}") from error
        connection.wait_at_most(self._patience_s)
        self._connection = connection

    def start(self, outlet: Outlet) -> None:
        """Begin to read."""
        self._outlet = outlet
        self._started = True
        for _ in range(2):
            threading.Thread(target=self._run, name="scopestate-redis-events", daemon=True).start()

    def stop(self) -> None:
        """Take no more events: nothing is published after this has returned. Idempotent."""
        self._stopped.set()
        connection = self._connection
        if self._started:
            self._outlet.interrupt()
            if connection is not None:
                connection.shut()
            # Not for the threads: one may be away with a handler, as a worker may.
            self._ended.wait(self._join_s)
        if connection is not None:
            connection.close()

    def end(self) -> None:
        """Stop, and let go of everything. Idempotent."""
        self.stop()

    @abstractmethod
    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        """Wait until the event of this number, which this engine has published, was taken from the stream, and handed
        to the handlers if it was taken here; False if that took longer than `timeout_s`.

        True also when the numbers have begun anew since they had done so `restarts` times, and after `stop`. `look`:
        they may have, unseen until now, so it must be seen that they have not.
        """

    def problem(self) -> str | None:
        """Return what is wrong now, in words, or was lost of late."""
        if self._why_not is not None:
            return f"events of other engines do not arrive: {self._why_not}"
        if self._loss is not None:
            when, what = self._loss
            ago_s = time.monotonic() - when
            if ago_s < _SHOWN_S:
                return f"{what} ({ago_s:.0f} s ago; {self.missed} events missed since the engine was opened)"
        return None

    def note_loss(self, count: int, what: str) -> None:
        """Report that events did not arrive: `count` of them, 0 if nobody knows. Any thread may call it."""
        # Logged first: who sees the count finds its reason.
        log.error("%s", what)
        with self._noting:
            self._loss = (time.monotonic(), what)
            self.missed += count

    # ------------------------------------------------------------------------------------------ the reader's thread

    def _run(self) -> None:
        while True:
            with self._baton:
                handler = self._read()
                if handler is None:
                    self._ended.set()
                    return
                self._is_away = True
            try:
                handler.run_batch()
            except Exception:
                log.exception("a turn failed outside its actor")
            self._is_away = False

    def _read(self) -> Handler | None:
        """Read until there is a handler to be run here, or the end: None."""
        # Nothing may leave this loop: nobody would read on.
        while not self._stopped.is_set():
            try:
                connection = self._connected()
                if connection is not None:
                    handler = self._try(self._take, connection)
                    self._backoff.reset()
                    self._is_proven = True
                    if handler is not None:
                        return handler
            except Broken as error:
                self._lose(f"lost the connection to Redis at {self._target.address}: {error}")
                if not self._is_proven:
                    self._pause()
            except Refusal as refusal:
                self._lose(str(explain(refusal, self._target.address, self._shape.stream.encode())))
                self._pause()
            except Exception as error:
                log.exception("reading the events of Redis at %s failed", self._target.address)
                self._lose(f"reading the events of Redis at {self._target.address} failed: {error!r}")
                self._pause()
        connection = self._connection
        if connection is not None:
            connection.close()
        return None

    @abstractmethod
    def _begin(self, connection: Connection) -> None:
        """Note where reading begins."""

    @abstractmethod
    def _resume(self, connection: Connection) -> None:
        """Go on over a new connection, where the old one ended."""

    @abstractmethod
    def _take(self, connection: Connection) -> Handler | None:
        """Wait for the next entries, at most BLOCK_S, and publish them; return a handler that is to be run here."""

    def _is_mended(self, connection: Connection, refusal: Refusal) -> bool:
        """Do what a refusal calls for; False if that is to pause and connect anew. May raise Refusal and Broken."""
        return False

    def _try(self, step: Callable[[Connection], _T], connection: Connection) -> _T | None:
        """Do a step; None if it was refused and the reason is mended."""
        try:
            return step(connection)
        except Refusal as refusal:
            if not self._is_mended(connection, refusal):
                raise
            return None

    def _connected(self) -> Connection | None:
        connection = self._connection
        if connection is not None:
            return connection
        try:
            connection = self._target.dial()
        except NotConnected as error:
            if self._why_not is None:
                log.warning("%s; events of other engines wait for it, and it is tried again", error)
            self._why_not = str(error)
            self._pause()
            return None
        # In this order: who stops meanwhile either shuts this connection, or is seen here.
        self._connection = connection
        if self._stopped.is_set():
            return None
        connection.wait_at_most(self._patience_s)
        if self._why_not is not None:
            log.warning("reading events of Redis at %s again", connection.address)
        self._why_not = None
        self._is_proven = False
        self._try(self._resume, connection)
        return connection

    def _lose(self, why: str) -> None:
        if not self._stopped.is_set():
            self._why_not = why
            log.warning("%s; it is tried again", why)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _pause(self) -> None:
        self._stopped.wait(self._backoff.next_pause_s())
