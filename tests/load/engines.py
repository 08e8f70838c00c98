"""Fixtures that open engines for tests and see that nothing of them is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers
from reliability.living import settings

from scopestate import Engine
from scopestate.config import from_mapping

OpenEngine = Callable[..., Engine]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if an engine or one of its threads outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def open_engine(nothing_left: None, tmp_path: Path) -> Iterator[OpenEngine]:
    """Open engines by durability: `open_engine("commit", limits={...})`; those not closed yet are, at the end."""
    opened: list[Engine] = []

    def open_(durability: str = "memory", *, folder: str = "store", **sections: Any) -> Engine:
        own = ("on_error", "on_dead_letter", "adapter")
        options = {name: sections.pop(name) for name in own if name in sections}
        plain = settings(durability, tmp_path / folder, **sections)
        engine = Engine(from_mapping(plain), handle_sigterm=False, **options)
        opened.append(engine)
        return engine

    yield open_
    for engine in opened:
        engine.close()
