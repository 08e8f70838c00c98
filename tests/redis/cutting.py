"""A loopback proxy between an engine and its server. It cuts connections or delays replies where a test asks for it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self

from one_server import Server
from ports import HOST


class Proxy:
    """Passes bytes on, as they come; a context manager. An engine can be opened at it as at a server.

    Refused: killing connections at the server, which cannot choose the command, and kills between two commands.
    """

    def __init__(
        self,
        server: Server,
        *,
        cut: Callable[[bytes], bool] = lambda data: False,
        hold: Callable[[bytes], object] = lambda data: None,
    ) -> None:
        """`cut` is asked about everything that goes to the server: True closes the connection in its place.

        `hold` is called with everything that comes from it, before it is passed on, and may block.
        """
        self._server = server
        self._cut, self._hold = cut, hold
        self._listener = socket.create_server((HOST, 0))
        self._guard = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.url = f"redis://{HOST}:{self._listener.getsockname()[1]}"
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname()).close()  # wakes the thread that accepts
        with self._guard:
            for end in self._ends:
                _shut(end)
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="test-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closed:
                client.close()
                return
            try:
                server = socket.create_connection(self._server.address)
            except OSError:
                client.close()
                continue
            with self._guard:
                self._ends += (client, server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._pump, client, server, self._cut)
            self._spawn(self._pump, server, client, self._hold)

    def _pump(self, source: socket.socket, sink: socket.socket, ask: Callable[[bytes], object]) -> None:
        with contextlib.suppress(OSError):  # the other direction has ended it
            while (data := source.recv(1 << 16)) and ask(data) is not True:
                sink.sendall(data)
        _shut(source)
        _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class Cuts:
    """What a proxy cuts: while it is `armed`, each piece of data that contains `what`, at most `most` of them."""

    def __init__(self, what: bytes, most: int) -> None:
        self._what = what
        self._most = most
        self.armed = False
        self.count = 0

    def __call__(self, data: bytes) -> bool:
        if not self.armed or self.count >= self._most or self._what not in data:
            return False
        self.count += 1
        return True
