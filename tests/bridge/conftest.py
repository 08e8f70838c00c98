"""Engines that are bridges to a second scopestate process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))

from second_engine import OpenBridge, RemoteProcess, Serve, bridge_config

from scopestate import Engine
from scopestate.server.server import Server


@pytest.fixture(scope="session")
def shared_remote() -> Iterator[RemoteProcess]:
    remote = RemoteProcess()
    yield remote
    remote.stop()


@pytest.fixture
def remote(shared_remote: RemoteProcess) -> RemoteProcess:
    """A second process with an empty engine."""
    shared_remote.fresh()
    return shared_remote


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine or one of its threads outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def open_bridge(nothing_left_behind: None) -> Iterator[OpenBridge]:
    """Open bridges: `open_bridge(url, events="remote", ...)`; closed at the end."""
    opened: list[Engine] = []

    def open_(url: str, **options: Any) -> Engine:
        engine = Engine.from_config(bridge_config(url, **options))
        opened.append(engine)
        return engine

    yield open_
    for engine in reversed(opened):
        engine.close()


@pytest.fixture
def there(nothing_left_behind: None) -> Iterator[Engine]:
    """The engine at the other end."""
    with Engine() as engine:
        yield engine


@pytest.fixture
def serve(there: Engine) -> Iterator[Serve]:
    """Serve the other engine, or another one; `serve(port=...)` again at the same address."""
    opened: list[Server] = []

    def start(engine: Engine = there, port: int = 0) -> Server:
        opened.append(Server(engine, port=port).start())
        return opened[-1]

    yield start
    for server in opened:
        server.stop()
