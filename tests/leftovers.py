"""Finds what tests must not leave behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from scopestate import lifecycle

PATIENCE_S = 60.0


@contextmanager
def no_leftovers() -> Iterator[None]:
    """Fail if an engine, or a thread of an engine or a server, outlives the block."""
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
