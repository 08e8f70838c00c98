"""A store for py-key-value (`py-key-value-aio`), which FastMCP and others keep their state in.

    from scopestate.integrations.key_value import StateStore

    store = StateStore("./data/state")  # StateStore() is in memory, StateStore(engine) in an engine of the program
    await store.put("ada", {"name": "Ada"}, collection="users", ttl=600)

Each collection is a scope, and each value is stored as it is, so triggers and the command line can read it.
docs/how-to/caches.md has the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Final, TypeVar

try:
    from key_value.aio.errors import (
        DeserializationError,
        InvalidKeyError,
        KeyValueStoreError,
        SerializationError,
        StoreConnectionError,
        ValueTooLargeError,
    )
    from key_value.aio.stores.base import (
        BaseContextManagerStore,
        BaseCullStore,
        BaseDestroyCollectionStore,
        BaseDestroyStore,
        BaseEnumerateCollectionsStore,
        BaseEnumerateKeysStore,
        ManagedEntry,
    )
except ImportError as error:
    raise ImportError(
        "scopestate.integrations.key_value needs py-key-value-aio: pip install 'scopestate[key-value]'"
    ) from error

from scopestate import errors
from scopestate.aio import AioEngine
from scopestate.engine import Engine
from scopestate.integrations.cache.engines import Durability, EngineSource
from scopestate.integrations.cache.limits import ENTRY_BYTES, PAGE, Limits, Sized
from scopestate.ops.results import DeleteResult, EntryView

__all__ = ["StateStore"]

log = logging.getLogger("scopestate.integrations")

A = TypeVar("A")

_MOST_KEYS: Final = 1_000
"""Keys of a transaction."""
_AWAY: Final = (
    errors.CallTimeout,
    errors.ConnectionLost,
    errors.NotConnected,
    errors.Overloaded,
    errors.ReplyTimeout,
    errors.StorageError,
)
"""Errors after which a retry may succeed: py-key-value's `RetryWrapper` retries them."""


class StateStore(
    BaseCullStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    BaseContextManagerStore,
):
    """A py-key-value store in a directory, in memory, or in an engine of the program. For any thread and event loop.

    Its calls are those of py-key-value, and raise its errors: `SerializationError` for a value that JSON cannot hold,
    `ValueTooLargeError`, `InvalidKeyError` for a name with half of a surrogate pair, and `StoreConnectionError`, with
    the engine's error as the cause, if the store does not work at the moment. A call on one key is one step; `put_many`
    and `delete_many` take one step for each 1,000 keys. Keys and collections are listed in the order of their UTF-8
    bytes.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Engine | None = None,
        *,
        prefix: str = "kv:",
        default_collection: str | None = None,
        max_entries_per_collection: int | None = None,
        durability: Durability | None = None,
        save_interval_ms: int | None = None,
    ) -> None:
        """Make a store. The first call opens the directory, which several processes may share (docs/how-to/sharing.md).

        The scope of a collection is `prefix` and its name. Two stores in one place are separate if neither prefix
        begins with the other. With `durability` "interval", the default, a crash loses the writes of the last
        `save_interval_ms` (default 1000); with "commit", each write is on disk when its call returns.

        If a collection has more than `max_entries_per_collection`, `cull` removes the entries that were stored the
        longest ago. Writes through this object also do that from time to time. None: no limit.
        """
        if not prefix:
            raise errors.DeserializationError(
                "`prefix` is empty: `destroy` would delete every scope of the engine; give a prefix"
            )
        self._source = EngineSource(source, durability, save_interval_ms, self._after_fork)
        self._prefix: Final = prefix
        self._most: Final = max_entries_per_collection
        Limits(None, max_entries_per_collection)  # raises for an invalid limit
        self._limits: dict[str, Limits] = {}
        super().__init__(
            default_collection=default_collection,
            client_provided_by_user=isinstance(source, Engine),
            stable_api=True,
        )

    @property
    def engine(self) -> Engine:
        """The engine that has the entries; opened if it is not open."""
        return self._source.open()

    async def close(self) -> None:
        """Save and close the engine that this store has opened, unless another store or cache of the process uses it.

        A later call opens it again. An engine of the program stays open.
        """
        await super().close()
        await asyncio.to_thread(self._source.close)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        await asyncio.to_thread(self._source.close)

    async def _setup(self) -> None:
        await self._source.aio()

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        with _their_errors(collection):
            entry = await (await self._source.aio()).entry(self._prefix + collection, key)
            return None if entry is None else _managed(entry)

    async def _get_managed_entries(self, *, collection: str, keys: Sequence[str]) -> list[ManagedEntry | None]:
        found: list[ManagedEntry | None] = []
        for piece in _pieces(keys):
            # All at once: in Redis, and through the owner of a directory, they are sent and answered together.
            found += await asyncio.gather(*[self._get_managed_entry(collection=collection, key=key) for key in piece])
        return found

    async def _put_managed_entry(self, *, collection: str, key: str, managed_entry: ManagedEntry) -> None:
        with _their_errors(collection):
            aio, scope, value = await self._source.aio(), self._prefix + collection, dict(managed_entry.value)
            options = self._source.once()
            if managed_entry.ttl is not None:
                options["ttl"] = _seconds(managed_entry.ttl)
            await aio.set(scope, key, value, **options)
        await self._grown(collection, 1)

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,
        expires_at: datetime | None,
    ) -> None:
        del created_at, expires_at  # the engine computes the remaining time with its own clock
        for piece in _pieces([(key, dict(entry.value)) for key, entry in zip(keys, managed_entries, strict=True)]):
            with _their_errors(collection):
                await self._put_piece(collection, piece, ttl)
            await self._grown(collection, len(piece))

    async def _put_piece(
        self, collection: str, piece: Sequence[tuple[str, dict[str, object]]], ttl: float | None
    ) -> None:
        try:
            async with (await self._source.aio()).batch(self._prefix + collection, **self._source.once()) as batch:
                for key, value in piece:
                    if ttl is None:
                        batch.set(key, value)
                    else:
                        batch.set(key, value, ttl=_seconds(ttl))
        except errors.BatchTooLarge:
            if len(piece) == 1:
                raise
            half = len(piece) // 2
            await self._put_piece(collection, piece[:half], ttl)
            await self._put_piece(collection, piece[half:], ttl)

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        return await self._delete_managed_entries(keys=[key], collection=collection) == 1

    async def _delete_managed_entries(self, *, keys: Sequence[str], collection: str) -> int:
        deleted = 0
        with _their_errors(collection):
            for piece in _pieces(keys):
                async with (await self._source.aio()).batch(self._prefix + collection, **self._source.once()) as batch:
                    for key in piece:
                        batch.delete(key)
                deleted += sum(
                    [isinstance(one, DeleteResult) and one.old_json is not None for one in batch.result.results]
                )
        return deleted

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        if limit is not None and limit < 1:
            return []
        with _their_errors(collection):
            return await (await self._source.aio()).keys(self._prefix + collection, limit=limit)

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        with _their_errors(None):
            scopes = await (await self._source.aio()).list_groups()
        names = [scope[len(self._prefix) :] for scope in scopes if scope.startswith(self._prefix)]
        return names if limit is None else names[: max(0, limit)]

    async def _delete_collection(self, *, collection: str) -> bool:
        with _their_errors(collection):
            aio = await self._source.aio()
            return await aio.delete_range(self._prefix + collection, prefix="", **self._source.once()) > 0

    async def _delete_store(self) -> bool:
        for collection in await self._get_collection_names():
            await self._delete_collection(collection=collection)
        return True

    async def _cull(self) -> None:
        """Remove the oldest entries of collections that have too many. The engine itself removes expired entries."""
        if self._most is not None:
            for collection in await self._get_collection_names():
                await self._cull_collection(collection)

    async def _grown(self, collection: str, writes: int) -> None:
        """Note a number of writes to a collection, and enforce its limit if it is time."""
        if self._most is None:
            return
        limits, due = self._limits_of(collection), False
        for _ in range(writes):
            due = limits.written(0)
        if due:
            try:
                await self._cull_collection(collection)
            except KeyValueStoreError as error:
                log.warning("the collection %r could not be culled: %s", collection, error)  # the write was made

    def _limits_of(self, collection: str) -> Limits:
        limits = self._limits.get(collection)
        return limits or self._limits.setdefault(collection, Limits(None, self._most))

    def _after_fork(self) -> None:
        for limits in self._limits.values():
            limits.forget()

    async def _cull_collection(self, collection: str) -> None:
        limits, scope, count = self._limits_of(collection), self._prefix + collection, 0
        ticket = object()
        if not limits.begin(ticket):
            return  # another task is doing it
        try:
            with _their_errors(collection):
                aio, entries = await self._source.aio(), list[Sized]()
                async for page in aio.pages(scope, PAGE):
                    entries += [(one.revision, one.key, len(one.json) + ENTRY_BYTES) for one in page.entries]
                count = len(entries)
                for piece in limits.surplus(entries):
                    await self._remove(aio, scope, piece)
                    count -= len(piece)
        finally:
            limits.end(count, 0)
            limits.release(ticket)

    async def _remove(self, aio: AioEngine, scope: str, entries: Sequence[Sized]) -> None:
        """Remove entries that have not changed since they were read."""
        try:
            async with aio.batch(scope, **self._source.once()) as batch:
                for revision, key, _ in entries:
                    if revision:  # 0: the place where the scope is kept has no revisions
                        batch.check(key, revision=revision)
                    batch.delete(key)
        except errors.Conflict:
            if len(entries) > 1:
                for entry in entries:
                    await self._remove(aio, scope, [entry])

    def __repr__(self) -> str:
        where = self._source.directory or ("an engine" if isinstance(self._source.given, Engine) else "memory")
        return f"<StateStore {self._prefix!r} in {where}>"


def _managed(entry: EntryView) -> ManagedEntry:
    value = entry.value
    if not isinstance(value, dict):
        raise DeserializationError(
            f"the key {entry.key!r:.80} holds {type(value).__name__}, and a value of py-key-value is an object: "
            "something other than this store wrote it"
        )
    return ManagedEntry(value=value, expires_at=entry.expires_at)


def _seconds(ttl: float) -> float:
    """Return a time to live that the engine accepts: at least a millisecond."""
    return max(ttl, 0.001)


def _pieces(items: Sequence[A]) -> Iterator[Sequence[A]]:
    for start in range(0, len(items), _MOST_KEYS):
        yield items[start : start + _MOST_KEYS]


@contextmanager
def _their_errors(collection: str | None) -> Iterator[None]:
    """Raise an error of the engine as the py-key-value error that users of that library expect."""
    try:
        yield
    except errors.ValueTooLarge as error:
        raise ValueTooLargeError(error.size, error.limit, collection, error.key) from error
    except (errors.InvalidValue, errors.SchemaViolation, errors.BatchTooLarge) as error:
        raise SerializationError(str(error)) from error
    except errors.DeserializationError as error:
        raise InvalidKeyError(str(error)) from error
    except _AWAY as error:
        raise StoreConnectionError(str(error)) from error
    except errors.ScopestateError as error:
        raise KeyValueStoreError(str(error)) from error
