"""From the listening socket to a WebSocket: count connections from their acceptance on, and answer plain HTTP.

picows takes over a connection when the head of an upgrade request is complete. Until then a client has not shown a
token, so it gets little: one descriptor, 16 KiB, a few seconds. If there are too many such connections, the oldest are
closed (docs/design/0023-limits-of-the-server.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, cast

from scopestate.config import TlsConfig
from scopestate.errors import ConfigError
from scopestate.paths import expand_home
from scopestate.wire.bounded_log import BoundedLog

log = logging.getLogger("scopestate.server")

HEAD_BYTES: Final = 16 * 1024
"""Longest head of an HTTP request."""
HANDSHAKE_S: Final = 10.0
"""Seconds that a connection may be open without a complete request."""
MOST_HANDSHAKES: Final = 512
"""Connections without a complete request. With more, the oldest of them is closed."""
MOST_REQUESTS: Final = 100
"""Plain HTTP requests on one connection."""
SLACK: Final = 8
"""How many connections are closed at once when descriptors run short: until they are closed, new ones use the
reserve."""
CLOSING_S: Final = 0.005
"""Upper bound of the time that the event loop needs to close a connection."""
RETRY_S: Final = 0.2
"""Pause after an `accept` that failed."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Request:
    """The head of an HTTP request."""

    __slots__ = ("headers", "lines", "method", "minor", "path", "query")

    def __init__(self, head: bytes) -> None:
        """Raises ValueError, whose text is for the client."""
        lines = [line.removesuffix("\r") for line in head.decode("latin-1").split("\n")]
        words = lines[0].split(" ")
        if len(words) != 3 or not words[0].isalpha() or not words[1]:
            raise ValueError("this is not an HTTP request")
        self.method, target, version = words
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise ValueError("the server speaks HTTP/1.0 and HTTP/1.1")
        self.minor = int(version[-1])
        if not target.startswith("/"):  # the absolute form, as in requests to a proxy
            _, separator, rest = target.partition("://")
            target = "/" + rest.partition("/")[2] if separator else target
        self.path, _, self.query = target.partition("?")
        self.lines = lines[1:]
        self.headers: dict[str, str] = {}
        for line in self.lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise ValueError("a header of the request is malformed")
            name = name.lower()
            value = value.strip()
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value

    @property
    def connection(self) -> set[str]:
        """The words of the header `Connection`, in lower case."""
        return {word.strip().lower() for word in self.headers.get("connection", "").split(",")}

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket."""
        return self.headers.get("upgrade", "").lower() == "websocket" and "upgrade" in self.connection

    @property
    def has_body(self) -> bool:
        """Whether a body follows. It is never read."""
        return "transfer-encoding" in self.headers or self.headers.get("content-length", "0").strip("0") != ""

    def keeps_alive(self) -> bool:
        """Whether the connection may serve another request."""
        if self.has_body or "close" in self.connection:
            return False
        return self.minor == 1 or "keep-alive" in self.connection

    def for_picows(self) -> bytes:
        """Return the head with `Connection: Upgrade` alone, as Firefox sends `keep-alive, Upgrade`."""
        target = self.path + ("?" + self.query if self.query else "")
        kept = [line for line in self.lines if line.partition(":")[0].strip().lower() != "connection"]
        head = "\r\n".join([f"{self.method} {target} HTTP/1.1", "Connection: Upgrade", *kept])
        return (head + "\r\n\r\n").encode("latin-1")


class Response:
    """An answer to a plain HTTP request."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.body = body
        self.headers = {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}

    def encode(self, *, with_body: bool, keep_alive: bool, minor: int) -> bytes:
        """Return the bytes to send. `with_body` is False for HEAD."""
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines.append(f"Content-Length: {len(self.body)}")
        if not keep_alive:
            lines.append("Connection: close")
        elif minor == 0:
            lines.append("Connection: keep-alive")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        return head + self.body if with_body else head


class Handshakes:
    """Accepts connections, and holds those without a complete request. On one event loop's thread."""

    def __init__(
        self,
        respond: Callable[[Request], Response | Awaitable[Response]],
        make_protocol: Callable[[], asyncio.BufferedProtocol],
        certificates: Certificates | None,
        most: int,
        refusal: Callable[[socket.socket], str | None] | None = None,
    ) -> None:
        """`refusal`: returns why an accepted connection is closed at once; None: it is not."""
        self._refusal = refusal
        self._respond = respond
        self._make_protocol = make_protocol
        self._certificates = certificates
        self._most = max(1, min(most, MOST_HANDSHAKES))
        self._descriptors = descriptor_limit()
        self._highest = self._descriptors - _reserve(self._descriptors)
        self._waiting: dict[_Arrival, None] = {}
        self._log = BoundedLog(log)
        self.turned_away = 0
        """Connections that were closed to keep descriptors for the engine, or for newer connections."""

    def __len__(self) -> int:
        return len(self._waiting)

    async def accept_from(self, listener: socket.socket) -> None:
        """Accept connections until cancelled. No client can end this."""
        # Not `loop.sock_accept`: if it is cancelled just when a client has come, it drops the socket without closing
        # it.
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = listener.accept()
                accepted.setblocking(False)
            except (BlockingIOError, InterruptedError):
                await _readable(loop, listener)
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    # Other parts of the process have used up the reserved descriptors.
                    self._log.warning("no connection can be accepted: %s", error)
                    self._make_room(SLACK)
                    await asyncio.sleep(RETRY_S)
                elif listener.fileno() < 0:
                    return
                continue  # the client had left before it was accepted
            # 0: other tasks get their turn, however many clients come.
            await asyncio.sleep(CLOSING_S if self._admit(loop, accepted) else 0)

    def _admit(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> bool:
        """Keep a new connection, or close it. True: descriptors run short, so pause before the next one."""
        if self._refusal is not None and (reason := self._refusal(accepted)) is not None:
            self._log.warning("a connection was refused: %s", reason)
            accepted.close()
            return False
        # A new descriptor is the lowest free number, so its value tells how many are in use without counting them.
        crowded = 0 < self._highest <= accepted.fileno()
        if crowded or len(self._waiting) >= self._most:
            made_room = self._make_room(SLACK if crowded else 1)
            if crowded and (not made_room or accepted.fileno() >= self._highest + SLACK):
                self._log.warning(
                    "a connection was refused: the process may have %d open files, and the last %d are kept for "
                    "the engine; raise the limit (ulimit -n)",
                    self._descriptors,
                    _reserve(self._descriptors),
                )
                self.turned_away += 1
                accepted.close()
                return True
        arrival = _Arrival(self, accepted)
        self._waiting[arrival] = None
        tls = None if self._certificates is None else self._certificates.current()
        arrival.task = loop.create_task(arrival.begin(tls))
        return crowded

    def _make_room(self, wanted: int) -> bool:
        """Close the connections that have waited longest without a request: an honest client takes milliseconds."""
        oldest = list(itertools.islice(self._waiting, wanted))
        for arrival in oldest:
            self.turned_away += 1
            arrival.end()
        return bool(oldest)

    def close(self) -> None:
        """Close every connection that waits."""
        for arrival in list(self._waiting):
            arrival.end()


async def _readable(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
    """Wait for a client."""
    came = asyncio.Event()
    loop.add_reader(listener, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(listener)


class _Arrival(asyncio.BufferedProtocol):
    """One connection, from its acceptance to its first upgrade request."""

    def __init__(self, handshakes: Handshakes, accepted: socket.socket) -> None:
        self._handshakes = handshakes
        self._socket = accepted
        self._transport: Any = None
        self._buffer = bytearray(1024)
        self._filled = 0
        self._requests = 0
        self._over = False
        self._answering: asyncio.Task[None] | None = None
        """Waits for an answer that takes time; further requests of the connection wait for it."""
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.end)
        self.task: asyncio.Task[None] | None = None

    async def begin(self, tls: ssl.SSLContext | None) -> None:
        """Create a transport for the socket; with TLS this waits for the handshake."""
        loop = asyncio.get_running_loop()
        try:
            if tls is None:
                await loop.connect_accepted_socket(lambda: self, self._socket)
            else:
                await loop.connect_accepted_socket(
                    lambda: self, self._socket, ssl=tls, ssl_handshake_timeout=HANDSHAKE_S
                )
        except (OSError, EOFError) as error:  # ssl.SSLError is an OSError
            log.debug("a connection ended before its handshake: %s", error)
            self.end()

    def end(self) -> None:
        """Abort the connection, if it still waits here."""
        if not self._leave():
            return
        if self._transport is not None:
            self._transport.abort()
        else:
            if self.task is not None:
                self.task.cancel()
            with contextlib.suppress(OSError):
                self._socket.close()

    def _leave(self) -> bool:
        """Remove it from the waiting connections; False if it was already removed."""
        self._timer.cancel()
        self._over = True
        if self._answering is not None:
            self._answering.cancel()
        return self._handshakes._waiting.pop(self, self) is None

    # ----------------------------------------------------------------------------------------- the loop calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._over:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def eof_received(self) -> bool:
        return False  # earlier requests are answered, then the transport closes

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._filled == len(self._buffer):
            grown = bytearray(min(2 * len(self._buffer), HEAD_BYTES))
            grown[: self._filled] = self._buffer
            self._buffer = grown
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        self._go_on()

    def _go_on(self) -> None:
        """Answer the requests that are complete."""
        while not self._over and self._filled and self._answering is None:
            head, rest = _split(bytes(self._buffer[: self._filled]))
            if head is None:
                if self._filled >= HEAD_BYTES:
                    self._answer(_plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too long"))
                elif self._filled > 8 and not bytes(self._buffer[:8]).split(b" ")[0].isalpha():
                    self._answer(_plain(HTTPStatus.BAD_REQUEST, "this is not an HTTP request"))
                return
            self._take(head, rest)

    def _take(self, head: bytes, rest: bytes) -> None:
        try:
            request = Request(head)
        except ValueError as error:
            self._answer(_plain(HTTPStatus.BAD_REQUEST, str(error)))
            return
        if request.method == "GET" and request.upgrades and request.minor == 1:
            self._hand_over(request.for_picows() + rest)
            return
        self._requests += 1
        keep_alive = request.keeps_alive() and self._requests < MOST_REQUESTS
        self._buffer[: len(rest)] = rest
        self._filled = len(rest)
        response = self._handshakes._respond(request)
        if isinstance(response, Response):
            self._answer(response, request, keep_alive=keep_alive)
        else:
            self._transport.pause_reading()
            self._answering = asyncio.ensure_future(self._answer_later(response, request, keep_alive=keep_alive))

    async def _answer_later(self, response: Awaitable[Response], request: Request, *, keep_alive: bool) -> None:
        try:
            answer = await response
        except Exception:
            log.exception("%s could not be answered", request.path)
            answer = _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "the answer could not be made: see the log of the server")
        self._answering = None
        self._answer(answer, request, keep_alive=keep_alive)
        if not self._over:
            self._transport.resume_reading()
            self._go_on()

    def _answer(self, response: Response, request: Request | None = None, *, keep_alive: bool = False) -> None:
        with_body = request is None or request.method != "HEAD"
        minor = 1 if request is None else request.minor
        self._transport.write(response.encode(with_body=with_body, keep_alive=keep_alive, minor=minor))
        if not keep_alive:
            self._leave()
            self._transport.close()

    def _hand_over(self, received: bytes) -> None:
        """Hand the connection to picows, with what was received."""
        if not self._leave():
            return
        protocol = self._handshakes._make_protocol()
        self._transport.set_protocol(protocol)
        known = self._transport.get_extra_info("socket")
        of_unix = known is not None and known.family == getattr(socket, "AF_UNIX", None)
        protocol.connection_made(
            cast("asyncio.BaseTransport", _UnixTransport(self._transport) if of_unix else self._transport)
        )
        while received and not self._transport.is_closing():
            view = memoryview(protocol.get_buffer(-1))
            taken = min(len(view), len(received))
            view[:taken] = received[:taken]
            received = received[taken:]
            protocol.buffer_updated(taken)


class _UnixTransport:
    """The transport of a Unix socket as picows needs it: picows sets options on the socket that only TCP has."""

    __slots__ = ("_transport", "get_write_buffer_size", "write", "writelines")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        # Called for every message, so bound directly.
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.write = transport.write
        self.writelines = transport.writelines

    def get_extra_info(self, name: str, default: object = None) -> Any:
        found = self._transport.get_extra_info(name, default)
        return _UnixSocket(found) if name == "socket" else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _UnixSocket:
    """A Unix socket that ignores the options of TCP."""

    __slots__ = ("_socket",)

    def __init__(self, known: Any) -> None:
        self._socket = known

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        if level != socket.IPPROTO_TCP:
            self._socket.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int) -> int:
        return 0 if level == socket.IPPROTO_TCP else int(self._socket.getsockopt(level, option))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _split(received: bytes) -> tuple[bytes | None, bytes]:
    """Return the head of a request, None if incomplete, and the rest. Bare line feeds end lines too."""
    ends = [(where, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (where := received.find(mark)) >= 0]
    if not ends:
        return None, received
    where, size = min(ends)
    return received[:where], received[where + size :]


def _plain(status: HTTPStatus, words: str) -> Response:
    return Response(status, words.encode())


class Certificates:
    """The certificate of the server. It is read again when its files have changed."""

    def __init__(self, config: TlsConfig) -> None:
        """Raises ConfigError if it cannot be read."""
        self._certfile = str(expand_home(config.certfile))
        self._keyfile = None if config.keyfile is None else str(expand_home(config.keyfile))
        self._files = [file for file in (self._certfile, self._keyfile) if file is not None]
        self._seen = self._look()
        self._context = self._read()

    def current(self) -> ssl.SSLContext:
        """Return the context for a new connection. If files cannot be used, that is logged and the old one stays."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._read()
            except ConfigError as error:
                log.warning("the renewed certificate could not be loaded, and the previous one stays in use: %s", error)
            else:
                log.info("the renewed certificate in %s was loaded", self._certfile)
        return self._context

    def _look(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                status = os.stat(file)
            except OSError:
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._certfile, self._keyfile)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"cannot use {' and '.join(self._files)}: {error}", key="iii-worker-manager.config.tls"
            ) from error
        return context


def descriptor_limit() -> int:
    """Return how many descriptors the process may have; 0: no limit."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:  # pragma: no cover - as above
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft


def _reserve(limit: int) -> int:
    """Return how many descriptors are reserved for the engine: its store, its configuration, its program."""
    return min(256, max(limit // 8, min(32, limit // 2)))
