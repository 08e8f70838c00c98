"""What to say if Redis refuses an operation on consumers because a key is not what scopestate keeps there.

A server names neither the key that has the wrong type nor the one whose content cannot be used. These keys belong to
one consumer. A message that named the stream would have the events of all consumers deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from scopestate.errors import StorageError
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.consuming import CONSUME, SOURCE
from scopestate.persistence.redis.script import code_of, explain

__all__ = ["explain_misused", "explain_refusal", "number_in"]

Ask: TypeAlias = Callable[[Sequence[tuple[Any, ...]]], list[Any]]
"""Sends commands and returns their replies."""

_TYPES: Final = {
    "": b"hash",
    ":engines": b"zset",
    ":lanes": b"hash",
    ":parked": b"zset",
    ":ready": b"zset",
    ":tried": b"hash",
    ":open": b"zset",
    ":copies": b"hash",
    ":letters": b"hash",
    ":dead": b"zset",
}
"""Part of a consumer's key behind its name -> the type that it has in Redis."""


def explain_refusal(refusal: Refusal, command: tuple[Any, ...], address: str, ask: Ask) -> StorageError:
    """Return the error for a refused command, which names the keys to remove if they are the reason.

    `ask` sends commands to the same server and returns their replies.
    """
    if command[1] not in (CONSUME, SOURCE):
        return explain(refusal, address, str(command[1]), nothing="", waited=False)
    if code_of(refusal) == "ERR":
        consumer, key = command[11], command[7]
        error = StorageError(
            f"Redis at {address} refused it: {refusal.text}. What it keeps of consumer {consumer!r}, at {key!r} and "
            "the keys that begin with that and a colon, seems to be damaged: forget the consumer, or delete what is "
            "wrong"
        )
        error.__cause__ = refusal
        return error
    return explain_misused(refusal, address, _types_of(command), ask)


def explain_misused(refusal: Refusal, address: str, types: Mapping[str, bytes], ask: Ask) -> StorageError:
    """As `explain_refusal`, for a command that uses these keys: key -> the type that it has to have in Redis."""
    keys: list[str] = []
    if code_of(refusal) == "WRONGTYPE":
        try:
            found = ask([("TYPE", key) for key in types])
        except (Broken, Refusal, StorageError):
            found = []  # the error says what is known
        keys = [key for key, kind in zip(types, found, strict=False) if kind not in (b"none", types[key])]
    return explain(refusal, address, *keys, nothing="", waited=False)


def _types_of(command: tuple[Any, ...]) -> dict[str, bytes]:
    """Return the keys of a command on consumers, with the types that they have to have."""
    stream, counter, limit, names, it = map(str, command[3:8])
    engine, consumer = command[10:12]
    types = {stream: b"stream", counter: b"string", limit: b"string", names: b"hash"}
    if consumer:
        types.update({it + part: kind for part, kind in _TYPES.items()})
        types[f"{it}:held:{engine}"] = b"zset"
    return types


def number_in(reply: Any, key: str, address: str) -> int:
    """Return a whole number that was read from Redis. Raises StorageError, which names the key, if it is not one."""
    try:
        return int(reply)
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"what Redis at {address} has at {key!r} is not what scopestate keeps there: delete it, or choose another "
            "key_prefix"
        ) from error
