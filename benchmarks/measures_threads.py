"""What calls cost beside other threads."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks import peers
from benchmarks.harness import (
    Measure,
    Pairs,
    Row,
    Sizes,
    cpu_bound_thread,
    in_threads,
    latencies,
    make_pairs,
    percentile,
)
from benchmarks.ours import set_batch, setter
from scopestate import Engine


def set_beside_cpu(sizes: Sizes) -> list[Row]:
    """p99 of `engine.set` beside the p50 of a Pykka ask, both while another Python thread computes.

    How long an ask takes there depends on which thread gets the interpreter when the asking thread waits: that of the
    actor or the computing one. Kernels differ: on some each ask costs two switch intervals (10 ms), on others the
    computing thread starves and only a few asks do. So the p99 of both is shown too.
    """
    our_pairs = make_pairs(sizes.calls)
    their_pairs = make_pairs(sizes.contended_asks)
    with Engine() as engine, peers.pykka_ref() as ref:
        ours = setter(engine)

        def ask(key: str, value: dict[str, object]) -> object:
            return ref.ask((key, value))

        latencies(ours, our_pairs)
        latencies(ask, their_pairs)
        with cpu_bound_thread():
            samples = [(latencies(ours, our_pairs), latencies(ask, their_pairs)) for _ in range(sizes.repeats)]
    figures = {
        "ours_p50_us": statistics.median(percentile(mine, 0.5) for mine, _ in samples) * 1e6,
        "ours_p99_us": statistics.median(percentile(mine, 0.99) for mine, _ in samples) * 1e6,
        "peer_p50_us": statistics.median(percentile(theirs, 0.5) for _, theirs in samples) * 1e6,
        "peer_p99_us": statistics.median(percentile(theirs, 0.99) for _, theirs in samples) * 1e6,
    }
    ratio = statistics.median(percentile(theirs, 0.5) / percentile(mine, 0.99) for mine, theirs in samples)
    tail = statistics.median(percentile(theirs, 0.99) / percentile(mine, 0.99) for mine, theirs in samples)
    return [
        Row(
            "set_beside_cpu",
            "set beside a CPU-bound thread: Pykka ask p50 / our p99",
            ratio,
            "x",
            50,
            at_least=True,
            figures=figures,
            own="ours_p50_us",
        ),
        Row(
            "set_beside_cpu_p99",
            "set beside a CPU-bound thread: Pykka ask p99 / our p99",
            tail,
            "x",
            figures=figures,
            own="ours_p99_us",
        ),
    ]


def _throughput(sizes: Sizes, name: str, what: str, scope_of: Callable[[int], str]) -> list[Row]:
    """Total calls per second of many threads as a share of one thread's, the same number of calls in all."""
    each = make_pairs(sizes.calls)

    def jobs(engine: Engine, threads: int, pairs: Pairs) -> list[Callable[[], object]]:
        batches = [set_batch(engine, scope_of(number)) for number in range(threads)]
        return [lambda batch=batch: batch(pairs) for batch in batches]  # type: ignore[misc]  # a bound loop variable

    shares, many_rates, one_rates = [], [], []
    with Engine() as engine:
        for _ in range(sizes.repeats):
            one_s = in_threads(jobs(engine, 1, each))
            many_s = in_threads(jobs(engine, sizes.threads, each[: max(1, len(each) // 4)]))
            one_rates.append(len(each) / one_s)
            many_rates.append(sizes.threads * max(1, len(each) // 4) / many_s)
            shares.append(many_rates[-1] / one_rates[-1])
    figures = {
        "one_thread_per_s": statistics.median(one_rates),
        "all_threads_per_s": statistics.median(many_rates),
    }
    return [
        Row(name, what, statistics.median(shares), "x", 0.7, at_least=True, figures=figures, own="all_threads_per_s")
    ]


def threads_one_scope(sizes: Sizes) -> list[Row]:
    """All threads write one scope."""
    what = f"{sizes.threads} threads, one scope: total throughput / one thread's"
    return _throughput(sizes, "threads_one_scope", what, lambda _: "shared")


def threads_own_scopes(sizes: Sizes) -> list[Row]:
    """Each thread writes a scope of its own."""
    what = f"{sizes.threads} threads, {sizes.threads} scopes: total throughput / one thread's"
    return _throughput(sizes, "threads_own_scopes", what, lambda number: f"own-{number}")


MEASURES: dict[str, Measure] = {
    "set_beside_cpu": set_beside_cpu,
    "threads_one_scope": threads_one_scope,
    "threads_own_scopes": threads_own_scopes,
}
