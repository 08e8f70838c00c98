"""A cache whose writes are under way when the process that owns its directory is killed: none of them fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from reliability.living import InThread, until, untraced_environment

from scopestate.integrations.cache import Cache
from scopestate.integrations.key_value import StateStore
from scopestate.persistence.bridge.backend import BridgeBackend

OWNER = """
import sys
from scopestate.integrations.cache import Cache

cache = Cache(sys.argv[1], durability="commit")
cache["owner"] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def owner_of(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=untraced_environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def by_threads(cache: Cache) -> dict[str, Callable[[int], None]]:
    """Return kinds of writes; each checks that it was done once, which a second time would show."""

    def counted(number: int) -> None:
        assert cache.incr("n") == number

    def counted_with_a_fraction(number: int) -> None:
        assert cache.incr("half", 0.5) == number / 2

    def added(number: int) -> None:
        assert cache.add(("add", number), number)

    def popped(number: int) -> None:
        cache.set("pop", number, 600)
        assert cache.pop("pop") == number

    def deleted(number: int) -> None:
        cache.set("delete", number)
        assert cache.delete("delete")

    def removed(number: int) -> None:
        cache.set("tagged", number, tag="t")
        assert cache.touch("tagged", 600)
        assert cache.evict("t") == 1

    def in_a_block(number: int) -> None:
        with cache.transact():
            assert cache.incr("block", default=0) == number

    def many(number: int) -> None:
        cache.set_many({("many", index): number for index in range(10)})
        cache.delete_many([("many", index) for index in range(10)])

    found = (counted, counted_with_a_fraction, added, popped, deleted, removed, in_a_block, many)
    return {one.__name__: one for one in found}


def by_tasks(cache: Cache) -> dict[str, Callable[[int], None]]:
    """Return the same by calls for asyncio."""
    aio = cache.aio

    async def counted(number: int) -> None:
        assert await aio.incr("n") == number

    async def counted_with_a_fraction(number: int) -> None:
        assert await aio.incr("half", 0.5) == number / 2

    async def added(number: int) -> None:
        assert await aio.add(("add", number), number)

    async def popped(number: int) -> None:
        await aio.set("pop", number, 600)
        assert await aio.pop("pop") == number

    async def deleted(number: int) -> None:
        await aio.set("delete", number)
        assert await aio.delete("delete")

    async def removed(number: int) -> None:
        await aio.set("tagged", number, tag="t")
        assert await aio.touch("tagged", 600)
        assert await aio.evict("t") == 1

    async def in_a_block(number: int) -> None:
        async with aio.transact():
            assert await aio.incr("block", default=0) == number

    async def many(number: int) -> None:
        await aio.set_many({("many", index): number for index in range(10)})
        await aio.delete_many([("many", index) for index in range(10)])

    found = (counted, counted_with_a_fraction, added, popped, deleted, removed, in_a_block, many)
    return {one.__name__: lambda number, one=one: asyncio.run(one(number)) for one in found}  # type: ignore[misc]


def by_store(cache: Cache) -> dict[str, Callable[[int], None]]:
    """Return writes of the store for py-key-value, and the number of them, which the cache has."""
    store = StateStore(cache.engine)

    async def counted(number: int) -> None:
        await store.put("n", {"n": number}, ttl=600)
        assert await store.delete("n")

    def counting(number: int) -> None:
        asyncio.run(counted(number))
        cache.set("n", number)

    return {"counted": counting}


@pytest.mark.parametrize("calls", [by_threads, by_tasks])
def test_writes_of_all_kinds_are_made_once(
    tmp_path: Path, calls: Callable[[Cache], dict[str, Callable[[int], None]]]
) -> None:
    directory = tmp_path / "cache"
    with owner_of(directory) as owner, Cache(directory, durability="commit") as cache:
        assert cache["owner"] == 1
        over = threading.Event()
        kinds = calls(cache)
        begun, done = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)

        def repeat(name: str) -> None:
            while not over.is_set():
                begun[name] += 1
                kinds[name](begun[name])
                done[name] += 1

        threads = [InThread(lambda name=name: repeat(name)) for name in kinds]  # type: ignore[misc]
        until(lambda: min(done.values()) >= 3, "a few writes of each kind")
        seen = dict(done)
        os.kill(owner.pid, signal.SIGKILL)
        until(lambda: all(done[name] >= seen[name] + 3 for name in kinds), "more of them, which this process makes")
        over.set()
        for thread in threads:
            thread.result()

        sharing = cache.engine.stats().sharing
        assert sharing is not None
        assert (sharing.role, sharing.taken_over) == ("owner", True)
        assert (cache["n"], cache["block"]) == (done["counted"], done["in_a_block"])
        assert cache["half"] == done["counted_with_a_fraction"] / 2


@pytest.mark.parametrize("calls", [by_threads, by_tasks, by_store])
def test_a_write_that_the_owner_has_got_and_not_answered_is_sent_to_the_next_one(
    tmp_path: Path, calls: Callable[[Cache], dict[str, Callable[[int], None]]]
) -> None:
    directory = tmp_path / "cache"
    with owner_of(directory) as owner, Cache(directory, durability="commit") as cache:
        backend = cache.engine._parts.backend
        assert isinstance(backend, BridgeBackend)
        count, over, done = calls(cache)["counted"], threading.Event(), [0]

        def repeat() -> None:
            while not over.is_set():
                count(done[0] + 1)
                done[0] += 1

        thread = InThread(repeat)
        until(lambda: done[0] >= 3, "a few writes")
        os.kill(owner.pid, signal.SIGSTOP)
        until(lambda: bool(backend.owner._under_way), "a write is under way")
        os.kill(owner.pid, signal.SIGKILL)
        seen = done[0]
        until(lambda: done[0] >= seen + 3, "more of them, which this process makes")
        over.set()
        thread.result()

        assert cache["n"] == done[0]
