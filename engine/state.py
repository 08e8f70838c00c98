"""The calls of an engine beyond the six functions of the reference, for threads. `aio_state` has them for asyncio."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from msgspec import UNSET, UnsetType

from scopestate.actors.callbacks import run_callback
from scopestate.batch import Batch
from scopestate.ops import arguments
from scopestate.ops.options import Bounds, PageOptions, RangeOptions, WriteOptions, bounded, range_of
from scopestate.ops.ranges import PAGE_KEYS, Count, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.results import CasResult, EntryView, ModifyResult, Page
from scopestate.ops.transactions import Transaction
from scopestate.ops.turns import Turn, checked_name, view_of
from scopestate.ops.values import decode
from scopestate.ops.writes import GetEntry

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.parts import Parts

A = TypeVar("A")


class StateCalls:
    """The calls on the keys of a scope beyond `set`, `get`, `delete`, `update` and `list`.

    Each call may be made from any thread, and is one step that no other call can interrupt; only `pages` and
    `delete_range` take several steps. The calls raise what `get` and `set` raise, and DeserializationError for
    arguments that make no sense, before anything is done. A call that the backend cannot carry out raises Unsupported.

    >>> from scopestate import Conflict, Engine
    >>> engine = Engine()
    >>> revision = engine.set("pages", "home", "Welcome").revision
    >>> engine.set("pages", "home", "Hello", if_revision=revision).old_value
    'Welcome'
    >>> try:
    ...     engine.set("pages", "home", "Good day", if_revision=revision)
    ... except Conflict as conflict:
    ...     print(conflict.revision > revision)
    True
    >>> engine.transact("pages", lambda tx: [tx.get("home"), tx.delete("home"), tx.keys()])
    ['Hello', 'Hello', []]
    >>> engine.close()
    """

    _limits: Limits
    _parts: Parts

    def _run(self, scope: str, turn: Turn[A], durable: bool | None = None) -> A:
        raise NotImplementedError

    # --------------------------------------------------------------------------------------- conditions, deadlines

    def entry(self, scope: str, key: str) -> EntryView | None:
        """Return a key with its `value`, `revision` and `expires_at`, or None if it does not exist.

        The revision is a number below 2**53. Each change of a scope gets a larger one. With a store and in Redis no
        revision is ever given twice, not even after a crash; in memory each engine begins at 1. Give it to `set(...,
        if_revision=...)` to write only if the key has not changed since.
        """
        return view_of(key, self._run(scope, GetEntry(checked_name("key", key))))

    def compare_and_set(
        self, scope: str, key: str, expected: object, value: object, **options: Unpack[WriteOptions]
    ) -> CasResult:
        """Set a key if it has the expected value. `swapped` says whether it was set; if not, `current` is its value.

        Values are compared as JSON: 1 and 1.0 differ, the order of fields does not matter. With `expected` None or
        MISSING the key must not exist, or must hold null. If the value differs, nothing changes and no event fires. A
        successful swap clears the deadline, as `set` does.
        """
        return self._compare_and_set(scope, key, expected, value, options)

    def _compare_and_set(
        self, scope: str, key: str, expected: object, value: object, options: WriteOptions
    ) -> CasResult:
        turn, durable = arguments.cas_turn(scope, key, expected, value, self._limits, options)
        return self._run(scope, turn, durable)

    def modify(
        self,
        scope: str,
        key: str,
        function: Callable[[Any], Any],
        default: Any = None,
        *,
        durable: bool | None = None,
    ) -> ModifyResult:
        """Set a key to `function(value)`, in one step; `default` stands for the value of a key that does not exist.

        The function may return DELETE to delete the key and KEEP to leave it as it is. An exception that it raises
        reaches the caller, and nothing is written. The deadline stays. It must be a plain function without other
        effects: in Redis and through a bridge it is called again when another write comes in between. If it calls the
        engine, that raises WouldDeadlock. While it runs, the scope serves no other call; a run of more than 0.25 s is
        logged.
        """
        turn, durable = arguments.modify_turn(key, function, default, run_callback, durable)
        return self._run(scope, turn, durable)

    def touch(
        self,
        scope: str,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
        **options: Unpack[WriteOptions],
    ) -> bool:
        """Make a key expire in `ttl` seconds, or at `expires_at`; `ttl=None`: never. Return whether the key exists.

        The value and the revision stay, and no event fires. Raises DeserializationError if no time is given.
        """
        turn, durable = arguments.touch_turn(key, ttl, expires_at, **options)
        return self._run(scope, turn, durable)

    def ttl(self, scope: str, key: str) -> float | None:
        """Return in how many seconds a key expires; None if it never does, or does not exist."""
        found = self._run(scope, GetEntry(checked_name("key", key)))
        return None if found is None else self._left_s(found.expires_ms)

    def _left_s(self, expires_ms: int | None) -> float | None:
        return None if expires_ms is None else max(0, expires_ms - self._parts.clock.now_ms()) / 1000

    # ------------------------------------------------------------------------------------------------ transactions

    def batch(self, scope: str, **options: Unpack[WriteOptions]) -> Batch:
        """Return a batch of checks and writes, for a `with` statement: at its end all of them are done, or none.

        See `Batch`. At most 1,000 keys and `max_batch_bytes` of values.
        """
        return Batch(self._run, checked_name("scope", scope), self._limits, options)

    def transact(self, scope: str, function: Callable[[Transaction], A], **options: Unpack[WriteOptions]) -> A:
        """Call `function(tx)`, which reads and writes the scope as if it were alone, and return what it returns.

        `tx` has `get`, `set`, `delete`, `update`, `entry`, `keys`, `items` and `touch`, and can be used as a dict of
        keys. It reads its own writes. The writes take effect in one step when the function has returned, with one event
        for each key that has changed. An exception that it raises reaches the caller, and nothing is written. At most
        1,000 keys and `max_batch_bytes` of values; more raises BatchTooLarge.

        The function must be a plain function without other effects: in Redis and through a bridge it is called again
        when another write comes in between, and Conflict is raised if that happens too often. If it calls the engine,
        that raises WouldDeadlock. While it runs, the scope serves no other call; a run of more than 0.25 s is logged.
        With an idempotency key, the answer must be JSON, and a repetition does not call the function.
        """
        turn, durable = arguments.transact_turn(function, self._limits, run_callback, **options)
        return self._run(scope, turn, durable)

    # ------------------------------------------------------------------------------------------------------ ranges

    def keys(self, scope: str, **within: Unpack[RangeOptions]) -> list[str]:
        """Return keys in the order of their UTF-8 bytes.

        `prefix`, `start` (inclusive), `after` and `end` (both exclusive) choose the keys. With `reverse` they mean the
        same, and the largest key comes first. At most `limit` keys are returned. No value is decoded.
        """
        return self._run(scope, Keys(range_of("keys()", **within)))

    def items(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, Any]]:
        """Return keys with their values, as of one moment. The arguments are those of `keys`."""
        return arguments.items_of(self._run(scope, Pairs(range_of("items()", **within))))

    def entries(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[EntryView]:
        """Return keys with value, revision and deadline, as of one moment. The arguments are those of `keys`."""
        return arguments.views_of(self._run(scope, Entries(range_of("entries()", **within))))

    def values(self, scope: str, **within: Unpack[RangeOptions]) -> builtins.list[Any]:
        """Return values in the order of their keys, as of one moment. The arguments are those of `keys`."""
        return arguments.values_of(self._run(scope, Values(range_of("values()", **within))))

    def count(self, scope: str, **bounds: Unpack[Bounds]) -> int:
        """Return how many keys there are within the bounds of `keys`: `prefix`, `start`, `after` and `end`."""
        return self._run(scope, Count(bounded("count()", **bounds)))

    def delete_range(
        self,
        scope: str,
        *,
        durable: bool | None = None,
        idempotency_key: str | None = None,
        **bounds: Unpack[Bounds],
    ) -> int:
        """Delete the keys within the bounds of `keys`, and return how many there were. Fires an event for each.

        It takes one step for each 1,000 keys: other calls may see some of the keys deleted and others not, and a key
        that is created meanwhile may be deleted too. At least one bound must be given; `prefix=""` deletes every key.
        """
        deleted, more, pieces = 0, True, 0
        while more:
            turn, _ = arguments.delete_range_turn(idempotency_key=of_piece(idempotency_key, pieces), **bounds)
            if not pieces and (first := self._parts.directory[scope].turn_before_range()) is not None:
                self._parts.directory[scope].run(first)
            answer = self._run(scope, turn, durable)
            deleted, more, pieces = deleted + answer.deleted, answer.more, pieces + 1
        return deleted

    def pages(self, scope: str, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> Iterator[Page]:
        """Yield the entries within the bounds of `keys` in pages of `limit`; each page is read when it is requested.

        A key that exists during the whole walk comes exactly once; one that is created or deleted meanwhile may come or
        not. `page.cursor` is text for `pages(cursor=...)` with the same bounds, to continue later; with a store it
        stays valid over restarts of the engine. Raises InvalidCursor if the cursor is damaged, or belongs to another
        scope, store or range.
        """
        first = arguments.page_turn(limit, **walk)
        checked_name("scope", scope)
        return self._walk(scope, first)

    def _walk(self, scope: str, turn: ReadPage) -> Iterator[Page]:
        while True:
            page = self._run(scope, turn)
            yield arguments.page_of(page)
            if page.cursor is None:
                return
            turn = arguments.next_page(turn, page.cursor)

    def iter(self, scope: str, **within: Unpack[RangeOptions]) -> Iterator[tuple[str, Any]]:
        """As `items`, as an iterator over the entries of this moment: each value is decoded when it is reached."""
        return _decoded(self._run(scope, Pairs(range_of("iter()", **within))))


def _decoded(pairs: builtins.list[tuple[str, bytes]]) -> Iterator[tuple[str, Any]]:
    for key, data in pairs:
        yield key, decode(data)


def of_piece(idempotency_key: str | None, piece: int) -> str | None:
    """Return the idempotency key of one of several steps; the first step has the caller's own key."""
    return idempotency_key if not piece or idempotency_key is None else f"{idempotency_key}#{piece}"
