"""Two threads that take turns reading one connection, and make a new one when it breaks."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from scopestate.errors import NotConnected, StorageError
from scopestate.persistence.connections.attempts import Backoff
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import explain

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor

log = logging.getLogger("scopestate.persistence.redis")


class ReadingThreads(ABC):
    """One of two threads reads. If an event is for one idle handler, it runs that handler itself, and the other thread
    reads. Waking a worker thread would take longer than the round trip. While one of the two runs a handler, events
    that the other one reads go to worker threads.
    """

    def __init__(self, target: Any, options: RedisOptions, stream: str, patience_s: float) -> None:
        """`target`: the server to dial. `stream`: named in messages. `patience_s`: the longest wait for the server."""
        self._target = target
        self._stream = stream
        self._patience_s = patience_s
        self._join_s = options.connect_timeout_s + 1.0
        self._connection: Any = None
        self._baton = threading.Lock()
        """Held by the thread that reads."""
        self._is_away = False
        """True while one of the two runs a handler."""
        self._is_proven = True
        """False until this connection has returned something. If it breaks before that, the next attempt waits."""
        self._started = False
        self._ended = threading.Event()
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._why_not: str | None = None

    @abstractmethod
    def _begin_with(self, connection: Any) -> None:
        """Start with a new connection: check what may have been missed. Raises Refusal and Broken."""

    @abstractmethod
    def _take(self, connection: Any) -> HandlerActor | None:
        """Wait for events and process them. Return a handler that this thread must run. Raises Refusal and Broken."""

    def _explained(self, refusal: Refusal, connection: Any) -> StorageError:
        """Return the error for a refusal of the server of a connection."""
        del connection
        return explain(refusal, self._target.address, self._stream)

    def _at_end(self) -> None:  # noqa: B027 - not every reader has something to release
        """Release what is left: reading has ended. May be called twice."""

    def _start_threads(self) -> None:
        self._started = True
        for _ in range(2):
            threading.Thread(target=self._run, name="scopestate-redis-events", daemon=True).start()

    def _stop_threads(self) -> None:
        """End the threads, and wait only for the one that reads: the other may run a handler for any time."""
        self._stopped.set()
        connection = self._connection
        if self._started:
            if connection is not None:
                connection.shut()
            self._ended.wait(self._join_s)
        if connection is not None:
            connection.close()

    def _run(self) -> None:
        while True:
            with self._baton:
                handler = self._read()
                if handler is None:
                    self._at_end()
                    self._ended.set()
                    return
                self._is_away = True
            try:
                handler.run_batch()
            except Exception:
                log.exception("a turn failed outside its actor")
            self._is_away = False

    def _read(self) -> HandlerActor | None:
        """Read until there is a handler to run on this thread. None at the end."""
        # No exception may leave this loop, or reading would stop.
        while not self._stopped.is_set():
            try:
                connection = self._connected()
                if connection is not None:
                    handler = self._take(connection)
                    self._backoff.reset()
                    self._is_proven = True
                    if handler is not None:
                        return handler
            except Broken as error:
                self._lose(f"lost the connection to Redis at {self._target.address}: {error}")
                if not self._is_proven:
                    self._pause()
            except Refusal as refusal:
                self._lose(str(self._explained(refusal, self._connection)))
                self._pause()
            except StorageError as error:
                self._lose(str(error))
                self._pause()
            except Exception as error:
                log.exception("reading the events of Redis at %s failed", self._target.address)
                self._lose(f"reading the events of Redis at {self._target.address} failed: {error!r}")
                self._pause()
        connection = self._connection
        if connection is not None:
            connection.close()
        return None

    def _connected(self) -> Any:
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
        self._begin_with(connection)
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
