"""Handles on one scope, for threads and for asyncio."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from msgspec import UNSET, UnsetType

from scopestate.batch import Batch
from scopestate.ops.apply import MISSING
from scopestate.ops.options import (
    Bounds,
    DeleteOptions,
    PageOptions,
    RangeOptions,
    SetOptions,
    UpdateOptions,
    WatchOptions,
    WriteOptions,
)
from scopestate.ops.ranges import PAGE_KEYS

if TYPE_CHECKING:
    import pykka

    from scopestate.actors.scope import ScopeActor
    from scopestate.aio import AioEngine
    from scopestate.batch import AioBatch
    from scopestate.engine import Engine
    from scopestate.mapping import ScopeMapping
    from scopestate.ops.results import CasResult, EntryView, ModifyResult, Page, SetResult, UpdateResult
    from scopestate.ops.transactions import Transaction
    from scopestate.watching import AioChanges, Changes

A = TypeVar("A")


class Scope:
    """One scope of an engine. It has no state of its own, so it may be kept and shared.

    >>> from scopestate import Engine
    >>> engine = Engine()
    >>> users = engine.scope("users")
    >>> users.set("ada", {"logins": 1}, if_absent=True).created
    True
    >>> users.modify("ada", lambda user: {"logins": user["logins"] + 1}).new_value
    {'logins': 2}
    >>> users.keys(prefix="a"), "bob" in users
    (['ada'], False)
    >>> engine.close()
    """

    def __init__(self, engine: Engine, scope: str) -> None:
        self._engine = engine
        self.name = scope

    @cached_property
    def aio(self) -> AioScope:
        """The same calls as coroutines."""
        return AioScope(self._engine.aio, self.name)

    def set(self, key: str, value: object, **options: Unpack[SetOptions]) -> SetResult:
        """As `Engine.set` on this scope."""
        if options:
            return self._engine._set_with(self.name, key, value, options)
        return self._engine.set(self.name, key, value)

    def get(self, key: str, default: Any = None) -> Any:
        """As `Engine.get` on this scope."""
        return self._engine.get(self.name, key, default)

    def delete(self, key: str, **options: Unpack[DeleteOptions]) -> Any:
        """As `Engine.delete` on this scope."""
        return self._engine.delete(self.name, key, **options)

    def update(self, key: str, ops: Iterable[object], **options: Unpack[UpdateOptions]) -> UpdateResult:
        """As `Engine.update` on this scope."""
        if options:
            return self._engine.update(self.name, key, ops, **options)
        return self._engine.update(self.name, key, ops)

    def list(self) -> builtins.list[Any]:
        """As `Engine.list` on this scope."""
        return self._engine.list(self.name)

    def entry(self, key: str) -> EntryView | None:
        """As `Engine.entry` on this scope."""
        return self._engine.entry(self.name, key)

    def compare_and_set(self, key: str, expected: object, value: object, **options: Unpack[WriteOptions]) -> CasResult:
        """As `Engine.compare_and_set` on this scope."""
        return self._engine._compare_and_set(self.name, key, expected, value, options)

    def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult:
        """As `Engine.modify` on this scope."""
        return self._engine.modify(self.name, key, function, default, durable=durable)

    def touch(
        self,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
        **options: Unpack[WriteOptions],
    ) -> bool:
        """As `Engine.touch` on this scope."""
        return self._engine.touch(self.name, key, ttl, expires_at=expires_at, **options)

    def ttl(self, key: str) -> float | None:
        """As `Engine.ttl` on this scope."""
        return self._engine.ttl(self.name, key)

    def batch(self, **options: Unpack[WriteOptions]) -> Batch:
        """As `Engine.batch` on this scope."""
        return Batch(self._engine._run, self.name, self._engine._limits, options)

    def transact(self, function: Callable[[Transaction], A], **options: Unpack[WriteOptions]) -> A:
        """As `Engine.transact` on this scope."""
        return self._engine.transact(self.name, function, **options)

    def keys(self, **within: Unpack[RangeOptions]) -> builtins.list[str]:
        """As `Engine.keys` on this scope."""
        return self._engine.keys(self.name, **within)

    def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, Any]]:
        """As `Engine.items` on this scope."""
        return self._engine.items(self.name, **within)

    def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView]:
        """As `Engine.entries` on this scope."""
        return self._engine.entries(self.name, **within)

    def values(self, **within: Unpack[RangeOptions]) -> builtins.list[Any]:
        """As `Engine.values` on this scope."""
        return self._engine.values(self.name, **within)

    def count(self, **bounds: Unpack[Bounds]) -> int:
        """As `Engine.count` on this scope."""
        return self._engine.count(self.name, **bounds)

    def delete_range(
        self, *, durable: bool | None = None, idempotency_key: str | None = None, **bounds: Unpack[Bounds]
    ) -> int:
        """As `Engine.delete_range` on this scope."""
        return self._engine.delete_range(self.name, durable=durable, idempotency_key=idempotency_key, **bounds)

    def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> Iterator[Page]:
        """As `Engine.pages` on this scope."""
        return self._engine.pages(self.name, limit, **walk)

    def iter(self, **within: Unpack[RangeOptions]) -> Iterator[tuple[str, Any]]:
        """As `Engine.iter` on this scope."""
        return self._engine.iter(self.name, **within)

    def watch(self, **options: Unpack[WatchOptions]) -> Changes:
        """As `Engine.watch` on this scope."""
        return self._engine.watch(self.name, **options)

    def mapping(self) -> ScopeMapping:
        """Return the scope as a `collections.abc.MutableMapping` of keys to values. See `ScopeMapping`."""
        return self._engine.mapping(self.name)

    def __contains__(self, key: object) -> bool:
        """Return whether a key exists; one that holds null does."""
        return isinstance(key, str) and self._engine.get(self.name, key, MISSING) is not MISSING

    @property
    def actor_ref(self) -> pykka.ActorRef[ScopeActor]:
        """The Pykka ref of the scope's current actor, for the messages in `scopestate.messages`.

        After passivation the scope has a new actor; the old ref passes messages on to it.
        """
        ref: pykka.ActorRef[ScopeActor] = self._engine._scopes[self.name].actor_ref
        return ref

    def __repr__(self) -> str:
        return f"<Scope {self.name!r}>"


class AioScope:
    """One scope, for asyncio; holds no state of its own."""

    def __init__(self, engine: AioEngine, scope: str) -> None:
        self._engine = engine
        self.name = scope

    async def set(self, key: str, value: object, **options: Unpack[SetOptions]) -> SetResult:
        """As `Engine.set` on this scope."""
        return await self._engine.set(self.name, key, value, **options)

    async def get(self, key: str, default: Any = None) -> Any:
        """As `Engine.get` on this scope."""
        return await self._engine.get(self.name, key, default)

    async def delete(self, key: str, **options: Unpack[DeleteOptions]) -> Any:
        """As `Engine.delete` on this scope."""
        return await self._engine.delete(self.name, key, **options)

    async def update(self, key: str, ops: Iterable[object], **options: Unpack[UpdateOptions]) -> UpdateResult:
        """As `Engine.update` on this scope."""
        return await self._engine.update(self.name, key, ops, **options)

    async def list(self) -> builtins.list[Any]:
        """As `Engine.list` on this scope."""
        return await self._engine.list(self.name)

    async def entry(self, key: str) -> EntryView | None:
        """As `Engine.entry` on this scope."""
        return await self._engine.entry(self.name, key)

    async def compare_and_set(
        self, key: str, expected: object, value: object, **options: Unpack[WriteOptions]
    ) -> CasResult:
        """As `Engine.compare_and_set` on this scope."""
        return await self._engine.compare_and_set(self.name, key, expected, value, **options)

    async def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult:
        """As `Engine.modify` on this scope."""
        return await self._engine.modify(self.name, key, function, default, durable=durable)

    async def touch(
        self,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
        **options: Unpack[WriteOptions],
    ) -> bool:
        """As `Engine.touch` on this scope."""
        return await self._engine.touch(self.name, key, ttl, expires_at=expires_at, **options)

    async def ttl(self, key: str) -> float | None:
        """As `Engine.ttl` on this scope."""
        return await self._engine.ttl(self.name, key)

    def batch(self, **options: Unpack[WriteOptions]) -> AioBatch:
        """As `Engine.batch` on this scope, for `async with`."""
        return self._engine.batch(self.name, **options)

    async def transact(self, function: Callable[[Transaction], A], **options: Unpack[WriteOptions]) -> A:
        """As `Engine.transact` on this scope; `function` is a plain function."""
        return await self._engine.transact(self.name, function, **options)

    async def keys(self, **within: Unpack[RangeOptions]) -> builtins.list[str]:
        """As `Engine.keys` on this scope."""
        return await self._engine.keys(self.name, **within)

    async def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, Any]]:
        """As `Engine.items` on this scope."""
        return await self._engine.items(self.name, **within)

    async def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView]:
        """As `Engine.entries` on this scope."""
        return await self._engine.entries(self.name, **within)

    async def values(self, **within: Unpack[RangeOptions]) -> builtins.list[Any]:
        """As `Engine.values` on this scope."""
        return await self._engine.values(self.name, **within)

    async def count(self, **bounds: Unpack[Bounds]) -> int:
        """As `Engine.count` on this scope."""
        return await self._engine.count(self.name, **bounds)

    async def delete_range(
        self, *, durable: bool | None = None, idempotency_key: str | None = None, **bounds: Unpack[Bounds]
    ) -> int:
        """As `Engine.delete_range` on this scope."""
        return await self._engine.delete_range(self.name, durable=durable, idempotency_key=idempotency_key, **bounds)

    def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> AsyncIterator[Page]:
        """As `Engine.pages` on this scope, for `async for`."""
        return self._engine.pages(self.name, limit, **walk)

    def iter(self, **within: Unpack[RangeOptions]) -> AsyncIterator[tuple[str, Any]]:
        """As `Engine.iter` on this scope, for `async for`."""
        return self._engine.iter(self.name, **within)

    def watch(self, **options: Unpack[WatchOptions]) -> AioChanges:
        """As `Engine.watch` on this scope, for `async with`."""
        return self._engine.watch(self.name, **options)

    def __repr__(self) -> str:
        return f"<AioScope {self.name!r}>"
