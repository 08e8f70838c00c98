"""The results of calls, the events of handlers, and their failures. JSON is kept as bytes until it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Generic, Literal, Self, TypedDict, overload

import msgspec

from scopestate.ops.apply import MISSING
from scopestate.ops.plain import Plain, json_shown, shortened
from scopestate.ops.update_ops import OPTIONAL, OpError
from scopestate.ops.values import decode, encode

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)

else:
    from typing import TypeVar

    T = TypeVar("T")


# The `Meta` notes are the API reference's: `engine.functions()` and `engine.trigger_types()` are made from them.
EventType = Annotated[
    Literal["state:created", "state:updated", "state:deleted", "state:expired"], msgspec.Meta(title="StateEventType")
]
EventName = Literal["created", "updated", "deleted", "expired"]
"""The type of an event without its prefix, as triggers name it."""
OldValue = Annotated[
    T | None, msgspec.Meta(description="The value before the update (None if key didn't exist)", extra=OPTIONAL)
]
NewValue = Annotated[T, msgspec.Meta(description="The value after the update")]


def _json_or_none(value: object) -> bytes | None:
    return None if value is MISSING else encode(value)


class ListGroupsResult(TypedDict):
    """Result of `state::list_groups`."""

    groups: list[str]


class WriteResult(Plain, msgspec.Struct, frozen=True, eq=False, kw_only=True, gc=False):
    """The fields that all results of writes have beside the reference's."""

    revision: int = 0
    """The revision that the write gave to its key.

    0 if there is no revision: for a `modify` that left a missing key as it was; for a write of a batch to a key that
    exists neither before nor after the batch; in Redis with `revisions: false`; through a bridge to iii.
    """
    detailed: bool = False
    """True if the caller used an argument that the reference lacks. The JSON then has `revision` too."""
    replayed: bool = False
    """True if an earlier call with the same idempotency key made the write, and this call did nothing."""

    def _with_details(self, plain: dict[str, Any]) -> dict[str, Any]:
        if self.detailed:
            plain["revision"] = self.revision
            if self.replayed:
                plain["replayed"] = True
        return plain

    def to_json(self) -> Any:
        """Return the result as it is sent to workers."""
        raise NotImplementedError

    def _shown(self) -> dict[str, Any]:
        """Return the fields by which two results are compared."""
        plain: dict[str, Any] = self.to_json()
        return plain

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WriteResult) or other._kind() is not self._kind():
            return NotImplemented
        return self._shown() == other._shown()

    def _kind(self) -> type:
        """Return the class that says which call the result is of. Results of typed scopes have a class of their own."""
        return type(self)

    # Needed, because the base class Struct compares by identity for `!=`.
    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = None  # type: ignore[assignment]  # compares values, which may be dicts


class SetResult(WriteResult, Generic[T], frozen=True, eq=False, gc=False):
    """Result of `set`. Reference: `old_value`, `new_value`."""

    json_fields: ClassVar[tuple[str, ...]] = ("old_value", "new_value", "revision", "replayed")
    json_values: ClassVar[Mapping[str, str]] = {"old_value": "old_json", "new_value": "new_json"}

    old_json: bytes | None
    """The previous value as JSON, or None if the key did not exist.

    Through a bridge to iii 0.11.6, a previous null is None too: the answer does not distinguish the two.
    """
    new_json: bytes
    """The new value as JSON."""

    @classmethod
    def example(cls, new_value: object, *, old_value: object = MISSING, revision: int = 1) -> Self:
        """Return a result for a unit test, made without an engine. Without `old_value` the key did not exist.

        Raises InvalidValue for what JSON cannot hold.
        """
        return cls(_json_or_none(old_value), encode(new_value), revision=revision)

    @property
    def old_value(self) -> OldValue[T]:
        """The previous value, a new copy at each reading; None if the key did not exist or held null."""
        return None if self.old_json is None else decode(self.old_json)

    @property
    def new_value(self) -> NewValue[T]:
        """The new value, a new copy at each reading."""
        value: T = decode(self.new_json)
        return value

    @property
    def created(self) -> bool:
        """True if the key did not exist before; False if it held null."""
        return self.old_json is None

    def to_json(self) -> dict[str, Any]:
        """Return the result as `call` returns it, and as it is sent to workers."""
        return self._with_details({"old_value": self.old_value, "new_value": self.new_value})


class UpdateResult(SetResult[T], Generic[T], frozen=True, eq=False, gc=False):
    """Result of `update`. Reference: `old_value`, `new_value`, `errors`."""

    json_fields: ClassVar[tuple[str, ...]] = ("old_value", "new_value", "errors", "revision", "replayed")

    errors: Annotated[
        tuple[
            Annotated[
                OpError,
                msgspec.Meta(title="UpdateOpError", description="Per-op error reported by an atomic update operation."),
            ],
            ...,
        ],
        msgspec.Meta(
            description=(
                "Errors encountered while applying ops. Successfully applied ops are still reflected in `new_value`. "
                "Field is omitted from JSON when empty for backward compatibility."
            )
        ),
    ] = ()
    """One entry for each op that was refused. The other ops were applied (docs/reference/semantics.md, section 3)."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as `call` returns it. `errors` is left out if there are none."""
        plain = super().to_json()
        if self.errors:
            plain["errors"] = msgspec.to_builtins(list(self.errors))
        return plain


class DeleteResult(WriteResult, frozen=True, eq=False, gc=False):
    """Result of a `delete` with a condition or an idempotency key."""

    json_fields: ClassVar[tuple[str, ...]] = ("old_value", "revision", "replayed")
    json_values: ClassVar[Mapping[str, str]] = {"old_value": "old_json"}

    old_json: bytes | None
    """The previous value as JSON, or None if the key did not exist."""

    @classmethod
    def example(cls, old_value: object = MISSING, *, revision: int = 1) -> Self:
        """As `SetResult.example`."""
        return cls(_json_or_none(old_value), revision=revision, detailed=True)

    @property
    def old_value(self) -> Any:
        """The previous value, a fresh copy at each reading; None if the key did not exist or held null."""
        return None if self.old_json is None else decode(self.old_json)

    def to_json(self) -> Any:
        """Return the bare previous value, as the reference has it; an object if the caller asked for more."""
        return self._shown() if self.detailed else self.old_value

    def _shown(self) -> dict[str, Any]:
        return self._with_details({"old_value": self.old_value})


class CasResult(WriteResult, Generic[T], frozen=True, eq=False, gc=False):
    """Result of `compare_and_set`. Reference: `swapped`, and `current` if it is false.

    `revision` is the one that the key has now, whether or not it was swapped.
    """

    json_fields: ClassVar[tuple[str, ...]] = ("swapped", "current", "revision", "replayed")
    json_values: ClassVar[Mapping[str, str]] = {"current": "current_json"}

    swapped: bool
    found_json: bytes | None
    """The value that the key had, as JSON; None if it did not exist."""

    @classmethod
    def example(cls, swapped: bool, found: object = MISSING, *, revision: int = 1) -> Self:
        """As `SetResult.example`. `found`: the value that the key had. Without `found` the key did not exist."""
        return cls(swapped, _json_or_none(found), revision=revision)

    @property
    def current_json(self) -> bytes | None:
        """`current` as JSON."""
        return None if self.swapped else self.found_json

    @property
    def current(self) -> T | None:
        """If the value was not swapped: the value of the key, a new copy at each reading. Otherwise None."""
        return None if self.swapped or self.found_json is None else decode(self.found_json)

    def to_json(self) -> dict[str, Any]:
        """Return the result as it is sent to workers."""
        if not self.swapped:
            return self._with_details({"swapped": False, "current": self.current})
        if not self.detailed:
            return {"swapped": True}
        return self._with_details(
            {"swapped": True, "old_value": None if self.found_json is None else decode(self.found_json)}
        )


class ModifyResult(WriteResult, Generic[T], frozen=True, eq=False, gc=False):
    """Result of `modify`. `revision` is the one that the key has now, or that its removal had."""

    json_fields: ClassVar[tuple[str, ...]] = ("old_value", "new_value", "revision")
    json_values: ClassVar[Mapping[str, str]] = {"old_value": "old_json", "new_value": "new_json"}

    old_json: bytes | None
    """The previous value as JSON, or None if the key did not exist."""
    new_json: bytes | None
    """The value that the key has now, as JSON; None if it does not exist."""

    @classmethod
    def example(cls, new_value: object = MISSING, *, old_value: object = MISSING, revision: int = 1) -> Self:
        """As `SetResult.example`. Without `new_value` the key does not exist now."""
        return cls(_json_or_none(old_value), _json_or_none(new_value), revision=revision)

    @property
    def old_value(self) -> T | None:
        """The previous value, a fresh copy at each reading; None if the key did not exist or held null."""
        return None if self.old_json is None else decode(self.old_json)

    @property
    def new_value(self) -> T | None:
        """The value that the key has now, a fresh copy at each reading; None if it does not exist or holds null."""
        return None if self.new_json is None else decode(self.new_json)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data. It is never sent to a worker."""
        return {"old_value": self.old_value, "new_value": self.new_value, "revision": self.revision}


class TouchResult(Plain, msgspec.Struct, frozen=True):
    """Result of `state::touch`."""

    touched: bool
    """True if the key exists."""

    def to_json(self) -> dict[str, Any]:
        """The result as it goes over the wire."""
        return {"touched": self.touched}


class EntryView(Plain, msgspec.Struct, Generic[T], frozen=True, gc=False):
    """What is stored under a key. Two are equal if all fields are."""

    json_fields: ClassVar[tuple[str, ...]] = ("key", "value", "revision", "expires_ms")
    json_values: ClassVar[Mapping[str, str]] = {"value": "json"}

    key: str
    json: bytes
    """The value as JSON."""
    revision: int
    """The number of the key's last change. Each change of a scope has a larger number than the one before."""
    expires_ms: int | None = None
    """When the key expires, in milliseconds since the epoch; None: never."""

    @classmethod
    def example(
        cls, value: object = None, *, key: str = "key", revision: int = 1, expires_at: datetime | None = None
    ) -> Self:
        """As `SetResult.example`. `expires_at` has a time zone."""
        expires_ms = None if expires_at is None else (expires_at - _EPOCH) // timedelta(milliseconds=1)
        return cls(key, encode(value), revision, expires_ms)

    @property
    def value(self) -> T:
        """The value, a new copy at each reading."""
        value: T = decode(self.json)
        return value

    @property
    def expires_at(self) -> datetime | None:
        """When the key expires, in UTC; None: never. A time after the year 9999 is given as the end of that year."""
        if self.expires_ms is None:
            return None
        try:
            return _EPOCH + timedelta(milliseconds=self.expires_ms)
        except OverflowError:
            return datetime.max.replace(tzinfo=UTC)

    def __repr__(self) -> str:
        expires = "" if self.expires_ms is None else f", expires_at={self.expires_at!r}"
        shown = f"key={shortened(self.key)}, value={json_shown(self.json)}, revision={self.revision}{expires}"
        return f"{type(self).__name__}({shown})"


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Page(Plain, msgspec.Struct, Generic[T], frozen=True):
    """Some entries of a scope, in the order of the UTF-8 bytes of their keys."""

    entries: tuple[EntryView[T], ...]
    cursor: str | None
    """Where the next page begins, for `pages(cursor=...)`; None: this is the last page."""

    @property
    def done(self) -> bool:
        """True if this is the last page."""
        return self.cursor is None


StepResult = SetResult | UpdateResult | DeleteResult | TouchResult


class SetResults(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The results of several sets, each made when it is read: making a hundred takes as long as writing them."""

    before: list[bytes | None]
    after: list[bytes]
    last: int
    """The revision of the last set. The sets before it have consecutive numbers up to it."""

    def __len__(self) -> int:
        return len(self.after)

    @overload
    def __getitem__(self, index: int) -> SetResult: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[SetResult, ...]: ...

    def __getitem__(self, index: int | slice) -> SetResult | tuple[SetResult, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        at = range(len(self.after))[index]
        return SetResult(self.before[at], self.after[at], revision=self.last - len(self.after) + 1 + at)

    def __iter__(self) -> Iterator[SetResult]:
        return map(self.__getitem__, range(len(self.after)))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    __ne__ = SetResult.__ne__  # as there
    __hash__ = None  # type: ignore[assignment]  # as there

    def __repr__(self) -> str:
        return repr(tuple(self)) if len(self) <= 5 else f"<{len(self):,} of SetResult>"

    # The rest of the protocol, from the standard library; a Struct cannot inherit from an ABC.
    __contains__ = Sequence.__contains__
    __reversed__ = Sequence.__reversed__
    count = Sequence.count
    index = Sequence.index


Sequence.register(SetResults)


class BatchResult(WriteResult, frozen=True, eq=False, gc=False):
    """Result of a transaction. `revision` is that of its last change."""

    json_fields: ClassVar[tuple[str, ...]] = ("results", "revision", "replayed")

    results: Sequence[StepResult]
    """One result for each write of the batch, in order.

    Each has the revision that the batch gave to its key: the same for all writes of one key, and 0 if the key exists
    neither before nor after the batch. A result of `touch` has no revision.
    """

    def to_json(self) -> dict[str, Any]:
        """The result as it goes over the wire."""
        results = [
            {"old_value": result.old_value} if type(result) is DeleteResult else result.to_json()
            for result in self.results
        ]
        plain = {"committed": True, "revision": self.revision, "results": results}
        if self.replayed:
            plain["replayed"] = True
        return plain


class StateEvent(Plain, msgspec.Struct, Generic[T], eq=False, weakref=True, dict=True):
    """A change of one key, for handlers and conditions: has attributes, and is a mapping of the reference's six fields.

    Source: reference, "State Event Payload". The mapping of a `state:expired` event has `expired_at` and `late_ms` too.
    The other fields, and `existed`, are attributes only. For type checkers, the values of a `StateEvent[V]` are of type
    V; events of a typed scope are `StateEvent[User | None]`.
    """

    json_fields: ClassVar[tuple[str, ...]] = (
        "type",
        "event_type",
        "scope",
        "key",
        "old_value",
        "new_value",
        "expired_at",
        "late_ms",
    )
    json_optional: ClassVar[tuple[str, ...]] = ("expired_at", "late_ms")
    json_values: ClassVar[Mapping[str, str]] = {"old_value": "old_json", "new_value": "new_json"}

    event_type: Annotated[EventType, msgspec.Meta(description="Type of state change")]
    """What happened. Deleting a missing key is `state:deleted` too (docs/reference/semantics.md 2): see `existed`."""
    scope: Annotated[str, msgspec.Meta(description="State scope")]
    key: Annotated[str, msgspec.Meta(description="State key")]
    old_json: bytes | None
    """The previous value as JSON, or None if the key did not exist."""
    new_json: bytes | None
    """The new value as JSON, or None for a key that was removed."""
    revision: int
    """The revision that the change gave to its key. It rises from event to event of one scope.

    Memory and files: the number of the write in its scope. In a store the numbers continue after a restart, and no
    number is used twice. In memory they begin at 1. Redis: numbers are made from the time of day, so they are large and
    have gaps; every engine sees the same ones. In two cases the field is the number of an event, not the revision of a
    key. Through a bridge with `events: local`, the events in this engine are counted from 1. In Redis with
    `revisions: false` the same is true, but with `events: shared` the events in the database are counted.
    """
    depth: int = 0
    """0 for a write that no handler made, 1 for a write by the handler of such an event, and so on."""
    expired_at: Annotated[
        int | None, msgspec.Meta(description="Deadline in milliseconds since the epoch (expired events only)")
    ] = None
    """`state:expired`: the deadline of the key, in milliseconds since the epoch; else None."""
    late_ms: Annotated[
        int | None, msgspec.Meta(description="Milliseconds from the deadline to the removal (expired events only)")
    ] = None
    """`state:expired`: milliseconds from the deadline, when the key becomes absent, to its removal; else None."""
    transaction: int = 0
    """The revision of the last change of the transaction that this change is part of; its own if it is the only change.

    0 for changes in Redis, and through a bridge with `events: local`.
    """
    time_ms: int = 0
    """When the change was made, in milliseconds since the epoch; 0 if no watch and no journal needs the time."""
    position: int = 0
    """The number of the change in the journal of its engine, over all scopes; 0 if it is in no journal."""
    coalesced: int = 0
    """With a trigger that has `debounce`: how many changes of the key this event stands for; otherwise 0."""
    metadata: Any = None
    """The `metadata` of the trigger whose handler gets the event."""

    # A decoded value is kept in `__dict__`. Pickling, copying and `msgspec.structs.replace` do not copy that, so the
    # copy decodes its own values.

    @property
    def type(self) -> Annotated[str, msgspec.Meta(description='Always "state"')]:
        """Always "state"."""
        return "state"

    @property
    def old_value(
        self,
    ) -> Annotated[T, msgspec.Meta(description="Previous value (null for created events)", extra=OPTIONAL)]:
        """The previous value, or None if there was none."""
        read = self.__dict__
        if "old_value" not in read:
            read["old_value"] = None if self.old_json is None else decode(self.old_json)
        value: T = read["old_value"]
        return value

    @property
    def new_value(self) -> Annotated[T, msgspec.Meta(description="New value")]:
        """The new value; None for a delete."""
        read = self.__dict__
        if "new_value" not in read:
            read["new_value"] = None if self.new_json is None else decode(self.new_json)
        value: T = read["new_value"]
        return value

    @property
    def existed(self) -> bool:
        """True if the key existed before: a delete with `existed` false removed nothing."""
        return self.old_json is not None

    @classmethod
    def example(
        cls,
        event_type: EventType | None = None,
        *,
        scope: str = "scope",
        key: str = "key",
        old_value: object = MISSING,
        new_value: object = MISSING,
        revision: int = 1,
        depth: int = 0,
        time_ms: int = 1_767_225_600_000,
        metadata: Any = None,
    ) -> StateEvent[Any]:
        """Return an event made without an engine, for unit tests of a handler.

        The values decide the type: `state:updated` with both values, `state:deleted` with an old value only, otherwise
        `state:created`. If a value is left out, it does not exist, except that the new value of a created or updated
        event is {}. None is JSON's null. The deadline of an expired event is `time_ms`. Raises InvalidValue for what
        JSON cannot hold. Two events are equal if the fields of the mapping are.
        """
        if event_type is None:
            had, has = old_value is not MISSING, new_value is not MISSING
            event_type = "state:updated" if had and has else "state:deleted" if had else "state:created"
        if event_type in {"state:created", "state:updated"} and new_value is MISSING:
            new_value = {}
        expired = event_type == "state:expired"
        return StateEvent(
            event_type,
            scope,
            key,
            _json_or_none(old_value),
            _json_or_none(new_value),
            revision,
            depth,
            time_ms if expired else None,
            0 if expired else None,
            revision,
            time_ms,
            metadata=metadata,
        )

    def copy(self) -> StateEvent:
        """Return the same event with its own values, so that one handler's changes to them reach no other handler."""
        return StateEvent(
            self.event_type,
            self.scope,
            self.key,
            self.old_json,
            self.new_json,
            self.revision,
            self.depth,
            self.expired_at,
            self.late_ms,
            self.transaction,
            self.time_ms,
            self.position,
            self.coalesced,
            self.metadata,
        )

    def as_deleted(self) -> StateEvent:
        """Return the event that a handler gets instead if it knows only the events of the reference."""
        return StateEvent(
            "state:deleted",
            self.scope,
            self.key,
            self.old_json,
            self.new_json,
            self.revision,
            self.depth,
            None,
            None,
            self.transaction,
            self.time_ms,
            self.position,
            self.coalesced,
            self.metadata,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the mapping as a dict, with its own copies of the values."""
        return dict(self.copy())

    def to_dict(self) -> dict[str, Any]:
        """As `to_json`: the payload of the event, as workers get it. It does not contain the other attributes."""
        return self.to_json()

    def __repr__(self) -> str:
        old, new = json_shown(self.old_json), json_shown(self.new_json)
        return (
            f"{type(self).__name__}({self.event_type!r}, scope={shortened(self.scope)}, key={shortened(self.key)}, "
            f"old_value={old}, new_value={new}, revision={self.revision})"
        )

    def __getitem__(self, field: str) -> Any:
        if field in self._fields():
            return getattr(self, field)
        raise KeyError(field)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields())

    def __len__(self) -> int:
        return len(self._fields())

    def _fields(self) -> tuple[str, ...]:
        return _EVENT_FIELDS if self.expired_at is None else StateEvent.json_fields

    # The rest of the mapping protocol, from the standard library; a Struct cannot inherit from an ABC.
    __contains__ = Mapping.__contains__
    __eq__ = Mapping.__eq__
    __ne__ = WriteResult.__ne__  # as above
    __reversed__ = None
    get = Mapping.get
    items = Mapping.items
    keys = Mapping.keys
    values = Mapping.values

    __hash__ = None  # type: ignore[assignment]  # it can be equal to a dict, which is unhashable


_EVENT_FIELDS: Final = StateEvent.json_fields[:6]

Mapping.register(StateEvent)


class DeliveryFailure(Plain, msgspec.Struct, frozen=True):
    """Why the delivery of an event failed, as the `on_error` and `on_dead_letter` hooks receive it."""

    trigger_id: str
    function_id: str
    """The function that failed: the handler, or the condition."""
    event: StateEvent
    error: BaseException
    attempt: int
    """1 for the first attempt; 0 if none was made."""
    final: bool
    """True if the event is not tried again."""
    batched: int = 1
    """How many events were delivered together: each of a batch fails with all of it, and has a report of its own."""
