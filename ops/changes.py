"""What a watch yields: the changes of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, Protocol

import msgspec

from scopestate.ops.apply import MISSING
from scopestate.ops.plain import Plain, json_shown, shortened
from scopestate.ops.results import StateEvent, T
from scopestate.ops.values import decode, encode

ChangeKind = Literal["put", "delete", "expire", "synced", "progress"]


class CursorMaker(Protocol):
    """Gives the cursor of each change of a watch."""

    def cursor_of(self, change: Change) -> str:
        """Return the cursor that continues after this change."""


class KnownCursor(msgspec.Struct, frozen=True, gc=False):
    """The cursor of one change, as another engine sent it."""

    cursor: str

    def cursor_of(self, change: Change) -> str:
        """Return the known cursor."""
        del change
        return self.cursor


class Change(Plain, msgspec.Struct, Generic[T], frozen=True, eq=False, gc=False):
    """A change of one key, as a watch yields it; with `markers=True` also a mark, which has no key.

    `Change[V]`: its values are of type V, as a type checker sees them; a typed scope has `Change[User | None]`.
    """

    json_fields: ClassVar[tuple[str, ...]] = (
        "kind",
        "scope",
        "key",
        "value",
        "old_value",
        "revision",
        "transaction",
        "initial",
        "position",
        "cursor",
    )
    json_values: ClassVar[Mapping[str, str]] = {"value": "json", "old_value": "old_json"}

    kind: ChangeKind
    """`put`: the key has a new value. `delete`: a call removed it. `expire`: its deadline passed.

    Of a mark: `synced`: the whole snapshot was yielded, and changes follow. `progress`: every change up to `cursor`
    that the watch asks for was yielded.
    """
    scope: str
    """The scope; of a mark, the scope of the watch, or "" if the watch is of many scopes."""
    key: str
    """The key; "" of a mark."""
    json: bytes | None
    """The new value as JSON; None if the key was removed, or with `values=False`."""
    old_json: bytes | None
    """The previous value as JSON; None if there was none, for an entry of a snapshot, or with `values=False`."""
    revision: int
    """The revision that the change gave to its key. It rises from change to change of a scope."""
    transaction: int
    """The revision of the last change of its transaction; its own revision if the transaction has one change."""
    initial: bool
    """True for an entry of a snapshot: the state of the key where the watch begins."""
    position: int
    """The number of the change over all scopes of its engine; 0 for an entry of a snapshot."""
    cursors: CursorMaker
    """Makes `cursor` when it is read. It holds no references, because the garbage collector does not track changes."""
    event: StateEvent | None = None
    """The event of the change in this engine; None for an entry of a snapshot and for a change from another
    engine."""

    @classmethod
    def example(
        cls,
        kind: ChangeKind = "put",
        *,
        scope: str = "scope",
        key: str = "key",
        value: object = MISSING,
        old_value: object = MISSING,
        revision: int = 1,
        initial: bool = False,
        position: int = 0,
        cursor: str = "",
    ) -> Change[Any]:
        """Return a change made without an engine, for unit tests of code that reads a watch.

        The value of a `put` is {} if none is given, and a mark has no key. Raises InvalidValue for what JSON cannot
        hold. Two changes are equal if everything but `position` and `cursor` is equal.
        """
        if kind == "put" and value is MISSING:
            value = {}
        return Change(
            kind,
            scope,
            "" if kind in {"synced", "progress"} else key,
            None if value is MISSING else encode(value),
            None if old_value is MISSING else encode(old_value),
            revision,
            revision,
            initial,
            position,
            KnownCursor(cursor),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Change):
            return NotImplemented
        return self._identified() == other._identified() and self._values() == other._values()

    # Needed, because the base class Struct compares by identity for `!=`.
    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return hash(self._identified())

    def _identified(self) -> tuple[object, ...]:
        return self.kind, self.scope, self.key, self.revision, self.transaction, self.initial

    def _values(self) -> list[Any]:
        return [None if data is None else (decode(data),) for data in (self.json, self.old_json)]

    @property
    def value(self) -> T:
        """The new value, a new copy at each reading; None if the key was removed, or with `values=False`."""
        value: Any = None if self.json is None else decode(self.json)
        return value  # type: ignore[no-any-return]  # T includes None

    @property
    def old_value(self) -> T:
        """The previous value, a new copy at each reading; None where `old_json` is None."""
        value: Any = None if self.old_json is None else decode(self.old_json)
        return value  # type: ignore[no-any-return]  # as above

    @property
    def cursor(self) -> str:
        """Where a watch continues after this change: `since=change.cursor`. Opaque text, which can be stored or sent.

        A watch that continues within a transaction gets the rest of it. With the cursor of a snapshot entry, the whole
        snapshot begins again.
        """
        return self.cursors.cursor_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The object that makes cursors belongs to one engine, so the pickled change has the finished cursor instead.
        return Change, (*[getattr(self, name) for name in Change.__struct_fields__[:-2]], KnownCursor(self.cursor))

    def __repr__(self) -> str:
        key = f", key={shortened(self.key)}" if self.key else ""
        value = f", value={json_shown(self.json)}" if self.kind == "put" else ""
        initial = ", initial=True" if self.initial else ""
        scope = shortened(self.scope)
        return f"{type(self).__name__}({self.kind!r}, scope={scope}{key}{value}{initial}, revision={self.revision})"
