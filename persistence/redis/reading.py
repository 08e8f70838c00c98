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
"""How long a reader waits for the server. Then it checks whether the stream is still the one that it knows."""
CUT_FILE: Final = "after a restart of the server with a cut AOF: Valkey 9.1.2 or later, or `aof-load-truncated no`"
"""Another possible cause of lost events, and what to do about it.

Redis 7.0 does not remove all of a transaction that is cut off at the end of its append-only file. The rest becomes part
of the next transaction, and takes effect when the file is loaded again: it counts events that are not in the stream.
"""
_SHOWN_S: Final = 600.0
"""How long `problem` returns a loss."""


class Event(NamedTuple):
    """One change, as it is in the stream."""

    scope: str
    key: str
    old: bytes | None
    """The value as JSON; None if there was none; null if it was not JSON, which another program had written."""
    new: bytes | None
    number: int
    """1, 2, 3, ... over all scopes of a database and a prefix."""
    depth: int


def event_of(fields: list[bytes]) -> Event:
    """Return the event of a stream entry, whose fields are in the order of `script.SOURCE`.

    Raises ValueError or IndexError if scopestate has not written the entry.
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
    """Return the number of a stream entry; None if scopestate has not written it."""
    try:
        return event_of(fields).number
    except (ValueError, IndexError):
        return None


def place_of(entry_id: bytes) -> tuple[int, int]:
    """Return the position of an entry id, for comparing."""
    milliseconds, _, count = entry_id.partition(b"-")
    return int(milliseconds), int(count)


def _as_json(raw: bytes) -> bytes:
    """Return a value of another program as `encode` writes it; null if it is not JSON (docs/semantics.md 7)."""
    try:
        return parse(raw)
    except DeserializationError:
        return b"null"


class Handler(Protocol):
    """A handler with an event."""

    def run_batch(self) -> None:
        """Handle its events. That may take long."""


class Outlet(Protocol):
    """Where events go. Called on a reader's thread; `interrupt` on another one."""

    def publish(self, event: Event, *, here: bool) -> tuple[Collection[Any], Handler | None] | None:
        """Give the event to the handlers whose triggers match, and return them. Waits while one of them is full.

        `here`: the second item of the result may be a handler that the caller must run. None if it was interrupted;
        then no handler got the event.
        """

    def when_handled(self, handlers: Iterable[Any], callback: Callable[[], object]) -> None:
        """Call `callback()`, on any thread, when these handlers have handled everything published so far."""

    def has_triggers(self) -> bool:
        """False if there is no trigger."""

    def interrupt(self) -> None:
        """Stop `publish` from waiting, now and later."""


class Reader(ABC):
    """Reads the stream on its own connection: `open`, `start`, `stop`, `end`, in this order.

    Two threads alternate. One reads; if an event is for one idle handler, it runs that handler itself and lets the
    other thread read. Waking a worker thread for it would take longer than the round trip. While a handler keeps one of
    the two busy, events that the other one reads go to worker threads.

    A subclass implements the beginning (`_begin`), continuing after a lost connection (`_resume`), and taking the next
    entries (`_take`). All three may raise Refusal and Broken.
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
        """False until this connection has returned something: if it breaks before, the next attempt waits."""
        self._started = False
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._why_not: str | None = None
        self._loss: tuple[float, str] | None = None
        self._noting = threading.Lock()
        self.missed = 0
        """Events that this engine has missed, as far as their number is known."""
        self.restarts = 0
        """How often the numbers of events have gone back."""

    # ------------------------------------------------------------------------------------------- the engine's side

    def open(self) -> None:
        """Connect, and note where reading begins: everything written from now on is read.

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
        """Start reading."""
        self._outlet = outlet
        self._started = True
        for _ in range(2):
            threading.Thread(target=self._run, name="scopestate-redis-events", daemon=True).start()

    def stop(self) -> None:
        """Stop reading: nothing is published after this has returned. Idempotent."""
        self._stopped.set()
        connection = self._connection
        if self._started:
            self._outlet.interrupt()
            if connection is not None:
                connection.shut()
            # Not for both threads: one may be running a handler, which may take any time.
            self._ended.wait(self._join_s)
        if connection is not None:
            connection.close()

    def end(self) -> None:
        """Stop, and release everything. Idempotent."""
        self.stop()

    @abstractmethod
    def catch_up(self, number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        """Wait until the event of this number, which this engine has published, was taken from the stream, and given to
        the handlers if it was taken here. False if that took longer than `timeout_s`.

        True as well if the numbers have started again more than `restarts` times, and after `stop`. `look`: they may
        have done so unnoticed, so this must be checked.
        """

    def problem(self) -> str | None:
        """Return the current problem as text, or a recent loss."""
        if self._why_not is not None:
            return f"events of other engines do not arrive: {self._why_not}"
        if self._loss is not None:
            when, what = self._loss
            ago_s = time.monotonic() - when
            if ago_s < _SHOWN_S:
                return f"{what} ({ago_s:.0f} s ago; {self.missed} events missed since the engine was opened)"
        return None

    def note_loss(self, count: int, what: str) -> None:
        """Report that `count` events did not arrive; 0 if the number is unknown. From any thread."""
        # Logged first, so that the reason is in the log when the count is seen.
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
        """Read until there is a handler to run on this thread. None at the end."""
        # No exception may leave this loop, or reading would stop.
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
        """Continue on a new connection where the old one ended."""

    @abstractmethod
    def _take(self, connection: Connection) -> Handler | None:
        """Wait at most BLOCK_S for the next entries, and publish them. Return a handler to run on this thread."""

    def _is_mended(self, connection: Connection, refusal: Refusal) -> bool:
        """Repair the cause of a refusal. False: pause and reconnect instead. May raise Refusal and Broken."""
        return False

    def _try(self, step: Callable[[Connection], _T], connection: Connection) -> _T | None:
        """Do a step. None if it was refused and the cause has been repaired."""
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
        # In this order: a `stop` in between either closes this connection, or is seen here.
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
