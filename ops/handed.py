"""The messages about deliveries between the two engines of a bridge (docs/reference/protocol.md 13.1).

The other engine has the consumers. The engine behind the bridge takes their events and calls the handlers. The fields
are those of `actors/consuming.py`; positions are those of the other engine's journal.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from scopestate.ops.results import EventType, StateEvent
from scopestate.ops.trace_context import TracedDepth, context_of, read_text
from scopestate.ops.values import parse, prepare

JOIN: Final = "engine::deliveries::join"
TAKE: Final = "engine::deliveries::take"
NOTE: Final = "engine::deliveries::note"
DRAIN: Final = "engine::deliveries::drain"
LONGEST_WAIT_MS: Final = 10_000
MOST_BYTES: Final = 4 << 20
"""Largest number of bytes of events in one answer. One event may be larger: an answer has at least one."""

Position = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Milliseconds = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
"""The numbers that a store can hold. A single larger one would prevent all scopes from being saved."""


class HandedEvent(msgspec.Struct, omit_defaults=True):
    """One event, with its attempts as far as they are known."""

    kind: EventType
    scope: str
    key: str
    revision: int
    position: int
    old: Raw | UnsetType = UNSET
    new: Raw | UnsetType = UNSET
    depth: int = 0
    expired_at: int | None = None
    late_ms: int | None = None
    transaction: int = 0
    time_ms: int = 0
    attempts: int = 0
    first_ms: int = 0
    due_ms: int = 0
    error: str | None = None
    cut_off: bool = False
    blocked: bool = False
    trace: str = ""

    @classmethod
    def of(cls, event: StateEvent, **attempts: Any) -> HandedEvent:
        """Return an event as it is sent."""
        context = context_of(event.depth)
        return cls(
            event.event_type,
            event.scope,
            event.key,
            event.revision,
            event.position,
            UNSET if event.old_json is None else Raw(event.old_json),
            UNSET if event.new_json is None else Raw(event.new_json),
            int(event.depth),
            event.expired_at,
            event.late_ms,
            event.transaction,
            event.time_ms,
            trace="" if context is None else context.text,
            **attempts,
        )

    def event(self) -> StateEvent:
        """Return the event. Raises DeserializationError for values that are not JSON."""
        return StateEvent(
            self.kind,
            self.scope,
            self.key,
            None if isinstance(self.old, UnsetType) else parse(bytes(self.old)),
            None if isinstance(self.new, UnsetType) else parse(bytes(self.new)),
            self.revision,
            TracedDepth.of(self.depth, read_text(self.trace)) if self.trace else self.depth,
            self.expired_at,
            self.late_ms,
            self.transaction,
            self.time_ms,
            self.position,
        )


class HandedOutcome(msgspec.Struct, omit_defaults=True):
    """How an attempt ended. The event itself is not sent: the other engine has it."""

    position: Position
    verdict: Literal["done", "retry", "dead", "held"]
    attempts: Count = 0
    first_ms: Milliseconds = 0
    due_ms: Milliseconds = 0
    error: str = ""
    traceback: str = ""


class Join(msgspec.Struct, omit_defaults=True):
    """Begin to take the events of a consumer, which is created if it does not exist."""

    consumer: str
    holder: Annotated[str, Meta(min_length=1, max_length=256)]
    """The name of the engine: a text that no other engine uses. Not empty: that is the engine that has the store."""
    trigger_id: str
    function_id: str
    config: dict[str, Any]
    """The options of the trigger."""
    since_ms: int
    """When the program registered the trigger, in milliseconds since the epoch."""
    held: list[tuple[Position, Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)], int]] = []
    """The events that the engine holds already: position, attempt, and the `serial` of its `Note`. The attempt is the
    one that is running; 0: none is running; -1: it has ended, and its outcome was not sent yet."""


class Joined(msgspec.Struct, omit_defaults=True):
    """Answer to `Join`."""

    lost: list[int] = []
    """Positions in `held` that the engine no longer holds."""
    paused: str | None = None


class Take(msgspec.Struct, omit_defaults=True):
    """Ask for the next events. The answer comes when there are events, or after `wait_ms`."""

    consumer: str
    holder: str
    most: int
    wait_ms: int = 0


class Taken(msgspec.Struct, omit_defaults=True):
    """Answer to `Take`. The engine first forgets the events that it has lost, then takes the new ones."""

    events: list[HandedEvent] = []
    lost: list[int] = []
    paused: str | None = None
    gone: bool = False
    """True: the other engine no longer knows this one as a holder of the consumer, so this one must join again."""
    forgotten: bool = False
    """True: `gone` is true because the consumer was forgotten; it starts again."""
    stands_by: bool = False
    """True: another engine has registered the trigger later, with other filters or another order."""


class Note(msgspec.Struct, omit_defaults=True):
    """Report the attempts that have ended, and then those that begin."""

    consumer: str
    holder: str
    ended: list[HandedOutcome] = []
    began: list[tuple[Position, Count]] = []
    """Position and number of each attempt that begins. The answer comes when they are noted."""
    serial: int = 0
    """With `began`: a number that no other message has."""
    resolve: tuple[Position, int] | None = None
    """Position and serial of an attempt: asks whether its transaction was committed."""
    letters: Count = 0
    """The number of dead letters to reserve places for."""
    flush: bool = False
    """True: answer when the attempts that have ended are saved."""
    leave: bool = False
    """True: take no more events. Attempts that are running may end."""


class Noted(msgspec.Struct, omit_defaults=True):
    """Answer to `Note`."""

    gone: list[int] = []
    """Positions in `began` that the engine does not hold."""
    is_holder: bool = True
    """False means the same as `Taken.gone`."""
    acknowledged: bool = False
    full: bool = False


class Drain(msgspec.Struct, omit_defaults=True):
    """Wait until these consumers have handled every event that they have to handle now, in any engine."""

    consumers: list[str]
    wait_ms: int
    marks: dict[str, int] = {}
    """Consumer -> the position up to which to wait. Left out in the first message: the changes committed by then."""


class Drained(msgspec.Struct, omit_defaults=True):
    """Answer to `Drain`: the consumers that are not done, each with its mark."""

    left: dict[str, int] = {}


prepare(Join, Joined, Take, Taken, Note, Noted, Drain, Drained)
