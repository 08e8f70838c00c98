"""Engines with a console for the tests, and nothing may be left of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import no_leftovers

from scopestate import Engine

sys.path.insert(0, str(Path(__file__).parent))  # for `import visitors`

from visitors import Visitor, visit


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine, or a thread of an engine, outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as made:
        yield made


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Engine]:
    """An engine with a store, and a history of the scope `users`."""
    options = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "share": "never"}
    config = {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}],
        "scopes": [{"name": "users", "history": {}}],
    }
    with Engine.from_config(config) as made:
        yield made


@pytest.fixture
def reader(engine: Engine) -> Iterator[Visitor]:
    visitor = visit(engine)
    with visitor.client:
        yield visitor


@pytest.fixture
def writer(engine: Engine) -> Iterator[Visitor]:
    visitor = visit(engine, write=True)
    with visitor.client:
        yield visitor
