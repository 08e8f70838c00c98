"""The entries of the stream of events, as the scripts write them."""

from __future__ import annotations

from typing import NamedTuple

from scopestate.actors.router import Expired
from scopestate.errors import DeserializationError
from scopestate.ops.results import EventType, StateEvent
from scopestate.ops.trace_context import TracedDepth, read_text
from scopestate.ops.values import parse


class Event(NamedTuple):
    """One change, as it is in the stream."""

    scope: str
    key: str
    old: bytes | None
    """The value as JSON; None if there was none; null if it was not JSON, which another program had written."""
    new: bytes | None
    number: int
    """1, 2, 3, ... over all scopes of a database and a prefix."""
    depth: int
    revision: int = 0
    """The revision of the change; the number, where changes have no revisions."""
    following: int = 0
    """How many more events of its transaction follow."""
    expired: Expired | None = None
    """If the key was removed because its deadline had passed: the deadline, and how late that was, in milliseconds."""


def event_of(fields: list[bytes]) -> Event:
    """Return the event of a stream entry, whose fields are in the order of `script.SOURCE`.

    Raises ValueError or IndexError if scopestate has not written the entry.
    """
    if fields[0] != b"n" or fields[2] != b"s" or fields[4] != b"k":
        raise ValueError(f"an entry of other fields: {fields!r:.100}")
    old = new = None
    depth = revision = deadline = following = 0
    trace = b""
    for i in range(6, len(fields), 2):
        name = fields[i]
        if name == b"v":
            new = fields[i + 1]
        elif name == b"o":
            old = _as_json(fields[i + 1])
        elif name == b"d":
            depth = int(fields[i + 1])
        elif name == b"t":
            trace = fields[i + 1]
        elif name == b"r":
            revision = int(fields[i + 1])
        elif name == b"x":
            deadline = int(fields[i + 1])
        elif name == b"m":
            following = int(fields[i + 1])
    if trace:
        depth = TracedDepth.of(depth, read_text(trace.decode(errors="replace")))
    number = int(fields[1])
    # A revision is the time of the change in microseconds, or a little more.
    expired = (deadline, max(0, revision // 1000 - deadline)) if deadline else None
    return Event(
        fields[3].decode(), fields[5].decode(), old, new, number, depth, revision or number, following, expired
    )


def state_event_of(entry_id: bytes, fields: list[bytes], base: int) -> StateEvent | None:
    """Return a stream entry as an event, with its position; None if scopestate has not written it.

    `base`: the position before that of the first event.
    """
    try:
        event = event_of(fields)
    except (ValueError, IndexError):
        return None
    new, revision = event.new, event.revision
    kind: EventType = "state:deleted" if new is None else "state:created" if event.old is None else "state:updated"
    if event.expired is not None:
        kind = "state:expired"
    expired_at, late_ms = event.expired or (None, None)
    return StateEvent(
        kind,
        event.scope,
        event.key,
        event.old,
        new,
        revision,
        event.depth,
        expired_at,
        late_ms,
        transaction=revision + event.following,
        time_ms=place_of(entry_id)[0],
        position=base + event.number,
    )


def number_of(fields: list[bytes]) -> int | None:
    """Return the number of a stream entry; None if scopestate has not written it."""
    try:
        return event_of(fields).number
    except (ValueError, IndexError):
        return None


def place_of(entry_id: bytes) -> tuple[int, int]:
    """Return the position of an entry id, for comparing."""
    milliseconds, _, count = entry_id.partition(b"-")
    return int(milliseconds), int(count)


def _as_json(raw: bytes) -> bytes:
    """Return a value of another program as `encode` writes it; null if not JSON (docs/reference/semantics.md 7)."""
    try:
        return parse(raw)
    except DeserializationError:
        return b"null"
