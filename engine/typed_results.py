"""What the handles of a typed scope return: results, entries, events and changes with values of the scope's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, Literal

from scopestate.actors.containment import Log
from scopestate.actors.value_rules import ValueRule
from scopestate.errors import DeserializationError, SchemaViolation
from scopestate.ops.changes import Change
from scopestate.ops.results import CasResult, EntryView, ModifyResult, SetResult, StateEvent, T, UpdateResult
from scopestate.ops.value_types import Misfit, ValueType
from scopestate.ops.values import decode

OnInvalid = Literal["raise", "skip"] | Callable[[str, Any, SchemaViolation], Any]

log = Log("scopestate.scope")


class Skipped:
    """Stands for a value that does not fit and is left out."""


SKIPPED: Final = Skipped()


class Reader(Generic[T]):
    """Reads the values of one scope into a type, and decides what happens to values that do not fit."""

    def __init__(self, scope: str, kind: ValueType[T], on_invalid: OnInvalid) -> None:
        if on_invalid not in ("raise", "skip") and not callable(on_invalid):
            raise DeserializationError(
                f'`on_invalid` is "raise", "skip" or a function of key, value and error, not {on_invalid!r:.40}'
            )
        self.scope = scope
        self.kind = kind
        self._decode = kind.decode
        self._on_invalid = on_invalid
        self._told: set[str] = set()
        """Keys whose skipped values were logged."""

    def read(self, key: str, data: bytes) -> T | Skipped:
        """Return a value. Raises SchemaViolation."""
        try:
            return self._decode(data)
        except Misfit as misfit:
            return self._instead(key, data, self.kind.refuse(self.scope, key, misfit, written=False))

    def read_or(self, key: str, data: bytes | None, default: Any) -> Any:
        """Return a value, or `default` if the key does not exist or its value is skipped. Raises SchemaViolation."""
        if data is None:
            return default
        value = self.read(key, data)
        return default if value is SKIPPED else value

    def write(self, key: str, value: T) -> bytes:
        """Return a value as JSON. Raises SchemaViolation and InvalidValue."""
        try:
            return self.kind.encode(value)
        except Misfit as misfit:
            raise self.kind.refuse(self.scope, key, misfit, written=True) from misfit.__cause__

    def check(self, key: str, data: bytes) -> None:
        """Raise SchemaViolation if a value to be written does not fit."""
        try:
            self.kind.check(data)
        except Misfit as misfit:
            raise self.kind.refuse(self.scope, key, misfit, written=True) from misfit.__cause__

    def _instead(self, key: str, data: bytes, violation: SchemaViolation) -> T | Skipped:
        if self._on_invalid == "raise":
            raise violation
        if callable(self._on_invalid):
            value: T = self._on_invalid(key, decode(data), violation)
            return value
        if key not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(key)
            log.warning("%s: it is left out", violation)
        return SKIPPED


class VersionedReader(Reader[T]):
    """As `Reader`, for a scope whose values have versions: it upgrades them to the current version."""

    def __init__(self, scope: str, kind: ValueType[T], on_invalid: OnInvalid, rule: ValueRule) -> None:
        super().__init__(scope, kind, on_invalid)
        self._rule = rule

    def read(self, key: str, data: bytes) -> T | Skipped:
        """As there. Also raises SchemaViolation for a later version, whose fields may have another meaning."""
        try:
            data = self._rule.known(key, data)
        except SchemaViolation as violation:
            return self._instead(key, data, violation)
        return super().read(key, data)


_MOST_TOLD: Final = 1000

# ------------------------------------------------------------------------------------------------------------ results


class TypedSetResult(SetResult[T], Generic[T], frozen=True, eq=False):
    """As `SetResult`, with values of the scope's type."""

    reader: Any = None
    key: str = ""

    def _kind(self) -> type:
        return SetResult

    @property
    def old_value(self) -> T | None:
        """As there. Raises SchemaViolation for a value that was written without the type."""
        value: T | None = self.reader.read_or(self.key, self.old_json, None)
        return value

    @property
    def new_value(self) -> T:
        """As there."""
        value: T = self.reader.read_or(self.key, self.new_json, None)
        return value

    def to_json(self) -> dict[str, Any]:
        """As there: plain data."""
        return self._with_details({"old_value": _plain(self.old_json), "new_value": _plain(self.new_json)})


class TypedUpdateResult(UpdateResult[T], Generic[T], frozen=True, eq=False):
    """As `UpdateResult`, with values of the scope's type."""

    reader: Any = None
    key: str = ""

    def _kind(self) -> type:
        return UpdateResult

    old_value = TypedSetResult.old_value
    new_value = TypedSetResult.new_value

    def to_json(self) -> dict[str, Any]:
        """As there: plain data."""
        return UpdateResult(
            self.old_json,
            self.new_json,
            self.errors,
            revision=self.revision,
            detailed=self.detailed,
            replayed=self.replayed,
        ).to_json()


class TypedModifyResult(ModifyResult[T], Generic[T], frozen=True, eq=False):
    """As `ModifyResult`, with values of the scope's type."""

    reader: Any = None
    key: str = ""

    def _kind(self) -> type:
        return ModifyResult

    old_value = TypedSetResult.old_value

    @property
    def new_value(self) -> T | None:
        """As there."""
        value: T | None = self.reader.read_or(self.key, self.new_json, None)
        return value

    def to_json(self) -> dict[str, Any]:
        """As there: plain data."""
        return ModifyResult(self.old_json, self.new_json, revision=self.revision).to_json()


class TypedCasResult(CasResult[T], Generic[T], frozen=True, eq=False):
    """As `CasResult`, with values of the scope's type."""

    reader: Any = None
    key: str = ""

    def _kind(self) -> type:
        return CasResult

    @property
    def current(self) -> T | None:
        """As there."""
        value: T | None = None if self.swapped else self.reader.read_or(self.key, self.found_json, None)
        return value

    def to_json(self) -> dict[str, Any]:
        """As there: plain data."""
        return CasResult(
            self.swapped, self.found_json, revision=self.revision, detailed=self.detailed, replayed=self.replayed
        ).to_json()


class TypedEntryView(EntryView[T], Generic[T], frozen=True):
    """As `EntryView`, with a value of the scope's type."""

    reader: Any = None

    @property
    def value(self) -> T:
        """The value, a new copy at each reading. Raises SchemaViolation."""
        value: T = self.reader.read_or(self.key, self.json, None)
        return value


class TypedChange(Change[T], Generic[T], frozen=True, eq=False):
    """As `Change`, with values of the scope's type."""

    reader: Any = None

    @property
    def value(self) -> T:
        """As there. Raises SchemaViolation."""
        value: T = self.reader.read_or(self.key, self.json, None)
        return value

    @property
    def old_value(self) -> T:
        """As there. Raises SchemaViolation."""
        value: T = self.reader.read_or(self.key, self.old_json, None)
        return value


class TypedEvent(StateEvent[T], Generic[T], eq=False):
    """As `StateEvent`, with values of the scope's type as attributes. As a mapping it has plain JSON data."""

    reader: Any = None

    @property
    def old_value(self) -> T:
        """As there. Raises SchemaViolation for a value that does not fit, so the handler fails at this event."""
        read = self.__dict__
        if "old_value" not in read:
            read["old_value"] = self.reader.read_or(self.key, self.old_json, None)
        value: T = read["old_value"]
        return value

    @property
    def new_value(self) -> T:
        """As there. Raises SchemaViolation for a value that does not fit, so the handler fails at this event."""
        read = self.__dict__
        if "new_value" not in read:
            read["new_value"] = self.reader.read_or(self.key, self.new_json, None)
        value: T = read["new_value"]
        return value

    def __getitem__(self, field: str) -> Any:
        if field in ("old_value", "new_value"):
            return _plain(self.old_json if field == "old_value" else self.new_json)
        return super().__getitem__(field)

    def copy(self) -> TypedEvent[T]:
        """As there."""
        return typed_event(super().copy(), self.reader)


def typed_event(event: StateEvent[Any], reader: Reader[T]) -> TypedEvent[T]:
    """Return an event with values of a type."""
    return TypedEvent(**{name: getattr(event, name) for name in _EVENT_FIELDS}, reader=reader)


def typed(example: Any, reader: Reader[Any]) -> Any:
    """Return the same result, entry, event or change with values of a type."""
    kind = _TYPED[type(example)]
    return kind(**{name: getattr(example, name) for name in type(example).__struct_fields__}, reader=reader)


_TYPED: Final[dict[type, Any]] = {
    SetResult: TypedSetResult,
    UpdateResult: TypedUpdateResult,
    ModifyResult: TypedModifyResult,
    CasResult: TypedCasResult,
    EntryView: TypedEntryView,
    Change: TypedChange,
    StateEvent: TypedEvent,
}
_EVENT_FIELDS: Final = StateEvent.__struct_fields__


def _plain(data: bytes | None) -> Any:
    return None if data is None else decode(data)
