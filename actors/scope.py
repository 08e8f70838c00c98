"""What every scope has, wherever its values are kept: the port between the engine and a backend's scopes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec
import pykka

from scopestate.actors.callbacks import refuse_in_callback, run_callback
from scopestate.actors.containment import Log
from scopestate.actors.ports import Store, WriteRule
from scopestate.actors.pykka_face import PROXIES, Stop
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.turn import BUSY, TurnActor
from scopestate.actors.value_rules import Misfits
from scopestate.actors.wheel import NEVER
from scopestate.errors import DeserializationError, EngineClosed, Overloaded, ReplyTimeout, ScopestateError, Unsupported
from scopestate.ops.arguments import answer_of, turn_of
from scopestate.ops.turns import Turn, no_message

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.clock import Clock
    from scopestate.actors.directory import Directory
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.expiry import ExpiryActor
    from scopestate.actors.router import EventRouter, Expired
    from scopestate.actors.snapshot import SnapshotActor

log: Final = Log("scopestate.scope")

A = TypeVar("A")


class Housekeeping(msgspec.Struct, Generic[A], frozen=True):
    """What the engine itself asks of a scope, with `A` as its answer; needs no values in memory."""


class Collect(Housekeeping[Any], frozen=True):
    """Hand over what changed since the last Collect (`stretch.Collected`), or None. For the actor that saves."""


class Ping(Housekeeping[None], frozen=True):
    """Answered when every message that came before has had its turn."""


class Passivate(Housekeeping[bool], frozen=True):
    """Leave memory, if everything is saved and no call waits. Answer: whether it did."""


class Close(Housekeeping[None], frozen=True):
    """Refuse callers from now on; what is dirty can still be collected."""

    handlers_may: bool
    """True: code that runs in handlers is still served, so that events already fired can do their work."""


class Surroundings:
    """What the scopes of one engine share. Read without locks."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        limits: Limits,
        router: EventRouter,
        snapshot: SnapshotActor,
        directory: Directory,
        clock: Clock,
        rule_of: Callable[[str], WriteRule],
        expiry: ExpiryActor,
    ) -> None:
        self.dispatcher = dispatcher
        self.store: Store | None = None
        self.limits = limits
        self.router = router
        self.snapshot = snapshot
        self.directory = directory
        self.store_id = ""
        """What the cursors of pages name this store by, or this engine if its store has no name."""
        self.clock = clock
        self.rule_of = rule_of
        """Returns what the configuration says about the writes of a scope now."""
        self.expiry = expiry
        self.misfits = Misfits()
        self.highest_forgotten = 0
        """The highest revision of a scope that has left memory, and of which no revision is kept.

        Such a scope may return, and must not assign a revision twice: it begins after this one.
        """

    def keep_in(self, store: Store | None) -> None:
        """Save the scopes that are made from now on in this store; None: nowhere."""
        self.store = store
        self.store_id = (store.id if store is not None else "") or os.urandom(16).hex()

    def note_forgotten(self, revision: int) -> None:
        """Note that a scope leaves memory, with the revision of its last write."""
        self.highest_forgotten = max(self.highest_forgotten, revision)


class ScopeActor(TurnActor):
    """Owns one scope: takes its calls one at a time, and fires their events.

    **Three ways in**, for turns (`ops/turns.py`) whose names and values are checked:

    - `run(turn)` waits for the answer, on the caller's thread.
    - `run_now(turn)` returns the answer if that needs no wait, else BUSY: then the turn was not sent.
    - `send(envelope)` never waits: the answer goes to the envelope's reply. A sender that makes its next call without
      waiting for that reply calls `keep_order()` after it.

    Values in `readable` may be read without a turn.

    **A backend's scope** has at least `send`, which takes envelopes of turns and of `Housekeeping`:

    - It refuses calls after the close (`_refuse_if_closed`), passes on calls that come after it was passivated
      (`_forward`), limits how many calls wait (`post`; `_enqueue` for those without a limit), and does housekeeping in
      `_housekeep`.
    - A write is refused, before anything else, if a handler must catch up (`_refuse_if_full`). Its event is fired
      before it is answered (`_fire`): a caller that has the answer may rely on the event.
    - It overrides `run` and `run_now` if it has a quicker way than `send`, and `_is_needed`, `_note_leaving`,
      `has_waiting`, `holds_keys` and `key_count` where the mailbox alone does not tell the engine enough.
    """

    caller_runs = True

    readable: Mapping[str, bytes] | None = None
    """Key -> JSON, to read without a turn; None: reading takes one. What was read is valid if this is still the same
    object."""

    can_leave = False
    """True of a backend's scope that another one may replace at any time: see `hand_over`."""

    _largest = 1
    """Bytes of the largest message that has ever waited here."""
    _batches = 0
    """Changes whenever messages leave the mailbox."""
    _weighed = (-1, 0)
    """The value of `_batches` when the mailbox was weighed, and the bytes that wait, including messages that came
    since."""

    def __init__(self, scope: str, around: Surroundings) -> None:
        super().__init__(around.dispatcher)
        self.scope = scope
        self._around = around
        self._router = around.router
        self._watch = around.router.triggers.watch(scope)
        self._sequence = around.highest_forgotten
        """The number of the last write; of the last event if the writes are counted elsewhere or not at all."""
        self.rule = around.rule_of(scope)
        """A reload replaces it, on any thread: a turn reads it once."""
        self._closed = False
        self._shut = False
        """Closed for handlers too."""
        self._passivated = False
        self._refusal: Callable[[], Exception] = EngineClosed
        self.touched = True
        """Set by every call; the passivation sweep clears it and takes scopes that it still finds cleared."""

    def apply_rule(self, rule: WriteRule) -> None:
        """Apply another rule from the next turn on. From any thread."""
        self.rule = rule

    @property
    def name(self) -> str:
        return f"scope {self.scope!r}"

    @property
    def mailbox_limit(self) -> int:  # type: ignore[override]  # a reload may change it
        return self._around.limits.scope_mailbox

    def values_now(self) -> list[bytes] | None:
        """Return all values if that needs no turn, else None."""
        readable = self.readable
        if readable is None:
            return None
        values = list(readable.values())
        self.touched = True
        return values if self.readable is readable else None

    def holds_keys(self) -> bool | None:
        """Whether the scope holds a key; None if only its backend knows."""
        return None

    def has_waiting(self) -> bool:
        """True if calls wait or a turn is running."""
        return bool(self._mailbox or self._claim)

    def key_count(self) -> int:
        """Keys in memory."""
        return 0

    def last_revision(self) -> int | None:
        """Return the number of the last write; None if it is not in memory."""
        return None

    def values_in_memory(self) -> list[bytes] | None:
        """Return the values in memory, without a turn: for figures. None: there are none in this engine."""
        return None

    def turn_before_range(self) -> Turn[Any] | None:
        """Return a read to make before a write of a range, so that the write keeps no other caller waiting."""
        return None

    def forget_unused(self) -> None:
        """Drop caches that were not used since the last call of this method. From any thread."""

    def note_cancelled(self) -> None:
        """A task that waited for a call of this scope was cancelled. On its event loop; never waits."""

    def next_due(self) -> int:
        """Return when to look for keys that have expired: the first deadline, or earlier. NEVER if there is none."""
        return NEVER

    # ------------------------------------------------------------------------------------------------------- ways in

    def run(self, turn: Turn[A]) -> A:
        """Run a turn and wait for its answer, at most `call_timeout_s` seconds. Raises what the turn raises."""
        return self.send_and_wait(turn)

    def send_and_wait(self, turn: Turn[A]) -> A:
        """As `run`, always by `send`: for a turn whose answer may have to wait, such as a `Durable` one."""
        timeout_s = self._around.limits.call_timeout_s
        reply: Reply[A] = self._dispatcher.reply()
        self.send(Envelope(turn, reply))
        try:
            return reply.get(timeout=timeout_s)
        except pykka.Timeout as error:
            reply.abandoned = True
            raise ReplyTimeout(self.scope, timeout_s or 0.0) from error

    def run_now(self, turn: Turn[A]) -> A:
        """Return the answer of a turn if it needs no wait, else BUSY: then the turn was not sent. Never waits."""
        del turn
        answer: A = BUSY
        return answer

    def with_durability(self, turn: Turn[A], durable: bool) -> Turn[A]:
        """Return the turn that does the same with `durable` as the caller asks; it may be a `Durable` one.

        Raises Unsupported if that cannot be promised, and DeserializationError for a write that would be less durable
        than the scope's durability says.
        """
        if durable:
            raise Unsupported("`durable=True`", f"scope {self.scope!r} is not saved by this engine")
        return turn

    @abstractmethod
    def send(self, envelope: Envelope) -> None:
        """Take a message. Never waits, not even for a store or a server; the answer goes to the envelope's reply.

        Raises Overloaded if too much waits, and WouldDeadlock if this thread is in the middle of a turn of the scope.
        """

    def housekeep(self, message: Housekeeping[A]) -> A:
        """Do housekeeping for the engine, and wait for it. Limits of the mailbox and time limits do not apply.

        A scope that is overloaded or slow to load must still be saved and closed.
        """
        answer = self.housekeep_now(message)
        if answer is not BUSY:
            return answer
        self._refuse_own_turn()
        reply: Reply[A] = self._dispatcher.reply()
        self._enqueue(Envelope(message, reply))
        return reply.get()

    def housekeep_now(self, message: Housekeeping[A]) -> A:
        """As `housekeep`, but BUSY if the scope is busy: then nothing was done."""
        answer: A = self._if_idle(self._housekeep, message)
        return answer

    def take_from_ref(self, message: Any, reply: Reply[Any] | None) -> None:
        """Take one of the public messages, with Python values."""
        answer = Told() if reply is None else reply
        self._prepare(answer)
        if isinstance(message, Stop):
            log.warning("stop() of scope %r is ignored: close the engine instead", self.scope)
            answer.set(None)
            return
        try:
            envelope = Envelope(self._turn_for(message), answer)
        except ScopestateError as error:
            answer.fail(error)
            return
        answer.convert = lambda result: answer_of(message, result)
        self.send(envelope)
        self.keep_order()

    def _turn_for(self, message: Any) -> Turn[Any]:
        if isinstance(message, PROXIES):
            raise no_message(message)
        refuse_in_callback()
        turn, durable = turn_of(message, self._around.limits, run_callback)
        if message.scope != self.scope:
            raise DeserializationError(f"a message for scope {message.scope!r} was sent to scope {self.scope!r}")
        return turn if durable is None else self.with_durability(turn, durable)

    # --------------------------------------------------------------------------------------------------- queueing

    def post(self, item: Envelope) -> None:
        try:
            self._refuse_bytes(item)
            super().post(item)
        except Overloaded:
            self._router.backlog.refused.add()
            raise

    def _refuse_bytes(self, envelope: Envelope) -> None:
        """Raise Overloaded if what waits holds too many bytes. A message into an empty mailbox is always taken."""
        limit = self._around.limits.scope_mailbox_bytes
        size, mailbox = weight(envelope), self._mailbox
        self._largest = max(self._largest, size)
        if not limit or len(mailbox) * self._largest < limit:
            return
        # Weighed once for each batch that leaves the mailbox, not for each message that arrives.
        batches, waiting = self._weighed
        if batches != self._batches:
            batches = self._batches
            waiting = sum(map(weight, mailbox[:]))
            self._weighed = batches, waiting
        if waiting < limit:
            self._weighed = batches, waiting + size
        else:
            raise Overloaded(
                f"messages with {waiting} bytes of values already wait for {self.name}, as much as scope_mailbox_bytes "
                "allows; nothing was done: slow down, or raise the limit"
            )

    def _drain_mailbox(self) -> None:
        self._batches += 1
        super()._drain_mailbox()
        self._batches += 1  # in case it was weighed after the first line and before the batch left

    # ------------------------------------------------------------------------------------------------------- refusing

    def _refuse_if_closed(self, depth: int) -> None:
        """Raise the error of a closed scope for a call that is made `depth` handlers deep."""
        if self._closed and (self._shut or not depth):
            raise self._refusal()

    def hand_over(self, successor: ScopeActor) -> None:
        """Leave permanently. Calls that were not begun go into the mailbox of the successor, in their order.

        Within `run_alone`, and before any caller can find the successor: the directory calls it. No operation of the
        backend is in progress any more. A thread that leaves a message here later passes it on before it makes its next
        call.
        """
        raise NotImplementedError

    def _forward(self, envelope: Envelope) -> None:
        """Pass a call on to the actor that has replaced this one. A refusal is its answer: nothing is raised."""
        try:
            successor = self._around.directory[self.scope]
            successor.post(envelope)
            successor.keep_order()
        except ScopestateError as error:
            envelope.reply_to.fail(error)

    # --------------------------------------------------------------------------------------------------------- events

    def _refuse_if_full(self, key: str, depth: int) -> None:
        """Before a write is sent: a full handler must stop it, not lose its event. Raises HandlerFull."""
        self._router.check_room(self.scope, self._watch, key, depth)

    def _fire(self, key: str, old: bytes | None, new: bytes | None, depth: int, expired: Expired | None = None) -> None:
        """Publish the event of one change, which has happened."""
        self._sequence += 1
        router = self._router
        events = router.prepare_late(self.scope, self._watch, key, old, new, self._sequence, depth, expired)
        router.publish(events)

    # -------------------------------------------------------------------------------------------------- housekeeping

    def _receive(self, message: Any) -> Any:
        return self._housekeep(message) if isinstance(message, Housekeeping) else self.on_receive(message)

    def _housekeep(self, message: Housekeeping[Any]) -> Any:
        match message:
            case Passivate():
                return self._passivate()
            case Close(handlers_may=handlers_may):
                self._close(handlers_may)
            case Ping() | Collect():  # of most scopes nothing is collected: the backend has it
                pass
            case _:
                raise TypeError(f"not housekeeping: {message!r:.80}")
        return None

    def _close(self, handlers_may: bool) -> None:
        self._closed = True
        self._shut = not handlers_may

    def _passivate(self) -> bool:
        if self._closed or self._is_needed():
            return False
        self._note_leaving()
        if not self._around.directory.let_go(self, self._router.triggers.forget):
            return False
        self._passivated = True
        return True

    def _is_needed(self) -> bool:
        """True while a call waits, or something of the scope exists only here."""
        return bool(self._mailbox)

    def _note_leaving(self) -> None:
        """The actor is about to leave memory: its event numbers must not be given again."""
        self._around.note_forgotten(self._sequence)

    def disown(self, refusal: Callable[[], Exception]) -> None:
        """In a forked child: refuse every later turn. The claim may belong to a thread that does not exist here."""
        self._refusal = refusal
        self.readable = None
        self._closed = self._shut = self._direct = True
        self._claim = {}
        self._mailbox = []  # the parent's: a second message of a ref would wait after them without end


class Told(Reply[Any]):
    """The reply to a Pykka ref's `tell`: no caller reads it, so a refusal is logged."""

    def fail(self, error: BaseException) -> None:
        log.error("a message told to a scope was refused: %s", error, exc_info=error)


def weight(item: object) -> int:
    """Return about how many bytes of values something in the mailbox holds."""
    message = item.message if isinstance(item, Envelope) else None
    return message.size() if isinstance(message, Turn) else 0
