"""What reading by key costs in a large scope, for the caller and for the others."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from benchmarks.harness import Measure, Row, Sizes, make_pairs
from benchmarks.ours import SCOPE, set_batch
from scopestate import Engine


def keys_of_a_page(sizes: Sizes) -> list[Row]:
    """`keys(limit=100)` somewhere in a large scope, after the first call, which makes the index."""
    count = sizes.large_scope_keys
    pairs = make_pairs(count, keys=count)
    with Engine() as engine:
        set_batch(engine)(pairs)
        first_s = _seconds(lambda: engine.keys(SCOPE, limit=100))
        taken = [
            _seconds(lambda place=place: engine.keys(SCOPE, after=pairs[place * 7919 % count][0], limit=100))  # type: ignore[misc]
            for place in range(sizes.slow_calls)
        ]
    figures = {"worst_ms": max(taken) * 1e3, "first_call_ms": first_s * 1e3}
    what = f"keys(limit=100) of a scope of {count}"
    return [Row("keys_of_a_page", what, statistics.median(taken) * 1e3, "ms", 2, figures=figures)]


def walk_by_pages(sizes: Sizes) -> list[Row]:
    """All pages of a large scope beside one `items()`, and how long a `set` takes at the same time."""
    count = sizes.large_scope_keys
    pairs = make_pairs(count, keys=count)
    walks, lists, worst = [], [], []
    with Engine() as engine:
        set_batch(engine)(pairs)

        def walk() -> None:
            assert sum(sum(1 for entry in page.entries if entry.value) for page in engine.pages(SCOPE)) >= count

        def list_all() -> None:
            assert len(engine.items(SCOPE)) >= count

        walk()
        for _ in range(max(1, sizes.repeats // 3)):
            walks.append(_seconds(walk))
            lists.append(_seconds(list_all))
            worst.append(_longest_set(engine, walk))
    ratio = statistics.median(walked / listed for walked, listed in zip(walks, lists, strict=True))
    figures = {"walk_s": statistics.median(walks), "items_s": statistics.median(lists)}
    return [
        Row("walk_by_pages", f"pages of a scope of {count} / items", ratio, "x", 2, figures=figures, own="walk_s"),
        Row("set_beside_pages", "longest set while another thread walks", min(worst) * 1e3, "ms", 20),
    ]


def held_by_lists(sizes: Sizes) -> list[Row]:
    """The longest `set` while another thread reads all keys of a large scope, in each way: the best of a few runs."""
    count = sizes.large_scope_keys
    with Engine() as engine:
        set_batch(engine)(make_pairs(count, keys=count))
        scope = engine.scope(SCOPE)

        def first_keys() -> None:
            actor = engine._scopes[SCOPE]
            actor.forget_unused()
            actor.forget_unused()  # the index is gone: this call makes it
            scope.keys(limit=100)

        ways: dict[str, Callable[[], object]] = {
            "first_call_ms": first_keys,
            "keys_ms": scope.keys,
            "items_ms": scope.items,
            "entries_ms": scope.entries,
            "count_ms": lambda: scope.count(prefix="k"),
        }
        repeats = max(1, sizes.repeats // 3)
        held = {name: min(_longest_set(engine, way) for _ in range(repeats)) * 1e3 for name, way in ways.items()}
    what = f"the longest set while another thread lists {count} keys: first call, all, counted"
    # `items` and the entries are only shown: their times include garbage collections of millions of new objects.
    longest = max(held["first_call_ms"], held["keys_ms"], held["count_ms"])
    return [Row("held_by_lists", what, longest, "ms", 20, figures=held)]


def _longest_set(engine: Engine, work: Callable[[], object]) -> float:
    """Return the longest time that a `set` takes while another thread does the work."""
    thread = threading.Thread(target=work, name="walk")
    longest, calls = 0.0, 0
    thread.start()
    while thread.is_alive() or not calls:
        longest = max(longest, _seconds(lambda: engine.set(SCOPE, "key-0", {"changed": calls})))  # noqa: B023 - called at once
        calls += 1
    thread.join()
    return longest


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


MEASURES: dict[str, Measure] = {
    "keys_of_a_page": keys_of_a_page,
    "walk_by_pages": walk_by_pages,
    "held_by_lists": held_by_lists,
}
