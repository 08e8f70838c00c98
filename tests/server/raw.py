"""A worker that says exactly what a test tells it to, over the `websockets` library."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from contextlib import ExitStack
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.connection import Connection

PATIENCE_S = 60.0
"""How long anything may take; only a broken test takes that long."""


class RawWorker:
    """One connection. Messages are dicts; `send` also takes text and bytes as they are."""

    def __init__(self, url: str, *, path: str = "/", greeted: bool = True, **options: Any) -> None:
        options.setdefault("max_size", None)
        self._open = ExitStack()
        opening = connect(url + path, compression=None, open_timeout=PATIENCE_S, **options)
        self.socket: Connection = self._open.enter_context(opening)
        self.worker_id: str | None = None
        if greeted:
            first = self.receive()
            assert first["type"] == "workerregistered"
            self.worker_id = first["worker_id"]

    def send(self, message: dict[str, Any] | str | bytes) -> None:
        """Send one message: a dict as JSON text, text and bytes as they are."""
        self.socket.send(json.dumps(message) if isinstance(message, dict) else message)

    def receive(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the next message."""
        message: dict[str, Any] = json.loads(self.socket.recv(timeout=timeout_s))
        return message

    def invoke(self, function_id: str, data: Any, **fields: Any) -> str:
        """Send a call; return its id."""
        invocation_id = str(uuid.uuid4())
        self.send(
            {
                "type": "invokefunction",
                "invocation_id": invocation_id,
                "function_id": function_id,
                "data": data,
                **fields,
            }
        )
        return invocation_id

    def ask(self, function_id: str, data: Any, **fields: Any) -> dict[str, Any]:
        """Call, and return the whole answer, which must be the next message."""
        invocation_id = self.invoke(function_id, data, **fields)
        answer = self.receive()
        assert answer["type"] == "invocationresult", answer
        assert (answer["invocation_id"], answer["function_id"]) == (invocation_id, function_id)
        return answer

    def call(self, function_id: str, data: Any, **fields: Any) -> Any:
        """Call, and return the result; "no value" is None."""
        answer = self.ask(function_id, data, **fields)
        assert "error" not in answer, answer
        return answer.get("result")

    def register(self, function_id: str, **fields: Any) -> None:
        """Declare a function, and wait until the server knows it."""
        self.send({"type": "registerfunction", "id": function_id, **fields})
        self.settle()

    def trigger(self, function_id: str, config: Any, trigger_type: str = "state", **fields: Any) -> str:
        """Register a trigger, and wait until the server knows it; return its id."""
        trigger_id = fields.pop("id", None) or str(uuid.uuid4())
        self.send(
            {
                "type": "registertrigger",
                "id": trigger_id,
                "trigger_type": trigger_type,
                "function_id": function_id,
                "config": config,
                **fields,
            }
        )
        self.settle()
        return trigger_id

    def settle(self) -> None:
        """Wait until all that was sent is handled: messages are handled in order (docs/reference/protocol.md 1)."""
        self.send({"type": "ping"})
        assert self.receive() == {"type": "pong"}

    def take(self, function_id: str) -> dict[str, Any]:
        """Return the next message, which must be a call of this function."""
        call = self.receive()
        assert (call["type"], call["function_id"]) == ("invokefunction", function_id), call
        return call

    def answer(self, call: dict[str, Any], **outcome: Any) -> None:
        """Answer a call: `result=...`, `error=...`, or neither for "no value"."""
        self.send(
            {
                "type": "invocationresult",
                "invocation_id": call["invocation_id"],
                "function_id": call["function_id"],
                **outcome,
            }
        )

    def closed_with(self) -> tuple[int, str]:
        """Wait until the server closes the connection; return its code and reason."""
        received = None
        while received is None:
            try:
                self.socket.recv(timeout=PATIENCE_S)
            except ConnectionClosed as closed:
                received = closed.rcvd
                if received is None:
                    raise AssertionError("the connection was cut without a close frame") from closed
        return received.code, received.reason

    def close(self) -> None:
        """Go away properly."""
        self._open.close()

    def cut(self) -> None:
        """Go away without a word. The server may have gone first."""
        with contextlib.suppress(OSError):
            self.socket.socket.shutdown(socket.SHUT_RDWR)


def masked(message: dict[str, Any] | bytes, opcode: int = 0x81) -> bytes:
    """One frame of a client, masked with zeros."""
    payload = message if isinstance(message, bytes) else json.dumps(message).encode()
    size = len(payload)
    if size < 126:
        head = bytes([opcode, 0x80 | size])
    elif size < 65536:
        head = bytes([opcode, 0xFE]) + size.to_bytes(2, "big")
    else:
        head = bytes([opcode, 0xFF]) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


class Deaf:
    """A worker that sends and never reads: a bare socket."""

    def __init__(self, server: Any) -> None:
        self.socket = socket.create_connection((server.host, server.port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = self.socket.recv(1)
            if not piece:
                self.socket.close()
                raise AssertionError(f"the server closed the connection in the middle of its answer: {head!r}")
            head += piece

    def send(self, message: dict[str, Any] | bytes, opcode: int = 0x81) -> None:
        """Send one frame."""
        self.socket.sendall(masked(message, opcode))

    def invoke(self, function_id: str, data: Any) -> None:
        """Send a call."""
        invocation_id = str(uuid.uuid4())
        self.send({"type": "invokefunction", "invocation_id": invocation_id, "function_id": function_id, "data": data})

    def invoke_for_ever(self, function_id: str, data: Any) -> None:
        """Send calls until nobody takes them."""
        while True:
            self.invoke(function_id, data)
