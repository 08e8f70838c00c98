"""The connection owner for the calls of a bridge: answers name their calls, and come in any order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.reply import deliver
from scopestate.errors import (
    CallTimeout,
    ConnectionLost,
    DeserializationError,
    MessageTooLarge,
    NotConnected,
    Overloaded,
    ReplyTimeout,
    ScopestateError,
    WouldDeadlock,
)
from scopestate.persistence.bridge.calls import RemoteCall, TurnCall
from scopestate.persistence.bridge.connection import BridgeConnection, Ended
from scopestate.persistence.connections.calls import Call
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.connections.owner import ConnectionOwner
from scopestate.persistence.connections.pump import Means, TimeLimits
from scopestate.wire import frames
from scopestate.wire.calls import failure_of
from scopestate.wire.features import LIST, Features, learn_features, may_change

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.bridge.dialling import BridgeTarget
    from scopestate.persistence.bridge.leading import LeadingScope
    from scopestate.wire.options import ClientOptions


def _demote(record: logging.LogRecord) -> bool:
    """Log at level DEBUG: the connection for events, to the same engine, logs lost and new connections."""
    if record.levelno < logging.ERROR:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(record.levelno)


_log: Final = logging.getLogger("scopestate.persistence.bridge.calls")
_log.addFilter(_demote)

_FRAME_ROOM: Final = 4096
"""Bytes reserved for the rest of a message, in addition to its payload."""


class BridgeConnectionOwner(
    ConnectionOwner["LeadingScope | RemoteCall | TurnCall", "TurnCall | RemoteCall", BridgeConnection]
):
    """Drives the connection for calls.

    Posted items are calls of the other engine, and scopes whose mailboxes wait for a turn. A call that needs a feature
    of the other engine waits until that engine has said what it can do; it is asked once on each connection.
    """

    peer = "the other engine"
    log = _log
    thread_name = "scopestate-bridge-calls"
    prompt = False

    def __init__(
        self,
        target: BridgeTarget,
        options: ClientOptions,
        *,
        pauses_s: tuple[float, float] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """`pauses_s`: the shortest and the longest pause between attempts to connect; None: for an engine elsewhere.

        `describe()` says more about the other engine in the error of a call that it does not answer.
        """
        if pauses_s is not None:
            self.level = logging.DEBUG  # the caller logs what matters
        super().__init__(target, TimeLimits(options.call_timeout_s, options.connect_wait_s), Means(deliver), pauses_s)
        self._bridge_target = target
        self._options = options
        self._describe = describe or (lambda: "")
        self._under_way: dict[str, RemoteCall | TurnCall] = {}
        """Calls in progress by invocation id, in the order in which they were sent."""
        self._features: Features | None = None
        self._asked = False
        self._parked: list[RemoteCall] = []
        """Calls that wait for the features."""

    # --------------------------------------------------------------------------------------------------------- callers

    def fileno(self) -> int:
        """Return the descriptor of the connection's socket; -1 while it is not connected. For a forked child."""
        connection = self._connection
        return -1 if connection is None else connection.fileno()

    def submit(self, call: RemoteCall) -> None:
        """Send a call. Never blocks; its outcome goes to `done_to`, later. From any thread."""
        call.error = self._refusal(call)
        if self.is_held_here() and call.error is None:
            call.since = self._clock()
            self._ready.append(call)
        elif call.loop is not None:
            self.post_on_loop(call, call.loop)
        else:
            self.post(call)

    def submit_turn(self, call: TurnCall) -> bool:
        """Send the call of a turn directly, from the thread that drives the connection.

        False: use `submit`, which says why.
        """
        options, ready = self._options, self._ready
        if len(call.payload) > options.max_message_bytes - _FRAME_ROOM:
            return False
        if len(self._under_way) + len(ready) + len(self._inbox) >= options.max_pending:
            return False
        call.since = self._clock()
        ready.append(call)
        return True

    def tell(self, reply: Any, answer: Any, error: BaseException | None) -> None:
        """Deliver an answer: with all others of this round, if this thread drives the connection."""
        if not self.is_held_here():
            if error is None:
                reply.set(answer)
            else:
                reply.fail(error)
            return
        told: Any = reply if type(reply) is TurnCall else Call(None, reply, 0)
        told.answer, told.error, told.done = answer, error, True
        self.over.append(told)

    def _refusal(self, call: RemoteCall) -> ScopestateError | None:
        if len(call.payload) > self._options.max_message_bytes - _FRAME_ROOM:
            return self._too_large(call, self._options.max_message_bytes)
        if len(self._under_way) + len(self._ready) + len(self._inbox) >= self._options.max_pending:
            return Overloaded(
                f"{self._options.max_pending} calls to {self.address} are in progress; nothing was sent: slow down"
            )
        return None

    def _too_large(self, call: RemoteCall | TurnCall, most: int) -> MessageTooLarge:
        return MessageTooLarge(
            f"the input takes {len(call.payload)} bytes, and a message to {self.address} may take {most}; nothing was "
            "sent: send less at once, or raise the limit"
        )

    def refuse_held_here(self) -> None:
        """Raise WouldDeadlock if this code has interrupted the thread that drives the connection."""
        if self.is_held_here():
            raise WouldDeadlock(
                "a signal handler has interrupted a call to the other engine, and this call needs the same connection: "
                "waiting for it here might never end; nothing was done: let the handler set a flag, or leave the call "
                "to another thread"
            )

    def _abort_attempt(self) -> None:
        self._bridge_target.abort()

    # ------------------------------------------------------------------------------------------------ on its own thread

    def _lead(self, home: LeadingScope | None, call: TurnCall | RemoteCall) -> bool:
        if self._connection is None or self._leaving or self._under_way or self._inbox or self._ready or self._parked:
            return False
        if type(call) is TurnCall:
            assert home is not None
            return home.lead(call, self)
        remote: Any = call
        remote.error = self._refusal(remote)
        if remote.error is not None:
            return True
        ended = self.send_alone(remote)
        if ended is False:
            self.leave_to_thread(remote, remote)
        return ended is not None

    def send_alone(self, call: RemoteCall) -> bool | None:
        """Send a call for the leading caller, and wait a moment. True: it has its outcome. False: it is in progress.

        None: it was not sent, or the other engine has not begun it.
        """
        connection = self._connection
        if connection is None or (call.needs is not None and self._features is None):
            return None
        self._led = call
        # Checked each time: it cannot be known whether a write into a dead connection was applied.
        if connection.is_stale():
            self._drop_idle(connection)
            self._forget_features()
            self._led = None
            return None
        data = self._frame_of(call, connection)
        if data is None:
            self._led = None
            return True
        try:
            message = connection.exchange(data)
            while message is not NOT_ALL and not self._is_answer(call, message):
                message = connection.next_within_moment()
        except Broken as error:
            self._led = None
            self._forget(connection, error)
            self._forget_features()
            if isinstance(error, Ended) and error.goodbye:
                return None
            call.error = self._lost(call, error)
            call.done = True
            return True
        if message is NOT_ALL:
            return False
        self._led = None
        return True

    def leave_to_thread(self, remote: RemoteCall, call: TurnCall | RemoteCall) -> None:
        """Let the I/O thread wait for the answer of a call that was sent, and the caller wait for that thread."""
        self._leave_to_thread(call)
        remote.deadline = self._clock() + self._call_timeout_s
        self._under_way[remote.invocation_id] = remote
        self._led = None

    def _is_answer(self, call: RemoteCall, message: bytes) -> bool:
        """Process a message. True if it is the answer to this call."""
        frame = self._read(message)
        if type(frame) is frames.InvocationResult and frame.invocation_id == call.invocation_id:
            call.error = failure_of(frame, call.function_id)
            call.answer = bytes(frame.result) or None
            call.done = True
            return True
        self._take(frame)
        return False

    def _recover_led(self, home: LeadingScope | None, call: TurnCall | RemoteCall) -> None:
        led: RemoteCall | None = self._led
        if led is not None:
            if not led.done:
                # Its answer may still come, and bytes of it may be lost.
                connection, self._connection = self._connection, None
                if connection is not None:
                    connection.close()
                self._features = None
                self._under_way.pop(led.invocation_id, None)
            self._led = None
        if home is not None and type(call) is TurnCall:
            home.recover_led(call)

    def _queue(self, home: LeadingScope | None, call: TurnCall | RemoteCall) -> None:
        if self._claim:
            self.refuse_held_here()
        if type(call) is RemoteCall:
            call.error = self._refusal(call)
            self.post(call)
        else:
            assert home is not None
            home.enter(call)

    def _find_abandoned(self, home: LeadingScope | None, call: TurnCall | RemoteCall) -> None:
        if home is not None:
            home.wake_anyway()

    def _too_late(self, home: LeadingScope | None, timeout_s: float) -> Exception:
        return ReplyTimeout("" if home is None else home.scope, timeout_s)

    # ------------------------------------------------------------------------------------------- for the claim's holder

    def _sort_in(self, item: LeadingScope | RemoteCall | TurnCall, now: float) -> None:
        if type(item) is not RemoteCall:
            scope: Any = item  # the call of a turn is never posted itself; its scope is
            scope.run_batch()
        elif item.error is not None:
            self._finish(item, None, item.error)
        elif not item.gave_up:
            item.since = now
            self._ready.append(item)

    def _begin(
        self, item: LeadingScope | RemoteCall | TurnCall, connection: BridgeConnection, now: float
    ) -> bytes | None:
        call: Any = item
        if type(item) is TurnCall:
            return self._begin_turn(item, connection, now)
        if call.gave_up:
            return None
        if call.needs is not None and self._features is None:
            self._parked.append(call)
            if self._asked:
                return None
            self._asked = True
            call = RemoteCall(LIST, b"{}", self._learn)
        data = self._frame_of(call, connection)
        if data is None:
            self._finish(call, None, call.error)
            return None
        call.deadline = now + self._call_timeout_s
        self._under_way[call.invocation_id] = call
        self._round += 1
        return data

    def _begin_turn(self, call: TurnCall, connection: BridgeConnection, now: float) -> bytes | None:
        payload = call.payload
        if len(payload) > connection.most_sent - _FRAME_ROOM:
            self._finish(call, None, self._too_large(call, connection.most_sent))
            return None
        call.invocation_id = invocation_id = frames.fresh_id()
        call.deadline = now + self._call_timeout_s
        self._under_way[invocation_id] = call
        self._round += 1
        return connection.frame(frames.call_text(call.function_id, invocation_id, payload, 0))

    def _frame_of(self, call: RemoteCall, connection: BridgeConnection) -> bytes | None:
        """Return the bytes to send for a call. None: it is refused, with its error set."""
        if call.needs is not None:
            assert self._features is not None
            call.error = self._features.refusal(call.needs, self.address)
        if len(call.payload) > connection.most_sent - _FRAME_ROOM:
            call.error = self._too_large(call, connection.most_sent)
        if call.error is not None:
            call.done = True
            return None
        call.invocation_id = frames.fresh_id()
        data = msgspec.Raw(call.payload)
        return connection.frame(frames.call_text(call.function_id, call.invocation_id, data, call.depth))

    def _take_answers(self, connection: BridgeConnection) -> None:
        next_message, under_way = connection.next_message, self._under_way
        while (message := next_message()) is not NOT_ALL:
            frame = self._read(message)
            if type(frame) is not frames.InvocationResult:
                self._take(frame)
            elif (call := under_way.pop(frame.invocation_id, None)) is None:
                pass
            elif type(call) is TurnCall and frame.error is None:
                try:
                    call.home.finish_turn(call, bytes(frame.result) or None, self.over)
                except Exception:
                    self.log.exception("delivering the answer to %s failed", call.function_id)
            else:
                self._finish(call, bytes(frame.result) or None, failure_of(frame, call.function_id))

    def _read(self, message: bytes) -> frames.FromServer | None:
        if message.isascii():
            with suppress(msgspec.DecodeError, RecursionError):
                return frames.read_from_server(message)
        try:
            return frames.decode_from_server(message) if message.strip() else None
        except DeserializationError as error:
            self.log.debug("dropped a message from %s: %s", self.address, error)
            return None

    def _take(self, frame: frames.FromServer | None) -> None:
        match frame:
            case frames.InvocationResult():
                call = self._under_way.pop(frame.invocation_id, None)
                if call is not None:
                    self._finish(call, bytes(frame.result) or None, failure_of(frame, call.function_id))
            case frames.InvokeFunction(function_id=function_id, invocation_id=str(invocation_id)):
                unknown = frames.ErrorBody("function_not_found", f"Function {function_id} not found")
                self._owe(frames.InvocationResult(invocation_id, function_id, frames.ABSENT, unknown))
            case frames.Ping():
                self._owe(frames.Pong())
            case _:
                pass  # not for a connection that only makes calls

    def _owe(self, frame: frames.Frame) -> None:
        if self._connection is not None:
            self._connection.owe(frames.encode(frame))

    def _finish(
        self, call: RemoteCall | TurnCall, result: bytes | None, error: ScopestateError | Exception | None
    ) -> None:
        done_to = call.done_to
        if type(call) is TurnCall:
            done_to = partial(call.home._answered, call)
        else:
            call.answer, call.error, call.done = result, error, True
        if done_to is None:
            self.over.append(call)
            return
        try:
            done_to(result, error)  # type: ignore[arg-type]
        except Exception:
            self.log.exception("delivering the answer to %s failed", call.function_id)

    def _learn(self, result: bytes | None, error: ScopestateError | None) -> None:
        self._features = learn_features(result, error)
        self._asked = False
        self._unpark()

    def _forget_features(self) -> None:
        """Forget the features, because the next connection may be to another engine."""
        self._features = None
        self._asked = False
        self._unpark()

    def _unpark(self) -> None:
        now = self._clock()
        for call in self._parked:
            call.since = now
        self._ready.extendleft(reversed(self._parked))
        self._parked.clear()

    # ---------------------------------------------------------------------------------------------- what goes wrong

    def _lose(self, connection: BridgeConnection | None, error: Broken) -> None:
        if connection is not None:
            with suppress(Broken):
                self._take_answers(connection)  # those that came before the end
        super()._lose(connection, error)

    def _fail_under_way(self, error: Broken) -> None:
        calls = [call for call in self._under_way.values() if call.function_id != LIST or call.done_to != self._learn]
        self._under_way.clear()
        self._forget_features()
        if isinstance(error, Ended) and error.goodbye and not self._ended:
            now = self._clock()
            for call in calls:
                call.since = now
            self._ready.extendleft(reversed(calls))
            return
        for call in calls:
            self._finish(call, None, self._lost(call, error))

    def _lost(self, call: RemoteCall | TurnCall, error: Broken) -> ConnectionLost:
        lost = ConnectionLost(call.function_id, self.address, str(error), may_be_applied=may_change(call.function_id))
        lost.__cause__ = error
        return lost

    def _end_overdue(self, now: float) -> float | None:
        under_way = self._under_way
        while under_way:
            call = next(iter(under_way.values()))
            if call.deadline > now:
                return call.deadline
            del under_way[call.invocation_id]
            late = CallTimeout(
                call.function_id,
                self._call_timeout_s,
                sent=True,
                about=self._describe(),
                may_be_applied=may_change(call.function_id),
            )
            self._finish(call, None, late)
        return None

    def _refuse(self, item: LeadingScope | RemoteCall | TurnCall, error: ScopestateError) -> None:
        if type(item) is RemoteCall or type(item) is TurnCall:
            if isinstance(error, NotConnected) and not self._bridge_target.refused:
                waited = f"waited {self._connect_wait_s:g} s, nothing was sent"
                error = NotConnected(f"{self._attempts.why_not}; {waited}")
            self._finish(item, None, error)
        else:
            scope: Any = item
            scope.work_elsewhere()

    def _pass_on(self) -> None:
        """Refuse the waiting calls if the other engine has refused this one: no further attempt will help."""
        if self._bridge_target.refused:
            self._refuse_waiting(NotConnected(f"{self._attempts.why_not}; nothing was sent"), float("-inf"))

    def _is_of_loop(self, loop: AbstractEventLoop) -> bool:
        return all(call.loop is loop for call in self._under_way.values())
