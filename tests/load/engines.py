"""Fixtures that open engines for tests and see that nothing of them is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability.living import PATIENCE_S, settings

from scopestate import Engine, lifecycle
from scopestate.config import from_mapping

OpenEngine = Callable[..., Engine]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if an engine or one of its threads outlives its test."""
    before = set(threading.enumerate())
    yield
    assert [engine for engine in list(lifecycle._live) if not engine.closed] == []
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 100)):
        # Looked at again and again, not joined: one that is about to start cannot be joined yet.
        left = [t.name for t in threading.enumerate() if t not in before and t.name.startswith("scopestate")]
        if not left:
            return
        pause.wait(0.01)
    raise AssertionError(f"threads are left: {left}")


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
