"""Calls of another process's engine: by a bridge over TCP, and by an engine that follows in the same directory.

Compared with redis-py on loopback, which does about as little as a client can, and for several processes with
diskcache.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory

import redis
import redis.asyncio

from benchmarks.harness import (
    Batch,
    Measure,
    Pairs,
    Row,
    Sizes,
    Value,
    in_threads,
    latencies,
    make_pairs,
    percentile,
)
from benchmarks.ours import set_batch, setter
from benchmarks.redis_load import redis_server
from benchmarks.sharing_load import line, shared, started, written
from scopestate import Engine

TASKS = 64
PROCESSES = 4
WAYS = {"bridge": "bridge over TCP", "follower": "follower"}


@contextmanager
def _others() -> Iterator[dict[str, Engine]]:
    """Engines that reach the same engine of another process, one in each way."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        (owner,) = stack.enter_context(started("own", folder))
        url = f"ws://127.0.0.1:{line(owner)}"
        adapter = {"name": "bridge", "config": {"bridge_url": url}}
        bridge = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
        yield {
            "bridge": stack.enter_context(Engine.from_config(bridge)),
            "follower": stack.enter_context(Engine.from_config(shared(folder))),
        }


def _in_turn(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Return the medians of both, and of the ratios of neighbours."""
    ours(), theirs()
    samples = [(ours(), theirs()) for _ in range(repeats)]
    return (
        statistics.median(mine for mine, _ in samples),
        statistics.median(peer for _, peer in samples),
        statistics.median(mine / peer for mine, peer in samples),
    )


def remote_one(sizes: Sizes) -> list[Row]:
    """One caller gets and sets, beside redis-py's HSET."""
    pairs = make_pairs(sizes.slow_calls)
    texts = {key: json.dumps(value) for key, value in pairs}
    rows = []
    with redis_server() as url, redis.Redis.from_url(url) as client, _others() as engines:

        def hset(key: str, _: Value) -> object:
            return client.hset("theirs", key, texts[key])

        def p50(call: Callable[[str, Value], object]) -> float:
            return percentile(latencies(call, pairs), 0.5)

        for way, engine in engines.items():
            calls: dict[str, Callable[[str, Value], object]] = {
                "set": setter(engine, "one"),
                "get": partial(_get, engine),
            }
            for name, call in calls.items():
                mine, peer, ratio = _in_turn(partial(p50, call), partial(p50, hset), sizes.repeats)
                rows.append(
                    Row(
                        f"{way}_{name}",
                        f"{WAYS[way]}: {name}, one caller, p50 / redis-py HSET",
                        ratio,
                        "x",
                        1.5,
                        figures={"ours_us": mine * 1e6, "hset_us": peer * 1e6},
                        own="ours_us",
                    )
                )
    return rows


def _get(engine: Engine, key: str, _: Value) -> object:
    return engine.get("one", key)


def remote_tasks(sizes: Sizes) -> list[Row]:
    """Tasks of one event loop set, beside redis.asyncio on a pool with a connection for each of them."""
    pairs = make_pairs(max(1, sizes.calls // 128))
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with redis_server() as url, _others() as engines, asyncio.Runner() as runner:
        pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=TASKS)
        client = redis.asyncio.Redis(connection_pool=pool)

        async def set_all(engine: Engine, scope: str) -> None:
            for key, value in pairs:
                await engine.aio.set(scope, key, value)

        async def hset_all(scope: str) -> None:
            for key, text in texts:
                await client.hset(f"theirs:{scope}", key, text)

        async def timed(caller: Callable[[str], Awaitable[None]]) -> float:
            began = time.perf_counter()
            await asyncio.gather(*(caller(str(number)) for number in range(TASKS)))
            return TASKS * len(pairs) / (time.perf_counter() - began)

        def rate(caller: Callable[[str], Awaitable[None]]) -> float:
            return runner.run(timed(caller))

        try:
            return [
                _many(
                    "tasks",
                    f"{TASKS} tasks",
                    way,
                    partial(rate, partial(set_all, engine)),
                    partial(rate, hset_all),
                    sizes,
                )
                for way, engine in engines.items()
            ]
        finally:
            runner.run(client.aclose())
            runner.run(pool.disconnect())


def remote_threads(sizes: Sizes) -> list[Row]:
    """Threads set, beside redis-py on a pool with a connection for each of them."""
    pairs = make_pairs(max(1, sizes.calls // 32))
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with redis_server() as url, _others() as engines:
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=sizes.threads)
        client = redis.Redis(connection_pool=pool)

        def set_all(engine: Engine, scope: str) -> None:
            for key, value in pairs:
                engine.set(scope, key, value)

        def hset_all(scope: str) -> None:
            for key, text in texts:
                client.hset(f"theirs:{scope}", key, text)

        def rate(caller: Callable[[str], None]) -> float:
            taken = in_threads([partial(caller, str(number)) for number in range(sizes.threads)])
            return sizes.threads * len(pairs) / taken

        try:
            return [
                _many(
                    "threads",
                    f"{sizes.threads} threads",
                    way,
                    partial(rate, partial(set_all, engine)),
                    partial(rate, hset_all),
                    sizes,
                )
                for way, engine in engines.items()
            ]
        finally:
            pool.disconnect()


def _many(
    name: str, callers: str, way: str, ours: Callable[[], float], theirs: Callable[[], float], sizes: Sizes
) -> Row:
    mine, peer, ratio = _in_turn(ours, theirs, sizes.repeats)
    what = f"{WAYS[way]}: {callers}: sets / redis-py HSETs, per second"
    figures = {"ours_per_s": mine, "redis_py_per_s": peer}
    return Row(f"{way}_{name}", what, ratio, "x", 1.5, at_least=True, figures=figures, own="ours_per_s")


def _processes(sizes: Sizes) -> int:
    return max(2, PROCESSES * sizes.threads // 16)


def processes(sizes: Sizes) -> list[Row]:
    """Processes that write at the same time: one directory, beside diskcache in one and redis-py on loopback."""
    calls, count = max(10, sizes.slow_calls * 2), _processes(sizes)
    found: dict[str, list[float]] = {"scopestate": [], "diskcache": [], "redis": []}
    followers = []
    with redis_server() as url:
        for _ in range(max(1, sizes.repeats // 2)):
            for name, rates in found.items():
                with TemporaryDirectory() as folder:
                    taken = written(name, url if name == "redis" else folder, calls, count)
                # The time of all calls until the last process has finished: the owner of a directory finishes early.
                rates.append(count * calls / max(each["taken_s"] for each in taken))
                if name == "scopestate":
                    slow = [each["taken_s"] for each in taken if each["role"] == "follower"]
                    followers.append(len(slow) * calls / max(slow))
    rows = []
    for peer, words, limit in (("diskcache", "diskcache", 5), ("redis", "redis-py HSETs", 1)):
        ratio = statistics.median(mine / theirs for mine, theirs in zip(found["scopestate"], found[peer], strict=True))
        figures = {
            "ours_per_s": statistics.median(found["scopestate"]),
            "followers_per_s": statistics.median(followers),
            f"{peer}_per_s": statistics.median(found[peer]),
        }
        what = f"{count} processes, one directory: sets / {words}, per second"
        rows.append(Row(f"processes_{peer}", what, ratio, "x", limit, at_least=True, figures=figures, own="ours_per_s"))
    return rows


def _cpu_per_call(batch: Batch, pairs: Pairs) -> float:
    """CPU time of all threads of this process, which excludes other processes on the machine."""
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        batch(pairs)
        return (time.process_time() - began) / len(pairs)
    finally:
        gc.enable()


def owner_followed(sizes: Sizes) -> list[Row]:
    """An owner beside followers that do nothing."""
    pairs, count = make_pairs(sizes.calls), _processes(sizes)
    with (
        TemporaryDirectory() as folder,
        TemporaryDirectory() as lonely,
        Engine.from_config(shared(folder)) as owner,
        Engine.from_config(shared(lonely)) as single,
        started("follow", folder, processes=count) as children,
    ):
        for child in children:
            assert line(child) == "ready"
        mine, peer, ratio = _in_turn(
            partial(_cpu_per_call, set_batch(owner), pairs),
            partial(_cpu_per_call, set_batch(single), pairs),
            sizes.repeats,
        )
    figures = {"followed_us": mine * 1e6, "alone_us": peer * 1e6}
    what = f"owner with {count} idle followers: CPU time of set / of an owner alone"
    return [Row("owner_followed", what, ratio, "x", 1.05, figures=figures, own="followed_us")]


MEASURES: dict[str, Measure] = {
    "remote_one": remote_one,
    "remote_tasks": remote_tasks,
    "remote_threads": remote_threads,
    "processes": processes,
    "owner_followed": owner_followed,
}
