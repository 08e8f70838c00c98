"""As `memoize`, for coroutine functions: nothing blocks the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from scopestate.errors import Conflict, ScopestateError, Unsupported
from scopestate.integrations.cache.memoize import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    NO_LEASE,
    Computation,
    Memo,
    Outcome,
    log,
)
from scopestate.integrations.cache.values import ABSENT, MARK, took_of, unpack, value_of
from scopestate.ops.values import class_name


def decorated(memo: Memo, key_of_call: Callable[[tuple[Any, ...], dict[str, Any]], str]) -> Callable[..., Any]:
    """Return the coroutine function that a program calls instead of its own."""
    source, scope, early = memo.cache._source, memo.scope, memo.early
    computing = _Computing(memo)

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        name = key_of_call(args, kwargs)
        aio = await source.aio()
        value = await aio.get(scope, name, ABSENT)
        memo.count(found=value is not ABSENT)
        if value is ABSENT:
            return await computing.result(name, args, kwargs)
        if type(value) is dict and MARK in value:
            if early and (took := took_of(value)) is not None and memo.is_early(took, await aio.ttl(scope, name)):
                return await computing.renewed(name, value, args, kwargs)
            return unpack(value)
        return value

    return wrapper


class _Computing:
    """Computes results in the callers' tasks. A cancelled task gives up, and one that waits for it continues."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo

    async def result(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As on threads."""
        memo, me = self._memo, asyncio.current_task()
        until = time.monotonic() + memo.lease_s
        mine = Computation(me)
        while (other := memo.running.setdefault(name, mine)) is not mine:
            if other.owner is me:
                return await memo.function(*args, **kwargs)
            ended = asyncio.wrap_future(other.ended)
            try:
                done, _ = await asyncio.wait({ended}, timeout=max(0.0, until - time.monotonic()))
            finally:
                ended.cancel()  # or it would be settled when its loop is closed
            if not done:
                memo.give_up(name, other)
                return await self._compute(name, Computation(me), args, kwargs)
            value = other.told()
            if value is ABSENT:
                value = await self._look(name)
            if value is not ABSENT:
                return value
        lease = None
        try:
            lease, value = await self._lease_or_value(name, until)
            return await self._compute(name, mine, args, kwargs) if value is ABSENT else value
        finally:
            memo.end(name, mine)
            await self._give_back(name, lease)

    async def renewed(self, name: str, stored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As on threads."""
        memo, mine = self._memo, Computation(asyncio.current_task())
        if memo.running.setdefault(name, mine) is not mine:
            return unpack(stored)
        lease = None
        try:
            lease = await self._take_lease(name)
            return unpack(stored) if lease is None else await self._compute(name, mine, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the function raises
            mine.outcome = Outcome()
            log.warning("%s could not be recomputed before it expires: %s: %s", name, class_name(error), error)
            return unpack(stored)
        finally:
            memo.end(name, mine)
            await self._give_back(name, lease)

    async def _compute(self, name: str, mine: Computation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        memo, began = self._memo, time.perf_counter()
        try:
            result = await memo.function(*args, **kwargs)
            memo.kept(mine, await memo.engine.aio.set(memo.scope, name, memo.packed(result, began), **memo.writing()))
        except Exception as error:
            mine.outcome = Outcome(error=error)
            raise
        return result

    async def _look(self, name: str) -> Any:
        value = await self._memo.engine.aio.get(self._memo.scope, name, ABSENT)
        return value if value is ABSENT else value_of(value)

    async def _lease_or_value(self, name: str, until: float) -> tuple[int | None, Any]:
        pause_s = FIRST_PAUSE_S
        while True:
            lease = await self._take_lease(name)
            value = await self._look(name)
            if lease is not None or value is not ABSENT:
                return lease, value
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None, ABSENT
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _take_lease(self, name: str) -> int | None:
        memo = self._memo
        try:
            return (
                await memo.engine.aio.set(memo.leases, name, 1, if_absent=True, ttl=memo.lease_s, **memo.once())
            ).revision
        except Conflict:
            return None
        except Unsupported:
            return NO_LEASE

    async def _give_back(self, name: str, lease: int | None) -> None:
        if lease:
            try:
                await self._memo.engine.aio.delete(self._memo.leases, name, if_revision=lease, **self._memo.once())
            except Conflict:
                pass  # the lease has ended, and may belong to another process
            except ScopestateError as error:
                log.warning("the lease of %s could not be given back; it ends on its own: %s", name, error)
