"""What a Redis Cluster costs for shared events, beside a single server in the same run."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Callable
from subprocess import Popen

from benchmarks.cluster_load import CALLERS, SCOPES, bare_writer, redis_cluster, set_all, spent_by_servers
from benchmarks.harness import Measure, Row, Sizes, percentile
from benchmarks.redis_load import config, line, redis_server, say, started
from scopestate import Engine

_LOAD = "benchmarks.cluster_load"
_KEPT = 20_000
"""Events that a stream keeps: all of those that collect."""


def cluster_event(sizes: Sizes) -> list[Row]:
    """From a set in one process to the handler in another, in a cluster and on a single server."""
    count = sizes.slow_calls
    total = (sizes.repeats + 1) * count
    with (
        redis_server() as single_url,
        redis_cluster() as cluster_url,
        Engine.from_config(config(single_url, events="shared")) as single,
        Engine.from_config(config(cluster_url, events="shared")) as cluster,
        started("watch", single_url, total) as (single_handler,),
        started("watch", cluster_url, total) as (cluster_handler,),
    ):

        def deliveries(engine: Engine, handler: Popen[str]) -> float:
            taken = []
            for _ in range(count):
                engine.set("watched", "k", time.perf_counter())
                taken.append(float(line(handler)))
                say(handler, "next")
            return percentile(taken, 0.5)

        deliveries(single, single_handler), deliveries(cluster, cluster_handler)
        samples = [
            (deliveries(cluster, cluster_handler), deliveries(single, single_handler)) for _ in range(sizes.repeats)
        ]
    figures = {
        "cluster_us": statistics.median(many for many, _ in samples) * 1e6,
        "single_us": statistics.median(one for _, one in samples) * 1e6,
    }
    ratio = statistics.median(many / one for many, one in samples)
    what = "redis cluster: set in A to handler in B, p50 / a single server"
    return [Row("cluster_event", what, ratio, "x", 2, figures=figures, own="cluster_us")]


def cluster_events_per_second(sizes: Sizes) -> list[Row]:
    """Events over many scopes that another process handles: in a cluster, on a single server, and without an engine.

    The floor is a client on sockets that sends an HSET and an XADD for each event to the same servers, and another one
    that reads the streams that the servers announce. It does not number, check, encode or deliver anything.

    Servers, writer and handler share the cores of the machine. What an event takes of their processor time says how
    many events that machine can do at most.

    Events that have collected are measured too: the process that handles them is stopped until all were written.
    """
    count = max(1, sizes.slow_calls // CALLERS * 5) * CALLERS
    with (
        redis_server() as single_url,
        redis_cluster() as cluster_url,
        asyncio.Runner() as runner,
        Engine.from_config(config(single_url, events="shared", events_kept=_KEPT)) as single,
        Engine.from_config(config(cluster_url, events="shared", events_kept=_KEPT)) as cluster,
        bare_writer(cluster_url) as write,
        started("watch", single_url, count, module=_LOAD) as (single_handler,),
        started("watch", cluster_url, count, module=_LOAD) as (cluster_handler,),
        started("read", cluster_url, count, module=_LOAD) as (reader,),
    ):

        def rate(load: Callable[[], None], there: Popen[str]) -> float:
            began = time.perf_counter()
            say(there, "go")
            load()
            return count / (ended(there) - began)

        def ended(there: Popen[str]) -> float:
            when, took_s = line(there).split()
            handled.append(float(took_s))
            return float(when)

        def costs(load: Callable[[], None], there: Popen[str]) -> tuple[float, ...]:
            """Return the rate, and the microseconds for each event of servers, writer and reader."""
            servers_s, writer_s = spent_by_servers(cluster_url), time.process_time()
            per_s = rate(load, there)
            writer_s = time.process_time() - writer_s
            spent = (spent_by_servers(cluster_url) - servers_s, writer_s, handled[-1])
            return (per_s, *[took_s / count * 1e6 for took_s in spent])

        def collected(engine: Engine, there: Popen[str]) -> float:
            say(there, "go")
            there.send_signal(signal.SIGSTOP)
            set_all(engine, runner, count)
            began = time.perf_counter()
            there.send_signal(signal.SIGCONT)
            return count / (ended(there) - began)

        def once() -> tuple[float, ...]:
            return (
                *costs(lambda: set_all(cluster, runner, count), cluster_handler),
                rate(lambda: set_all(single, runner, count), single_handler),
                *costs(lambda: write(count), reader),
                collected(cluster, cluster_handler),
                collected(single, single_handler),
            )

        handled: list[float] = []
        once()
        samples = [once() for _ in range(sizes.repeats)]
    medians = [statistics.median(rates) for rates in zip(*samples, strict=True)]
    many, servers_us, writer_us, handler_us, one, least, *least_us, behind, behind_one = medians
    took = {"servers_us": servers_us, "writer_us": writer_us, "handler_us": handler_us, "floor_us": sum(least_us)}
    cores = len(os.sched_getaffinity(0))
    bound = cores * 1e6 / (servers_us + writer_us + handler_us)
    figures = {"cluster_per_s": many, "single_per_s": one, "floor_per_s": least}
    waiting = {"cluster_per_s": behind, "single_per_s": behind_one}
    what = f"redis cluster: events per second, {SCOPES:,} scopes"
    beside_single = statistics.median(sample[0] / sample[4] for sample in samples)
    beside_floor = statistics.median(sample[0] / sample[5] for sample in samples)
    return [
        Row("cluster_events", f"{what}, one writing process", many, "per s", 25_000, at_least=True),
        Row("cluster_bound", f"{what}, {cores} cores fully used", bound, "per s", figures=took),
        Row("cluster_vs_single", f"{what} / a single server", beside_single, "x", figures=figures, own="cluster_per_s"),
        Row("cluster_vs_floor", f"{what} / sockets alone", beside_floor, "x", figures=figures, own="cluster_per_s"),
        Row("cluster_collected", f"{what}, collected ones", behind, "per s", 25_000, at_least=True, figures=waiting),
    ]


MEASURES: dict[str, Measure] = {
    "cluster_event": cluster_event,
    "cluster_events": cluster_events_per_second,
}
