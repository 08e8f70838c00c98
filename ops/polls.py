"""`state::changes`: a poll for what has changed since a cursor, and its answer as JSON text.

If there is nothing to report, a poll waits up to `wait_ms` for the next change. The answer always has the cursor for
the next poll, even if it has no changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from scopestate.errors import DeserializationError, InvalidPageLimits
from scopestate.ops.changes import Change
from scopestate.ops.requests import Payload, convert
from scopestate.ops.results import EventName
from scopestate.ops.trace_context import context_of
from scopestate.ops.values import prepare

FUNCTION_ID: Final = "state::changes"

LONGEST_WAIT_MS: Final = 30_000
MOST_CHANGES: Final = 1_000
MOST_BYTES: Final = 8_000_000
_LEAST_BYTES: Final = 256

_json: Final = msgspec.json.Encoder().encode


class ChangesInput(msgspec.Struct, frozen=True, kw_only=True):
    """Read what has changed since a cursor; if nothing has, wait for a change."""

    scope: Annotated[str | None, Meta(description="Only this scope; absent: every scope that may be read")] = None
    scope_prefix: Annotated[str | None, Meta(description="Only scopes with this prefix; instead of `scope`")] = None
    key: Annotated[str | None, Meta(description="Only this key")] = None
    prefix: Annotated[str | None, Meta(description="Only keys with this prefix")] = None
    events: Annotated[
        tuple[EventName, ...] | None, Meta(description="Only these kinds of changes; all of them if absent")
    ] = None
    cursor: Annotated[
        str | None, Meta(description="The `cursor` of the previous poll, or of a change; absent: from now on")
    ] = None
    revision: Annotated[
        int | None, Meta(description="Instead of a cursor: after this revision of the scope; needs `scope`")
    ] = None
    limit: Annotated[int, Meta(description="At most this many changes, 1 to 1,000")] = 100
    max_bytes: Annotated[
        int, Meta(description="At most this many bytes of JSON, 256 to 8,000,000; one change may take more")
    ] = 1_000_000
    wait_ms: Annotated[int, Meta(description="How long to wait for a change if there is none, 0 to 30,000")] = 0
    snapshot: Annotated[bool, Meta(description="Without a cursor: begin with the values that the keys have now")] = (
        False
    )
    values: Annotated[bool, Meta(description="False: changes without their values")] = True


class Poll(ChangesInput, frozen=True, kw_only=True):
    """The same, with the fields that only a bridge sends."""

    tell: bool = msgspec.field(default=False, name="_events")
    """True: include all fields of the events, and deletes of keys that did not exist."""
    among: tuple[tuple[str | None, str], ...] | None = msgspec.field(default=None, name="_among")
    """Only some scopes: each entry names one, or has null and a prefix of names."""
    fresh: int = msgspec.field(default=0, name="_fresh")
    """The changes of the last this many entries of `among` are wanted from now on, even if the cursor is older."""
    settled: bool = msgspec.field(default=False, name="_settled")
    """True: first wait until every change written so far can be reported. A commit that is running delays that."""
    once: bool = msgspec.field(default=False, name="_once")
    """True: no poll continues from this one, so nothing is kept for it."""


prepare(Poll)


class ChangeFound(msgspec.Struct):
    """One change."""

    kind: Annotated[str, Meta(description="`put`, `delete` or `expire`")]
    scope: str
    key: str
    revision: Annotated[int, Meta(description="The revision that the change gave to its key")]
    cursor: Annotated[
        str, Meta(description="Continues after this change; for an entry of a snapshot, begins the snapshot again")
    ]
    value: Annotated[Any, Meta(description="The new value; absent if the key was removed")] = None
    old_value: Annotated[Any, Meta(description="The previous value; absent if there was none")] = None
    transaction: Annotated[
        int, Meta(description="The revision of the last change of its transaction; absent if it is alone")
    ] = 0
    initial: Annotated[bool, Meta(description="True for the value that a key has where the poll begins")] = False
    expired_at: Annotated[
        int | None, Meta(description="The deadline that has passed, in milliseconds since the epoch")
    ] = None
    late_ms: Annotated[int | None, Meta(description="Milliseconds from the deadline to the removal")] = None
    time_ms: Annotated[int, Meta(description="When it was made, in milliseconds since the epoch")] = 0


class ChangesFound(msgspec.Struct):
    """Result of `state::changes`."""

    changes: list[ChangeFound]
    cursor: Annotated[str, Meta(description="The `cursor` of the next poll")]
    more: Annotated[bool, Meta(description="True if the next poll will find changes at once")]


def read_poll(payload: Payload) -> Poll:
    """Read the input of `state::changes`. Raises DeserializationError and InvalidPageLimits."""
    poll = convert(payload, Poll)
    for name, number, low, high in (
        ("limit", poll.limit, 1, MOST_CHANGES),
        ("max_bytes", poll.max_bytes, _LEAST_BYTES, MOST_BYTES),
        ("wait_ms", poll.wait_ms, 0, LONGEST_WAIT_MS),
    ):
        if not low <= number <= high:
            raise InvalidPageLimits(f"`{name}` is from {low} to {high}, not {number}")
    for one, other in (("scope", "scope_prefix"), ("key", "prefix")):
        if getattr(poll, one) is not None and getattr(poll, other) is not None:
            raise DeserializationError(f"give `{one}` or `{other}`, not both")
    if poll.events is not None and not poll.events:
        raise DeserializationError("`events` is empty: nothing would be found. Leave it out for every kind")
    if poll.revision is not None and (poll.scope is None or poll.cursor is not None):
        raise DeserializationError("`revision` needs `scope`, and takes the place of `cursor`")
    if poll.among is not None and (poll.scope is not None or poll.scope_prefix is not None):
        raise DeserializationError("`_among` takes the place of `scope` and `scope_prefix`")
    if not 0 <= poll.fresh <= len(poll.among or ()):
        raise DeserializationError("`_fresh` is a number of the scopes in `_among`")
    return poll


def change_text(change: Change, *, tell: bool = False) -> bytes:
    """Return one change as JSON text, with the values as they are stored. `tell`: a bridge asks for more fields."""
    parts = [
        b'{"kind":"%b","scope":%b,"key":%b,"revision":%d'
        % (change.kind.encode(), _json(change.scope), _json(change.key), change.revision)
    ]
    if change.json is not None:
        parts.append(b',"value":' + change.json)
    if change.old_json is not None:
        parts.append(b',"old_value":' + change.old_json)
    if change.transaction != change.revision:
        parts.append(b',"transaction":%d' % change.transaction)
    if change.initial:
        parts.append(b',"initial":true')
    parts.append(b',"cursor":%b' % _json(change.cursor))
    event = change.event
    if event is not None and event.expired_at is not None:
        parts.append(b',"expired_at":%d,"late_ms":%d' % (event.expired_at, event.late_ms or 0))
    if event is not None and event.time_ms:
        parts.append(b',"time_ms":%d' % event.time_ms)
    if tell and event is not None and event.depth:
        parts.append(b',"depth":%d' % event.depth)
    context = context_of(event.depth) if tell and event is not None else None
    if context is not None:
        parts.append(b',"trace":%b' % _json(context.text))
    return b"".join(parts) + b"}"


def changes_text(changes: Sequence[bytes], cursor: str, *, more: bool) -> bytes:
    """Return the answer of `state::changes`."""
    return b'{"changes":[%b],"cursor":%b,"more":%b}' % (
        b",".join(changes),
        _json(cursor),
        b"true" if more else b"false",
    )
