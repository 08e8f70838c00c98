"""The wire's inputs beyond the reference: new functions, and new fields of the six. Each is read into a turn.

The schemas of `engine.functions()`, the access rules, and the reading come from the structs and rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from scopestate.errors import Conflict, DeserializationError, InvalidPageLimits, UpdateRefused
from scopestate.ops import convert_ops
from scopestate.ops.functions import misfit
from scopestate.ops.ranges import Count, DeleteRange, Keys, Page, ReadPage
from scopestate.ops.results import BatchResult, TouchResult
from scopestate.ops.transactions import Batch, Check, DeleteStep, SetStep, Step, TouchStep, UpdateStep
from scopestate.ops.turns import Delete, Entry, Range, Set, Turn, Update, checked_name
from scopestate.ops.values import decode, encode, json_type, json_words
from scopestate.ops.writes import (
    CompareAndSet,
    DeleteWith,
    GetEntry,
    Once,
    SetWith,
    Touch,
    UpdateWith,
    checked_deadline,
    checked_revision,
)

T = TypeVar("T")


class Request(NamedTuple):
    """A call of a built-in function, read."""

    scope: str
    turn: Turn[Any]
    durable: bool | None = None
    """True: answer when it is on disk; None: as the scope's durability says."""


class WriteOptions(msgspec.Struct, frozen=True):
    """What `state::set`, `state::update` and `state::delete` take beside the reference's fields."""

    if_revision: int | None = None
    if_absent: bool = False
    ttl_ms: int | None = None
    expires_at: int | None = None
    keep_ttl: bool = False
    atomic: bool = False
    durable: bool | None = None
    idempotency_key: str | None = None


class KeyInput(msgspec.Struct, frozen=True):
    """Input of `state::get-entry`."""

    scope: str
    key: str


class CompareAndSetInput(msgspec.Struct, frozen=True):
    """Input of `state::compare-and-set`. Without `expected`, or with null: the key has no value."""

    scope: str
    key: str
    value: Any
    expected: Any = UNSET
    expected_revision: int | None = None
    durable: bool | None = None
    idempotency_key: str | None = None


class CheckInput(msgspec.Struct, frozen=True):
    """One check of a transaction: exactly one of `revision`, `absent` and `value`."""

    key: str
    revision: int | None = None
    absent: bool = False
    value: Any = UNSET


class StepInput(msgspec.Struct, frozen=True):
    """One step of a transaction."""

    type: Literal["set", "delete", "update", "touch"]
    key: str
    value: Any = UNSET
    ops: Any = UNSET
    ttl_ms: int | None = None
    expires_at: int | None = None
    keep_ttl: bool = False


class TransactionInput(msgspec.Struct, frozen=True):
    """Input of `state::transaction`."""

    scope: str
    ops: list[StepInput]
    checks: list[CheckInput] = []
    if_revision: int | None = None
    durable: bool | None = None
    idempotency_key: str | None = None


class RangeInput(msgspec.Struct, frozen=True):
    """Input of `state::list_keys`."""

    scope: str
    prefix: str | None = None
    start: str | None = None
    after: str | None = None
    end: str | None = None
    reverse: bool = False
    limit: int | None = None


class DeleteRangeInput(RangeInput, frozen=True):
    """Input of `state::delete-range`."""

    durable: bool | None = None
    idempotency_key: str | None = None


class PageInput(RangeInput, frozen=True):
    """Input of `state::list_entries` that pages by seek: with a bound, `reverse`, or a cursor of such a page."""

    limit: int = 100
    max_bytes: int = 1_000_000
    cursor: str | None = None


class CountInput(msgspec.Struct, frozen=True):
    """Input of `state::count`."""

    scope: str
    prefix: str | None = None
    start: str | None = None
    after: str | None = None
    end: str | None = None


class TouchInput(msgspec.Struct, frozen=True):
    """Input of `state::touch`. `ttl_ms: null`, without `expires_at`: the key never expires."""

    scope: str
    key: str
    ttl_ms: int | None
    expires_at: int | None = None
    durable: bool | None = None
    idempotency_key: str | None = None


def _get_entry(given: KeyInput) -> Request:
    return Request(given.scope, GetEntry(checked_name("key", given.key)))


def _compare_and_set(given: CompareAndSetInput) -> Request:
    expected: bytes | UnsetType | None = None
    if given.expected is not UNSET:
        expected = encode(given.expected)
    elif given.expected_revision is not None:
        expected = UNSET
    turn = CompareAndSet(
        checked_name("key", given.key), expected, encode(given.value), checked_revision(given.expected_revision)
    )
    return _request(given, turn)


def _transaction(given: TransactionInput) -> Request:
    steps = [_step(step, index) for index, step in enumerate(given.ops)]
    checks = tuple([_check(check, index) for index, check in enumerate(given.checks)])
    batch = Batch(tuple(steps), checks, checked_revision(given.if_revision))
    batch.refuse_size(given.scope)
    return _request(given, batch)


def _step(given: StepInput, index: int) -> Step:
    key = checked_name("key", given.key)
    deadline = checked_deadline(given.ttl_ms, given.expires_at, keep=given.keep_ttl)
    match given.type:
        case "set":
            if given.value is UNSET:
                raise DeserializationError(f"missing field `value` - at `$.ops[{index}].value`")
            return SetStep(key, encode(given.value), deadline)
        case "update":
            if given.ops is UNSET:
                raise DeserializationError(f"missing field `ops` - at `$.ops[{index}].ops`")
            return UpdateStep(key, convert_ops(given.ops), deadline)
        case "delete":
            return DeleteStep(key)
        case "touch":
            if deadline.keep:
                raise DeserializationError(f"`keep_ttl` is not for a touch - at `$.ops[{index}].keep_ttl`")
            return TouchStep(key, deadline)


def _check(given: CheckInput, index: int) -> Check:
    if (given.revision is not None) + given.absent + (given.value is not UNSET) != 1:
        raise DeserializationError(f"a check has one of `revision`, `absent`, `value` - at `$.checks[{index}]`")
    value = UNSET if given.value is UNSET else encode(given.value)
    return Check(checked_name("key", given.key), checked_revision(given.revision, if_absent=given.absent), value)


def _list_keys(given: RangeInput) -> Request:
    return Request(given.scope, Keys(_range_of(given).checked()))


def _list_entries(given: PageInput) -> Request:
    for name, number, low, high in (("limit", given.limit, 1, 1_000), ("max_bytes", given.max_bytes, 256, 8_000_000)):
        if not low <= number <= high:
            raise InvalidPageLimits(f"`{name}` is from {low} to {high}, not {number}")
    turn = ReadPage(_range_of(given), cursor=given.cursor, max_bytes=given.max_bytes)
    return Request(given.scope, turn)


def _count(given: CountInput) -> Request:
    return Request(given.scope, Count(Range(given.prefix, given.start, given.after, given.end)))


def _delete_range(given: DeleteRangeInput) -> Request:
    return _request(given, DeleteRange(_range_of(given).checked()))


def _touch(given: TouchInput) -> Request:
    return _request(given, Touch(checked_name("key", given.key), checked_deadline(given.ttl_ms, given.expires_at)))


def _range_of(given: RangeInput) -> Range:
    return Range(given.prefix, given.start, given.after, given.end, given.reverse, given.limit)


def _request(given: CompareAndSetInput | DeleteRangeInput | TransactionInput | TouchInput, turn: Turn[Any]) -> Request:
    if given.idempotency_key is not None:
        turn = Once(turn, given.idempotency_key)
    return Request(given.scope, turn, given.durable)


# ------------------------------------------------------------------------------------------------------- answers


def entry_to_json(entry: Entry | None) -> dict[str, Any] | None:
    """Return the answer of `state::get-entry`."""
    if entry is None:
        return None
    plain = {"value": entry.value, "revision": entry.revision}
    if entry.expires_ms is not None:
        plain["expires_at"] = entry.expires_ms
    return plain


def page_to_json(page: Page) -> dict[str, Any]:
    """Return the answer of `state::list_entries` that pages by seek. `offset` and `total` are a snapshot's only."""
    entries = [[key, decode(entry.json)] for key, entry in page.entries]
    return {"entries": entries, "next_cursor": page.cursor, "done": page.done}


def refusal_to_json(error: Conflict | UpdateRefused) -> dict[str, Any]:
    """Return the answer of a transaction that was not committed."""
    conflicts = error.conflicts if isinstance(error, Conflict) else ()
    errors = error.errors if isinstance(error, UpdateRefused) else ()
    return {
        "committed": False,
        "conflicts": [{"index": one.index, "key": one.key, "revision": one.revision} for one in conflicts],
        "errors": [{**msgspec.to_builtins(one), "index": one.index} for one in errors],
    }


class NewFunction(NamedTuple):
    """One built-in function that the reference of 0.11.6 does not have."""

    function_id: str
    given: type[Any]
    read: Callable[[Any], Request]
    to_json: Callable[[Any], Any]
    right: Literal["read", "write"]
    """The right that it needs on the scope in its input."""


NEW_FUNCTIONS: Final[dict[str, NewFunction]] = {
    row.function_id: row
    for row in (
        NewFunction("state::compare-and-set", CompareAndSetInput, _compare_and_set, lambda one: one.to_json(), "write"),
        NewFunction("state::count", CountInput, _count, lambda count: {"count": count}, "read"),
        NewFunction("state::delete-range", DeleteRangeInput, _delete_range, lambda one: one.to_json(), "write"),
        NewFunction("state::get-entry", KeyInput, _get_entry, entry_to_json, "read"),
        NewFunction("state::list_entries", PageInput, _list_entries, page_to_json, "read"),
        NewFunction("state::list_keys", RangeInput, _list_keys, lambda keys: {"keys": keys}, "read"),
        NewFunction("state::touch", TouchInput, _touch, lambda found: TouchResult(found).to_json(), "write"),
        NewFunction("state::transaction", TransactionInput, _transaction, BatchResult.to_json, "write"),
    )
}
"""Function id -> its row, in order."""


def read_request(function_id: str, payload: object) -> Request:
    """Read the input of a new function. Raises DeserializationError, InvalidPageLimits, BatchTooLarge."""
    row = NEW_FUNCTIONS[function_id]
    try:
        return row.read(_converted(payload, row.given))
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error


def with_options(turn: Turn[Any], payload: object) -> tuple[Turn[Any], bool | None]:
    """Return what a plain `set`, `update` or `delete` becomes by the new fields of its input, and `durable`."""
    if not isinstance(payload, Mapping) or not any(name in payload for name in WriteOptions.__struct_fields__):
        return turn, None
    given = _converted(payload, WriteOptions)
    revision = checked_revision(given.if_revision, if_absent=given.if_absent)
    deadline = checked_deadline(given.ttl_ms, given.expires_at, keep=given.keep_ttl)
    match turn:
        case Set(key=key, data=data):
            turn = SetWith(key, data, revision, deadline)
        case Update(key=key, ops=ops):
            turn = UpdateWith(key, ops, revision, deadline, given.atomic)
        case Delete(key=key):
            turn = DeleteWith(key, revision)
    if given.idempotency_key is not None:
        turn = Once(turn, given.idempotency_key)
    return turn, given.durable


def _converted(payload: object, kind: type[T]) -> T:
    if not isinstance(payload, Mapping):
        raise DeserializationError(f"expected an object, got {json_type(payload)}")
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as error:
        raise DeserializationError(json_words(error)) from error
