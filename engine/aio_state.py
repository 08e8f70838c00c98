"""The calls of `state` as coroutines. That module says what each does, returns and raises."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from msgspec import UNSET, UnsetType

from scopestate.actors.callbacks import run_callback
from scopestate.batch import AioBatch
from scopestate.ops import arguments
from scopestate.ops.options import Bounds, PageOptions, RangeOptions, WriteOptions, bounded, range_of
from scopestate.ops.ranges import PAGE_KEYS, Count, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.results import CasResult, EntryView, ModifyResult, Page
from scopestate.ops.transactions import Transaction
from scopestate.ops.turns import Turn, checked_name, view_of
from scopestate.ops.values import decode
from scopestate.ops.writes import GetEntry
from scopestate.state import of_piece

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.engine import Engine

A = TypeVar("A")


class AioStateCalls:
    """The calls of `StateCalls` as coroutines, which never block the event loop.

    A function for `modify` or `transact` is a plain function here too. It runs on the event loop if the scope is idle,
    else on a worker thread: it should be quick.
    """

    _engine: Engine
    _limits: Limits

    async def _run(self, scope: str, turn: Turn[A], durable: bool | None = None) -> A:
        raise NotImplementedError

    async def _at_once(self, scope: str, turn: Turn[A]) -> A:
        raise NotImplementedError

    async def entry(self, scope: str, key: str) -> EntryView | None:
        """As `Engine.entry`."""
        return view_of(key, await self._run(scope, GetEntry(checked_name("key", key))))

    async def compare_and_set(
        self, scope: str, key: str, expected: object, value: object, **options: Unpack[WriteOptions]
    ) -> CasResult:
        """As `Engine.compare_and_set`."""
        turn, durable = arguments.cas_turn(scope, key, expected, value, self._limits, options)
        return await self._run(scope, turn, durable)

    async def modify(
        self,
        scope: str,
        key: str,
        function: Callable[[Any], Any],
        default: Any = None,
        *,
        durable: bool | None = None,
    ) -> ModifyResult:
        """As `Engine.modify`."""
        turn, durable = arguments.modify_turn(key, function, default, run_callback, durable)
        return await self._run(scope, turn, durable)

    async def touch(
        self,
        scope: str,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
        **options: Unpack[WriteOptions],
    ) -> bool:
        """As `Engine.touch`."""
        turn, durable = arguments.touch_turn(key, ttl, expires_at, **options)
        return await self._run(scope, turn, durable)

    async def ttl(self, scope: str, key: str) -> float | None:
        """As `Engine.ttl`."""
        found = await self._run(scope, GetEntry(checked_name("key", key)))
        return None if found is None else self._engine._left_s(found.expires_ms)

    def batch(self, scope: str, **options: Unpack[WriteOptions]) -> AioBatch:
        """As `Engine.batch`, for `async with`."""
        return AioBatch(self._run, checked_name("scope", scope), self._limits, options)

    async def transact(self, scope: str, function: Callable[[Transaction], A], **options: Unpack[WriteOptions]) -> A:
        """As `Engine.transact`; `function` is a plain function."""
        turn, durable = arguments.transact_turn(function, self._limits, run_callback, **options)
        return await self._run(scope, turn, durable)

    async def keys(self, scope: str, **within: Unpack[RangeOptions]) -> list[str]:
        """As `Engine.keys`."""
        return await self._run(scope, Keys(range_of("keys()", **within)))

    async def items(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, Any]]:
        """As `Engine.items`."""
        return arguments.items_of(await self._run(scope, Pairs(range_of("items()", **within))))

    async def entries(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[EntryView]:
        """As `Engine.entries`."""
        return arguments.views_of(await self._run(scope, Entries(range_of("entries()", **within))))

    async def values(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[Any]:
        """As `Engine.values`."""
        return arguments.values_of(await self._run(scope, Values(range_of("values()", **within))))

    async def count(self, scope: str, **bounds: Unpack[Bounds]) -> int:
        """As `Engine.count`."""
        return await self._run(scope, Count(bounded("count()", **bounds)))

    async def delete_range(
        self,
        scope: str,
        *,
        durable: bool | None = None,
        idempotency_key: str | None = None,
        **bounds: Unpack[Bounds],
    ) -> int:
        """As `Engine.delete_range`."""
        deleted, more, pieces = 0, True, 0
        while more:
            turn, _ = arguments.delete_range_turn(idempotency_key=of_piece(idempotency_key, pieces), **bounds)
            if not pieces and (first := self._engine._parts.directory[scope].turn_before_range()) is not None:
                await self._at_once(scope, first)
            answer = await self._run(scope, turn, durable)
            deleted, more, pieces = deleted + answer.deleted, answer.more, pieces + 1
        return deleted

    def pages(self, scope: str, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> AsyncIterator[Page]:
        """As `Engine.pages`, for `async for`."""
        first = arguments.page_turn(limit, **walk)
        return self._walk(checked_name("scope", scope), first)

    async def _walk(self, scope: str, turn: ReadPage) -> AsyncIterator[Page]:
        while True:
            page = await self._run(scope, turn)
            yield arguments.page_of(page)
            if page.cursor is None:
                return
            turn = arguments.next_page(turn, page.cursor)

    def iter(self, scope: str, **within: Unpack[RangeOptions]) -> AsyncIterator[tuple[str, Any]]:
        """As `Engine.iter`, for `async for`: the scope is read when the first pair is asked for."""
        return self._decoded(checked_name("scope", scope), Pairs(range_of("iter()", **within)))

    async def _decoded(self, scope: str, turn: Pairs) -> AsyncIterator[tuple[str, Any]]:
        for key, data in await self._run(scope, turn):
            yield key, decode(data)
