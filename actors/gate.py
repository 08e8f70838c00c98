"""What holds back the answers and events of a scope until they are on disk: `durability: commit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Surroundings
from scopestate.errors import ScopestateError, StorageError
from scopestate.ops.turns import Turn

if TYPE_CHECKING:
    from scopestate.actors.fed_scope import Hold
    from scopestate.actors.local import LocalScope
    from scopestate.actors.stretch import Collected
    from scopestate.ops.results import StateEvent

Outcome = tuple[ReplyTo, Any, BaseException | None]
"""A reply with its value or its error, ready to deliver."""

Held = tuple[Turn[Any], ReplyTo, Any, BaseException | None]
"""A turn that was run, its reply, and the answer or the refusal that waits."""


class Batch(msgspec.Struct, eq=False):
    """What one scope has in a commit: the changes, and what the commit lets out."""

    actor: LocalScope
    collected: Collected | None
    events: list[Any]
    waiting: list[Held]
    held: Hold | None = None
    """Its changes in the feed, with their positions; None: the scope is not fed."""

    @property
    def log(self) -> list[StateEvent]:
        """Its changes for the journal, in order; [] if the scope is not fed."""
        return [] if self.held is None else self.held.events

    def settle(self) -> list[Outcome]:
        """The commit worked."""
        return self.actor.housekeep(Settle(self))

    def roll_back(self, error: StorageError) -> list[Outcome]:
        """The commit failed; nothing of it is on disk."""
        return self.actor.housekeep(RollBack(self, error))


class TakeBatch(Housekeeping[Batch], frozen=True):
    """Hand over what waits for a commit."""


class Settle(Housekeeping[list[Outcome]], frozen=True):
    """The batch is on disk: let its events out. Answer: its outcomes."""

    batch: Batch


class RollBack(Housekeeping[list[Outcome]], frozen=True):
    """The batch could not be saved: forget it, and everything that was built on it. Answer: the outcomes."""

    batch: Batch
    error: StorageError


_KINDS: Final = (TakeBatch, Settle, RollBack)


class Gate:
    """The gate of one scope, after each of its turns.

    A write changes memory in its turn, as in any scope; its answer and its event are held back until the actor that
    saves has committed it. No reader sees what is not on disk: a read of a key with an open write waits for the same
    commit. If the commit fails, its callers get the error, its events are dropped, and the scope is loaded from disk
    again, so that memory, disk and events agree.

    Thread rules: `refuse_in_turns` from any thread, everything else within the scope's turn.
    """

    def __init__(self, scope: LocalScope, around: Surroundings) -> None:
        self._scope = scope
        self._router = around.router
        self._snapshot = around.snapshot
        self.outbox: list[Any] = []
        """Events that wait for the next commit."""
        self.incoming: dict[int, StateEvent] = {}
        """The same for the feed."""
        self.unsettled = False
        """True while memory holds changes that may not be on disk."""
        self._waiting: list[Held] = []
        self._committing: dict[str, None] = {}
        """The keys that the running commit writes."""

    def refuse_in_turns(self) -> None:
        """Raise WouldDeadlock if this thread is in the middle of a turn that the next commit must wait for.

        A finalizer may run anywhere: in the middle of a commit too.
        """
        self._snapshot._refuse_own_turn()
        for actor in list(self._snapshot.committing.values()):
            actor._refuse_own_turn()

    def is_waiting(self) -> bool:
        """True while a caller waits for a commit.

        Reads that wait are in the registry under the scope's name, which a successor would take.
        """
        return self.unsettled or bool(self._waiting)

    def held_calls(self) -> int:
        """Return how many callers wait for the next commit. From any thread."""
        return len(self._waiting)

    def hold(self, turn: Turn[Any], reply: ReplyTo, answer: Any, error: BaseException | None = None) -> None:
        """Deliver the answer of a turn, or its refusal, now or after the commit that it depends on.

        A refusal depends on it just as an answer does: a conflict reports the value that it conflicts with. The answer
        to a write waits even if the write has changed nothing, such as a compare-and-set that found another value.
        """
        if self.unsettled and (turn.writes or self._is_open(turn)):
            self._waiting += ((turn, reply, answer, error),)
            self._snapshot.committing[self._scope.scope] = self._scope
            self._snapshot.commit_soon()
        elif error is not None:
            reply.fail(error)
        else:
            reply.set(answer)

    def _is_open(self, turn: Turn[Any]) -> bool:
        """True if one of the keys that a read touches has a value that is not on disk yet."""
        keys = turn.keys
        return keys is None or self._scope.is_dirty(keys) or any(key in self._committing for key in keys)

    # -------------------------------------------------------------------------------------------------------- commits

    def understands(self, message: Housekeeping[Any]) -> bool:
        """True for a message of a commit."""
        return isinstance(message, _KINDS)

    def housekeep(self, message: Housekeeping[Any]) -> Any:
        """Do one step of a commit."""
        match message:
            case Settle(batch=batch):
                return self._settle(batch)
            case RollBack(batch=batch, error=error):
                return self._roll_back(batch, error)
            case _:
                return self._take_batch()

    def _take_batch(self) -> Batch:
        scope, feed = self._scope, self._router.feed
        outbox: list[Any] = []
        incoming: dict[int, StateEvent] = {}
        waiting: list[Held] = []
        nothing: dict[str, None] = {}
        batch = Batch(scope, None, self.outbox, self._waiting)
        before = scope.collected
        collected = scope.collect()
        try:
            batch.held = feed.hold(list(self.incoming.values()))
        except BaseException:
            if collected is not None:
                scope.take_back(collected, before)
            raise
        # Nothing below allocates memory: what was collected is in the batch.
        batch.collected = collected
        self._committing = nothing if collected is None else collected.keys
        self.outbox = scope._outbox = outbox
        self.incoming = scope._incoming = incoming
        self._waiting = waiting
        return batch

    def _settle(self, batch: Batch) -> list[Outcome]:
        # Steps that allocate memory come first, so that an interrupted turn can be repeated: the events go out once.
        outcomes: list[Outcome] = [(reply, answer, error) for _, reply, answer, error in batch.waiting]
        if batch.collected is not None:
            self._scope.saved(batch.collected.revision)
        self._committing = {}
        if self._scope.is_clean() and not self._waiting:
            self.unsettled = False
            self._scope._allow_reading()
        if batch.held is not None:
            self._router.feed.settle(batch.held)
        # Events before answers: a caller that has the answer may call drain() and rely on the event.
        self._router.publish(batch.events)
        return outcomes

    def _roll_back(self, batch: Batch, error: StorageError) -> list[Outcome]:
        scope = self._scope
        waiting = batch.waiting + self._waiting
        if batch.held is not None:
            self._router.feed.drop(batch.held)
        scope.forget_changes()
        self.outbox = scope._outbox = []
        self.incoming = scope._incoming = {}
        self._waiting, self._committing = [], {}
        self.unsettled = False
        outcomes: list[Outcome] = []
        for turn, reply, _, _ in waiting:
            if turn.writes:
                outcomes.append((reply, None, turn.failed(error)))
            else:
                try:
                    scope.post(Envelope(turn, reply))  # read again, from disk
                except ScopestateError as refusal:
                    reply.fail(refusal)
        return outcomes
