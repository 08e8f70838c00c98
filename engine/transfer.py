"""Export and import of state as JSON lines, between stores of any kind.

    {"scopestate_export":1}
    {"scope":"users","sequence":12}
    {"scope":"users","key":"profile","value":{"name":"Ada"}}
    {"end":true,"scopes":1,"keys":1}

The keys of a scope are in the order in which they were first set; those of Redis are sorted. The first and the last
line may both be left out, so any list of `scope`, `key`, `value` objects can be imported. A file with the first and
without the last was cut off. An empty file is refused, since a command that failed leaves one.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import msgspec
from msgspec import Raw

from scopestate.errors import DeserializationError
from scopestate.ops.values import parse
from scopestate.persistence import Row as Stored
from scopestate.persistence import ScopeChange, Store

if TYPE_CHECKING:
    from scopestate.persistence import FileAdapter

FORMAT: Final = 1
BATCH_KEYS: Final = 1000
BATCH_BYTES: Final = 4 * 1024 * 1024
MAX_SEQUENCE: Final = 2**52
"""The highest number in an import. It leaves a scope as many further writes before numbers end (2**53)."""

Progress = Callable[[int], object]
"""Called with the number of keys done."""


def _untold(keys: int) -> None:
    pass


class Reader(Protocol):
    """State that can be exported: a `StoreReader` or a `SharedReader`."""

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key."""

    def sequence(self, scope: str) -> int:
        """Return the number of a scope's last write; 0 if that is not known."""

    def items(self, scope: str) -> Iterator[tuple[str, bytes]]:
        """Yield keys and values, as JSON, in insertion order if the state has one."""


class SharedState(Protocol):
    """State that other programs may read and write at the same time: in Redis, or in a running engine."""

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key."""

    def read(self, scope: str) -> dict[str, bytes]:
        """Return the keys and values of a scope as they are now."""

    def write(self, changes: Mapping[str, Mapping[str, bytes | None]]) -> None:
        """Set keys, or delete them (None), in several steps: on a raise, some of them may be written."""

    def close(self) -> None:
        """Close the connection."""


class SharedReader:
    """Reads Redis, or a running engine through a bridge: each scope as of the moment at which it is read."""

    def __init__(self, state: SharedState) -> None:
        self._state = state

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key."""
        return self._state.scopes()

    def sequence(self, scope: str) -> int:
        """Return 0: the number is not known."""
        return 0

    def items(self, scope: str) -> Iterator[tuple[str, bytes]]:
        """Yield keys and values, as JSON: in the order of the other engine, or in Redis sorted by key."""
        yield from self._state.read(scope).items()


class _Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    scopestate_export: int | None = None
    scope: str | None = None
    key: str | None = None
    value: Raw = Raw()
    sequence: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQUENCE)] | None = None
    end: bool = False
    scopes: int | None = None
    keys: int | None = None


class Entry(msgspec.Struct, frozen=True):
    """One key of an export."""

    scope: str
    key: str
    value: bytes


class Scope(msgspec.Struct, frozen=True):
    """The number of a scope's last write, before its keys."""

    scope: str
    sequence: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


def export_lines(reader: Reader, progress: Progress = _untold) -> Iterator[bytes]:
    """Yield a store as lines with their line ends. `progress(keys)` is called from time to time, and at the end."""
    yield _encode(_Line(scopestate_export=FORMAT)) + b"\n"
    keys = scopes = 0
    for scope in reader.scopes():
        scopes += 1
        yield _encode(_Line(scope=scope, sequence=reader.sequence(scope))) + b"\n"
        for key, value in reader.items(scope):
            keys += 1
            # A newline inside a JSON string is escaped; between tokens it is white space.
            yield _encode(_Line(scope=scope, key=key, value=Raw(value.replace(b"\n", b" ")))) + b"\n"
            if keys % BATCH_KEYS == 0:
                progress(keys)
    progress(keys)
    yield _encode(_Line(end=True, scopes=scopes, keys=keys)) + b"\n"


def read_lines(lines: Iterable[bytes]) -> Iterator[Entry | Scope]:
    """Read an export. Raises DeserializationError, which names the line, if it is not one or is cut off."""
    number = keys = 0
    begun = ended = False
    empty = True
    for number, line_read in enumerate(lines, 1):
        try:
            text = _without_mark(line_read) if number == 1 else line_read
            if not text.strip():
                continue
            empty = False
            if ended:
                raise DeserializationError("there is more after the last line")
            line = _decode(text)
            if line.scopestate_export is not None:
                begun = True
                _check_format(line.scopestate_export)
            elif line.end:
                ended = True
                if line.keys != keys:
                    raise DeserializationError(
                        f"the export should have {line.keys} keys, but {keys} came before this line"
                    )
            elif line.scope is not None and line.key is not None and line.value:
                keys += 1
                yield Entry(line.scope, line.key, parse(bytes(line.value)))
            elif line.scope is not None and line.sequence is not None and line.key is None:
                yield Scope(line.scope, line.sequence)
            else:
                raise DeserializationError("expected an object with `scope`, `key` and `value`")
        except UnicodeError as error:
            raise DeserializationError(f"line {number}: not UTF-8 text: {error}") from error
        except RecursionError as error:
            raise DeserializationError(f"line {number}: too many nested levels") from error
        except (msgspec.DecodeError, DeserializationError) as error:
            raise DeserializationError(f"line {number}: {error}") from error
    if empty:
        raise DeserializationError(
            "the input is empty: did the export fail? The export of an empty store has two lines"
        )
    if begun and not ended:
        raise DeserializationError(f"the export is cut off after line {number}: its last line is missing")


def _without_mark(text: bytes) -> bytes:
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DeserializationError(
            "this is UTF-16 text; save the file as UTF-8 (in PowerShell: `Out-File -Encoding utf8`)"
        )
    return text.removeprefix(codecs.BOM_UTF8)


def _check_format(found: int) -> None:
    if found != FORMAT:
        raise DeserializationError(f"this is an export of format {found}, and this version reads format {FORMAT}")


def import_whole(lines: Iterable[bytes], store: FileAdapter, progress: Progress = _untold) -> int:
    """Write an export into a store, as one transaction, and return the number of keys.

    Existing keys are overwritten and keep their place. `progress(keys)` is called after each batch. Raises
    DeserializationError for a bad line, StorageError for a store that fails; then nothing was written.
    """
    keys = 0

    def changes() -> Iterator[ScopeChange]:
        nonlocal keys
        collector = _Collector(store)
        for batch in _batches(read_lines(lines)):
            yield from collector.changes(batch)
            keys += sum(isinstance(item, Entry) for item in batch)
            progress(keys)

    store.save_whole(changes())
    progress(keys)
    return keys


def import_in_steps(lines: Iterable[bytes], state: SharedState, progress: Progress = _untold) -> int:
    """As `import_whole`, into Redis or a running engine. If it fails, the batches before that are written."""
    keys = 0
    for batch in _batches(read_lines(lines)):
        changes: dict[str, dict[str, bytes | None]] = {}
        for item in batch:
            if isinstance(item, Entry):
                changes.setdefault(item.scope, {})[item.key] = item.value
                keys += 1
        state.write(changes)
        progress(keys)
    progress(keys)
    return keys


def _batches(items: Iterable[Entry | Scope]) -> Iterator[list[Entry | Scope]]:
    batch: list[Entry | Scope] = []
    size = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Entry):
            size += len(item.value)
        if len(batch) >= BATCH_KEYS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Collector:
    """Turns the entries of an export into changes, which continue the numbers and the order of keys of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[str, int]] = {}
        """scope -> key -> the write that created it."""
        self._sequences: dict[str, int] = {}
        self._writes: dict[str, int] = {}
        """Number of the last key written. At most the sequence, which may come from the export."""

    def changes(self, items: Iterable[Entry | Scope]) -> list[ScopeChange]:
        """Return one change for each scope in `items`."""
        batch: dict[str, ScopeChange] = {}
        for item in items:
            scope = item.scope
            change = batch.get(scope)
            if change is None:
                change = batch[scope] = self._begin(scope)
            if isinstance(item, Scope):
                change.revision = self._sequences[scope] = max(self._sequences[scope], item.sequence)
                continue
            self._writes[scope] += 1
            change.revision = self._sequences[scope] = max(self._sequences[scope], self._writes[scope])
            created = self._known[scope].setdefault(item.key, self._writes[scope])
            change.entries[item.key] = Stored(item.value, self._writes[scope], created)
        return list(batch.values())

    def _begin(self, scope: str) -> ScopeChange:
        if scope not in self._known:
            state = self._store.load(scope)
            self._known[scope] = {key: entry.created for key, entry in state.entries.items()}
            self._sequences[scope] = self._writes[scope] = state.revision
        return ScopeChange(scope, self._sequences[scope], {})
