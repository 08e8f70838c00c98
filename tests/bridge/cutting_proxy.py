"""A loopback proxy that knows where WebSocket frames end, and cuts the connection at a chosen one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from second_engine import PATIENCE_S


class CuttingProxy:
    """Passes frames on between a bridge and its remote; after `cut_after` of them, both ways counted together, it cuts.

    It cuts once, exactly between two frames, or `inside` the next one; connections made later pass through untouched.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._guard = threading.Condition()
        self._left: int | None = None
        self._inside = False
        self._each: int | None = None
        self._passed: dict[socket.socket, int] = {}
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self.frames = 0
        """Frames that have passed."""
        self.cuts = 0
        self._spawn(self._accept)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def cut_after(self, frames: int, *, inside: bool = False) -> None:
        """Let this many more frames pass, then cut: between two frames, or `inside` the one that follows."""
        with self._guard:
            self._left, self._inside = frames, inside

    def cut_each_after(self, frames: int | None) -> None:
        """Cut each connection, including open ones, after this many of its frames; None: stop cutting."""
        with self._guard:
            self._each = frames

    def wait_for_cuts(self, count: int) -> None:
        """Wait until this many connections were cut."""
        with self._guard:
            assert self._guard.wait_for(lambda: self.cuts >= count, PATIENCE_S), f"{self.cuts} of {count} cuts"

    def close(self) -> None:
        self._listener.close()
        with self._guard:
            pairs = list(self._pairs)
        for pair in pairs:
            for end in pair:
                _abort(end)
        for thread in list(self._threads):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="test-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        # A timeout, since closing a socket does not wake a thread that waits in accept().
        self._listener.settimeout(0.05)
        while True:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(None)
            try:
                remote = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                _abort(client)
                continue
            with self._guard:
                self._pairs.append((client, remote))
            self._spawn(self._pump, client, remote, client)
            self._spawn(self._pump, remote, client, client)

    def _pump(self, source: socket.socket, sink: socket.socket, client: socket.socket) -> None:
        try:
            for number, piece in enumerate(_pieces(source)):
                if number == 0:
                    sink.sendall(piece)  # the HTTP upgrade is no frame
                elif not self._pass(piece, sink, client):
                    break
        except OSError:
            pass  # the other direction has cut, or an end has gone
        _abort(source)
        _abort(sink)

    def _pass(self, frame: bytes, sink: socket.socket, client: socket.socket) -> bool:
        with self._guard:
            passed = self._passed[client] = self._passed.get(client, 0) + 1
            if self._each is not None and passed > self._each:
                self.cuts += 1
                self._guard.notify_all()
                return False
            if self._left == 0:
                self._left = None
                self.cuts += 1
                self._guard.notify_all()
                if self._inside:
                    sink.sendall(frame[: len(frame) // 2])
                return False
            if self._left is not None:
                self._left -= 1
            self.frames += 1
            sink.sendall(frame)
            return True


def _pieces(source: socket.socket) -> Iterator[bytes]:
    """Yield the HTTP head, then frame by frame."""
    buffer = b""

    def more() -> bool:
        nonlocal buffer
        data = source.recv(65536)
        buffer += data
        return bool(data)

    while b"\r\n\r\n" not in buffer:
        if not more():
            return
    head, _, buffer = buffer.partition(b"\r\n\r\n")
    yield head + b"\r\n\r\n"
    while True:
        size = _frame_size(buffer)
        while size is None or len(buffer) < size:
            if not more():
                return
            size = _frame_size(buffer)
        frame, buffer = buffer[:size], buffer[size:]
        yield frame


def _frame_size(buffer: bytes) -> int | None:
    """Return the size of the frame that begins here, header included; None if too little is here (RFC 6455, 5.2)."""
    if len(buffer) < 2:
        return None
    short, masked = buffer[1] & 0x7F, 4 if buffer[1] & 0x80 else 0
    extra = {126: 2, 127: 8}.get(short, 0)
    if len(buffer) < 2 + extra:
        return None
    length = int.from_bytes(buffer[2 : 2 + extra], "big") if extra else short
    return 2 + extra + masked + length


def _abort(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        end.shutdown(socket.SHUT_RDWR)
    end.close()
