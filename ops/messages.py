"""The calls on a scope as messages, for `engine.ask(messages.Set("users", "ada", 1))` and for Pykka refs.

The fields are the arguments of the method of the same name, with the same meaning. For the six functions of the
reference, the fields without the options are also the input of `engine.call` and of the wire; `ops/functions.py` reads
them from JSON. Source: the API reference, and docs/reference/semantics.md 2 for what is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from scopestate.ops.options import range_of
from scopestate.ops.turns import Range
from scopestate.ops.update_ops import UpdateOp


class _Write(msgspec.Struct, frozen=True, kw_only=True):
    durable: bool | None = None
    idempotency_key: str | None = None

    def options(self) -> Any:
        """Return the options that are given, for the functions of `ops/arguments.py`."""
        found = {}
        for name, default in _OPTIONS.items():
            given = getattr(self, name, default)
            if given is not default:
                found[name] = given
        return found


class _Conditional(_Write, frozen=True, kw_only=True):
    if_revision: int | None = None
    if_absent: bool = False
    ttl: float | timedelta | None = None
    expires_at: datetime | None = None
    keep_ttl: bool = False


_OPTIONS: Final = {
    "if_revision": None,
    "if_absent": False,
    "ttl": None,
    "expires_at": None,
    "keep_ttl": False,
    "atomic": False,
    "durable": None,
    "idempotency_key": None,
}
"""Every option of a write, and its default."""


class Set(_Conditional, frozen=True):
    """Set a value in state."""

    scope: str
    key: str
    value: Any
    """Any JSON value, None included."""


class Get(msgspec.Struct, frozen=True):
    """Get a value from state."""

    scope: str
    key: str


class Delete(_Write, frozen=True):
    """Delete a value from state."""

    scope: str
    key: str
    if_revision: int | None = None


class Update(_Conditional, frozen=True):
    """Update a value in state."""

    scope: str
    key: str
    ops: tuple[UpdateOp, ...]
    """Applied in order to one working copy, then written once (docs/reference/semantics.md, section 3)."""
    atomic: bool = False


class List(msgspec.Struct, frozen=True):
    """Get a group from state."""

    scope: str


class ListGroups(msgspec.Struct, frozen=True):
    """List all state groups."""


# ----------------------------------------------------------------------------------------- beyond the reference


class GetEntry(msgspec.Struct, frozen=True):
    """Read a key with its revision and its deadline. Answer: EntryView or None, as of `Engine.entry`."""

    scope: str
    key: str


class CompareAndSet(_Write, frozen=True):
    """As `Engine.compare_and_set`."""

    scope: str
    key: str
    expected: Any
    value: Any


class Modify(msgspec.Struct, frozen=True):
    """As `Engine.modify`."""

    scope: str
    key: str
    function: Callable[[Any], Any]
    default: Any = None
    durable: bool | None = None


class Touch(_Write, frozen=True):
    """As `Engine.touch`."""

    scope: str
    key: str
    ttl: float | timedelta | UnsetType | None = UNSET
    expires_at: datetime | None = None


class SetStep(msgspec.Struct, frozen=True):
    """Set a key, as a step of a `Batch`."""

    key: str
    value: Any
    ttl: float | timedelta | None = None
    expires_at: datetime | None = None
    keep_ttl: bool = False


class UpdateStep(msgspec.Struct, frozen=True):
    """Update a key, as a step of a `Batch`. An op that does not fit refuses the whole batch."""

    key: str
    ops: Sequence[UpdateOp]
    ttl: float | timedelta | None = None
    expires_at: datetime | None = None
    keep_ttl: bool = False


class DeleteStep(msgspec.Struct, frozen=True):
    """Delete a key, as a step of a `Batch`."""

    key: str


class TouchStep(msgspec.Struct, frozen=True):
    """Give a key another deadline, as a step of a `Batch`."""

    key: str
    ttl: float | timedelta | UnsetType | None = UNSET
    expires_at: datetime | None = None


class Check(msgspec.Struct, frozen=True):
    """What a `Batch` expects of a key: one of `revision`, `absent` and `value`."""

    key: str
    revision: int | None = None
    absent: bool = False
    value: Any = UNSET


class Batch(_Write, frozen=True):
    """Several writes, all of them or none, as of `Engine.batch`. Answer: BatchResult."""

    scope: str
    steps: Sequence[SetStep | UpdateStep | DeleteStep | TouchStep]
    checks: Sequence[Check] = ()


class Transact(_Write, frozen=True):
    """As `Engine.transact`."""

    scope: str
    function: Callable[[Any], Any]


class _Bounded(msgspec.Struct, frozen=True, kw_only=True):
    prefix: str | None = None
    start: str | None = None
    after: str | None = None
    end: str | None = None


def bounds_of(message: _Bounded | DeleteRange) -> dict[str, Any]:
    """Return the bounds of a range by name."""
    return {"prefix": message.prefix, "start": message.start, "after": message.after, "end": message.end}


class _Ranged(_Bounded, frozen=True, kw_only=True):
    reverse: bool = False
    limit: int | None = None

    def within(self) -> Range:
        """Return the range. Raises DeserializationError."""
        return range_of(**bounds_of(self), reverse=self.reverse, limit=self.limit)


class Keys(_Ranged, frozen=True):
    """As `Engine.keys`."""

    scope: str


class Items(_Ranged, frozen=True):
    """As `Engine.items`."""

    scope: str


class Entries(_Ranged, frozen=True):
    """As `Engine.entries`."""

    scope: str


class Values(_Ranged, frozen=True):
    """As `Engine.values`."""

    scope: str


class Count(_Bounded, frozen=True):
    """As `Engine.count`."""

    scope: str


class DeleteRange(_Write, frozen=True):
    """As `Engine.delete_range`, for at most 1,000 keys: the answer has `deleted`, and `more` if keys are left."""

    scope: str
    prefix: str | None = None
    start: str | None = None
    after: str | None = None
    end: str | None = None


OfReference = Set | Get | Delete | Update | List | ListGroups
"""The messages of the six functions of the reference."""

Message = (
    OfReference
    | GetEntry
    | CompareAndSet
    | Modify
    | Touch
    | Batch
    | Transact
    | Keys
    | Items
    | Entries
    | Values
    | Count
    | DeleteRange
)
