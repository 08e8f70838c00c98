"""Scopes that live in another engine: the turns of this one only send, receive, and tell local triggers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY
from scopestate.errors import (
    EngineClosed,
    Overloaded,
    RemoteFailure,
    ScopestateError,
    StorageError,
)
from scopestate.ops.turns import Turn
from scopestate.persistence.bridge.calls import Done, Outcome, read_answer, request

log = Log("scopestate.scope")


class Connection(Protocol):
    """A connection to another engine. Every method may be called from any thread."""

    @property
    def reports_changes(self) -> bool:
        """True if the other engine reports every change, those made through here included."""

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0) -> None:
        """Send a call with its input as JSON, and return at once; calls are sent in the order in which they are made.

        `depth`: how many handlers deep the call is, for the other engine to know.

        `done` is called exactly once, later and on another thread, never before `call` returns; it must not block.
        Raises EngineClosed, and calls nothing, if the connection was closed for good.
        """


class _Open:
    """One call from its arrival to its answer."""

    __slots__ = ("depth", "key", "reply", "turn")

    def __init__(self, turn: Turn[Any], reply: ReplyTo, depth: int) -> None:
        self.turn = turn
        self.key = None if turn.keys is None else turn.keys[0]
        """None for a call on the whole scope."""
        self.reply = reply
        self.depth = depth


class _Answered:
    """The remote's answer to a call, as a message to the scope."""

    __slots__ = ("error", "open", "result")

    def __init__(self, call: _Open, result: bytes | None, error: ScopestateError | None) -> None:
        self.open = call
        self.result = result
        self.error = error


class RemoteChange:
    """A change that the remote reported, as a message to the scope: local triggers hear of it."""

    __slots__ = ("depth", "key", "new", "old", "reply")

    def __init__(self, key: str, old: bytes | None, new: bytes | None, reply: ReplyTo, depth: int) -> None:
        self.key = key
        self.old = old
        self.new = new
        self.reply = reply
        self.depth = depth


class _Lane:
    """The calls on one key: reads together, a write alone, in the order in which they came."""

    __slots__ = ("reads", "waiting", "writing")

    def __init__(self) -> None:
        self.reads = 0
        self.writing = False
        self.waiting: deque[_Open] = deque()


class RemoteScopeActor(ScopeActor):
    """One scope of a remote engine.

    A turn never waits: it sends, or takes in an answer. So it may run on any thread, event loops included; the caller
    waits for its reply. The remote may run two calls of one connection in either order (docs/protocol.md 1), so a
    key has one write on its way at a time; calls on different keys are on their way together. Local events are fired in
    the order of the answers, which for one key is the order of its writes.
    """

    def __init__(self, scope: str, around: Surroundings, remote: Connection) -> None:
        super().__init__(scope, around)
        self._remote = remote
        self._lanes: dict[str, _Lane] = {}
        self._open: set[_Open] = set()
        self._barriers: list[tuple[set[_Open], Callable[[], object]]] = []

    # --------------------------------------------------------------------------------------- what others ask of it

    def has_waiting(self) -> bool:
        return bool(self._open) or super().has_waiting()

    def send(self, envelope: Envelope) -> None:
        self._take(envelope)

    def _take(self, item: Envelope | _Answered | RemoteChange) -> None:
        # Behind what waits: calls of one thread keep their order even if it does not wait for the first.
        if self._mailbox or self._if_idle(self._handle, item) is BUSY:
            if type(item) is Envelope:
                self._refuse_own_turn()
                self.post(item)
            else:
                # An answer must get in however full the mailbox is: it is what empties it.
                self._enqueue(item)

    def take_in(self, item: _Answered | RemoteChange) -> None:
        """Take an answer, or a change, from the connection's thread. Never blocks."""
        self._take(item)

    # ------------------------------------------------------------------------------------------------------- turns

    def _handle(self, item: Any) -> None:
        kind = type(item)
        if kind is _Answered:
            self._finish(item.open, item.result, item.error)
        elif kind is RemoteChange:
            self._report_change(item)
        elif isinstance(item.message, Ping):
            self._after(set(self._open), item.reply_to.set)
        elif isinstance(item.message, Housekeeping):
            super()._handle(item)
        elif self._passivated:
            self._forward(item)
        else:
            self._admit(item)

    def _admit(self, envelope: Envelope) -> None:
        """Send a call, or have it wait for those that came before; a refusal is its answer."""
        call = _Open(envelope.message, envelope.reply_to, envelope.depth)
        try:
            self._check(call)
        except (ScopestateError, HandlerFull) as error:
            call.reply.fail(error)
            return
        self.touched = True
        self._open.add(call)
        if call.key is None:
            writes = {other for other in self._open if other.turn.writes}
            self._after(writes, lambda: self._send(call))
            return
        lane = self._lanes.get(call.key)
        if lane is None:
            lane = self._lanes[call.key] = _Lane()
        lane.waiting.append(call)
        self._advance(call.key, lane)

    def _check(self, call: _Open) -> None:
        self._refuse_if_closed(call.depth)
        if len(self._open) >= self.mailbox_limit:
            raise Overloaded(
                f"{len(self._open)} calls on {self.name} are under way, as many as scope_mailbox allows; nothing was "
                "done: slow down, or raise the limit"
            )
        if call.turn.writes and call.key is not None:
            self._refuse_if_full(call.key, call.depth)

    def _advance(self, key: str, lane: _Lane) -> None:
        """Send what may go now: the next write, or all reads up to it."""
        waiting = lane.waiting
        while waiting and not lane.writing:
            writes = waiting[0].turn.writes
            if writes and lane.reads:
                return
            call = waiting.popleft()
            if call.reply.abandoned:
                self._closed_call(call)
                continue
            if writes:
                lane.writing = True
            else:
                lane.reads += 1
            self._send(call)
        if not waiting and not lane.writing and not lane.reads:
            self._lanes.pop(key, None)

    def _send(self, call: _Open) -> None:
        function_id, payload = request(self.scope, call.turn)
        try:
            self._remote.call(
                function_id, payload, lambda result, error: self.take_in(_Answered(call, result, error)), call.depth
            )
        except ScopestateError as error:
            self._enqueue(_Answered(call, None, error))

    def _finish(self, call: _Open, result: bytes | None, error: ScopestateError | None) -> None:
        turn = call.turn
        outcome: Outcome | None = None
        failure: Exception | None = None
        try:
            if error is not None:
                raise error
            outcome = read_answer(turn, result)
        except ScopestateError as problem:
            failure = _via_bridge(turn, problem)
        except Exception as problem:
            log.exception("%s: reading the answer to a call failed", self.name)  # a bug, which must not hang the caller
            failure = _via_bridge(turn, problem)
        if (
            call.key is not None
            and outcome is not None
            and outcome.change is not None
            and not self._remote.reports_changes
        ):
            if self._shut:
                log.error(
                    "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                    self.name,
                    call.key,
                )
            else:
                self._fire(call.key, *outcome.change, call.depth)
        # Events before answers: who has the answer may call drain() and count on the event.
        if failure is not None:
            call.reply.fail(failure)
        else:
            call.reply.set(outcome.answer if outcome is not None else None)
        self._closed_call(call)
        if call.key is not None:
            lane = self._lanes[call.key]
            if turn.writes:
                lane.writing = False
            else:
                lane.reads -= 1
            self._advance(call.key, lane)

    def _closed_call(self, call: _Open) -> None:
        self._open.discard(call)
        for waiting, _ in self._barriers:
            waiting.discard(call)
        if self._barriers:
            ready = [action for waiting, action in self._barriers if not waiting]
            self._barriers = [entry for entry in self._barriers if entry[0]]
            for action in ready:
                action()

    def _after(self, calls: set[_Open], action: Callable[[], object]) -> None:
        """Do `action` once all of `calls` have their answers: in the turn that takes in the last of them."""
        if calls:
            self._barriers.append((calls, action))
        else:
            action()

    # ------------------------------------------------------------------------------------------------------ events

    def _report_change(self, change: RemoteChange) -> None:
        try:
            if self._closed:
                raise EngineClosed
            if self._passivated:
                self._around.directory[self.scope]._enqueue(change)
                return
            self._refuse_if_full(change.key, 0)
        except (ScopestateError, HandlerFull) as error:
            change.reply.fail(error)
            return
        self.touched = True
        self._fire(change.key, change.old, change.new, change.depth)
        change.reply.set()

    # ----------------------------------------------------------------------------------------------------- leaving

    def _is_needed(self) -> bool:
        return bool(self._open) or super()._is_needed()


def _via_bridge(turn: Turn[Any], error: Exception) -> StorageError:
    """The local error for a remote failure (docs/protocol.md, section 13.7)."""
    cause = f"remote error ({error.code}): {error}" if isinstance(error, RemoteFailure) else str(error)
    failure = turn.failed(StorageError(f"{turn.failure.words} via bridge: {cause}"))
    failure.__cause__ = error
    return failure
