"""A scope's turns as calls of a remote engine, and its answers as results. Pure functions (docs/protocol.md 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from scopestate.errors import DeserializationError, RemoteFailure, ScopestateError
from scopestate.ops import OpError, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.values import parse

Done = Callable[[bytes | None, ScopestateError | None], object]
"""Takes the outcome of a call: the result as JSON (None: no value), or an error."""

_NULL: Final = b"null"


class _Call(msgspec.Struct, omit_defaults=True):
    """Input of any of the five functions that name a scope."""

    scope: str
    key: str | msgspec.UnsetType = msgspec.UNSET
    value: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    ops: tuple[Any, ...] | msgspec.UnsetType = msgspec.UNSET
    tell_existed: bool = msgspec.field(default=False, name="_existed")
    """Asks for `existed` in the result; an engine that does not know it ignores it (docs/semantics.md, section 2)."""
    tell_keys: bool = msgspec.field(default=False, name="_keys")
    """Asks `state::list` for the keys too."""


class _Written(msgspec.Struct):
    """Result of `state::set` and `state::update`."""

    new_value: msgspec.Raw
    old_value: msgspec.Raw = msgspec.Raw(_NULL)
    errors: tuple[OpError, ...] = ()
    existed: bool | None = None
    """Whether the key existed before. Only a scopestate engine says so; else a stored null looks like a missing key."""


class _Keyed(msgspec.Struct):
    """Result of `state::list` with `_keys`, which scopestate engines understand."""

    keys: list[str]
    values: list[msgspec.Raw]


class Outcome(msgspec.Struct, frozen=True):
    """What an answer means to the scope."""

    answer: Any
    """What the turn answers: SetResult, UpdateResult, JSON bytes, a list of them, or None."""
    change: tuple[bytes | None, bytes | None] | None = None
    """(old, new) as JSON of the write that was made; None inside it: no value."""


_encode = msgspec.json.Encoder().encode
_decode_written = msgspec.json.Decoder(_Written).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def request(scope: str, turn: Any) -> tuple[str, bytes]:
    """Return the function id and the input, as JSON, that do `turn` on the remote."""
    match turn:
        case turns.Set(key=key, data=data):
            return turn.function_id, _encode(_Call(scope, key, msgspec.Raw(data), tell_existed=True))
        case turns.Update(key=key, ops=ops):
            return turn.function_id, _encode(_Call(scope, key, ops=ops, tell_existed=True))
        case turns.Delete(key=key):
            return turn.function_id, _encode(_Call(scope, key))
        case turns.Get(key=key):
            return turn.function_id, _encode(_Call(scope, key))
        case turns.List():
            return turn.function_id, _encode(_Call(scope))
        case turns.Items():
            return turn.function_id, _encode(_Call(scope, tell_keys=True))
    raise TypeError(f"no call of a remote stands for {turn!r:.80}")


def read_answer(turn: Any, result: bytes | None) -> Outcome:
    """Read the remote's result for `turn`. Raises RemoteFailure (`serialization_error`) if it has another shape."""
    try:
        match turn:
            case turns.Set(data=data):
                written = _decode_written(result or _NULL)
                old = _old(written)
                return Outcome(SetResult(old, data), (old, data))
            case turns.Update():
                written = _decode_written(result or _NULL)
                old, new = _old(written), parse(bytes(written.new_value))
                return Outcome(UpdateResult(old, new, written.errors), (old, new))
            case turns.Delete():
                taken = None if result is None else parse(result)
                return Outcome(taken, (taken, None))
            case turns.Get():
                return Outcome(None if result is None else parse(result))
            case turns.Items():
                return Outcome(read_keyed(result))
            case _:
                return Outcome([parse(bytes(value)) for value in _decode_list(result or b"[]")])
    except (msgspec.DecodeError, DeserializationError) as error:
        function_id = turn.function_id
        raise RemoteFailure(
            function_id, "serialization_error", f"its result is not what {function_id} returns: {error}"
        ) from error


def _old(written: _Written) -> bytes | None:
    old = parse(bytes(written.old_value))
    return old if (old != _NULL if written.existed is None else written.existed) else None


def read_keyed(result: bytes | None) -> list[tuple[str, bytes]]:
    """Read the keys and values of a scope. Raises DeserializationError if the engine named no keys."""
    try:
        keyed = msgspec.json.decode(result or b"null", type=_Keyed)
    except msgspec.DecodeError as error:
        raise DeserializationError("that engine does not name the keys of a scope; it is no scopestate") from error
    if len(keyed.keys) != len(keyed.values):
        raise DeserializationError(f"{len(keyed.keys)} keys with {len(keyed.values)} values")
    return [(key, parse(bytes(value))) for key, value in zip(keyed.keys, keyed.values, strict=True)]
