"""The cache with the calls of diskcache, in memory, in a directory, and through the owner of one."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache
import pytest
from cache_behaviour import CacheBehaviour
from forking import beside_threads
from reliability.living import PATIENCE_S, untraced_environment

from scopestate import Engine
from scopestate.errors import ConfigError, Conflict, DeserializationError, Overloaded, StorageError
from scopestate.integrations.cache import Cache, CacheStats


def file_config(folder: Path) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


@pytest.fixture(params=["memory", "directory", "engine", "follower"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    match request.param:
        case "memory":
            with Cache() as cache:
                yield cache
        case "directory":
            with Cache(tmp_path / "cache") as cache:
                yield cache
        case "engine":
            with Engine() as engine:
                yield Cache(engine, scope="other")
        case "follower":
            with Engine.from_config(file_config(tmp_path)), Engine.from_config(file_config(tmp_path)) as follower:
                yield Cache(follower)


class TestCache(CacheBehaviour):
    """Each of them, in each place."""


class Driven:
    """A cache whose calls are those for asyncio, each on an event loop of its own."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        if name in {"memoize", "transact", "engine", "scope", "stats", "iterkeys"}:
            return getattr(self._cache, name)
        call = getattr(self._cache.aio, name)
        return lambda *args, **kwargs: asyncio.run(call(*args, **kwargs))

    def __getitem__(self, key: Any) -> Any:
        found = self.get(key, self)
        if found is self:
            raise KeyError(key)
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Any) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        return bool(self.contains(key))

    def __len__(self) -> int:
        return int(self.count())

    def __iter__(self) -> Iterator[Any]:
        return iter(asyncio.run(self._keys(reverse=False)))

    def __reversed__(self) -> Iterator[Any]:
        return iter(asyncio.run(self._keys(reverse=True)))

    async def _keys(self, *, reverse: bool) -> list[Any]:
        aio = self._cache.aio
        return [key async for key in (aio.iterkeys(reverse=True) if reverse else aio)]


class TestAioCache(CacheBehaviour):
    """Each of them, by the calls for asyncio. Calls within a block of `transact` are those of asyncio too."""

    @pytest.fixture
    def cache(self, cache: Cache) -> Driven:
        return Driven(cache)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache", statistics=True) as cache:
        yield cache


def test_the_same_calls_as_diskcache_give_the_same(tmp_path: Path, opened: Cache) -> None:
    rng = random.Random(14)
    keys = ["a", b"a", 1, 2.5, "1", -7]
    values = ["text", b"bytes", 5, 2.5, "x" * 40_000]
    with diskcache.Cache(str(tmp_path / "peer"), statistics=1) as peer:
        for _ in range(600):
            key, value, tag = rng.choice(keys), rng.choice(values), rng.choice([None, "x", 5])
            call = rng.choice(_calls(key, value, tag))
            assert _answer(call, opened) == _answer(call, peer)
        assert opened.stats(reset=True) == peer.stats(reset=True)
        assert opened.clear() == peer.clear()


def _calls(key: Any, value: Any, tag: Any) -> list[Callable[[Any], Any]]:
    return [
        lambda c: c.get(key, "none"),
        lambda c: c.get(key, tag=True),
        lambda c: c.set(key, value, tag=tag),
        lambda c: c.set(key, value, expire=600, tag=tag),
        lambda c: c.add(key, value, tag=tag),
        lambda c: c.pop(key, "none"),
        lambda c: c.pop(key, tag=True),
        lambda c: c.touch(key, 600),
        lambda c: c.delete(key),
        lambda c: c[key],
        lambda c: c.__delitem__(key) and None,  # diskcache returns True
        lambda c: c.incr(key, 3),
        lambda c: c.decr(key, 2, default=10),
        lambda c: c.incr(key, default=None),
        lambda c: key in c,
        len,
        lambda c: {repr(each) for each in c},
        lambda c: c.evict("x"),
        lambda c: c.get(key, expire_time=True)[1] is None,
    ]


def _answer(call: Callable[[Any], Any], cache: Any) -> Any:
    """Return what a call returns, or the class of what it raises."""
    try:
        return call(cache)
    except (KeyError, TypeError) as error:
        return type(error)


def test_counting_can_begin_and_end(opened: Cache) -> None:
    opened["k"] = 1
    assert (opened.get("k"), opened.get("k"), opened.get("none"), opened.get("k", tag=True)) == (1, 1, None, (1, None))
    assert opened.stats(enable=False) == CacheStats(hits=3, misses=1)
    opened.get("k")
    assert opened.stats() == (0, 0)
    opened.get("k")
    assert opened.stats(reset=True) == (1, 0)
    assert opened.stats() == (0, 0)


def test_the_entries_outlive_the_cache_and_its_calls_open_it_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert repr(cache) == f"<Cache 'cache' in {tmp_path / 'cache'}>"
    cache["k"] = (1, b"x")
    cache.close()
    cache.close()
    assert cache["k"] == (1, b"x")
    with cache, cache:
        engine = cache.engine
        assert cache["k"] == (1, b"x")
    assert engine.closed
    cache.close()


def test_caches_of_one_directory_share_an_engine(tmp_path: Path) -> None:
    one, other = Cache(tmp_path / "cache"), Cache(str(tmp_path / "x" / ".." / "cache"), scope="other")
    assert one.engine is other.engine
    one["k"], other["k"] = 1, 2
    one.close()
    assert other["k"] == 2
    with pytest.raises(ConfigError, match="give both the same"):
        Cache(tmp_path / "cache", durability="commit").get("k")
    other.close()
    with Cache(tmp_path / "cache", durability="commit") as third:
        assert (third["k"], third.set("k", 3)) == (1, True)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with Engine() as engine:
        assert repr(Cache(engine)) == "<Cache 'cache' in an engine>"
        assert Cache(engine).directory is None
        with Cache(engine) as cache:
            cache["k"] = 1
        assert not engine.closed
        with pytest.raises(ConfigError, match="an engine has its own"):
            Cache(engine, durability="commit")
    with pytest.raises(ConfigError, match="in memory"):
        Cache(save_interval_ms=5)
    with pytest.raises(DeserializationError, match="`max_entries` is a whole number"):
        Cache(max_entries=0)
    with pytest.raises(TypeError, match="sent to another process"):
        pickle.dumps(Cache())


def test_a_cache_can_be_sent_to_another_process(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache", scope="other", size_limit=None, max_entries=5) as cache:
        cache["k"] = 1
        copy = pickle.loads(pickle.dumps(cache))
        assert copy["k"] == 1
        assert (copy.scope, copy.directory) == (cache.scope, cache.directory)
        copy.close()
        assert cache["k"] == 1


def test_a_forked_child_opens_the_directory_of_its_parent(tmp_path: Path) -> None:
    with Cache(tmp_path / "cache") as cache:
        cache["parent"] = 1
        with beside_threads():
            child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if (cache.incr("child"), cache["parent"]) == (1, 1) else 2
                cache.close()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert cache["child"] == 1


def test_a_forked_child_waits_for_nothing_that_a_thread_of_its_parent_does(tmp_path: Path) -> None:
    """A block, a walk over the entries, a count of hits, and a computation that other threads have begun."""
    here, on = threading.Barrier(2), threading.Event()
    with Cache(tmp_path / "cache", max_entries=10, statistics=True) as cache, ThreadPoolExecutor(3) as pool:

        def hold() -> int:
            here.wait(PATIENCE_S)
            assert on.wait(PATIENCE_S)
            return 0

        @cache.memoize()
        def compute() -> int:
            return hold() if threading.current_thread() is not threading.main_thread() else 5

        def block() -> None:
            with cache.transact():
                hold()

        def walk() -> None:
            assert counts is not None
            assert cache._limits.begin(counts)
            counts._exclusive.run(hold)

        counts = cache._counts
        working = []
        for work in (compute, block, walk):
            working.append(pool.submit(work))
            here.wait(PATIENCE_S)
        cache.engine.delete_range("cache:leases", prefix="")  # or the child would wait for that, as any process does
        with beside_threads():
            child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(int(PATIENCE_S))
                with cache.transact() as inside:
                    inside["block"] = 1
                for n in range(20):
                    cache[n] = n
                status = 0 if (compute(), cache.stats().hits, len(cache) < 20) == (5, 0, True) else 2
                cache.close()
            finally:
                os._exit(status)
        on.set()
        for one in working:
            one.result()
        assert os.waitpid(child, 0)[1] == 0


def test_a_block_whose_with_statement_was_cut_off_holds_up_nothing() -> None:
    """As a signal handler may do from CPython 3.14 on: it raises before the block of the statement is entered."""
    with Cache() as cache, ThreadPoolExecutor(1) as pool:
        block = cache.transact()
        inside = block.__enter__()
        inside["a"] = 1
        del block

        cache["b"] = 2
        assert (cache.engine.get("cache", "b"), "a" in cache) == (2, False)
        pool.submit(cache.transact, lambda: cache.incr("b")).result(PATIENCE_S)
        with pytest.raises(DeserializationError, match="has ended"):
            inside.get("a")


def test_an_interrupt_while_a_block_begins_or_ends_leaves_its_turn_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(BaseException):
        pass

    def cut(*_: object) -> None:
        raise Cut

    with Cache() as cache, ThreadPoolExecutor(1) as pool:
        for what in ("_runs_loop", "CacheTransaction._commit"):
            with monkeypatch.context() as patch:
                patch.setattr(f"scopestate.integrations.cache.transaction.{what}", cut)
                with pytest.raises(Cut), cache.transact() as inside:
                    inside["a"] = 1
            assert pool.submit(cache.transact, lambda: cache.incr("n")).result(PATIENCE_S)
        assert "a" not in cache


def test_the_oldest_entries_go_first(tmp_path: Path) -> None:
    with Cache(max_entries=100, size_limit=None) as cache:
        for number in range(100):
            cache[number] = number
        cache[0] = "stored again"
        for number in range(100, 150):
            cache.add(number, number)
        assert 90 <= len(cache) <= 113
        assert 0 in cache
        assert 1 not in cache
        assert 149 in cache
        assert cache.cull() == max(0, 0 if len(cache) <= 100 else len(cache) - 90)
    with Cache(size_limit=100_000) as cache:
        for number in range(100):
            cache[number] = "x" * 3_000
        assert 80_000 < cache.volume() < 115_000
        assert 99 in cache
        with cache.transact():
            cache["large"] = "y" * 99_000
        assert cache.volume() < 100_000
    with Cache(size_limit=None) as cache:
        cache[0] = 1
        assert cache.cull() == 0


def test_what_is_stored_again_while_the_oldest_go_stays() -> None:
    with Cache(max_entries=10, size_limit=None) as cache:
        entries = [(cache.set(number, 1), cache.engine.entry("cache", f"~{number}"))[1] for number in range(5)]
        cache[3] = "newer"
        assert cache._remove([entry for entry in entries if entry is not None]) == 4
        assert list(cache) == [3]


def test_a_write_is_made_though_the_limits_cannot_be_looked_after(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Cache, **options: Any) -> None:
        raise StorageError("the disk is full")

    with Cache(max_entries=1) as cache:
        monkeypatch.setattr(Cache, "_entries", fail)
        for number in range(5):
            assert cache.set(number, number)
        assert cache[4] == 4
        with pytest.raises(StorageError):
            cache.cull()
    assert "could not be culled: the disk is full" in caplog.text


def test_calls_outside_of_a_block_see_nothing_of_it_and_a_block_is_used_once() -> None:
    with Cache() as cache:
        block = cache.transact()
        with block as inside:
            inside["a"] = 1
            assert "a" in inside
            assert inside.decr("a") == 0
        assert cache["a"] == 0
        with pytest.raises(DeserializationError, match="has ended"):
            inside.get("a")
        with pytest.raises(DeserializationError, match="call `transact"):
            block.__enter__()
        with pytest.raises(KeyError):
            inside_of(cache)


def inside_of(cache: Cache) -> None:
    with cache.transact() as inside:
        _ = inside["missing"]


def test_blocks_of_threads_wait_for_one_another() -> None:
    with Cache() as cache, ThreadPoolExecutor(8) as pool:

        def count(_: int) -> None:
            for _ in range(25):
                with cache.transact():
                    cache["n"] = cache.get("n", 0) + 1

        list(pool.map(count, range(8)))
        assert cache["n"] == 200


def test_a_block_that_waits_too_long_for_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scopestate.integrations.cache.transaction._LONGEST_S", 0.01)
    refused = pytest.raises(Overloaded, match="nothing was done")
    with Cache() as cache, ThreadPoolExecutor(1) as pool, cache.transact(), refused:
        pool.submit(inside_of, cache).result(30)


def test_blocks_of_tasks_do_not_stop_the_event_loop() -> None:
    with Cache() as cache:

        async def count() -> None:
            while True:
                try:
                    with cache.transact():
                        found = cache.get("n", 0)
                        await asyncio.sleep(0)
                        cache["n"] = found + 1
                except Conflict:
                    continue
                return

        async def main() -> None:
            await asyncio.gather(*[count() for _ in range(5)])

        asyncio.run(main())
        assert cache["n"] == 5


def test_a_function_whose_block_conflicts_without_end_raises_conflict() -> None:
    with Cache() as cache:

        def always() -> None:
            cache.get("n")
            cache.engine.set("cache", "n", 1)

        with pytest.raises(Conflict):
            cache.transact(always)


def test_one_process_computes_and_another_waits_for_it(tmp_path: Path) -> None:
    """Two processes with the same directory call the function at once; the files say which of them computed."""
    script = tmp_path / "app.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "from scopestate.integrations.cache import Cache\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "cache = Cache(folder / 'cache')\n"
        "@cache.memoize(name='slow')\n"
        "def slow():\n"
        "    (folder / f'computed-{os.getpid()}').touch()\n"
        "    ends = time.monotonic() + 30\n"
        "    while len(list(folder.glob('asks-*'))) < 2 and time.monotonic() < ends:\n"
        "        time.sleep(0.01)\n"
        "    return os.getpid()\n"
        "cache.get('opened')\n"
        "(folder / f'asks-{os.getpid()}').touch()\n"
        "print(slow(), flush=True)\n"
        "sys.stdin.read()\n"  # the owner serves the other one until both have answered
        "cache.close()\n",
        encoding="utf-8",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=untraced_environment(),
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        answers = {process.stdout.readline() for process in processes if process.stdout is not None}
        assert len(answers) == 1, answers
        assert len(list(tmp_path.glob("computed-*"))) == 1
    finally:
        for process in processes:
            process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]


def test_a_block_shows_which_cache_it_is_of() -> None:
    with Cache() as cache:
        with cache.transact() as inside:
            assert repr(inside) == "<transaction of <Cache 'cache' in memory>>"
        assert repr(inside) == "<transaction of <Cache 'cache' in memory>, ended>"
        assert repr(cache.transact()) == "<block of <Cache 'cache' in memory>>"
