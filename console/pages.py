"""The pages that read: the overview, the scopes, the keys of a scope, an entry."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from scopestate import __version__
from scopestate.console.asked import Answer, Asked, Download, Shown
from scopestate.console.elsewhere import Figures, figures_elsewhere
from scopestate.console.history import history
from scopestate.console.rendering import CUT, formatted, value_html
from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.ops.results import EntryView

SCOPES_OF_A_PAGE: Final = 100
KEYS_OF_A_PAGE: Final = 50
MOST_KEYS_OF_A_PAGE: Final = 500
COUNTING_S: Final = 1.5
"""Seconds for counting the keys of scopes for one page, and again for measuring their values."""
MEASURED: Final = 1_000
"""Keys that are measured in one step."""


def overview(asked: Asked) -> Answer:
    """Show the health and the figures of the engine that has the scopes, or with `own` of this one."""
    engine, own = asked.engine, "own" in asked.query
    parts = engine._parts
    other = None if own else figures_elsewhere(engine)
    if isinstance(other, Figures):
        stats, health, name, version = other.stats, other.health, other.engine, other.version
    else:
        stats, health, name, version = engine.stats(), engine.health(), repr(engine), __version__
    calls = sorted(((name, count) for name, count in stats.calls.items() if count), key=lambda one: (-one[1], one[0]))
    return Shown(
        "overview.html",
        {
            "engine": name,
            "this": repr(engine),
            "version": version,
            "stats": stats,
            "health": health,
            "calls": calls,
            "keeps": parts.backend.keeps,
            "saves": isinstance(other, Figures) or parts.backend.store is not None,
            "other": isinstance(other, Figures),
            "why_not": other if isinstance(other, str) else "",
            "elsewhere": parts.backend.call_elsewhere is not None,
        },
    )


# ------------------------------------------------------------------------------------------------------------- scopes


class ScopeRow(NamedTuple):
    """A scope in the list."""

    name: str
    keys: int | None
    """None: they were not counted, as that would have taken too long."""
    bytes: int | None
    """Bytes of keys and values; None: they were not measured."""
    whole: bool
    """False: the scope has more bytes than were counted."""
    durability: str
    notes: tuple[str, ...]


def scopes(asked: Asked) -> Answer:
    """Show the scopes that hold keys, in the order of their names."""
    engine, prefix, after = asked.engine, asked.optional("prefix"), asked.query.get("after")
    measure = "sizes" in asked.query
    names = [name for name in engine.list_groups() if prefix is None or name.startswith(prefix)]
    order = str.encode
    begun = names if after is None else [name for name in names if order(name) > order(after)]
    shown = begun[:SCOPES_OF_A_PAGE]
    ends = time.monotonic() + COUNTING_S
    facts = {
        "rows": [_scope_row(engine, name, ends, measure=measure) for name in shown],
        "total": len(names),
        "prefix": prefix,
        "after": after,
        "measured": measure,
        "next": shown[-1] if len(begun) > len(shown) else None,
    }
    return Shown("scopes.html", facts)


def _scope_row(engine: Engine, name: str, ends: float, *, measure: bool) -> ScopeRow:
    notes = _notes(engine, name)
    if time.monotonic() > ends:
        return ScopeRow(name, None, None, False, durability(engine, name), notes)
    try:
        keys = engine.count(name)
        taken, whole = _measure(engine, name, ends) if measure else (None, True)
    except ScopestateError as error:  # an error of this scope only: the others are shown
        return ScopeRow(name, None, None, False, durability(engine, name), (*notes, str(error)))
    return ScopeRow(name, keys, taken, whole, durability(engine, name), notes)


def _measure(engine: Engine, name: str, ends: float) -> tuple[int, bool]:
    """Return the bytes of keys and values in a scope, and whether all of them were counted."""
    taken = 0
    for page in engine.pages(name, MEASURED):
        taken += sum(len(entry.key.encode()) + len(entry.json) for entry in page.entries)
        if page.cursor is not None and time.monotonic() > ends:
            return taken, False
    return taken, True


def durability(engine: Engine, scope: str) -> str:
    """Describe the durability of a scope's writes in words."""
    backend = engine._parts.backend
    if backend.store is not None:
        return backend.durability(scope)
    return "kept elsewhere" if backend.keeps else "memory"


def _notes(engine: Engine, scope: str) -> tuple[str, ...]:
    parts = engine._parts
    notes = []
    if parts._history_of(scope) is not None:
        notes.append("history")
    if engine.schema(scope) is not None:
        notes.append("schema")
    return tuple(notes)


# --------------------------------------------------------------------------------------------------------------- keys


def keys(asked: Asked) -> Answer:
    """Show the keys of a scope, a page at a time."""
    engine, scope = asked.engine, asked.name("scope")
    prefix, cursor = asked.optional("prefix"), asked.optional("cursor")
    limit = asked.number("limit", KEYS_OF_A_PAGE, MOST_KEYS_OF_A_PAGE)
    reverse = asked.query.get("order") == "desc"
    page = next(iter(engine.pages(scope, limit, prefix=prefix, cursor=cursor, reverse=reverse)))
    facts = {
        "scope": scope,
        "prefix": prefix,
        "entries": page.entries,
        "cursor": page.cursor,
        "first": cursor is None,
        "reverse": reverse,
        "limit": limit,
        "count": engine.count(scope),
        "matching": None if prefix is None else engine.count(scope, prefix=prefix),
        "durability": durability(engine, scope),
        "notes": _notes(engine, scope),
    }
    return Shown("keys.html", facts)


# -------------------------------------------------------------------------------------------------------------- entry


def entry(asked: Asked) -> Answer:
    """Show an entry with its history and, if the console may write, forms to change it."""
    scope, key = asked.name("scope"), asked.name("key")
    return entry_page(asked, scope, key, asked.engine.entry(scope, key))


def entry_page(
    asked: Asked, scope: str, key: str, found: EntryView | None, status: int | None = None, **more: Any
) -> Answer:
    """Return the page of an entry. `more` has further data for its form, such as a refused value."""
    past = history(asked.engine, scope, key, found)
    facts: dict[str, Any] = {
        "scope": scope,
        "key": key,
        "entry": found,
        "value": None if found is None else value_html(found.json),
        "cut": found is not None and len(found.json) > CUT,
        "text": "" if found is None or len(found.json) > CUT else formatted(found.json),
        "past": past.changes,
        "past_note": past.note,
        "left_s": asked.engine.ttl(scope, key),
        "conflict": None,
        "problem": None,
        **more,
    }
    return Shown("entry.html", facts, status or (200 if found is not None else 404))


def download(asked: Asked) -> Answer:
    """Return a value as a file of JSON."""
    scope, key = asked.name("scope"), asked.name("key")
    found = asked.engine.entry(scope, key)
    if found is None:
        return Shown("message.html", {"title": "No such key", "text": "There is nothing to download."}, 404)
    return Download(found.json, f"{key[:100] or 'value'}.json")
