"""The behaviour of a cache, wherever its entries are: tests for classes that provide the fixture `cache`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from scopestate.errors import Conflict, InvalidValue
from scopestate.integrations.cache import Cache

VALUES = [
    None,
    False,
    0,
    1.5,
    "text",
    "",
    [1, [2, {"a": None}]],
    {"a": {"b": [1]}},
    {"~": 1, "v": 2},
    {"~": "plain", "v": 2},
    b"\x00\xff",
    (1, (2, b"x")),
    {1, 2},
    frozenset({("a", 1)}),
    {1: "one", None: "none", (1, 2): b"pair"},
    2**70,
    -(2**70),
    float("inf"),
    Decimal("1.10"),
    UUID(int=7),
    datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    datetime(2026, 1, 2),  # noqa: DTZ001 - a cache gives back what it was given
    date(2026, 1, 2),
    timedelta(days=-1, microseconds=5),
    {"nested": [{"bytes": b"a", "~": (1,)}]},
]


class CacheBehaviour:
    """The tests. They write few keys, because each call may go to a server."""

    def test_a_value_comes_back_equal_and_of_its_types(self, cache: Cache) -> None:
        for index, value in enumerate(VALUES):
            cache.set(("v", index), value)

        for index, value in enumerate(VALUES):
            found = cache.get(("v", index))
            assert found == value
            assert repr(found) == repr(value)

    def test_a_value_that_would_come_back_as_another_one_is_refused_and_nothing_is_written(self, cache: Cache) -> None:
        class Text(str):
            __slots__ = ()

        cache.set("k", 1)
        for value in (object(), {"a": [object()]}, Text("x"), bytearray(b"x"), {"a": Text("x")}):
            with pytest.raises(InvalidValue):
                cache.set("k", value)
        assert cache["k"] == 1

    def test_calls_on_one_entry(self, cache: Cache) -> None:
        assert cache.get("k") is None
        assert cache.get("k", "none") == "none"
        assert cache.add("k", 1) is True
        assert cache.add("k", 2) is False
        assert cache["k"] == 1
        assert "k" in cache
        assert cache.pop("k") == 1
        assert cache.pop("k", "none") == "none"
        assert cache.set("k", None) is True
        assert cache.get("k", "none") is None
        assert cache.delete("k") is True
        assert cache.delete("k") is False
        with pytest.raises(KeyError, match="'k'"):
            cache["k"]
        with pytest.raises(KeyError, match="'k'"):
            del cache["k"]
        cache["k"] = b"bytes"
        del cache["k"]
        assert "k" not in cache

    def test_counters(self, cache: Cache) -> None:
        assert cache.incr("n") == 1
        assert cache.incr("n", 10) == 11
        assert cache.decr("n", 2) == 9
        assert cache.incr("n", 0.5) == 9.5
        assert cache.incr("from", 1, default=100) == 101
        assert cache.decr("below") == -1
        assert cache.incr("large", 2**70) == 2**70
        assert cache.incr("large") == 2**70 + 1
        with pytest.raises(KeyError, match="missing"):
            cache.incr("missing", default=None)
        assert "missing" not in cache
        cache.set("text", "many")
        with pytest.raises(TypeError, match="not a number but a str"):
            cache.incr("text")
        assert cache["text"] == "many"

    def test_a_counter_keeps_its_deadline_and_its_tag(self, cache: Cache) -> None:
        cache.set("n", 1, expire=600, tag="counts")
        _, before, _ = cache.get("n", expire_time=True, tag=True)

        cache.incr("n")

        assert cache.get("n", expire_time=True, tag=True) == (2, before, "counts")

    def test_deadlines(self, cache: Cache) -> None:
        cache.set("k", 1, expire=600)
        _, at = cache.get("k", expire_time=True)
        assert 590 < at - time.time() <= 601
        assert cache.touch("k", timedelta(hours=1)) is True
        assert cache.get("k", expire_time=True)[1] > at
        assert cache.touch("k") is True
        assert cache.get("k", expire_time=True) == (1, None)
        assert cache.touch("missing", 5) is False
        cache.set("k", 2, expire=600)
        cache.set("k", 3)
        assert cache.get("k", expire_time=True) == (3, None)
        assert cache.get("missing", "none", expire_time=True, tag=True) == ("none", None, None)

    @pytest.mark.parametrize("expire", [0, -5, timedelta(0)], ids=str)
    def test_what_expires_at_once_is_not_there(self, cache: Cache, expire: Any) -> None:
        cache.set("k", 1, expire=expire)
        assert cache.get("k") is None
        cache.set("k", 1)
        assert cache.touch("k", expire)
        assert "k" not in cache
        assert cache.add("k", 2, expire=600)

    def test_tags(self, cache: Cache) -> None:
        for key, tag in (("a", "x"), ("b", "x"), ("c", "y"), ("d", 1), ("e", None), ("f", b"x")):
            cache.set(key, {"~": key}, tag=tag)
        assert cache.get("a", tag=True) == ({"~": "a"}, "x")
        assert cache.get("d", tag=True) == ({"~": "d"}, 1)
        assert cache.get("e", tag=True) == ({"~": "e"}, None)

        assert cache.evict("x") == 2
        assert cache.evict(1) == 1
        assert cache.evict("none") == 0

        assert sorted(cache) == ["c", "e", "f"]
        cache.set("c", 1)
        assert cache.evict("y") == 0
        assert cache.pop("f", tag=True, expire_time=True) == ({"~": "f"}, None, b"x")
        assert cache.pop("f", 7, tag=True) == (7, None)

    def test_all_entries(self, cache: Cache) -> None:
        keys = ["~tilde", "text", b"bytes", 5, -5, 1.5, True, None, ("a", 1, (b"b", None)), 2**80, ""]
        for key in keys:
            cache[key] = 1
        assert len(cache) == len(keys)
        assert {repr(key) for key in cache} == {repr(key) for key in keys}
        assert list(reversed(cache)) == list(cache)[::-1]
        assert cache.volume() > 100 * len(keys)
        cache.set(5, 1, expire=600)
        assert cache.expire() == 0
        assert cache.expire(time.time() + 300) == 0
        assert cache.expire(time.time() + 900) == 1
        assert cache.clear() == len(keys) - 1
        assert len(cache) == 0

    def test_a_block_takes_effect_at_its_end(self, cache: Cache) -> None:
        cache.set("a", 1, expire=600, tag="x")
        cache.set("b", 2)
        cache.set("c", 3)
        with cache.transact() as block:
            assert cache.incr("a") == 2
            assert block.incr("a", 5) == 7
            assert cache.add("new", 1) is True
            assert cache.add("new", 2) is False
            assert cache.pop("b") == 2
            assert "b" not in cache
            assert cache.touch("c", 60)
            assert cache.touch("none", 60) is False
            cache["d"] = {"~": b"d"}
            del cache["d"]
            with pytest.raises(KeyError):
                del block["d"]
            with cache.transact():
                cache.set("e", (1,), expire=60)
            assert cache.get("e", expire_time=True)[0] == (1,)
            assert _elsewhere(lambda: [cache.get("a"), cache.get("b"), cache.get("e")]) == [1, 2, None]

        value, at, tag = cache.get("a", expire_time=True, tag=True)
        assert (value, tag) == (7, "x")
        assert at is not None
        assert cache.get("c", expire_time=True)[1] is not None
        assert sorted(cache) == ["a", "c", "e", "new"]

    def test_a_block_that_raises_writes_nothing(self, cache: Cache) -> None:
        with pytest.raises(ZeroDivisionError), cache.transact():
            cache["a"] = 1
            _ = 1 // 0
        assert "a" not in cache

    def test_a_block_whose_reads_have_changed_raises_conflict_and_a_function_is_called_again(
        self, cache: Cache
    ) -> None:
        cache["a"] = 1
        calls: list[int] = []

        def add_up() -> int:
            found: int = cache["a"]
            calls.append(found)
            if len(calls) == 1:
                _elsewhere(lambda: cache.set("a", 10))
            cache["sum"] = found + 1
            return found + 1

        with pytest.raises(Conflict), cache.transact():
            add_up()
        assert "sum" not in cache
        calls.clear()
        assert cache.transact(add_up) == 11
        assert calls[-1] == 10
        assert cache["sum"] == 11

    def test_one_thread_computes_a_result_and_the_others_wait_for_it(self, cache: Cache) -> None:
        calls: list[int] = []
        begun, go_on = threading.Event(), threading.Event()

        @cache.memoize(expire=600)
        def square(number: int) -> dict[str, int]:
            calls.append(number)
            begun.set()
            assert go_on.wait(30)
            return {"square": number**2}

        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(square, 3)
            assert begun.wait(30)
            others = [pool.submit(square, 3) for _ in range(7)]
            go_on.set()
            results = [call.result(30) for call in (first, *others)]

        assert results == [{"square": 9}] * 8
        assert len({id(result) for result in results}) == 8
        assert calls == [3]
        assert square(3) == {"square": 9}
        assert calls == [3]
        assert _leases(cache) == []
        del cache[square.__cache_key__(3)]
        square(3)
        assert calls == [3, 3]

    def test_one_task_computes_a_result_and_the_others_wait_for_it(self, cache: Cache) -> None:
        calls: list[int] = []

        @cache.memoize(expire=600, tag="squares")
        async def square(number: int) -> tuple[int, bytes]:
            calls.append(number)
            await asyncio.sleep(0)
            return number**2, b"bytes"

        async def main() -> list[tuple[int, bytes]]:
            return await asyncio.gather(*[square(number) for number in (3, 3, 4, 3)], square(3))

        assert asyncio.run(main()) == [(9, b"bytes")] * 2 + [(16, b"bytes")] + [(9, b"bytes")] * 2
        assert sorted(calls) == [3, 4]
        assert asyncio.run(square(3)) == (9, b"bytes")
        assert _leases(cache) == []
        assert cache.evict("squares") == 2

    def test_who_has_no_lease_waits_for_the_result(self, cache: Cache) -> None:
        """As if another process computed: its lease is there, and later its result."""
        asked: list[str] = []

        @cache.memoize(expire=600)
        def own() -> str:
            asked.append("own")
            return "own"

        @cache.memoize(expire=600)
        async def own_async() -> str:
            asked.append("own")
            return "own"

        for call, key in (
            (own, own.__cache_key__()),
            (lambda: asyncio.run(own_async()), own_async.__cache_key__()),
        ):
            cache.engine.set(f"{cache.scope}:leases", key, 1, ttl=600)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(call)
                cache.set(key, "the other one's")
                assert waiting.result(30) == "the other one's"
        assert asked == []

    def test_a_lease_that_ends_lets_another_one_compute(self, cache: Cache) -> None:
        @cache.memoize(lease=30)
        def value() -> str:
            return "own"

        cache.engine.set(f"{cache.scope}:leases", value.__cache_key__(), 1, ttl=0.2)
        assert value() == "own"


def _elsewhere(call: Callable[[], Any]) -> Any:
    """Return what a call returns on another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(30)


def _leases(cache: Cache) -> list[str]:
    return cache.engine.keys(f"{cache.scope}:leases")
