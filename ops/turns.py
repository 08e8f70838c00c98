"""The operations on a scope: one struct for each, which decides what the operation does.

Pure: no threads, no clock, no I/O. A turn says which keys it touches, whether it writes, and how its failure is worded.
Given a view of the scope, it decides the changes and the answer. How changes are stored is up to the backend, so a new
operation needs no code in any backend (docs/design/0032-layers-and-ports.md).

Two rules hold for every write. A key whose deadline has passed does not exist, and is removed by a change of its own
before the key is written again. Each change takes the next revision of its scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from scopestate.errors import DeserializationError, StorageError, UpdateRefused, ValueTooLarge
from scopestate.ops.apply import MISSING, apply
from scopestate.ops.results import EntryView, SetResult, UpdateResult
from scopestate.ops.update_ops import OpError, RefusedOp, UpdateOp
from scopestate.ops.values import class_name, decode, encode_plain, json_type, parse

A = TypeVar("A")

LAST_REVISION: Final = 2**53 - 1
"""JavaScript workers read revisions as doubles."""
LAST_MS: Final = 2**53 - 1
"""The latest deadline, in milliseconds since the epoch."""
_LAST_CHARACTER: Final = chr(0x10FFFF)


class Failure(NamedTuple):
    """How an operation reports that its store failed (docs/reference/protocol.md, section 4.4)."""

    code: str
    words: str


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What is stored under a key."""

    json: bytes
    """The value as JSON."""
    revision: int
    """The number of the change that stored it, within its scope."""
    expires_ms: int | None = None
    """When it expires, in milliseconds since the epoch; None: never."""

    @property
    def value(self) -> Any:
        """The value, a fresh copy at each reading."""
        return decode(self.json)


class TtlRule(msgspec.Struct, frozen=True):
    """The deadline that a scope gives to keys that are written without one."""

    ttl_ms: int
    from_creation: bool = False
    """True: the time counts from the creation of the key. False: it counts from the last write."""


class Kept(msgspec.Struct, frozen=True):
    """The answer to a write with an idempotency key, kept for its repetitions."""

    fingerprint: bytes
    """A digest of what the write asked for."""
    answer: bytes
    """The answer, as `Turn.pack` encoded it."""


class Range(msgspec.Struct, frozen=True):
    """Some of the keys of a scope, in the order of their UTF-8 bytes. Bounds mean the same with `reverse`.

    Python compares text by code points, which is the order of the UTF-8 bytes.
    """

    prefix: str | None = None
    start: str | None = None
    """The first key; included."""
    after: str | None = None
    """Only keys after this one; not included."""
    end: str | None = None
    """Only keys before this one; not included."""
    reverse: bool = False
    """True: the largest key first."""
    limit: int | None = None
    """At most this many keys; None: all of them."""

    def low(self) -> tuple[str, bool]:
        """Return the lower bound, and whether a key that is equal to it is within the range."""
        low = max(self.start or "", self.prefix or "")
        return (self.after, False) if self.after is not None and self.after >= low else (low, True)

    def high(self) -> str | None:
        """Return the upper bound, which is not within the range; None: there is no bound."""
        behind = end_of_prefix(self.prefix or "")
        if behind is None or self.end is None:
            return self.end if behind is None else behind
        return min(self.end, behind)

    def holds(self, key: str) -> bool:
        """Return whether a key is within the bounds."""
        low, included = self.low()
        high = self.high()
        return (key >= low if included else key > low) and (high is None or key < high)

    def checked(self) -> Range:
        """Return the range itself. Raises DeserializationError if `limit` is not a number of keys."""
        if self.limit is not None and not 0 <= self.limit <= LAST_REVISION:
            bound = "0 or more" if self.limit < 0 else f"{LAST_REVISION} or less"
            raise DeserializationError(f"a limit is {bound}, not {self.limit}")
        return self


def end_of_prefix(prefix: str) -> str | None:
    """Return the smallest text that is larger than every text with this prefix; None if there is no such text."""
    kept = prefix.rstrip(_LAST_CHARACTER)
    if not kept:
        return None
    after = ord(kept[-1]) + 1
    # Half of a surrogate pair is not a character, so a store could not compare keys with it.
    return kept[:-1] + chr(0xE000 if after == 0xD800 else after)


class Bounds(Protocol):
    """The limits that turns respect."""

    max_value_bytes: int
    """Largest value in bytes of JSON; 0: no limit."""


class View(Protocol):
    """What a turn sees of its scope, as it is before the turn.

    A key whose deadline has passed does not exist, whether or not it was removed yet. Only `lapsed` and `due` show such
    keys.
    """

    @property
    def scope(self) -> str:
        """The name of the scope."""

    @property
    def store_id(self) -> str:
        """The id of the place where the scope is kept. Cursors of pages contain it."""

    @property
    def limits(self) -> Bounds:
        """The current limits of the engine."""

    @property
    def revision(self) -> int:
        """The number of the last change of the scope. The changes of a turn take the next ones, in their order."""

    @property
    def now_ms(self) -> int:
        """Milliseconds since the epoch, the same for the whole turn. The number never goes back."""

    @property
    def strict(self) -> bool:
        """True: an update with an op that is refused writes nothing."""

    @property
    def plain(self) -> bool:
        """True if a plain write depends on nothing but the values: neither `expiring` nor `strict` is true."""

    @property
    def expiring(self) -> bool:
        """False if no key has a deadline and there is no `ttl_rule`."""

    @property
    def ttl_rule(self) -> TtlRule | None:
        """The deadline of keys that are written without one."""

    def get(self, key: str) -> bytes | None:
        """Return the JSON of a key, or None if it does not exist."""

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key, or None if it does not exist."""

    def lapsed(self, key: str) -> Entry | None:
        """Return the entry of a key whose deadline has passed but which was not removed yet; None for other keys."""

    def values(self) -> list[bytes]:
        """Return the JSON of all keys, in the order of the backend."""

    def items(self) -> list[tuple[str, bytes]]:
        """Return all keys with their JSON, in the order of the backend."""

    def keys(self, within: Range) -> Iterable[str]:
        """Yield the keys within a range, in its order, at most `limit`."""

    def count(self, within: Range) -> int:
        """Return how many keys `keys` would yield."""

    def due(self, limit: int) -> Sequence[str]:
        """Return the keys for which `lapsed` has an entry, by deadline, then by key; at most `limit`."""

    def kept(self, idempotency_key: str) -> Kept | None:
        """Return the answer that is kept under an idempotency key."""


class PlainView:
    """The view of a backend that keeps no revisions and no deadlines yet."""

    store_id = ""
    revision = 0
    now_ms = 0
    strict = False
    plain = True
    expiring = False
    ttl_rule: TtlRule | None = None

    def entry(self, key: str) -> Entry | None:
        """Not kept."""
        raise NotImplementedError

    def lapsed(self, key: str) -> Entry | None:
        """Nothing expires."""
        return None

    def keys(self, within: Range) -> Iterable[str]:
        """Not kept in order."""
        raise NotImplementedError

    def count(self, within: Range) -> int:
        """Count them."""
        return sum(1 for _ in self.keys(within))

    def due(self, limit: int) -> Sequence[str]:
        """Nothing expires."""
        return ()

    def kept(self, idempotency_key: str) -> Kept | None:
        """Nothing is kept."""
        return None


class Change(msgspec.Struct, frozen=True, gc=False):
    """One key that a turn writes. `before` and `after` are None if the key does not exist then.

    Each change takes a number and fires an event, even a change from None to None, which reports the delete of a
    missing key. A turn that writes nothing returns no change.
    """

    key: str
    before: bytes | None
    after: bytes | None
    expires_ms: int | None = None
    """When `after` expires. If `expired`: the deadline that has passed."""
    expired: bool = False
    """True if the key is removed because its deadline has passed."""


class NewDeadline(msgspec.Struct, frozen=True, gc=False):
    """A key that gets another deadline, or none, and no other change: it takes no revision and fires no event."""

    key: str
    expires_ms: int | None


class Keep(msgspec.Struct, frozen=True, gc=False):
    """An answer to keep for its idempotency key."""

    idempotency_key: str
    kept: Kept


Stored = Change | NewDeadline | Keep

Effects = tuple[tuple[Stored, ...], A]
"""What a turn has decided: the things to store, in one step or not at all, changes first; and its answer."""


class Turn(msgspec.Struct, Generic[A], frozen=True, gc=False):
    """One operation on one scope, with `A` as its answer."""

    function_id: ClassVar[str]
    """The id under which the operation is called over the wire."""
    writes: ClassVar[bool] = False
    looks_at: ClassVar[Literal["keys", "values", "entries"]] = "entries"
    """What a copy of the scope must contain for this turn."""
    failure: ClassVar[Failure]

    @property
    def keys(self) -> tuple[str, ...] | None:
        """The keys that the turn touches; None for the whole scope."""
        raise NotImplementedError

    def decide(self, view: View) -> Effects[A]:
        """Return the changes and the answer of the turn. If it raises ScopestateError, nothing is changed."""
        raise NotImplementedError

    def call(self, scope: str) -> dict[str, Any]:
        """Return the input of `function_id` that makes another engine do this turn.

        Fields that begin with `_` ask scopestate for more in the result; other engines ignore them.
        """
        raise NotImplementedError

    def effects_of(self, result: bytes | None) -> Effects[A]:
        """Return the changes and the answer of another engine. `result`: the result of that call; None: no value.

        Raises DecodeError or DeserializationError for a result of another shape.
        """
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What a repetition must have in common with the first call, besides `content`.

        All turns that can do the same call have the same kind.
        """
        return type(self).__name__

    def content(self) -> Any:
        """Return what the turn asks for, as data that msgpack can encode. A repetition must have the same content."""
        return self

    def pack(self, answer: A) -> bytes:
        """Return the answer as bytes, to keep for a repetition of this turn."""
        return msgspec.msgpack.encode(answer)

    def unpack(self, kept: bytes) -> A:
        """Return the answer that `pack` turned into `kept`, marked as the answer to a repetition."""
        raise NotImplementedError

    def size(self) -> int:
        """Return the approximate size of the turn's values, in bytes."""
        return 0

    def failed(self, error: Exception) -> StorageError:
        """Return the error that reports the failure of this operation because of `error`, with its code and wording."""
        return StorageError(f"{self.failure.words}: {error}", code=self.failure.code)


class OneKey(Turn[A], frozen=True, gc=False):
    """A turn that touches one key."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key}


class Set(OneKey[SetResult], frozen=True, gc=False):
    """Set a key to a value."""

    function_id = "state::set"
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    data: bytes
    """The value as JSON."""

    def decide(self, view: View) -> Effects[SetResult]:
        if not view.plain:
            return set_key(view, self.key, view.entry(self.key), self.data, NO_DEADLINE)
        before = view.get(self.key)
        return (Change(self.key, before, self.data),), SetResult(before, self.data, revision=view.revision + 1)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key, "value": msgspec.Raw(self.data), "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[SetResult]:
        written = _decode_written(result or b"null")
        before = written.before()
        return (Change(self.key, before, self.data),), SetResult(before, self.data, revision=written.revision)

    def size(self) -> int:
        return len(self.data)


class Update(OneKey[UpdateResult], frozen=True, gc=False):
    """Apply checked ops to the value of a key."""

    function_id = "state::update"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to update value")

    ops: tuple[UpdateOp, ...]

    def decide(self, view: View) -> Effects[UpdateResult]:
        if not view.plain:
            return update_key(view, self.key, view.entry(self.key), self.ops, NO_DEADLINE, atomic=view.strict)
        before = view.get(self.key)
        # As `updated` does: the call would cost an increment 4 %.
        value, errors = apply(MISSING if before is None else decode(before), self.ops)
        data = encode_plain(value)
        limit = view.limits.max_value_bytes
        if limit:
            refuse_size(view.scope, self.key, data, limit)
        refused_ops = tuple(errors) if errors else ()
        return (Change(self.key, before, data),), UpdateResult(before, data, refused_ops, revision=view.revision + 1)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key, "ops": self.ops, "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[UpdateResult]:
        written = _decode_written(result or b"null")
        before, after = written.before(), parse(bytes(written.new_value))
        answer = UpdateResult(before, after, written.errors, revision=written.revision)
        return (Change(self.key, before, after),), answer

    def size(self) -> int:
        return sum(_size_of(getattr(op, "value", None)) for op in self.ops)


class Delete(OneKey["bytes | None"], frozen=True, gc=False):
    """Remove a key. The answer is its value as JSON, or None if it did not exist."""

    function_id = "state::delete"
    writes = True
    failure = Failure("DELETE_ERROR", "Failed to delete value")

    def decide(self, view: View) -> Effects[bytes | None]:
        if not view.plain:
            before = view.entry(self.key)
            return changes_of(view, self.key, before, None), None if before is None else before.json
        old = view.get(self.key)
        return (Change(self.key, old, None),), old

    def effects_of(self, result: bytes | None) -> Effects[bytes | None]:
        before = None if result is None else parse(result)
        return (Change(self.key, before, None),), before


class Get(OneKey["bytes | None"], frozen=True, gc=False):
    """Read a key. The answer is its value as JSON, or None if it does not exist."""

    function_id = "state::get"
    failure = Failure("GET_ERROR", "Failed to get value")

    def decide(self, view: View) -> Effects[bytes | None]:
        return (), view.get(self.key)

    def effects_of(self, result: bytes | None) -> Effects[bytes | None]:
        return (), None if result is None else parse(result)


class _WholeScope(Turn[A], frozen=True, gc=False):
    function_id = "state::list"
    looks_at = "values"
    failure = Failure("LIST_ERROR", "Failed to list values")

    @property
    def keys(self) -> None:
        return None

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope}


class List(_WholeScope[list[bytes]], frozen=True, gc=False):
    """Read all values as JSON."""

    def decide(self, view: View) -> Effects[list[bytes]]:
        return (), view.values()

    def effects_of(self, result: bytes | None) -> Effects[list[bytes]]:
        return (), [parse(bytes(value)) for value in _decode_values(result or b"[]")]


class Items(_WholeScope[list[tuple[str, bytes]]], frozen=True, gc=False):
    """Read all keys with their values as JSON."""

    def decide(self, view: View) -> Effects[list[tuple[str, bytes]]]:
        return (), view.items()

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "_keys": True}

    def effects_of(self, result: bytes | None) -> Effects[list[tuple[str, bytes]]]:
        try:
            listed = _decode_items(result or b"null")
        except msgspec.DecodeError as error:
            raise DeserializationError("that engine does not name the keys of a scope; it is not scopestate") from error
        if len(listed.keys) != len(listed.values):
            raise DeserializationError(f"{len(listed.keys)} keys with {len(listed.values)} values")
        return (), [(key, parse(bytes(value))) for key, value in zip(listed.keys, listed.values, strict=True)]


class _Written(msgspec.Struct):
    """Result of `state::set` and `state::update`."""

    new_value: msgspec.Raw
    old_value: msgspec.Raw = msgspec.Raw(b"null")
    errors: tuple[OpError, ...] = ()
    revision: int = 0
    existed: bool | None = None
    """Whether the key existed before. Only scopestate says so; from others, a stored null looks like a missing key."""

    def before(self) -> bytes | None:
        """Return the old value; None if the key did not exist."""
        old = parse(bytes(self.old_value))
        return old if (old != b"null" if self.existed is None else self.existed) else None


class _Listed(msgspec.Struct):
    """Result of `state::list` with `_keys`, which scopestate engines understand."""

    keys: list[str]
    values: list[msgspec.Raw]


_decode_written = msgspec.json.Decoder(_Written).decode
_decode_values = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(_Listed).decode


def _size_of(value: object) -> int:
    return len(value) if isinstance(value, str) else 64 * len(value) if isinstance(value, (dict, list)) else 8


def changes_of(
    view: View, key: str, before: Entry | None, after: bytes | None, expires_ms: int | None = None
) -> tuple[Change, ...]:
    """Return the changes that write a key. If an expired entry is still stored there, its removal comes first."""
    change = Change(key, None if before is None else before.json, after, expires_ms)
    if before is None and view.expiring and (lapsed := view.lapsed(key)) is not None:
        return expiry_of(key, lapsed), change
    return (change,)


def changes_in(stored: Sequence[Stored]) -> tuple[Change, ...]:
    """Return the changes among the things that a turn stores."""
    return tuple([one for one in stored if type(one) is Change])


def expiry_of(key: str, lapsed: Entry) -> Change:
    """Return the change that removes an entry whose deadline has passed."""
    return Change(key, lapsed.json, None, lapsed.expires_ms, True)


class Deadline(msgspec.Struct, frozen=True, gc=False):
    """The deadline that a write asks for. With no field set, the scope's rule applies: see `deadline_of`."""

    ttl_ms: int | None = None
    expires_ms: int | None = None
    keep: bool = False
    """True: the deadline stays as it is."""


KEEP_DEADLINE: Final = Deadline(keep=True)
NO_DEADLINE: Final = Deadline()


def deadline_of(view: View, before: Entry | None, asked: Deadline, *, update: bool = False) -> int | None:
    """Return when a value that is written now expires. If no deadline is asked for, the scope's rule decides.

    Without a rule, an update keeps the deadline of the key, and any other write clears it.
    """
    if asked.ttl_ms is not None:
        return min(view.now_ms + asked.ttl_ms, LAST_MS)
    if asked.expires_ms is not None:
        return asked.expires_ms
    rule = view.ttl_rule
    if before is not None and (asked.keep or (rule.from_creation if rule is not None else update)):
        return before.expires_ms
    return None if rule is None else min(view.now_ms + rule.ttl_ms, LAST_MS)


def set_key(
    view: View, key: str, before: Entry | None, data: bytes, asked: Deadline, *, detailed: bool = False
) -> Effects[SetResult]:
    """Decide a `set` in the general case, with deadlines and with expired entries that are still stored."""
    changes = changes_of(view, key, before, data, deadline_of(view, before, asked))
    old = None if before is None else before.json
    return changes, SetResult(old, data, revision=view.revision + len(changes), detailed=detailed)


def update_key(
    view: View,
    key: str,
    before: Entry | None,
    ops: tuple[UpdateOp, ...],
    asked: Deadline,
    *,
    atomic: bool,
    detailed: bool = False,
) -> Effects[UpdateResult]:
    """Decide an `update` in the general case. Raises UpdateRefused if it is atomic and an op is refused."""
    old = None if before is None else before.json
    data, errors = updated(view, key, old, ops)
    if errors and atomic:
        raise UpdateRefused(view.scope, refused(errors))
    changes = changes_of(view, key, before, data, deadline_of(view, before, asked, update=True))
    return changes, UpdateResult(old, data, errors, revision=view.revision + len(changes), detailed=detailed)


def refused(errors: Iterable[OpError], index: int = 0) -> tuple[RefusedOp, ...]:
    """Return the errors of an update. `index`: the place of the update in its transaction."""
    return tuple([RefusedOp(error.op_index, error.code, error.message, error.doc_url, index) for error in errors])


def updated(view: View, key: str, before: bytes | None, ops: tuple[UpdateOp, ...]) -> tuple[bytes, tuple[OpError, ...]]:
    """Return the JSON after the ops were applied to `before`, and the errors of the ops that were refused."""
    value, errors = apply(MISSING if before is None else decode(before), ops)
    data = encode_plain(value)
    refuse_size(view.scope, key, data, view.limits.max_value_bytes)
    return data, tuple(errors) if errors else ()


def refuse_size(scope: str, key: str, data: bytes, limit: int) -> None:
    """Raise ValueTooLarge if a value takes more than `limit` bytes as JSON. 0: no limit."""
    if limit and len(data) > limit:
        raise ValueTooLarge(scope, key, len(data), limit)


def checked_name(what: str, name: object) -> str:
    """Return `name` as a plain string that every store can hold. `what` is "scope" or "key".

    Raises DeserializationError if it is not a string, or has lone surrogates, which UTF-8 cannot hold.
    """
    if type(name) is str and name.isascii():
        return name
    if not issubclass(type(name), str):  # not isinstance, which believes the `__class__` of a mock
        raise DeserializationError(f"a {what} is a string, not {json_type(name)}")
    # A subclass may override anything, so read the plain text that it holds.
    name = str.__str__(name)
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DeserializationError(
                f"the {what} {name!r:.80} has half of a surrogate pair at index {error.start}, which is not a character"
            ) from error
    return name


def checked_length(what: str, name: str, longest: int) -> str:
    """Return `name` if it is not longer than the store can hold. Raises DeserializationError."""
    if len(name) > longest:
        raise DeserializationError(
            f"the {what} {name[:40]!r}... has {len(name)} characters, and the store holds names of {longest} at most; "
            "nothing was written"
        )
    return name


def no_message(found: object) -> DeserializationError:
    """Return the error for an object that is not a message."""
    return DeserializationError(f"{class_name(found)} is not a message that a scope understands")


def view_of(key: str, found: Entry | None) -> EntryView | None:
    """Return an entry in the form that callers get."""
    return None if found is None else EntryView(key, found.json, found.revision, found.expires_ms)
