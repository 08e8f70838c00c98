"""Handles on one scope, for threads and for asyncio."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Never, TypeVar, Unpack, overload

from msgspec import UNSET, UnsetType

from scopestate.batch import Batch
from scopestate.errors import InvalidRegistration
from scopestate.mapping import ScopeMapping
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
from scopestate.ops.plain import shortened
from scopestate.ops.ranges import PAGE_KEYS
from scopestate.ops.results import T
from scopestate.ops.update_ops import AnyOp
from scopestate.ops.values import decode, encode
from scopestate.reactive import Registrar

if TYPE_CHECKING:
    import pykka

    from scopestate.actors.scope import ScopeActor
    from scopestate.aio import AioEngine
    from scopestate.batch import AioBatch
    from scopestate.engine import Engine
    from scopestate.ops.results import CasResult, EntryView, ModifyResult, Page, SetResult, UpdateResult
    from scopestate.ops.transactions import Transaction
    from scopestate.ops.triggers import EventNames, TriggerOptions
    from scopestate.ops.writes import Absence
    from scopestate.watching import AioChanges, Changes

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])


class Scope(Generic[T]):
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
    def aio(self) -> AioScope[T]:
        """The same calls as coroutines."""
        return AioScope(self._engine.aio, self.name)

    def set(self, key: str, value: T, **options: Unpack[SetOptions]) -> SetResult[T]:
        """As `Engine.set` on this scope."""
        if options:
            return self._engine._set_with(self.name, key, value, options)
        return self._engine.set(self.name, key, value)

    @overload
    def get(self, key: str) -> T | None: ...

    @overload
    def get(self, key: str, default: A) -> T | A: ...

    def get(self, key: str, default: Any = None) -> Any:
        """As `Engine.get` on this scope."""
        return self._engine.get(self.name, key, default)

    def delete(self, key: str, **options: Unpack[DeleteOptions]) -> T | None:
        """As `Engine.delete` on this scope."""
        value: T | None = self._engine.delete(self.name, key, **options)
        return value

    def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]) -> UpdateResult[T]:
        """As `Engine.update` on this scope."""
        if options:
            return self._engine.update(self.name, key, ops, **options)
        return self._engine.update(self.name, key, ops)

    def list(self) -> builtins.list[T]:
        """As `Engine.list` on this scope."""
        return self._engine.list(self.name)

    def entry(self, key: str) -> EntryView[T] | None:
        """As `Engine.entry` on this scope."""
        return self._engine.entry(self.name, key)

    def compare_and_set(self, key: str, expected: object, value: T, **options: Unpack[WriteOptions]) -> CasResult[T]:
        """As `Engine.compare_and_set` on this scope."""
        return self._engine._compare_and_set(self.name, key, expected, value, options)

    @overload
    def modify(
        self,
        key: str,
        function: Callable[[T | None], T | Absence],
        default: None = None,
        *,
        durable: bool | None = None,
    ) -> ModifyResult[T]: ...

    @overload
    def modify(
        self, key: str, function: Callable[[T], T | Absence], default: T, *, durable: bool | None = None
    ) -> ModifyResult[T]: ...

    def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult[T]:
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

    def batch(self, **options: Unpack[WriteOptions]) -> Batch[T]:
        """As `Engine.batch` on this scope."""
        return Batch(self._engine._run, self.name, self._engine._limits, options)

    def transact(self, function: Callable[[Transaction[T]], A], **options: Unpack[WriteOptions]) -> A:
        """As `Engine.transact` on this scope."""
        return self._engine.transact(self.name, function, **options)

    def keys(self, **within: Unpack[RangeOptions]) -> builtins.list[str]:
        """As `Engine.keys` on this scope."""
        return self._engine.keys(self.name, **within)

    def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, T]]:
        """As `Engine.items` on this scope."""
        return self._engine.items(self.name, **within)

    def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView[T]]:
        """As `Engine.entries` on this scope."""
        return self._engine.entries(self.name, **within)

    def values(self, **within: Unpack[RangeOptions]) -> builtins.list[T]:
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

    def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> Iterator[Page[T]]:
        """As `Engine.pages` on this scope."""
        return self._engine.pages(self.name, limit, **walk)

    def iter(self, **within: Unpack[RangeOptions]) -> Iterator[tuple[str, T]]:
        """As `Engine.iter` on this scope."""
        return self._engine.iter(self.name, **within)

    def watch(self, **options: Unpack[WatchOptions]) -> Changes[T | None]:
        """As `Engine.watch` on this scope."""
        return self._engine.watch(self.name, **options)

    def mapping(self) -> ScopeMapping[T]:
        """Return the scope as a `collections.abc.MutableMapping` of keys to values. See `ScopeMapping`."""
        return ScopeMapping(self)

    def on_change(
        self,
        *misplaced: Never,
        key: str | None = None,
        condition: str | Callable[..., Any] | None = None,
        events: EventNames | None = None,
        function_id: str | None = None,
        **options: Unpack[TriggerOptions],
    ) -> Registrar[T]:
        """As `Engine.on_change` for this scope: decorate a handler of `StateEvent[T | None]`, plain or `async`.

        If the trigger is durable, a handler with a second parameter gets the `Delivery` there. With `batch` a handler
        gets a list of events. Raises InvalidRegistration as that method does, also for `@scope.on_change` without
        parentheses.
        """
        if misplaced:
            raise InvalidRegistration(
                "on_change of a scope takes its filters by name: write `@scope.on_change(key=...)`, "
                "or `@scope.on_change()` for every change"
            )
        registrar = self._engine.on_change(
            scope=self.name,
            key=key,
            condition=condition,
            events=events,
            function_id=function_id,
            **options,
        )

        def register(handler: Any) -> Any:
            registrar(self._handler(handler))
            return handler

        return register

    def _handler(self, handler: F) -> F:
        """Return the function to register for a handler."""
        return handler

    def _data(self, key: str, value: T) -> bytes:
        """Return a value as JSON."""
        del key
        return encode(value)

    def _read(self, key: str, data: bytes) -> T:
        """Return a value from its JSON."""
        value: T = decode(data)
        return value

    def __contains__(self, key: object) -> bool:
        """Return whether a key exists. A key that holds null exists."""
        return isinstance(key, str) and self._engine.get(self.name, key, MISSING) is not MISSING

    @property
    def actor_ref(self) -> pykka.ActorRef[ScopeActor]:
        """The Pykka ref of the scope's current actor, for the messages in `scopestate.messages`.

        After passivation the scope has a new actor; the old ref passes messages on to it.
        """
        ref: pykka.ActorRef[ScopeActor] = self._engine._scopes[self.name].actor_ref
        return ref

    def __repr__(self) -> str:
        return f"<Scope {shortened(self.name)}>"


class PlainScope(Scope[Any]):
    """A scope without a type. A type checker takes its values as `Any`, and does not ask for a check for None."""

    if TYPE_CHECKING:

        @cached_property
        def aio(self) -> PlainAioScope: ...

        def get(self, key: str, default: Any = None) -> Any: ...

        def delete(self, key: str, **options: Unpack[DeleteOptions]) -> Any: ...

    else:

        @cached_property
        def aio(self):
            return PlainAioScope(self._engine.aio, self.name)


class AioScope(Generic[T]):
    """One scope, for asyncio; holds no state of its own."""

    def __init__(self, engine: AioEngine, scope: str) -> None:
        self._engine = engine
        self.name = scope

    async def set(self, key: str, value: T, **options: Unpack[SetOptions]) -> SetResult[T]:
        """As `Engine.set` on this scope."""
        return await self._engine.set(self.name, key, value, **options)

    @overload
    async def get(self, key: str) -> T | None: ...

    @overload
    async def get(self, key: str, default: A) -> T | A: ...

    async def get(self, key: str, default: Any = None) -> Any:
        """As `Engine.get` on this scope."""
        return await self._engine.get(self.name, key, default)

    async def delete(self, key: str, **options: Unpack[DeleteOptions]) -> T | None:
        """As `Engine.delete` on this scope."""
        value: T | None = await self._engine.delete(self.name, key, **options)
        return value

    async def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]) -> UpdateResult[T]:
        """As `Engine.update` on this scope."""
        return await self._engine.update(self.name, key, ops, **options)

    async def list(self) -> builtins.list[T]:
        """As `Engine.list` on this scope."""
        return await self._engine.list(self.name)

    async def entry(self, key: str) -> EntryView[T] | None:
        """As `Engine.entry` on this scope."""
        return await self._engine.entry(self.name, key)

    async def compare_and_set(
        self, key: str, expected: object, value: T, **options: Unpack[WriteOptions]
    ) -> CasResult[T]:
        """As `Engine.compare_and_set` on this scope."""
        return await self._engine.compare_and_set(self.name, key, expected, value, **options)

    @overload
    async def modify(
        self,
        key: str,
        function: Callable[[T | None], T | Absence],
        default: None = None,
        *,
        durable: bool | None = None,
    ) -> ModifyResult[T]: ...

    @overload
    async def modify(
        self, key: str, function: Callable[[T], T | Absence], default: T, *, durable: bool | None = None
    ) -> ModifyResult[T]: ...

    async def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult[T]:
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

    def batch(self, **options: Unpack[WriteOptions]) -> AioBatch[T]:
        """As `Engine.batch` on this scope, for `async with`."""
        return self._engine.batch(self.name, **options)

    async def transact(self, function: Callable[[Transaction[T]], A], **options: Unpack[WriteOptions]) -> A:
        """As `Engine.transact` on this scope; `function` is a plain function."""
        return await self._engine.transact(self.name, function, **options)

    async def keys(self, **within: Unpack[RangeOptions]) -> builtins.list[str]:
        """As `Engine.keys` on this scope."""
        return await self._engine.keys(self.name, **within)

    async def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, T]]:
        """As `Engine.items` on this scope."""
        return await self._engine.items(self.name, **within)

    async def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView[T]]:
        """As `Engine.entries` on this scope."""
        return await self._engine.entries(self.name, **within)

    async def values(self, **within: Unpack[RangeOptions]) -> builtins.list[T]:
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

    def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> AsyncIterator[Page[T]]:
        """As `Engine.pages` on this scope, for `async for`."""
        return self._engine.pages(self.name, limit, **walk)

    def iter(self, **within: Unpack[RangeOptions]) -> AsyncIterator[tuple[str, T]]:
        """As `Engine.iter` on this scope, for `async for`."""
        return self._engine.iter(self.name, **within)

    def watch(self, **options: Unpack[WatchOptions]) -> AioChanges[T | None]:
        """As `Engine.watch` on this scope, for `async with`."""
        return self._engine.watch(self.name, **options)

    def __repr__(self) -> str:
        return f"<AioScope {shortened(self.name)}>"


class PlainAioScope(AioScope[Any]):
    """As `PlainScope`, for asyncio."""

    if TYPE_CHECKING:

        async def get(self, key: str, default: Any = None) -> Any: ...

        async def delete(self, key: str, **options: Unpack[DeleteOptions]) -> Any: ...
