"""The behaviour of a scope without concurrent calls, for the checker: simple, and independent of the engine's code."""

from __future__ import annotations

import json
from typing import Any

from linearizability.checker import Call

State = tuple[tuple[str, str], ...]
"""(key, value as JSON text), in first-insertion order: docs/reference/semantics.md section 1."""

Ops = tuple[tuple[str, Any], ...]
"""("increment", by), ("append", value), ("merge", object), ("set", value): all of them at the root."""

MISSING = "missing"
"""Used instead of JSON text if the key has no value. This word is not JSON text."""


def text_of(value: object) -> str:
    """Return JSON text that is the same for equal values, and different for 1, 1.0 and true."""
    return json.dumps(value, sort_keys=True)


class ScopeModel:
    """One scope: set, get, delete, update, list, and whether `list_groups` names it."""

    def __init__(self, initial: State = ()) -> None:
        self.initial = initial

    def step(self, state: State, call: Call) -> State | None:
        """Return the state after `call`, or None if its result does not fit."""
        after, result = self.apply(state, call.name, call.arguments)
        return after if not call.certain or result == call.result else None

    @staticmethod
    def apply(state: State, name: str, arguments: tuple[Any, ...]) -> tuple[State, Any]:
        """Return the state after a call, and its result."""
        values = dict(state)
        key = arguments[0] if arguments else ""
        old = values.get(key, MISSING)
        match name:
            case "get":
                return state, old
            case "list":
                return state, tuple(values.values())
            case "in_groups":
                return state, bool(values)
            case "set":
                values[key] = arguments[1]
                return tuple(values.items()), (old, arguments[1])
            case "delete":
                values.pop(key, None)
                return tuple(values.items()), old
            case "update":
                values[key] = new = updated(old, arguments[1])
                return tuple(values.items()), (old, new)
        raise ValueError(name)


def updated(old: str, ops: Ops) -> str:
    """Return the value after `ops`. An op that does not fit changes nothing (docs/reference/semantics.md section 3)."""
    fresh = old == MISSING
    value: Any = {} if fresh else json.loads(old)
    for kind, operand in ops:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        match kind:
            case "set":
                value = operand
            case "increment" if fresh or is_number:
                value = operand if fresh else value + operand
            case "append" if fresh or value is None:
                value = operand if isinstance(operand, str) else [operand]
            case "append" if isinstance(value, list):
                value = [*value, operand]
            case "append" if isinstance(value, str) and isinstance(operand, str):
                value += operand
            case "merge" if isinstance(value, dict):
                value = {**value, **operand}
            case "merge":
                pass
            case _:
                continue
        fresh = False
    return text_of(value)
