"""The cache beside diskcache, both in a directory, in the same run: every call that both offer.

scopestate with `durability: interval`, diskcache with its defaults: neither syncs each write to the disk. What a
kill loses differs (docs/design/0065-cache-facade.md), so `cache_durable` compares both where each write is synced.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import diskcache

from benchmarks.harness import Batch, Measure, Pairs, Row, Sizes, make_pairs, seconds_per_call
from scopestate.integrations.cache import Cache

_fresh = itertools.count()


class Call(NamedTuple):
    """One kind of call, of either cache."""

    name: str
    make: Callable[[Any], Batch]
    least: float
    """How many times as fast as diskcache the call must be."""
    filled: bool = True
    """Whether the keys are set before each batch."""


def _set(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            cache.set(key, value)

    return batch


def _set_with_deadline(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            cache.set(key, value, expire=600)

    return batch


def _get(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.get(key)

    return batch


def _add(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            cache.add(f"{key}-{next(_fresh)}", value)

    return batch


def _add_existing(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            cache.add(key, value)

    return batch


def _incr(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.incr(f"n-{key}")

    return batch


def _decr(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.decr(f"n-{key}")

    return batch


def _pop(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.pop(key)

    return batch


def _touch(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.touch(key, 600)

    return batch


def _delete(cache: Any) -> Batch:
    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            cache.delete(key)

    return batch


def _memoize(cache: Any) -> Batch:
    @cache.memoize()  # type: ignore[untyped-decorator]  # of either cache
    def found(key: str) -> dict[str, Any]:
        return {"key": key, "found": True}

    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            found(key)

    return batch


CALLS = (
    Call("set", _set, 5),
    Call("set with a deadline", _set_with_deadline, 5),
    Call("get", _get, 5),
    Call("add", _add, 5, filled=False),
    Call("add, of a key that exists", _add_existing, 5),
    Call("incr", _incr, 5, filled=False),
    Call("decr", _decr, 5, filled=False),
    Call("touch", _touch, 5),
    Call("pop", _pop, 5),
    Call("delete", _delete, 5),
    Call("memoize, a hit", _memoize, 10, filled=False),
)


@contextmanager
def _both(durability: Any = None, **settings: Any) -> Iterator[tuple[Cache, Any]]:
    with (
        TemporaryDirectory() as our_folder,
        TemporaryDirectory() as their_folder,
        Cache(our_folder, durability=durability) as ours,
        diskcache.Cache(their_folder, **settings) as theirs,
    ):
        yield ours, theirs


def _compared(call: Call, ours: Any, theirs: Any, pairs: Pairs, repeats: int) -> tuple[float, dict[str, float]]:
    """Time both alternately; return the median of the ratios of neighbours, and the medians in microseconds."""
    batches = [(cache, call.make(cache)) for cache in (ours, theirs)]
    samples: list[list[float]] = []
    for _ in range(repeats + 1):  # the first one warms up
        sample = []
        for cache, batch in batches:
            if call.filled:
                _set(cache)(pairs)
            sample.append(seconds_per_call(batch, pairs))
        samples.append(sample)
    del samples[0]
    figures = [statistics.median(times) * 1e6 for times in zip(*samples, strict=True)]
    ratio = statistics.median([their_s / our_s for our_s, their_s in samples])
    return ratio, {"ours_us": figures[0], "peer_us": figures[1]}


def cache_calls(sizes: Sizes) -> list[Row]:
    """Each call, on keys that are all different."""
    pairs = make_pairs(sizes.slow_calls, keys=sizes.slow_calls)
    rows = []
    with _both() as (ours, theirs):
        for call in CALLS:
            ratio, figures = _compared(call, ours, theirs, pairs, sizes.repeats)
            name = f"cache_{call.name.replace(', ', '_').replace(' ', '_')}"
            what = f"cache, {call.name}: diskcache / ours"
            rows.append(Row(name, what, ratio, "x", call.least, at_least=True, figures=figures, own="ours_us"))
    return rows


def cache_durable(sizes: Sizes) -> list[Row]:
    """A set where each write is on the disk when the call returns, in both. Shown, not judged: the disk decides."""
    pairs = make_pairs(max(10, sizes.slow_calls // 20))
    with _both("commit", sqlite_synchronous=2) as (ours, theirs):
        ratio, figures = _compared(Call("set", _set, 0, filled=False), ours, theirs, pairs, sizes.repeats)
    what = "cache, set that is synced: diskcache with synchronous=FULL / ours with durability=commit"
    return [Row("cache_durable", what, ratio, "x", figures=figures, own="ours_us")]


MEASURES: dict[str, Measure] = {"cache_calls": cache_calls, "cache_durable": cache_durable}
