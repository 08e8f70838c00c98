"""Changes for a store as a scope makes them, which knows the write that created each of its keys."""

from __future__ import annotations

from collections.abc import Mapping

from scopestate.persistence import FileAdapter, Row, ScopeChange, ScopeState
from scopestate.persistence.sqlite.reading import StoreReader

_created: dict[tuple[str, str], int] = {}


def forget_scopes() -> None:
    """Begin a test: no scope has a key."""
    _created.clear()


def change(
    scope: str, revision: int, values: Mapping[str, bytes | None], created: Mapping[str, int] | None = None
) -> ScopeChange:
    """Return a change up to the write `revision`: key -> new JSON, or None for a deleted key.

    `created`: the numbers of the writes that created keys; a key that is not there was created by an earlier change.
    """
    entries: dict[str, Row | None] = {}
    removed = [_created.pop((scope, key)) for key in [*values] if values[key] is None and (scope, key) in _created]
    for key, number in (created or {}).items():
        if _created.get((scope, key), number) != number:
            removed.append(_created[scope, key])  # it was deleted, and exists again
        _created[scope, key] = number
    for key, value in values.items():
        if value is None:
            entries[key] = None
            continue
        if (scope, key) not in _created:
            _created[scope, key] = 1 + max((found for (of, _), found in _created.items() if of == scope), default=0)
        number = _created[scope, key]
        entries[key] = Row(value, max(revision, number), number)
    return ScopeChange(scope, revision, entries, removed)


def values_of(state: ScopeState) -> dict[str, bytes]:
    """Return key -> JSON, in the order of the scope."""
    return {key: entry.json for key, entry in state.entries.items()}


def read_values(reader: StoreReader, scope: str) -> dict[str, bytes]:
    """Return key -> JSON, as a tool reads it from the directory."""
    return {key: entry.json for key, entry in reader.entries(scope)}


def crash(store: FileAdapter) -> None:
    """Close a store without the note that everything was saved, as the end of a killed process leaves it."""
    store._end_session = lambda: None  # type: ignore[method-assign]
    store.close()
