"""Servers for the tests: shared ones for those that leave them whole, own ones for the others, and nothing left over.

`redis_server` runs a test once with each server program of this machine; `valkey` with the one that is always there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))  # for `import servers`

from servers import BINARIES, LIVING, VALKEY, Binary, Cluster, Server, StartServer


class SharedServers:
    """One server for each program, started when it is first wanted; another one if a test has ended it."""

    def __init__(self) -> None:
        self._servers: dict[Binary, Server] = {}

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers.values())

    def fresh(self, binary: Binary) -> Server:
        """Return the program's server, emptied."""
        server = self._servers.get(binary)
        if server is None or not server.running:
            self.close(binary)
            server = self._servers[binary] = Server(binary)
        server.resume()
        server.fresh()
        return server

    def close(self, binary: Binary) -> None:
        if binary in self._servers:
            self._servers.pop(binary).close()


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[SharedServers]:
    shared = SharedServers()
    yield shared
    for binary in BINARIES:
        shared.close(binary)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_left_behind(shared_servers: SharedServers) -> Iterator[None]:
    """Fail if an engine, a thread of one, or a server of its own outlives a test."""
    before = set(LIVING)
    with no_leftovers():
        yield
    left = LIVING - before - set(shared_servers)
    for server in left:
        server.close()
    assert not left, f"servers are left: {left}"


@pytest.fixture(params=BINARIES, ids=lambda binary: binary.name)
def server_binary(request: pytest.FixtureRequest) -> Binary:
    """Each server program of this machine in turn."""
    binary: Binary = request.param
    return binary


@pytest.fixture
def redis_server(nothing_left_behind: None, shared_servers: SharedServers, server_binary: Binary) -> Server:
    """An empty server that others use too, once for each program: leave its settings alone, and do not end it."""
    return shared_servers.fresh(server_binary)


@pytest.fixture
def valkey(nothing_left_behind: None, shared_servers: SharedServers) -> Server:
    """An empty server that others use too: leave its settings alone, and do not end it."""
    return shared_servers.fresh(VALKEY)


@pytest.fixture
def start_server(nothing_left_behind: None) -> Iterator[StartServer]:
    """Start servers that the test may treat as it likes: `start_server(VALKEY, persistent=True, ...)`."""
    with ExitStack() as started:

        def start(binary: Binary = VALKEY, **options: Any) -> Server:
            return started.enter_context(Server(binary, **options))

        yield start


@pytest.fixture
def cluster(shared_cluster: Cluster, nothing_left_behind: None) -> Cluster:
    """An empty cluster of three, each slot with its first owner, that others use too: move slots, but end no node."""
    shared_cluster.fresh()
    return shared_cluster
