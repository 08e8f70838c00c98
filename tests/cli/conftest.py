"""The command line, in this process and as a program of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Program, Run, run

from scopestate import Engine
from scopestate.server.server import Server


@pytest.fixture
def cli() -> Run:
    """Run a command in this process."""
    return run


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture
def server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the commands find by themselves."""
    with Server(engine, port=0) as server:
        monkeypatch.setenv("SCOPESTATE_URL", server.url)
        yield server


@pytest.fixture
def program() -> Iterator[type[Program]]:
    """Start commands as programs; whatever still runs at the end is killed."""
    yield Program
    for started in Program.started:
        started.end()
    Program.started.clear()
