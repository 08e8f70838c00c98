"""What the engine itself asks of its scopes, and what goes with a message through a mailbox."""

from __future__ import annotations

from typing import Any

import msgspec

from scopestate.actors.reply import Envelope
from scopestate.errors import StorageError
from scopestate.ops import turns
from scopestate.ops.functions import failure_of


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


def as_failure_of(message: Any, error: StorageError) -> StorageError:
    """Return `error` as the failure of the operation that a message asks for, with its code and wording."""
    failure = failure_of(message.message if isinstance(message, Caused) else message)
    return StorageError(f"{failure.words}: {error}", code=failure.code)


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
    if isinstance(message, turns.Set):
        return len(message.data)
    if isinstance(message, turns.Update):
        return sum(_weight_of_value(getattr(op, "value", None)) for op in message.ops)
    return 0


def _weight_of_value(value: object) -> int:
    return len(value) if isinstance(value, str) else 64 * len(value) if isinstance(value, (dict, list)) else 8
