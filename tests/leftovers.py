"""Finds what tests must not leave behind."""

from __future__ import annotations

import threading
import time
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
    pause, pause_s = threading.Event(), 0.0002
    deadline = time.monotonic() + PATIENCE_S
    # Looked at again and again, not joined: one that is about to start cannot be joined yet. One that is at its end is
    # gone after a moment, which a fixed pause of 10 ms would make the longest part of most tests.
    while left := [t.name for t in threading.enumerate() if t not in before and t.name.startswith("scopestate")]:
        assert time.monotonic() < deadline, f"threads are left: {left}"
        pause.wait(pause_s)
        pause_s = min(2 * pause_s, 0.01)
