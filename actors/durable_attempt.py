"""One attempt of a durable trigger, and what its end means: a pause before the next one, or a dead letter."""

from __future__ import annotations

import math
import traceback
from typing import TYPE_CHECKING, Any, Final, Literal

from scopestate.actors.consuming import HeldGroup
from scopestate.actors.containment import described
from scopestate.errors import Conflict, EventLoopDetected, HandlerTimeout, Unsupported
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.values import class_name

if TYPE_CHECKING:
    from scopestate.actors.attempts import Pause
    from scopestate.actors.consuming import Held
    from scopestate.actors.durable import DurableHandler
    from scopestate.actors.loops import OnLoop
    from scopestate.ops.transactions import DeliveryBatch

CONFLICT_S: Final = 0.02
"""A delivery waits at most this long before it is tried again after a conflict of its transaction."""
LONGEST_TEXT: Final = 16_384
"""Characters of an error, and of a traceback, that a dead letter keeps."""

Counted = Literal["", "delivered", "skipped", "failed", "retried", "dropped"]


class CutOff(Exception):
    """The reason for giving up a delivery if every attempt at it ended with its process."""

    def __init__(self, attempts: int) -> None:
        super().__init__(
            f"the process ended or was killed during the last attempt of {attempts}: the handler may be the cause"
        )


class Attempt:
    """One call of the handler with one event. The `Delivery` that the handler gets calls it."""

    __slots__ = (
        "call", "counted", "due_s", "event", "handler", "item", "late", "lost", "number", "over", "pause",
        "transaction_of", "turn",
    )  # fmt: skip

    def __init__(self, handler: DurableHandler, item: Held) -> None:
        self.handler = handler
        self.item = item
        self.event: Any = item.event
        """What the function gets: an event, or a list of events."""
        self.number = item.attempts + 1
        self.due_s = math.inf
        """When it is overdue, by the dispatcher's clock; inf until the function is called."""
        self.pause: Pause | None = None
        """The pause before the next attempt with the same event; None: there is no pause."""
        self.counted: Counted = ""
        """What it counts as."""
        self.call: OnLoop | None = None
        """What it waits for on an event loop."""
        self.late = False
        """True: it is overdue, and what the function returns or raises does not count."""
        self.lost = False
        """True: the delivery is no longer this engine's, and the outcome does not count."""
        self.over = False
        self.transaction_of: Literal["open", "failed", "done", "unknown"] | None = None
        """What became of its transaction; None: it has had none."""
        self.turn: DeliveryBatch | None = None
        """The commit of its transaction."""

    @property
    def position(self) -> int:
        """The number of its event."""
        return self.item.event.position

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """See `Delivery.extend`."""
        del delivery
        self.refuse_if_over()
        self.due_s = self.handler._dispatcher.monotonic() + seconds
        if self.call is not None:
            self.call.due_s = self.due_s
        self.handler.watch(self.due_s, seconds)

    def transaction(self, delivery: Delivery, scope: str) -> Any:
        """See `Delivery.transaction`."""
        del delivery
        self.refuse_if_over()
        if isinstance(self.item, HeldGroup):
            raise Unsupported(
                "a transaction of several events", "with `debounce` or `batch` a delivery acknowledges more than one"
            )
        make = self.handler.make_transaction
        if make is None:
            raise Unsupported("a transaction of a delivery", "this engine has no scopes of its own")
        return make(self, scope)

    def open_transaction(self) -> None:
        """Note that its transaction is open. Raises Unsupported if it has had one that wrote, or may have written."""
        self.refuse_if_over()
        if self.transaction_of not in (None, "failed"):
            raise Unsupported(
                "a second transaction of one delivery",
                f"the first one acknowledges {self.id!r}: write everything in it, to one scope",
            )
        self.transaction_of = "open"

    def lose(self, lost: frozenset[int]) -> None:
        """Some deliveries are not this engine's any more. Their outcome does not count."""
        item = self.item
        if isinstance(item, HeldGroup):
            item.members = [one for one in item.members if one.event.position not in lost]
            self.lost = self.lost or not item.members
        elif self.position in lost:
            self.lost = True

    def is_own_conflict(self, error: BaseException) -> bool:
        """Return whether its transaction has met a conflict: the handler is called again, and that does not count."""
        return self.turn is not None and isinstance(error, Conflict)

    @property
    def id(self) -> str:
        """The id of its delivery."""
        return f"{self.handler.port.name}:{self.position}"

    def refuse_if_over(self) -> None:
        """Raise Unsupported for an attempt that does not count any more."""
        if self.late or self.over or self.lost:
            why = "it took longer than `ack_wait`, and is tried again" if self.late else "it has ended"
            raise Unsupported("a delivery whose attempt is over", f"{self.id!r}: {why}")


def pause_of(error: BaseException, retry: Retry, attempt: int, random: float, *, conflict: bool) -> float | None:
    """Return the seconds before the next attempt; None: there is none, the delivery is given up. Pure."""
    if isinstance(error, RetryLater):
        return error.seconds
    if isinstance(error, (Discard, EventLoopDetected, CutOff)):
        return None
    if conflict and isinstance(error, Conflict):
        return CONFLICT_S * random
    # What is no Exception, such as the end of an event loop, says nothing about the event; nor does a time limit.
    always = isinstance(error, HandlerTimeout) or not isinstance(error, Exception)
    if retry.tries_again(attempt, error) or (always and attempt < retry.attempts):
        return retry.pause_s(attempt, random)
    return None


def text_of(error: BaseException) -> str:
    """Return class and text of an error, as dead letters keep it."""
    return _as_unicode(f"{class_name(error)}: {described(error)}"[:LONGEST_TEXT])


def traceback_of(error: BaseException) -> str:
    """Return where an error was raised, as dead letters keep it; "" if that is not known."""
    if error.__traceback__ is None:
        return ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - it may call code of the error's class, and of those that it was caused by
        text = "".join(traceback.format_tb(error.__traceback__))
    return _as_unicode(text[-LONGEST_TEXT:])


def _as_unicode(text: str) -> str:
    # The name of a file, in the text of an OSError, may have lone surrogates. No store or connection takes them.
    return text.encode(errors="backslashreplace").decode()
