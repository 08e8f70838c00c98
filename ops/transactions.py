"""Several keys of one scope in one turn: all or nothing.

There are two forms. A `Batch` is data: checks and steps, which can be sent anywhere. A `Transact` calls a function of
the program with a `Transaction`, which reads its own writes. If the scope is kept elsewhere, `Draft.as_batch` makes a
batch from what the function did. Both write each key once, whatever the number of steps on it: one event, one revision.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Generic, Unpack, assert_never

import msgspec
from msgspec import UNSET, UnsetType

from scopestate.errors import BatchTooLarge, Conflict, DeserializationError, KeyConflict, UpdateRefused
from scopestate.ops.callbacks import Runner, plain_answer, run_plainly
from scopestate.ops.options import RangeOptions, range_of
from scopestate.ops.results import (
    BatchResult,
    DeleteResult,
    EntryView,
    SetResult,
    SetResults,
    StepResult,
    T,
    TouchResult,
    UpdateResult,
    WriteResult,
)
from scopestate.ops.turns import (
    NO_DEADLINE,
    A,
    Change,
    Deadline,
    Effects,
    Entry,
    Failure,
    NewDeadline,
    Range,
    Stored,
    Turn,
    View,
    checked_name,
    deadline_of,
    expiry_of,
    refuse_size,
    refused,
    updated,
    view_of,
)
from scopestate.ops.update_ops import AnyOp, OpError, RefusedOp, UpdateOp, checked
from scopestate.ops.values import decode, encode, parse, prepare
from scopestate.ops.writes import asked_deadline, compared, same_json, touch_deadline, touched

MAX_KEYS: Final = 1_000
"""The most keys that one transaction changes; in a batch, those that it only checks count too."""
MAX_BYTES: Final = 8 * 2**20
"""The most bytes of JSON that one transaction writes, if the engine sets no other limit."""


class Check(msgspec.Struct, frozen=True):
    """What a transaction expects of a key."""

    key: str
    revision: int | None = None
    """0: the key does not exist; None: any revision."""
    value: bytes | UnsetType | None = UNSET
    """The expected value as JSON, compared as by compare-and-set; UNSET: any value."""


class SetStep(msgspec.Struct, frozen=True, tag_field="type", tag="set"):
    """Set a key to a value."""

    key: str
    data: bytes
    deadline: Deadline = NO_DEADLINE


class UpdateStep(msgspec.Struct, frozen=True, tag_field="type", tag="update"):
    """Apply checked ops to the value of a key. If an op is refused, the whole transaction is refused."""

    key: str
    ops: tuple[UpdateOp, ...]
    deadline: Deadline = NO_DEADLINE


class DeleteStep(msgspec.Struct, frozen=True, tag_field="type", tag="delete"):
    """Remove a key, if it exists."""

    key: str


class TouchStep(msgspec.Struct, frozen=True, tag_field="type", tag="touch"):
    """Give a key another deadline, or none, if it exists."""

    key: str
    deadline: Deadline = NO_DEADLINE


Step = SetStep | UpdateStep | DeleteStep | TouchStep


class Draft:
    """What a transaction has read and written so far; its view of the scope stays as it was."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.found: dict[str, Entry | None] = {}
        """Key that was read -> what the scope has under it."""
        self.looked_around = False
        """True if keys were listed. The result then depends on every key of the scope."""
        self._found_before = 0
        """How many keys were read before the first listing."""
        self._now: dict[str, Entry | None] = {}
        """Key that was changed -> what the transaction has under it. Revision 0: not known before the commit."""
        self._written: dict[str, None] = {}
        self._cleared: set[str] = set()
        """Keys that a `touch` has left without a deadline, even if the scope has a rule for deadlines."""
        self._expiring = view.expiring

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key, with the changes of the transaction."""
        if key in self._now:
            entry = self._now[key]
            if entry is None or entry.expires_ms is None or entry.expires_ms > self.view.now_ms:
                return entry
            return None  # it was given a deadline that had passed already
        if key in self.found:
            return self.found[key]
        entry = self.found[key] = self.view.entry(key)
        return entry

    def set(self, key: str, data: bytes, asked: Deadline = NO_DEADLINE) -> bytes | None:
        """Set a key, and return the JSON of its value before."""
        before = self.entry(key)
        plain = asked is NO_DEADLINE and not self._expiring
        self._now[key] = Entry(data, 0, None if plain else deadline_of(self.view, before, asked))
        self._written[key] = None
        self._cleared.discard(key)
        return None if before is None else before.json

    def update(
        self, key: str, ops: tuple[UpdateOp, ...], asked: Deadline = NO_DEADLINE
    ) -> tuple[bytes | None, bytes, tuple[OpError, ...]]:
        """Return the JSON before and after the ops, and the errors. If there are errors, the key stays as it was."""
        before = self.entry(key)
        old = None if before is None else before.json
        data, errors = updated(self.view, key, old, ops)
        if not errors:
            self._now[key] = Entry(data, 0, deadline_of(self.view, before, asked, update=True))
            self._written[key] = None
            self._cleared.discard(key)
        return old, data, errors

    def delete(self, key: str) -> bytes | None:
        """Remove a key, and return the JSON of its value before."""
        before = self.entry(key)
        if before is None:
            return None
        self._now[key] = None
        self._written[key] = None
        return before.json

    def touch(self, key: str, asked: Deadline) -> bool:
        """Give a key another deadline; return whether it exists."""
        before = self.entry(key)
        if before is None:
            return False
        expires_ms = touched(self.view, asked)
        self._now[key] = Entry(before.json, before.revision, expires_ms)
        if expires_ms is None:
            self._cleared.add(key)
        else:
            self._cleared.discard(key)
        return True

    def keys(self, within: Range) -> Iterator[str]:
        """Yield the keys within a range, including those that the transaction created, without those it deleted."""
        if not self.looked_around:
            self.looked_around = True
            self._found_before = len(self.found)
        changed = {key: self.entry(key) for key in self._written if within.holds(key)}
        if not changed:
            return iter(self.view.keys(within))
        there = self.view.keys(msgspec.structs.replace(within, limit=None))
        created = sorted((key for key, entry in changed.items() if entry is not None), reverse=within.reverse)
        unchanged = (key for key in there if key not in changed)
        return itertools.islice(heapq.merge(unchanged, created, reverse=within.reverse), within.limit)

    def effects(self, answer: A, max_bytes: int) -> Effects[A]:
        """Return what the transaction changes. A key that was created and deleted again is not a change."""
        self.refuse_size(max_bytes)
        return (*self.changes(), *[NewDeadline(key, entry.expires_ms) for key, entry in self._touched()]), answer

    def changes(self) -> list[Change]:
        """Return the changes: first the expired keys, so that the numbers of the transaction's own are consecutive.

        A key that was created and deleted again stays as it is, also one that has expired: its own turn removes it.
        """
        view, now, found = self.view, self._now, self.found
        expiring = view.expiring  # only now: in Redis, deadlines are known once their keys were read
        expired, changes = [], []
        for key in self._written:
            before, after = found[key], now[key]
            if after is None:
                if before is not None:
                    changes.append(Change(key, before.json, None))
            elif before is None:
                if expiring and (lapsed := view.lapsed(key)) is not None:
                    expired.append(expiry_of(key, lapsed))
                changes.append(Change(key, None, after.json, after.expires_ms))
            else:
                changes.append(Change(key, before.json, after.json, after.expires_ms))
        return expired + changes

    def refuse_size(self, max_bytes: int) -> None:
        """Raise BatchTooLarge if the transaction has too many keys, or writes too many bytes."""
        if len(self._now) > MAX_KEYS:
            raise BatchTooLarge(self.view.scope, len(self._now), MAX_KEYS, "keys")
        size = sum([len(entry.json) for entry in self._now.values() if entry is not None])
        if size > max_bytes:
            raise BatchTooLarge(self.view.scope, size, max_bytes, "bytes")

    def as_batch(self, max_bytes: int) -> Batch:
        """Return the batch that makes the same changes if nothing that the transaction has read was changed since."""
        steps: list[Step] = []
        for key in self._written:
            entry = self._now[key]
            if entry is None:
                if self.found[key] is not None:
                    steps.append(DeleteStep(key))
            else:
                deadline = NO_DEADLINE if entry.expires_ms is None else Deadline(expires_ms=entry.expires_ms)
                steps.append(SetStep(key, entry.json, deadline))
                if key in self._cleared:
                    steps.append(TouchStep(key))
        steps += [TouchStep(key, Deadline(expires_ms=entry.expires_ms)) for key, entry in self._touched()]
        found = list(self.found.items())
        if_revision = None
        if self.looked_around:
            # The check of the scope's revision covers everything that was read after the first listing.
            if_revision, found = self.view.revision, found[: self._found_before]
        checks = [Check(key, 0 if entry is None else entry.revision) for key, entry in found]
        return Batch(tuple(steps), tuple(checks), if_revision, max_bytes)

    def _touched(self) -> list[tuple[str, Entry]]:
        """Return the keys that got another deadline and were not changed otherwise."""
        if len(self._now) == len(self._written):
            return []
        return [(key, entry) for key, entry in self._now.items() if entry is not None and key not in self._written]


class Batch(Turn[BatchResult], frozen=True):
    """Checks, then steps in order, each of which sees the effects of those before it. All is done, or nothing."""

    function_id = "state::transaction"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to commit transaction")

    steps: tuple[Step, ...]
    checks: tuple[Check, ...] = ()
    if_revision: int | None = None
    """Only if the last change of the scope has this number."""
    max_bytes: int = MAX_BYTES

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([part.key for part in (*self.checks, *self.steps)]))

    def content(self) -> Any:
        return self.steps, self.checks, self.if_revision

    def size(self) -> int:
        return sum([len(step.data) for step in self.steps if type(step) is SetStep])

    def refuse_size(self, scope: str) -> None:
        """Raise BatchTooLarge for too many keys or bytes: before the scope is claimed, and before anything is sent."""
        if len(self.steps) + len(self.checks) > MAX_KEYS and (count := len(self.keys)) > MAX_KEYS:
            raise BatchTooLarge(scope, count, MAX_KEYS, "keys")
        size = self.size()
        if size > self.max_bytes:
            raise BatchTooLarge(scope, size, self.max_bytes, "bytes")

    def decide(self, view: View) -> Effects[BatchResult]:
        draft = Draft(view)
        if self.checks or self.if_revision is not None:
            self._check(view, draft)
        results = tuple(self._run(view, draft))
        stored, results = draft.effects(results, self.max_bytes)
        self._number(results, stored, view.revision)
        count = sum([type(one) is Change for one in stored])
        return stored, BatchResult(results, revision=view.revision + count, detailed=True)

    def _check(self, view: View, draft: Draft) -> None:
        conflicts = []
        for index, check in enumerate(self.checks):
            entry = draft.entry(check.key)
            revision = 0 if entry is None else entry.revision
            if (check.revision is not None and check.revision != revision) or not (
                check.value is UNSET or same_json(*compared(check.value, entry))
            ):
                conflicts.append(KeyConflict(index, check.key, check.revision, revision))
        if self.if_revision is not None and self.if_revision != view.revision:
            conflicts.append(KeyConflict(len(self.checks), "", self.if_revision, view.revision))
        if conflicts:
            raise Conflict(view.scope, conflicts)

    def _run(self, view: View, draft: Draft) -> list[StepResult]:
        results: list[StepResult] = []
        errors: list[RefusedOp] = []
        limit = view.limits.max_value_bytes
        for index, step in enumerate(self.steps):
            match step:
                case SetStep(key, data, deadline):
                    if limit:
                        refuse_size(view.scope, key, data, limit)
                    results.append(SetResult(draft.set(key, data, deadline), data))
                case UpdateStep(key, ops, deadline):
                    old, data, problems = draft.update(key, ops, deadline)
                    if problems:
                        errors += refused(problems, index)
                    results.append(UpdateResult(old, data))
                case DeleteStep(key):
                    results.append(DeleteResult(draft.delete(key)))
                case TouchStep(key, deadline):
                    results.append(TouchResult(draft.touch(key, deadline)))
                case _:
                    assert_never(step)
        if errors:
            raise UpdateRefused(view.scope, errors)
        return results

    def _number(self, results: Sequence[StepResult], stored: Sequence[Stored], revision: int) -> None:
        """Put into each result the revision that its key gets. `revision`: that of the scope before the changes."""
        changes = [one for one in stored if type(one) is Change]
        given = {one.key: number for number, one in enumerate(changes, revision + 1) if not one.expired}
        for step, result in zip(self.steps, results, strict=True):
            if isinstance(result, WriteResult):  # just made: which keys have changed is known only now
                msgspec.structs.force_setattr(result, "revision", given.get(step.key, 0))

    def call(self, scope: str) -> dict[str, Any]:
        return {
            "scope": scope,
            "checks": [fields for check in self.checks for fields in _fields_of_check(check)],
            "ops": [_fields_of_step(step) for step in self.steps],
            "if_revision": self.if_revision,
            "_existed": True,
        }

    def effects_of(self, result: bytes | None) -> Effects[BatchResult]:
        told = _decode_committed(result or b"null")
        if not told.committed:
            raise self._refusal(told)
        changed: dict[str, Change] = {}
        results: list[StepResult] = []
        for step, raw in zip(self.steps, told.results, strict=True):
            one = _decode_result(raw)
            if isinstance(step, TouchStep):
                results.append(TouchResult(one.touched))
                continue
            before, after = parse(bytes(one.old_value)), None
            old = None if before == b"null" and not one.existed else before
            if isinstance(step, DeleteStep):
                results.append(DeleteResult(old, revision=one.revision))
                if old is None:
                    continue
            else:
                after = step.data if isinstance(step, SetStep) else parse(bytes(one.new_value))
                kind = SetResult if isinstance(step, SetStep) else UpdateResult
                results.append(kind(old, after, revision=one.revision))
            first = changed.get(step.key)
            changed[step.key] = Change(step.key, old if first is None else first.before, after)
        changes = tuple([one for one in changed.values() if one.before is not None or one.after is not None])
        answer = BatchResult(tuple(results), revision=told.revision, detailed=True, replayed=told.replayed)
        return () if told.replayed else changes, answer

    def _refusal(self, told: _Committed) -> Conflict | UpdateRefused:
        """Return the error of another engine that has not committed. The caller adds the name of the scope."""
        if told.errors:
            return UpdateRefused("", told.errors)
        sent = [*_on_the_wire(self.checks), (len(self.checks), self.if_revision)]
        conflicts = [
            KeyConflict(sent[one.index][0], one.key, sent[one.index][1], one.revision)
            for one in told.conflicts
            if 0 <= one.index < len(sent)
        ]
        if not conflicts:
            raise DeserializationError("it is not committed, and no reason is given")
        return Conflict("", conflicts)

    def pack(self, answer: BatchResult) -> bytes:
        return msgspec.msgpack.encode((answer.revision, tuple(answer.results)))

    def unpack(self, kept: bytes) -> BatchResult:
        revision, packed = msgspec.msgpack.decode(kept, type=tuple[int, list[msgspec.Raw]])
        results = [
            msgspec.msgpack.decode(one, type=_RESULTS[type(step)]) for one, step in zip(packed, self.steps, strict=True)
        ]
        return BatchResult(tuple(results), revision=revision, detailed=True, replayed=True)


DELIVERY: Final = "_delivery"
"""The field by which an engine behind a bridge names the delivery that a transaction acknowledges."""


class DeliveryBatch(Batch, frozen=True):
    """A batch that acknowledges a delivery: its changes and the acknowledgement are saved together."""

    acks: tuple[Any, ...] = ()
    """What the backend needs to acknowledge the delivery. For a store: number of the consumer, position. For another
    engine: consumer, holder, position, serial (`ops/handed.py`)."""
    fence: dict[str, str] = msgspec.field(default_factory=dict)
    """Decides between this turn and the end of the attempt that asked for it: the first sets `won`, to "turn" or "end".

    The turn also sets `changed` if it has changes: only then is the acknowledgement saved together with them.
    """

    @property
    def is_elsewhere(self) -> bool:
        """True if it acknowledges a delivery of another engine."""
        return len(self.acks[0]) > 2

    def call(self, scope: str) -> dict[str, Any]:
        return {**super().call(scope), DELIVERY: self.acks[0]}


class _Result(msgspec.Struct):
    old_value: msgspec.Raw = msgspec.Raw(b"null")
    new_value: msgspec.Raw = msgspec.Raw(b"null")
    touched: bool = False
    revision: int = 0
    existed: bool = False
    """Whether the key existed before. If it did, a null in `old_value` was a stored null."""


class _Committed(msgspec.Struct):
    """Result of `state::transaction`."""

    committed: bool
    revision: int = 0
    replayed: bool = False
    results: list[msgspec.Raw] = []
    conflicts: list[_Conflicted] = []
    errors: list[RefusedOp] = []


class _Conflicted(msgspec.Struct):
    index: int
    key: str
    revision: int


_decode_result: Final = msgspec.json.Decoder(_Result).decode
_decode_committed: Final = msgspec.json.Decoder(_Committed).decode


def _on_the_wire(checks: Sequence[Check]) -> list[tuple[int, int | None]]:
    """Return, for each check on the wire, its index in `checks` and the revision that it expects."""
    sent: list[tuple[int, int | None]] = []
    for index, check in enumerate(checks):
        if check.revision is not None:
            sent.append((index, check.revision))
        if not isinstance(check.value, UnsetType):
            sent.append((index, None))
    return sent


def _fields_of_check(check: Check) -> list[dict[str, Any]]:
    """Return a check as it is sent: one check for the revision, one for the value."""
    fields: list[dict[str, Any]] = []
    if check.revision is not None:
        fields.append({"key": check.key, **({"revision": check.revision} if check.revision else {"absent": True})})
    if not isinstance(check.value, UnsetType):
        fields.append({"key": check.key, "value": msgspec.Raw(check.value or b"null")})
    return fields


def _fields_of_step(step: Step) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": step.__struct_config__.tag, "key": step.key}
    if isinstance(step, SetStep):
        fields["value"] = msgspec.Raw(step.data)
    elif isinstance(step, UpdateStep):
        fields["ops"] = step.ops
    if not isinstance(step, DeleteStep):
        asked = step.deadline
        fields |= {"ttl_ms": asked.ttl_ms, "expires_at": asked.expires_ms, "keep_ttl": asked.keep}
    return fields


class SetAll(Turn[BatchResult], frozen=True):
    """Set several keys, without conditions and deadlines: all of them, or none.

    This is the most frequent batch, and the only one that can be decided and stored without an object for each key. As
    steps, with a draft, it would take three times as long. Tests check that both ways give the same result.
    """

    function_id = "state::transaction"
    writes = True
    failure = Batch.failure

    sets: dict[str, bytes]
    """Key -> value as JSON, in the order of the writes."""
    max_bytes: int = MAX_BYTES

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.sets)

    def content(self) -> Any:
        return self.sets

    def refuse_size(self, scope: str) -> None:
        """Raise BatchTooLarge for too many keys or bytes: before the scope is claimed, and before anything is sent."""
        if len(self.sets) > MAX_KEYS:
            raise BatchTooLarge(scope, len(self.sets), MAX_KEYS, "keys")
        size = sum(map(len, self.sets.values()))
        if size > self.max_bytes:
            raise BatchTooLarge(scope, size, self.max_bytes, "bytes")

    def size(self) -> int:
        return sum(map(len, self.sets.values()))

    def as_batch(self) -> Batch:
        """Return the same batch as steps."""
        steps = tuple([SetStep(key, data) for key, data in self.sets.items()])
        return Batch(steps, max_bytes=self.max_bytes)

    def decide(self, view: View) -> Effects[BatchResult]:
        if view.expiring:
            return self.as_batch().decide(view)
        self.refuse_values(view)
        before = list(map(view.get, self.sets))
        changes = tuple([Change(key, old, data) for (key, data), old in zip(self.sets.items(), before, strict=True)])
        return changes, self.result(before, view.revision + len(changes))

    def refuse_values(self, view: View) -> None:
        """Raise BatchTooLarge for too many keys or bytes, and ValueTooLarge for a value."""
        self.refuse_size(view.scope)
        limit = view.limits.max_value_bytes
        if limit:
            for key, data in self.sets.items():
                refuse_size(view.scope, key, data, limit)

    def result(self, before: list[bytes | None], revision: int) -> BatchResult:
        """Return the result. `before`: the values that the keys had. `revision`: that of the last change."""
        results = SetResults(before, list(self.sets.values()), revision)
        return BatchResult(results, revision=revision, detailed=True)  # type: ignore[arg-type]  # it is registered as one

    def call(self, scope: str) -> dict[str, Any]:
        return self.as_batch().call(scope)

    def effects_of(self, result: bytes | None) -> Effects[BatchResult]:
        return self.as_batch().effects_of(result)

    def pack(self, answer: BatchResult) -> bytes:
        return self.as_batch().pack(answer)

    def unpack(self, kept: bytes) -> BatchResult:
        return self.as_batch().unpack(kept)


_RESULTS: Final[dict[type[Step], type[StepResult]]] = {
    SetStep: SetResult,
    UpdateStep: UpdateResult,
    DeleteStep: DeleteResult,
    TouchStep: TouchResult,
}
prepare(*_RESULTS.values())


class Transaction(Generic[T]):
    """What the function of `transact` reads and writes, as if no other writer existed. It reads its own writes.

    It can also be used like a dict. It can be used only until the function returns.
    """

    def __init__(self, draft: Draft) -> None:
        self._open: Draft | None = draft

    def __repr__(self) -> str:
        return "<transaction, ended>" if self._open is None else f"<transaction of scope {self._open.view.scope!r}>"

    @property
    def _draft(self) -> Draft:
        if self._open is None:
            raise DeserializationError("this transaction has ended: use it within its function only")
        return self._open

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if it does not exist."""
        entry = self._draft.entry(checked_name("key", key))
        return default if entry is None else entry.value

    def entry(self, key: str) -> EntryView[T] | None:
        """Return a key with its value, revision and deadline, or None if it does not exist.

        The revision of a key that this transaction has written is 0: not known yet.
        """
        key = checked_name("key", key)
        return view_of(key, self._draft.entry(key))

    def set(
        self,
        key: str,
        value: T,
        *,
        ttl: float | timedelta | None = None,
        expires_at: datetime | None = None,
        keep_ttl: bool = False,
    ) -> None:
        """Set a key to a value. Raises InvalidValue and ValueTooLarge."""
        draft, key, data = self._draft, checked_name("key", key), encode(value)
        refuse_size(draft.view.scope, key, data, draft.view.limits.max_value_bytes)
        draft.set(key, data, asked_deadline(ttl, expires_at, keep_ttl=keep_ttl))

    def update(self, key: str, ops: Sequence[AnyOp]) -> T:
        """Apply ops to the value of a key, and return the new value. Raises UpdateRefused if one does not fit."""
        draft, key = self._draft, checked_name("key", key)
        _, data, errors = draft.update(key, checked(ops))
        if errors:
            raise UpdateRefused(draft.view.scope, refused(errors))
        value: T = decode(data)
        return value

    def delete(self, key: str) -> T | None:
        """Remove a key, and return the value that it had, or None."""
        old = self._draft.delete(checked_name("key", key))
        return None if old is None else decode(old)

    def touch(
        self,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
    ) -> bool:
        """Give a key another deadline, or none with `ttl=None`; return whether it exists. As `Engine.touch`."""
        return self._draft.touch(checked_name("key", key), touch_deadline(ttl, expires_at))

    def keys(self, **within: Unpack[RangeOptions]) -> list[str]:
        """Return the keys within a range, in the order of their UTF-8 bytes."""
        return list(self._draft.keys(range_of("keys()", **within)))

    def items(self, **within: Unpack[RangeOptions]) -> list[tuple[str, T]]:
        """Return the keys within a range, with their values."""
        return [(key, self[key]) for key in self._draft.keys(range_of("items()", **within))]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.entry(key) is not None

    def __getitem__(self, key: str) -> T:
        entry = self._draft.entry(checked_name("key", key))
        if entry is None:
            raise KeyError(key)
        value: T = entry.value
        return value

    def __setitem__(self, key: str, value: T) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        if self._draft.delete(checked_name("key", key)) is None:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class Transact(Turn[A], frozen=True):
    """Call a function with a transaction. Its result is the answer; an exception aborts the transaction.

    If another write comes in between, the function is called again, so it must have no other effects.
    """

    function_id = "state::transaction"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to commit transaction")

    function: Callable[[Transaction], A]
    max_bytes: int = MAX_BYTES
    runner: Runner = run_plainly

    @property
    def keys(self) -> None:
        return None

    def content(self) -> Any:
        return ()

    def decide(self, view: View) -> Effects[A]:
        draft = Draft(view)
        return draft.effects(self.run(draft), self.max_bytes)

    def run(self, draft: Draft) -> A:
        """Call the function. Raises what it raises, and DeserializationError if its result must be awaited."""
        transaction = Transaction(draft)
        try:
            answer: A = self.runner("transact", draft.view.scope, self.function, transaction)
        finally:
            transaction._open = None  # its own
        return plain_answer("transact", answer)

    def pack(self, answer: A) -> bytes:
        return encode(answer)

    def unpack(self, kept: bytes) -> A:
        return decode(kept)  # type: ignore[no-any-return]  # what the function returned, as JSON has it
