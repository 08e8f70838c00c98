"""The built-in functions: one row for each, with everything that other modules need to know about it.

`engine.call`, the server, its access rights and the schemas of `engine.functions()` read the row. CONTRIBUTING says
what else a new function needs, under "A new operation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from scopestate.errors import Conflict, DeserializationError, ScopestateError, UpdateRefused
from scopestate.ops import answers, messages, polls, requests, results, turns
from scopestate.ops.arguments import Limits
from scopestate.ops.consumer_functions import CONSUMER_FUNCTIONS
from scopestate.ops.messages import Message
from scopestate.ops.requests import Request, misfit
from scopestate.ops.values import class_name, json_type, normalise

T = TypeVar("T")
Right = Literal["read", "write"]
Read = Callable[[Mapping[str, Any], Limits], Request]
"""Reads an input."""

_READ: Final[tuple[Right, ...]] = ("read",)
_WRITE: Final[tuple[Right, ...]] = ("write",)
_BOTH: Final[tuple[Right, ...]] = ("read", "write")


class BuiltIn(NamedTuple):
    """One built-in function."""

    function_id: str
    given: type[Any]
    """Its input. The docstring is the description of the function."""
    request: str
    """The name of its input, in the schemas."""
    read: Read | None
    """None: the function is about all scopes."""
    answer: Callable[..., bytes | None]
    """Makes JSON text from the turn's answer and `Request.tell`. Returns None if there is no value."""
    rights: tuple[Right, ...] = ()
    """The rights that it needs on the scope in its input. A write with a condition needs `read` as well."""
    response: tuple[str, Any] | None = None
    """The name of its result, and the type; None: a bare value."""
    message: type[Message] | None = None
    """The public message for the same call, if the reference has the function."""
    method: str = ""
    """The method of `Engine` and of `engine.aio` that takes the fields of this message."""
    plain: Callable[[Any], Any] = lambda answer: answer
    """Makes plain JSON data from the result of this method."""
    fields: int = -1
    """The number of these fields; -1: the reference does not have the function."""

    def plain_fields(self, payload: object) -> list[Any] | None:
        """Return the fields of a call that uses only fields of the reference; None for any other call: use `read`.

        Most calls use only those. A `Request` and JSON text would make such a call take half as long again.
        """
        if type(payload) is not dict or len(payload) != self.fields:
            return None
        try:
            return requests.reference_fields(self.function_id, payload)
        except (ScopestateError, MemoryError):
            raise
        except Exception as error:
            raise misfit(self.function_id, f"reading the input failed with {class_name(error)}") from error

    def refusal(self, error: Conflict | UpdateRefused) -> bytes:
        """Return the answer that says why nothing was written. Raises the error itself if it is the answer."""
        if self.function_id == "state::transaction":
            return answers.refused(error)
        raise error


_UPDATED: Final = Annotated[results.UpdateResult, msgspec.Meta(description="Result of an atomic update operation")]


def _result_name(kind: Any) -> str:
    named = [one for one in get_args(kind) if one is not NoneType] or [kind]
    return str(named[0].__name__)


BUILT_IN: Final[dict[str, BuiltIn]] = {
    row.function_id: row
    for row in (
        BuiltIn(
            turns.Delete.function_id, requests.DeleteInput, "StateDeleteInput", requests.read_delete,
            answers.deleted, _WRITE, None, messages.Delete, "delete", fields=2,
        ),
        BuiltIn(
            turns.Get.function_id, requests.GetInput, "StateGetInput", requests.read_get,
            answers.as_it_is, _READ, None, messages.Get, "get", fields=2,
        ),
        BuiltIn(
            turns.List.function_id, requests.ListInput, "StateGetGroupInput", requests.read_list,
            answers.listed, _READ, None, messages.List, "list", fields=1,
        ),
        BuiltIn(
            "state::list_groups", requests.ListGroupsInput, "StateListGroupsInput", None,
            answers.groups, (), ("StateListGroupsResult", results.ListGroupsResult), messages.ListGroups, "list_groups",
            lambda groups: {"groups": groups}, 0,
        ),
        BuiltIn(
            turns.Set.function_id, requests.SetInput, "StateSetInput", requests.read_set,
            answers.set_result, _WRITE, ("SetResult", results.SetResult), messages.Set, "set",
            results.SetResult.to_json, 3,
        ),
        BuiltIn(
            turns.Update.function_id, requests.UpdateInput, "StateUpdateInput", requests.read_update,
            answers.update_result, _WRITE, ("UpdateResult", _UPDATED), messages.Update, "update",
            results.UpdateResult.to_json, 3,
        ),
        BuiltIn(
            "state::compare-and-set", requests.CompareAndSetInput, "StateCompareAndSetInput",
            requests.read_compare_and_set, answers.compared_and_set, _BOTH,
            ("StateCompareAndSetResult", answers.ComparedAndSet),
        ),
        BuiltIn(
            "state::count", requests.CountInput, "StateCountInput", requests.read_count,
            answers.count, _READ, ("StateCountResult", answers.Counted),
        ),
        BuiltIn(
            "state::delete-range", requests.DeleteRangeInput, "StateDeleteRangeInput", requests.read_delete_range,
            answers.deleted_range, _WRITE, ("StateDeleteRangeResult", answers.RangeDeleted),
        ),
        BuiltIn(
            "state::get-entry", requests.GetEntryInput, "StateGetEntryInput", requests.read_get_entry,
            answers.entry, _READ, ("StateEntry", answers.EntryFound | None),
        ),
        BuiltIn(
            "state::list_entries", requests.PageInput, "StateListEntriesInput", requests.read_list_entries,
            answers.page, _READ, ("StateListEntriesResult", answers.PageFound),
        ),
        BuiltIn(
            "state::list_keys", requests.RangeInput, "StateListKeysInput", requests.read_list_keys,
            answers.keys, _READ, ("StateListKeysResult", answers.KeysFound),
        ),
        BuiltIn(
            "state::touch", requests.TouchInput, "StateTouchInput", requests.read_touch,
            answers.touched, _WRITE, ("StateTouchResult", results.TouchResult),
        ),
        BuiltIn(
            "state::transaction", requests.TransactionInput, "StateTransactionInput", requests.read_transaction,
            answers.committed, _WRITE, ("StateTransactionResult", answers.Transacted),
        ),
    )
}  # fmt: skip
"""Function id -> its row: the reference's six in its order, then those that scopestate adds."""


FLUSH: Final = "state::flush"
"""The function that waits until everything is saved."""


class FlushInput(msgspec.Struct, frozen=True):
    """Wait until everything that was acknowledged is on disk, apart from scopes that are kept in memory only."""


class Described(NamedTuple):
    """What the schemas say about a built-in function."""

    function_id: str
    given: type[Any]
    """Its input. The docstring is the description of the function."""
    request: str
    """The name of its input."""
    response: tuple[str, Any] | None
    """The name of its result, and the type; None: a bare value."""


DESCRIBED: Final = (
    *[Described(row.function_id, row.given, row.request, row.response) for row in BUILT_IN.values()],
    Described(polls.FUNCTION_ID, polls.ChangesInput, "StateChangesInput", ("StateChangesResult", polls.ChangesFound)),
    Described(FLUSH, FlushInput, "StateFlushInput", None),
    *[
        Described(row.function_id, row.given, row.given.__name__, (_result_name(row.response), row.response))
        for row in CONSUMER_FUNCTIONS
    ],
)
"""All built-in functions of an engine: those on one scope, and those about changes and about consumers."""

BUILT_IN_IDS: Final = frozenset(row.function_id for row in DESCRIBED)
"""Ids that neither a program nor a worker can register."""


def read_flush(payload: object) -> None:
    """Check the input of `state::flush`. Raises DeserializationError."""
    _reading(FLUSH, payload, lambda given: requests.convert(given, FlushInput))


def from_payload(function_id: str, payload: object) -> Message:
    """Return the message for the input of one of the reference's functions. Raises as `read_request`."""
    message = BUILT_IN[function_id].message
    if message is None:
        raise KeyError(function_id)
    return _reading(
        function_id,
        payload,
        lambda given: message(
            **dict(zip(requests.FIELDS[function_id], requests.reference_fields(function_id, given), strict=True))
        ),
    )


def read_request(function_id: str, payload: object, limits: Limits) -> Request:
    """Read the input of a function on one scope. Fields that it does not know are ignored.

    Raises DeserializationError, worded as in iii-state for the fields that the reference knows; ValueTooLarge,
    BatchTooLarge and InvalidPageLimits. Nothing has been changed then. `function_id` must be one of BUILT_IN.
    """
    row = BUILT_IN[function_id]
    read = row.read
    if read is None:
        raise KeyError(function_id)
    if row.message is not None:
        return _reading(function_id, payload, lambda given: read(given, limits))

    def read_new(given: Mapping[str, Any]) -> Request:
        try:
            return read(normalise(given), limits)
        except DeserializationError as error:
            raise misfit(function_id, str(error)) from error

    return _reading(function_id, payload, read_new)


def _reading(function_id: str, payload: object, read: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        if not isinstance(payload, Mapping):
            raise misfit(function_id, f"expected an object, got {json_type(payload)}")
        return read(payload)
    except (ScopestateError, MemoryError):
        raise
    except Exception as error:
        # The program may pass a mapping, string or op of its own class, whose methods raise.
        raise misfit(function_id, f"reading the input failed with {class_name(error)}") from error
