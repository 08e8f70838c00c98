"""Replies for messages that are sent without waiting: `ask(block=False)` and `tell`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.reply import Reply
from scopestate.actors.router import EventRouter
from scopestate.errors import Overloaded

log = Log("scopestate.engine")


class PatientReply(Reply[Any]):
    """A reply that sends its message again when a full handler has room: the sender does not wait for that."""

    def __init__(self, router: EventRouter, convert: Callable[[Any], Any]) -> None:
        super().__init__()
        self.waiter = router._dispatcher.waiter
        self.submit_program = router._dispatcher.submit_program
        self._router = router
        self.convert = convert
        self.send: Callable[[], object] = _nothing
        """Sends the message again; set with the first sending."""
        self.size = 0
        """Size of the values in the message, in bytes; set like `send`."""

    def set(self, value: Any = None) -> None:
        super().set(value)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, HandlerFull):
            if self._router.backlog.has_waiting_room():
                self._router.backlog.when_room(self._send_again, error, self.size)
            else:
                self._router.backlog.note_refused()
                self.fail(
                    Overloaded("nothing was written: a handler is behind, and too many messages wait for it already")
                )
        else:
            super().fail(error)
            self._let_go()

    def _let_go(self) -> None:
        """Drop the message. `send` refers to this reply, so only the garbage collector would free the two."""
        self.send = _nothing

    def _send_again(self) -> None:
        # Called for one sender after another: a refusal is the answer of this one, and must not stop the others.
        try:
            self.send()
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


def _nothing() -> None:
    """Takes the place of `send` when the answer is there."""


def no_room(scope: str) -> str:
    """Return the message for a handler that did not make room in time."""
    return (
        f"nothing was written to scope {scope!r}: the mailbox of a handler that must get its event is full and "
        "did not empty within call_timeout_ms; see handler_mailbox, handler_mailbox_bytes, "
        "events_bytes, handler_when_full and handler_timeout_ms under `limits`"
    )
