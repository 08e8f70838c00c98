"""What scopes are asked to do: their turns, how they come from public messages, and how answers go back."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from scopestate.actors import messages
from scopestate.actors.reply import Envelope
from scopestate.errors import DeserializationError, StorageError, ValueTooLarge
from scopestate.ops import UpdateOp, checked
from scopestate.ops.values import class_name, decode, encode, json_type


class Put(msgspec.Struct, frozen=True):
    """Set a key to JSON bytes. Answer: SetResult."""

    key: str
    data: bytes


class Change(msgspec.Struct, frozen=True):
    """Apply checked ops to a key. Answer: UpdateResult."""

    key: str
    ops: tuple[UpdateOp, ...]


class Take(msgspec.Struct, frozen=True):
    """Remove a key. Answer: its JSON bytes, or None if it did not exist."""

    key: str


class Read(msgspec.Struct, frozen=True):
    """Answer: the key's JSON bytes, or None if it does not exist."""

    key: str


class ReadAll(msgspec.Struct, frozen=True):
    """Answer: all values as JSON bytes, in insertion order."""


class ReadItems(msgspec.Struct, frozen=True):
    """Answer: all (key, value as JSON bytes), in insertion order."""


class Housekeeping(msgspec.Struct, frozen=True):
    """What the engine itself asks of a scope; needs no values in memory."""


class Collect(Housekeeping, frozen=True):
    """Hand over what changed since the last Collect. Answer: ScopeChange, or None. For the snapshot actor."""


class Ping(Housekeeping, frozen=True):
    """Answer: None, when every message that came before has had its turn."""


class Passivate(Housekeeping, frozen=True):
    """Leave memory, if everything is saved and nobody waits. Answer: whether it did."""


class Close(Housekeeping, frozen=True):
    """Refuse callers from now on; what is dirty can still be collected."""

    handlers_may: bool
    """True: code that runs in handlers is still served, so that events already fired can do their work."""


class Caused(msgspec.Struct, frozen=True):
    """A message sent by code that runs `depth` handlers deep, for when its turn runs on another thread."""

    depth: int
    message: Any


Turn = Put | Change | Take | Read | ReadAll | ReadItems
"""What a scope does for callers."""

FAILURES: Final[dict[type[Any], tuple[str, str]]] = {
    **dict.fromkeys((Put, messages.Set), ("SET_ERROR", "Failed to set value")),
    **dict.fromkeys((Change, messages.Update), ("UPDATE_ERROR", "Failed to update value")),
    **dict.fromkeys((Take, messages.Delete), ("DELETE_ERROR", "Failed to delete value")),
    **dict.fromkeys((Read, messages.Get), ("GET_ERROR", "Failed to get value")),
    **dict.fromkeys((ReadAll, ReadItems, messages.List), ("LIST_ERROR", "Failed to list values")),
}
"""Code and prefix when the store fails under a turn (docs/protocol.md, section 4.4)."""


def checked_name(what: str, name: object) -> str:
    """Return `name` as a plain string that every store can hold. `what` is "scope" or "key".

    Raises DeserializationError if it is not a string, or has lone surrogates, which UTF-8 cannot hold.
    """
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


def turn_of(message: object, max_value_bytes: int) -> Turn:
    """Return what a scope does for a public message. Encodes the value: call it before the scope is claimed.

    Raises InvalidValue, ValueTooLarge, and DeserializationError for what is no message of a scope.
    """
    match message:
        case messages.Set(scope=scope, key=key, value=value):
            data = encode(value)
            if max_value_bytes and len(data) > max_value_bytes:
                raise ValueTooLarge(scope, key, len(data), max_value_bytes)
            return Put(checked_name("key", key), data)
        case messages.Update(key=key, ops=ops):
            return Change(checked_name("key", key), checked(ops))
        case messages.Delete(key=key):
            return Take(checked_name("key", key))
        case messages.Get(key=key):
            return Read(checked_name("key", key))
        case messages.List():
            return ReadAll()
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


def as_failure_of(message: Any, error: StorageError) -> StorageError:
    """Return `error` as the failure of the call that `message` stands for, with its code and wording."""
    inner = message.message if isinstance(message, Caused) else message
    code, prefix = FAILURES.get(type(inner), ("STORAGE_ERROR", "The store failed"))
    return StorageError(f"{prefix}: {error}", code=code)


def caused(depth: int, item: Any) -> Any:
    """Return a mailbox item with the depth of its sender, for a turn on another thread."""
    if type(item) is Envelope:
        return Envelope(Caused(depth, item.message), item.reply_to)
    return Caused(depth, item)


def weight(item: Any) -> int:
    """Return about how many bytes of values a mailbox item holds. Ops of an update count by their texts and items."""
    message = item.message if type(item) is Envelope else item
    if isinstance(message, Caused):
        message = message.message
    if isinstance(message, Put):
        return len(message.data)
    if isinstance(message, Change):
        return sum(_weight_of_value(getattr(op, "value", None)) for op in message.ops)
    return 0


def _weight_of_value(value: object) -> int:
    return len(value) if isinstance(value, str) else 64 * len(value) if isinstance(value, (dict, list)) else 8
