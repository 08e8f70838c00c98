"""Scopes whose writes are answered when they are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pykka

from scopestate.actors.control import Caused, Housekeeping, as_failure_of
from scopestate.actors.ports import ScopeChange
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.actors.turn import WAIT
from scopestate.errors import ReplyTimeout, ScopestateError, StorageError
from scopestate.ops import messages, turns

Outcome = tuple[ReplyTo, Any, BaseException | None]
"""A reply with its value or its error, ready to deliver."""

_WRITES: Final = frozenset({turns.Set, turns.Update, turns.Delete, messages.Set, messages.Update, messages.Delete})


class TakeBatch(Housekeeping, frozen=True):
    """Hand over what waits for a commit. Answer: Batch."""


class Settle(Housekeeping, frozen=True):
    """The batch is on disk: let its events out. Answer: its outcomes."""

    batch: Batch


class RollBack(Housekeeping, frozen=True):
    """The batch could not be saved: forget it, and everything that was built on it. Answer: the outcomes."""

    batch: Batch
    error: StorageError


class Batch(msgspec.Struct, frozen=True, eq=False):
    """What one scope has in a commit: the changes, and what the commit lets out."""

    actor: CommitScopeActor
    change: ScopeChange | None
    events: list[Any]
    waiting: list[tuple[Any, ReplyTo, Any]]
    """(message, reply, answer) of each caller who waits."""

    def settle(self) -> list[Outcome]:
        """The commit worked."""
        return self.actor.run(Settle(self))  # type: ignore[no-any-return]

    def roll_back(self, error: StorageError) -> list[Outcome]:
        """The commit failed; nothing of it is on disk."""
        return self.actor.run(RollBack(self, error))  # type: ignore[no-any-return]


class CommitScopeActor(ScopeActor):
    """Owns one scope with `durability: commit`: an output gate behind each turn.

    A write changes memory in its turn, as in any scope; its answer and its event are kept back until the snapshot actor
    has committed it. Nobody sees what is not on disk: a reader of a key with an open write waits for the same commit.
    If the commit fails, its callers get the error, its events are dropped, and the scope is loaded from disk again, so
    that memory, disk and events agree.
    """

    def __init__(self, scope: str, around: Surroundings, *, keeps: bool) -> None:
        super().__init__(scope, around, keeps=keeps)
        self._outbox = []
        self._registry = around.snapshot.committing
        self._waiting: list[tuple[Any, ReplyTo, Any]] = []
        self._flying: dict[str, bytes | None] = {}
        self._unsettled = False

    # ------------------------------------------------------------------------------------------------- reading

    def read(self, key: str) -> bytes | None:
        data = self.peek(key)
        return self.run(turns.Get(key)) if data is None else data

    def peek(self, key: str) -> bytes | None:
        values = self._values
        if values is None or not self._direct:
            return None
        data = values.get(key)
        # Looked at after the value was read. If all is settled now and the scope was not loaded anew meanwhile, then
        # what was read is on disk.
        if self._unsettled or values is not self._values:
            return None
        self.touched = True
        return data

    def read_all(self) -> list[bytes]:
        values = self._values
        if values is not None and self._direct:
            everything = list(values.values())
            if not self._unsettled and values is self._values:
                self.touched = True
                return everything
        return self.run(turns.List())  # type: ignore[no-any-return]

    # --------------------------------------------------------------------------------------------------- turns

    def run(self, message: Any, otherwise: Any = WAIT) -> Any:
        if isinstance(message, Housekeeping):
            return super().run(message, otherwise)
        if otherwise is not WAIT:
            return otherwise  # no answer is ready before its commit
        # A finalizer may run anywhere: in the middle of a commit, and of a turn that the next commit must wait for.
        self._around.snapshot._refuse_own_turn()
        for actor in list(self._registry.values()):
            actor._refuse_own_turn()
        timeout_s = self._around.limits.call_timeout_s
        reply = self._dispatcher.reply()
        self.accept(Envelope(message, reply))
        try:
            return reply.get(timeout=timeout_s)
        except pykka.Timeout as error:
            raise ReplyTimeout(self.scope, timeout_s or 0.0) from error

    def accept(self, envelope: Envelope) -> None:
        if self.loaded:
            self.handle_or_post(envelope)
        else:
            self.post(envelope)

    def _handle(self, item: Any) -> None:
        if self._passivated and type(item) is Envelope and not isinstance(item.message, Housekeeping):
            self._resend(self._around.directory, item)
        else:
            super()._handle(item)

    def _resend(self, to: Mapping[str, ScopeActor], envelope: Envelope) -> None:
        """Queue a message anew, at the scope's actor of now. A refusal is its answer: nothing is raised."""
        try:
            to[self.scope].post(envelope)
        except ScopestateError as error:
            envelope.reply_to.fail(error)

    def _answer(self, message: Any, reply: ReplyTo, answer: Any) -> None:
        inner = message.message if type(message) is Caused else message
        if type(inner) in _WRITES:
            self._waiting += ((inner, reply, answer),)  # `_write` has asked for the commit
        elif self._unsettled and self._is_open(inner):
            self._waiting += ((inner, reply, answer),)
            self._registry[self.scope] = self
            self._around.snapshot.commit_soon()
        else:
            reply.set(answer)

    def _is_saved(self) -> bool:
        # Reads that wait for the next commit are in the registry under the scope's name, which a successor would take.
        return super()._is_saved() and not self._unsettled and not self._waiting

    def holds_keys(self) -> bool | None:
        # A key that waits for its commit may never have been: who asks waits for it, as every reader does.
        return bool(self.read_all()) if self._unsettled else super().holds_keys()

    def _is_open(self, message: Any) -> bool:
        """True if a read touches what is not on disk yet."""
        if isinstance(message, (turns.Get, messages.Get)):
            return message.key in (self._dirty or ()) or message.key in self._flying
        return isinstance(message, (turns.List, turns.Items, messages.List))

    def _write(self, key: str, old: bytes | None, new: bytes | None) -> None:
        self._unsettled = True
        super()._write(key, old, new)
        self._around.snapshot.commit_soon()

    def _announce(self) -> None:
        """Events wait for the commit."""

    def _tell_again(self) -> None:
        super()._tell_again()
        self._around.snapshot.commit_anyway()

    # -------------------------------------------------------------------------------------------------- commits

    def _on_rare(self, message: Any) -> Any:
        match message:
            case TakeBatch():
                return self._take_batch()
            case Settle(batch=batch):
                return self._settle(batch)
            case RollBack(batch=batch, error=error):
                return self._roll_back(batch, error)
            case _:
                return super()._on_rare(message)

    def _take_batch(self) -> Batch:
        batch = Batch(self, self._collect(), self._outbox, self._waiting)
        self._outbox, self._waiting = [], []
        self._flying = batch.change.values if batch.change is not None else {}
        return batch

    def _settle(self, batch: Batch) -> list[Outcome]:
        # What may need memory comes first, so that a turn that broke off can be done again: the events go out once.
        outcomes: list[Outcome] = [(reply, answer, None) for _, reply, answer in batch.waiting]
        if batch.change is not None:
            self._saved = batch.change.sequence
        self._flying = {}
        if not self._dirty and not self._waiting:
            self._unsettled = False
        # Events before answers: who has the answer may call drain() and count on the event.
        self._router.publish(batch.events)
        return outcomes

    def _roll_back(self, batch: Batch, error: StorageError) -> list[Outcome]:
        waiting = batch.waiting + self._waiting
        self._values = self._left = None  # loaded again by the next call
        self._dirty, self._positions, self._flying = {}, {}, {}
        self._outbox, self._waiting = [], []
        self._saved = self._sequence
        self._unsettled = False
        outcomes: list[Outcome] = []
        for message, reply, _ in waiting:
            if type(message) in _WRITES:
                outcomes.append((reply, None, as_failure_of(message, error)))
            else:
                self._resend({self.scope: self}, Envelope(message, reply))  # read again, from disk
        return outcomes
