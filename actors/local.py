"""The actor that owns one scope in memory."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar

from scopestate.actors.gate import Gate
from scopestate.actors.ports import Row, ScopeChange
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Collect, Housekeeping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY, HOLDER
from scopestate.errors import StorageError
from scopestate.ops.results import SetResult
from scopestate.ops.turns import List, PlainView, Set, Turn, checked_length
from scopestate.signals import certainly
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits

A = TypeVar("A")

LAST_SEQUENCE: Final = 2**53 - 2**32
"""A scope that comes this far is read only: numbers are below 2**53, and an acknowledged write is saved."""


ABSENT: Final[Any] = object()
ToSave = tuple[Row | None, Any, tuple[int, ...]]
NOTHING: Final[ToSave] = (None, ABSENT, ())


_UNUSED: Final[dict[str, int]] = {}
_NONE_GONE: Final[list[int]] = []
"""Shared by the scopes that are not kept: nothing is put into them."""


class InMemory(PlainView):
    """The view that turns have of values in memory."""

    __slots__ = ("_table", "get", "limits", "scope")

    def __init__(self, scope: str, table: dict[str, bytes], limits: Limits) -> None:
        self.scope = scope
        self._table = table
        self.limits = limits
        self.get: Callable[[str], bytes | None] = table.get
        """The dict's own method, because every turn calls it."""

    def values(self) -> list[bytes]:
        return list(self._table.values())

    def items(self) -> list[tuple[str, bytes]]:
        return list(self._table.items())


class LocalScope(ScopeActor):
    """Owns one scope in memory. Only the thread that runs its turn changes its values, so no lock guards them.

    A turn decides what changes (`ops/turns.py`), and then that is committed in one stretch of code without a call or a
    loop, so that no signal handler can cut it in two: memory, the changes to save and the event happen together or not
    at all (docs/design/0004-interruption.md). Reading needs no turn: values are immutable bytes, and a dict lookup sees
    them before or after a write, never between.
    """

    def __init__(self, scope: str, around: Surroundings, *, keeps: bool, gated: bool = False) -> None:
        """`keeps`: the store keeps it. `gated`: a write counts as done when it is on disk, and is answered then."""
        super().__init__(scope, around)
        self._gate = Gate(self, around) if gated else None
        self._outbox: list[Any] = around.router.outlet if self._gate is None else self._gate.outbox
        self._registry: MutableMapping[str, Any] = around.snapshot.committing if gated else around.snapshot.dirty
        if keeps:
            self._sequence = 0  # until it is loaded
        self._saved = 0
        self._dirty: dict[str, Row | None] | None = {} if keeps else None
        self._created: dict[str, int] = {} if keeps else _UNUSED
        """key -> the write that created it, of a scope that is kept."""
        self._removed: list[int] = [] if keeps else _NONE_GONE
        """What was created, may be in the store, and is deleted."""
        self._collected = 0
        """The number of the last write that was collected: what was created behind it is not in the store."""
        self._left: dict[str, bytes] | None = None
        """The values of a closed scope, which only turns of handlers see."""
        self.pinned = False
        """True while the store cannot hold one of its values, which is then nowhere but here."""
        self._values: dict[str, bytes] | None
        self._view: InMemory | None
        self._hold(None if keeps else {})

    def _hold(self, values: dict[str, bytes] | None) -> None:
        """Have these values in memory; None: none, they must be loaded first."""
        view = None if values is None else InMemory(self.scope, values, self._around.limits)
        self.readable, self._values, self._view = None, values, view
        self._allow_reading()

    def _allow_reading(self) -> None:
        """Let callers read without a turn, where no message and no commit stands in the way. Within a turn."""
        if not self._closed and (self._gate is None or not self._gate.unsettled):
            self.readable = self._values
            # Read after that: a sender that keeps order in between has cleared the flag, or clears `readable`.
            if not self._direct:
                self.readable = None

    def holds_keys(self) -> bool | None:
        if self._gate is not None and self._gate.unsettled:
            # A key that waits for its commit may never have been: this waits for it, as every reader does.
            return bool(self.run(List()))
        values = self._values
        return None if values is None else bool(values)

    def key_count(self) -> int:
        return len(self._values or ())

    # -------------------------------------------------------------------------------------------------------- ways in

    def run(self, turn: Turn[A]) -> A:
        # `_if_idle`, written out: every write comes this way, and a call more would cost it 4 %.
        claim = self._claim
        if self._direct and not claim and self._gate is None:
            me = get_ident()
            try:
                if claim.setdefault(HOLDER, me) == me:
                    answer = self.on_receive(turn)
                    del claim[HOLDER]
                    if self._mailbox:
                        self.wake()
                    return answer
            except BaseException:
                certainly(self._recover)
                raise
        if self._gate is not None:
            self._gate.refuse_in_turns()
        return super().run(turn)

    def run_now(self, turn: Turn[A]) -> A:
        answer: A = BUSY  # there may be a commit to wait for, or a store
        if self._gate is None and self._view is not None:
            answer = self._if_idle(self.on_receive, turn)
        return answer

    def send(self, envelope: Envelope) -> None:
        must_load = self._view is None and not self._shut
        if must_load or self._if_idle(self._handle, envelope) is BUSY:
            self._refuse_own_turn()
            self.post(envelope)

    def keep_order(self) -> None:
        if self._mailbox:
            self._direct = False
            self.readable = None

    # ---------------------------------------------------------------------------------------------------------- turns

    def on_receive(self, turn: Turn[A]) -> A:
        view = self._view
        if view is None:
            return self._without_values(turn)
        if type(turn) is Set:
            # The short way: `decide` would cost a set 16 % more. tests/properties/test_turns.py holds the two equal.
            old, data = view.get(turn.key), turn.data
            result = SetResult(old, data)
            self._write(turn.key, old, data)
            return result  # type: ignore[return-value]  # A is SetResult here
        changes, answer = turn.decide(view)
        if changes:
            (change,) = changes  # how several are committed: docs/design/0033-turns.md
            self._write(change.key, change.before, change.after)  # type: ignore[union-attr]
        return answer

    def _write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        """Commit one change: memory, what to save, and the event, all or none of them."""
        if old is None and new is not None and len(key) > self._around.limits.longest_name:
            checked_length("key", key, self._around.limits.longest_name)
        sequence = self._sequence + 1
        watch, gate = self._watch, self._gate
        anywhere = watch.anywhere
        routed: tuple[Any, ...] = ()
        if (watch and (key in watch or None in watch)) or (anywhere and (key in anywhere or None in anywhere)):
            routed = self._router.prepare(self.scope, watch, key, old, new, sequence, event_depth.get())
        values, dirty, created, removed, outbox = self._values, self._dirty, self._created, self._removed, self._outbox
        assert values is not None  # within a turn
        before = self._sequence
        entry, earlier, gone = NOTHING if dirty is None else self._to_save(key, old, new, sequence)
        if gate is not None:
            gate.unsettled = True
            self.readable = None  # before the value can be seen
        self.touched = True
        # From here to the end of the stretch: no call, no loop, no attribute with code behind it. CPython looks for
        # signals only at those, so nothing can come between these lines. What may need memory stands before what is
        # deleted, and the event last: a MemoryError takes back everything, without needing any memory itself.
        try:
            if dirty is not None:
                if new is not None:
                    dirty[key] = entry
                    if old is None:
                        created[key] = sequence
                elif old is not None:
                    dirty[key] = None
                    removed += gone
                self._registry[self.scope] = self
            if new is not None:
                values[key] = new
            self._sequence = sequence
            outbox += routed
        except MemoryError:
            self._sequence = before
            if old is not None:
                values[key] = old
            elif key in values:
                del values[key]
            if dirty is not None:
                if earlier is not ABSENT:
                    dirty[key] = earlier
                elif key in dirty:
                    del dirty[key]
                if old is None and key in created:
                    del created[key]
                if gone and removed and removed[-1] == gone[0]:
                    del removed[-1]
            raise
        if new is None and old is not None:
            del values[key]
            if dirty is not None:
                del created[key]
        # End of the stretch.
        if gate is not None:
            self._around.snapshot.commit_soon()  # the events wait for the commit
        elif routed:
            self._router.wake()

    def _to_save(self, key: str, old: bytes | None, new: bytes | None, sequence: int) -> ToSave:
        """Return what a change leaves to save: the entry, what was to be saved for its key before, and what is gone."""
        entry: Row | None = None
        gone: tuple[int, ...] = ()
        if new is not None:
            entry = Row(new, sequence, sequence if old is None else self._created[key])
        elif old is not None and self._created[key] <= self._collected:
            gone = (self._created[key],)
        return entry, self._dirty.get(key, ABSENT), gone  # type: ignore[union-attr]  # it is kept

    def _refuse_write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        raise StorageError(
            f"scope {self.scope!r} takes no more writes: its last one has the number {self._sequence}, next to the "
            "highest that a store holds (was it imported?). Export it, and import it without its `sequence` line",
            code="SET_ERROR" if new is not None else "DELETE_ERROR",
        )

    def _tell_again(self) -> None:
        self._router.wake_anyway()
        if self._gate is not None:
            self._around.snapshot.commit_anyway()

    # ----------------------------------------------------------------------------------------------- from the mailbox

    def _handle(self, item: Envelope) -> None:
        if isinstance(item.message, Housekeeping):
            super()._handle(item)
        elif self._passivated:
            self._forward(item)
        elif item.depth:
            token = event_depth.set(item.depth)
            try:
                super()._handle(item)
            finally:
                event_depth.reset(token)
        else:
            super()._handle(item)

    def _answer(self, message: Any, reply: ReplyTo, answer: Any) -> None:
        if self._gate is None or isinstance(message, Housekeeping):
            reply.set(answer)
        else:
            self._gate.hold(message, reply, answer)

    def _drain_mailbox(self) -> None:
        try:
            super()._drain_mailbox()
        finally:
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
        store = self._around.store
        assert store is not None  # a scope that is not kept is always in memory
        try:
            state = store.load(self.scope)
        except StorageError as error:
            raise turn.failed(error) from error
        self._sequence = self._saved = self._collected = state.revision
        if state.revision >= LAST_SEQUENCE:
            self._write = self._refuse_write  # type: ignore[method-assign]  # costs the others nothing
        self._created = {key: entry.created for key, entry in state.entries.items()}
        self._hold({key: entry.json for key, entry in state.entries.items()})

    def _serve_handler(self, turn: Turn[A]) -> A:
        """A turn of a closed scope: refused to callers; for a handler, as if it were open, until all is drained."""
        self._refuse_if_closed(event_depth.get())
        if self._left is None:
            self._load(turn)
        else:
            self._hold(self._left)
        try:
            return self.on_receive(turn)
        finally:
            self._left = self._values
            self._hold(None)

    def disown(self, refusal: Callable[[], Exception]) -> None:
        super().disown(refusal)
        self._left = None
        self._hold(None)

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

    def collect(self) -> ScopeChange | None:
        """Return what changed since it was last collected. Within a turn."""
        if self._dirty is None or (not self._dirty and self._saved == self._sequence):
            return None
        change = ScopeChange(self.scope, self._sequence, self._dirty, self._removed)
        dirty, removed = dict[str, Row | None](), list[int]()
        # Nothing below needs memory: what was collected reaches the store, or stays to be collected.
        self._dirty, self._removed, self._collected = dirty, removed, self._sequence
        return change

    def saved(self, sequence: int) -> None:
        """Note that everything up to write number `sequence` is on disk. Called by the actor that saves."""
        self._saved = sequence

    def forget_changes(self) -> None:
        """Drop what is in memory, saved or not: the next call loads the scope as it is in the store. Within a turn."""
        self._left = None
        self._hold(None)
        self._dirty, self._removed = {}, []
        self._saved = self._sequence

    def is_dirty(self, keys: tuple[str, ...]) -> bool:
        """True if one of these keys has a change that was not collected."""
        dirty = self._dirty or ()
        return any(key in dirty for key in keys)

    def _passivate(self) -> bool:
        # First out of the directory, then empty: a caller that still has this actor finds no values and is sent on to
        # its successor; a reader that already has the values reads what was current after it began.
        if not super()._passivate():
            return False
        self._hold(None)
        return True

    def _is_needed(self) -> bool:
        return super()._is_needed() or not self._is_saved()

    def _note_leaving(self) -> None:
        if self._dirty is None:  # else the store keeps the number
            super()._note_leaving()

    def _is_saved(self) -> bool:
        """True if the scope can be made again as it is: from the store, or because it was never written."""
        if self._gate is not None and self._gate.is_waiting():
            return False
        if self._dirty is None:
            return not self._values
        return not self._dirty and self._saved == self._sequence and not self.pinned
