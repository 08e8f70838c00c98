"""The calls of a cache for asyncio: blocks, opening and closing. What single calls do is in test_cache.py."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from scopestate.errors import Conflict, DeserializationError, StorageError
from scopestate.integrations.cache import Cache


def test_a_block_takes_effect_at_its_end_or_not_at_all() -> None:
    async def main() -> None:
        async with Cache().aio as cache:
            await cache.set("gone", 1)
            async with cache.transact() as inside:
                assert await inside.incr("n", 5) == 5
                assert await inside.decr("n") == 4
                assert await inside.add("n", 1) is False
                assert await inside.set("k", (1, 2), 60, tag="t") is True
                assert await inside.get("k", tag=True) == ((1, 2), "t")
                assert await inside.touch("k", 600) is True
                assert await inside.contains("gone") is True
                assert await inside.pop("gone") == 1
                assert await inside.delete("gone") is False
                assert await cache.get("n") == 4  # calls within the block are a part of it
                async with cache.transact() as inner:
                    await inner.set("inner", 1)
            assert [key async for key in cache] == ["inner", "k", "n"]

            with pytest.raises(ZeroDivisionError):
                async with cache.transact() as inside:
                    await inside.set("never", 1 / 0)
            assert await cache.contains("never") is False
            with pytest.raises(DeserializationError, match="has ended"):
                await inside.get("n")

    asyncio.run(main())


def test_of_blocks_that_read_the_same_one_takes_effect_and_functions_are_called_again() -> None:
    async def main() -> None:
        async with Cache().aio as cache:
            await cache.set("n", 0)
            with pytest.raises(Conflict):
                async with cache.transact() as inside:
                    read = await inside.get("n")
                    await asyncio.to_thread(lambda: cache._cache.engine.set("cache", "n", 10))
                    await inside.set("n", read + 1)

            async def count() -> int:
                read: int = await cache.get("n")
                await asyncio.sleep(0)
                await cache.set("n", read + 1)
                return read

            assert sorted(await asyncio.gather(*[cache.transact(count) for _ in range(5)])) == [10, 11, 12, 13, 14]
            assert await cache.get("n") == 15

            async def always() -> None:
                await cache.get("n")
                cache._cache.engine.set("cache", "n", 1)

            with pytest.raises(Conflict):
                await cache.transact(always)

    asyncio.run(main())


def test_the_directory_is_opened_and_closed_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, on = Cache(tmp_path / "cache"), list[threading.Thread]()
    for name in ("open", "close"):
        real = getattr(cache._source, name)
        monkeypatch.setattr(cache._source, name, lambda real=real: (on.append(threading.current_thread()), real())[1])

    async def main() -> None:
        assert await cache.aio.incr("n") == 1
        await cache.aio.close()
        assert await cache.aio.incr("n") == 2
        await cache.aio.close()
        async with cache.aio as inside:
            assert await inside.get("n") == 2

    asyncio.run(main())
    assert len(on) >= 4
    assert threading.main_thread() not in on
    assert repr(cache.aio) == f"{cache!r}.aio"


def test_the_oldest_entries_go_first_and_the_write_is_made_if_they_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Cache(max_entries=20).aio as cache:
            for number in range(60):
                await cache.set(number, number)
            assert await cache.count() <= 25
            assert (await cache.get(0), await cache.get(59)) == (None, 59)
            assert await cache.volume() > 0
            await cache.set_many({f"many-{number}": number for number in range(100)})
            assert await cache.count() <= 25
            while await cache.cull():
                continue
            assert await cache.count() <= 20

            async def full(self: object) -> int:
                raise StorageError("the disk is full")

            monkeypatch.setattr("scopestate.integrations.cache.aio.AioCache.cull", full)
            for number in range(60):
                await cache.set(number, number)
            assert await cache.get(59) == 59

    asyncio.run(main())
    assert "could not be culled: the disk is full" in caplog.text


def test_values_that_are_too_large_for_one_step_are_set_one_by_one() -> None:
    async def main() -> None:
        async with Cache(size_limit=None).aio as cache:
            large = "x" * 6_000_000
            await cache.set_many(dict.fromkeys(range(4), large))
            assert await cache.count() == 4
            await cache.delete_many(range(4))
            assert await cache.count() == 0

    asyncio.run(main())


def test_what_changed_while_it_was_removed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Cache().aio as cache:
            for key in ("a", "b"):
                await cache.set(key, 1, tag="t")
            entries = [entry async for entry in cache._entries()]
            await cache.set("a", 2)
            assert await cache._remove(entries) == 1
            assert [key async for key in cache] == ["a"]

    asyncio.run(main())
