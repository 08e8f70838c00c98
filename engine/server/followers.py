"""The server of an engine that owns a directory, for the engines of other processes that follow it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from scopestate.config import AuthConfig, ServerConfig
from scopestate.config.schema import full_token
from scopestate.engine import Engine
from scopestate.persistence.sharing.sockets import Listener, replace_by_nothing
from scopestate.server.connections import GOING
from scopestate.server.server import STOPS, Server
from scopestate.wire.options import GOODBYE

log = logging.getLogger("scopestate.sharing")

MESSAGE_BYTES: Final = 1 << 30
CALLS: Final = 1_000_000
LAST_POLL_S: Final = 1.0
"""Seconds that a goodbye waits for the answers to polls."""
SENDING_LOOKS: Final = 1000
"""A goodbye waits about this many milliseconds until the last answers are sent."""
STOP_S: Final = 10.0
"""Seconds that a closing engine waits for one action of its server."""


class FollowerServer(Server):
    """Serves on the socket in a directory. Its clients may do everything that the program may.

    `run` runs it on its thread. It can be closed in steps, so that no call of a follower is lost.
    """

    _public = False
    # Short: a follower that is not calling does not read the connection for calls, and the lock is released only after
    # this.
    _close_wait_s = 0.02

    def __init__(self, engine: Engine, listener: Listener) -> None:
        """Serve `engine` on a listening socket, which is closed with the server."""
        token = listener.token
        config = ServerConfig(
            auth=AuthConfig(() if token is None else (full_token(token),)),
            call_timeout_ms=0,
            max_message_bytes=MESSAGE_BYTES,
            max_calls=CALLS,
            max_registrations=CALLS,
        )
        super().__init__(engine, config=config)
        self._listener = listener
        self._unwanted = False
        self._held: bool | None = None
        """As `handlers_may` of the last `hold`; None: calls are not held."""

    def run(self) -> None:
        """Serve on this thread until `end` is called on another one. Raises the error that has ended it earlier."""
        self._run()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Close every connection and make `run` return. Idempotent; does not wait."""
        self._unwanted = True
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                loop.call_soon_threadsafe(self._ask_to_stop)

    def followers(self) -> int:
        """Return how many engines follow."""
        hub = self._hub
        if hub is None:
            return 0
        # An engine may have more than one connection.
        return len({worker.metadata.get("name", worker.worker_id) for worker in list(hub.workers.values())})

    def hold(self, timeout_s: float, *, handlers_may: bool) -> None:
        """Begin no more calls of followers, and wait until those that have begun are answered.

        A call that is not begun gets no answer: its follower repeats it when another engine owns the directory. With
        `handlers_may`, calls by handlers are still begun.
        """
        self._held = handlers_may
        hub = self._hub
        if hub is None or not self._on_loop(lambda: hub.hold(handlers_may=handlers_may)):
            return
        deadline = time.monotonic() + timeout_s
        while any(worker.has_calls for worker in list(hub.workers.values())) and time.monotonic() < deadline:
            time.sleep(0.001)

    def abandon(self) -> None:
        """In a forked child: leave every connection to the parent.

        A copy of a socket here would keep its connection open after the parent has ended, and the follower would wait.
        """
        for arrival in list(self._handshakes._waiting):
            replace_by_nothing(arrival._socket.fileno())
        for connection in self._all_connections():
            transport: Any = connection._socket
            known = None if transport is None else transport.get_extra_info("socket")
            if known is not None:
                replace_by_nothing(known.fileno())

    # --------------------------------------------------------------------------------------------- as the base class

    def _listen(self) -> list[socket.socket]:
        if self._held is not None and self._hub is not None:
            self._hub.hold(handlers_may=self._held)
        if self._unwanted:
            self._ask_to_stop()
        self._listener.socket.setblocking(False)
        return [self._listener.socket]

    @property
    def _what(self) -> str:
        return "the engines of other processes"

    def _refuse_connection(self, accepted: socket.socket) -> str | None:
        return self._listener.refusal(accepted)

    async def _say_goodbye(self) -> None:
        hub = self._hub
        if hub is None or not hub.holds:
            return
        polls = {poll for worker in hub.workers.values() for poll in worker.polls}
        if polls:  # they are answered when the engine ends its watches
            await asyncio.wait(polls, timeout=LAST_POLL_S)
        for worker in list(hub.workers.values()):
            # If a call has begun and is not answered, the follower must assume that it may have been carried out.
            worker.close(GOING, STOPS if worker.has_calls else GOODBYE)
        for _ in range(SENDING_LOOKS):
            if not any(connection.unsent() for connection in self._all_connections()):
                break
            await asyncio.sleep(0.001)

    def _is_running(self) -> bool:
        return self._loop is not None

    def _on_loop(self, work: Callable[[], object]) -> bool:
        """Call `work` on the thread of the server, and wait for it. False: the server has ended."""
        done: list[None] = []

        def do() -> None:
            try:
                work()
            finally:
                done.append(None)

        try:
            if self._loop is None:
                return False
            self._loop.call_soon_threadsafe(do)
        except RuntimeError:  # it has ended at this moment
            return False
        # It polls, as an interruption within the methods of an `Event` could leave its lock taken.
        deadline = time.monotonic() + STOP_S
        while not done and self._is_running() and time.monotonic() < deadline:
            time.sleep(0.001)
        return bool(done)
