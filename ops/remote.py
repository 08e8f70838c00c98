"""The turns that a bridge sends to another scopestate engine, so that `modify` and `transact` can be computed here.

On the wire, each is a field that begins with `_` in the input of a built-in function. Engines that do not know the
field ignore it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from scopestate.errors import IdempotencyMismatch
from scopestate.ops.results import BatchResult
from scopestate.ops.transactions import Batch, Transact
from scopestate.ops.turns import Effects, Entry, Failure, Items, Range, Turn, View
from scopestate.ops.values import parse
from scopestate.ops.writes import fingerprint_of


class KeysNow(NamedTuple):
    """Keys within a range, and the number of the last change of the scope."""

    keys: list[str]
    revision: int


class KeysAt(Turn[KeysNow], frozen=True):
    """Read keys, with the revision of the scope that they belong to."""

    function_id = "state::list_keys"
    failure = Failure("LIST_ERROR", "Failed to list values")

    within: Range

    @property
    def keys(self) -> None:
        return None

    def decide(self, view: View) -> Effects[KeysNow]:
        return (), KeysNow(list(view.keys(self.within)), view.revision)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, **msgspec.structs.asdict(self.within), "_revision": True}

    def effects_of(self, result: bytes | None) -> Effects[KeysNow]:
        told = _decode_keys(result or b"null")
        return (), KeysNow(told.keys, told.revision)


class Now(Turn[int], frozen=True):
    """Read the clock that decides when the keys of a scope expire, in milliseconds since the epoch."""

    function_id = "state::get-entry"
    failure = Failure("GET_ERROR", "Failed to get value")

    @property
    def keys(self) -> tuple[str, ...]:
        return ()

    def decide(self, view: View) -> Effects[int]:
        return (), view.now_ms

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "key": "", "_now": True}

    def effects_of(self, result: bytes | None) -> Effects[int]:
        return (), msgspec.json.decode(result or b"null", type=dict[str, int])["ms"]


class Everything(Turn[list[tuple[str, Entry]]], frozen=True):
    """Read all keys with what is stored under them, in the order of the backend."""

    function_id = "state::list"
    failure = Failure("LIST_ERROR", "Failed to list values")

    @property
    def keys(self) -> None:
        return None

    def decide(self, view: View) -> Effects[list[tuple[str, Entry]]]:
        found = [(key, view.entry(key)) for key, _ in view.items()]
        return (), [(key, entry) for key, entry in found if entry is not None]

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "_keys": True, "_entries": True}

    def effects_of(self, result: bytes | None) -> Effects[list[tuple[str, Entry]]]:
        try:
            told = _decode_everything(result or b"null")
        except msgspec.DecodeError:
            told = _Everything()
        if told.entries is None:  # an older scopestate, or another engine
            _, items = Items().effects_of(result)
            return (), [(key, Entry(data, 0)) for key, data in items]
        entries = [Entry(parse(bytes(one.value)), one.revision, one.expires_at) for one in told.entries]
        return (), list(zip(told.keys, entries, strict=True))


class Recalled(NamedTuple):
    """What the function of a `transact` returned at the first call with its idempotency key."""

    found: bool
    answer: bytes = b"null"
    """As JSON."""


class Committing(Turn[BatchResult | Recalled], frozen=True):
    """Commit what the function of a `transact` with an idempotency key has done, and keep what it returned.

    A repetition is recognised by the key alone, because the function may do something else when it is called again.
    """

    function_id = "state::transaction"
    writes = True
    failure = Batch.failure

    batch: Batch
    returned: bytes
    """The result of the function, as JSON."""

    @property
    def keys(self) -> tuple[str, ...]:
        return self.batch.keys

    @property
    def kind(self) -> str:
        return Transact.__name__  # the engine that has the scope may make one of the two calls itself

    def content(self) -> Any:
        return ()

    def decide(self, view: View) -> Effects[BatchResult | Recalled]:
        return self.batch.decide(view)

    def call(self, scope: str) -> dict[str, Any]:
        return {**self.batch.call(scope), "_returned": msgspec.Raw(self.returned)}

    def effects_of(self, result: bytes | None) -> Effects[BatchResult | Recalled]:
        told = _decode_recalled(result or b"null")
        return ((), Recalled(True, bytes(told.recalled))) if told.recalled else self.batch.effects_of(result)

    def pack(self, answer: BatchResult | Recalled) -> bytes:
        return self.returned

    def unpack(self, kept: bytes) -> Recalled:
        return Recalled(True, kept)


class Recall(Turn[Recalled], frozen=True):
    """Read what is kept for the idempotency key of a `transact`."""

    function_id = "state::transaction"
    failure = Batch.failure

    idempotency_key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return ()

    def decide(self, view: View) -> Effects[Recalled]:
        kept = view.kept(self.idempotency_key)
        if kept is None:
            return (), Recalled(False)
        if kept.fingerprint != fingerprint_of(_ANY):
            raise IdempotencyMismatch(view.scope, self.idempotency_key)
        return (), Recalled(True, kept.answer)

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, "ops": [], "idempotency_key": self.idempotency_key, "_recall": True}

    def effects_of(self, result: bytes | None) -> Effects[Recalled]:
        told = _decode_recalled(result or b"null")
        return (), Recalled(True, bytes(told.recalled)) if told.recalled else Recalled(False)


_ANY: Final = Committing(Batch(()), b"null")


class _Entry(msgspec.Struct):
    value: msgspec.Raw
    revision: int
    expires_at: int | None = None


class _Everything(msgspec.Struct):
    keys: list[str] = []
    entries: list[_Entry] | None = None


class _Keys(msgspec.Struct):
    keys: list[str]
    revision: int


class _Recalled(msgspec.Struct):
    recalled: msgspec.Raw = msgspec.Raw()


_decode_everything: Final = msgspec.json.Decoder(_Everything).decode
_decode_keys: Final = msgspec.json.Decoder(_Keys).decode
_decode_recalled: Final = msgspec.json.Decoder(_Recalled).decode
