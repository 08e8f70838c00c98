"""A scope that lives in another engine: it sends calls, processes the answers, and fires events for local triggers."""

from __future__ import annotations

from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec
import pykka

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.functions import running_loop
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY, HOLDER
from scopestate.errors import (
    BatchTooLarge,
    CallTimeout,
    Conflict,
    ConnectionLost,
    DeserializationError,
    EngineClosed,
    MessageTooLarge,
    NotConnected,
    Overloaded,
    RemoteFailure,
    ReplyTimeout,
    ScopestateError,
    StorageError,
    Unsupported,
    UpdateRefused,
)
from scopestate.ops.remote import Everything
from scopestate.ops.requests import OPTIONS
from scopestate.ops.transactions import DeliveryBatch
from scopestate.ops.turns import Delete, Effects, Get, Items, List, Set, Stored, Turn, Update, changes_in
from scopestate.ops.writes import Durable, Once, unwrapped
from scopestate.persistence.bridge.calls import Done, RemoteCall, TurnCall
from scopestate.persistence.bridge.computed import Computation, Here, Waiter, compute, is_computed, needs_of
from scopestate.persistence.bridge.leading import FREQUENT, Late, LeadingScope
from scopestate.signals import certainly
from scopestate.wire.features import Needs
from scopestate.wire.refusals import raised_by, refusal_of

if TYPE_CHECKING:
    from scopestate.persistence.bridge.owner import BridgeConnectionOwner

log = Log("scopestate.scope")

A = TypeVar("A")

_encode: Final = msgspec.json.Encoder().encode

MOST_REPEATS: Final = 10
"""How often a read, or a write with an idempotency key, is sent again after its connection was lost."""

_REFERENCE: Final = frozenset({Delete, Everything, Get, Items, List, Set, Update})
"""Turns that iii 0.11.6 can do as well."""


class Connection(Protocol):
    """A connection to another engine. Every method may be called from any thread."""

    @property
    def reports_changes(self) -> bool:
        """True if the other engine reports every change, including those made through this bridge."""

    @property
    def transparent(self) -> bool:
        """True if errors of the other engine are raised unchanged: it is the owner of the same directory."""

    @property
    def leaving(self) -> bool:
        """True once no call is sent any more, because another backend takes over the scopes.

        Calls that then end with NotConnected or EngineClosed were not sent.
        """

    @property
    def owner(self) -> BridgeConnectionOwner | None:
        """The connection owner, if callers may drive the connection themselves; then they use it instead of `call`."""

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0, needs: Needs | None = None) -> None:
        """Send a call with its input as JSON, and return at once; calls are sent in the order in which they are made.

        `depth`: the event depth of the call, which the other engine gets. `needs`: what that engine must be able to do;
        otherwise the outcome is Unsupported, and nothing was sent.

        `done` is called exactly once, later and on another thread, never before `call` returns; it must not block.
        Raises EngineClosed, and calls nothing, if the connection was closed permanently.
        """


class _Ping:
    """A Ping that waits for the calls before it."""

    __slots__ = ("envelope", "waits_for")

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.waits_for = 0
        """How many calls it still waits for."""


class _Call:
    """One call from its arrival to its answer."""

    __slots__ = ("depth", "followers", "reply", "resent", "runs", "turn", "waits_for")

    def __init__(self, turn: Turn[Any], reply: ReplyTo, depth: int) -> None:
        self.waits_for = 0
        """How many calls before it must have their answers before it is sent."""
        self.turn = turn
        self.reply = reply
        self.depth = depth
        self.resent = 0
        """How often it was sent again because a connection was lost."""
        self.runs = False
        """True while it is computed."""
        self.followers: list[_Call | _Ping] = []
        """The calls and pings that wait for this one, in order of arrival."""


Sent = _Call | TurnCall
"""A call in the tables of a scope."""


class _Answer:
    """The other engine's answer to a call, as a message to the scope."""

    __slots__ = ("call", "error", "result")

    def __init__(self, call: Sent, result: bytes | None, error: ScopestateError | None) -> None:
        self.call = call
        self.result = result
        self.error = error


class _Adopt:
    """A call that its caller has sent and the connection's thread continues, as a message to the scope."""

    __slots__ = ("call",)

    def __init__(self, call: _Call) -> None:
        self.call = call


class _Computed:
    """The outcome of a `modify` or `transact`, as a message to the scope."""

    __slots__ = ("call", "effects", "error")

    def __init__(self, call: Sent, effects: Effects[Any] | None, error: BaseException | None) -> None:
        self.call = call
        self.effects = effects
        self.error = error


class _KeyCalls:
    """The unanswered calls on one key that later ones must wait for."""

    __slots__ = ("reads", "write")

    def __init__(self, only: TurnCall | None) -> None:
        self.write: Sent | None = None
        """The last write."""
        self.reads: dict[Sent, None] = {}
        """The reads after it."""
        if only is not None:
            if only.turn.writes:
                self.write = only
            else:
                self.reads[only] = None


class BridgeScope(LeadingScope):
    """One scope of another engine.

    A turn never waits: it sends a call, or processes an answer. So it may run on any thread, including those of event
    loops; the caller waits for its reply. The other engine may run two calls of one connection in either order
    (docs/reference/protocol.md, section 1). So a write is sent when every earlier call on its keys has its answer, a
    read when every earlier write of its key has, and a list when every earlier write has. A write of the whole scope
    waits for all earlier calls, and all later ones wait for it. Local events are fired in the order of the answers,
    which for one key is the order of its writes.

    The function of a `modify` or `transact` runs on the thread of the caller, or on a worker thread if that caller does
    not wait on a thread of its own: never on the connection's thread, which it would block.
    """

    def __init__(self, scope: str, around: Surroundings, connection: Connection) -> None:
        super().__init__(scope, around)
        self._connection = self._driven = connection
        self._open: dict[Sent, None] = {}
        """Calls without an answer, in order of arrival."""
        self._keys: dict[str, _KeyCalls | TurnCall] = {}
        """The calls in progress for each key; a `TurnCall` with no other call after it is stored directly."""
        self._barrier: Sent | None = None
        """The last write of the whole scope, if it has no answer yet."""

    can_leave = True

    def has_waiting(self) -> bool:
        return bool(self._open) or super().has_waiting()

    # ------------------------------------------------------------------------------------------------------- ways in

    def send_and_wait(self, turn: Turn[A]) -> A:
        if not is_computed(turn):
            return super().send_and_wait(turn)
        timeout_s = self._around.limits.call_timeout_s
        here = Here(self._dispatcher)
        try:
            self.send(Envelope(turn, here))
            here.work_here(timeout_s)
            answer: A = here.answer.get(timeout=timeout_s)
        except BaseException as error:
            certainly(here.give_up)
            if isinstance(error, pykka.Timeout):
                raise ReplyTimeout(self.scope, timeout_s or 0.0) from error
            raise
        return answer

    def with_durability(self, turn: Turn[A], durable: bool) -> Turn[A]:
        return Durable(turn) if durable else turn

    def send(self, envelope: Envelope) -> None:
        self._take(envelope)

    def take_in(self, item: _Computed) -> None:
        """Take the outcome of a computation, from the thread that computed it. Never blocks."""
        self._take(item)

    def _take(self, item: Envelope | _Computed) -> None:
        # After the waiting calls: calls of one thread keep their order even if it does not wait for the first.
        may_turn = not self._mailbox and self._may_turn_here()
        if not may_turn or self._if_idle(self._handle, item) is BUSY:
            if type(item) is Envelope:
                self._refuse_own_turn()
                self.post(item)
                if self._passivated:
                    self._pass_on()
            else:
                # An answer must be accepted even if the mailbox is full: answers empty it.
                self._enqueue(item)

    # --------------------------------------------------------------------------------------------------------- turns

    def _handle(self, item: Any) -> None:
        kind = type(item)
        if kind is Envelope and type(item.reply_to) is TurnCall and self._begin_turn(item.reply_to, item):
            return
        if kind is _Answer:
            self._finish(item.call, item.result, item.error)
        elif kind is _Computed:
            if item.call in self._open:  # else it has ended: its caller was interrupted during the delivery
                self._finish_computed(item.call, item.effects, item.error)
        elif kind is _Adopt:
            if not item.call.reply.abandoned:
                self._note_order(item.call)
                self._open[item.call] = None
        elif kind is Late:
            self._take_late(item)
        elif isinstance(item.message, Ping):
            if self._passivated:
                self._around.directory[self.scope]._enqueue(item)
            else:
                self._start_behind(list(self._open), _Ping(item))
        elif isinstance(item.message, Housekeeping):
            super()._handle(item)
        elif self._passivated:
            self._forward(item)
        else:
            self._admit(_Call(item.message, item.reply_to, item.depth))

    def _admit(self, call: _Call) -> None:
        """Send a call, now or after those that it must not overtake. A refusal is its answer."""
        if call.reply.abandoned:
            return
        try:
            self._refuse(call.turn, call.depth)
        except (ScopestateError, HandlerFull) as error:
            call.reply.fail(error)
            return
        self.touched = True
        before = self._note_order(call)
        self._open[call] = None
        self._start_behind(before, call)

    def _refuse(self, turn: Turn[Any], depth: int) -> None:
        self._refuse_if_closed(depth)
        if len(self._open) >= self.mailbox_limit:
            raise Overloaded(
                f"{len(self._open)} calls on {self.name} are in progress, as many as scope_mailbox allows; nothing was "
                "done: slow down, or raise the limit"
            )
        if turn.writes:
            # The keys of a write of the whole scope are known only with its answer: limits do not apply to its events.
            for key in turn.keys or ():
                self._refuse_if_full(key, depth)

    def _note_order(self, call: Sent) -> dict[Sent, None]:
        """Return the calls that must be answered before this one is sent, and record it for later ones.

        The last write of a key and the reads after it are enough: they wait for the calls before them.
        """
        turn, before = call.turn, dict[Sent, None]()
        if turn.keys is None and turn.writes:
            before.update(self._open)
            self._barrier = call
            return before
        if self._barrier is not None:
            before[self._barrier] = None
        if turn.keys is None:
            before.update((other, None) for other in self._open if other.turn.writes)
            return before
        for key in turn.keys:
            calls = self._keys.get(key)
            if calls is None or type(calls) is TurnCall:
                calls = self._keys[key] = _KeyCalls(calls)
            if turn.writes and calls.reads:
                before.update(calls.reads)
            elif calls.write is not None:
                before[calls.write] = None
            if turn.writes:
                calls.write, calls.reads = call, {}
            else:
                calls.reads[call] = None
        return before

    def _start_behind(self, before: dict[Sent, None] | list[Sent], step: _Call | _Ping) -> None:
        if not before:
            self._start(step)
            return
        step.waits_for = len(before)
        for call in before:
            call.followers.append(step)

    def _start(self, step: _Call | _Ping) -> None:
        if isinstance(step, _Call):
            self._send(step)
        else:
            step.envelope.reply_to.set()

    def _send(self, call: Sent) -> None:
        if self._connection.leaving:
            return  # it stays open, for `hand_over`
        if is_computed(call.turn):
            self._begin(call)
            return
        try:
            remote = self._remote_call(call.turn, call.depth)
        except Unsupported as error:
            self._enqueue(_Answer(call, None, error))
            return
        remote.done_to = partial(self._answered, call)
        owner = self._connection.owner
        if owner is not None:
            waiter = call.reply.loop_reply
            # Another thread may handle the answer that the call of a task waits for.
            if waiter is not None and waiter.loop is running_loop() and self._may_turn_here():
                remote.loop = waiter.loop
            owner.submit(remote)
            return
        try:
            self._connection.call(remote.function_id, remote.payload, remote.done_to, remote.depth, remote.needs)
        except ScopestateError as error:
            self._enqueue(_Answer(call, None, error))

    def _answered(self, call: Sent, result: bytes | None, error: ScopestateError | None) -> None:
        """Take an answer from the connection's thread. Never blocks."""
        # As `_take`, but with a message only if it must wait: this happens for each call.
        answer = call, result, error
        if self._mailbox or self._if_idle(self._finish_answered, answer) is BUSY:
            self._enqueue(_Answer(*answer))

    def _finish_answered(self, answer: tuple[Sent, bytes | None, ScopestateError | None]) -> None:
        self._finish(*answer)

    def _remote_call(self, turn: Turn[Any], depth: int) -> RemoteCall:
        """See `LeadingScope`. Raises Unsupported for a delivery that is over."""
        if type(turn) is DeliveryBatch and turn.fence.setdefault("won", "turn") != "turn":
            raise Unsupported("the transaction of a delivery", "its attempt has ended before its turn came")
        function_id, payload, needs = message_of(turn, self.scope)
        return RemoteCall(function_id, payload, None, depth, needs)

    def _begin(self, call: Sent) -> None:
        """Start the computation of a `modify` or `transact`: by its caller, or on a worker thread."""
        call.runs = True
        computation = Computation(
            lambda: self._compute(call), lambda effects, error: self.take_in(_Computed(call, effects, error))
        )
        if isinstance(call.reply, Here):
            call.reply.grant(computation)
        else:
            self._dispatcher.submit_program(computation.run)

    def _compute(self, call: Sent) -> Effects[Any]:
        """Compute it on this thread, which waits for the answers of the other engine."""
        writes = needs_of(call.turn)

        def ask(turn: Turn[Any]) -> Effects[Any]:
            for attempt in range(MOST_REPEATS + 1):
                try:
                    return _effects_of(turn, self._ask(turn, call.depth, writes))
                except RemoteFailure as failure:
                    raise refusal_of(failure) or failure from failure
                except (EngineClosed, NotConnected) as error:
                    if self._connection.leaving:
                        raise _NotDone from error
                    raise
                except ConnectionLost:
                    if attempt == MOST_REPEATS or (turn.writes and not _may_be_sent_again(turn)):
                        raise
            raise AssertionError("the last attempt has raised")

        return compute(call.turn, self.scope, self._around.limits, ask)

    def _ask(self, turn: Turn[Any], depth: int, later: Needs | None) -> bytes | None:
        """Run a turn in the other engine, and wait for its answer. Raises the error of the call."""
        remote = self._remote_call(turn, depth)
        if remote.needs is not None and later is not None:
            remote.needs = remote.needs._replace(later=later)
        owner = self._connection.owner
        if owner is None:
            waiter = Waiter()
            self._connection.call(remote.function_id, remote.payload, waiter.done, depth, remote.needs)
            return waiter.get()
        owner.call(None, remote, None)
        if remote.error is not None:
            raise remote.error
        result: bytes | None = remote.answer
        return result

    # --------------------------------------------------------------------------------------------- for LeadingScope

    def _is_free(self) -> bool:
        return not (self._open or self._mailbox or self._passivated or self._connection.leaving) and self._direct

    def _outcome(self, turn: Turn[A], remote: RemoteCall) -> Effects[A] | Exception | None:
        error = remote.error
        if isinstance(error, ConnectionLost) and _may_be_sent_again(turn):
            return None
        if error is not None:
            return self._failure(turn, error)
        try:
            return _effects_of(turn, remote.answer)
        except Exception as problem:
            if is_from_outside(problem):
                raise
            return self._failure(turn, problem)

    def _adopt(self, call: TurnCall, remote: RemoteCall) -> _Adopt:
        sent = _Call(call.message, call, call.depth)
        remote.done_to = partial(self._answered, sent)
        return _Adopt(sent)

    # ------------------------------------------------------------------------------------- frequent calls, in one step

    def _begin_turn(self, call: TurnCall, item: Envelope) -> bool:
        """Send a call as `_admit` does, in fewer steps, if it is a frequent one and the only one on its key.

        False: nothing was done. Otherwise the call itself is put into the tables and given to the connection; from then
        on it is like any other call.
        """
        turn, owner = item.message, self._connection.owner
        if type(turn) not in FREQUENT or owner is None or call.home is not None:
            return False
        if item.depth or type(item.depth) is not int:  # from a handler, or with a trace
            return False
        key = turn.key
        if self._passivated or self._closed or self._barrier is not None or key in self._keys:
            return False
        if len(self._open) >= self.mailbox_limit or self._connection.leaving or not owner.is_held_here():
            return False
        if call.gave_up:
            return True
        if turn.writes:
            try:
                self._refuse_if_full(key, 0)
            except (ScopestateError, HandlerFull):
                return False  # `_admit` raises it
        call.payload = _encode(turn.call(self.scope))
        call.function_id = turn.function_id
        if not owner.submit_turn(call):
            return False
        self.touched = True
        call.turn, call.home, call.followers = turn, self, []
        self._open[call] = None
        self._keys[key] = call
        return True

    def finish_turn(self, call: TurnCall, result: bytes | None, over: list[Any]) -> None:
        """Process the answer to such a call, as `_answered` does.

        Calls whose callers may continue are added to `over`.
        """
        claim, me = self._claim, get_ident()
        if claim or self._mailbox or not self._direct or claim.setdefault(HOLDER, me) != me:
            self._answered(call, result, None)
            return
        try:
            stored, call.answer = effects = call.turn.effects_of(result)
        except Exception:  # noqa: BLE001 - read again there, and the caller gets it
            del claim[HOLDER]
            self._answered(call, result, None)
            return
        try:
            if stored:
                self._tell_changes(effects, call.depth)
            call.done = True
            over.append(call)
            if call.followers or self._keys.get(call.turn.key) is not call:
                self._end(call)
            else:
                del self._keys[call.turn.key]
                self._open.pop(call, None)
        finally:
            del claim[HOLDER]
            if self._mailbox:
                self.wake()

    # ------------------------------------------------------------------------------------------------------- answers

    def _finish(self, call: Sent, result: bytes | None, error: ScopestateError | None) -> None:
        """Process the answer to a call; send the call again if the answer was lost and the call may be repeated."""
        if error is not None and self._is_open_on(call, error):
            return
        try:
            if error is not None:
                raise error
            effects = _effects_of(call.turn, result)
        except Exception as problem:  # noqa: BLE001 - the caller gets it
            self._settle(call, (), None, self._failure(call.turn, problem))
        else:
            self._settle(call, effects[0], effects[1], None)

    def _is_open_on(self, call: Sent, error: ScopestateError) -> bool:
        """True if a call that has failed is still open: it was sent again, or is left for `hand_over`."""
        if isinstance(error, EngineClosed | NotConnected) and self._connection.leaving:
            return True
        if (
            isinstance(error, ConnectionLost)
            and _may_be_sent_again(call.turn)
            and call.resent < MOST_REPEATS
            and not (call.reply.abandoned or self._shut)
        ):
            call.resent += 1
            self._send(call)
            return True
        return False

    def _finish_computed(self, call: _Call, effects: Effects[Any] | None, error: BaseException | None) -> None:
        if isinstance(error, _NotDone):
            self._end(call)
            self._hand_on(call)
        elif effects is not None:
            self._settle(call, effects[0], effects[1], None)
        elif isinstance(error, _REMOTE):
            self._settle(call, (), None, self._failure(call.turn, error))
        else:
            self._settle(call, (), None, error)  # an error of the function or of this side reaches the caller unchanged

    def _failure(self, turn: Turn[Any], problem: Exception) -> ScopestateError:
        """Return the error that the caller gets for a failure."""
        if isinstance(problem, RemoteFailure):
            refusal = raised_by(problem) if self._connection.transparent else refusal_of(problem)
            if refusal is not None and refusal is not problem:
                return refusal
        if isinstance(problem, Conflict):  # of a transaction, whose answer does not name the scope
            return problem if problem.scope else Conflict(self.scope, problem.conflicts)
        if isinstance(problem, UpdateRefused):
            return problem if problem.scope else UpdateRefused(self.scope, problem.errors)
        if isinstance(problem, Unsupported | BatchTooLarge):  # refused here, before anything was sent
            return problem
        if not isinstance(problem, ScopestateError):
            log.error("%s: reading the answer to a call failed", self.name, exc_info=problem)  # a bug: do not hang
        return _unreachable(turn, problem) if self._connection.transparent else _via_bridge(turn, problem)

    def _settle(self, call: Sent, stored: tuple[Stored, ...], answer: Any, failure: BaseException | None) -> None:
        """Fire the events of a call, give it its answer, and send the calls that have waited for it.

        Events before answers: a caller that has its answer may call drain() and rely on the event.
        """
        self._tell_changes((stored, answer), call.depth)
        owner = self._connection.owner
        if owner is not None:
            owner.tell(call.reply, answer, failure)
        elif failure is not None:
            call.reply.fail(failure)
        else:
            call.reply.set(answer)
        self._end(call)

    def _tell_changes(self, effects: Effects[Any], depth: int) -> None:
        if self._connection.reports_changes:
            return
        for change in changes_in(effects[0]):
            if self._shut:
                log.error(
                    "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                    self.name,
                    change.key,
                )
            else:
                self._fire(change.key, change.before, change.after, depth)

    def _end(self, ended: Sent) -> None:
        """Forget a call, and start those that have waited for it; abandoned ones end as well."""
        ending: list[Sent] = [ended]
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
                    self._start(step)

    def _forget(self, call: Sent) -> None:
        self._open.pop(call, None)
        if self._barrier is call:
            self._barrier = None
        for key in call.turn.keys or ():
            calls = self._keys.get(key)
            if calls is None:
                continue  # this scope has left
            if type(calls) is TurnCall:
                if calls is call:
                    del self._keys[key]
                continue
            calls.reads.pop(call, None)
            if calls.write is call:
                calls.write = None
            if calls.write is None and not calls.reads:
                del self._keys[key]

    # ------------------------------------------------------------------------------------------------------- leaving

    def _is_needed(self) -> bool:
        return bool(self._open) or super()._is_needed()

    def hand_over(self, successor: ScopeActor) -> None:
        self._take_in_waiting()
        self._passivated = True
        self._take_in_waiting()  # answers that came up to then; the sender of later ones sees the flag
        envelopes: list[Envelope] = []
        pings: dict[_Ping, None] = {}
        for call in list(self._open):
            pings.update((step, None) for step in call.followers if isinstance(step, _Ping))
            call.followers.clear()
            if not call.runs:
                envelopes.append(_envelope_of(call))
                del self._open[call]
        self._keys.clear()
        self._barrier = None
        envelopes += [ping.envelope for ping in pings]
        envelopes += self._mailbox
        self._mailbox.clear()
        successor._mailbox += envelopes
        successor.keep_order()

    def _take_in_waiting(self) -> None:
        """Process the waiting answers."""
        for item in self._mailbox[:]:
            if type(item) is not Envelope:
                self._mailbox.remove(item)
                self._handle(item)

    def _hand_on(self, call: Sent) -> None:
        """Give a call that was not done to the successor."""
        if not call.reply.abandoned:
            self._forward(_envelope_of(call))

    def _drain_mailbox(self) -> None:
        if self._passivated:
            self._take_in_waiting()
            self._pass_on()
        else:
            super()._drain_mailbox()

    def _pass_on(self) -> None:
        """Give the waiting calls to the successor. On return, it has everything that this thread has left here."""
        self._around.directory.exclusively(self._pass_on_waiting)

    def _pass_on_waiting(self) -> None:
        for item in self._mailbox[:]:
            if type(item) is Envelope:
                self._handle(item)
                self._mailbox.remove(item)


_REMOTE: Final = (
    CallTimeout,
    Conflict,
    ConnectionLost,
    MessageTooLarge,
    NotConnected,
    RemoteFailure,
    Unsupported,
)
"""The errors that a call of the other engine raises."""


class _NotDone(Exception):
    """A `modify` or `transact` has done nothing, because this side is leaving."""


def _envelope_of(call: Sent) -> Envelope:
    envelope = Envelope(call.turn, call.reply)
    envelope.depth = call.depth
    return envelope


def _may_be_sent_again(turn: Turn[Any]) -> bool:
    """Return whether a call has the same effect however often the other engine gets it."""
    if not turn.writes:
        return True
    while isinstance(turn, Durable | Once):
        if isinstance(turn, Once):
            return True
        turn = turn.turn
    return False


def message_of(turn: Turn[Any], scope: str) -> tuple[str, bytes, Needs | None]:
    """Return the call that runs a turn in another engine: function id, input, and what that engine must be able to do.

    None for the last: any engine can do it.
    """
    function_id, fields = unwrapped(turn).function_id, turn.call(scope)
    needs = None if type(turn) in _REFERENCE else _needs(function_id, fields)
    return function_id, _encode(fields), needs


def _needs(function_id: str, fields: dict[str, Any]) -> Needs:
    asked = [name for name, given in fields.items() if not name.startswith("_") and given not in (None, False)]
    options = OPTIONS.get(function_id)
    if options is not None:
        asked = [name for name in asked if name in options.__struct_fields__]
    return Needs(function_id, tuple(asked))


def _effects_of(turn: Turn[Any], result: bytes | None) -> Effects[Any]:
    """Return the effects that the other engine reports.

    Raises RemoteFailure (`serialization_error`) for a result that differs.
    """
    try:
        return turn.effects_of(result)
    except (msgspec.DecodeError, DeserializationError) as error:
        raise RemoteFailure(
            turn.function_id, "serialization_error", f"its result is not what {turn.function_id} returns: {error}"
        ) from error


def _via_bridge(turn: Turn[Any], error: Exception) -> StorageError:
    """Return the local error for a remote failure (docs/reference/protocol.md, section 13.7)."""
    cause = f"remote error ({error.code}): {error}" if isinstance(error, RemoteFailure) else str(error)
    failure = turn.failed(StorageError(f"{turn.failure.words} via bridge: {cause}"))
    failure.__cause__ = error
    return failure


def _unreachable(turn: Turn[Any], error: Exception) -> StorageError:
    """Return the error of a call that the owner of the directory has not answered."""
    failure = turn.failed(error)
    failure.__cause__ = error
    return failure
