"""Engines and processes that share a directory."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))

from processes import Process, shared

from scopestate import Engine


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if an engine or one of its threads outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def open_engine(nothing_left: None, directory: Path) -> Iterator[Callable[..., Engine]]:
    """Open engines on the directory in this process: the first one owns it, the others follow. Closed at the end."""
    opened: list[Engine] = []

    def open_(**options: Any) -> Engine:
        hooks = {name: options.pop(name) for name in ("on_error", "on_dead_letter") if name in options}
        engine = Engine.from_config(shared(directory, **options), handle_sigterm=False, **hooks)
        opened.append(engine)
        return engine

    yield open_
    for engine in reversed(opened):
        engine.close()


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Process]]:
    """Start processes with an engine on the directory: `start(wait=False, share="never", ...)`; ended at the end."""
    started: list[Process] = []

    def start_(**options: Any) -> Process:
        process = Process(directory, **options)
        started.append(process)
        return process

    yield start_
    for process in started:
        with contextlib.suppress(OSError):
            process.send(signal.SIGCONT)
        process.kill()


@pytest.fixture
def following(open_engine: Callable[..., Engine]) -> Engine:
    """An engine that follows another one of this process."""
    open_engine()
    engine = open_engine()
    status = engine.stats().sharing
    assert status is not None
    assert status.role == "follower"
    return engine
