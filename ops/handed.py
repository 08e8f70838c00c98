"""What the engines on both sides of a bridge tell each other about deliveries (docs/reference/protocol.md 13.1).

The other engine has the consumers. An engine behind a bridge takes events of them, and calls the handlers. The fields
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
"""The most bytes of events in one answer, which always has at least one event."""

Position = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Milliseconds = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
"""What a store can hold: one number that it cannot would keep all scopes from being saved."""


class HandedEvent(msgspec.Struct, omit_defaults=True):
    """One event, with what is known of its attempts."""

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
        """Return it as an event. Raises DeserializationError for values that are not JSON."""
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
    """How an attempt ended. The other engine has the event."""

    position: Position
    verdict: Literal["done", "retry", "dead", "held"]
    attempts: Count = 0
    first_ms: Milliseconds = 0
    due_ms: Milliseconds = 0
    error: str = ""
    traceback: str = ""


class Join(msgspec.Struct, omit_defaults=True):
    """Begin to take the events of a consumer, which is made if there is none."""

    consumer: str
    holder: str
    """Names the engine: a text that no other engine has."""
    trigger_id: str
    function_id: str
    config: dict[str, Any]
    """The options of the trigger."""
    since_ms: int
    """When its program has registered it, in milliseconds since the epoch."""
    held: list[tuple[Position, Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)], int]] = []
    """What the engine holds already: position, attempt, and the `serial` of its `Note`. The attempt is that which is
    running; 0: none is; -1: it has ended, and its outcome is not told yet."""


class Joined(msgspec.Struct, omit_defaults=True):
    """Answer to `Join`."""

    lost: list[int] = []
    """Positions of `held` that the engine does not hold any more."""
    paused: str | None = None


class Take(msgspec.Struct, omit_defaults=True):
    """Ask for the next events. The answer comes when there are some, or after `wait_ms`."""

    consumer: str
    holder: str
    most: int
    wait_ms: int = 0


class Taken(msgspec.Struct, omit_defaults=True):
    """Answer to `Take`. First the engine forgets what it has lost, then it takes the events."""

    events: list[HandedEvent] = []
    lost: list[int] = []
    paused: str | None = None
    gone: bool = False
    """True: the other engine does not know this one as a holder of the consumer any more: it is to join again."""
    forgotten: bool = False
    """True: because the consumer was forgotten; it starts again."""
    stands_by: bool = False
    """True: another engine has registered it later, with other filters or another order."""


class Note(msgspec.Struct, omit_defaults=True):
    """Tell what has ended, and then what begins."""

    consumer: str
    holder: str
    ended: list[HandedOutcome] = []
    began: list[tuple[Position, Count]] = []
    """Position, and number of the attempt. Answered when it is noted."""
    serial: int = 0
    """With `began`: a number that this message alone has."""
    resolve: tuple[Position, int] | None = None
    """Position and serial of an attempt: has its transaction happened?"""
    letters: Count = 0
    """Keep places for this many dead letters."""
    flush: bool = False
    """Answer when what has ended is saved."""
    leave: bool = False
    """Take no more events. What is running may end."""


class Noted(msgspec.Struct, omit_defaults=True):
    """Answer to `Note`."""

    gone: list[int] = []
    """Those that were to begin, and that the engine does not hold."""
    is_holder: bool = True
    """False: as `Taken.gone`."""
    acknowledged: bool = False
    full: bool = False


class Drain(msgspec.Struct, omit_defaults=True):
    """Wait until what these consumers have to handle now is handled, in whichever engine."""

    consumers: list[str]
    wait_ms: int
    marks: dict[str, int] = {}
    """Up to which position; at first what is committed at that moment."""


class Drained(msgspec.Struct, omit_defaults=True):
    """Answer to `Drain`: which consumers are not done, each with its mark."""

    left: dict[str, int] = {}


prepare(Join, Joined, Take, Taken, Note, Noted, Drain, Drained)
