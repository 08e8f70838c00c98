"""What a scope needs of a connection to another engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from scopestate.errors import DeserializationError, ScopestateError
from scopestate.ops.values import parse

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""


class Remote(Protocol):
    """A connection to another engine. Every method may be called from any thread."""

    sequence_floor: int
    """Where a scope's event numbers begin here, so that they never go back when a scope leaves memory and returns."""

    @property
    def reports_changes(self) -> bool:
        """True if the remote reports every change, those made through here included: then answers fire no events."""

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0) -> None:
        """Send a call with its input as JSON, and return at once; calls are sent in the order in which they are made.

        `depth`: how many handlers deep the call is, for the remote to know.

        `done` is called exactly once, later and on another thread, never before `call` returns; it must not block.
        Raises EngineClosed, and calls nothing, if the connection was closed for good.
        """


class _Keyed(msgspec.Struct):
    """Result of `state::list` with `_keys`, which scopestate engines understand."""

    keys: list[str]
    values: list[msgspec.Raw]


def read_keyed(result: bytes | None) -> list[tuple[str, bytes]]:
    """Read the keys and values of a scope. Raises DeserializationError if the engine named no keys."""
    try:
        keyed = msgspec.json.decode(result or b"null", type=_Keyed)
    except msgspec.DecodeError as error:
        raise DeserializationError("that engine does not name the keys of a scope; it is no scopestate") from error
    if len(keyed.keys) != len(keyed.values):
        raise DeserializationError(f"{len(keyed.keys)} keys with {len(keyed.values)} values")
    return [(key, parse(bytes(value))) for key, value in zip(keyed.keys, keyed.values, strict=True)]
