"""Workers, functions and triggers of the engine that has the scopes.

That may be this engine, with or without a server, or another one that this engine follows or reaches through a bridge.
Then the other engine is asked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from scopestate.engine import Engine
from scopestate.errors import FunctionNotFound, ScopestateError
from scopestate.stats import Health, Stats


class Listing(NamedTuple):
    """The list that an engine returned."""

    found: list[dict[str, Any]]
    note: str
    """Why there is no list; empty if there is one."""


def workers_of(engine: Engine) -> Listing:
    """Return the workers that are connected to the server."""
    listing = _listed(engine, "engine::workers::list", "workers", {})
    if listing is None:
        return Listing([], "No server runs with this engine, so no worker can connect.")
    return listing


def functions(engine: Engine) -> list[dict[str, Any]]:
    """Return the functions that can be called, by id, including those of workers if there is a server."""
    listing = _listed(engine, "engine::functions::list", "functions", {"include_internal": True})
    if listing is None or not listing.found:
        found = [{"function_id": one["name"], "description": one.get("description")} for one in engine.functions()]
    else:
        found = listing.found
    return sorted(found, key=lambda one: str(one["function_id"]))


def triggers_elsewhere(engine: Engine) -> Listing | None:
    """Return the triggers of the other engine; None if there is no other engine."""
    if engine._parts.backend.call_elsewhere is None:
        return None
    return _listed(engine, "engine::triggers::list", "triggers", {})


class Figures(NamedTuple):
    """The figures of an engine."""

    engine: str
    """Where its scopes are, for people."""
    version: str
    stats: Stats
    health: Health


def figures_elsewhere(engine: Engine) -> Figures | str | None:
    """Return the figures of the other engine, or why it does not give them; None if there is no other engine."""
    backend = engine._parts.backend
    if backend.call_elsewhere is None:
        return None
    if (problem := backend.problem()) is not None:
        return problem  # calls would wait for the connection
    try:
        answer = msgspec.json.decode(backend.call_elsewhere("engine::metrics", b"{}") or b"null")
        stats, health = msgspec.convert(answer["stats"], Stats), msgspec.convert(answer["health"], Health)
        return Figures(str(answer["state"]), str(answer["version"]), stats, health)
    except FunctionNotFound:
        return "it has no function engine::metrics, so it is iii, or an older scopestate"
    except ScopestateError as error:
        return str(error)
    except (TypeError, KeyError, msgspec.ValidationError) as error:
        return f"its answer has another form, as of another version of scopestate ({error})"


def _listed(engine: Engine, function_id: str, field: str, payload: dict[str, Any]) -> Listing | None:
    """Call a function of the server; None if there is no server."""
    call = engine._parts.backend.call_elsewhere
    try:
        if call is None:
            answer: Any = engine.call(function_id, payload)
        else:
            answer = msgspec.json.decode(call(function_id, msgspec.json.encode(payload)) or b"null")
    except FunctionNotFound:
        return None
    except ScopestateError as error:
        return Listing([], f"Not available from the other engine: {error}" if call else str(error))
    found = answer.get(field) if isinstance(answer, dict) else None
    items = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return Listing(items, "")
