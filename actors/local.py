"""The actor that owns one scope in memory: its turns, and how it is loaded, saved and closed."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, Final, TypeVar

from msgspec import UNSET

from scopestate.actors.answers import NO_ANSWERS, Answers
from scopestate.actors.backlog import HandlerFull
from scopestate.actors.gate import Gate
from scopestate.actors.index import OrderedKeys, TooLong
from scopestate.actors.ports import NO_RULE, Answer, ScopeState, WriteRule
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Collect, Housekeeping, Ping, Surroundings
from scopestate.actors.stretch import LAST_SEQUENCE, MOST_UNSAVED, NO_DEADLINES, Collected, ScopeInMemory, part
from scopestate.actors.turn import BUSY, HOLDER
from scopestate.actors.view import AnswerApart, Apart, InMemory, Unexpired, WithDeadlines
from scopestate.actors.wheel import NEVER, Wheel
from scopestate.errors import (
    Conflict,
    DeserializationError,
    EngineClosed,
    KeyConflict,
    Overloaded,
    StorageError,
    Unsupported,
)
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage, State, Values
from scopestate.ops.results import BatchResult, CasResult, ModifyResult, SetResult
from scopestate.ops.transactions import DeliveryBatch, SetAll
from scopestate.ops.turns import LAST_MS, NO_DEADLINE, Delete, Items, List, Range, Set, Turn, Update, refuse_size
from scopestate.ops.values import encode
from scopestate.ops.writes import DELETE, KEEP, CompareAndSet, Durable, Modify, SetWith, Touch, same_json
from scopestate.signals import certainly
from scopestate.wire.depth import event_depth

A = TypeVar("A")

LATER: Final[Any] = object()
"""The answer of a turn that a worker thread must run."""
_NO_KEYS: Final = OrderedKeys({}, lambda: 0)
_FIRST_KEY: Final = Keys(Range(limit=1))


class LocalScope(ScopeInMemory):
    """Owns one scope in memory. Only the thread that runs its turn changes its values, so no lock guards them.

    A turn decides what changes (`ops/turns.py`), and then that is committed: memory, the changes to save and the events
    happen together or not at all (`actors/stretch.py`). Reading needs no turn.
    """

    __slots__ = ("_acks", "_left", "_saved", "_saving", "pinned")

    def __init__(self, scope: str, around: Surroundings, *, keeps: bool, gated: bool = False) -> None:
        """`keeps`: the store keeps the scope. `gated`: a write counts as done, and is answered, once it is on disk."""
        super().__init__(scope, around, keeps=keeps)
        if gated:
            self._gate = Gate(self, around)
            self._outbox, self._registry = self._gate.outbox, around.snapshot.committing
            self._incoming = self._gate.incoming
        if keeps:
            self._sequence = 0  # until it is loaded
        self._saved = 0
        self._saving = False
        """True if a collected change is not saved yet. `_sequence` does not show that: a new deadline, for example, has
        no number."""
        self._acks: tuple[tuple[int, int], ...] = ()
        """Deliveries that are acknowledged by changes not yet collected."""
        self._left: dict[str, bytes] | None = None
        """The values of a closed scope, visible only to turns of handlers."""
        self.pinned = False
        """True while the store cannot hold one of its values, which then exists only in memory."""
        self._drains = False
        """True while a worker thread handles messages."""
        self._hold(None if keeps else {})

    def _hold(self, values: dict[str, bytes] | None) -> None:
        """Hold these values in memory, with the other tables about them. None: they must be loaded first."""
        self.readable, self._values, self._view, self._timed_view, self._unexpired = None, values, None, None, None
        self._ordered = _NO_KEYS
        if values is not None:
            self._ordered = ordered = OrderedKeys(values, self._creations_now)
            self._view = InMemory(self.scope, self._around, ordered, values, self._revisions, self._answers.kept)
            if self._deadlines:
                self._see_deadlines()
        self._allow_reading()

    def _see_deadlines(self) -> None:
        """Prepare turns and other readers for deadlines or a rule, which the scope may have from now on."""
        if self._deadlines is NO_DEADLINES:
            self._deadlines = {}
        values, deadlines, around = self._values, self._deadlines, self._around
        assert values is not None  # within a turn
        wheel = self._wheel
        if wheel is None:
            wheel = self._wheel = Wheel(deadlines)
            wheel.fill(around.clock.now_ms())
        self._unexpired = Unexpired(values, deadlines, wheel, around.clock.now_ms, lambda: self._sequence)
        self._timed_view = WithDeadlines(
            self.scope, around, self._ordered, values, self._revisions, self._answers.kept, deadlines, wheel
        )

    def _allow_reading(self) -> None:
        """Let callers read without a turn, unless a message or a commit must come first. Within a turn."""
        if not self._closed and (self._gate is None or not self._gate.unsettled):
            self.readable = self._unexpired if self._deadlines else self._values  # with deadlines, it exists
            # Checked after that: a sender that calls `keep_order` in between has cleared the flag, or clears
            # `readable`.
            if not self._direct or not self.rule.reads_plainly:
                self.readable = None

    def apply_rule(self, rule: WriteRule) -> None:
        before = self.rule
        super().apply_rule(rule)
        if not rule.reads_plainly:
            self.readable = None  # a turn that allows reading at the same time checks the rule afterwards
        elif not before.reads_plainly:
            self._enqueue(Envelope(Ping(), self._dispatcher.reply()))  # after it, reading is allowed

    def _begin_deadlines(self) -> None:
        """Make readers check deadlines from now on: a key is about to get the first one of the scope."""
        if self._unexpired is None:
            self._see_deadlines()
        if self.readable is not None:
            self.readable = self._unexpired
            if not self._direct or not self.rule.reads_plainly:  # as in `_allow_reading`
                self.readable = None

    def values_now(self) -> list[bytes] | None:
        readable = self.readable
        if type(readable) is not Unexpired:
            return super().values_now()
        self.touched = True
        values = readable.everything()
        return values if self.readable is readable else None

    def holds_keys(self) -> bool | None:
        if (self._gate is not None and self._gate.unsettled) or (
            self._deadlines and self.next_due() <= self._around.clock.now_ms()
        ):
            # A key that waits for its commit may turn out never to have existed: this waits for the commit, as every
            # reader does. And only a turn can tell whether some keys have not expired.
            return bool(self.run(List()))
        values = self._values
        return None if values is None else bool(values)

    def _creations_now(self) -> int:
        return self._creations

    def next_due(self) -> int:
        return NEVER if self._wheel is None else self._wheel.next_due()

    def key_count(self) -> int:
        return len(self._values or ())

    def last_revision(self) -> int | None:
        return None if self._values is None else self._sequence

    def values_in_memory(self) -> list[bytes] | None:
        values = self._values
        return None if values is None else list(values.values())

    def turn_before_range(self) -> Turn[Any] | None:
        return _FIRST_KEY if self._ordered.is_behind() else None

    def forget_unused(self) -> None:
        self._ordered.forget_if_unused()

    # -------------------------------------------------------------------------------------------------------- ways in

    def run(self, turn: Turn[A]) -> A:
        # `_if_idle`, written inline: every write comes this way, and one more call would cost it 4 %.
        claim = self._claim
        if self._direct and not claim and self._gate is None:
            me = get_ident()
            try:
                if claim.setdefault(HOLDER, me) == me:
                    try:
                        answer = self.on_receive(turn)
                    except TooLong:
                        del claim[HOLDER]
                        if self._mailbox:
                            self.wake()
                        return self._run_apart(turn)
                    del claim[HOLDER]
                    if self._mailbox:
                        self.wake()
                    return answer
            except BaseException:
                try:
                    certainly(self._recover)
                except BaseException:  # interrupted before it could begin; what is raised here may be a refusal
                    certainly(self._recover)
                    raise
                raise
        if self._gate is not None:
            self._gate.refuse_in_turns()
        return super().run(turn)

    def held_calls(self) -> int:
        """Return how many callers wait for the next commit. From any thread."""
        return 0 if self._gate is None else self._gate.held_calls()

    def _run_apart(self, turn: Turn[A]) -> A:
        """Run a turn that reads more keys than a turn may, or while other callers wait, without claiming the scope."""
        if self._mailbox:
            pass
        elif turn.writes:
            self.run(_FIRST_KEY)  # makes the index
        elif (apart := self._if_idle(self._apart, turn)) is not BUSY:
            found: A = apart.answer()
            return found
        answer: A = self.ask(turn).get()
        return answer

    def run_now(self, turn: Turn[A]) -> A:
        answer: A = BUSY  # there may be a commit to wait for, or a store
        if self._gate is None and (self._view is not None or self._has_keys_of(turn)):
            try:
                answer = self._if_idle(self.on_receive, turn)
            except TooLong:
                return answer
        return answer

    def send(self, envelope: Envelope) -> None:
        must_load = self._view is None and not self._shut and not self._has_keys_of(envelope.message)
        if must_load or self._if_idle(self._handle, envelope) is BUSY:
            self._refuse_own_turn()
            self.post(envelope)

    def _has_keys_of(self, turn: object) -> bool:
        """True if only a part of the scope is in memory, and the turn needs nothing else. From any thread."""
        del turn
        return False

    def with_durability(self, turn: Turn[A], durable: bool) -> Turn[A]:
        if self._gate is not None:
            if not durable:
                raise DeserializationError(
                    f"`durable=False` for scope {self.scope!r}: its durability is `commit`, so every write is on disk "
                    "before it is answered; leave the argument out"
                )
            return turn
        if not durable:
            return turn
        if self._dirty is None:
            raise self._not_durable()
        # What it waits for may have to wait for a turn that a signal has interrupted on this thread.
        self._around.snapshot.refuse_in_turns()
        return Durable(turn)

    def _not_durable(self) -> Unsupported:
        return Unsupported("`durable=True`", f"scope {self.scope!r} is kept in memory only")

    def keep_order(self) -> None:
        if self._mailbox:
            self._direct = False
            self.readable = None

    # ---------------------------------------------------------------------------------------------------------- turns

    def on_receive(self, turn: Turn[A]) -> A:
        view = self._view
        if view is None:
            return self._without_values(turn)
        kind = type(turn)
        # Shortcuts: `decide` would cost a set 16 % more, and the calls that lead to it would cost an update 10 %.
        # tests/properties/test_turns.py checks that they do the same as `decide`.
        if kind is Set:
            key: str = turn.key  # type: ignore[attr-defined]  # of a Set
            if self.rule is NO_RULE and not (self._deadlines and key in self._deadlines):
                data: bytes = turn.data  # type: ignore[attr-defined]  # as above
                old = view.get(key)
                if old is None:
                    self._create(key, data)
                else:
                    self._write(key, old, data)
                return SetResult(old, data, revision=self._sequence)  # type: ignore[return-value]  # A is SetResult here
        elif kind is Update:
            if self.rule is NO_RULE and not self._deadlines:
                view.revision = self._sequence
                (change,), answer = turn.decide(view)
                self._write(change.key, change.before, change.after)  # type: ignore[union-attr]  # it is a change
                return answer
        elif kind is Delete:
            if self.rule.values is None and not self._deadlines:
                key = turn.key  # type: ignore[attr-defined]  # of a Delete
                old = view.get(key)
                self._remove(key, old)
                return old  # type: ignore[return-value]  # A is bytes or None here
        elif kind in WAYS:
            return WAYS[kind](self, turn)  # type: ignore[no-any-return]  # as above
        return self._decide(turn)

    def _decide(self, turn: Turn[A]) -> A:
        """Call `decide` of the turn, and commit its changes."""
        rule, deadlines = self.rule, self._deadlines
        view = self._view
        if deadlines or view is None or rule is not NO_RULE:
            if self._timed_view is None:
                self._see_deadlines()
            # A key that is not in memory may have a deadline too.
            expiring = bool(deadlines) or view is None or rule.ttl is not None
            view = timed = self._timed_view
            assert timed is not None  # from then on
            timed.expiring, timed.strict, timed.ttl_rule = (
                expiring,
                rule.strict,
                rule.ttl,
            )
        assert view is not None  # within a turn
        view.revision = self._sequence
        view.now = None
        stored, answer = turn.decide(view) if rule.values is None else rule.values.decide(turn, view)
        if stored:
            self._store(stored)
        return answer

    def _acknowledge(self, turn: DeliveryBatch) -> BatchResult:
        """As `_decide`; the changes are saved together with the acknowledgement of a delivery."""
        if turn.fence.setdefault("won", "turn") != "turn":
            raise Unsupported("the transaction of a delivery", "its attempt has ended before its turn came")
        if turn.is_elsewhere and turn.keys:
            # It was being sent to another engine, whose store this engine has opened since. The next attempt
            # acknowledges here.
            key = turn.keys[0]
            raise Conflict(self.scope, (KeyConflict(0, key, None, self._revisions.get(key, 0)),))
        before, acks = self._sequence, self._acks
        # Entered before the change: if this turn is interrupted after the change, both are there.
        self._acks = acks + turn.acks
        try:
            return self._decide(turn)
        finally:
            if self._sequence == before:
                self._acks = acks
            else:
                turn.fence["changed"] = "yes"

    def _set_with(self, turn: SetWith) -> SetResult:
        """As `_decide`, for a set with a condition or a deadline, in half the time."""
        key, asked, deadlines = turn.key, turn.deadline, self._deadlines
        expires_ms, now_ms = None, 0
        if asked is not NO_DEADLINE or (deadlines and key in deadlines):
            now_ms = self._around.clock.now_ms()
            if asked.keep or (key in deadlines and deadlines[key] <= now_ms):
                return self._decide(turn)
            expires_ms = asked.expires_ms
            if asked.ttl_ms is not None:
                expires_ms = now_ms + asked.ttl_ms
                expires_ms = min(expires_ms, LAST_MS)
        old = self._values.get(key)  # type: ignore[union-attr]  # within a turn
        expected = turn.if_revision
        if self.rule is not NO_RULE or (
            expected is not None and expected != (0 if old is None else self._revisions[key])
        ):
            return self._decide(turn)  # a rule applies, or it is refused
        if now_ms and old is not None:
            self._write_timed(key, old, turn.data, expires_ms, now_ms)
        elif now_ms:
            self._create(key, turn.data, expires_ms, now_ms)
        else:
            self._write(key, old, turn.data)
        return SetResult(old, turn.data, revision=self._sequence, detailed=True)

    def _touch(self, turn: Touch) -> bool:
        """As `_decide`, for a new deadline of a key that exists."""
        key, asked, deadlines = turn.key, turn.deadline, self._deadlines
        now_ms = self._around.clock.now_ms()
        expires_ms = asked.expires_ms if asked.ttl_ms is None else min(now_ms + asked.ttl_ms, LAST_MS)
        if (
            self.rule is not NO_RULE
            or expires_ms is None
            or key not in self._values  # type: ignore[operator]  # within a turn
            or (key in deadlines and deadlines[key] <= now_ms)
        ):
            return self._decide(turn)
        self._write_deadline(key, expires_ms, now_ms)
        return True

    def _read_many(self, turn: Turn[A]) -> A:
        """As `_decide`, for a turn that reads many keys.

        It queues after the calls that wait: a caller that reads page after page claims the scope nearly all the time,
        and a waiting thread would find it claimed for hundreds of milliseconds.
        """
        if self._mailbox and not self._drains:
            raise TooLong
        return self._decide(turn)

    def _compare_and_set(self, turn: CompareAndSet) -> CasResult:
        """As `_decide`, for a compare-and-set by value of a key without a deadline."""
        key, deadlines = turn.key, self._deadlines
        if (
            self.rule is not NO_RULE
            or turn.expected is UNSET
            or turn.expected_revision is not None
            or turn.deadline is not NO_DEADLINE
            or (deadlines and key in deadlines)
        ):
            return self._decide(turn)
        old, expected = self._values.get(key), turn.expected  # type: ignore[union-attr]  # within a turn
        found = None if old == b"null" else old
        if found != expected and not same_json(None if expected == b"null" else expected, found):
            return CasResult(False, old, revision=self._revisions.get(key, 0))
        self._write(key, old, turn.data)
        return CasResult(True, old, revision=self._sequence)

    def _modify(self, turn: Modify) -> ModifyResult:
        """As `_decide`, for a key without a deadline."""
        key, deadlines = turn.key, self._deadlines
        if self.rule is not NO_RULE or (deadlines and key in deadlines):
            return self._decide(turn)
        old = self._values.get(key)  # type: ignore[union-attr]  # within a turn
        value = turn.value(self.scope, old)
        if value is KEEP or (value is DELETE and old is None):
            return ModifyResult(old, old, revision=self._revisions.get(key, 0))
        data = None
        if value is not DELETE:
            data = encode(value)
            limit = self._around.limits.max_value_bytes
            if limit:
                refuse_size(self.scope, key, data, limit)
        self._write(key, old, data)
        return ModifyResult(old, data, revision=self._sequence)

    def _set_all(self, turn: SetAll) -> BatchResult:
        """As `_decide`, for sets of several keys. The caller that made the turn has checked all sizes."""
        if self._deadlines or self.rule is not NO_RULE:
            return self._decide(turn)
        before = list(map(self._values.get, turn.sets))  # type: ignore[union-attr]  # within a turn
        self._write_all(turn.sets, before)
        return turn.result(before, self._sequence)

    def _open(self, turn: Durable[A]) -> A:
        if self._dirty is None:  # `durable` could be promised when it was asked for, before another backend took over
            raise self._not_durable()
        return self.on_receive(turn.turn)

    def _apart(self, turn: Turn[Any]) -> Any:
        """Return copies of what a turn reads, to decide outside of a turn; BUSY if the scope has left memory.

        Within a turn.
        """
        view = self._view
        if view is None:
            return BUSY
        if self._deadlines:
            if self._timed_view is None:
                self._see_deadlines()
            view = self._timed_view
        assert view is not None  # from then on
        view.revision, view.now = self._sequence, None
        return Apart(turn, view.apart(self._around, self._ordered, turn.looks_at), self.rule)

    def _tell_again(self) -> None:
        self._router.wake_anyway()
        if self._gate is not None:
            self._around.snapshot.commit_anyway()
        self._expect()

    # ----------------------------------------------------------------------------------------------- from the mailbox

    def _handle(self, item: Envelope) -> None:
        if isinstance(item.message, Housekeeping):
            super()._handle(item)
        elif self._passivated:
            self._forward(item)
        elif item.depth or type(item.depth) is not int:  # one with an origin: see `scopestate.observing`
            token = event_depth.set(item.depth)
            try:
                super()._handle(item)
            finally:
                event_depth.reset(token)
        else:
            super()._handle(item)

    def _receive(self, message: Any) -> Any:
        try:
            return super()._receive(message)
        except TooLong:
            return self._receive_long(message)

    def _receive_long(self, turn: Turn[Any]) -> Any:
        """Answer a turn that reads more keys than a turn may, from the mailbox or from a sender that does not wait."""
        if not self._drains and (turn.writes or self._mailbox):
            return LATER  # a worker thread runs it: this may be the thread of an event loop
        if not turn.writes:
            return self._apart(turn)
        # The index is made within the turn, so that the sender's next write comes after this turn.
        self._ordered.patient = True
        try:
            return super()._receive(turn)
        finally:
            self._ordered.patient = False

    def _answer(self, message: Any, reply: ReplyTo, answer: Any) -> None:
        if type(answer) is Apart:
            reply = AnswerApart(reply, self._dispatcher)
        if answer is LATER:
            self._enqueue(Envelope(message, reply))
        elif isinstance(message, Housekeeping):
            reply.set(answer)
        elif self._gate is not None:
            self._gate.hold(message, reply, answer)
        elif type(message) is Durable:
            self._around.snapshot.answer_when_saved(self, message, reply, answer)
        else:
            reply.set(answer)

    def _deliver_refusal(self, message: Any, reply: ReplyTo, error: BaseException) -> None:
        if self._gate is None or isinstance(message, Housekeeping) or isinstance(error, _OF_NO_STATE):
            reply.fail(error)
        else:
            self._gate.hold(message, reply, None, error)

    def _drain_mailbox(self) -> None:
        self._drains = True
        try:
            super()._drain_mailbox()
        finally:
            self._drains = False
            self._allow_reading()

    # --------------------------------------------------------------------------------------------- loading and closing

    def _without_values(self, turn: Turn[A]) -> A:
        """Run a turn of a scope that is not in memory, or closed."""
        if self._closed:
            return self._serve_handler(turn)
        if self._passivated:
            return self._around.directory[self.scope].run(turn)
        self._load(turn)
        return self.on_receive(turn)

    def _load(self, turn: Turn[Any]) -> None:
        try:
            state = self._read()
        except StorageError as error:
            raise turn.failed(error) from error
        self._sequence = self._saved = self.collected = state.revision
        if state.revision >= LAST_SEQUENCE:
            self._refuse_writes(
                f"its last one has the number {self._sequence}, next to the highest that a store holds (was it "
                "imported?). Export it, and import it without its revisions"
            )
        self._revisions, self._created = state.revisions, state.created
        self._deadlines = state.deadlines or NO_DEADLINES
        self._wheel = None
        self._answers = Answers(state.answers) if state.answers else NO_ANSWERS
        self._have(state)
        self._expect()

    def _read(self) -> ScopeState:
        """Read the scope from the store."""
        store = self._around.store
        assert store is not None  # a scope that is not kept is always in memory
        return store.load(self.scope)

    def _have(self, state: ScopeState) -> None:
        """Have in memory what was read; the other tables are in place."""
        self._hold(state.values)

    def _serve_handler(self, turn: Turn[A]) -> A:
        """Run a turn of a closed scope: callers are refused; handlers are served as before until all is drained."""
        self._refuse_if_closed(event_depth.get())
        if self._left is None:
            self._load(turn)
        else:
            self._hold(self._left)
        self._ordered.patient = True  # few turns come, and then the scope leaves memory
        try:
            return self.on_receive(turn)
        finally:
            self._left = self._values
            self._hold(None)

    def disown(self, refusal: Callable[[], Exception]) -> None:
        super().disown(refusal)
        self._forget()

    # --------------------------------------------------------------------------------------------- saving and leaving

    def _housekeep(self, message: Housekeeping[Any]) -> Any:
        if isinstance(message, Collect):
            return self.collect()
        if self._gate is not None and self._gate.understands(message):
            return self._gate.housekeep(message)
        return super()._housekeep(message)

    def _close(self, handlers_may: bool) -> None:
        if not self._closed:
            self._left = self._values
        super()._close(handlers_may)
        self._hold(None)

    def collect(self) -> Collected | None:
        """Return what changed since it was last collected. Within a turn."""
        dirty, answers = self._dirty, self._answers.unsaved
        if dirty is None or (self.is_clean() and self._saved == self._sequence):
            return None
        if self._sequence - self._saved >= MOST_UNSAVED and not self._no_writes:
            self._refuse_writes(
                f"{self._sequence - self._saved} of them are not saved yet, since saving fails. They are in memory; "
                "`health()` says what is wrong"
            )
        values = self._values if self._values is not None else self._left
        due_ms = self.next_due()
        collected = Collected(
            self.scope,
            self._sequence,
            dirty,
            part(values or {}, dirty),
            part(self._revisions, dirty),
            part(self._created, dirty),
            part(self._deadlines, dirty),
            self._removed,
            answers,
            None if due_ms == NEVER else due_ms,
            self._acks,
        )
        now_dirty, now_removed, now_answers = dict[str, None](), dict[int, None](), dict[str, Answer | None]()
        kept = self._answers
        # Nothing below allocates memory: collected changes reach the store, or remain to be collected.
        self._dirty, self._removed, self._acks = now_dirty, now_removed, ()
        if answers:
            kept.unsaved = now_answers
        self.collected, self._saving = self._sequence, True
        return collected

    def take_back(self, collected: Collected, before: int) -> None:
        """Undo `collect`; `before` is what `collected` was. Within the same turn. Allocates no memory."""
        self._dirty, self._removed, self._acks = collected.keys, collected.removed, collected.acks
        if collected.answers:
            self._answers.unsaved = collected.answers
        self.collected, self._saving = before, False

    def saved(self, sequence: int) -> None:
        """Note that everything up to write number `sequence` is on disk. Called by the actor that saves."""
        self._saved, self._saving = sequence, False
        if self._no_writes and self._sequence < LAST_SEQUENCE:
            self._accept_writes()

    def forget_changes(self) -> None:
        """Drop everything in memory, saved or not: the next call loads the scope from the store. Within a turn."""
        self._expect()
        self._forget()
        self._dirty, self._removed, self._acks = {}, {}, ()
        self._saved, self._saving = self._sequence, False

    def _forget(self) -> None:
        """Empty the tables in memory."""
        self._left = None
        self._hold(None)
        self._revisions, self._created, self._deadlines, self._answers = {}, {}, NO_DEADLINES, NO_ANSWERS
        self._wheel = None

    def is_clean(self) -> bool:
        """True if every change to save is collected."""
        return not self._dirty and not self._answers.unsaved

    def is_dirty(self, keys: tuple[str, ...]) -> bool:
        """True if one of these keys has a change that was not collected."""
        dirty = self._dirty or ()
        return any(key in dirty for key in keys)

    def _passivate(self) -> bool:
        # First remove it from the directory, then empty it: a caller that still has this actor finds no values and is
        # passed on to its successor; a reader that already has the values reads what was current after it began.
        if not super()._passivate():
            return False
        self._forget()
        return True

    def _is_needed(self) -> bool:
        return super()._is_needed() or not self._is_saved()

    def _note_leaving(self) -> None:
        self._expect()  # its keys still expire
        if self._dirty is None:  # else the store keeps the number
            super()._note_leaving()

    def _is_saved(self) -> bool:
        """True if the scope can be restored as it is: from the store, or because it was never written."""
        if self._gate is not None and self._gate.is_waiting():
            return False
        if self._dirty is None:
            return not self._values and not self._answers.kept
        return self.is_clean() and not self._saving and self._saved == self._sequence and not self.pinned


WAYS: Final[dict[type[Turn[Any]], Callable[[LocalScope, Any], Any]]] = {
    SetWith: LocalScope._set_with,
    SetAll: LocalScope._set_all,
    DeliveryBatch: LocalScope._acknowledge,
    **dict.fromkeys((Keys, Pairs, Values, Entries, State, Count, ReadPage, DeleteRange, Items), LocalScope._read_many),
    CompareAndSet: LocalScope._compare_and_set,
    Modify: LocalScope._modify,
    Touch: LocalScope._touch,
    Durable: LocalScope._open,
}
"""Turns with a shortcut instead of `decide`. tests/properties/test_turns.py checks that they do the same as
`decide`."""

_OF_NO_STATE: Final = (HandlerFull, Overloaded, EngineClosed)
"""Refusals that say nothing about the values of the scope."""
