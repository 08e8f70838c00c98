"""What a scope can be asked to do: one struct for each operation, and what it decides.

Pure: no threads, no clock, no I/O. A turn says which keys it touches, whether it writes, and how its failure is worded.
Given a view of the scope it decides what changes and what the answer is. How changes are stored is up to the backend,
so a new operation needs no line in any of them (docs/design/0032-layers-and-ports.md).
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from scopestate.errors import DeserializationError, StorageError, ValueTooLarge
from scopestate.ops import messages
from scopestate.ops.apply import MISSING, apply
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.update_ops import OpError, UpdateOp, checked
from scopestate.ops.values import class_name, decode, encode, encode_plain, json_type, parse

A = TypeVar("A")


class Failure(NamedTuple):
    """How an operation reports that its store failed (docs/protocol.md, section 4.4)."""

    code: str
    words: str


class Bounds(Protocol):
    """The limits that turns keep to."""

    max_value_bytes: int
    """Largest value in bytes of JSON; 0: no limit."""


class View(Protocol):
    """What a turn sees of its scope, as it is before the turn."""

    @property
    def scope(self) -> str:
        """The name of the scope."""

    @property
    def limits(self) -> Bounds:
        """The limits that the engine has now."""

    def get(self, key: str) -> bytes | None:
        """Return the JSON of a key, or None if it does not exist."""

    def values(self) -> list[bytes]:
        """Return the JSON of all keys, in the order of the backend."""

    def items(self) -> list[tuple[str, bytes]]:
        """Return all keys with their JSON, in the order of the backend."""


class Change(msgspec.Struct, frozen=True, gc=False):
    """One key that a turn writes. None: the key does not exist before, or after.

    Each change takes a number and fires an event, one from None to None as well, which is how a delete of a missing key
    is told. A turn that writes nothing returns no change.
    """

    key: str
    before: bytes | None
    after: bytes | None


Effects = tuple[tuple[Change, ...], A]
"""What a turn has decided: its changes, and its answer."""


class Turn(msgspec.Struct, Generic[A], frozen=True, gc=False):
    """One operation on one scope, with `A` as its answer."""

    function_id: ClassVar[str]
    """The id under which the operation is called over the wire."""
    writes: ClassVar[bool] = False
    failure: ClassVar[Failure]

    @property
    def keys(self) -> tuple[str, ...] | None:
        """The keys that the turn touches; None for the whole scope."""
        raise NotImplementedError

    def decide(self, view: View) -> Effects[A]:
        """Return what the turn changes and answers. Raises ScopestateError; then it changes nothing."""
        raise NotImplementedError

    def call(self, scope: str) -> dict[str, Any]:
        """Return the input of `function_id` with which another engine does this turn.

        Fields that begin with `_` ask scopestate for more in the result; other engines ignore them.
        """
        raise NotImplementedError

    def effects_of(self, result: bytes | None) -> Effects[A]:
        """Return what another engine has changed and answered: `result` is the result of that call, None for no value.

        Raises DecodeError or DeserializationError for a result of another shape.
        """
        raise NotImplementedError

    def size(self) -> int:
        """Return about how many bytes of values the turn carries."""
        return 0

    def failed(self, error: Exception) -> StorageError:
        """Return the failure of this operation because of `error`, with its code and wording."""
        return StorageError(f"{self.failure.words}: {error}", code=self.failure.code)


class _OneKey(Turn[A], frozen=True, gc=False):
    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key}


class Set(_OneKey[SetResult], frozen=True, gc=False):
    """Set a key to a value."""

    function_id = "state::set"
    writes = True
    failure = Failure("SET_ERROR", "Failed to set value")

    data: bytes
    """The value as JSON."""

    def decide(self, view: View) -> Effects[SetResult]:
        before = view.get(self.key)
        return (Change(self.key, before, self.data),), SetResult(before, self.data)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key, "value": msgspec.Raw(self.data), "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[SetResult]:
        before = _decode_written(result or b"null").before()
        return (Change(self.key, before, self.data),), SetResult(before, self.data)

    def size(self) -> int:
        return len(self.data)


class Update(_OneKey[UpdateResult], frozen=True, gc=False):
    """Apply checked ops to the value of a key."""

    function_id = "state::update"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to update value")

    ops: tuple[UpdateOp, ...]

    def decide(self, view: View) -> Effects[UpdateResult]:
        before = view.get(self.key)
        value, errors = apply(MISSING if before is None else decode(before), self.ops)
        data = encode_plain(value)
        limit = view.limits.max_value_bytes
        if limit:
            refuse_size(view.scope, self.key, data, limit)
        return (Change(self.key, before, data),), UpdateResult(before, data, tuple(errors) if errors else ())

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": self.key, "ops": self.ops, "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[UpdateResult]:
        written = _decode_written(result or b"null")
        before, after = written.before(), parse(bytes(written.new_value))
        return (Change(self.key, before, after),), UpdateResult(before, after, written.errors)

    def size(self) -> int:
        return sum(_size_of(getattr(op, "value", None)) for op in self.ops)


class Delete(_OneKey["bytes | None"], frozen=True, gc=False):
    """Remove a key. The answer is its value as JSON, or None if it did not exist."""

    function_id = "state::delete"
    writes = True
    failure = Failure("DELETE_ERROR", "Failed to delete value")

    def decide(self, view: View) -> Effects[bytes | None]:
        before = view.get(self.key)
        return (Change(self.key, before, None),), before

    def effects_of(self, result: bytes | None) -> Effects[bytes | None]:
        before = None if result is None else parse(result)
        return (Change(self.key, before, None),), before


class Get(_OneKey["bytes | None"], frozen=True, gc=False):
    """Read a key. The answer is its value as JSON, or None if it does not exist."""

    function_id = "state::get"
    failure = Failure("GET_ERROR", "Failed to get value")

    def decide(self, view: View) -> Effects[bytes | None]:
        return (), view.get(self.key)

    def effects_of(self, result: bytes | None) -> Effects[bytes | None]:
        return (), None if result is None else parse(result)


class _WholeScope(Turn[A], frozen=True, gc=False):
    function_id = "state::list"
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
            raise DeserializationError("that engine does not name the keys of a scope; it is no scopestate") from error
        if len(listed.keys) != len(listed.values):
            raise DeserializationError(f"{len(listed.keys)} keys with {len(listed.values)} values")
        return (), [(key, parse(bytes(value))) for key, value in zip(listed.keys, listed.values, strict=True)]


class _Written(msgspec.Struct):
    """Result of `state::set` and `state::update`."""

    new_value: msgspec.Raw
    old_value: msgspec.Raw = msgspec.Raw(b"null")
    errors: tuple[OpError, ...] = ()
    existed: bool | None = None
    """Whether the key existed before. Only a scopestate engine says so; else a stored null looks like a missing key."""

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
    # A subclass may override anything; what is asked here is what it holds.
    name = str.__str__(name)
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DeserializationError(
                f"the {what} {name!r:.80} has half of a surrogate pair at index {error.start}, which is no character"
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


def turn_of(message: object, max_value_bytes: int) -> Turn[Any]:
    """Return what a scope does for a public message. Encodes the value: call it before the scope is claimed.

    Raises InvalidValue, ValueTooLarge, and DeserializationError for what is no message of a scope.
    """
    match message:
        case messages.Set(scope=scope, key=key, value=value):
            data = encode(value)
            refuse_size(scope, key, data, max_value_bytes)
            return Set(checked_name("key", key), data)
        case messages.Update(key=key, ops=ops):
            return Update(checked_name("key", key), checked(ops))
        case messages.Delete(key=key):
            return Delete(checked_name("key", key))
        case messages.Get(key=key):
            return Get(checked_name("key", key))
        case messages.List():
            return List()
    raise no_message(message)


def no_message(found: object) -> DeserializationError:
    """Return the error for what is no message."""
    return DeserializationError(f"{class_name(found)} is not a message that a scope understands")


def answer_of(message: object, answer: Any) -> Any:
    """Return the answer to a public message: results stay as they are, JSON bytes become values."""
    match message:
        case messages.Set() | messages.Update():
            return answer
        case messages.List():
            return [decode(data) for data in answer]
        case _:
            return None if answer is None else decode(answer)
