"""Export and import of state as JSON lines, between stores of any kind.

    {"scopestate_export":2}
    {"scope":"users","revision":12}
    {"scope":"users","key":"profile","value":{"name":"Ada"},"revision":7,"expires_at":1800000000000}
    {"scope":"users","idempotency_key":"order-17","answer":"gaA=","fingerprint":"c2FtZQ==","time":1799999999000}
    {"end":true,"scopes":1,"keys":1}

The keys of a scope are in the order in which they were first set; those of Redis are sorted. `revision` of a scope is
the number of its last write, `expires_at` and `time` are milliseconds since the epoch; fields that are unknown or not
set are left out. The first and the last line may both be left out, so any list of `scope`, `key`, `value` objects can
be imported. A file that has only the first of the two was cut off. An empty file is refused, since a command that
failed leaves one. Files of format 1 can be imported too: they have `sequence` for the revision of a scope, and no other
revisions.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import msgspec
from msgspec import Raw

from scopestate.actors.ports import ANSWERS_KEPT_MS, Answer
from scopestate.errors import DeserializationError
from scopestate.ops.turns import LAST_MS, Entry
from scopestate.ops.values import parse
from scopestate.persistence import Row, ScopeChange, Store

if TYPE_CHECKING:
    from scopestate.persistence import FileAdapter

FORMAT: Final = 2
BATCH_KEYS: Final = 1000
BATCH_BYTES: Final = 4 * 1024 * 1024
MAX_REVISION: Final = 2**52
"""The highest number in an import. It leaves a scope as many further writes before numbers end (2**53)."""

Progress = Callable[[int], object]
"""Called with the number of keys done."""


def _untold(keys: int) -> None:
    pass


class Reader(Protocol):
    """State that can be exported: a `StoreReader` or a `SharedReader`."""

    def scopes(self, *, empty: bool = False) -> list[str]:
        """Return the scopes that hold a key; with `empty`, also those that have a revision only, where that is kept."""

    def revision(self, scope: str) -> int:
        """Return the number of a scope's last write; 0 if that is not known."""

    def entries(self, scope: str) -> Iterator[tuple[str, Entry]]:
        """Yield the keys that have not expired, in insertion order if the state has one. Revision 0: not known."""

    def answers(self, scope: str) -> Mapping[str, Answer]:
        """Return idempotency key -> answer, the oldest first; empty where they cannot be read."""


class SharedState(Protocol):
    """State that other programs may read and write at the same time: in Redis, or in a running engine."""

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key."""

    def read(self, scope: str) -> dict[str, Entry]:
        """Return the current entries of a scope. Revision 0: not known."""

    def write(self, changes: Mapping[str, Mapping[str, Entry | None]]) -> None:
        """Set keys, or delete them (None), in several steps: on a raise, some of them may be written.

        The state assigns its own revisions. Raises Unsupported, before anything is sent, for a deadline that it cannot
        keep.
        """

    def close(self) -> None:
        """Close the connection."""


class SharedReader:
    """Reads Redis, or a running engine through a bridge: each scope as of the moment at which it is read."""

    def __init__(self, state: SharedState) -> None:
        self._state = state

    def scopes(self, *, empty: bool = False) -> list[str]:
        """Return the scopes that hold a key."""
        return self._state.scopes()

    def revision(self, scope: str) -> int:
        """Return 0: the number is not known."""
        return 0

    def entries(self, scope: str) -> Iterator[tuple[str, Entry]]:
        """Yield what a scope holds: in the order of the other engine, or in Redis sorted by key."""
        yield from self._state.read(scope).items()

    def answers(self, scope: str) -> Mapping[str, Answer]:
        """Return nothing: other programs cannot read these answers."""
        return {}


_Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_REVISION)]
_Ms = Annotated[int, msgspec.Meta(ge=0, le=LAST_MS)]


class _Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    scopestate_export: int | None = None
    scope: str | None = None
    key: str | None = None
    value: Raw = Raw()
    revision: _Number | None = None
    sequence: _Number | None = None
    """The revision of a scope in format 1."""
    expires_at: _Ms | None = None
    idempotency_key: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    answer: bytes = b""
    fingerprint: bytes = b""
    time: _Ms | None = None
    end: bool = False
    scopes: int | None = None
    keys: int | None = None


class KeyLine(msgspec.Struct, frozen=True):
    """One key of an export."""

    scope: str
    key: str
    entry: Entry


class ScopeLine(msgspec.Struct, frozen=True):
    """The number of a scope's last write, before its keys."""

    scope: str
    revision: int


class AnswerLine(msgspec.Struct, frozen=True):
    """A kept answer, after the keys of its scope."""

    scope: str
    idempotency_key: str
    answer: Answer


Read = KeyLine | ScopeLine | AnswerLine

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


def export_lines(reader: Reader, progress: Progress = _untold) -> Iterator[bytes]:
    """Yield a store as lines with their line ends. `progress(keys)` is called from time to time, and at the end."""
    yield _encode(_Line(scopestate_export=FORMAT)) + b"\n"
    keys = scopes = 0
    for scope in reader.scopes(empty=True):
        scopes += 1
        yield _encode(_Line(scope=scope, revision=reader.revision(scope))) + b"\n"
        for key, entry in reader.entries(scope):
            keys += 1
            # A newline inside a JSON string is escaped; between tokens it is white space.
            value = Raw(entry.json.replace(b"\n", b" "))
            line = _Line(
                scope=scope, key=key, value=value, revision=entry.revision or None, expires_at=entry.expires_ms
            )
            yield _encode(line) + b"\n"
            if keys % BATCH_KEYS == 0:
                progress(keys)
        for token, kept in reader.answers(scope).items():
            line = _Line(
                scope=scope,
                idempotency_key=token,
                answer=kept.answer,
                fingerprint=kept.fingerprint,
                time=kept.time_ms,
            )
            yield _encode(line) + b"\n"
    progress(keys)
    yield _encode(_Line(end=True, scopes=scopes, keys=keys)) + b"\n"


def read_lines(lines: Iterable[bytes]) -> Iterator[Read]:
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
            if not text.isascii():
                text.decode()  # msgspec says where it is not UTF-8 up to version 0.22 only
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
            else:
                read = _read(line)
                keys += isinstance(read, KeyLine)
                yield read
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


def _read(line: _Line) -> Read:
    scope, revision = line.scope, line.revision
    if scope is not None and line.key is not None and line.value:
        return KeyLine(scope, line.key, Entry(parse(bytes(line.value)), revision or 0, line.expires_at))
    if scope is not None and line.idempotency_key is not None and line.time is not None:
        return AnswerLine(scope, line.idempotency_key, Answer(line.fingerprint, line.answer, line.time))
    number = line.sequence if revision is None else revision
    if scope is not None and number is not None and line.key is None:
        return ScopeLine(scope, number)
    raise DeserializationError("expected an object with `scope`, `key` and `value`")


def _without_mark(text: bytes) -> bytes:
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DeserializationError(
            "this is UTF-16 text; save the file as UTF-8 (in PowerShell: `Out-File -Encoding utf8`)"
        )
    return text.removeprefix(codecs.BOM_UTF8)


def _check_format(found: int) -> None:
    if not 1 <= found <= FORMAT:
        raise DeserializationError(
            f"this is an export of format {found}, and this version reads formats up to {FORMAT}"
        )


class Imported(msgspec.Struct):
    """The result of an import."""

    keys: int = 0
    expired: int = 0
    """Keys that were left out because their deadline had passed."""
    answers: int = 0
    """Kept answers, to calls with an idempotency key, that were imported."""
    left_out: int = 0
    """Kept answers that were left out, because other engines do not take them."""
    renumbered: bool = False
    """True if some keys got other revisions than in the export."""


def import_whole(lines: Iterable[bytes], store: FileAdapter, progress: Progress = _untold) -> Imported:
    """Write an export into a store, as one transaction.

    Existing keys are overwritten and keep their place. A key keeps its revision unless the store has already given that
    number in its scope: then it gets a new one, since numbers never repeat. `progress(keys)` is called after each
    batch. Raises DeserializationError for a bad line and StorageError if the store fails; then nothing was written.
    """
    store.clock_ms = max(store.clock_ms, time.time_ns() // 1_000_000)
    collector = _Collector(store, store.clock_ms)

    def changes() -> Iterator[ScopeChange]:
        for batch in _batches(read_lines(lines)):
            yield from collector.changes(batch)
            progress(collector.done.keys)

    store.save_whole(changes())
    progress(collector.done.keys)
    return collector.done


def import_in_steps(lines: Iterable[bytes], state: SharedState, progress: Progress = _untold) -> Imported:
    """As `import_whole`, into Redis or a running engine. If it fails, the batches before that are written.

    The state assigns the revisions, and answers to calls with an idempotency key are left out.
    """
    done = Imported()
    for batch in _batches(read_lines(lines)):
        now_ms = time.time_ns() // 1_000_000
        changes: dict[str, dict[str, Entry | None]] = {}
        for item in batch:
            if isinstance(item, KeyLine):
                if _has_passed(item.entry.expires_ms, now_ms):
                    done.expired += 1
                    continue
                changes.setdefault(item.scope, {})[item.key] = item.entry
                done.keys += 1
                done.renumbered = done.renumbered or item.entry.revision > 0
            elif isinstance(item, AnswerLine):
                done.left_out += 1
        state.write(changes)
        progress(done.keys)
    progress(done.keys)
    return done


def _has_passed(expires_ms: int | None, now_ms: int) -> bool:
    return expires_ms is not None and expires_ms <= now_ms


def _batches(items: Iterable[Read]) -> Iterator[list[Read]]:
    batch: list[Read] = []
    size = 0
    for item in items:
        batch.append(item)
        if isinstance(item, KeyLine):
            size += len(item.entry.json)
        elif isinstance(item, AnswerLine):
            size += len(item.answer.answer)
        if len(batch) >= BATCH_KEYS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Scope(msgspec.Struct):
    """A scope of the store that is imported into."""

    created: dict[str, int]
    """key -> the write that created it."""
    given: int
    """The highest number that the scope may have given before the import."""
    revision: int
    """The highest number so far, including those of the import."""
    last_created: int
    due_ms: int | None
    answers: dict[str, int]
    """idempotency key -> time of its answer."""


class _Collector:
    """Turns the lines of an export into changes, which continue the numbers and the order of keys of a store."""

    def __init__(self, store: Store, now_ms: int) -> None:
        self.done = Imported()
        self._store = store
        self._now_ms = now_ms
        self._scopes: dict[str, _Scope] = {}

    def changes(self, items: Iterable[Read]) -> list[ScopeChange]:
        """Return one change for each scope in `items`."""
        batch: dict[str, ScopeChange] = {}
        for item in items:
            found = self._scopes.get(item.scope) or self._begin(item.scope)
            change = batch.get(item.scope)
            if change is None:
                change = batch[item.scope] = ScopeChange(item.scope, 0, {})
            match item:
                case KeyLine():
                    self._take_key(found, change, item.key, item.entry)
                case ScopeLine():
                    found.revision = max(found.revision, item.revision)
                case AnswerLine():
                    self._take_answer(found, change, item)
            change.revision, change.due_ms = found.revision, found.due_ms
        return list(batch.values())

    def _take_key(self, found: _Scope, change: ScopeChange, key: str, entry: Entry) -> None:
        if _has_passed(entry.expires_ms, self._now_ms):
            self.done.expired += 1
            return
        created = found.created.get(key)
        if created is None:
            # The places of new keys are numbers too: they come after those already given.
            created = found.last_created = found.created[key] = found.last_created + 1
        revision = entry.revision
        if revision <= found.given:
            self.done.renumbered = self.done.renumbered or revision > 0
            revision = found.revision + 1
        found.revision = max(found.revision, revision, created)
        if entry.expires_ms is not None:
            found.due_ms = entry.expires_ms if found.due_ms is None else min(found.due_ms, entry.expires_ms)
        change.entries[key] = Row(entry.json, revision, created, entry.expires_ms)
        self.done.keys += 1

    def _take_answer(self, found: _Scope, change: ScopeChange, line: AnswerLine) -> None:
        answer, token = line.answer, line.idempotency_key
        if answer.time_ms + ANSWERS_KEPT_MS <= self._now_ms or answer.time_ms < found.answers.get(token, 0):
            return
        found.answers[token] = answer.time_ms
        change.answers[token] = answer
        self.done.answers += 1

    def _begin(self, scope: str) -> _Scope:
        state = self._store.load(scope)
        found = self._scopes[scope] = _Scope(
            state.created,
            state.revision,
            state.revision,
            state.revision,
            min(state.deadlines.values(), default=None),
            {token: answer.time_ms for token, answer in state.answers.items()},
        )
        return found
