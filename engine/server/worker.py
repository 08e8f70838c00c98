"""One connected worker: its connection, and the functions that it executes, as the engine sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec
import picows
from msgspec import Raw

from scopestate.errors import RemoteFailure
from scopestate.ops.deliveries import Delivery, Discard, RetryLater
from scopestate.ops.results import EventType, StateEvent
from scopestate.ops.trace_context import TracedDepth, context_of
from scopestate.ops.values import decode, encode, parse
from scopestate.server.connections import TEXT, TURN, Batches, Connection
from scopestate.snapshots import Caller
from scopestate.wire.frames import ABSENT, ErrorBody
from scopestate.wire.frames import encode as encode_frame
from scopestate.wire.session import value_of

if TYPE_CHECKING:
    from scopestate.server.access import Access
    from scopestate.server.hub import Hub
    from scopestate.wire.frames import InvocationResult, InvokeFunction, RegisterFunction
    from scopestate.wire.session import Execution, Settle, WorkerSession


_SLOW_CALLS: Final = 4
"""Calls of one worker that may hold worker threads of the engine at the same time; further ones wait."""
_MOST_REFUSED: Final = 100
_LONGEST_REFUSED: Final = 200
"""Characters of a reason that are kept for a refused function, as the worker may have sent a long one."""


RETRY_LATER: Final = "RETRY_LATER"
"""The code of an error with which a worker asks for a later delivery, with `seconds` in its `details`."""
DISCARD: Final = "DISCARD"
"""The code of an error with which a worker gives up an event."""
LATER_S: Final = 1.0
"""The default for `seconds`."""


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
        *,
        limited: bool = True,
    ) -> None:
        """`limited`: as `Caller`."""
        self.session = session
        self.worker_id = session.worker_id
        self.access = access
        """The rights of the worker; None: it may do everything."""
        self.caller = Caller(self if access is None else access, limited=limited)
        """Tells callers apart: the workers of one token share the room for snapshots."""
        self.address = address
        self.send = send
        self.close = close
        self.connected_at_ms = time.time_ns() // 1_000_000
        self.metadata: dict[str, Any] = {}
        """What it has said about itself with `engine::workers::register`."""
        self.functions: dict[str, WorkerFunction] = {}
        self.refused: dict[str, str] = {}
        """Function id -> why it was not registered; the last few."""
        self.slow = asyncio.Semaphore(_SLOW_CALLS)
        """Held by its calls that need a worker thread."""
        self.pause_messages: Callable[[], object] = lambda: None
        """Makes its further messages wait until `resume_messages` is called."""
        self.resume_messages: Callable[[], object] = lambda: None
        self.polls: set[asyncio.Task[Any]] = set()
        """Its polls for changes that are not answered yet."""
        self.issued: dict[Execution, int] = {}
        """Calls of this worker that other workers execute -> bytes that each holds here."""

    @property
    def has_calls(self) -> bool:
        """Whether calls that it has made, except polls, are in progress."""
        return self.session.waiting > len(self.polls)

    def answer(self, call: InvokeFunction, result: bytes | None = None, error: ErrorBody | None = None) -> None:
        """Send the outcome of one of its calls, unless it wants none."""
        message = self.session.answer(call, result, error)
        if message is not None:
            self.send(message)

    def sees(self, other: Worker) -> bool:
        """Return whether it may see another worker: the tokens are the same, or its own allows everything."""
        return self.access is None or self.access is other.access or self.access.full

    def note_poll(self, task: asyncio.Task[None]) -> None:
        """Note a poll's task, to end it when the worker is gone: it might wait for long."""
        self.polls.add(task)
        task.add_done_callback(self._poll_ended)

    def _poll_ended(self, task: asyncio.Task[None]) -> None:
        self.polls.discard(task)
        if task.cancelled():
            self.session.waiting -= 1  # the call gets no answer

    def end_polls(self) -> None:
        """End its polls, without an answer."""
        for task in list(self.polls):
            task.cancel()

    def note_refused(self, function_id: str, reason: str) -> None:
        """Remember why a function was not registered: its trigger will be refused with that reason."""
        if len(function_id) > _LONGEST_REFUSED:
            return
        self.refused[function_id] = reason
        if len(self.refused) > _MOST_REFUSED:
            del self.refused[next(iter(self.refused))]


class WorkerConnection(Connection):
    """A worker's connection. Messages go to its session, and the session's actions to the hub."""

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
        """`max_sent_bytes`: the largest message that the worker accepts; `carries_depth`: as in `WorkerSession`."""
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
        self._worker.pause_messages, self._worker.resume_messages = self.pause_messages, self.resume_messages
        self._receive = self._worker.session.receive
        self._act = self._hub.act_of_worker

    def on_message(self, message: bytes, text: bool) -> None:
        action = self._receive(message, text)
        if action is not None:
            self._act(self._worker, action)  # type: ignore[arg-type]  # set by on_open

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        # The base class's method with `on_message` inlined, which saves two calls for every message.
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
            # Nothing more is read from it, so no call may wait until it answers the close frame. The hub is told in the
            # next round of the loop, because this may run within a call to that worker.
            asyncio.get_running_loop().call_soon(self._hub.disconnect, self._worker)

    def __str__(self) -> str:
        return f"worker {self._worker.worker_id}" if self._worker is not None else "a worker"


class WorkerFunction:
    """A function that a worker executes. The engine calls it for triggers and for the embedding program."""

    executed_elsewhere = True

    def __init__(self, hub: Hub, worker: Worker, frame: RegisterFunction) -> None:
        self.hub = hub
        self.worker = worker
        self.frame = frame

    async def __call__(self, payload: object) -> Any:
        """Let the worker execute it. On the server's event loop. Raises RemoteFailure with the worker's error."""
        future: asyncio.Future[InvocationResult] = asyncio.get_running_loop().create_future()

        def settle(outcome: InvocationResult) -> None:
            if not future.done():
                future.set_result(outcome)

        item = _delivered(payload)
        if item is not None:
            metadata = (item if isinstance(item, StateEvent) else item[0]).metadata
            execution = self.send_event(item, settle, None if metadata is None else encode(metadata))
        else:
            execution = self.hub.execute(self, Raw(encode(payload)), settle)
        try:
            outcome = await future
        finally:
            self.hub.drop(execution)
        if item is not None:
            return self.result_for_event(outcome)
        result = self._checked(outcome)
        return decode(parse(result)) if result else None

    async def deliver(self, item: StateEvent | list[StateEvent], delivery: Delivery, consumer: str) -> None:
        """Let the worker handle an event of a durable trigger, or a list of them. On the server's event loop.

        `consumer` is the worker's name for the consumer. Raises what the worker answers: RetryLater, Discard or
        RemoteFailure; and as `Hub.execute`.
        """
        future: asyncio.Future[InvocationResult] = asyncio.get_running_loop().create_future()

        def settle(outcome: InvocationResult) -> None:
            if not future.done():
                future.set_result(outcome)

        data, metadata = delivery_json(item, delivery, consumer)
        execution = self.hub.execute(self, data, settle, depth=_depth_for(item), metadata=metadata, timed=False)
        try:
            outcome = await future
        finally:
            self.hub.drop(execution)
        verdict = verdict_in(outcome)
        if verdict is not None:
            raise verdict
        self._checked(outcome)

    def send_event(
        self, item: StateEvent | list[StateEvent], settle: Settle, metadata: bytes | None = None
    ) -> Execution:
        """Send an event, or the list of a batch, with its trigger's metadata as JSON. See `Hub.execute`."""
        beside = ABSENT if metadata is None else Raw(metadata)
        if isinstance(item, StateEvent):
            data, depth = event_json(item), item.depth
            depth = depth + 1 if type(depth) is int else _depth_for(item)
        else:
            data, depth = batch_json(item), _depth_for(item)
        return self.hub.execute(self, Raw(data), settle, depth=depth, metadata=beside)

    def result_for_event(self, outcome: InvocationResult) -> bool | None:
        """Return False if the answer to an event is a literal `false`, as that of a condition may be; else None."""
        return False if self._checked(outcome) == b"false" else None

    def _checked(self, outcome: InvocationResult) -> bytes:
        error = outcome.error
        if error is not None:
            raise RemoteFailure(self.frame.id, error.code, error.message, error.stacktrace)
        return bytes(value_of(outcome))


def _depth_for(item: StateEvent | list[StateEvent]) -> int:
    """Return the depth of the call that delivers events, with the trace of their writer if all have the same."""
    events = [item] if isinstance(item, StateEvent) else item
    depth = max(event.depth for event in events) + 1
    contexts = {context_of(event.depth) for event in events}
    return TracedDepth.of(depth, contexts.pop() if len(contexts) == 1 else None)


def delivery_json(item: StateEvent | list[StateEvent], delivery: Delivery, consumer: str) -> tuple[Raw, Raw]:
    """Return the data and the metadata of the call that delivers an event of a durable trigger, or a list of them.

    The facts of the delivery are in both: SDKs before 0.22 do not pass metadata to functions.
    """
    facts = encode(
        {
            "id": delivery.id,
            "consumer": consumer,
            "attempt": delivery.attempt,
            "first_at": delivery.first_ms,
        }
    )
    # A list has no place for these facts.
    data = batch_json(item) if isinstance(item, list) else b'%b,"_delivery":%b}' % (event_json(item)[:-1], facts)
    given = delivery.metadata
    metadata = encode(given) if given else b"{}"
    comma = b"," if given else b""
    return Raw(data), Raw(b'%b%b"_delivery":%b}' % (metadata[:-1], comma, facts))


class _Verdict(msgspec.Struct):
    """A function's verdict on a delivery, in its result or in the details of its error."""

    retry_later: float | None = None
    discard: str | None = None
    seconds: float | None = None


class _Result(msgspec.Struct):
    verdict: _Verdict | None = msgspec.field(default=None, name="_delivery")


def verdict_in(outcome: InvocationResult) -> RetryLater | Discard | None:
    """Return the verdict in the answer to a delivery; None if it is plain success or failure.

    Raises RemoteFailure for a verdict that cannot be read: then the delivery has failed.
    """
    error = outcome.error
    try:
        if error is not None:
            if error.code == RETRY_LATER:
                return RetryLater(msgspec.json.decode(error.details or b"{}", type=_Verdict).seconds or LATER_S)
            return Discard(error.message) if error.code == DISCARD else None
        if b'"_delivery"' not in bytes(outcome.result):
            return None
        verdict = msgspec.json.decode(outcome.result, type=_Result).verdict
        if verdict is None:
            return None
        if verdict.discard is not None:
            return Discard(verdict.discard)
        return None if verdict.retry_later is None else RetryLater(verdict.retry_later)
    except (msgspec.DecodeError, RecursionError, ValueError) as problem:
        raise RemoteFailure(
            outcome.function_id, "serialization_error", f"what it reports about its delivery cannot be read: {problem}"
        ) from problem


def _delivered(payload: object) -> StateEvent | list[StateEvent] | None:
    """Return the payload if a trigger can have delivered it, otherwise None."""
    if isinstance(payload, StateEvent):
        return payload
    if type(payload) is list and payload and isinstance(payload[0], StateEvent):
        return payload
    return None


def batch_json(events: list[StateEvent]) -> bytes:
    """Return a list of events as `event_json`."""
    return b"[%b]" % b",".join(map(event_json, events))


_EVENT_HEADS: Final[dict[str, bytes]] = {
    kind: b'{"type":"state","event_type":"%b","scope":' % kind.encode() for kind in get_args(get_args(EventType)[0])
}


def event_json(event: StateEvent) -> bytes:
    """Return the event as handlers receive it (docs/reference/protocol.md 5); its values are inserted unparsed."""
    end = (
        b"}" if event.expired_at is None else b',"expired_at":%d,"late_ms":%d}' % (event.expired_at, event.late_ms or 0)
    )
    # Joined, not formatted: that takes half as long.
    return b"".join(
        (
            _EVENT_HEADS[event.event_type],
            encode_frame(event.scope),
            b',"key":',
            encode_frame(event.key),
            b',"old_value":',
            event.old_json or b"null",
            b',"new_value":',
            event.new_json or b"null",
            end,
        )
    )
