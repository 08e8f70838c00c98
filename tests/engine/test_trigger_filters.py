"""Triggers with filters on prefixes and on what has changed."""

from __future__ import annotations

from typing import Any

import pytest

from scopestate import Engine


@pytest.mark.parametrize("known", [True, False], ids=["a scope in memory", "a new scope"])
def test_a_scope_prefix_covers_scopes_that_are_there_and_those_that_come(engine: Engine, known: bool) -> None:
    if known:
        engine.set("orders:1", "a", 0)
    seen: list[tuple[str, str, Any]] = []
    engine.on_change(scope_prefix="orders:", prefix="a")(
        lambda event: seen.append((event.scope, event.key, event.new_value))
    )

    for scope, key in (("orders:1", "a1"), ("orders:1", "b"), ("orders", "a"), ("orders:2", "a2")):
        engine.set(scope, key, 1)
    engine.drain()

    assert seen == [("orders:1", "a1", 1), ("orders:2", "a2", 1)]


def test_the_same_value_is_no_change_for_a_trigger_that_compares(engine: Engine) -> None:
    changed: list[Any] = []
    status: list[Any] = []
    every: list[Any] = []
    engine.on_change(scope="s", only_if_changed=True)(lambda event: changed.append(event.revision))
    engine.on_change(scope="s", fields=["status"])(lambda event: status.append(event.revision))
    engine.on_change(scope="s")(lambda event: every.append(event.revision))

    engine.set("s", "k", {"status": "new", "n": 1})
    engine.set("s", "k", {"n": 1, "status": "new"})
    engine.set("s", "k", {"n": 2, "status": "new"})
    engine.set("s", "k", {"n": 2, "status": "new"})
    engine.delete("s", "k")
    engine.delete("s", "k")
    engine.drain()

    assert (changed, status, every) == ([1, 3, 5], [1, 5], [1, 2, 3, 4, 5, 6])
