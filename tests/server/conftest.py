"""Servers for the tests: on a free port, on a thread of their own, and nothing may be left of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))  # for `import raw, sdks, serving`

from raw import RawWorker
from sdks import SdkWorker
from serving import OpenRaw, OpenSdk, OpenServer, server_config

from scopestate import Engine
from scopestate.server.server import Server


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine, or a thread of an engine or a server, outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def engine(nothing_left_behind: None) -> Iterator[Engine]:
    """An engine in memory."""
    with Engine() as engine:
        yield engine


@pytest.fixture
def open_server(engine: Engine) -> Iterator[OpenServer]:
    """Start servers: `open_server(call_timeout_ms=100, ...)` as in the `iii-worker-manager` entry."""
    opened: list[Server] = []

    def open_(**config: Any) -> Server:
        config.setdefault("port", 0)
        server = Server(config.pop("engine", engine), config=server_config(config)).start()
        opened.append(server)
        return server

    yield open_
    for server in reversed(opened):
        server.stop()


@pytest.fixture
def server(open_server: OpenServer) -> Server:
    """A server on a free port of this machine."""
    return open_server()


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[OpenRaw]:
    """Connect raw workers: `connect()` to the server of this test, `connect(other_server)` to another one."""
    opened: list[RawWorker] = []

    def open_(to: Server | None = None, **options: Any) -> RawWorker:
        worker = RawWorker((to or request.getfixturevalue("server")).url, **options)
        opened.append(worker)
        return worker

    yield open_
    for worker in opened:
        worker.close()


@pytest.fixture
def start_sdk(request: pytest.FixtureRequest) -> Iterator[OpenSdk]:
    """Start workers on the official SDKs: `start_sdk("node-0.11.6")`."""
    started: list[SdkWorker] = []

    def start(sdk: str, to: Server | None = None, **options: Any) -> SdkWorker:
        worker = SdkWorker(sdk, (to or request.getfixturevalue("server")).url, **options)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.kill()
