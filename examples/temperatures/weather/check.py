"""Comparing what the engine holds with what it must hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from scopestate import Engine
from weather.expected import Expected


def differences(engine: Engine, expected: Expected, *, besides: frozenset[str] = frozenset()) -> list[str]:
    """Return one line for each difference; [] if the engine holds `expected` and nothing else.

    `besides` names scopes that are there too and are not looked at.
    """
    return list(_differences(engine, expected, besides))


def _differences(engine: Engine, expected: Expected, besides: frozenset[str]) -> Iterator[str]:
    found = set(engine.list_groups())
    for scope in sorted(found ^ (expected.keys() | besides)):
        yield f"scope {scope} is there and should not be" if scope in found else f"scope {scope} is missing"
    for scope, keys in expected.items():
        count = len(engine.list(scope))
        if count != len(keys):
            yield f"scope {scope} holds {count} keys, expected {len(keys)}"
        for key, value in keys.items():
            wanted, held = _plain(scope, value), _plain(scope, engine.get(scope, key))
            if held != wanted:
                yield f"{scope} {key} is {held:.200}, expected {wanted:.200}"


def _plain(scope: str, value: Any) -> str:
    """Return the value as text, in which 1, 1.0 and true differ, and which knows no order among an object's fields."""
    if scope == "alerts" and isinstance(value, dict):
        # Writers race each other through the year, so days may become hot in another order than they have in it.
        value = {station: sorted(days, key=json.dumps) for station, days in value.items()}
    return json.dumps(value, sort_keys=True)
