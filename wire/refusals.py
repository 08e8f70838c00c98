"""The facts of refusals, as the wire carries them beside code and message (docs/reference/protocol.md, section 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Raw

from scopestate.errors import (
    BatchTooLarge,
    Compacted,
    Conflict,
    DeserializationError,
    EngineClosed,
    IdempotencyMismatch,
    InvalidCursor,
    KeyConflict,
    Overloaded,
    RemoteFailure,
    ReplyTimeout,
    RowTooLarge,
    SchemaViolation,
    ScopestateError,
    SnapshotCapacity,
    StorageError,
    Unsupported,
    UpdateRefused,
    ValueTooLarge,
    WatchOverrun,
    WouldDeadlock,
)
from scopestate.ops.update_ops import RefusedOp
from scopestate.wire.frames import ABSENT

_FACTS: Final[dict[type[ScopestateError], tuple[str, ...]]] = {
    BatchTooLarge: ("scope", "size", "limit", "unit"),
    Compacted: ("requested", "reason", "oldest"),
    Conflict: ("scope", "key", "expected_revision", "revision", "conflicts"),
    IdempotencyMismatch: ("scope", "idempotency_key"),
    InvalidCursor: ("reason",),
    ReplyTimeout: ("scope", "waited_s", "behind"),
    RowTooLarge: ("scope", "key", "size", "limit"),
    SchemaViolation: ("scope", "key", "path", "reason", "type_name", "written"),
    SnapshotCapacity: ("problem",),
    Unsupported: ("feature", "reason"),
    UpdateRefused: ("scope", "errors"),
    ValueTooLarge: ("scope", "key", "size", "limit"),
    WatchOverrun: ("cursor", "waiting"),
}
"""Error -> the attributes that are sent."""


def details_of(error: ScopestateError) -> Raw:
    """Return the facts of an error as a JSON object; nothing for most errors."""
    names = _FACTS.get(type(error))
    if names is None:
        return ABSENT
    return Raw(msgspec.json.encode({name: getattr(error, name) for name in names}))


class _Facts(msgspec.Struct):
    scope: str = ""
    key: str = ""
    size: int = 0
    limit: int = 0
    unit: str = ""
    reason: str = ""
    requested: str = ""
    oldest: str | None = None
    cursor: str = ""
    waiting: int = 0
    feature: str = ""
    problem: str = ""
    path: str = ""
    type_name: str = ""
    written: bool = True
    idempotency_key: str = ""
    waited_s: float = 0.0
    behind: str = ""
    conflicts: list[KeyConflict] = []
    errors: list[RefusedOp] = []


def refusal_of(failure: RemoteFailure) -> ScopestateError | None:
    """Return the error that another engine has raised, if it has sent the facts; else None.

    Not for `VALUE_TOO_LARGE`, which the reference's functions answer too: for those every failure of the other engine
    is a failure of the store.
    """
    return _made(failure, _MADE)


def raised_by(failure: RemoteFailure) -> ScopestateError:
    """Return the error that the engine of the same directory has raised: of the same class, with the same facts."""
    made = _made(failure, _MADE) or _made(failure, _MADE_FOR_FOLLOWERS)
    if made is not None:
        return made
    kind = _BY_TEXT.get(failure.code)
    if kind is not None:
        return kind(failure.message)
    # Every operation has a code of its own for a failure of its store, such as `SET_ERROR`.
    return StorageError(failure.message, code=failure.code) if failure.code.endswith("_ERROR") else failure


def _made(
    failure: RemoteFailure, makers: Mapping[str, Callable[[_Facts], ScopestateError | None]]
) -> ScopestateError | None:
    make = makers.get(failure.code)
    if make is None or failure.details is None:
        return None
    try:
        return make(msgspec.convert(failure.details, _Facts))
    except msgspec.ValidationError:
        return None


def _conflict(facts: _Facts) -> Conflict | None:
    return Conflict(facts.scope, facts.conflicts) if facts.conflicts else None


def _update_refused(facts: _Facts) -> UpdateRefused | None:
    return UpdateRefused(facts.scope, facts.errors) if facts.errors else None


_MADE: Final[Mapping[str, Callable[[_Facts], ScopestateError | None]]] = {
    BatchTooLarge.code: lambda facts: BatchTooLarge(facts.scope, facts.size, facts.limit, facts.unit),
    Compacted.code: lambda facts: Compacted(facts.requested, facts.reason, facts.oldest),
    Conflict.code: _conflict,
    IdempotencyMismatch.code: lambda facts: IdempotencyMismatch(facts.scope, facts.idempotency_key),
    InvalidCursor.code: lambda facts: InvalidCursor(facts.reason),
    RowTooLarge.code: lambda facts: RowTooLarge(facts.scope, facts.key, facts.size, facts.limit),
    SchemaViolation.code: lambda facts: SchemaViolation(
        facts.scope, facts.key, facts.path, facts.reason, facts.type_name, facts.written
    ),
    SnapshotCapacity.code: lambda facts: SnapshotCapacity(facts.problem),
    Unsupported.code: lambda facts: Unsupported(facts.feature, facts.reason),
    UpdateRefused.code: _update_refused,
    WatchOverrun.code: lambda facts: WatchOverrun(facts.cursor, facts.waiting),
}

_MADE_FOR_FOLLOWERS: Final[Mapping[str, Callable[[_Facts], ScopestateError | None]]] = {
    ReplyTimeout.code: lambda facts: ReplyTimeout(facts.scope, facts.waited_s, facts.behind),
    ValueTooLarge.code: lambda facts: ValueTooLarge(facts.scope, facts.key, facts.size, facts.limit),
}

_BY_TEXT: Final[Mapping[str, type[ScopestateError]]] = {
    kind.code: kind for kind in (DeserializationError, EngineClosed, Overloaded, WouldDeadlock)
}
"""Errors that have no facts but their text."""
