"""Fixtures of the tests of actors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scopestate.actors.dispatcher import ThreadDispatcher

sys.path.insert(0, str(Path(__file__).parent))  # for `import keeping`, as tests/conftest.py does for its own folder

PATIENCE_S = 60.0


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fail if one of our threads outlives its test."""
    before = set(threading.enumerate())
    yield
    ours = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("scopestate")]
    for thread in ours:
        thread.join(PATIENCE_S)
    assert [thread.name for thread in ours if thread.is_alive()] == []


@pytest.fixture
def threads(no_thread_left: None) -> Iterator[ThreadDispatcher]:
    """A dispatcher of real threads, closed at the end."""
    dispatcher = ThreadDispatcher("scopestate-test")
    yield dispatcher
    dispatcher.close()
