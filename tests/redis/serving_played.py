"""A played server at a port of this machine, for engines that connect as they do to any other."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self

from played_server import PlayedServer, Session
from ports import HOST


class ServedPlayed:
    """Passes bytes on between sockets and the sessions of a played server; a context manager."""

    def __init__(self, server: PlayedServer) -> None:
        self._server = server
        self._guard = threading.Lock()
        """Held by the thread that is in the server, which knows no threads."""
        self._listener = socket.create_server((HOST, 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self.url = f"redis://{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        with suppress(OSError):
            socket.create_connection(self._listener.getsockname()).close()  # wakes the thread that accepts
        self._threads[0].join()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="test-played", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            end, _ = self._listener.accept()
            if self._is_closed:
                end.close()
                return
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ends.append(end)
            self._spawn(self._serve, end)

    def _serve(self, end: socket.socket) -> None:
        with self._guard:
            session = self._server.connect(end.sendall)
        with suppress(OSError), end:
            while True:
                end.settimeout(self._pause_s(session))
                try:
                    data = end.recv(1 << 16)
                except TimeoutError:
                    with self._guard:
                        session.try_again()
                    continue
                if not data:
                    break
                with self._guard:
                    session.feed(data)
        with self._guard:
            session.close()

    def _pause_s(self, session: Session) -> float:
        """Until something can happen of itself: an entry that another session brings is answered by that one."""
        if session.wakes_at is None or session.wakes_at == float("inf"):
            return 60.0
        return max(session.wakes_at - self._server.clock(), 0.0) + 0.001


def on_this_clock() -> PlayedServer:
    """Return a played server that goes by the clock of this machine."""
    began = time.monotonic()
    return PlayedServer(lambda: time.monotonic() - began)
