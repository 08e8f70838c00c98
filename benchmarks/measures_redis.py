"""What Redis costs through an engine, beside redis-py on the same server.

redis-py sends values that are already JSON, and with hiredis parses as quickly as we do, so its time is the round trip.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import redis
import redis.asyncio

from benchmarks.hand_over import handing_over
from benchmarks.harness import Measure, Row, Sizes, Value, in_threads, latencies, make_pairs, percentile
from benchmarks.redis_load import config, line, packed, redis_server, say, sending, started
from scopestate import Engine, ops

CALLERS = 64
PROCESSES = 4

Loader = Callable[[Callable[[int], str]], float]
"""Makes the calls of all callers, each on the scope of its number; returns the seconds."""


def _p50(call: Callable[[str, Value], object], count: int) -> float:
    return percentile(latencies(call, make_pairs(count)), 0.5)


def _beside_hset(name: str, what: str, limit: float, ours: Callable[[Engine], Any], sizes: Sizes) -> list[Row]:
    """The p50 of a call of ours as a multiple of that of redis-py's HSET, measured in turn."""
    texts = {key: json.dumps(value) for key, value in make_pairs(sizes.slow_calls)}
    with redis_server() as url, redis.Redis.from_url(url) as client, Engine.from_config(config(url)) as engine:
        call = ours(engine)

        def hset(key: str, _: Value) -> object:
            return client.hset("state:theirs", key, texts[key])

        _p50(call, sizes.slow_calls), _p50(hset, sizes.slow_calls)
        samples = [(_p50(call, sizes.slow_calls), _p50(hset, sizes.slow_calls)) for _ in range(sizes.repeats)]
    figures = {
        "ours_us": statistics.median(mine for mine, _ in samples) * 1e6,
        "hset_us": statistics.median(theirs for _, theirs in samples) * 1e6,
    }
    ratio = statistics.median(mine / theirs for mine, theirs in samples)
    return [Row(name, what, ratio, "x", limit, figures=figures, own="ours_us")]


def redis_set(sizes: Sizes) -> list[Row]:
    """One caller sets."""

    def setter(engine: Engine) -> Any:
        return lambda key, value: engine.set("ours", key, value)

    return _beside_hset("redis_set", "redis: set, one caller, p50 / redis-py HSET", 1.4, setter, sizes)


def redis_update(sizes: Sizes) -> list[Row]:
    """One caller increments a key that no other caller writes."""
    add = [ops.Increment("", 1)]

    def adder(engine: Engine) -> Any:
        return lambda key, _: engine.update("ours", key, add)

    return _beside_hset("redis_update", "redis: increment, one caller, p50 / redis-py HSET", 1.6, adder, sizes)


def redis_revisions(sizes: Sizes) -> list[Row]:
    """One caller sets, with revisions and without."""
    with (
        redis_server() as url,
        Engine.from_config(config(url)) as numbered,
        Engine.from_config(config(url, revisions=False)) as plain,
    ):

        def set_numbered(key: str, value: Value) -> object:
            return numbered.set("ours", key, value)

        def set_plain(key: str, value: Value) -> object:
            return plain.set("plain", key, value)

        _p50(set_numbered, sizes.slow_calls), _p50(set_plain, sizes.slow_calls)
        samples = [
            (_p50(set_numbered, sizes.slow_calls), _p50(set_plain, sizes.slow_calls)) for _ in range(sizes.repeats)
        ]
    figures = {
        "ours_us": statistics.median(mine for mine, _ in samples) * 1e6,
        "plain_us": statistics.median(theirs for _, theirs in samples) * 1e6,
    }
    ratio = statistics.median(mine / theirs for mine, theirs in samples)
    what = "redis: set with revisions, one caller, p50 / without"
    return [Row("redis_revisions", what, ratio, "x", 1.15, figures=figures, own="ours_us")]


def redis_if_revision(sizes: Sizes) -> list[Row]:
    """One caller sets a key if it has the revision that the caller's last set returned."""

    def setter(engine: Engine) -> Any:
        last: dict[str, int] = {}

        def set_if(key: str, value: Value) -> None:
            last[key] = engine.set("ours", key, value, if_revision=last.get(key, 0)).revision

        return set_if

    what = "redis: set(if_revision=), one caller, p50 / redis-py HSET"
    return _beside_hset("redis_if_revision", what, 1.3, setter, sizes)


def redis_transact(sizes: Sizes) -> list[Row]:
    """One caller moves an amount between two keys that no other caller writes."""

    def mover(engine: Engine) -> Any:
        engine.set("ours", "from", 0)
        engine.set("ours", "to", 0)

        def move(tx: Any) -> None:
            tx["from"] -= 1
            tx["to"] += 1

        return lambda *_: engine.transact("ours", move)

    what = "redis: transact of two keys, one caller, p50 / redis-py HSET"
    return _beside_hset("redis_transact", what, 2, mover, sizes)


def redis_transact_beside_watch(sizes: Sizes) -> list[Row]:
    """The same job with redis-py: WATCH, read, MULTI, EXEC."""
    with redis_server() as url, redis.Redis.from_url(url) as client, Engine.from_config(config(url)) as engine:
        for key in ("from", "to"):
            engine.set("ours", key, 0)
            client.hset("theirs", key, "0")

        def move(tx: Any) -> None:
            tx["from"] -= 1
            tx["to"] += 1

        def ours(*_: object) -> object:
            return engine.transact("ours", move)

        def work(pipe: Any) -> None:
            source, to = pipe.hmget("theirs", "from", "to")
            pipe.multi()
            pipe.hset(
                "theirs", mapping={"from": json.dumps(json.loads(source) - 1), "to": json.dumps(json.loads(to) + 1)}
            )

        def theirs(*_: object) -> object:
            return client.transaction(work, "theirs")

        _p50(ours, sizes.slow_calls), _p50(theirs, sizes.slow_calls)
        samples = [(_p50(ours, sizes.slow_calls), _p50(theirs, sizes.slow_calls)) for _ in range(sizes.repeats)]
    figures = {
        "ours_us": statistics.median(mine for mine, _ in samples) * 1e6,
        "watch_us": statistics.median(peer for _, peer in samples) * 1e6,
    }
    ratio = statistics.median(mine / peer for mine, peer in samples)
    what = "redis: transact of two keys, p50 / redis-py WATCH, MULTI, EXEC"
    return [Row("redis_transact_watch", what, ratio, "x", 1, figures=figures, own="ours_us")]


def _together(
    name: str, callers: str, least: float, loaders: Callable[[], tuple[Loader, Loader]], sizes: Sizes
) -> list[Row]:
    """Calls per second of many callers, theirs and ours alternately: each on its own scope, and all on one.

    `least`: the ratio to reach with a scope each.
    """
    rows = []
    scopes: dict[str, tuple[str, float, Callable[[int], str]]] = {
        "scopes": (f"{CALLERS} scopes", least, str),
        "one_scope": ("one scope", 5, lambda _: "one"),
    }
    ours, theirs = loaders()
    for ending, (words, limit, scope_of) in scopes.items():
        calls = _each(sizes) * CALLERS
        ours(scope_of), theirs(scope_of)
        samples = [
            (calls / _without_gc(ours, scope_of), calls / _without_gc(theirs, scope_of)) for _ in range(sizes.repeats)
        ]
        figures = {
            "ours_per_s": statistics.median(mine for mine, _ in samples),
            "redis_py_per_s": statistics.median(peer for _, peer in samples),
        }
        ratio = statistics.median(mine / peer for mine, peer in samples)
        what = f"redis: {CALLERS} {callers}, {words}: sets / redis-py HSETs, per second"
        rows.append(Row(f"{name}_{ending}", what, ratio, "x", limit, at_least=True, figures=figures, own="ours_per_s"))
    return rows


def _each(sizes: Sizes) -> int:
    """Calls of one caller."""
    return max(1, sizes.calls // 128)


def _without_gc(load: Loader, scope_of: Callable[[int], str]) -> float:
    """As `harness.seconds_per_call`: garbage is collected before, and not during."""
    gc.collect()
    gc.disable()
    try:
        return load(scope_of)
    finally:
        gc.enable()


def redis_tasks(sizes: Sizes) -> list[Row]:
    """Tasks of one event loop, beside redis.asyncio on a pool with a connection for each of them."""
    pairs = make_pairs(_each(sizes))
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with redis_server() as url, Engine.from_config(config(url)) as engine, asyncio.Runner() as runner:
        pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=CALLERS)
        client = redis.asyncio.Redis(connection_pool=pool)

        async def set_all(scope: str) -> None:
            for key, value in pairs:
                await engine.aio.set(scope, key, value)

        async def hset_all(scope: str) -> None:
            for key, text in texts:
                await client.hset(f"theirs:{scope}", key, text)

        async def timed(caller: Callable[[str], Awaitable[None]], scope_of: Callable[[int], str]) -> float:
            began = time.perf_counter()
            await asyncio.gather(*(caller(scope_of(number)) for number in range(CALLERS)))
            return time.perf_counter() - began

        def loaders() -> tuple[Loader, Loader]:
            return (
                lambda scope_of: runner.run(timed(set_all, scope_of)),
                lambda scope_of: runner.run(timed(hset_all, scope_of)),
            )

        try:
            return _together("redis_tasks", "tasks", 3.5, loaders, sizes)
        finally:
            runner.run(client.aclose())
            runner.run(pool.disconnect())


def redis_one_task(sizes: Sizes) -> list[Row]:
    """A task alone on the main thread's event loop, as in a service with few requests."""
    pairs = make_pairs(sizes.slow_calls)
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with redis_server() as url, Engine.from_config(config(url)) as engine, asyncio.Runner() as runner:
        client = redis.asyncio.Redis.from_url(url)

        async def ours() -> float:
            began = time.perf_counter()
            for key, value in pairs:
                await engine.aio.set("ours", key, value)
            return (time.perf_counter() - began) / len(pairs)

        async def theirs() -> float:
            began = time.perf_counter()
            for key, text in texts:
                await client.hset("theirs", key, text)
            return (time.perf_counter() - began) / len(pairs)

        try:
            runner.run(ours()), runner.run(theirs())
            samples = [(runner.run(ours()), runner.run(theirs())) for _ in range(sizes.repeats)]
        finally:
            runner.run(client.aclose())
    figures = {
        "ours_us": statistics.median(mine for mine, _ in samples) * 1e6,
        "redis_py_us": statistics.median(peer for _, peer in samples) * 1e6,
    }
    ratio = statistics.median(mine / peer for mine, peer in samples)
    return [
        Row(
            "redis_one_task", "redis: set, one task / redis.asyncio HSET", ratio, "x", 1, figures=figures, own="ours_us"
        )
    ]


def redis_threads(sizes: Sizes) -> list[Row]:
    """Threads, beside redis-py on a pool with a connection for each of them."""
    pairs = make_pairs(_each(sizes))
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with redis_server() as url, Engine.from_config(config(url)) as engine:
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=CALLERS)
        client = redis.Redis(connection_pool=pool)

        def set_all(scope: str) -> None:
            for key, value in pairs:
                engine.set(scope, key, value)

        def hset_all(scope: str) -> None:
            for key, text in texts:
                client.hset(f"theirs:{scope}", key, text)

        def timed(caller: Callable[[str], None], scope_of: Callable[[int], str]) -> float:
            return in_threads([partial(caller, scope_of(number)) for number in range(CALLERS)])

        def loaders() -> tuple[Loader, Loader]:
            return lambda scope_of: timed(set_all, scope_of), lambda scope_of: timed(hset_all, scope_of)

        try:
            return _together("redis_threads", "threads", 3, loaders, sizes)
        finally:
            pool.disconnect()


def redis_threads_floor(sizes: Sizes) -> list[Row]:
    """The threads of `redis_threads` beside threads that hand an HSET each over to one that sends them together.

    That is the least that threads with one connection can take: a wake-up for each call, the interpreter that they take
    from each other, and the server. Nothing is encoded, computed or answered.
    """
    pairs = make_pairs(_each(sizes))
    texts = [(key, json.dumps(value)) for key, value in pairs]
    with (
        redis_server() as url,
        Engine.from_config(config(url)) as engine,
        sending(url) as send,
        handing_over(send) as hand_over,
    ):

        def set_all(scope: str) -> None:
            for key, value in pairs:
                engine.set(scope, key, value)

        def hand_all_over(commands: list[bytes]) -> None:
            for command in commands:
                hand_over(command)

        jobs = [partial(set_all, str(number)) for number in range(CALLERS)]
        made = [[packed("HSET", f"theirs:{number}", key, text) for key, text in texts] for number in range(CALLERS)]
        least = [partial(hand_all_over, commands) for commands in made]
        in_threads(jobs), in_threads(least)
        samples = [
            (_without_gc(lambda _: in_threads(jobs), str), _without_gc(lambda _: in_threads(least), str))
            for _ in range(sizes.repeats)
        ]
    calls = _each(sizes) * CALLERS
    figures = {
        "ours_us": statistics.median(mine for mine, _ in samples) / calls * 1e6,
        "floor_us": statistics.median(least for _, least in samples) / calls * 1e6,
    }
    ratio = statistics.median(mine / least for mine, least in samples)
    what = f"redis: {CALLERS} threads, {CALLERS} scopes: set / HSETs handed over through a queue"
    return [Row("redis_threads_floor", what, ratio, "x", 1.3, figures=figures, own="ours_us")]


def redis_event(sizes: Sizes) -> list[Row]:
    """From a set in one process to the handler in another, both with `events: shared`, beside redis-py's PING."""
    count = sizes.slow_calls
    with (
        redis_server() as url,
        redis.Redis.from_url(url) as client,
        Engine.from_config(config(url, events="shared")) as engine,
        started("watch", url, (sizes.repeats + 1) * count) as (handler,),
    ):

        def deliveries() -> float:
            taken = []
            for _ in range(count):
                engine.set("watched", "k", time.perf_counter())
                taken.append(float(line(handler)))
                say(handler, "next")
            return percentile(taken, 0.5)

        def pings() -> float:
            return _p50(lambda _key, _value: client.ping(), count)

        deliveries(), pings()
        samples = [(deliveries(), pings()) for _ in range(sizes.repeats)]
    figures = {
        "event_us": statistics.median(event for event, _ in samples) * 1e6,
        "ping_us": statistics.median(ping for _, ping in samples) * 1e6,
    }
    ratio = statistics.median(event / ping for event, ping in samples)
    return [
        Row(
            "redis_event",
            "redis: set in A to handler in B, p50 / redis-py PING",
            ratio,
            "x",
            4,
            figures=figures,
            own="event_us",
        )
    ]


def redis_contention(sizes: Sizes) -> list[Row]:
    """Processes that all increment one key: no increment is lost, and few attempts conflict."""
    count = sizes.calls // 2
    shares, lost, rates = [], 0, []
    with redis_server() as url, redis.Redis.from_url(url, decode_responses=True) as client:
        for _ in range(max(1, sizes.repeats // 2)):
            client.delete("state:counters")
            with started("increment", url, count, PROCESSES) as children:
                for child in children:
                    say(child, "go")
                found: Sequence[dict[str, float]] = [json.loads(line(child)) for child in children]
            attempts = sum(each["update_attempts"] for each in found)
            shares.append(sum(each["update_conflicts"] for each in found) / attempts)
            rates.append(PROCESSES * count / max(each["taken_s"] for each in found))
            lost += abs(PROCESSES * count - int(str(client.hget("state:counters", "one"))))
    what = f"redis: {PROCESSES} processes increment one key {count:,} times each"
    figures = {"all_per_s": statistics.median(rates)}
    return [
        Row(
            "redis_conflicts",
            f"{what}: conflicts / attempts, worst run",
            max(shares),
            "",
            0.25,
            figures=figures,
            own="all_per_s",
        ),
        Row("redis_lost", f"{what}: increments lost", lost, "", 0),
    ]


MEASURES: dict[str, Measure] = {
    "redis_set": redis_set,
    "redis_update": redis_update,
    "redis_revisions": redis_revisions,
    "redis_if_revision": redis_if_revision,
    "redis_transact": redis_transact,
    "redis_transact_watch": redis_transact_beside_watch,
    "redis_tasks": redis_tasks,
    "redis_one_task": redis_one_task,
    "redis_threads": redis_threads,
    "redis_threads_floor": redis_threads_floor,
    "redis_event": redis_event,
    "redis_contention": redis_contention,
}
