"""Memoized functions: keys, errors, calls of themselves, leases that end, and results that are computed early."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scopestate.errors import DeserializationError, EngineClosed, InvalidValue
from scopestate.integrations.cache import Cache


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache(statistics=True) as cache:
        yield cache


def key_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """The key of a call in the cache."""
    key: str = function.__cache_key__(*args, **kwargs)
    return key


async def until(holds: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds."""
    while not holds():  # noqa: ASYNC110 - what it waits for sets no event
        await asyncio.sleep(0)


def test_the_decorated_function_looks_like_the_function(cache: Cache) -> None:
    @cache.memoize()
    def add(a: int, b: int = 0) -> int:
        """Add."""
        return a + b

    assert (add.__name__, add.__doc__) == ("add", "Add.")
    assert add.__wrapped__(1, 2) == 3  # type: ignore[attr-defined]  # of functools.wraps
    assert key_of(add, 1, b=2).endswith('<locals>.add[1]{"b":2}')
    assert [add(1, b=2), add(1, b=2)] == [3, 3]
    assert cache.stats() == (1, 1)
    assert cache[key_of(add, 1, b=2)] == 3


def test_none_and_values_that_are_no_json_are_kept(cache: Cache) -> None:
    calls: list[str] = []

    @cache.memoize(name="find")
    def find(name: str) -> Any:
        calls.append(name)
        return {"none": None, "pair": (1, b"x")}[name]

    assert [find("none"), find("none"), find("pair"), find("pair")] == [None, None, (1, b"x"), (1, b"x")]
    assert calls == ["none", "pair"]
    assert list(cache) == ['find["none"]', 'find["pair"]']


def test_ignored_arguments_and_a_function_for_the_key(cache: Cache) -> None:
    calls: list[Any] = []

    class Users:
        @cache.memoize(ignore={0, "fresh"})
        def load(self, name: str, *, fresh: bool = False) -> str:
            calls.append((name, fresh))
            return name.upper()

        @cache.memoize(key=lambda self, user: user["id"])
        def greet(self, user: dict[str, Any]) -> str:
            calls.append(user["id"])
            return f"hello {user['name']}"

    assert Users().load("ada") == Users().load("ada", fresh=True) == "ADA"
    assert Users().greet({"id": 1, "name": "Ada", "x": object()}) == Users().greet({"id": 1, "name": "Bob"})
    assert calls == [("ada", False), 1]
    with pytest.raises(InvalidValue, match="argument 0"):
        cache.memoize()(lambda value: value)(object())


def test_what_makes_no_sense_is_refused(cache: Cache) -> None:
    with pytest.raises(TypeError, match=r"@cache\.memoize\(\)"):
        cache.memoize(lambda: 1)  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(DeserializationError, match="needs `expire`"):
        cache.memoize(early=1)
    with pytest.raises(DeserializationError, match="`key` or `ignore`"):
        cache.memoize(key=len, ignore={0})(len)
    with pytest.raises(DeserializationError, match=r"has no \["):
        cache.memoize(name="a[1]")(len)
    with pytest.raises(DeserializationError, match="not a int"):
        cache.memoize()(5)  # type: ignore[type-var]  # the mistake that is tested


def test_an_error_reaches_those_that_wait_and_is_not_kept(cache: Cache) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    @cache.memoize()
    def fail() -> int:
        calls.append(1)
        if len(calls) > 1:
            return 5
        begun.set()
        assert go_on.wait(30)
        raise ZeroDivisionError("first")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fail)
        assert begun.wait(30)
        second = pool.submit(fail)
        while cache.stats().misses < 2:
            begun.wait(0.001)
        go_on.set()
        for call in (first, second):
            with pytest.raises(ZeroDivisionError, match="first"):
                call.result(30)
    assert fail() == 5


def test_a_result_that_no_cache_holds_is_an_error(cache: Cache) -> None:
    @cache.memoize()
    def bad() -> object:
        return object()

    with pytest.raises(InvalidValue, match="pickles nothing"):
        bad()
    assert cache.engine.keys("cache:leases") == []


def test_a_function_may_call_itself_with_other_and_with_the_same_arguments(cache: Cache) -> None:
    @cache.memoize()
    def fib(number: int) -> int:
        return number if number < 2 else fib(number - 1) + fib(number - 2)

    depth = 0

    @cache.memoize()
    def again(number: int) -> int:
        nonlocal depth
        depth += 1
        return again(number) + 1 if depth < 3 else number

    @cache.memoize()
    async def again_async(number: int) -> int:
        nonlocal depth
        depth += 1
        return await again_async(number) + 1 if depth < 3 else number

    assert fib(80) == 23416728348467685
    assert again(5) == 7
    depth = 0
    assert asyncio.run(again_async(5)) == 7
    assert cache.engine.keys("cache:leases") == []


def test_a_computation_that_takes_longer_than_its_lease_does_not_hold_up_others(cache: Cache) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    @cache.memoize(lease=0.05)
    def slow() -> int:
        calls.append(1)
        if len(calls) == 1:
            begun.set()
            assert go_on.wait(30)
        return len(calls)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow)
        assert begun.wait(30)
        assert slow() == 2
        assert slow() == 2
        go_on.set()
        assert first.result(30) == 2
    assert cache.engine.keys("cache:leases") == []


def test_a_task_that_takes_longer_than_its_lease_does_not_hold_up_others(cache: Cache) -> None:
    calls: list[int] = []

    async def main() -> list[int]:
        go_on = asyncio.Event()

        @cache.memoize(lease=0.05)
        async def slow() -> int:
            calls.append(1)
            if len(calls) == 1:
                await go_on.wait()
            return len(calls)

        first = asyncio.create_task(slow())
        await asyncio.sleep(0)
        found = [await slow()]
        go_on.set()
        return [*found, await first]

    assert asyncio.run(main()) == [2, 2]


def test_a_task_that_is_cancelled_leaves_the_computation_to_another(cache: Cache) -> None:
    calls: list[int] = []

    async def main() -> int:
        @cache.memoize()
        async def slow() -> int:
            calls.append(1)
            if len(calls) == 1:
                await asyncio.Event().wait()
            return len(calls)

        first = asyncio.create_task(slow())
        await until(lambda: bool(calls))
        second = asyncio.create_task(slow())
        await until(lambda: cache.stats().misses == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()) == 2
    assert cache.engine.keys("cache:leases") == []


def test_a_task_that_is_cancelled_while_it_waits_takes_no_other_along(cache: Cache) -> None:
    async def main() -> list[int]:
        go_on = asyncio.Event()

        @cache.memoize()
        async def slow() -> int:
            await go_on.wait()
            return 7

        first, second, third = (asyncio.create_task(slow()) for _ in range(3))
        await until(lambda: cache.stats().misses == 3)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go_on.set()
        return await asyncio.gather(first, third)

    assert asyncio.run(main()) == [7, 7]


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53], ids=["late", "early"])
def test_a_result_is_computed_early_by_chance(
    cache: Cache, chance: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(random, "random", lambda: chance)
    calls: list[str] = []

    @cache.memoize(expire=600, early=1e12)
    def value() -> int:
        calls.append("plain")
        if calls.count("plain") == 3:
            raise ZeroDivisionError("third")
        return calls.count("plain")

    @cache.memoize(expire=600, early=1e12)
    async def value_async() -> int:
        calls.append("async")
        if calls.count("async") == 3:
            raise ZeroDivisionError("third")
        return calls.count("async")

    found = [value(), value()]
    found_async = [asyncio.run(value_async()), asyncio.run(value_async())]

    if not chance:
        assert (found, found_async) == ([1, 1], [1, 1])
        return
    assert (found, found_async) == ([1, 2], [1, 2])
    with caplog.at_level(logging.WARNING, "scopestate.integrations"):
        assert value() == 2  # the one that is there, as the third fails
        assert asyncio.run(value_async()) == 2
    assert [record.message.count("ZeroDivisionError: third") for record in caplog.records] == [1, 1]
    cache.engine.set("cache:leases", key_of(value), 1)
    cache.engine.set("cache:leases", key_of(value_async), 1)
    assert value() == 2  # another process computes it
    assert asyncio.run(value_async()) == 2
    assert calls.count("plain") == calls.count("async") == 3


def test_while_one_computes_early_the_others_get_the_old_result(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 1 - 2**-53)
    begun, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    @cache.memoize(expire=600, early=1e12)
    def value() -> int:
        calls.append(1)
        if len(calls) == 2:
            begun.set()
            assert go_on.wait(30)
        return len(calls)

    assert value() == 1
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(value)
        assert begun.wait(30)
        assert value() == 1
        go_on.set()
        assert early.result(30) == 2

    async def main() -> list[int]:
        go_on = asyncio.Event()

        @cache.memoize(expire=600, early=1e12)
        async def value() -> int:
            calls.append(1)
            if len(calls) == 4:
                await go_on.wait()
            return len(calls)

        found = [await value()]
        early = asyncio.create_task(value())
        await asyncio.sleep(0)
        found.append(await value())
        go_on.set()
        return [*found, await early]

    assert asyncio.run(main()) == [3, 3, 4]


def test_a_lease_that_cannot_be_given_back_is_logged(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    engine = cache.engine

    @cache.memoize()
    def end() -> int:
        engine.close()
        return 1

    with pytest.raises(EngineClosed):
        end()
    assert "ends on its own" in caplog.text
