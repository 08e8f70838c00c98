"""The calls of a client that are under way: what is sent, what waits, who gets which answer."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable

from msgspec import Raw

from scopestate.errors import CallTimeout, NotConnected, RemoteFailure, ScopestateError
from scopestate.wire import frames

log = logging.getLogger("scopestate.wire.client")

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""


class PendingCall:
    """One call, from `post` to its outcome."""

    __slots__ = ("done", "frame", "function_id", "invocation_id", "sent", "timeout_s", "timer")

    def __init__(self, function_id: str, payload: bytes, done: Done, timeout_s: float, baggage: str | None) -> None:
        self.function_id = function_id
        self.invocation_id = str(uuid.uuid4())
        self.done: Done | None = done
        """None once the outcome is there, or nobody waits for it any more."""
        self.frame = frames.encode(
            frames.InvokeFunction(function_id, Raw(payload), self.invocation_id, baggage=baggage)
        )
        self.sent = False
        self.timeout_s = timeout_s
        self.timer: asyncio.TimerHandle | None = None


class PendingCalls:
    """The table of calls under way. On the event loop's thread only.

    A call that was never sent outlives a lost connection and goes out on the next one; one that was sent does not: its
    answer cannot come any more, and it may have been carried out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_id: dict[str, PendingCall] = {}
        self.unsent: deque[PendingCall] = deque()

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, call: PendingCall, wait_s: float, why_not: Callable[[], str | None]) -> None:
        """Queue a call. If it is not sent within `wait_s`, it fails; `why_not()` says why there is no connection."""
        self._by_id[call.invocation_id] = call
        self.unsent.append(call)
        call.timer = self._loop.call_later(wait_s, self._not_sent, call, wait_s, why_not)

    def next_to_send(self) -> PendingCall | None:
        """Take the next call and count it as sent: from here on it may have been carried out."""
        while self.unsent:
            call = self.unsent.popleft()
            if call.done is not None:
                call.sent = True
                if call.timer is not None:
                    call.timer.cancel()
                call.timer = self._loop.call_later(call.timeout_s, self._no_answer, call)
                return call
        return None

    def answer(self, result: frames.InvocationResult) -> None:
        """Hand an answer to its call; one that nobody waits for any more is dropped."""
        call = self._by_id.get(result.invocation_id)
        if call is None or not call.sent:
            log.debug("an answer to a call that is not under way was dropped: %s", result.invocation_id)
            return
        error = result.error
        if error is not None:
            self.settle(call, None, RemoteFailure(call.function_id, error.code, error.message, error.stacktrace))
        else:
            # Absent and null differ: a missing key, and a stored null (docs/protocol.md, section 4.2).
            self.settle(call, bytes(result.result) or None, None)

    def fail_sent(self, error: Callable[[PendingCall], ScopestateError]) -> None:
        """The connection broke: fail every call that was sent on it."""
        for call in [call for call in self._by_id.values() if call.sent]:
            self.settle(call, None, error(call))

    def fail_unsent(self, error: Callable[[], ScopestateError]) -> None:
        """Fail every call that was not sent."""
        for call in [call for call in self._by_id.values() if not call.sent]:
            self.settle(call, None, error())
        self.unsent.clear()

    def forget(self, call: PendingCall) -> None:
        """Nobody waits for this call any more."""
        call.done = None
        self._by_id.pop(call.invocation_id, None)
        if call.timer is not None:
            call.timer.cancel()

    def settle(self, call: PendingCall, result: bytes | None, error: ScopestateError | None) -> None:
        """Deliver the outcome."""
        done = call.done
        self.forget(call)
        if done is not None:
            try:
                done(result, error)
            except Exception:
                log.exception("taking in the answer to %s failed", call.function_id)

    def _not_sent(self, call: PendingCall, wait_s: float, why_not: Callable[[], str | None]) -> None:
        reason = why_not()
        if reason is None:
            self.settle(call, None, CallTimeout(call.function_id, wait_s, sent=False))
        else:
            self.settle(call, None, NotConnected(f"{reason}; waited {wait_s:g} s, nothing was sent"))

    def _no_answer(self, call: PendingCall) -> None:
        self.settle(call, None, CallTimeout(call.function_id, call.timeout_s, sent=True))
