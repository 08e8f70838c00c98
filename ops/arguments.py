"""Makes turns from the arguments of Python callers and from messages, and Python values from answers.

Each function here raises if an argument is wrong, before a scope is claimed and before anything is sent:
DeserializationError, InvalidValue, ValueTooLarge or BatchTooLarge. `durable` is returned separately, because waiting
for the disk is not part of the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from scopestate.errors import DeserializationError, InvalidCursor
from scopestate.ops import messages
from scopestate.ops.apply import MISSING
from scopestate.ops.callbacks import Runner, refuse_callback
from scopestate.ops.options import (
    DeadlineOptions,
    DeleteOptions,
    SetOptions,
    UpdateOptions,
    WriteOptions,
    bounded,
    checked_flag,
    checked_limit,
    checked_revision,
    range_of,
    refuse_unbounded,
    refuse_unknown,
)
from scopestate.ops.ranges import PAGE_KEYS, Count, DeleteRange, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.ranges import Page as PageOfScope
from scopestate.ops.results import (
    BatchResult,
    CasResult,
    DeleteResult,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    UpdateResult,
)
from scopestate.ops.transactions import (
    Batch,
    Check,
    DeleteStep,
    SetStep,
    Step,
    TouchStep,
    Transact,
    Transaction,
    UpdateStep,
)
from scopestate.ops.turns import (
    LAST_MS,
    LAST_REVISION,
    Deadline,
    Delete,
    Entry,
    Get,
    List,
    Set,
    Turn,
    Update,
    checked_name,
    no_message,
    refuse_size,
    view_of,
)
from scopestate.ops.update_ops import AnyOp, checked
from scopestate.ops.values import class_name, decode, encode
from scopestate.ops.writes import (
    CheckedUpdate,
    CompareAndSet,
    DeleteWith,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    UpdateWith,
    asked_deadline,
    touch_deadline,
)

A = TypeVar("A")

Asked = tuple[Turn[A], bool | None]
"""The turn that a caller asks for, and `durable`."""


class Limits(Protocol):
    """The limits that are checked here."""

    max_value_bytes: int
    max_batch_bytes: int


# ------------------------------------------------------------------------------------------------------------- writes


def asked(
    turn: Turn[A],
    durable: object = None,
    idempotency_key: str | None = None,
    *,
    call: str = "",
    **unknown: object,
) -> Asked[A]:
    """Return a write with the options that every write takes. `call` names the method, for an error."""
    if unknown:
        refuse_unknown(call, unknown, WriteOptions)
    if durable is None and idempotency_key is None:
        return turn, None
    if idempotency_key is not None:
        turn = Once(turn, idempotency_key)
    return turn, None if durable is None else checked_flag("durable", durable)


def set_turn(key: str, data: bytes, options: SetOptions) -> Asked[SetResult]:
    """Return a `set` with options. `data` is the value as JSON; the key has been checked."""
    if len(options) == 1:
        # Most calls have one condition or one deadline. For these, the general path would take half of the call's time.
        revision: object = options.get("if_revision")
        if type(revision) is int and 0 <= revision <= LAST_REVISION:
            return SetWith(key, data, revision), None
        ttl: object = options.get("ttl")
        if type(ttl) is int and 0 < ttl <= LAST_MS // 1000:
            return SetWith(key, data, None, Deadline(ttl * 1000)), None
    return _set_turn(key, data, **options)


def _set_turn(
    key: str,
    data: bytes,
    *,
    if_revision: int | None = None,
    if_absent: bool = False,
    ttl: float | timedelta | None = None,
    expires_at: datetime | None = None,
    keep_ttl: bool = False,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    **unknown: object,
) -> Asked[SetResult]:
    if unknown:
        refuse_unknown("set()", unknown, SetOptions)
    revision = checked_revision(if_revision, if_absent=if_absent)
    turn = SetWith(key, data, revision, asked_deadline(ttl, expires_at, keep_ttl=keep_ttl))
    return asked(turn, durable, idempotency_key)


def update_turn(
    key: str,
    ops: Iterable[AnyOp],
    *,
    if_revision: int | None = None,
    if_absent: bool = False,
    ttl: float | timedelta | None = None,
    expires_at: datetime | None = None,
    keep_ttl: bool = False,
    atomic: bool = False,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    check: Callable[[bytes], object] | None = None,
    **unknown: object,
) -> Asked[UpdateResult]:
    """Return an `update` with options. `check` raises to refuse a new value."""
    if unknown:
        refuse_unknown("update()", unknown, UpdateOptions)
    revision = checked_revision(if_revision, if_absent=if_absent)
    deadline = asked_deadline(ttl, expires_at, keep_ttl=keep_ttl)
    turn = UpdateWith(key, checked(ops), revision, deadline, checked_flag("atomic", atomic))
    if check is not None:
        turn = CheckedUpdate(key, turn.ops, revision, deadline, turn.atomic, check)
    return asked(turn, durable, idempotency_key)


def delete_turn(
    key: str,
    *,
    if_revision: int | None = None,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    **unknown: object,
) -> Asked[DeleteResult]:
    """Return a `delete` with options."""
    if unknown:
        refuse_unknown("delete()", unknown, DeleteOptions)
    return asked(DeleteWith(key, checked_revision(if_revision)), durable, idempotency_key)


def cas_turn(
    scope: str, key: str, expected: object, value: object, limits: Limits, options: WriteOptions
) -> Asked[CasResult]:
    """Return a `compare_and_set`."""
    if type(key) is not str or not key.isascii():
        key = checked_name("key", key)
    data = encode(value)
    limit = limits.max_value_bytes
    if limit:
        refuse_size(scope, key, data, limit)
    turn = CompareAndSet(key, None if expected is MISSING or expected is None else encode(expected), data)
    return asked(turn, call="compare_and_set()", **options) if options else (turn, None)


def modify_turn(
    key: str, function: Callable[[Any], Any], default: object, runner: Runner, durable: bool | None
) -> Asked[ModifyResult]:
    """Return a `modify`."""
    refuse_callback("modify", function)
    if type(key) is not str or not key.isascii():
        key = checked_name("key", key)
    turn = Modify(key, function, default, runner)
    return (turn, None) if durable is None else asked(turn, durable)


def touch_turn(
    key: str,
    ttl: float | timedelta | UnsetType | None = UNSET,
    expires_at: datetime | None = None,
    *,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    **unknown: object,
) -> Asked[bool]:
    """Return a `touch`."""
    if unknown:
        refuse_unknown("touch()", unknown, WriteOptions)
    step = touch_step(key, ttl, expires_at)
    return asked(Touch(step.key, step.deadline), durable, idempotency_key)


def transact_turn(
    function: Callable[[Transaction], A],
    limits: Limits,
    runner: Runner,
    *,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    **unknown: object,
) -> Asked[A]:
    """Return a `transact`."""
    if unknown:
        refuse_unknown("transact()", unknown, WriteOptions)
    refuse_callback("transact", function)
    return asked(Transact(function, limits.max_batch_bytes, runner), durable, idempotency_key)


def delete_range_turn(
    *,
    durable: bool | None = None,
    idempotency_key: str | None = None,
    **bounds: Any,
) -> Asked[Any]:
    """Return the turn that removes the first keys of a range. Raises DeserializationError if there is no bound."""
    within = bounded("delete_range()", **bounds)
    refuse_unbounded(within)
    return asked(DeleteRange(within), durable, idempotency_key)


# --------------------------------------------------------------------------------------------------- parts of a batch


def update_step(key: str, ops: Iterable[AnyOp], options: DeadlineOptions) -> UpdateStep:
    """Return an `update` of a batch."""
    return UpdateStep(checked_name("key", key), checked(ops), step_deadline("update()", **options))


def step_deadline(
    call: str,
    *,
    ttl: float | timedelta | None = None,
    expires_at: datetime | None = None,
    keep_ttl: bool = False,
    **unknown: object,
) -> Deadline:
    """Return the deadline that a step of a batch asks for. `call` names the method, for an error."""
    if unknown:
        refuse_unknown(f"{call} of a batch", unknown, DeadlineOptions)
    return asked_deadline(ttl, expires_at, keep_ttl=keep_ttl)


def touch_step(
    key: str, ttl: float | timedelta | UnsetType | None = UNSET, expires_at: datetime | None = None
) -> TouchStep:
    """Return a `touch` of a batch."""
    return TouchStep(checked_name("key", key), touch_deadline(ttl, expires_at))


def check_of(key: str, *, revision: int | None = None, absent: bool = False, value: object = UNSET) -> Check:
    """Return a check of a batch."""
    key = checked_name("key", key)
    if (revision is not None) + checked_flag("absent", absent) + (value is not UNSET) != 1:
        raise DeserializationError("a check has one of `revision`, `absent=True` and `value`")
    expected = UNSET if value is UNSET else None if value is MISSING else encode(value)
    return Check(key, checked_revision(revision, if_absent=absent), expected)


def batch_turn(
    scope: str,
    steps: Sequence[Step],
    checks: Sequence[Check],
    limits: Limits,
    *,
    durable: bool | None = None,
    idempotency_key: str | None = None,
) -> Asked[BatchResult]:
    """Return a batch."""
    batch = Batch(tuple(steps), tuple(checks), max_bytes=limits.max_batch_bytes)
    batch.refuse_size(scope)
    return asked(batch, durable, idempotency_key)


# ------------------------------------------------------------------------------------------------------------- ranges


def page_turn(limit: int = PAGE_KEYS, cursor: str | None = None, **bounds: Any) -> ReadPage:
    """Return the turn that reads one page."""
    if limit is None:
        raise DeserializationError("a page has a limit: leave `limit` out for the usual one")
    if cursor is not None and not isinstance(cursor, str):
        raise DeserializationError(f"a cursor is a string, not {class_name(cursor)}")
    if cursor is not None and not cursor.isascii():
        raise InvalidCursor("damaged")
    within = range_of("pages()", limit=checked_limit("limit", limit, 1), **bounds)
    return ReadPage(within, cursor=cursor)


def next_page(turn: ReadPage, cursor: str) -> ReadPage:
    """Return the turn that reads the page after the one that returned this cursor."""
    return msgspec.structs.replace(turn, cursor=cursor)


def page_of(page: PageOfScope) -> Page:
    """Return a page as callers see it."""
    return Page(tuple(views_of(list(page.entries))), page.cursor)


def views_of(entries: list[tuple[str, Entry]]) -> list[EntryView]:
    """Return entries as callers see them."""
    return [EntryView(key, entry.json, entry.revision, entry.expires_ms) for key, entry in entries]


def items_of(pairs: list[tuple[str, bytes]]) -> list[tuple[str, Any]]:
    """Return keys with their values."""
    return [(key, decode(data)) for key, data in pairs]


def values_of(values: list[bytes]) -> list[Any]:
    """Return values."""
    return [decode(data) for data in values]


# ----------------------------------------------------------------------------------------------------------- messages


def turn_of(message: object, limits: Limits, runner: Runner) -> Asked[Any]:
    """Return the turn of a public message. This encodes the value, so call it before the scope is claimed."""
    match message:
        case messages.Set(scope=scope, key=key, value=value):
            data = encode(value)
            refuse_size(scope, key, data, limits.max_value_bytes)
            key = checked_name("key", key)
            options = message.options()
            return _set_turn(key, data, **options) if options else (Set(key, data), None)
        case messages.Update(key=key, ops=ops):
            key = checked_name("key", key)
            options = message.options()
            return update_turn(key, ops, **options) if options else (Update(key, checked(ops)), None)
        case messages.Delete(key=key):
            key = checked_name("key", key)
            options = message.options()
            return delete_turn(key, **options) if options else (Delete(key), None)
        case messages.CompareAndSet(scope=scope, key=key, expected=expected, value=value):
            return cas_turn(scope, key, expected, value, limits, message.options())
        case messages.Modify(key=key, function=function, default=default, durable=durable):
            return modify_turn(key, function, default, runner, durable)
        case messages.Touch(key=key, ttl=ttl, expires_at=expires_at):
            return touch_turn(key, ttl, expires_at, durable=message.durable, idempotency_key=message.idempotency_key)
        case messages.Batch(scope=scope, steps=steps, checks=checks):
            made = [_step_of(scope, step, limits) for step in steps]
            expected = [_check_of(check) for check in checks]
            return batch_turn(scope, made, expected, limits, **message.options())
        case messages.Transact(function=function):
            return transact_turn(function, limits, runner, **message.options())
        case messages.DeleteRange():
            return delete_range_turn(**messages.bounds_of(message), **message.options())
        case _:
            return _reading_of(message), None


def _reading_of(message: object) -> Turn[Any]:
    match message:
        case messages.Get(key=key):
            return Get(checked_name("key", key))
        case messages.GetEntry(key=key):
            return GetEntry(checked_name("key", key))
        case messages.List():
            return List()
        case messages.Keys():
            return Keys(message.within())
        case messages.Items():
            return Pairs(message.within())
        case messages.Entries():
            return Entries(message.within())
        case messages.Values():
            return Values(message.within())
        case messages.Count():
            return Count(bounded("count()", **messages.bounds_of(message)))
        case _:
            raise no_message(message)


def _step_of(scope: str, step: object, limits: Limits) -> Step:
    match step:
        case messages.SetStep(key=key, value=value, ttl=ttl, expires_at=expires_at, keep_ttl=keep_ttl):
            key, data = checked_name("key", key), encode(value)
            refuse_size(scope, key, data, limits.max_value_bytes)
            return SetStep(key, data, asked_deadline(ttl, expires_at, keep_ttl=keep_ttl))
        case messages.UpdateStep(key=key, ops=ops, ttl=ttl, expires_at=expires_at, keep_ttl=keep_ttl):
            return update_step(key, ops, {"ttl": ttl, "expires_at": expires_at, "keep_ttl": keep_ttl})
        case messages.DeleteStep(key=key):
            return DeleteStep(checked_name("key", key))
        case messages.TouchStep(key=key, ttl=ttl, expires_at=expires_at):
            return touch_step(key, ttl, expires_at)
        case _:
            raise DeserializationError(
                f"a step of a batch is a SetStep, UpdateStep, DeleteStep or TouchStep, not {class_name(step)}"
            )


def _check_of(check: object) -> Check:
    if not isinstance(check, messages.Check):
        raise DeserializationError(f"a check of a batch is a Check, not {class_name(check)}")
    return check_of(check.key, revision=check.revision, absent=check.absent, value=check.value)


def answer_of(message: object, answer: Any) -> Any:
    """Return the answer to a public message, as the method of the same name returns it."""
    match message:
        case messages.Get():
            return None if answer is None else decode(answer)
        case messages.Delete():
            return deleted(answer)
        case messages.List() | messages.Values():
            return values_of(answer)
        case messages.GetEntry(key=key):
            return view_of(key, answer)
        case messages.Items():
            return items_of(answer)
        case messages.Entries():
            return views_of(answer)
        case _:
            return answer


def deleted(answer: bytes | DeleteResult | None) -> Any:
    """Return the value that a deleted key had."""
    if isinstance(answer, DeleteResult):
        return answer.old_value
    return None if answer is None else decode(answer)
