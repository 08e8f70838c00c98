"""The other processes of the benchmarks of several processes: `python -m benchmarks.sharing_load WHAT PLACE COUNT`.

`own` opens a directory, serves it over TCP as well, and prints the port. `follow` opens it and prints `ready`. Both end
when stdin does. `scopestate`, `diskcache` and `redis` print `ready`, wait for a line, make COUNT writes at PLACE (a
directory, or the URL of a server), and print what that took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diskcache
import redis

from benchmarks.harness import Pairs, make_pairs
from benchmarks.ours import on_disk
from scopestate import Engine
from scopestate.server import Server

ROOT = Path(__file__).parents[1]
SAVE_MS = 1_000


def shared(folder: str) -> dict[str, Any]:
    """Return the configuration of an engine that shares the directory `folder`."""
    return on_disk(folder, save_interval_ms=SAVE_MS)


@contextmanager
def started(what: str, place: str, count: int = 0, processes: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Run this module in processes of their own, until the block ends."""
    command = [sys.executable, "-m", "benchmarks.sharing_load", what, place, str(count)]
    with ExitStack() as stack:
        found = []
        for _ in range(processes):
            child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            found.append(stack.enter_context(child))
        yield found
        for child in found:
            assert child.stdin is not None
            child.stdin.close()


def written(what: str, place: str, count: int, processes: int) -> Sequence[dict[str, Any]]:
    """Have processes write at the same time; return what each of them prints."""
    with started(what, place, count, processes) as children:
        for child in children:
            assert line(child) == "ready"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        return [json.loads(line(child)) for child in children]


def line(child: subprocess.Popen[str]) -> str:
    """Read what a process says next."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def own(folder: str, _: int) -> None:
    """Own a directory, and serve it over TCP."""
    with Engine.from_config(shared(folder)) as engine, Server(engine, port=0) as server:
        print(server.port, flush=True)
        sys.stdin.read()


def follow(folder: str, _: int) -> None:
    """Have it open, and do nothing."""
    with Engine.from_config(shared(folder)) as engine:
        engine.get("bench", "key-0")
        print("ready", flush=True)
        sys.stdin.read()


def write_scopestate(folder: str, count: int) -> None:
    """Set in one of the engines of a directory."""
    with Engine.from_config(shared(folder)) as engine:
        scope = f"bench-{os.getpid()}"

        def write(pairs: Pairs) -> None:
            for key, value in pairs:
                engine.set(scope, key, value)

        sharing = engine.stats().sharing
        _write(write, count, role="alone" if sharing is None else sharing.role)
        sys.stdin.read()  # the owner serves on until all have written


def write_diskcache(folder: str, count: int) -> None:
    """Set in one of the caches of a directory."""
    with diskcache.Cache(folder, timeout=60) as cache:

        def write(pairs: Pairs) -> None:
            for key, value in pairs:
                cache.set(f"{os.getpid()}:{key}", value)

        _write(write, count)


def write_redis(url: str, count: int) -> None:
    """Set fields of a hash."""
    with redis.Redis.from_url(url) as client:

        def write(pairs: Pairs) -> None:
            for key, value in pairs:
                client.hset(f"bench:{os.getpid()}", key, json.dumps(value))

        _write(write, count)


def _write(write: Callable[[Pairs], object], count: int, **about: str) -> None:
    pairs = make_pairs(count)
    write(pairs[:10])
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    write(pairs)
    print(json.dumps({"taken_s": time.perf_counter() - began, **about}), flush=True)


JOBS: dict[str, Callable[[str, int], object]] = {
    "own": own,
    "follow": follow,
    "scopestate": write_scopestate,
    "diskcache": write_diskcache,
    "redis": write_redis,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
