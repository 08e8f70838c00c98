"""What to say if Redis refuses an operation on consumers because a key is not what scopestate keeps there.

A server names neither the key that has the wrong type nor the one whose content cannot be used. These keys belong to
one consumer. A message that named the stream would have the events of all consumers deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from scopestate.errors import StorageError
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.consuming import CONSUME, SOURCE
from scopestate.persistence.redis.script import code_of, explain

__all__ = ["explain_refusal", "number_in"]

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


def explain_refusal(
    refusal: Refusal, command: tuple[Any, ...], address: str, ask: Callable[[Sequence[tuple[Any, ...]]], list[Any]]
) -> StorageError:
    """Return the error for a refused command, which names the keys to remove if they are the reason.

    `ask` sends commands to the same server and returns their replies.
    """
    if command[1] not in (CONSUME, SOURCE):
        return explain(refusal, address, str(command[1]), nothing="", waited=False)
    code = code_of(refusal)
    if code == "WRONGTYPE":
        try:
            return explain(refusal, address, *_misused(command, ask), nothing="", waited=False)
        except (Broken, Refusal, StorageError):
            pass  # the error below says what is known
    elif code == "ERR":
        consumer, key = command[11], command[7]
        error = StorageError(
            f"Redis at {address} refused it: {refusal.text}. What it keeps of consumer {consumer!r}, at {key!r} and "
            "the keys that begin with that and a colon, seems to be damaged: forget the consumer, or delete what is "
            "wrong"
        )
        error.__cause__ = refusal
        return error
    return explain(refusal, address, nothing="", waited=False)


def _misused(command: tuple[Any, ...], ask: Callable[[Sequence[tuple[Any, ...]]], list[Any]]) -> list[str]:
    """Return the keys of a command that do not have the type that they have to have."""
    stream, counter, limit, names, it = map(str, command[3:8])
    engine, consumer = command[10:12]
    types = {stream: b"stream", counter: b"string", limit: b"string", names: b"hash"}
    if consumer:
        types.update({it + part: kind for part, kind in _TYPES.items()})
        types[f"{it}:held:{engine}"] = b"zset"
    found = ask([("TYPE", key) for key in types])
    return [
        key for key, kind in zip(types, found, strict=True) if type(kind) is bytes and kind not in (b"none", types[key])
    ]


def number_in(reply: Any, key: str, address: str) -> int:
    """Return a whole number that was read from Redis. Raises StorageError, which names the key, if it is not one."""
    try:
        return int(reply)
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"what Redis at {address} has at {key!r} is not what scopestate keeps there: delete it, or choose another "
            "key_prefix"
        ) from error
