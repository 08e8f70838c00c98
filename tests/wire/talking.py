"""A server that a test plays by hand, for clients."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from msgspec import Raw
from websockets.asyncio.server import Server, ServerConnection, serve

from scopestate.wire import frames

PATIENCE_S = 60.0

F = TypeVar("F")


class Peer:
    """One connection, from the server's side: what came, and what to send."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.came: asyncio.Queue[frames.FromWorker] = asyncio.Queue()
        self.raw: list[bytes] = []
        self.headers = socket.request.headers if socket.request is not None else {}

    async def next(self, kind: type[F]) -> F:
        """Wait for the next frame of a kind; others before it are skipped."""
        while True:
            frame = await asyncio.wait_for(self.came.get(), PATIENCE_S)
            if isinstance(frame, kind):
                return frame

    async def next_call(self) -> frames.InvokeFunction:
        """Wait for the next call that wants an answer."""
        while True:
            call = await self.next(frames.InvokeFunction)
            if call.invocation_id is not None:
                return call

    async def send(self, frame: frames.Frame) -> None:
        await self.socket.send(frames.encode(frame), text=True)

    async def answer(self, call: frames.InvokeFunction, result: bytes | None = None, **error: str) -> None:
        body = frames.ErrorBody(**error) if error else None
        raw = frames.ABSENT if result is None else Raw(result)
        await self.send(frames.InvocationResult(str(call.invocation_id), call.function_id, raw, body))

    def drop(self) -> None:
        """Break the connection without a close frame."""
        self.socket.transport.abort()


class PlayedServer:
    """Accepts connections and hands each to the test."""

    def __init__(self) -> None:
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.server: Server | None = None
        self.port = 0
        self.status: int | None = None
        """HTTP status with which to refuse the next connections."""

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def next_peer(self) -> Peer:
        return await asyncio.wait_for(self.peers.get(), PATIENCE_S)

    async def start(self) -> None:
        self.server = await serve(
            self._handle, "127.0.0.1", self.port, compression=None, max_size=None, process_request=self._look
        )
        self.port = next(iter(self.server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self.server is not None:
            for socket in list(self.server.connections):
                socket.transport.abort()
            self.server.close()
            await self.server.wait_closed()

    def _look(self, socket: ServerConnection, request: Any) -> Any:
        return None if self.status is None else socket.respond(self.status, "no")

    async def _handle(self, socket: ServerConnection) -> None:
        peer = Peer(socket)
        await peer.send(frames.WorkerRegistered(str(uuid.uuid4())))
        self.peers.put_nowait(peer)
        try:
            while True:
                data = await socket.recv(decode=False)
                data = data if isinstance(data, bytes) else data.encode()
                peer.raw.append(data)
                peer.came.put_nowait(frames.decode_from_worker(data))
        except Exception:  # noqa: BLE001 - however it ended, it is over
            return


@asynccontextmanager
async def played_server() -> AsyncIterator[PlayedServer]:
    server = PlayedServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
