"""A scope that lives in another engine: it sends calls, takes answers in, and tells local triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    Overloaded,
    RemoteFailure,
    ScopestateError,
    StorageError,
)
from scopestate.ops.turns import Change, Effects, Turn, changes_in

log = Log("scopestate.scope")

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""

_encode = msgspec.json.Encoder().encode


class Connection(Protocol):
    """A connection to another engine. Every method may be called from any thread."""

    @property
    def reports_changes(self) -> bool:
        """True if the other engine reports every change, those made through here included."""

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0) -> None:
        """Send a call with its input as JSON, and return at once; calls are sent in the order in which they are made.

        `depth`: the event depth of the call, which the other engine gets.

        `done` is called exactly once, later and on another thread, never before `call` returns; it must not block.
        Raises EngineClosed, and calls nothing, if the connection was closed for good.
        """


class _Step:
    """Something that is done once all the calls before it that it depends on have their answers."""

    __slots__ = ("start", "waits_for")

    def __init__(self, start: Callable[[], object]) -> None:
        self.start = start
        self.waits_for = 0
        """How many calls it still waits for."""


class _Call(_Step):
    """One call from its arrival to its answer."""

    __slots__ = ("depth", "followers", "reply", "turn")

    def __init__(self, turn: Turn[Any], reply: ReplyTo, depth: int, start: Callable[[_Call], object]) -> None:
        super().__init__(lambda: start(self))
        self.turn = turn
        self.reply = reply
        self.depth = depth
        self.followers: list[_Step] = []
        """What waits for this call, in the order in which it came."""


class _Answer:
    """The other engine's answer to a call, as a message to the scope."""

    __slots__ = ("call", "error", "result")

    def __init__(self, call: _Call, result: bytes | None, error: ScopestateError | None) -> None:
        self.call = call
        self.result = result
        self.error = error


class ReportedChange:
    """A change that the other engine reported, as a message to the scope, which fires its event."""

    __slots__ = ("depth", "key", "new", "old", "reply")

    def __init__(self, key: str, old: bytes | None, new: bytes | None, reply: ReplyTo, depth: int) -> None:
        self.key = key
        self.old = old
        self.new = new
        self.reply = reply
        self.depth = depth


class _KeyCalls:
    """The calls on one key that are not answered, as far as later ones must wait for them."""

    __slots__ = ("reads", "write")

    def __init__(self) -> None:
        self.write: _Call | None = None
        """The last write."""
        self.reads: dict[_Call, None] = {}
        """The reads behind it."""


class BridgeScope(ScopeActor):
    """One scope of another engine.

    A turn never waits: it sends a call, or takes an answer in. So it may run on any thread, event loops included; the
    caller waits for its reply. The other engine may run two calls of one connection in either order (docs/protocol.md,
    section 1). So a write is sent when every earlier call on its key has its answer, a read when every earlier write of
    its key has, and a list when every earlier write has. Local events are fired in the order of the answers, which for
    one key is the order of its writes.
    """

    def __init__(self, scope: str, around: Surroundings, connection: Connection) -> None:
        super().__init__(scope, around)
        self._connection = connection
        self._open: dict[_Call, None] = {}
        """Calls without an answer, in the order in which they came."""
        self._keys: dict[str, _KeyCalls] = {}

    def has_waiting(self) -> bool:
        return bool(self._open) or super().has_waiting()

    # ------------------------------------------------------------------------------------------------------- ways in

    def send(self, envelope: Envelope) -> None:
        self._take(envelope)

    def take_in(self, item: _Answer | ReportedChange) -> None:
        """Take an answer, or a change, from the connection's thread. Never blocks."""
        self._take(item)

    def _take(self, item: Envelope | _Answer | ReportedChange) -> None:
        # Behind what waits: calls of one thread keep their order even if it does not wait for the first.
        if self._mailbox or self._if_idle(self._handle, item) is BUSY:
            if type(item) is Envelope:
                self._refuse_own_turn()
                self.post(item)
            else:
                # An answer must get in however full the mailbox is: it is what empties it.
                self._enqueue(item)

    # --------------------------------------------------------------------------------------------------------- turns

    def _handle(self, item: Any) -> None:
        kind = type(item)
        if kind is _Answer:
            self._finish(item.call, item.result, item.error)
        elif kind is ReportedChange:
            self._report_change(item)
        elif isinstance(item.message, Ping):
            self._start_behind(list(self._open), _Step(item.reply_to.set))
        elif isinstance(item.message, Housekeeping):
            super()._handle(item)
        elif self._passivated:
            self._forward(item)
        else:
            self._admit(_Call(item.message, item.reply_to, item.depth, self._send))

    def _admit(self, call: _Call) -> None:
        """Send a call, now or behind those that it must not overtake. A refusal is its answer."""
        if call.reply.abandoned:
            return
        try:
            self._check(call)
        except (ScopestateError, HandlerFull) as error:
            call.reply.fail(error)
            return
        self.touched = True
        before = self._calls_before(call)
        self._open[call] = None
        self._start_behind(before, call)

    def _check(self, call: _Call) -> None:
        self._refuse_if_closed(call.depth)
        if len(self._open) >= self.mailbox_limit:
            raise Overloaded(
                f"{len(self._open)} calls on {self.name} are under way, as many as scope_mailbox allows; nothing was "
                "done: slow down, or raise the limit"
            )
        if call.turn.writes:
            for key in call.turn.keys or ():
                self._refuse_if_full(key, call.depth)

    def _calls_before(self, call: _Call) -> dict[_Call, None]:
        """Return the calls that must be answered before this one is sent, and note it for those that come later.

        The last write of a key, and the reads behind it, are enough: they wait for the ones before them.
        """
        turn, before = call.turn, dict[_Call, None]()
        if turn.keys is None:
            before.update((other, None) for other in self._open if other.turn.writes)
            return before
        for key in turn.keys:
            calls = self._keys.get(key)
            if calls is None:
                calls = self._keys[key] = _KeyCalls()
            if turn.writes and calls.reads:
                before.update(calls.reads)
            elif calls.write is not None:
                before[calls.write] = None
            if turn.writes:
                calls.write, calls.reads = call, {}
            else:
                calls.reads[call] = None
        return before

    def _start_behind(self, before: dict[_Call, None] | list[_Call], step: _Step) -> None:
        step.waits_for = len(before)
        for call in before:
            call.followers.append(step)
        if not before:
            step.start()

    def _send(self, call: _Call) -> None:
        turn = call.turn
        try:
            self._connection.call(
                turn.function_id,
                _encode(turn.call(self.scope)),
                lambda result, error: self.take_in(_Answer(call, result, error)),
                call.depth,
            )
        except ScopestateError as error:
            self._enqueue(_Answer(call, None, error))

    def _finish(self, call: _Call, result: bytes | None, error: ScopestateError | None) -> None:
        """Fire the events of a call, give it its answer, and send what has waited for it.

        Events before answers: a caller that has its answer may call drain() and count on the event.
        """
        changes: tuple[Change, ...] = ()
        answer: Any = None
        failure: StorageError | None = None
        try:
            if error is not None:
                raise error
            stored, answer = _effects_of(call.turn, result)
            changes = changes_in(stored)
        except ScopestateError as problem:
            failure = _via_bridge(call.turn, problem)
        except Exception as problem:
            log.exception("%s: reading the answer to a call failed", self.name)  # a bug, which must not hang the caller
            failure = _via_bridge(call.turn, problem)
        if not self._connection.reports_changes:
            for change in changes:
                if self._shut:
                    log.error(
                        "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                        self.name,
                        change.key,
                    )
                else:
                    self._fire(change.key, change.before, change.after, call.depth)
        if failure is not None:
            call.reply.fail(failure)
        else:
            call.reply.set(answer)
        self._end(call)

    def _end(self, ended: _Call) -> None:
        """Forget a call, and start what has waited for it; a call that was given up meanwhile ends as well."""
        ending = [ended]
        while ending:
            call = ending.pop()
            self._forget(call)
            for step in call.followers:
                step.waits_for -= 1
                if step.waits_for:
                    continue
                if isinstance(step, _Call) and step.reply.abandoned:
                    ending.append(step)
                else:
                    step.start()

    def _forget(self, call: _Call) -> None:
        del self._open[call]
        for key in call.turn.keys or ():
            calls = self._keys[key]
            calls.reads.pop(call, None)
            if calls.write is call:
                calls.write = None
            if calls.write is None and not calls.reads:
                del self._keys[key]

    # -------------------------------------------------------------------------------------------------------- events

    def _report_change(self, change: ReportedChange) -> None:
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

    # ------------------------------------------------------------------------------------------------------- leaving

    def _is_needed(self) -> bool:
        return bool(self._open) or super()._is_needed()


def _effects_of(turn: Turn[Any], result: bytes | None) -> Effects[Any]:
    """Return what the other engine has done. Raises RemoteFailure (`serialization_error`) for a result that differs."""
    try:
        return turn.effects_of(result)
    except (msgspec.DecodeError, DeserializationError) as error:
        raise RemoteFailure(
            turn.function_id, "serialization_error", f"its result is not what {turn.function_id} returns: {error}"
        ) from error


def _via_bridge(turn: Turn[Any], error: Exception) -> StorageError:
    """Return the local error for a remote failure (docs/protocol.md, section 13.7)."""
    cause = f"remote error ({error.code}): {error}" if isinstance(error, RemoteFailure) else str(error)
    failure = turn.failed(StorageError(f"{turn.failure.words} via bridge: {cause}"))
    failure.__cause__ = error
    return failure
