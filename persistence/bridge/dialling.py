"""Making a connection for calls: the WebSocket handshake, and the first message of the other engine."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Callable, Generator
from typing import Any, Final

from msgspec import Raw
from websockets.client import ClientProtocol
from websockets.exceptions import WebSocketException
from websockets.http11 import Response
from websockets.streams import StreamReader
from websockets.uri import parse_uri

from scopestate.errors import DeserializationError, NotConnected, ScopestateError
from scopestate.ops.values import encode
from scopestate.persistence.bridge.connection import BridgeConnection
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.wire import frames
from scopestate.wire.address import Address
from scopestate.wire.options import LIMIT_HEADER, REFUSALS, ClientOptions, limit_in

_OPEN_S: Final = 10.0
"""Longest time from dialling to the first message."""
_HEAD_BYTES: Final = 1 << 16


class BridgeTarget:
    """The other engine as a target to dial. Methods may be called from any thread, `dial` from one at a time."""

    def __init__(
        self, find: Callable[[], Address], options: ClientOptions, before_calls: Callable[[float], object] | None = None
    ) -> None:
        """`find()` returns where it is; it may raise NotConnected.

        `before_calls(timeout_s)` is called for each connection, before anything is sent on it; it may wait that long.
        """
        self._find = find
        self._options = options
        self._before_calls = before_calls or (lambda timeout_s: None)
        self._dialling: socket.socket | None = None
        self._aborted = False
        self._address = ""
        self.refused = False
        """True if the other engine has refused this one: another attempt will not help."""

    @property
    def address(self) -> str:
        """The address at which it was last, for messages."""
        return self._address or "an address that is not known yet"

    def dial(self) -> BridgeConnection:
        """Make a connection that is ready for calls. Raises NotConnected, which says why."""
        address = self._find()
        self._address = address.url
        self.refused = False
        until = time.monotonic() + _OPEN_S
        sock: socket.socket | None = None
        try:
            sock = address.dial(_OPEN_S, lambda: self._aborted)
            self._dialling = sock.dup()  # with TLS there is another object for the same connection
            if self._aborted:
                raise ConnectionAbortedError("this bridge is closed")
            sock = address.secure_socket(sock)
            connection = self._shake_hands(sock, address, until)
            self._wait_for_welcome(connection, until)
            self._before_calls(until - time.monotonic())
            connection.owe(introduction(self._options.name))
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, NotConnected):
                raise
            if isinstance(error, (OSError, EOFError, Broken, WebSocketException, ScopestateError)):
                # OSError: the port is closed, the host is unknown, TLS failed, or TimeoutError.
                raise NotConnected(f"cannot connect: {str(error) or type(error).__name__} ({address.url})") from error
            raise
        finally:
            dialling, self._dialling = self._dialling, None
            if dialling is not None:
                dialling.close()
        return connection

    def abort(self) -> None:
        """End an attempt in progress, and prevent further ones. From any thread."""
        self._aborted = True
        if (dialling := self._dialling) is not None:
            with contextlib.suppress(OSError):
                dialling.shutdown(socket.SHUT_RDWR)

    def _shake_hands(self, sock: socket.socket, address: Address, until: float) -> BridgeConnection:
        protocol = ClientProtocol(parse_uri(address.request_url))
        request = protocol.connect()
        request.headers.update(address.headers(self._options.request_headers()))
        sock.sendall(request.serialize())
        head, rest = _read_head(sock, until)
        status = head.split(b" ", 2)[1:2]
        if status != [b"101"]:
            raise self._refusal(status[0] if status else b"?", address)
        response = _parsed(head)
        protocol.process_response(response)
        return BridgeConnection(
            sock,
            address.url,
            timeout_s=self._options.call_timeout_s,
            max_bytes=self._options.max_message_bytes,
            most_sent=limit_in(response.headers.get(LIMIT_HEADER), self._options.max_message_bytes),
            received=rest,
            masked=address.path is None,
        )

    def _refusal(self, status: bytes, address: Address) -> NotConnected:
        code = status.decode("ascii", "replace")
        self.refused = code.isdigit() and int(code) in REFUSALS
        hint = "; is the token right?" if code in {"401", "403"} else ""
        return NotConnected(f"the server refused the connection: HTTP {code}{hint} ({address.url})")

    def _wait_for_welcome(self, connection: BridgeConnection, until: float) -> None:
        """Wait for the first message: an engine that refuses this one says so instead."""
        while True:
            message = connection.next_message()
            if message is NOT_ALL:
                left = until - time.monotonic()
                if left <= 0 or not connection.wait(left, None):
                    raise TimeoutError(f"no first message within {_OPEN_S:g} s")
                connection.receive()
                continue
            with contextlib.suppress(DeserializationError):
                match frames.decode_from_server(message):
                    case frames.WorkerRegistered():
                        return
                    case frames.Error(error=frames.ErrorBody(code=code, message=text)):
                        self.refused = code in {"AUTH_ERROR", "FORBIDDEN"}
                        raise NotConnected(f"the server refused this client: {text} ({code}) ({connection.address})")


def introduction(name: str) -> bytes:
    """Return the call that every worker makes first; it has no answer (docs/reference/protocol.md, section 3.1)."""
    about = {
        "runtime": "python",
        "version": platform.python_version(),
        "name": name,
        "os": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "pid": os.getpid(),
    }
    return frames.encode(frames.InvokeFunction("engine::workers::register", Raw(encode(about)), action=frames.Void()))


def _read_head(sock: socket.socket, until: float) -> tuple[bytes, bytes]:
    """Return the head of the response, and the bytes that came after it."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer to the handshake within {_OPEN_S:g} s")
        sock.settimeout(left)
        data = sock.recv(4096)
        if not data:
            raise EOFError("the server closed the connection during the handshake")
        received += data
        if len(received) > _HEAD_BYTES:
            raise OSError("its answer to the handshake is too long")
    return received[: end + 4], received[end + 4 :]


def _parsed(head: bytes) -> Response:
    reader = StreamReader()
    reader.feed_data(head)
    reader.feed_eof()
    parsing: Generator[None, None, Any] = Response.parse(reader.read_line, reader.read_exact, reader.read_to_eof)
    try:
        next(parsing)
    except StopIteration as done:
        response: Response = done.value
        return response
    raise EOFError("its answer to the handshake is incomplete")
