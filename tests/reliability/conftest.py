"""Engines for the reliability tests: closed at the end, and nothing may be left of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers
from reliability.living import settings
from reliability.mortal import Mortal
from reliability.slow import SlowDisk

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
    """Open engines by durability: `open_engine("commit", limits={...})`; the ones not closed yet are, at the end."""
    opened: list[Engine] = []

    def open_(durability: str = "memory", *, folder: str = "store", **sections: Any) -> Engine:
        hooks = {name: sections.pop(name) for name in ("on_error", "on_dead_letter") if name in sections}
        engine = Engine.from_config(settings(durability, tmp_path / folder, **sections), **hooks)
        opened.append(engine)
        return engine

    yield open_
    for engine in reversed(opened):
        engine.close()


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    """A process whose children are killed."""
    started = Mortal()
    yield started
    try:
        started.end()
    except subprocess.TimeoutExpired:
        started.process.kill()
        started.process.communicate()


@pytest.fixture
def slow_disk(nothing_left: None, tmp_path: Path) -> Iterator[tuple[Engine, SlowDisk]]:
    """An engine on commit."""
    disk = SlowDisk(tmp_path / "store")
    engine = Engine(from_mapping(settings("commit", tmp_path / "store")), adapter=disk)
    yield engine, disk
    engine.close()
