"""The page on compatibility with iii says what the conformance cases compare."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility import TABLES

from scopestate.ops.functions import BUILT_IN

(PAGE,) = (Path(__file__).parents[1] / "docs").rglob("compatibility.md")


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_of_the_cases(name: str) -> None:
    table = TABLES[name]()

    # A failure shows the table to put into the page; `python -m tests.compatibility` prints all of them.
    assert table in PAGE.read_text(encoding="utf-8"), f"{PAGE} lacks this:\n{table}"


def test_the_page_names_each_function_of_the_state_once() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert {name: text.count(f"`{name}`") for name in BUILT_IN if text.count(f"`{name}`") != 1} == {"state::update": 2}
