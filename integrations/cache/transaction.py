"""Several calls of a cache that take effect together."""

from __future__ import annotations

import sys
import time
import weakref
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from scopestate.batch import Writes
from scopestate.errors import DeserializationError, Overloaded
from scopestate.integrations.cache.steps import sizes_of
from scopestate.integrations.cache.values import (
    ABSENT,
    added,
    deadline,
    milliseconds_of,
    name_of,
    pack,
    value_of,
    with_facts,
)
from scopestate.ops.results import EntryView
from scopestate.signals import certainly

if TYPE_CHECKING:
    from scopestate.integrations.cache.cache import Cache

ATTEMPTS: Final = 100
"""How often the function of a block is called at most because of conflicts."""
_LONGEST_S: Final = 60.0
"""How long a block waits for the block of another thread, as long as diskcache waits for its file."""


class Block:
    """A block of `Cache.transact`. A block within another is part of the outer one.

    Only the `with` statement holds it; the cache has a weak reference. So if a signal handler raises between
    `__enter__` and the block, the block is freed, and its transaction with it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._turns = cache._turns
        self._ticket: list[int] = []
        self._entered = False
        self.transaction = CacheTransaction(cache)

    def __repr__(self) -> str:
        return f"<block of {self._cache!r}{', ended' if self.transaction.ended else ''}>"

    def _enter(self) -> CacheTransaction:
        cache = self._cache
        outer = cache._transaction()
        if outer is not None:
            return outer
        if self.transaction.ended:
            raise DeserializationError("this block has ended: call `transact()` for each `with` statement")
        self._ticket = self._turns.ticket()
        try:
            # On an event loop, waiting would stop the block that it waits for.
            if not (_runs_loop() or self._turns.is_mine() or self._turns.take(_LONGEST_S, self._ticket)):
                raise Overloaded(f"another transaction of this cache has run for {_LONGEST_S:g} s: nothing was done")
            cache._blocks[id(self)] = None
            cache._block.set(weakref.ref(self))
            self._entered = True
        except BaseException:
            certainly(self._leave)
            raise
        return self.transaction

    def _leave(self) -> None:
        """End the block. May be repeated: see `certainly`."""
        self.transaction.ended = True
        self._cache._blocks.pop(id(self), None)
        self._entered = False
        self._turns.give_back(self._ticket)

    def __del__(self) -> None:
        if self._entered:
            self._leave()


class TransactionBlock(Block):
    """A block for `with`."""

    def __enter__(self) -> CacheTransaction:
        return self._enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._entered:  # it is part of an outer block
            return
        try:
            self.transaction.ended = True
            if kind is None:
                self.transaction._commit()
            self._leave()
        except BaseException:
            # Not `finally`: an exception of a signal handler at its first step would leave the turn taken.
            certainly(self._leave)
            raise


def _runs_loop() -> bool:
    asyncio = sys.modules.get("asyncio.events")
    return asyncio is not None and asyncio._get_running_loop() is not None


class _Held(NamedTuple):
    """The value or deadline that the transaction gives a key."""

    stored: Any
    options: dict[str, Any]
    """The deadline, as `Batch.set` and `Batch.touch` take it."""
    expires_ms: int | None
    written: bool
    """False: only the deadline changes."""


class CacheTransaction:
    """The reads and writes of a block of `transact`. The calls are those of `Cache`."""

    def __init__(self, cache: Cache) -> None:
        self.ended = False
        self._cache = cache
        self._seen: dict[str, EntryView[Any] | None] = {}
        """Key -> its entry when it was read; None: it did not exist."""
        self._now: dict[str, _Held | None] = {}
        """Changed key -> its new content; None: it is deleted."""

    def __repr__(self) -> str:
        return f"<transaction of {self._cache!r}{', ended' if self.ended else ''}>"

    def get(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.get`."""
        held = self._entry(name_of(key))
        facts = None if held is None else (held.stored, held.expires_ms)
        return with_facts(facts, default, expire_time=expire_time, tag=tag)

    def set(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.set`. The value before is not read."""
        self._refuse_if_ended()
        options = deadline(expire)
        stored = pack(value, None if tag is None else name_of(tag))
        self._now[name_of(key)] = _Held(stored, options, milliseconds_of(options), written=True)
        return True

    def add(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """As `Cache.add`."""
        return self._entry(name_of(key)) is None and self.set(key, value, expire, tag=tag)

    def incr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.incr`."""
        name = name_of(key)
        held = self._entry(name)
        stored = added(key, ABSENT if held is None else held.stored, delta, default)
        if held is None:
            self._now[name] = _Held(stored, {}, None, written=True)
        else:
            self._now[name] = held._replace(stored=stored, written=True)
        return value_of(stored)

    def decr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `Cache.decr`."""
        return self.incr(key, -delta, default)

    def pop(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """As `Cache.pop`."""
        found = self.get(key, default, expire_time=expire_time, tag=tag)
        self.delete(key)
        return found

    def touch(self, key: Any, expire: float | timedelta | None = None) -> bool:
        """As `Cache.touch`."""
        name, options = name_of(key), deadline(expire)
        held = self._entry(name)
        if held is not None:
            self._now[name] = held._replace(options=options, expires_ms=milliseconds_of(options))
        return held is not None

    def delete(self, key: Any) -> bool:
        """As `Cache.delete`."""
        name = name_of(key)
        held = self._entry(name)
        if held is not None:
            self._now[name] = None
        return held is not None

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, ABSENT)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Any) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        return self._entry(name_of(key)) is not None

    def _entry(self, name: str) -> _Held | None:
        self._refuse_if_ended()
        if name in self._now:
            held = self._now[name]
            passed = held is not None and held.expires_ms is not None and held.expires_ms <= time.time() * 1000
            return None if passed else held
        if name not in self._seen:
            self._seen[name] = self._cache.engine.entry(self._cache.scope, name)
        entry = self._seen[name]
        return None if entry is None else _Held(entry.value, {"keep_ttl": True}, entry.expires_ms, written=False)

    def _must_read(self, name: str) -> bool:
        """Return whether a name must be read from the cache to know what the transaction sees there."""
        self._refuse_if_ended()
        return name not in self._now and name not in self._seen

    def _refuse_if_ended(self) -> None:
        if self.ended:
            raise DeserializationError("this transaction has ended: use it within its block only")

    def _commit(self) -> None:
        """Write everything in one step. Raises Conflict if something that was read has changed."""
        cache = self._cache
        with cache.engine.batch(cache.scope, **cache._source.once()) as batch:
            self._fill(batch)
        cache._grown(sum(sizes_of(batch.result)))

    def _fill(self, batch: Writes[Any]) -> None:
        for name, entry in self._seen.items():
            if entry is None:
                batch.check(name, absent=True)
            elif entry.revision:  # 0: the place where the scope is kept has no revisions
                batch.check(name, revision=entry.revision)
        for name, held in self._now.items():
            if held is None:
                batch.delete(name)
            elif held.written:
                batch.set(name, held.stored, **held.options)
            else:
                batch.touch(name, **(held.options or {"ttl": None}))
