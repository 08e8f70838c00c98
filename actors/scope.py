"""The actor that owns one scope."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Final

import pykka

from scopestate.actors.containment import Log
from scopestate.actors.control import (
    Caused,
    Close,
    Collect,
    Housekeeping,
    Passivate,
    Ping,
    as_failure_of,
    caused,
    weight,
)
from scopestate.actors.ports import ScopeChange, Store
from scopestate.actors.reply import Envelope
from scopestate.actors.turn import TurnActor
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    Overloaded,
    ReplyTimeout,
    StorageError,
    ValueTooLarge,
)
from scopestate.ops import MISSING, UpdateOp, apply, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.turns import answer_of, checked_length, checked_name, turn_of
from scopestate.ops.values import decode, encode_plain
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.directory import Directory
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.limits import Limits
    from scopestate.actors.router import EventRouter
    from scopestate.actors.snapshot import SnapshotActor

log = Log("scopestate.scope")


LAST_SEQUENCE: Final = 2**63 - 2**32
"""A scope that comes this far is read only: SQLite holds whole numbers below 2**63, and an acknowledged
write is saved."""


class Surroundings:
    """What the scopes of one engine share. Made once; read without locks."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        store: Store | None,
        limits: Limits,
        router: EventRouter,
        snapshot: SnapshotActor,
        directory: Directory,
    ) -> None:
        self.dispatcher = dispatcher
        self.store = store
        self.limits = limits
        self.router = router
        self.snapshot = snapshot
        self.directory = directory
        self.highest_forgotten = 0
        """The highest sequence of a scope that has left memory, and of which no sequence is kept.

        Such a scope may return, and must not give a sequence again: it begins behind this one.
        """

    def note_forgotten(self, sequence: int) -> None:
        """Note that a scope leaves memory, with the sequence of its last write."""
        self.highest_forgotten = max(self.highest_forgotten, sequence)


class ScopeActor(TurnActor):
    """Owns one scope. Only the thread that runs its turn changes `_values`, so no lock guards it.

    Reading a key needs no turn: values are immutable bytes, and a dict lookup sees them before or after a write, never
    between. A write is one stretch of code without a call or a loop, so that no signal handler can cut it in two:
    memory, the changes to save and the event happen together or not at all (docs/design/0004-interruption.md).
    """

    caller_runs = True

    _largest = 1
    """Bytes of the largest message that ever waited here."""
    _batches = 0
    """Changes whenever messages leave the mailbox."""
    _weighed = (-1, 0)
    """What `_batches` was when the mailbox was weighed, and the bytes that wait, with what has come since."""

    def __init__(self, scope: str, around: Surroundings, *, keeps: bool) -> None:
        super().__init__(around.dispatcher)
        self.scope = scope
        self._around = around
        self._router = around.router
        self._outbox: list[Any] = around.router.outlet
        self._watch = around.router.triggers.watch(scope)
        self._anywhere = self._watch.anywhere
        self._registry: MutableMapping[str, Any] = around.snapshot.dirty
        self._sequence = 0 if keeps else around.highest_forgotten
        self._saved = 0
        self._dirty: dict[str, bytes | None] | None = {} if keeps else None
        self._positions: dict[str, int] = {}
        self._values: dict[str, bytes] | None = None if keeps else {}
        self._closed = False
        self._shut = False
        self._left: dict[str, bytes] | None = None
        self._passivated = False
        self._refusal: Callable[[], Exception] = EngineClosed
        self.touched = True
        """Set by every call; the passivation sweep clears it and takes scopes that it still finds cleared."""
        self.pinned = False
        """True while the store cannot hold one of its values, which is then nowhere but here."""

    @property
    def name(self) -> str:
        return f"scope {self.scope!r}"

    @property
    def mailbox_limit(self) -> int:  # type: ignore[override]  # a reload may change it
        return self._around.limits.scope_mailbox

    @property
    def loaded(self) -> bool:
        """True if a turn needs no disk."""
        return self._values is not None

    def holds_keys(self) -> bool | None:
        """Whether the scope holds a key; None if it is not in memory."""
        values = self._values
        return None if values is None else bool(values)

    def has_waiting(self) -> bool:
        """True if messages wait or a turn is running."""
        return bool(self._mailbox or self._claim)

    def key_count(self) -> int:
        """Keys in memory."""
        return len(self._values or ())

    # ------------------------------------------------------------------------------------------------- reading

    def read(self, key: str) -> bytes | None:
        """Return the key's JSON, or None if it does not exist. No turn if the scope is in memory."""
        values = self._values
        if values is None or not self._direct:
            return self.run(turns.Get(key))  # type: ignore[no-any-return]
        self.touched = True
        return values.get(key)

    def peek(self, key: str) -> bytes | None:
        """As `read` if the answer is at hand; None also if it takes a turn to know. Never waits."""
        values = self._values
        if values is None or not self._direct:
            return None
        self.touched = True
        return values.get(key)

    def read_all(self) -> list[bytes]:
        """Return all values as JSON, in insertion order."""
        values = self._values
        if values is None or not self._direct:
            return self.run(turns.List())  # type: ignore[no-any-return]
        self.touched = True
        return list(values.values())

    # --------------------------------------------------------------------------------------------------- turns

    def on_receive(self, message: Any) -> Any:
        kind = type(message)
        if self._values is None and not isinstance(message, Housekeeping):
            if self._closed:
                return self._serve_handler(message)
            successor = self._arrive(message)
            if successor is not None:
                return successor.run(message)
        if kind is turns.Set:
            return self._put(message.key, message.data)
        if kind is turns.Update:
            return self._change(message.key, message.ops)
        if kind is turns.Delete:
            return self._take(message.key)
        if kind is turns.Get:
            return self._values.get(message.key)  # type: ignore[union-attr]  # _arrive has loaded it
        if kind is turns.List:
            return list(self._values.values())  # type: ignore[union-attr]
        if kind is Caused:
            token = event_depth.set(message.depth)
            try:
                return self.on_receive(message.message)
            finally:
                event_depth.reset(token)
        return self._on_rare(message)

    def _on_rare(self, message: Any) -> Any:
        match message:
            case turns.Items():
                return list(self._values.items())  # type: ignore[union-attr]  # _arrive has loaded it
            case Collect():
                return self._collect()
            case Ping():
                return None
            case Passivate():
                return self._passivate()
            case Close(handlers_may=handlers_may):
                return self._close(handlers_may)
            case _:
                # Through a Pykka ref: the public messages, with Python values.
                turn = turn_of(message, self._around.limits.max_value_bytes)
                if message.scope != self.scope:
                    raise DeserializationError(
                        f"a message for scope {message.scope!r} was sent to scope {self.scope!r}"
                    )
                return answer_of(message, self.on_receive(turn))

    # A key of somebody's own class could run code in the middle of a write: it becomes plain text first.

    def _new_key(self, key: str) -> str:
        name = checked_name("key", key)
        longest = self._around.limits.longest_name
        return name if len(name) <= longest else checked_length("key", name, longest)

    def _put(self, key: str, data: bytes) -> SetResult:
        if type(key) is not str:
            key = checked_name("key", key)
        old = self._values.get(key)  # type: ignore[union-attr]
        result = SetResult(old, data)
        self._write(key if old is not None else self._new_key(key), old, data)
        return result

    def _change(self, key: str, ops: tuple[UpdateOp, ...]) -> UpdateResult:
        if type(key) is not str:
            key = checked_name("key", key)
        old = self._values.get(key)  # type: ignore[union-attr]
        after, errors = apply(MISSING if old is None else decode(old), ops)
        data = encode_plain(after)
        limit = self._around.limits.max_value_bytes
        if limit and len(data) > limit:
            raise ValueTooLarge(self.scope, key, len(data), limit)
        result = UpdateResult(old, data, tuple(errors) if errors else ())
        self._write(key if old is not None else self._new_key(key), old, data)
        return result

    def _take(self, key: str) -> bytes | None:
        if type(key) is not str:
            key = checked_name("key", key)
        old = self._values.get(key)  # type: ignore[union-attr]
        self._write(key if old is not None else checked_name("key", key), old, None)
        return old

    def _write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        """Make one change: memory, what to save, and the event, all or none of them."""
        sequence = self._sequence + 1
        watch, anywhere = self._watch, self._anywhere
        routed: tuple[Any, ...] = ()
        if (watch and (key in watch or None in watch)) or (anywhere and (key in anywhere or None in anywhere)):
            routed = self._router.prepare(self.scope, watch, key, old, new, sequence, event_depth.get())
        values, dirty, positions, outbox = self._values, self._dirty, self._positions, self._outbox
        before = self._sequence
        self.touched = True
        # From here to the end of the stretch: no call, no loop, no attribute with code behind it. CPython looks for
        # signals only at those, so nothing can come between these lines. What may need memory stands before what is
        # deleted, and the event last: a MemoryError takes back everything, without needing any memory itself.
        try:
            if dirty is not None:
                if new is not None:
                    dirty[key] = new
                    if old is None:
                        positions[key] = sequence
                elif old is not None:
                    dirty[key] = None
                self._registry[self.scope] = self
            if new is not None:
                values[key] = new  # type: ignore[index]
            self._sequence = sequence
            outbox += routed
        except MemoryError:
            self._sequence = before
            if old is not None:
                values[key] = old  # type: ignore[index]
            elif key in values:  # type: ignore[operator]
                del values[key]  # type: ignore[union-attr]
            if dirty is not None:
                if key in dirty:
                    dirty[key] = old  # saved once more than needed, or deleted once more
                if old is None and key in positions:
                    del positions[key]
            raise
        if new is None and old is not None:
            del values[key]  # type: ignore[union-attr]
            if dirty is not None and key in positions:
                del positions[key]
        # End of the stretch.
        if routed:
            self._announce()

    def _refuse_write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        raise StorageError(
            f"scope {self.scope!r} takes no more writes: its last one has the number {self._sequence}, next to the "
            "highest that a store holds (was it imported?). Export it, and import it without its `sequence` line",
            code="SET_ERROR" if new is not None else "DELETE_ERROR",
        )

    def _announce(self) -> None:
        """Events are in the outbox: see that somebody fetches them."""
        self._router.announce()

    def _tell_again(self) -> None:
        self._router.announce_again()

    # ---------------------------------------------------------------------------------------- saving and leaving

    def _collect(self) -> ScopeChange | None:
        if self._dirty is None or (not self._dirty and self._saved == self._sequence):
            return None
        change = ScopeChange(self.scope, self._sequence, self._dirty, self._positions)
        dirty, positions = dict[str, bytes | None](), dict[str, int]()
        # Nothing below needs memory: what was collected reaches the store, or stays to be collected.
        self._dirty, self._positions = dirty, positions
        return change

    def saved(self, sequence: int) -> None:
        """Note that everything up to write number `sequence` is on disk. Called by the snapshot actor."""
        self._saved = sequence

    def _passivate(self) -> bool:
        if self._mailbox or self._closed or not self._is_saved():
            return False
        # First out of the directory, then empty: whoever still holds this actor finds no values and is sent on to its
        # successor; a reader that already holds the values reads what was current after it began.
        self._note_leaving()
        if not self._around.directory.let_go(self, self._router.triggers.forget):
            return False
        self._passivated = True
        self._values = None
        return True

    def _note_leaving(self) -> None:
        """It is about to leave memory. What is not kept anywhere must not give its event numbers again."""
        if self._dirty is None:
            self._around.note_forgotten(self._sequence)

    def _is_saved(self) -> bool:
        """True if the scope can be made again as it is: from the store, or because it was never written."""
        if self._dirty is None:
            return not self._values
        return not self._dirty and self._saved == self._sequence and not self.pinned

    def _arrive(self, message: Any) -> ScopeActor | None:
        """Bring the scope into memory, or return the actor that has replaced this one."""
        if self._passivated:
            return self._around.directory[self.scope]
        store = self._around.store
        assert store is not None  # a scope that is not kept is always in memory
        try:
            state = store.load(self.scope)
        except StorageError as error:
            raise as_failure_of(message, error) from error
        self._sequence = self._saved = state.sequence
        if state.sequence >= LAST_SEQUENCE:
            self._write = self._refuse_write  # type: ignore[method-assign]  # costs the others nothing
        self._values = state.values
        return None

    def _close(self, handlers_may: bool) -> None:
        if not self._closed:
            self._left = self._values
        self._closed = True
        self._shut = not handlers_may
        self._values = None  # what every caller looks at first

    def disown(self, refusal: Callable[[], Exception]) -> None:
        """In a forked child: refuse every later turn. The claim may belong to a thread that does not exist here."""
        self._refusal = refusal
        self._values = self._left = None
        self._closed = self._shut = self._direct = True
        self._claim = {}

    def _serve_handler(self, message: Any) -> Any:
        """A turn of a closed scope: none for callers; for a handler, as if it were open, until all is drained."""
        depth = message.depth if type(message) is Caused else event_depth.get()
        if not depth or self._shut:
            raise self._refusal()
        self._values = self._left
        if self._values is None:
            self._arrive(message)
        try:
            return self.on_receive(message)
        finally:
            self._left, self._values = self._values, None

    # -------------------------------------------------------------------------------------------------- queueing

    def _drain_mailbox(self) -> None:
        self._batches += 1
        super()._drain_mailbox()
        self._batches += 1  # in case it was weighed between the first line and the leaving

    def accept(self, envelope: Envelope) -> None:
        """Take a message whose sender will not wait here: an event loop's. Never blocks."""
        self.post(envelope)

    def post(self, item: Any) -> None:
        depth = event_depth.get()
        try:
            self._refuse_bytes(item)
            super().post(caused(depth, item) if depth else item)
        except Overloaded:
            self._router.backlog.note_refused()
            raise

    def _refuse_bytes(self, item: Any) -> None:
        """Raise Overloaded if what waits holds too many bytes. A message into an empty mailbox is always taken."""
        limit = self._around.limits.scope_mailbox_bytes
        size, mailbox = weight(item), self._mailbox
        self._largest = max(self._largest, size)
        if not limit or len(mailbox) * self._largest < limit:
            return
        # Weighed once for each batch that leaves, not for each message that comes.
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

    def _run_queued(self, message: Any) -> Any:
        if isinstance(message, Housekeeping):
            # No limit and no timeout: a scope that is overrun, or slow to load, must be saved and closed all the same.
            self._refuse_own_turn()
            reply = self._dispatcher.reply()
            self._enqueue(Envelope(message, reply))
            return reply.get()
        timeout_s = self._around.limits.call_timeout_s
        try:
            return self.ask(message).get(timeout=timeout_s)
        except pykka.Timeout as error:
            raise ReplyTimeout(self.scope, timeout_s or 0.0) from error

    def _stop(self) -> None:
        """`stop()` through a Pykka ref: a scope ends with its engine, and callers count on it until then."""
        log.warning("stop() of scope %r is ignored: close the engine instead", self.scope)

    def _fail(self) -> None:
        """A `tell` that was refused: nobody waits for the reason, so it is logged. The scope lives on."""
        error = sys.exc_info()[1]
        log.error("a message told to scope %r was refused: %s", self.scope, error, exc_info=error)
