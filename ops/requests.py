"""Reads inputs from the wire into turns: of the new functions, and the options of the reference's six functions.

The schemas of `engine.functions()` are made from the structs here; their docstrings are the descriptions. Numbers are
whole numbers in JSON: `1.0` is refused, as in the ops of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from scopestate.errors import DeserializationError, InvalidPageLimits
from scopestate.ops import UpdateOp, convert_ops
from scopestate.ops.arguments import Limits
from scopestate.ops.options import checked_revision
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage
from scopestate.ops.remote import Committing, Everything, KeysAt, Now, Recall
from scopestate.ops.transactions import Batch, Check, DeleteStep, SetStep, Step, TouchStep, UpdateStep
from scopestate.ops.turns import (
    NO_DEADLINE,
    Deadline,
    Delete,
    Get,
    Items,
    List,
    Range,
    Set,
    Turn,
    Update,
    checked_name,
    refuse_size,
)
from scopestate.ops.values import encode, encode_plain, json_type, json_words, normalise, prepare
from scopestate.ops.writes import (
    CompareAndSet,
    DeleteWith,
    GetEntry,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
    checked_deadline,
)

T = TypeVar("T")
Payload = Mapping[str, Any]
"""The input of a call. For the new functions it is plain JSON data."""

SNAPSHOT_CURSOR: Final = "snapshot."
"""The beginning of the cursors of snapshots. Cursors of pages by seek contain no full stop."""
SNAPSHOT_ROWS: Final = 100_000
"""The most rows that a snapshot of `state::list_entries` may have."""


class PageLimits(NamedTuple):
    """The limits of a page of a snapshot, and the cursor of the previous page."""

    limit: int
    max_bytes: int
    cursor: str | None


class Request(NamedTuple):
    """A call of a built-in function on one scope, after its input was read."""

    scope: str
    turn: Turn[Any]
    durable: bool | None = None
    """True: answer when the write is on disk; None: the durability of the scope decides."""
    reads: bool = False
    """True for a write with a condition: its answer can contain what is stored under keys that it did not write."""
    tell: bool = False
    """True: a bridge asks for more in the answer (`ops/answers.py`)."""
    page: PageLimits | None = None
    """The limits, for a page of a snapshot. `turn` then makes the snapshot."""


# ---------------------------------------------------------------------------------------------- options of the six

_Revision = Annotated[
    int | None,
    Meta(description="Only if the key has this revision; 0: only if it does not exist. Null: no condition"),
]
_Absent = Annotated[bool, Meta(description="Only if the key does not exist")]
_Ttl = Annotated[int | None, Meta(description="Milliseconds from now until it expires")]
_Moment = Annotated[int | None, Meta(description="When it expires, in milliseconds since the epoch")]
_KeepTtl = Annotated[bool, Meta(description="Keep the deadline of the key")]
_Atomic = Annotated[bool, Meta(description="Apply all ops, or none if one does not fit")]
_Durable = Annotated[bool | None, Meta(description="Answer only when the write is on disk")]
_Idempotency = Annotated[
    str | None, Meta(description="Do it once for this key: a repetition gets the first answer, and changes nothing")
]


class WriteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `state::delete` that the reference lacks. With any of them the answer has the revision."""

    if_revision: _Revision | UnsetType = UNSET
    if_absent: _Absent | UnsetType = UNSET
    durable: _Durable | UnsetType = UNSET
    idempotency_key: _Idempotency | UnsetType = UNSET


class SetOptions(WriteOptions, frozen=True, kw_only=True):
    """The fields of `state::set` that the reference lacks."""

    ttl_ms: _Ttl | UnsetType = UNSET
    expires_at: _Moment | UnsetType = UNSET
    keep_ttl: _KeepTtl | UnsetType = UNSET


class UpdateOptions(SetOptions, frozen=True, kw_only=True):
    """The fields of `state::update` that the reference lacks."""

    atomic: _Atomic | UnsetType = UNSET


class SetInput(SetOptions, frozen=True, kw_only=True):
    """Set a value in state."""

    scope: str
    key: str
    value: Any


class UpdateInput(UpdateOptions, frozen=True, kw_only=True):
    """Update a value in state."""

    scope: str
    key: str
    ops: tuple[UpdateOp, ...]


class DeleteInput(WriteOptions, frozen=True, kw_only=True):
    """Delete a value from state."""

    scope: str
    key: str


OPTIONS: Final[dict[str, type[WriteOptions]]] = {
    "state::delete": WriteOptions,
    "state::set": SetOptions,
    "state::update": UpdateOptions,
}
"""Function id -> the fields that the reference lacks."""


def read_options(function_id: str, payload: Payload) -> WriteOptions | None:
    """Return the options in the input of a `set`, `update` or `delete`; None if it has no options.

    Raises DeserializationError if one does not fit.
    """
    kind = OPTIONS[function_id]
    given = {name: payload[name] for name in kind.__struct_fields__ if name in payload}
    if not given:
        return None
    try:
        return convert(normalise(given), kind)
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error


def with_options(plain: Request, given: WriteOptions | None) -> Request:
    """Return the request for a `set`, `update` or `delete` with options, made from the one without.

    Raises DeserializationError if they contradict each other.
    """
    if given is None:
        return plain
    turn = plain.turn
    try:
        revision = checked_revision(_or_none(given.if_revision), if_absent=given.if_absent is True)
        deadline = NO_DEADLINE
        if isinstance(given, SetOptions):
            ttl_ms, expires_ms = _or_none(given.ttl_ms), _or_none(given.expires_at)
            deadline = checked_deadline(ttl_ms, expires_ms, keep=given.keep_ttl is True)
        match turn:
            case Set(key=key, data=data):
                turn = SetWith(key, data, revision, deadline)
            case Update(key=key, ops=ops):
                atomic = isinstance(given, UpdateOptions) and given.atomic is True
                turn = UpdateWith(key, ops, revision, deadline, atomic)
            case Delete(key=key):
                turn = DeleteWith(key, revision)
        turn = _once(turn, _or_none(given.idempotency_key))
    except DeserializationError as error:
        raise misfit(plain.turn.function_id, str(error)) from error
    return plain._replace(turn=turn, durable=_or_none(given.durable), reads=revision is not None)


def _or_none(given: T | UnsetType) -> T | None:
    return None if given is UNSET else given


# ------------------------------------------------------------------------------------------- reading the reference's


def reference_fields(function_id: str, payload: Payload) -> list[Any]:
    """Return the fields that the reference has, in order. Raises DeserializationError, worded as in iii-state."""
    return [read(function_id, payload, field) for field, read in _FIELDS[function_id]]


def read_set(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::set`. Raises DeserializationError, as all these functions do, and ValueTooLarge."""
    scope, key, value = reference_fields("state::set", payload)
    options = read_options("state::set", payload)
    data = encode(value)
    refuse_size(scope, key, data, limits.max_value_bytes)
    return with_options(Request(scope, Set(checked_name("key", key), data), tell=asks(payload)), options)


def read_update(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::update`."""
    scope, key, ops = reference_fields("state::update", payload)
    plain = Request(scope, Update(checked_name("key", key), ops), tell=asks(payload))
    return with_options(plain, read_options("state::update", payload))


def read_delete(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::delete`."""
    scope, key = reference_fields("state::delete", payload)
    plain = Request(scope, Delete(checked_name("key", key)), tell=asks(payload))
    return with_options(plain, read_options("state::delete", payload))


def read_get(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::get`."""
    scope, key = reference_fields("state::get", payload)
    return Request(scope, Get(checked_name("key", key)))


def read_list(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::list`."""
    (scope,) = reference_fields("state::list", payload)
    if payload.get("_keys") is True:  # a bridge or a tool asks for the keys too, and perhaps for revisions
        return Request(scope, Everything() if payload.get("_entries") is True else Items(), tell=True)
    return Request(scope, List())


def asks(payload: Payload) -> bool:
    """Return whether a bridge asks for `existed` in the results of a write."""
    return payload.get("_existed") is True


def misfit(function_id: str, problem: str) -> DeserializationError:
    """Return the error for input that does not fit `function_id` (docs/reference/protocol.md, section 4.4)."""
    return DeserializationError(f"Failed to deserialize input for {function_id}: {problem}")


def _text(function_id: str, payload: Payload, field: str) -> str:
    if field not in payload:
        raise misfit(function_id, f"missing field `{field}`")
    text = payload[field]
    if not issubclass(type(text), str):  # not isinstance, which believes the `__class__` of a mock
        raise misfit(function_id, f"invalid type: expected a string, got {json_type(text)} - at `$.{field}`")
    return str.__str__(text)  # the plain string that a subclass holds


def _value(function_id: str, payload: Payload, field: str) -> Any:
    """`value`, or `data` as its alias; both together are a duplicate (docs/reference/semantics.md, section 2)."""
    if field in payload:
        if "data" in payload:
            raise misfit(function_id, "duplicate field `value`: give either `value` or its alias `data`")
        return payload[field]
    if "data" in payload:
        return payload["data"]
    raise misfit(function_id, "missing field `value`")


def _ops(function_id: str, payload: Payload, field: str) -> Any:
    if field not in payload:
        raise misfit(function_id, "missing field `ops`")
    try:
        return convert_ops(payload[field])
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error


_READERS: Final[dict[str, Callable[[str, Payload, str], Any]]] = {
    "scope": _text,
    "key": _text,
    "value": _value,
    "ops": _ops,
}
"""Field of the reference -> the function that reads it."""

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "state::delete": ("scope", "key"),
    "state::get": ("scope", "key"),
    "state::list": ("scope",),
    "state::list_groups": (),
    "state::set": ("scope", "key", "value"),
    "state::update": ("scope", "key", "ops"),
}
"""Function id -> the fields that the reference has, in the order in which they are read."""

_FIELDS: Final = {function_id: [(field, _READERS[field]) for field in fields] for function_id, fields in FIELDS.items()}
"""The same, each field with its reader."""


# -------------------------------------------------------------------------------------------- inputs of new functions


class ListGroupsInput(msgspec.Struct, frozen=True):
    """List all state groups."""


class GetInput(msgspec.Struct, frozen=True):
    """Get a value from state."""

    scope: str
    key: str


class ListInput(msgspec.Struct, frozen=True):
    """Get a group from state."""

    scope: str


class GetEntryInput(msgspec.Struct, frozen=True):
    """Get a value from state with its revision, and when it expires."""

    scope: str
    key: str


class CompareAndSetInput(msgspec.Struct, frozen=True):
    """Set a value in state if the key has the expected value."""

    scope: str
    key: str
    value: Any
    expected: Annotated[
        Any, Meta(description="The value that the key must have; left out or null: it has none, or null")
    ] = UNSET
    expected_revision: Annotated[
        int | None, Meta(description="The revision that the key must have; 0: it does not exist")
    ] = None
    durable: _Durable = None
    idempotency_key: _Idempotency = None


class CheckInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a transaction expects of a key: exactly one of `revision`, `absent` and `value`."""

    key: str
    revision: int | None = None
    absent: bool = False
    value: Any = UNSET


class StepInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One write of a transaction: `set` needs `value`, `update` needs `ops`, `touch` needs `ttl_ms` or `expires_at`."""

    type: Literal["set", "delete", "update", "touch"]
    key: str
    value: Any = UNSET
    ops: Any = UNSET
    ttl_ms: _Ttl | UnsetType = UNSET
    expires_at: _Moment | UnsetType = UNSET
    keep_ttl: _KeepTtl = False

    def deadline(self) -> Deadline:
        """Return the deadline that the step asks for. Raises DeserializationError."""
        return checked_deadline(_or_none(self.ttl_ms), _or_none(self.expires_at), keep=self.keep_ttl)


class TransactionInput(msgspec.Struct, frozen=True):
    """Write several keys of a scope in one step, or none of them."""

    scope: str
    ops: list[StepInput]
    checks: list[CheckInput] = []
    if_revision: Annotated[int | None, Meta(description="Only if the last change of the scope has this revision")] = (
        None
    )
    durable: _Durable = None
    idempotency_key: _Idempotency = None


_Prefix = Annotated[str | None, Meta(description="Only keys with this prefix")]
_Start = Annotated[str | None, Meta(description="Only this key and later ones")]
_After = Annotated[str | None, Meta(description="Only keys after this one")]
_End = Annotated[str | None, Meta(description="Only keys before this one")]


class CountInput(msgspec.Struct, frozen=True):
    """Count keys of a scope."""

    scope: str
    prefix: _Prefix = None
    start: _Start = None
    after: _After = None
    end: _End = None


class RangeInput(CountInput, frozen=True):
    """List keys of a scope in the order of their UTF-8 bytes."""

    reverse: bool = False
    limit: Annotated[int | None, Meta(description="At most this many keys")] = None


class DeleteRangeInput(RangeInput, frozen=True):
    """Delete keys of a scope in one step, at most 1,000. Name a range: `prefix: ""` is the whole scope."""

    durable: _Durable = None
    idempotency_key: _Idempotency = None


class PageInput(RangeInput, frozen=True):
    """List keys with their values, a page at a time: of a snapshot, or, with bounds or `reverse`, as they are now."""

    limit: Annotated[int, Meta(description="At most this many keys, 1 to 1,000")] = 100
    max_bytes: Annotated[int, Meta(description="At most this many bytes of JSON, 256 to 8,000,000")] = 1_000_000
    cursor: Annotated[str | None, Meta(description="`next_cursor` of the previous page")] = None


class _EntriesInput(RangeInput, frozen=True):
    by_page: bool = msgspec.field(default=False, name="_by_page")
    max_bytes: int = 0
    cursor: str | None = None


class TouchInput(msgspec.Struct, frozen=True):
    """Give a key another deadline: `ttl_ms` or `expires_at` is needed. `ttl_ms: null`: it never expires."""

    scope: str
    key: str
    ttl_ms: _Ttl | UnsetType = UNSET
    expires_at: _Moment | UnsetType = UNSET
    durable: _Durable = None
    idempotency_key: _Idempotency = None


prepare(SetInput, UpdateInput, DeleteInput, GetEntryInput, CompareAndSetInput, TransactionInput, RangeInput)
prepare(_EntriesInput, PageInput, CountInput, DeleteRangeInput, TouchInput)


# --------------------------------------------------------------------------------------------- reading new functions


def read_get_entry(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::get-entry`."""
    given = convert(payload, GetEntryInput)
    key = checked_name("key", given.key)
    if payload.get("_left") is True:  # a bridge asks how long the key has left by this engine's clock
        return Request(given.scope, Ttl(key), tell=True)
    if payload.get("_now") is True:  # or for the time of that clock
        return Request(given.scope, Now(), tell=True)
    return Request(given.scope, GetEntry(key))


def read_compare_and_set(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::compare-and-set`. Raises ValueTooLarge too."""
    given = convert(payload, CompareAndSetInput)
    expected: bytes | UnsetType | None = None  # null too, as in Python: to an idempotency key they are the same call
    if given.expected is UNSET and given.expected_revision is not None:
        expected = UNSET
    elif given.expected is not UNSET and given.expected is not None:
        expected = encode_plain(given.expected)
    data = _sized(given.scope, given.key, given.value, limits.max_value_bytes)
    turn = CompareAndSet(checked_name("key", given.key), expected, data, checked_revision(given.expected_revision))
    return _write(payload, given, turn, reads=True)


def read_transaction(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::transaction`. Raises ValueTooLarge and BatchTooLarge too."""
    given = convert(payload, TransactionInput)
    if payload.get("_recall") is True and given.idempotency_key is not None:  # a bridge asks for the kept answer
        return Request(given.scope, Recall(given.idempotency_key), reads=True, tell=True)
    steps = [_step(given.scope, step, index, limits.max_value_bytes) for index, step in enumerate(given.ops)]
    checks = tuple([_check(check, index) for index, check in enumerate(given.checks)])
    batch = Batch(tuple(steps), checks, checked_revision(given.if_revision), limits.max_batch_bytes)
    batch.refuse_size(given.scope)
    turn: Turn[Any] = batch
    if "_returned" in payload:  # the result of the function of a `transact`, from behind a bridge
        turn = Committing(batch, encode_plain(payload["_returned"]))
    return _write(payload, given, turn, reads=bool(checks) or given.if_revision is not None)


def _step(scope: str, given: StepInput, index: int, max_value_bytes: int) -> Step:
    key = checked_name("key", given.key)
    deadline = given.deadline()
    if given.value is not UNSET and given.type != "set":
        raise DeserializationError(f"`value` is for a step of type `set` - at `$.ops[{index}].value`")
    if given.ops is not UNSET and given.type != "update":
        raise DeserializationError(f"`ops` is for a step of type `update` - at `$.ops[{index}].ops`")
    match given.type:
        case "set":
            if given.value is UNSET:
                raise DeserializationError(f"missing field `value` - at `$.ops[{index}].value`")
            return SetStep(key, _sized(scope, key, given.value, max_value_bytes), deadline)
        case "update":
            if given.ops is UNSET:
                raise DeserializationError(f"missing field `ops` - at `$.ops[{index}].ops`")
            return UpdateStep(key, convert_ops(given.ops), deadline)
        case "delete":
            if deadline is not NO_DEADLINE:
                raise DeserializationError(f"a `delete` has no deadline - at `$.ops[{index}]`")
            return DeleteStep(key)
        case "touch":
            if deadline.keep:
                raise DeserializationError(f"`keep_ttl` is not for a touch - at `$.ops[{index}].keep_ttl`")
            _refuse_no_time(given, f"$.ops[{index}]")
            return TouchStep(key, deadline)


def _refuse_no_time(given: StepInput | TouchInput, where: str) -> None:
    if given.ttl_ms is given.expires_at is UNSET:
        raise DeserializationError(
            f"give `ttl_ms` or `expires_at`; `ttl_ms: null`: the key never expires - at `{where}`"
        )


def _check(given: CheckInput, index: int) -> Check:
    if (given.revision is not None) + given.absent + (given.value is not UNSET) != 1:
        raise DeserializationError(f"a check has one of `revision`, `absent`, `value` - at `$.checks[{index}]`")
    value = UNSET if given.value is UNSET else encode_plain(given.value)
    return Check(checked_name("key", given.key), checked_revision(given.revision, if_absent=given.absent), value)


def _sized(scope: str, key: str, value: Any, max_value_bytes: int) -> bytes:
    data = encode_plain(value)
    refuse_size(scope, key, data, max_value_bytes)
    return data


def read_list_keys(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::list_keys`."""
    given = convert(payload, RangeInput)
    within = _range_of(given).checked()
    if payload.get("_revision") is True:  # a bridge asks for the revision of the scope too
        return Request(given.scope, KeysAt(within), tell=True)
    return Request(given.scope, Keys(within))


def read_list_entries(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::list_entries`. Raises InvalidPageLimits too."""
    if payload.get("_entries") is True:  # a bridge asks for revisions too, and for pages of any size or everything
        asked = convert(payload, _EntriesInput)
        within = _range_of(asked).checked()
        if not asked.by_page:
            return Request(asked.scope, Entries(within), tell=True)
        return Request(asked.scope, ReadPage(within, cursor=asked.cursor, max_bytes=asked.max_bytes), tell=True)
    given = convert(payload, PageInput)
    for name, number, low, high in (("limit", given.limit, 1, 1_000), ("max_bytes", given.max_bytes, 256, 8_000_000)):
        if not low <= number <= high:
            raise InvalidPageLimits(f"`{name}` is from {low} to {high}, not {number}")
    within = _range_of(given)
    by_seek = within.reverse or any(bound is not None for bound in _bounds(given))
    if by_seek or (given.cursor is not None and not given.cursor.startswith(SNAPSHOT_CURSOR)):
        return Request(given.scope, ReadPage(within, cursor=given.cursor, max_bytes=given.max_bytes))
    page = PageLimits(given.limit, given.max_bytes, given.cursor)
    return Request(given.scope, Pairs(Range(limit=SNAPSHOT_ROWS + 1)), page=page)


def read_count(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::count`."""
    given = convert(payload, CountInput)
    return Request(given.scope, Count(Range(*_bounds(given))))


def read_delete_range(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::delete-range`. A range must be named: a misspelt `prefix` would delete everything."""
    given = convert(payload, DeleteRangeInput)
    if all(bound is None for bound in _bounds(given)):
        raise DeserializationError(
            'name what to delete by `prefix`, `start`, `after` or `end`; `prefix: ""` is the whole scope'
        )
    if given.limit is not None and given.limit < 1:
        raise DeserializationError(f"`limit` is 1 or more, not {given.limit}")
    return _write(payload, given, DeleteRange(_range_of(given)))


def read_touch(payload: Payload, limits: Limits) -> Request:
    """Read the input of `state::touch`."""
    given = convert(payload, TouchInput)
    _refuse_no_time(given, "$")
    deadline = checked_deadline(_or_none(given.ttl_ms), _or_none(given.expires_at))
    return _write(payload, given, Touch(checked_name("key", given.key), deadline))


def _bounds(given: CountInput) -> tuple[str | None, str | None, str | None, str | None]:
    return given.prefix, given.start, given.after, given.end


def _range_of(given: RangeInput) -> Range:
    return Range(given.prefix, given.start, given.after, given.end, given.reverse, given.limit)


def _write(
    payload: Payload,
    given: CompareAndSetInput | DeleteRangeInput | TransactionInput | TouchInput,
    turn: Turn[Any],
    *,
    reads: bool = False,
) -> Request:
    return Request(given.scope, _once(turn, given.idempotency_key), given.durable, reads, asks(payload))


def _once(turn: Turn[Any], idempotency_key: str | None) -> Turn[Any]:
    return turn if idempotency_key is None else Once(turn, idempotency_key)


def convert(payload: Payload, kind: type[T]) -> T:
    """Return plain JSON data as a struct. Raises DeserializationError, which names types as JSON does."""
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as error:
        raise DeserializationError(json_words(error)) from error
