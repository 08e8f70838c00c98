"""What scopes have in common that are kept by somebody else: another engine, or Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from scopestate.actors.containment import Log
from scopestate.actors.control import Close, Housekeeping, Passivate
from scopestate.actors.reply import Reply
from scopestate.actors.scope import ScopeActor
from scopestate.errors import DeserializationError
from scopestate.ops import turns
from scopestate.ops.turns import answer_of, checked_name, turn_of

log = Log("scopestate.scope")

WRITES: Final = frozenset({turns.Set, turns.Update, turns.Delete})
WHOLE: Final = frozenset({turns.List, turns.Items})
"""Calls on no key in particular."""

Converter = Callable[[Any], Any]
"""Makes a Python value of a turn's answer."""


class ScopeElsewhere(ScopeActor):
    """A scope whose values are not here. What it has of its own is who waits, and which triggers hear of it.

    `_values` stays None: whoever looks there first goes on to `run`, `post` or `accept`.
    """

    def read(self, key: str) -> bytes | None:
        return self.run(turns.Get(key))  # type: ignore[no-any-return]

    def read_all(self) -> list[bytes]:
        return self.run(turns.List())  # type: ignore[no-any-return]

    def _turn_for(self, message: Any, depth: int) -> tuple[Any, Converter | None]:
        """Return the turn that a message stands for, and for a public one what makes a Python value of the answer.

        Raises what a closed scope, or one that does not understand it, answers.
        """
        if self._closed and (self._shut or not depth):
            raise self._refusal()
        kind = type(message)
        if kind is turns.Set or kind is turns.Update or kind is turns.Delete or kind is turns.Get:
            key = message.key
            if type(key) is not str or not key.isascii():
                plain = checked_name("key", key)
                if plain is not key:
                    message = msgspec.structs.replace(message, key=plain)
            return message, None
        if kind in WHOLE:
            return message, None
        # Through a Pykka ref: the public messages, with Python values.
        turn = turn_of(message, self._around.limits.max_value_bytes)
        if message.scope != self.scope:
            raise DeserializationError(f"a message for scope {message.scope!r} was sent to scope {self.scope!r}")
        return turn, lambda answer: answer_of(message, answer)

    # ------------------------------------------------------------------------------------------------------ events

    def _make_sure_of_room(self, key: str, depth: int) -> None:
        """Before anything is sent: a full handler must stop the write, not lose its event. Raises HandlerFull."""
        self._router.check_room(self.scope, self._watch, key, depth)

    def _fire(self, key: str, old: bytes | None, new: bytes | None, depth: int) -> None:
        """Publish the event of one change, which has happened."""
        self._sequence += 1
        router = self._router
        router.publish(router.prepare_late(self.scope, self._watch, key, old, new, self._sequence, depth))

    # ----------------------------------------------------------------------------------------------------- leaving

    def _on_rare(self, message: Any) -> Any:
        match message:
            case Passivate():
                return self._leave()
            case Close(handlers_may=handlers_may):
                self._closed = True
                self._shut = not handlers_may
                return None
            case Housekeeping():
                return None  # Collect: nothing of this scope is kept here
            case _:
                raise TypeError(f"not housekeeping: {message!r:.80}")

    def _is_needed(self) -> bool:
        """True while somebody waits for this actor."""
        return bool(self._mailbox)

    def _note_leaving(self) -> None:
        """The actor leaves memory: its event numbers must not be given again."""

    def _leave(self) -> bool:
        if self._closed or self._is_needed():
            return False
        if not self._around.directory.let_go(self, self._router.triggers.forget):
            return False
        self._passivated = True
        self._note_leaving()
        return True


class Told(Reply[Any]):
    """The reply to a Pykka ref's `tell`: nobody reads it, so a refusal is logged."""

    def fail(self, error: BaseException) -> None:
        log.error("a message told to a scope was refused: %s", error, exc_info=error)
