"""Replies for messages that are sent without waiting: `ask(block=False)` and `tell`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.router import EventRouter
from scopestate.actors.scope import ScopeActor
from scopestate.errors import Overloaded
from scopestate.ops.turns import Turn

log = Log("scopestate.engine")


class PatientReply(Reply[Any]):
    """A reply that sends its turn again when a full handler has room: the sender does not wait for that."""

    def __init__(
        self, router: EventRouter, scopes: Mapping[str, ScopeActor], scope: str, convert: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.waiter = router._dispatcher.waiter
        self.submit_program = router._dispatcher.submit_program
        self.convert = convert
        self._backlog = router.backlog
        self._scopes = scopes
        self._scope = scope
        self._envelope: Envelope | None = None

    def wrap(self, turn: Turn[Any]) -> Envelope:
        """Return what the sender sends, and what is sent again."""
        self._envelope = Envelope(turn, self)
        return self._envelope

    def set(self, value: Any = None) -> None:
        super().set(value)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, HandlerFull):
            size = self._envelope.message.size() if self._envelope is not None else 0
            if self._backlog.has_waiting_room():
                self._backlog.when_room(self._send_again, error, size)
            else:
                self._backlog.refused.add()
                self.fail(
                    Overloaded("nothing was written: a handler is behind, and too many messages wait for it already")
                )
        else:
            super().fail(error)
            self._let_go()

    def _let_go(self) -> None:
        """Drop the turn. The envelope refers to this reply, so only the garbage collector would free the two."""
        self._envelope = None

    def _send_again(self) -> None:
        # Called for one sender after another: a refusal is the answer of this one, and must not stop the others.
        envelope = self._envelope
        if envelope is None:
            return
        try:
            # Queued: the thread that has made room is in the middle of a handler's turn.
            self._scopes[self._scope].post(envelope)
        except BaseException as error:
            if is_from_outside(error):
                raise
            self.fail(error)


class Told(PatientReply):
    """The reply to a `tell`. It is not read, so a refusal is logged."""

    def set(self, value: Any = None) -> None:
        """Take the answer, which is not read."""
        self._let_go()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, HandlerFull):
            super().fail(error)
        else:
            log.error("a message sent with tell() was refused: %s", error, exc_info=error)
            self._let_go()


def no_room(scope: str) -> str:
    """Return the message for a handler that did not make room in time."""
    return (
        f"nothing was written to scope {scope!r}: the mailbox of a handler that must get its event is full and "
        "did not empty within call_timeout_ms; see handler_mailbox, handler_mailbox_bytes, "
        "events_bytes, handler_when_full and handler_timeout_ms under `limits`"
    )
