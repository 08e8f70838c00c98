"""What makes saving and loading fast, as counts instead of seconds.

Each statement gives the interpreter up and waits to get it back, up to 5 ms beside a CPU-bound thread
(docs/design/0006-durability.md).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from stored import change, values_of

from scopestate.persistence import FileAdapter, ScopeChange
from scopestate.persistence.sqlite import answers, rows

Open = Callable[..., FileAdapter]


class Faults(Protocol):
    """The `faults` fixture of conftest.py."""

    statements: list[str]

    def connect(self, uri: str) -> sqlite3.Connection: ...


def many(scopes: int, keys: int, value: bytes | None, *, created: bool) -> list[ScopeChange]:
    names = [f"k{number}" for number in range(keys)]
    positions = {name: place for place, name in enumerate(names, 1)} if created else {}
    return [change(f"s{number}", keys, dict.fromkeys(names, value), dict(positions)) for number in range(scopes)]


@pytest.mark.parametrize(("scopes", "keys"), [(1, 20_000), (20, 1_000), (20_000, 1)])
def test_20_000_changes_take_few_statements(open_file: Open, faults: Faults, scopes: int, keys: int) -> None:
    adapter = open_file(connect=faults.connect)
    for batch in (
        many(scopes, keys, b"1", created=True),
        many(scopes, keys, b"2", created=False),
        many(scopes, keys, None, created=False),
    ):
        faults.statements.clear()
        adapter.save(batch)
        assert len(faults.statements) < 200


def test_listing_and_loading_take_few_statements(open_file: Open, faults: Faults) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([*many(5_000, 1, b"1", created=True), *many(1, 900, b"1", created=True)])
    adapter.load("s1")

    faults.statements.clear()
    assert len(adapter.scopes()) == 5_000
    assert len(faults.statements) < 10

    faults.statements.clear()
    assert len(values_of(adapter.load("s0"))) == 900
    assert len(faults.statements) == 1


def test_no_statement_scans_a_table(open_file: Open) -> None:
    """One changed key, or one loaded scope, costs the same in a store of any size."""
    adapter = open_file()
    adapter.close()
    connection = sqlite3.connect(adapter.path)
    page = {"scope": "s", "after": 1 << 24, "limit": 1}
    statements: dict[str, Any] = {
        rows._PAGE: page,
        rows._PLAIN: page,
        rows._NAMES_NEXT: {"after": "s", "empty": False, "limit": 1},
        rows._PLACES[4]: ("a",) * 4,
        rows._DELETE[4]: (1,) * 4,
        rows._DUE: (1,),
        answers._PAGE: {**page, "after": "a"},
        answers._PLAIN: {**page, "after": "a"},
        answers._DROP[4]: (1, "a") * 4,
    }

    for statement, parameters in statements.items():
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        scans = ("SCAN state", "SCAN scopes", "SCAN answers", "USE TEMP B-TREE")
        assert not [step for step in plan if step.startswith(scans)], plan
        assert any(step.startswith("SEARCH") for step in plan)
    connection.close()
