"""The cache itself."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

from scopestate.engine import Engine
from scopestate.errors import BatchTooLarge, Conflict, DeserializationError, ScopestateError
from scopestate.integrations.cache.aio import AioCache
from scopestate.integrations.cache.engines import Durability, EngineSource
from scopestate.integrations.cache.limits import PAGE, CacheStats, Counts, Limits, Sized
from scopestate.integrations.cache.memoize import Memo, Memoize
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
from scopestate.integrations.cache.transaction import ATTEMPTS, Block, CacheTransaction, TransactionBlock
from scopestate.integrations.cache.values import (
    ABSENT,
    MARK,
    deadline,
    key_of,
    name_of,
    pack,
    unpack,
    value_of,
    with_facts,
)
from scopestate.ops import Increment
from scopestate.ops.results import EntryView
from scopestate.signals import Guard, certainly

log = logging.getLogger("scopestate.integrations")

A = TypeVar("A")


class Cache:
    """Keys and values that expire, with tags and a size limit. Any thread may use it.

    >>> from scopestate.integrations.cache import Cache
    >>> with Cache() as cache:  # in memory; Cache("./data/cache") keeps it in a directory
    ...     cache.set("ada", {"logins": 1}, expire=60)
    ...     cache.add("ada", "too late"), cache.incr("visits"), cache.get("bob", "unknown")
    ...     cache["ada"]
    True
    (False, 1, 'unknown')
    {'logins': 1}

    Errors of the engine reach the caller: see `Engine.get` and `Engine.set`. A call is one step, unless its description
    says otherwise.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Engine | None = None,
        *,
        scope: str = "cache",
        size_limit: int | None = 2**30,
        max_entries: int | None = None,
        durability: Durability | None = None,
        save_interval_ms: int | None = None,
        statistics: bool = False,
    ) -> None:
        """Make a cache in a directory, in an engine of the program, or, without a source, in memory.

        The first call opens the directory, which several processes may share (docs/how-to/sharing.md). With
        `durability` "interval", the default, a crash loses the writes of the last `save_interval_ms` (default 1000);
        with "commit", each write is on disk when its call returns.

        If the values take more than `size_limit` bytes, or there are more than `max_entries`, the entries that were
        stored the longest ago are removed: see `cull`. None: no limit.
        """
        self._source = EngineSource(source, durability, save_interval_ms, self._after_fork)
        self._scope: Final = scope
        self._limits = Limits(size_limit, max_entries)
        self._counts: Counts | None = Counts() if statistics else None
        self._block: ContextVar[weakref.ref[Block] | None] = ContextVar("scopestate_cache_block", default=None)
        self._blocks: dict[int, None] = {}
        """The ids of the open blocks of `transact`. Nearly always empty; each call checks that."""
        self._turns = Guard()
        """Held by the block whose turn it is."""
        self._memos: weakref.WeakSet[Memo] = weakref.WeakSet()
        self._arguments = (scope, size_limit, max_entries, durability, save_interval_ms, statistics)

    @property
    def engine(self) -> Engine:
        """The engine that has the entries; opened if it is not open."""
        return self._source.open()

    @property
    def scope(self) -> str:
        """The scope that has the entries."""
        return self._scope

    @property
    def directory(self) -> str | None:
        """The directory; None in memory, and for an engine of the program."""
        return self._source.directory

    @property
    def aio(self) -> AioCache:
        """The same calls for asyncio: `await cache.aio.get("ada")`."""
        return AioCache(self)

    # --------------------------------------------------------------------------------------------------- one entry

    def get(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """Return a new copy of a value, or `default`.

        With `expire_time` it returns a tuple of the value and the time at which it expires, in seconds since the epoch,
        or None; with `tag`, of the value and its tag; with both, of all three.
        """
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.get(key, default, expire_time=expire_time, tag=tag)
        name = key if type(key) is str and key[:1] != MARK else name_of(key)
        if expire_time or tag:
            entry = self._source.engine.entry(self._scope, name)
            if self._counts is not None:
                self._counts.count(found=entry is not None)
            return with_facts(facts_of(entry), default, expire_time=expire_time, tag=tag)
        value = self._source.engine.get(self._scope, name, ABSENT)
        if self._counts is not None:
            self._counts.count(found=value is not ABSENT)
        if value is ABSENT:
            return default
        return unpack(value) if type(value) is dict and MARK in value else value

    def set(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """Set a value that expires in `expire` seconds, or never; return True.

        `tag`, of any type that keys have, names a group of entries for `evict`. Raises InvalidValue, with the path, for
        a value that would be read back as a different one: docs/how-to/caches.md lists them.
        """
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.set(key, value, expire, tag=tag)
        stored = pack(value, None if tag is None else name_of(tag))
        name = key if type(key) is str and key[:1] != MARK else name_of(key)
        options = self._source.once()
        if expire is not None:
            options |= deadline(expire)
        result = self._source.engine.set(self._scope, name, stored, **options)
        self._grown(len(result.new_json) + len(name))
        return True

    def set_many(self, values: Mapping[Any, Any], expire: float | timedelta | None = None, *, tag: Any = None) -> None:
        """Set many values, 500 in each step, which writes all of them or none. Not within `transact`."""
        group, options = None if tag is None else name_of(tag), deadline(expire)
        source, sizes = self._source, list[int]()
        packed = [(name_of(key), pack(value, group)) for key, value in values.items()]
        for piece in pieces(packed):
            try:
                with source.engine.batch(self._scope, **source.once()) as batch:
                    for name, value in piece:
                        batch.set(name, value, **options)
                sizes += sizes_of(batch.result)
            except BatchTooLarge:
                for name, value in piece:
                    result = source.engine.set(self._scope, name, value, **options, **source.once())
                    sizes.append(len(result.new_json))
        for size in sizes:
            self._grown(size)

    def delete_many(self, keys: Iterable[Any]) -> None:
        """Remove many keys, 500 in each step. Not within `transact`."""
        for piece in pieces([name_of(key) for key in keys]):
            with self._source.engine.batch(self._scope, **self._source.once()) as batch:
                for name in piece:
                    batch.delete(name)

    def add(self, key: Any, value: Any, expire: float | timedelta | None = None, *, tag: Any = None) -> bool:
        """Set a value if the key does not exist; return whether it was set. One step, also between processes."""
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.add(key, value, expire, tag=tag)
        name = name_of(key)
        engine = self._source.engine
        if engine.get(self._scope, name, ABSENT) is not ABSENT:
            return False  # a refused write takes longer than this look
        stored = pack(value, None if tag is None else name_of(tag))
        try:
            result = engine.set(self._scope, name, stored, if_absent=True, **deadline(expire), **self._source.once())
        except Conflict:
            return False
        self._grown(len(result.new_json) + len(name))
        return True

    def incr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """Add `delta` to a number in one step, and return the sum. A key that does not exist counts as `default`.

        The deadline and the tag stay. Raises KeyError if the key does not exist and `default` is None, and TypeError
        for a value that is not a number.
        """
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.incr(key, delta, default)
        name = name_of(key)
        engine = self._source.engine
        if is_increment(delta, default):
            result = engine.update(self._scope, name, [Increment("", delta)], **self._source.once())  # type: ignore[arg-type]  # a whole number
            if not result.errors:
                return result.new_value
        return value_of(engine.transact(self._scope, adding(key, name, delta, default), **self._source.once()))

    def decr(self, key: Any, delta: float = 1, default: float | None = 0) -> Any:
        """As `incr`, with `-delta`."""
        return self.incr(key, -delta, default)

    def pop(self, key: Any, default: Any = None, *, expire_time: bool = False, tag: bool = False) -> Any:
        """Remove a key and return its value, or `default`, in one step. The rest is as in `get`."""
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.pop(key, default, expire_time=expire_time, tag=tag)
        name = name_of(key)
        engine = self._source.engine
        if not (expire_time or tag):
            return self._taken(name, default)
        while True:
            entry = engine.entry(self._scope, name)
            if entry is None or self._remove([entry]):
                return with_facts(facts_of(entry), default, expire_time=expire_time, tag=tag)

    def touch(self, key: Any, expire: float | timedelta | None = None) -> bool:
        """Make a key expire in `expire` seconds from now, or never; return whether it exists."""
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.touch(key, expire)
        asked = deadline(expire) or {"ttl": None}
        return self._source.engine.touch(self._scope, name_of(key), **asked, **self._source.once())

    def delete(self, key: Any) -> bool:
        """Remove a key; return whether it existed."""
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.delete(key)
        return self._taken(name_of(key), ABSENT) is not ABSENT

    def _taken(self, name: str, default: Any) -> Any:
        """Remove a key and return its value, or `default`. `Engine.delete` would fire an event even without a key."""
        with self._source.engine.batch(self._scope, **self._source.once()) as batch:
            batch.delete(name)
        return taken(batch.result, default)

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
        if self._blocks and (transaction := self._transaction()) is not None:
            return transaction.get(key, ABSENT) is not ABSENT
        return self._source.engine.get(self._scope, name_of(key), ABSENT) is not ABSENT

    # ------------------------------------------------------------------------------------------------- all entries

    def __len__(self) -> int:
        """Return how many entries there are, without those that have expired."""
        return self._source.engine.count(self._scope)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the keys, in the order of their text. They are read in pages."""
        return self.iterkeys()

    def __reversed__(self) -> Iterator[Any]:
        return self.iterkeys(reverse=True)

    def iterkeys(self, reverse: bool = False) -> Iterator[Any]:
        """Iterate over the keys in the order of their text; with `reverse`, from the last one."""
        for entry in self._entries(reverse=reverse):
            yield key_of(entry.key)

    def _entries(self, *, reverse: bool = False) -> Iterator[EntryView[Any]]:
        for page in self._source.engine.pages(self._scope, PAGE, reverse=reverse):
            yield from page.entries

    def clear(self) -> int:
        """Remove all entries, in steps of 1,000; return how many there were."""
        return self._source.engine.delete_range(self._scope, prefix="", **self._source.once())

    def evict(self, tag: Any) -> int:
        """Remove the entries with a tag, in steps; return how many. This reads every entry of the cache."""
        return self._remove_where(has_tag(name_of(tag)))

    def expire(self, now: float | None = None) -> int:
        """Remove the entries that expire by `now`, in seconds since the epoch; return how many.

        Without `now` there is nothing to do: the engine itself removes expired entries.
        """
        if now is None:
            return 0
        return self._remove_where(expires_until(now))

    def volume(self) -> int:
        """Return about how many bytes the entries take. This reads every entry."""
        return sum(map(size_of, self._entries()))

    def cull(self) -> int:
        """Remove the entries stored the longest ago until the limits hold; return how many.

        It removes down to nine tenths of a limit, so that it is not needed again soon. Writes through this object also
        do it from time to time: in between, each process may exceed a limit by up to a quarter.
        """
        ticket = object()
        try:
            removed = self._cull() if self._limits.begin(ticket) else 0
            self._limits.release(ticket)
            return removed
        except BaseException:
            # Not `finally`: an exception of a signal handler at its first step would end all culling.
            certainly(lambda: self._limits.release(ticket))
            raise

    def _cull(self) -> int:
        limits, removed, count, size = self._limits, 0, 0, 0
        try:
            entries: list[Sized] = [(entry.revision, entry.key, size_of(entry)) for entry in self._entries()]
            count, size = len(entries), sum([one[2] for one in entries])
            for piece in limits.surplus(entries):
                removed += self._remove([EntryView(key, b"", revision) for revision, key, _ in piece])
                count, size = count - len(piece), size - sum([one[2] for one in piece])
            return removed
        finally:
            limits.end(count, size)

    def is_grown(self, size: int) -> bool:
        """Note a write of `size` bytes; return whether it is time for `cull`. For writes made through the engine."""
        return self._limits.written(size)

    def _grown(self, size: int) -> None:
        if self.is_grown(size):
            try:
                self.cull()
            except ScopestateError as error:
                log.warning("the cache in scope %r could not be culled: %s", self._scope, error)  # the write was made

    def _remove_where(self, wanted: Callable[[EntryView[Any]], bool]) -> int:
        engine, removed = self._source.engine, 0
        for page in engine.pages(self._scope, PAGE):
            found = [entry for entry in page.entries if wanted(entry)]
            if found:
                removed += self._remove(found)
        return removed

    def _remove(self, entries: Iterable[EntryView[Any]]) -> int:
        """Remove entries that have not changed since they were read; return how many."""
        entries = list(entries)
        try:
            with self._source.engine.batch(self._scope, **self._source.once()) as batch:
                remove_unchanged(batch, entries)
            return len(entries)
        except Conflict:
            return 0 if len(entries) == 1 else sum([self._remove([entry]) for entry in entries])

    def stats(self, enable: bool = True, reset: bool = False) -> CacheStats:
        """Return the counted hits and misses of `get`; start or stop counting, and reset the counts, as asked."""
        found = CacheStats(0, 0) if self._counts is None else self._counts.read(reset=reset)
        if not enable:
            self._counts = None
        elif self._counts is None:
            self._counts = Counts()
        return found

    # ------------------------------------------------------------------------------------- functions, transactions

    def memoize(
        self,
        expire: float | timedelta | None = None,
        *,
        name: str | None = None,
        tag: Any = None,
        ignore: Iterable[int | str] = (),
        key: Callable[..., Any] | None = None,
        lease: float = 60,
        early: float = 0,
    ) -> Memoize:
        """Decorate a function, plain or `async`, so that each of its results is kept for `expire` seconds.

        While one call computes a result, other calls with the same arguments wait for it: on other threads and tasks,
        and in other processes with the same directory or Redis. The computing process holds a lease of `lease` seconds,
        in the scope named as this one with ":leases" appended; when it has run out, another process computes the result
        too. An exception is not kept; it also reaches the callers that wait in this process.

        `name` replaces the function's module and name in keys. `ignore` has positions and names of arguments that do
        not matter. `key(*args, **kwargs)` returns the key of a call, for arguments that a cache cannot hold. With
        `early`, such as 1, a result is recomputed at a random time before it expires, sooner the longer computing
        takes; this needs `expire`.

        `function.__cache_key__(...)` returns the key of a call in the cache; `function.__wrapped__` is the function.
        """
        if callable(expire):
            raise TypeError("memoize is called to make the decorator: write @cache.memoize()")
        if early and expire is None:
            raise DeserializationError("`early` needs `expire`: a result that never expires is never too old")
        return Memoize(self, expire, name, tag, ignore, key, lease, early)

    @overload
    def transact(self) -> TransactionBlock: ...

    @overload
    def transact(self, function: Callable[[], A]) -> A: ...

    def transact(self, function: Callable[[], A] | None = None) -> TransactionBlock | A:
        """Return a block for `with`: the calls of this thread or task in it take effect at its end, all or none.

        Within it `get`, `set`, `add`, `incr`, `decr`, `pop`, `touch`, `delete` and the operators read what the block
        has written. If the block raises, nothing is written. Blocks of this object's threads wait for one another. If
        another call has meanwhile changed something that the block has read, the end of the block raises Conflict, and
        nothing is written.

        With a function, call it in such a block, again after each Conflict, and return its result.
        """
        if function is None:
            return TransactionBlock(self)
        for attempt in range(ATTEMPTS):
            try:
                with TransactionBlock(self):
                    return function()
            except Conflict:
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError

    def _transaction(self) -> CacheTransaction | None:
        """Return the transaction whose block this thread or task is in."""
        reference = self._block.get()
        block = None if reference is None else reference()
        return None if block is None or block.transaction.ended else block.transaction

    def _after_fork(self) -> None:
        """Reset, in a forked child, what threads of the parent were doing."""
        self._turns = Guard()
        self._limits.forget()
        if self._counts is not None:
            self._counts.forget()
        for memo in list(self._memos):
            memo.running.clear()

    # ----------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Save and close the engine that this cache has opened, unless another cache of the process uses it.

        A later call opens it again. An engine of the program stays open.
        """
        self._source.close()

    def __enter__(self) -> Self:
        self._source.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source.leave()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._source.directory is None:
            raise TypeError("only a cache in a directory can be sent to another process")
        return _made_again, (self._source.directory, *self._arguments)

    def __repr__(self) -> str:
        where = self._source.directory or ("an engine" if isinstance(self._source.given, Engine) else "memory")
        return f"<Cache {self._scope!r} in {where}>"


def _made_again(
    directory: str,
    scope: str,
    size_limit: int | None,
    max_entries: int | None,
    durability: Durability | None,
    save_interval_ms: int | None,
    statistics: bool,
) -> Cache:
    return Cache(
        directory,
        scope=scope,
        size_limit=size_limit,
        max_entries=max_entries,
        durability=durability,
        save_interval_ms=save_interval_ms,
        statistics=statistics,
    )
