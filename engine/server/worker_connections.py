"""The connection of a worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import picows

from scopestate.server.connections import TEXT, TURN, Batches, Connection

if TYPE_CHECKING:
    from scopestate.server.access import Access
    from scopestate.server.worker import Worker
    from scopestate.server.workers import Hub


class WorkerConnection(Connection):
    """A worker's connection: its conversation decides, the hub does."""

    def __init__(
        self,
        hub: Hub,
        access: Access | None,
        batches: Batches,
        max_message_bytes: int,
        max_unsent: int,
        max_sent_bytes: int,
        *,
        carries_depth: bool,
    ) -> None:
        """`max_sent_bytes`: the largest message that the worker takes; `carries_depth`: as `WorkerSession`."""
        super().__init__(batches, max_message_bytes, max_unsent)
        self._hub = hub
        self._access = access
        self._max_sent_bytes = max_sent_bytes
        self._carries_depth = carries_depth
        self._worker: Worker | None = None

    def on_open(self) -> None:
        peer = self._socket.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else None
        self._worker = self._hub.connect(
            self._access, address, self.send, self.close, self._max_sent_bytes, carries_depth=self._carries_depth
        )
        self._receive = self._worker.session.receive
        self._act = self._hub.act

    def on_message(self, message: bytes, text: bool) -> None:
        action = self._receive(message, text)
        if action is not None:
            self._act(self._worker, action)  # type: ignore[arg-type]  # set by on_open

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        # The base class's method with `on_message` written out: two calls less in the path that every message takes.
        last = frame.last_in_buffer
        if frame.msg_type == TEXT and frame.fin and not (frame.rsv1 or frame.rsv2 or frame.rsv3):
            if self._plain and self._turn:
                if not last:
                    self._batches.open = True
                self._turn -= 1
                action = self._receive(frame.get_payload_as_bytes(), True)
                if action is not None:
                    self._act(self._worker, action)  # type: ignore[arg-type]  # set by on_open
            elif self._deferring:  # the rest of a long pipeline
                self._backlog.append((frame.get_payload_as_bytes(), True))
            else:
                self._take_rare(transport, frame)
        else:
            self._take_rare(transport, frame)
        if last:
            self._turn = TURN
            if self._batches.open:
                self._batches.finish()

    def on_lost(self) -> None:
        if self._worker is not None:
            self._hub.disconnect(self._worker)

    def close(self, code: int, reason: str = "") -> None:
        super().close(code, reason)
        if self._worker is not None:
            # Nothing more is taken from it, so nobody should wait for it, whenever it may answer the close frame. Soon,
            # not now: this may be called in the middle of a call to that very worker.
            asyncio.get_running_loop().call_soon(self._hub.disconnect, self._worker)

    def __str__(self) -> str:
        return f"worker {self._worker.worker_id}" if self._worker is not None else "a worker"
