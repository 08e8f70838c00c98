"""One connected worker: its connection, and the functions that it executes, as the engine sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import picows
from msgspec import Raw

from scopestate.errors import RemoteFailure
from scopestate.ops.results import StateEvent
from scopestate.ops.values import decode, encode, parse
from scopestate.server.connections import TEXT, TURN, Batches, Connection
from scopestate.snapshots import Caller
from scopestate.wire.frames import ErrorBody
from scopestate.wire.session import value_of

if TYPE_CHECKING:
    from scopestate.server.access import Access
    from scopestate.server.hub import Hub
    from scopestate.wire.frames import InvocationResult, InvokeFunction, RegisterFunction
    from scopestate.wire.session import Execution, Settle, WorkerSession


_SLOW_CALLS: Final = 4
"""Calls of one worker that may hold a worker thread of the engine at the same time; more wait."""
_MOST_REFUSED: Final = 100
_LONGEST_REFUSED: Final = 200
"""Characters: what is kept of a refused function is small, whatever the worker sent."""


class TimedOut(ErrorBody, frozen=True):
    """The outcome of a call that its worker did not answer in time."""


class Worker:
    """One connected worker."""

    def __init__(
        self,
        session: WorkerSession,
        access: Access | None,
        address: str | None,
        send: Callable[[bytes], object],
        close: Callable[[int, str], object],
    ) -> None:
        self.session = session
        self.worker_id = session.worker_id
        self.access = access
        """None: it may do everything."""
        self.caller = Caller(self if access is None else access)
        """Tells callers apart: the workers of one token share the room for snapshots."""
        self.address = address
        self.send = send
        self.close = close
        self.connected_at_ms = time.time_ns() // 1_000_000
        self.metadata: dict[str, Any] = {}
        """What it told about itself with `engine::workers::register`."""
        self.functions: dict[str, WorkerFunction] = {}
        self.refused: dict[str, str] = {}
        """Function id -> why it was not registered; the last few."""
        self.slow = asyncio.Semaphore(_SLOW_CALLS)
        """Held by its calls that need a worker thread."""
        self.issued: dict[Execution, int] = {}
        """Calls of this worker that other workers execute -> bytes that each holds here."""

    def answer(self, call: InvokeFunction, result: bytes | None = None, error: ErrorBody | None = None) -> None:
        """Send the outcome of one of its calls, unless it wants none."""
        message = self.session.answer(call, result, error)
        if message is not None:
            self.send(message)

    def sees(self, other: Worker) -> bool:
        """Return whether it may know of another worker: the token is the same, or allows everything."""
        return self.access is None or self.access is other.access or self.access.full

    def note_refused(self, function_id: str, reason: str) -> None:
        """Remember why a function was not registered: its trigger will be refused with that reason."""
        if len(function_id) > _LONGEST_REFUSED:
            return
        self.refused[function_id] = reason
        if len(self.refused) > _MOST_REFUSED:
            del self.refused[next(iter(self.refused))]


class WorkerConnection(Connection):
    """A worker's connection: messages go to its session, and what that asks for to the hub."""

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
        # The base class's method with `on_message` written out: two calls less for every message.
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
            # Nothing more is read from it, so no call may wait until it answers the close frame. In the next round,
            # because this may run within a call to that worker.
            asyncio.get_running_loop().call_soon(self._hub.disconnect, self._worker)

    def __str__(self) -> str:
        return f"worker {self._worker.worker_id}" if self._worker is not None else "a worker"


class WorkerFunction:
    """A function that a worker executes, as the engine calls it: for triggers and for the embedding program."""

    def __init__(self, hub: Hub, worker: Worker, frame: RegisterFunction) -> None:
        self.hub = hub
        self.worker = worker
        self.frame = frame

    async def __call__(self, payload: object) -> Any:
        """Have the worker execute it. On the server's event loop. Raises RemoteFailure with the worker's error."""
        future: asyncio.Future[InvocationResult] = asyncio.get_running_loop().create_future()

        def settle(outcome: InvocationResult) -> None:
            if not future.done():
                future.set_result(outcome)

        if isinstance(payload, StateEvent):
            execution = self.send_event(payload, settle)
        else:
            execution = self.hub.execute(self, Raw(encode(payload)), settle)
        try:
            outcome = await future
        finally:
            self.hub.drop(execution)
        if isinstance(payload, StateEvent):
            return self.result_for_event(outcome)
        result = self._checked(outcome)
        return decode(parse(result)) if result else None

    def send_event(self, event: StateEvent, settle: Settle) -> Execution:
        """Send an event to the worker. As `Hub.execute`."""
        return self.hub.execute(self, Raw(event_json(event)), settle, depth=event.depth + 1)

    def result_for_event(self, outcome: InvocationResult) -> bool | None:
        """Return False if the answer to an event is a literal `false`, as that of a condition may be; else None."""
        return False if self._checked(outcome) == b"false" else None

    def _checked(self, outcome: InvocationResult) -> bytes:
        error = outcome.error
        if error is not None:
            raise RemoteFailure(self.frame.id, error.code, error.message, error.stacktrace)
        return bytes(value_of(outcome))


def event_json(event: StateEvent) -> bytes:
    """Return the event as handlers receive it (docs/protocol.md, section 5); its values are inserted unparsed."""
    more = (
        b"" if event.expired_at is None else b',"expired_at":%d,"late_ms":%d' % (event.expired_at, event.late_ms or 0)
    )
    return b'{"type":"state","event_type":"%b","scope":%b,"key":%b,"old_value":%b,"new_value":%b%b}' % (
        event.event_type.encode(),
        encode(event.scope),
        encode(event.key),
        b"null" if event.old_json is None else event.old_json,
        b"null" if event.new_json is None else event.new_json,
        more,
    )
