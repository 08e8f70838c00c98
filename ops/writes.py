"""Turns on one key beyond the reference's: conditional writes, compare-and-set, deadlines, expiry, idempotency keys.

A conflict raises, before anything has changed: an answer that says "not written" would be overlooked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from scopestate.errors import Conflict, DeserializationError, IdempotencyMismatch, KeyConflict, StorageError
from scopestate.ops.callbacks import Runner, plain_answer, run_plainly
from scopestate.ops.options import checked_flag
from scopestate.ops.results import (
    CasResult,
    DeleteResult,
    ModifyResult,
    SetResult,
    TouchResult,
    UpdateResult,
    WriteResult,
)
from scopestate.ops.turns import (
    KEEP_DEADLINE,
    LAST_MS,
    NO_DEADLINE,
    A,
    Change,
    Deadline,
    Delete,
    Effects,
    Entry,
    Failure,
    Keep,
    Kept,
    NewDeadline,
    OneKey,
    Set,
    Stored,
    Turn,
    Update,
    View,
    changes_of,
    checked_name,
    deadline_of,
    expiry_of,
    refuse_size,
    set_key,
    update_key,
)
from scopestate.ops.values import decode, encode, parse, prepare

EXPIRED_AT_ONCE: Final = 256
"""The most expired keys that one turn removes, so that other calls do not wait for long."""

_NULL: Final = b"null"


class Absence(Enum):
    """What the function of `modify` may return in place of a value."""

    DELETE = "DELETE"
    KEEP = "KEEP"


DELETE: Final = Absence.DELETE
"""`modify`: delete the key."""
KEEP: Final = Absence.KEEP
"""`modify`: leave the key as it is."""


# ----------------------------------------------------------------------------------------------------- conditions


def check_revision(view: View, key: str, found: Entry | None, expected: int | None) -> None:
    """Raise Conflict if the key does not have the expected revision. 0: it must not exist; None: any revision."""
    revision = 0 if found is None else found.revision
    if expected is not None and revision != expected:
        raise Conflict(view.scope, (KeyConflict(0, key, expected, revision),))


class SetWith(Set, frozen=True, gc=False):
    """Set a key to a value, on a condition or with a deadline."""

    if_revision: int | None = None
    """Only if the key has this revision; 0: only if it does not exist."""
    deadline: Deadline = NO_DEADLINE

    def decide(self, view: View) -> Effects[SetResult]:
        before = view.entry(self.key)
        if self.if_revision is not None:
            check_revision(view, self.key, before, self.if_revision)
        return set_key(view, self.key, before, self.data, self.deadline, detailed=True)

    def call(self, scope: str) -> dict[str, Any]:
        return {**super().call(scope), **_asked(self.if_revision, self.deadline)}

    def effects_of(self, result: bytes | None) -> Effects[SetResult]:
        changes, answer = super().effects_of(result)
        return _detailed(changes, answer, result)

    def unpack(self, kept: bytes) -> SetResult:
        return msgspec.structs.replace(_SET_RESULT.decode(kept), replayed=True)


class UpdateWith(Update, frozen=True):
    """Apply checked ops to the value of a key: on a condition, with a deadline, or atomically."""

    if_revision: int | None = None
    """Only if the key has this revision; 0: only if it does not exist."""
    deadline: Deadline = NO_DEADLINE
    """With no field set, the scope's rule decides; without a rule, the deadline stays."""
    atomic: bool = False
    """True: raise UpdateRefused if an op is refused."""

    def decide(self, view: View) -> Effects[UpdateResult]:
        before = view.entry(self.key)
        if self.if_revision is not None:
            check_revision(view, self.key, before, self.if_revision)
        atomic = self.atomic or view.strict
        return update_key(view, self.key, before, self.ops, self.deadline, atomic=atomic, detailed=True)

    def call(self, scope: str) -> dict[str, Any]:
        return {**super().call(scope), **_asked(self.if_revision, self.deadline), "atomic": self.atomic}

    def effects_of(self, result: bytes | None) -> Effects[UpdateResult]:
        changes, answer = super().effects_of(result)
        return _detailed(changes, answer, result)

    def unpack(self, kept: bytes) -> UpdateResult:
        return msgspec.structs.replace(_UPDATE_RESULT.decode(kept), replayed=True)


class CheckedUpdate(UpdateWith, frozen=True):
    """An update whose result must pass `check`, which the turn calls, and calls again if another write comes in."""

    check: Callable[[bytes], object] = bytes
    """Takes the new value as JSON. If it raises, nothing is changed and the exception reaches the caller."""

    @property
    def kind(self) -> str:
        return UpdateWith.__name__

    def content(self) -> Any:
        return self.unchecked()

    def unchecked(self, if_revision: int | None = None) -> UpdateWith:
        """Return the same update without the check, on the condition that the key has `if_revision`, if it is given."""
        asked = self.if_revision if if_revision is None else if_revision
        return UpdateWith(self.key, self.ops, asked, self.deadline, self.atomic)

    def decide(self, view: View) -> Effects[UpdateResult]:
        changes, answer = super().decide(view)
        self.check(answer.new_json)
        return changes, answer


class DeleteWith(OneKey[DeleteResult], frozen=True):
    """Remove a key, on a condition."""

    function_id = Delete.function_id
    writes = True
    failure = Delete.failure

    if_revision: int | None = None
    """Only if the key has this revision. 0: only if it does not exist, and then nothing is removed."""

    def decide(self, view: View) -> Effects[DeleteResult]:
        before = view.entry(self.key)
        if self.if_revision is not None:
            check_revision(view, self.key, before, self.if_revision)
        changes = changes_of(view, self.key, before, None)
        old = None if before is None else before.json
        return changes, DeleteResult(old, revision=view.revision + len(changes), detailed=True)

    def call(self, scope: str) -> dict[str, Any]:
        return {**super().call(scope), **_asked(self.if_revision, NO_DEADLINE), "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[DeleteResult]:
        told = _decode_told(result or b"null")
        before = told.before(told.old_value)
        return _detailed((Change(self.key, before, None),), DeleteResult(before), result)

    def unpack(self, kept: bytes) -> DeleteResult:
        return msgspec.structs.replace(_DELETE_RESULT.decode(kept), replayed=True)


class CompareAndSet(OneKey[CasResult], frozen=True):
    """Set a key to a value if it has the expected one. A stored null counts as absent."""

    function_id = "state::compare-and-set"
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    expected: bytes | UnsetType | None
    """As JSON; None, and JSON null: the key has no value. UNSET: only the revision is compared."""
    data: bytes
    expected_revision: int | None = None
    deadline: Deadline = NO_DEADLINE

    def decide(self, view: View) -> Effects[CasResult]:
        before = view.entry(self.key)
        revision = 0 if before is None else before.revision
        current = None if before is None else before.json
        detailed = self.expected_revision is not None
        if (self.expected_revision is not None and revision != self.expected_revision) or not (
            self.expected is UNSET or same_json(*compared(self.expected, before))
        ):
            return (), CasResult(False, current, revision=revision, detailed=detailed)
        changes = changes_of(view, self.key, before, self.data, deadline_of(view, before, self.deadline))
        return changes, CasResult(True, current, revision=view.revision + len(changes), detailed=detailed)

    def call(self, scope: str) -> dict[str, Any]:
        call = {**super().call(scope), "value": msgspec.Raw(self.data), "_existed": True}
        if not isinstance(self.expected, UnsetType):
            call["expected"] = msgspec.Raw(self.expected or _NULL)
        if self.expected_revision is not None:
            call["expected_revision"] = self.expected_revision
        return call

    def effects_of(self, result: bytes | None) -> Effects[CasResult]:
        told = _decode_told(result or b"null")
        detailed = self.expected_revision is not None
        before = told.before(told.old_value if told.swapped else told.current)
        answer = CasResult(told.swapped, before, revision=told.revision, detailed=detailed, replayed=told.replayed)
        if not told.swapped or told.replayed:
            return (), answer
        return (Change(self.key, before, self.data),), answer

    def unpack(self, kept: bytes) -> CasResult:
        return msgspec.structs.replace(_CAS_RESULT.decode(kept), replayed=True)


class Modify(OneKey[ModifyResult], frozen=True):
    """Compute a new value from the old one. `function` is called again if another write comes in between."""

    function_id = "state::compare-and-set"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to update value")

    function: Callable[[Any], Any]
    """Takes the value; returns the new one, DELETE or KEEP. If it raises, nothing is changed; the call raises that."""
    default: Any = None
    """The argument of `function` if the key does not exist."""
    runner: Runner = run_plainly

    def decide(self, view: View) -> Effects[ModifyResult]:
        before = view.entry(self.key)
        old = None if before is None else before.json
        value = self.value(view.scope, old)
        if value is KEEP or (value is DELETE and before is None):
            revision = 0 if before is None else before.revision
            return (), ModifyResult(old, old, revision=revision)
        if value is DELETE:
            changes, data = changes_of(view, self.key, before, None), None
        else:
            data = encode(value)
            refuse_size(view.scope, self.key, data, view.limits.max_value_bytes)
            expires_ms = deadline_of(view, before, NO_DEADLINE, update=True)
            changes = changes_of(view, self.key, before, data, expires_ms)
        return changes, ModifyResult(old, data, revision=view.revision + len(changes))

    def value(self, scope: str, old: bytes | None) -> Any:
        """Return the result of the function for the old value. Raises what it raises."""
        if old is not None:
            argument = decode(old)
        else:  # a copy for each call, because the function may change it
            argument = copy.deepcopy(self.default) if isinstance(self.default, (dict, list)) else self.default
        return plain_answer("modify", self.runner("modify", scope, self.function, argument))


class _Told(msgspec.Struct):
    """The fields in another engine's answer that the reference lacks."""

    revision: int = 0
    replayed: bool = False
    swapped: bool = False
    old_value: msgspec.Raw = msgspec.Raw(_NULL)
    current: msgspec.Raw = msgspec.Raw(_NULL)
    existed: bool = False
    """Whether the key existed before. If it did, a null in `old_value` was a stored null."""

    def before(self, value: msgspec.Raw) -> bytes | None:
        """Return a value that the key had, or None if it did not exist."""
        found = parse(bytes(value))
        return None if found == _NULL and not self.existed else found


_decode_told: Final = msgspec.json.Decoder(_Told).decode
R = TypeVar("R", bound=WriteResult)


def _detailed(changes: tuple[Stored, ...], answer: R, result: bytes | None) -> Effects[R]:
    """Return what another engine did, with the fields of its answer that the reference lacks."""
    told = _decode_told(result or b"null")
    answer = msgspec.structs.replace(answer, revision=told.revision, detailed=True, replayed=told.replayed)
    return () if told.replayed else changes, answer


def _asked(if_revision: int | None, deadline: Deadline) -> dict[str, Any]:
    """Return the fields of a call. There is always one, because it asks for the revision in the answer."""
    fields: dict[str, Any] = {"if_revision": if_revision}
    if deadline.ttl_ms is not None:
        fields["ttl_ms"] = deadline.ttl_ms
    if deadline.expires_ms is not None:
        fields["expires_at"] = deadline.expires_ms
    if deadline.keep:
        fields["keep_ttl"] = True
    return fields


_SET_RESULT: Final = msgspec.msgpack.Decoder(SetResult)
_UPDATE_RESULT: Final = msgspec.msgpack.Decoder(UpdateResult)
_DELETE_RESULT: Final = msgspec.msgpack.Decoder(DeleteResult)
_CAS_RESULT: Final = msgspec.msgpack.Decoder(CasResult)


def checked_deadline(ttl_ms: int | None = None, expires_ms: int | None = None, *, keep: bool = False) -> Deadline:
    """Return the deadline that a write asks for. Raises DeserializationError."""
    if (ttl_ms is not None) + (expires_ms is not None) + keep > 1:
        raise DeserializationError("give one of `ttl`, `expires_at` and `keep_ttl`")
    for name, number in (("ttl_ms", ttl_ms), ("expires_at", expires_ms)):
        if number is None:
            continue
        if type(number) is not int or not 0 <= number <= LAST_MS:
            raise DeserializationError(f"`{name}` is a whole number of milliseconds, 0 or more, not {number!r:.40}")
    if ttl_ms == 0:
        raise DeserializationError("`ttl` is more than 0; to remove the key now, delete it")
    if ttl_ms is None and expires_ms is None and not keep:
        return NO_DEADLINE
    return Deadline(ttl_ms, expires_ms, keep)


def asked_deadline(
    ttl: float | timedelta | None = None, expires_at: datetime | None = None, *, keep_ttl: bool = False
) -> Deadline:
    """Return the deadline that a Python caller asks for: a time to live in seconds, or a datetime.

    Raises DeserializationError.
    """
    if ttl is None and expires_at is None and keep_ttl is False:
        return NO_DEADLINE
    whole: Any = ttl  # the usual case first
    if type(whole) is int and 0 < whole <= LAST_MS // 1000 and expires_at is None and keep_ttl is False:
        return Deadline(whole * 1000)
    keep = checked_flag("keep_ttl", keep_ttl)
    if (ttl is not None) + (expires_at is not None) + keep > 1:
        raise DeserializationError("give one of `ttl`, `expires_at` and `keep_ttl`")
    if keep:
        return KEEP_DEADLINE
    return Deadline(expires_ms=_ms_of(expires_at)) if ttl is None else Deadline(_ttl_ms(ttl))


def touch_deadline(ttl: float | timedelta | UnsetType | None = UNSET, expires_at: datetime | None = None) -> Deadline:
    """Return the deadline that a `touch` asks for. No field set: no deadline.

    Raises DeserializationError, also if neither argument is given.
    """
    if isinstance(ttl, UnsetType):
        if expires_at is None:
            raise DeserializationError("give `ttl` or `expires_at`; `ttl=None`: the key never expires")
        ttl = None
    return asked_deadline(ttl, expires_at)


def _ttl_ms(ttl: object) -> int:
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds * 1000 <= LAST_MS:
        raise DeserializationError(f"`ttl` is a number of seconds, more than 0, or a timedelta, not {ttl!r:.40}")
    return max(1, math.ceil(round(seconds * 1000, 3)))  # 2.007 * 1000 is slightly more than 2007


def _ms_of(moment: object) -> int:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise DeserializationError(f"`expires_at` is a datetime with a time zone, not {moment!r:.60}")
    return max(0, (moment - _EPOCH) // _MS)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)


# ------------------------------------------------------------------------------------------------ comparing values

_canonical: Final = msgspec.json.Encoder(order="sorted").encode


def same_json(one: bytes | None, other: bytes | None) -> bool:
    """Return whether two values are the same JSON. 1 and 1.0 differ; the order of fields does not matter."""
    if one == other:
        return True
    if one is None or other is None:
        return False
    return _canonical(decode(one)) == _canonical(decode(other))


def compared(expected: bytes | None, found: Entry | None) -> tuple[bytes | None, bytes | None]:
    """Return the expected value of a key and the one it has. Both are None for a stored null too."""
    return None if expected == _NULL else expected, None if found is None or found.json == _NULL else found.json


# ----------------------------------------------------------------------------------------------- reading, deadlines


class GetEntry(OneKey["Entry | None"], frozen=True):
    """Read a key with its revision and its deadline."""

    function_id = "state::get-entry"
    failure = Failure("GET_ERROR", "Failed to get value")

    def decide(self, view: View) -> Effects[Entry | None]:
        return (), view.entry(self.key)

    def effects_of(self, result: bytes | None) -> Effects[Entry | None]:
        if result is None or result == _NULL:
            return (), None
        told = _decode_entry(result)
        return (), Entry(parse(bytes(told.value)), told.revision, told.expires_at)


class _Entry(msgspec.Struct):
    value: msgspec.Raw
    revision: int
    expires_at: int | None = None


class _Left(msgspec.Struct):
    ms: int | None


prepare(_Left, TouchResult)
_decode_entry: Final = msgspec.json.Decoder(_Entry).decode


class Ttl(OneKey["int | None"], frozen=True):
    """Read how many milliseconds a key has left. None: it has no deadline or does not exist."""

    function_id = "state::get-entry"
    failure = Failure("GET_ERROR", "Failed to get value")

    def decide(self, view: View) -> Effects[int | None]:
        entry = view.entry(self.key)
        left = None if entry is None or entry.expires_ms is None else entry.expires_ms - view.now_ms
        return (), left

    def call(self, scope: str) -> dict[str, Any]:
        # The other engine subtracts: its clock may differ from the one here.
        return {**super().call(scope), "_left": True}

    def effects_of(self, result: bytes | None) -> Effects[int | None]:
        return (), msgspec.json.decode(result or b"null", type=_Left).ms


class Touch(OneKey[bool], frozen=True):
    """Give a key another deadline, or none. The answer says whether it exists.

    The value and the revision stay: a caller that compares revisions wants to know whether the value has changed. Fires
    no event.
    """

    function_id = "state::touch"
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    deadline: Deadline = NO_DEADLINE
    """With no field set: no deadline, even if the scope has a rule."""

    def decide(self, view: View) -> Effects[bool]:
        entry = view.entry(self.key)
        if entry is None:
            return (), False
        return (NewDeadline(self.key, touched(view, self.deadline)),), True

    def call(self, scope: str) -> dict[str, Any]:
        asked = self.deadline
        return {**super().call(scope), "ttl_ms": asked.ttl_ms, "expires_at": asked.expires_ms}

    def effects_of(self, result: bytes | None) -> Effects[bool]:
        return (), msgspec.json.decode(result or b"{}", type=TouchResult).touched

    def unpack(self, kept: bytes) -> bool:
        return msgspec.msgpack.decode(kept, type=bool)


def touched(view: View, asked: Deadline) -> int | None:
    """Return the deadline that a `touch` gives."""
    return asked.expires_ms if asked.ttl_ms is None else min(view.now_ms + asked.ttl_ms, LAST_MS)


class Expired(NamedTuple):
    """The result of an `Expire`."""

    keys: int
    """The number of keys that were removed."""
    late_ms: int = 0
    """Milliseconds since the earliest deadline among them."""


class Expire(Turn[Expired], frozen=True):
    """Remove keys whose deadline has passed, earliest first, at most `limit`. An engine sends it to its own scopes."""

    function_id = "state::delete"
    writes = True
    failure = Failure("DELETE_ERROR", "Failed to delete value")

    limit: int = EXPIRED_AT_ONCE

    @property
    def keys(self) -> None:
        return None

    def decide(self, view: View) -> Effects[Expired]:
        lapsed = [(key, entry) for key in view.due(self.limit) if (entry := view.lapsed(key)) is not None]
        if not lapsed:
            return (), Expired(0)
        oldest_ms = lapsed[0][1].expires_ms or 0
        changes = tuple([expiry_of(key, entry) for key, entry in lapsed])
        return changes, Expired(len(changes), view.now_ms - oldest_ms)


# ----------------------------------------------------------------------------------------------- idempotency keys


LONGEST_IDEMPOTENCY_KEY: Final = 255
"""In characters."""


class Once(Turn[A], frozen=True):
    """A write that is done once for each idempotency key: a repetition gets the first answer, and changes nothing.

    A refusal is not kept, because nothing was done.
    """

    turn: Turn[A]
    idempotency_key: str
    """1 to 255 characters."""
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    @property
    def function_id(self) -> str:  # type: ignore[override]  # that of `turn`, so not the same for the class
        return self.turn.function_id

    def __post_init__(self) -> None:
        """Raises DeserializationError for a key that a store could not hold."""
        key = checked_name("call's idempotency key", self.idempotency_key)
        if not 0 < len(key) <= LONGEST_IDEMPOTENCY_KEY:
            raise DeserializationError(
                f"an idempotency key has 1 to {LONGEST_IDEMPOTENCY_KEY} characters, not {len(key)}"
            )

    @property
    def keys(self) -> tuple[str, ...] | None:
        return self.turn.keys

    def decide(self, view: View) -> Effects[A]:
        kept = view.kept(self.idempotency_key)
        fingerprint = fingerprint_of(self.turn)
        if kept is not None:
            if kept.fingerprint != fingerprint:
                raise IdempotencyMismatch(view.scope, self.idempotency_key)
            return (), self.turn.unpack(kept.answer)
        changes, answer = self.turn.decide(view)
        answer = _told(answer)
        keep = Keep(self.idempotency_key, Kept(fingerprint, self.turn.pack(answer)))
        return (*changes, keep), answer

    def size(self) -> int:
        return self.turn.size()

    def failed(self, error: Exception) -> StorageError:
        return self.turn.failed(error)

    # As for the turn itself, with the key: the other engine keeps the answer.

    def call(self, scope: str) -> dict[str, Any]:
        return {**self.turn.call(scope), "idempotency_key": self.idempotency_key}

    def effects_of(self, result: bytes | None) -> Effects[A]:
        stored, answer = self.turn.effects_of(result)
        return stored, _told(answer)


class Durable(Turn[A], frozen=True):
    """A write that is answered when it is on disk, in a scope that answers other writes earlier."""

    turn: Turn[A]
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    @property
    def function_id(self) -> str:  # type: ignore[override]  # as above
        return self.turn.function_id

    @property
    def keys(self) -> tuple[str, ...] | None:
        return self.turn.keys

    def decide(self, view: View) -> Effects[A]:
        return self.turn.decide(view)

    def call(self, scope: str) -> dict[str, Any]:
        return {**self.turn.call(scope), "durable": True}

    def effects_of(self, result: bytes | None) -> Effects[A]:
        return self.turn.effects_of(result)

    def size(self) -> int:
        return self.turn.size()

    def failed(self, error: Exception) -> StorageError:
        return self.turn.failed(error)


def unwrapped(turn: Turn[A]) -> Turn[A]:
    """Return the operation itself, without its idempotency key and without `Durable`."""
    while isinstance(turn, _AROUND):
        turn = turn.turn
    return turn


_AROUND: Final = (Once, Durable)
"""A constant, so that the tuple is not built for each turn."""


def _told(answer: A) -> A:
    """Return the answer to a write with an idempotency key, marked so that its JSON has the revision."""
    if not isinstance(answer, WriteResult):
        return answer
    return cast("A", msgspec.structs.replace(answer, detailed=True))


def fingerprint_of(turn: Turn[Any]) -> bytes:
    """Return a digest of everything that a turn asks for. Results of its function, if it has one, are not included."""
    import hashlib  # noqa: PLC0415 - it loads OpenSSL

    content = msgspec.msgpack.encode((turn.kind, turn.content()))
    return hashlib.blake2b(content, digest_size=16).digest()
