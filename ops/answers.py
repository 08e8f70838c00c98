"""Answers of turns as JSON text, as they go over the wire. Values pass through as they are stored.

`tell` is true if a bridge asks for more. A write then answers with its revision, and with whether the key existed
before, which distinguishes a stored null from a missing key. A list answers with its keys as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from scopestate.errors import Conflict, UpdateRefused
from scopestate.ops.ranges import Deleted, Page
from scopestate.ops.remote import KeysNow, Recalled
from scopestate.ops.results import (
    BatchResult,
    CasResult,
    DeleteResult,
    SetResult,
    StepResult,
    TouchResult,
    UpdateResult,
    WriteResult,
)
from scopestate.ops.turns import Entry

_json: Final = msgspec.json.Encoder().encode
_NULL: Final = b"null"

_Revision = Annotated[int, Meta(description="The revision that the write gave; only with options")]
_Replayed = Annotated[
    bool, Meta(description="True if an earlier call with this idempotency key did it, and this one did nothing")
]


# --------------------------------------------------------------------------------------------- shapes, for the schemas


class ComparedAndSet(msgspec.Struct):
    """Result of `state::compare-and-set`."""

    swapped: bool
    current: Annotated[Any, Meta(description="The value that the key has; only if it was not swapped")] = None
    old_value: Annotated[Any, Meta(description="The value that it had; only with options")] = None
    revision: _Revision = 0
    replayed: _Replayed = False


class Counted(msgspec.Struct):
    """Result of `state::count`."""

    count: int


class RangeDeleted(msgspec.Struct):
    """Result of `state::delete-range`."""

    deleted: Annotated[int, Meta(description="Keys that were removed")]
    more: Annotated[bool, Meta(description="True if keys are left in the range")]
    revision: _Revision = 0
    replayed: _Replayed = False


class EntryFound(msgspec.Struct):
    """Result of `state::get-entry`; null if the key does not exist."""

    value: Any
    revision: int
    expires_at: Annotated[int | None, Meta(description="When it expires, in milliseconds since the epoch")] = None


class KeysFound(msgspec.Struct):
    """Result of `state::list_keys`."""

    keys: list[str]


class PageFound(msgspec.Struct):
    """Result of `state::list_entries`."""

    entries: Annotated[list[list[Any]], Meta(description="Each a key and its value")]
    next_cursor: str | None
    done: bool
    offset: Annotated[int, Meta(description="Rows of the snapshot before this page")] = 0
    total: Annotated[int, Meta(description="Rows of the snapshot")] = 0


class KeyConflicted(msgspec.Struct):
    """One key that is not as a transaction expected it."""

    index: Annotated[int, Meta(description="Which check failed")]
    key: str
    revision: Annotated[int, Meta(description="The revision that it has; 0: it does not exist")]


class Transacted(msgspec.Struct):
    """Result of `state::transaction`."""

    committed: bool
    revision: Annotated[int, Meta(description="The revision of its last change")] = 0
    results: Annotated[list[dict[str, Any]], Meta(description="One for each step")] = []
    replayed: _Replayed = False
    conflicts: list[KeyConflicted] = []
    errors: Annotated[list[dict[str, Any]], Meta(description="As of an update, with `index`, the step")] = []


# --------------------------------------------------------------------------------------------------------- JSON text


def as_it_is(text: bytes | None, tell: bool = False) -> bytes | None:
    """The value of a key; None if the key does not exist."""
    return text


def listed(found: list[Any], tell: bool = False) -> bytes:
    """The answer of `state::list`: values, or keys with values if a bridge or a tool asks for them."""
    if not tell:
        return b"[%b]" % b",".join(found)
    names = _json([key for key, _ in found])
    if found and isinstance(found[0][1], Entry):
        return b'{"keys":%b,"entries":[%b]}' % (names, b",".join([entry(one) for _, one in found]))
    return b'{"keys":%b,"values":[%b]}' % (names, b",".join([value for _, value in found]))


def groups(names: list[str], tell: bool = False) -> bytes:
    """The answer of `state::list_groups`."""
    return _json({"groups": names})


def set_result(result: SetResult, tell: bool = False) -> bytes:
    """The answer of `state::set`."""
    old = result.old_json
    if result.detailed or tell:
        more = _details(result, tell) + _existed(old, tell)
        return b'{"old_value":%b,"new_value":%b%b}' % (old or _NULL, result.new_json, more)
    return b'{"old_value":%b,"new_value":%b}' % (_NULL if old is None else old, result.new_json)


def update_result(result: UpdateResult, tell: bool = False) -> bytes:
    """The answer of `state::update`."""
    if not result.errors:
        return set_result(result, tell)
    return b'%b,"errors":%b}' % (set_result(result, tell)[:-1], _json(result.errors))


def deleted(result: DeleteResult | bytes | None, tell: bool = False) -> bytes | None:
    """The answer of `state::delete`: the bare value, or an object if the caller asked for more."""
    if not isinstance(result, DeleteResult):
        return result
    old = result.old_json
    return b'{"old_value":%b%b%b}' % (old or _NULL, _details(result), _existed(old, tell))


def compared_and_set(result: CasResult, tell: bool = False) -> bytes:
    """The answer of `state::compare-and-set`."""
    found = result.found_json or _NULL
    if not result.swapped:
        return b'{"swapped":false,"current":%b%b}' % (found, _details(result, tell))
    if result.detailed or tell:
        told = b',"old_value":' + found
        return b'{"swapped":true%b%b%b}' % (told, _details(result, tell), _existed(result.found_json, tell))
    return b'{"swapped":true}'


def committed(result: BatchResult | Recalled, tell: bool = False) -> bytes:
    """The answer of a transaction that was committed."""
    if isinstance(result, Recalled):
        return b'{"committed":true,"recalled":%b}' % result.answer if result.found else b'{"committed":false}'
    results = b",".join([_step_result(one, tell) for one in result.results])
    replayed = b',"replayed":true' if result.replayed else b""
    return b'{"committed":true,"revision":%d,"results":[%b]%b}' % (result.revision, results, replayed)


def _step_result(result: StepResult, tell: bool) -> bytes:
    match result:
        case TouchResult():
            return touched(result.touched)
        case DeleteResult(old_json=old):
            return b'{"old_value":%b%b%b}' % (old or _NULL, _details(result, tell), _existed(old, tell))
        case _:
            return set_result(result, tell)


def refused(error: Conflict | UpdateRefused) -> bytes:
    """The answer of a transaction that was not committed."""
    conflicts = error.conflicts if isinstance(error, Conflict) else ()
    errors = error.errors if isinstance(error, UpdateRefused) else ()
    return _json(
        {
            "committed": False,
            "conflicts": [{"index": one.index, "key": one.key, "revision": one.revision} for one in conflicts],
            "errors": [{**msgspec.to_builtins(one), "index": one.index} for one in errors],
        }
    )


def entry(found: Entry | int | None, tell: bool = False) -> bytes:
    """The answer of `state::get-entry`. `found` is a number of milliseconds if a bridge asked for a time."""
    if tell:
        return _json({"ms": found})
    assert not isinstance(found, int)
    if found is None:
        return _NULL
    expires = b"" if found.expires_ms is None else b',"expires_at":%d' % found.expires_ms
    return b'{"value":%b,"revision":%d%b}' % (found.json, found.revision, expires)


def keys(found: list[str] | KeysNow, tell: bool = False) -> bytes:
    """The answer of `state::list_keys`."""
    if isinstance(found, KeysNow):
        return b'{"keys":%b,"revision":%d}' % (_json(found.keys), found.revision)
    return b'{"keys":%b}' % _json(found)


def row(key: str, data: bytes) -> bytes:
    """One key with its value."""
    return b"[%b,%b]" % (_json(key), data)


def snapshot_page(found: list[bytes], cursor: str | None, offset: int, total: int) -> bytes:
    """The answer of `state::list_entries` from a snapshot. `found`: the rows of the page, as JSON."""
    done = b"true" if cursor is None else b"false"
    return b'{"entries":[%b],"next_cursor":%b,"done":%b,"offset":%d,"total":%d}' % (
        b",".join(found),
        _json(cursor),
        done,
        offset,
        total,
    )


def page(found: Page | list[tuple[str, Entry]], tell: bool = False) -> bytes:
    """The answer of `state::list_entries` that pages by seek. A bridge gets whole entries instead of values."""
    if tell:
        cursor, whole = (None, found) if isinstance(found, list) else (found.cursor, list(found.entries))
        shown = b",".join([b"[%b,%b]" % (_json(key), entry(one)) for key, one in whole])
        return b'{"entries":[%b],"next_cursor":%b}' % (shown, _json(cursor))
    assert isinstance(found, Page)
    entries = b"[%b]" % b",".join([row(key, one.json) for key, one in found.entries])
    done = b"true" if found.done else b"false"
    return b'{"entries":%b,"next_cursor":%b,"done":%b}' % (entries, _json(found.cursor), done)


def count(number: int, tell: bool = False) -> bytes:
    """The answer of `state::count`."""
    return b'{"count":%d}' % number


def deleted_range(result: Deleted, tell: bool = False) -> bytes:
    """The answer of `state::delete-range`."""
    more = b"true" if result.more else b"false"
    removed = b""
    if tell:
        removed = b',"removed":[%b]' % b",".join([row(key, data) for key, data in result.removed])
    return b'{"deleted":%d,"more":%b%b%b}' % (result.deleted, more, _details(result), removed)


def touched(found: bool, tell: bool = False) -> bytes:
    """The answer of `state::touch`."""
    return b'{"touched":true}' if found else b'{"touched":false}'


def _details(result: WriteResult, tell: bool = False) -> bytes:
    """The fields that follow the reference's if the caller used an argument that the reference lacks."""
    if not (result.detailed or tell):
        return b""
    replayed: Any = b',"replayed":true' if result.replayed else b""
    return b',"revision":%d%b' % (result.revision, replayed)


def _existed(old: bytes | None, asked: bool) -> bytes:
    if not asked:
        return b""
    return b',"existed":false' if old is None else b',"existed":true'
