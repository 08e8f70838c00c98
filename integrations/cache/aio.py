"""The calls of a cache for asyncio, which wait without blocking the event loop."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from scopestate.errors import BatchTooLarge, Conflict, ScopestateError
from scopestate.integrations.cache.limits import PAGE, Sized
from scopestate.integrations.cache.steps import (
    adding,
    expires_until,
    facts_of,
    has_tag,
    is_increment,
    pieces,
    remove_unchanged,
    size_of,
    sizes_of,
    taken,
)
from scopestate.integrations.cache.transaction import ATTEMPTS, Block, CacheTransaction
from scopestate.integrations.cache.values import ABSENT, deadline, key_of, name_of, pack, value_of, with_facts
from scopestate.ops import Increment
from scopestate.ops.results import EntryView
from scopestate.signals import certainly

if TYPE_CHECKING:
    from scopestate.integrations.cache.cache import Cache

log = logging.getLogger("scopestate.integrations")

A = TypeVar("A")


class AioCache:
    """The calls of a `Cache` for asyncio, on any event loop. `cache.aio` makes it; it has no state of its own.

    Each call does what the call of `Cache` with the same name does. The first one opens the engine on a thread, so that
    the event loop is not blocked. Instead of operators there are `contains`, `count` and `async for`. To decorate
    coroutine functions use `Cache.memoize`.
    """

    __slots__ = ("_cache", "_scope", "_source")

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._source = cache._source
        self._scope = cache.scope

    # --------------------------------------------------------------------------------------------------- one entry

    async def get(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.get`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.get(key, default, expire_time=expire_time, tag=tag)
        aio, counts = await self._source.aio(), self._cache._counts
        if expire_time or tag:
            entry = await aio.entry(self._scope, name_of(key))
            if counts is not None:
                counts.count(found=entry is not None)
            return with_facts(facts_of(entry), default, expire_time=expire_time, tag=tag)
        value = await aio.get(self._scope, name_of(key), ABSENT)
        if counts is not None:
            counts.count(found=value is not ABSENT)
        return default if value is ABSENT else value_of(value)

    async def set(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.set`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.set(key, value, expire, tag=tag)
        await self._set(name_of(key), pack(value, None if tag is None else name_of(tag)), deadline(expire))
        return True

    async def add(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.add`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.add(key, value, expire, tag=tag)
        name, stored = name_of(key), pack(value, None if tag is None else name_of(tag))
        try:
            await self._set(name, stored, {**deadline(expire), "if_absent": True})
        except Conflict:
            return False
        return True

    async def _set(self, name: str, stored: Any, options: dict[str, Any]) -> None:
        aio = await self._source.aio()
        result = await aio.set(self._scope, name, stored, **options, **self._source.once())
        await self._grown(len(result.new_json) + len(name))

    async def incr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.incr`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.incr(key, delta, default)
        name, aio = name_of(key), await self._source.aio()
        if is_increment(delta, default):
            step = Increment("", delta)  # type: ignore[arg-type]  # a whole number
            result = await aio.update(self._scope, name, [step], **self._source.once())
            if not result.errors:
                return result.new_value
        return value_of(await aio.transact(self._scope, adding(key, name, delta, default), **self._source.once()))

    async def decr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.decr`."""
        return await self.incr(key, -delta, default)

    async def pop(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.pop`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.pop(key, default, expire_time=expire_time, tag=tag)
        if not (expire_time or tag):
            return await self._taken(name_of(key), default)
        aio = await self._source.aio()
        while True:
            entry = await aio.entry(self._scope, name_of(key))
            if entry is None or await self._remove([entry]):
                return with_facts(facts_of(entry), default, expire_time=expire_time, tag=tag)

    async def touch(self, key: Any, expire: float | timedelta | None = None) -> bool:
        """As `Cache.touch`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.touch(key, expire)
        name, asked = name_of(key), deadline(expire) or {"ttl": None}
        return await (await self._source.aio()).touch(self._scope, name, **asked, **self._source.once())

    async def delete(self, key: Any) -> bool:
        """As `Cache.delete`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.delete(key)
        return await self._taken(name_of(key), ABSENT) is not ABSENT

    async def _taken(self, name: str, default: Any) -> Any:
        async with (await self._source.aio()).batch(self._scope, **self._source.once()) as batch:
            batch.delete(name)
        return taken(batch.result, default)

    async def contains(self, key: Any) -> bool:
        """Return whether a key exists: `key in cache`."""
        if (transaction := self._transaction()) is not None:
            return await transaction.contains(key)
        return await (await self._source.aio()).get(self._scope, name_of(key), ABSENT) is not ABSENT

    # ------------------------------------------------------------------------------------------------ many entries

    async def set_many(
        self, values: Mapping[Any, Any], expire: float | timedelta | None = None, *, tag: Any = None
    ) -> None:
        """As `Cache.set_many`. Not within `transact`."""
        group, options = None if tag is None else name_of(tag), deadline(expire)
        packed = [(name_of(key), pack(value, group)) for key, value in values.items()]
        aio = await self._source.aio()
        for piece in pieces(packed):
            try:
                async with aio.batch(self._scope, **self._source.once()) as batch:
                    for name, value in piece:
                        batch.set(name, value, **options)
            except BatchTooLarge:
                for name, value in piece:
                    await self._set(name, value, options)
            else:
                for size in sizes_of(batch.result):
                    await self._grown(size)

    async def delete_many(self, keys: Iterable[Any]) -> None:
        """As `Cache.delete_many`. Not within `transact`."""
        aio = await self._source.aio()
        for piece in pieces([name_of(key) for key in keys]):
            async with aio.batch(self._scope, **self._source.once()) as batch:
                for name in piece:
                    batch.delete(name)

    async def count(self) -> int:
        """Return how many entries there are: `len(cache)`."""
        return await (await self._source.aio()).count(self._scope)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.iterkeys()

    async def iterkeys(self, reverse: bool = False) -> AsyncIterator[Any]:
        """As `Cache.iterkeys`, for `async for`."""
        async for entry in self._entries(reverse=reverse):
            yield key_of(entry.key)

    async def _entries(self, *, reverse: bool = False) -> AsyncIterator[EntryView[Any]]:
        async for page in (await self._source.aio()).pages(self._scope, PAGE, reverse=reverse):
            for entry in page.entries:
                yield entry

    async def clear(self) -> int:
        """As `Cache.clear`."""
        return await (await self._source.aio()).delete_range(self._scope, prefix="", **self._source.once())

    async def evict(self, tag: Any) -> int:
        """As `Cache.evict`."""
        return await self._remove_where(has_tag(name_of(tag)))

    async def expire(self, now: float | None = None) -> int:
        """As `Cache.expire`."""
        return 0 if now is None else await self._remove_where(expires_until(now))

    async def volume(self) -> int:
        """As `Cache.volume`."""
        return sum([size_of(entry) async for entry in self._entries()])

    async def cull(self) -> int:
        """As `Cache.cull`. Writes through this object also do it from time to time."""
        limits, ticket = self._cache._limits, object()
        if not limits.begin(ticket):
            return 0
        removed = count = size = 0
        try:
            entries: list[Sized] = [(entry.revision, entry.key, size_of(entry)) async for entry in self._entries()]
            count, size = len(entries), sum([one[2] for one in entries])
            for piece in limits.surplus(entries):
                removed += await self._remove([EntryView(key, b"", revision) for revision, key, _ in piece])
                count, size = count - len(piece), size - sum([one[2] for one in piece])
            return removed
        finally:
            limits.end(count, size)
            limits.release(ticket)

    async def _grown(self, size: int) -> None:
        if self._cache.is_grown(size):
            try:
                await self.cull()
            except ScopestateError as error:
                log.warning("the cache in scope %r could not be culled: %s", self._scope, error)  # the write was made

    async def _remove_where(self, wanted: Callable[[EntryView[Any]], bool]) -> int:
        removed = 0
        async for page in (await self._source.aio()).pages(self._scope, PAGE):
            found = [entry for entry in page.entries if wanted(entry)]
            if found:
                removed += await self._remove(found)
        return removed

    async def _remove(self, entries: list[EntryView[Any]]) -> int:
        """Remove entries that have not changed since they were read; return how many."""
        try:
            async with (await self._source.aio()).batch(self._scope, **self._source.once()) as batch:
                remove_unchanged(batch, entries)
            return len(entries)
        except Conflict:
            return 0 if len(entries) == 1 else sum([await self._remove([entry]) for entry in entries])

    # ------------------------------------------------------------------------------------------------- transactions

    @overload
    def transact(self) -> AioTransactionBlock: ...

    @overload
    def transact(self, function: Callable[[], Awaitable[A]]) -> Coroutine[Any, Any, A]: ...

    def transact(
        self, function: Callable[[], Awaitable[A]] | None = None
    ) -> AioTransactionBlock | Coroutine[Any, Any, A]:
        """As `Cache.transact`: a block for `async with`, or `await` it with a coroutine function.

        Blocks of different tasks do not wait for one another. A block that has read something which another block has
        changed meanwhile raises Conflict, or calls its function again.
        """
        return AioTransactionBlock(self._cache) if function is None else self._transacted(function)

    async def _transacted(self, function: Callable[[], Awaitable[A]]) -> A:
        for attempt in range(ATTEMPTS):
            try:
                async with AioTransactionBlock(self._cache):
                    return await function()
            except Conflict:
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError

    def _transaction(self) -> AioCacheTransaction | None:
        """Return the transaction whose block this task is in."""
        if not self._cache._blocks or (transaction := self._cache._transaction()) is None:
            return None
        return AioCacheTransaction(self._cache, transaction)

    # ----------------------------------------------------------------------------------------------------- the end

    async def close(self) -> None:
        """As `Cache.close`."""
        await self._on_thread(self._source.close)

    async def __aenter__(self) -> Self:
        await self._on_thread(self._source.enter)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._on_thread(self._source.leave)

    async def _on_thread(self, work: Callable[[], None]) -> None:
        import asyncio  # noqa: PLC0415 - takes 20 ms, and this module is imported by programs without it

        await asyncio.to_thread(work)

    def __repr__(self) -> str:
        return f"{self._cache!r}.aio"


class AioTransactionBlock(Block):
    """A block of `AioCache.transact`, for `async with`."""

    async def __aenter__(self) -> AioCacheTransaction:
        return AioCacheTransaction(self._cache, self._enter())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._entered:  # it is part of an outer block
            return
        try:
            self.transaction.ended = True
            if kind is None:
                await self._commit()
            self._leave()
        except BaseException:
            certainly(self._leave)  # not `finally`, as in `TransactionBlock`
            raise

    async def _commit(self) -> None:
        cache = self._cache
        async with (await cache._source.aio()).batch(cache.scope, **cache._source.once()) as batch:
            self.transaction._fill(batch)
        await cache.aio._grown(sum(sizes_of(batch.result)))


class AioCacheTransaction:
    """The reads and writes of a block of `AioCache.transact`. The calls are those of `AioCache`."""

    def __init__(self, cache: Cache, transaction: CacheTransaction) -> None:
        self._cache = cache
        self._of = transaction

    def __repr__(self) -> str:
        return repr(self._of)

    async def _read(self, key: Any) -> CacheTransaction:
        """Return the transaction, after it has read a key from the cache."""
        name = name_of(key)
        if self._of._must_read(name):
            entry = await (await self._cache._source.aio()).entry(self._cache.scope, name)
            self._of._seen.setdefault(name, entry)
        return self._of

    async def get(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.get`."""
        return (await self._read(key)).get(key, default, expire_time=expire_time, tag=tag)

    async def set(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.set`. The value before is not read."""
        return self._of.set(key, value, expire, tag=tag)

    async def add(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.add`."""
        return (await self._read(key)).add(key, value, expire, tag=tag)

    async def incr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.incr`."""
        return (await self._read(key)).incr(key, delta, default)

    async def decr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.decr`."""
        return (await self._read(key)).decr(key, delta, default)

    async def pop(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.pop`."""
        return (await self._read(key)).pop(key, default, expire_time=expire_time, tag=tag)

    async def touch(self, key: Any, expire: float | timedelta | None = None) -> bool:
        """As `Cache.touch`."""
        return (await self._read(key)).touch(key, expire)

    async def delete(self, key: Any) -> bool:
        """As `Cache.delete`."""
        return (await self._read(key)).delete(key)

    async def contains(self, key: Any) -> bool:
        """As `AioCache.contains`."""
        return key in await self._read(key)
