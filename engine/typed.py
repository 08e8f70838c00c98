"""Handles on a scope whose values are of one Python type: what `Engine.scope(..., type=...)` returns.

They convert on the caller's thread: a value is encoded from its type before it is written, and decoded into it when it
is returned. The scope itself holds plain JSON, as for every other handle.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, Unpack

from msgspec import UNSET

from scopestate.actors.callbacks import IN_CALLBACK, run_callback
from scopestate.batch import AioBatch, Batch, Writes
from scopestate.errors import Unsupported
from scopestate.handles import AioScope, Scope
from scopestate.ops import arguments, turns
from scopestate.ops.apply import MISSING
from scopestate.ops.callbacks import plain_answer, refuse_callback
from scopestate.ops.changes import Change
from scopestate.ops.options import (
    DeadlineOptions,
    DeleteOptions,
    PageOptions,
    RangeOptions,
    SetOptions,
    UpdateOptions,
    WatchOptions,
    WriteOptions,
    range_of,
)
from scopestate.ops.ranges import PAGE_KEYS, Pairs
from scopestate.ops.results import (
    CasResult,
    DeleteResult,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    StateEvent,
    T,
    UpdateResult,
)
from scopestate.ops.transactions import Draft, Transaction
from scopestate.ops.turns import Turn, checked_name, refuse_size
from scopestate.ops.update_ops import AnyOp
from scopestate.ops.value_types import value_type
from scopestate.ops.values import decode, encode
from scopestate.ops.writes import DELETE, KEEP, CompareAndSet
from scopestate.polled_watching import AioPolledChanges, PolledChanges
from scopestate.typed_results import (
    SKIPPED,
    OnInvalid,
    Reader,
    TypedCasResult,
    TypedChange,
    TypedEntryView,
    TypedModifyResult,
    TypedSetResult,
    TypedUpdateResult,
    VersionedReader,
    typed_event,
)
from scopestate.watch_settings import WatchSettings
from scopestate.watching import AioChanges, Changes

if TYPE_CHECKING:
    from scopestate.aio import AioEngine
    from scopestate.engine import Engine

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])
Asked = tuple[Turn[A], bool | None]


class _Calls(Generic[T]):
    """The calls of a typed scope as turns, and what their answers become; for threads and for asyncio."""

    def __init__(self, engine: Engine, scope: str, reader: Reader[T]) -> None:
        self.limits = engine._limits
        self.scope = scope
        self.reader = reader

    def data_of(self, key: str, value: T) -> bytes:
        """Return a value as JSON. Raises SchemaViolation, InvalidValue and ValueTooLarge."""
        data = self.reader.write(key, value)
        refuse_size(self.scope, key, data, self.limits.max_value_bytes)
        return data

    def plain(self, key: str, value: T) -> Any:
        """Return a value as plain JSON data. Raises SchemaViolation and InvalidValue."""
        return decode(self.reader.write(key, value))

    def set(self, key: str, value: T, options: SetOptions) -> Asked[SetResult]:
        key = checked_name("key", key)
        data = self.data_of(key, value)
        if options:
            return arguments.set_turn(key, data, options)
        return turns.Set(key, data), None

    def set_result(self, key: str, answer: SetResult) -> SetResult[T]:
        return TypedSetResult(
            answer.old_json,
            answer.new_json,
            revision=answer.revision,
            detailed=answer.detailed,
            replayed=answer.replayed,
            reader=self.reader,
            key=key,
        )

    def deleted(self, key: str, answer: DeleteResult) -> T | None:
        value: T | None = self.reader.read_or(key, answer.old_json, None)
        return value

    def update(self, key: str, ops: Iterable[AnyOp], options: UpdateOptions) -> Asked[UpdateResult]:
        turn, durable = arguments.update_turn(checked_name("key", key), ops, check=self.check_of(key), **options)
        return turn, durable

    def check_of(self, key: str) -> Callable[[bytes], object]:
        """Return a function that raises if the result of an update does not fit."""
        return partial(self.reader.check, key)

    def update_result(self, key: str, answer: UpdateResult) -> UpdateResult[T]:
        return TypedUpdateResult(
            answer.old_json,
            answer.new_json,
            answer.errors,
            revision=answer.revision,
            detailed=answer.detailed,
            replayed=answer.replayed,
            reader=self.reader,
            key=key,
        )

    def entry(self, view: EntryView | None) -> EntryView[T] | None:
        """Return an entry with a typed value; None if the key does not exist, or if its value is skipped."""
        if view is None:
            return None
        if self.reader.read(view.key, view.json) is SKIPPED:
            return None
        return TypedEntryView(view.key, view.json, view.revision, view.expires_ms, self.reader)

    def entries(self, views: Iterable[EntryView]) -> builtins.list[EntryView[T]]:
        return [entry for view in views if (entry := self.entry(view)) is not None]

    def page(self, page: Page) -> Page[T]:
        return Page(tuple(self.entries(page.entries)), page.cursor)

    def pairs(self, pairs: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, T]]:
        """Yield keys with their values, except those that are skipped."""
        read = self.reader.read
        for key, data in pairs:
            value: Any = read(key, data)
            if value is not SKIPPED:
                yield key, value

    def cas(self, key: str, expected: object, value: T, options: WriteOptions) -> Asked[CasResult]:
        key = checked_name("key", key)
        known: Any = expected
        before = None if expected is MISSING or expected is None else self.reader.write(key, known)
        turn = CompareAndSet(key, before, self.data_of(key, value))
        return arguments.asked(turn, call="compare_and_set()", **options) if options else (turn, None)

    def cas_result(self, key: str, answer: CasResult) -> CasResult[T]:
        return TypedCasResult(
            answer.swapped,
            answer.found_json,
            revision=answer.revision,
            detailed=answer.detailed,
            replayed=answer.replayed,
            reader=self.reader,
            key=key,
        )

    def modify(
        self, key: str, function: Callable[[Any], Any], default: Any, durable: bool | None
    ) -> Asked[ModifyResult]:
        refuse_callback("modify", function)

        def typed(value: Any) -> Any:
            before = default if value is _ABSENT else self.reader.read_or(key, encode(value), default)
            after = plain_answer("modify", function(before))
            return after if after is DELETE or after is KEEP else self.plain(key, after)

        return arguments.modify_turn(key, typed, _ABSENT, run_callback, durable)

    def modify_result(self, key: str, answer: ModifyResult) -> ModifyResult[T]:
        return TypedModifyResult(
            answer.old_json,
            answer.new_json,
            revision=answer.revision,
            replayed=answer.replayed,
            reader=self.reader,
            key=key,
        )

    def transact(self, function: Callable[[Transaction[T]], A], options: WriteOptions) -> Asked[A]:
        refuse_callback("transact", function)

        def typed(transaction: Transaction) -> A:
            return function(TypedTransaction(transaction, self))

        return arguments.transact_turn(typed, self.limits, run_callback, **options)


_ABSENT: Final = object()
"""What the function of a `modify` gets if the key does not exist."""


# ------------------------------------------------------------------------------------------- several writes as one


class TypedTransaction(Transaction[T], Generic[T]):
    """As `Transaction`, with values of the scope's type."""

    def __init__(self, plain: Transaction, calls: _Calls[T]) -> None:
        self._of = plain
        self._calls = calls

    @property
    def _draft(self) -> Draft:
        return self._of._draft

    def get(self, key: str, default: Any = None) -> Any:
        """As there. Raises SchemaViolation."""
        entry = self._draft.entry(checked_name("key", key))
        return self._calls.reader.read_or(key, None if entry is None else entry.json, default)

    def entry(self, key: str) -> EntryView[T] | None:
        """As there. Raises SchemaViolation."""
        return self._calls.entry(super().entry(key))

    def set(self, key: str, value: T, **options: Unpack[DeadlineOptions]) -> None:
        """As there. Raises SchemaViolation, too."""
        super().set(key, self._calls.plain(key, value), **options)

    def update(self, key: str, ops: Sequence[AnyOp]) -> T:
        """As there. Raises SchemaViolation for a result that does not fit."""
        data = encode(super().update(key, ops))
        self._calls.reader.check(key, data)
        value: T = self._calls.reader.read_or(key, data, None)
        return value

    def delete(self, key: str) -> T | None:
        """As there."""
        old = self._draft.delete(checked_name("key", key))
        value: T | None = self._calls.reader.read_or(key, old, None)
        return value

    def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, T]]:
        """As there."""
        pairs = [(key, entry.json) for key in self.keys(**within) if (entry := self._draft.entry(key)) is not None]
        return list(self._calls.pairs(pairs))

    def __getitem__(self, key: str) -> T:
        value: Any = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value  # type: ignore[no-any-return]  # of the type: `get` has read it


class _TypedWrites(Writes[T], Generic[T]):
    """What batches of typed scopes do differently."""

    __slots__ = ("_calls",)

    _calls: _Calls[T]

    def check(self, key: str, *, value: object = UNSET, **expected: Any) -> None:
        """As there; the value is one of the scope's type."""
        known: Any = value
        super().check(key, value=value if value is UNSET else self._calls.plain(key, known), **expected)

    def set(self, key: str, value: T, **options: Unpack[DeadlineOptions]) -> None:
        """As there. Raises SchemaViolation, too."""
        super().set(key, self._calls.plain(key, value), **options)

    def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[DeadlineOptions]) -> None:
        """Refuse an update: its result would have to be checked where the batch is carried out. Use `transact`."""
        raise Unsupported("`update` in a batch of a typed scope", "its result is known at the end only: use `transact`")


class TypedBatch(_TypedWrites[T], Batch[T], Generic[T]):
    """As `Batch`, with values of the scope's type."""

    __slots__ = ()

    def __init__(self, engine: Engine, calls: _Calls[T], options: WriteOptions) -> None:
        super().__init__(engine._run, calls.scope, calls.limits, options)
        self._calls = calls


class AioTypedBatch(_TypedWrites[T], AioBatch[T], Generic[T]):
    """As `AioBatch`, with values of the scope's type."""

    __slots__ = ()

    def __init__(self, engine: AioEngine, calls: _Calls[T], options: WriteOptions) -> None:
        super().__init__(engine._run, calls.scope, calls.limits, options)
        self._calls = calls


# ------------------------------------------------------------------------------------------------------------ watches


class _Reading(Generic[T]):
    """Makes a watch yield changes with typed values, and leave out those that are skipped."""

    _calls: _Calls[T]

    def _typed(self, change: Change) -> Change[T] | None:
        """Return a change with typed values; None if its value is skipped. Raises SchemaViolation."""
        if change.json is not None and self._calls.reader.read(change.key, change.json) is SKIPPED:
            return None
        fields = {name: getattr(change, name) for name in Change.__struct_fields__}
        return TypedChange(**fields, reader=self._calls.reader)


class _TypedIteration(_Reading[T], Generic[T]):
    def __next__(self) -> Change[T]:
        while (typed := self._typed(super().__next__())) is None:  # type: ignore[misc]  # of the watch
            pass
        return typed

    def get(self, timeout: float | None = None) -> Change[T]:
        """As `Changes.get`. Raises SchemaViolation; the watch then continues after the change."""
        while (typed := self._typed(super().get(timeout))) is None:  # type: ignore[misc]  # of the watch
            pass
        return typed


class _AioTypedIteration(_Reading[T], Generic[T]):
    async def __anext__(self) -> Change[T]:
        while (typed := self._typed(await super().__anext__())) is None:  # type: ignore[misc]  # of the watch
            pass
        return typed

    async def get(self, timeout: float | None = None) -> Change[T]:  # noqa: ASYNC109 - as there
        """As `Changes.get`. Raises SchemaViolation; the watch then continues after the change."""
        while (typed := self._typed(await super().get(timeout))) is None:  # type: ignore[misc]  # of the watch
            pass
        return typed


class TypedChanges(_TypedIteration[T], Changes[T]):
    """As `Changes`, with typed values."""


class TypedPolledChanges(_TypedIteration[T], PolledChanges[T]):
    """As `PolledChanges`, with typed values."""


class AioTypedChanges(_AioTypedIteration[T], AioChanges[T]):
    """As `AioChanges`, with typed values."""


class AioTypedPolledChanges(_AioTypedIteration[T], AioPolledChanges[T]):
    """As `AioPolledChanges`, with typed values."""


def _watched(calls: _Calls[T], engine: Engine, options: WatchOptions, plain: Any, polled: Any) -> Any:
    settings = WatchSettings(calls.scope, None, options)
    source = engine._parts.backend.changes
    watch = plain(engine, settings) if source is None else polled(engine, settings, source)
    watch._calls = calls
    return watch


# ------------------------------------------------------------------------------------------------------------ handles


class TypedScope(Scope[T], Generic[T]):
    """As `Scope`, for values of one type.

    >>> import msgspec
    >>> from scopestate import Engine
    >>> class User(msgspec.Struct):
    ...     name: str
    ...     logins: int = 0
    >>> engine = Engine()
    >>> users = engine.scope("users", type=User)
    >>> users.set("ada", User("Ada")).new_value
    User(name='Ada', logins=0)
    >>> users.modify("ada", lambda user: User(user.name, user.logins + 1)).new_value.logins
    1
    >>> engine.get("users", "ada")
    {'name': 'Ada', 'logins': 1}
    >>> engine.close()
    """

    def __init__(self, engine: Engine, scope: str, reader: Reader[T]) -> None:
        super().__init__(engine, scope)
        self._calls = _Calls(engine, scope, reader)

    @cached_property
    def aio(self) -> AioScope[T]:
        return AioTypedScope(self._engine.aio, self._calls)

    def set(self, key: str, value: T, **options: Unpack[SetOptions]) -> SetResult[T]:
        return self._calls.set_result(key, self._engine._run(self.name, *self._calls.set(key, value, options)))

    def get(self, key: str, default: Any = None) -> Any:
        actor = self._engine._scopes[self.name]
        values = actor.readable  # as in `Engine.get`: what is in memory takes no turn
        if values is not None and not IN_CALLBACK:
            actor.touched = True
            data = values.get(key)
            if data is not None and actor.readable is values:
                self._engine._count_get()
                return self._calls.reader.read_or(key, data, default)
        data = self._engine._run(self.name, turns.Get(checked_name("key", key)))
        return self._calls.reader.read_or(key, data, default)

    def delete(self, key: str, **options: Unpack[DeleteOptions]) -> T | None:
        return self._calls.deleted(
            key, self._engine._run(self.name, *arguments.delete_turn(checked_name("key", key), **options))
        )

    def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]) -> UpdateResult[T]:
        return self._calls.update_result(key, self._engine._run(self.name, *self._calls.update(key, ops, options)))

    def list(self) -> builtins.list[T]:
        return self.values()

    def entry(self, key: str) -> EntryView[T] | None:
        return self._calls.entry(self._engine.entry(self.name, key))

    def compare_and_set(self, key: str, expected: object, value: T, **options: Unpack[WriteOptions]) -> CasResult[T]:
        turn, durable = self._calls.cas(key, expected, value, options)
        return self._calls.cas_result(key, self._engine._run(self.name, turn, durable))

    def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult[T]:
        turn, durable = self._calls.modify(key, function, default, durable)
        return self._calls.modify_result(key, self._engine._run(self.name, turn, durable))

    def batch(self, **options: Unpack[WriteOptions]) -> Batch[T]:
        return TypedBatch(self._engine, self._calls, options)

    def transact(self, function: Callable[[Transaction[T]], A], **options: Unpack[WriteOptions]) -> A:
        return self._engine._run(self.name, *self._calls.transact(function, options))

    def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, T]]:
        return list(self.iter(**within))

    def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView[T]]:
        return self._calls.entries(self._engine.entries(self.name, **within))

    def values(self, **within: Unpack[RangeOptions]) -> builtins.list[T]:
        return [value for _, value in self.iter(**within)]

    def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> Iterator[Page[T]]:
        return map(self._calls.page, self._engine.pages(self.name, limit, **walk))

    def iter(self, **within: Unpack[RangeOptions]) -> Iterator[tuple[str, T]]:
        pairs = self._engine._run(self.name, Pairs(range_of("iter()", **within)))
        return self._calls.pairs(pairs)

    def watch(self, **options: Unpack[WatchOptions]) -> Changes[T | None]:
        watch: Changes[T | None] = _watched(self._calls, self._engine, options, TypedChanges, TypedPolledChanges)
        return watch

    def _handler(self, handler: F) -> F:
        return typed_handler(handler, self._calls.reader)

    def _data(self, key: str, value: T) -> bytes:
        return self._calls.data_of(key, value)

    def _read(self, key: str, data: bytes) -> T:
        value: T = self._calls.reader.read_or(key, data, None)
        return value

    def __repr__(self) -> str:
        return f"<Scope {self.name!r} of {self._calls.reader.kind.name}>"


class AioTypedScope(AioScope[T], Generic[T]):
    """As `AioScope`, for values of one type."""

    def __init__(self, engine: AioEngine, calls: _Calls[T]) -> None:
        super().__init__(engine, calls.scope)
        self._calls = calls

    async def set(self, key: str, value: T, **options: Unpack[SetOptions]) -> SetResult[T]:
        return self._calls.set_result(key, await self._engine._run(self.name, *self._calls.set(key, value, options)))

    async def get(self, key: str, default: Any = None) -> Any:
        data = await self._engine._run(self.name, turns.Get(checked_name("key", key)))
        return self._calls.reader.read_or(key, data, default)

    async def delete(self, key: str, **options: Unpack[DeleteOptions]) -> T | None:
        turn, durable = arguments.delete_turn(checked_name("key", key), **options)
        return self._calls.deleted(key, await self._engine._run(self.name, turn, durable))

    async def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]) -> UpdateResult[T]:
        turn, durable = self._calls.update(key, ops, options)
        return self._calls.update_result(key, await self._engine._run(self.name, turn, durable))

    async def list(self) -> builtins.list[T]:
        return await self.values()

    async def entry(self, key: str) -> EntryView[T] | None:
        return self._calls.entry(await self._engine.entry(self.name, key))

    async def compare_and_set(
        self, key: str, expected: object, value: T, **options: Unpack[WriteOptions]
    ) -> CasResult[T]:
        turn, durable = self._calls.cas(key, expected, value, options)
        return self._calls.cas_result(key, await self._engine._run(self.name, turn, durable))

    async def modify(
        self, key: str, function: Callable[[Any], Any], default: Any = None, *, durable: bool | None = None
    ) -> ModifyResult[T]:
        turn, durable = self._calls.modify(key, function, default, durable)
        return self._calls.modify_result(key, await self._engine._run(self.name, turn, durable))

    def batch(self, **options: Unpack[WriteOptions]) -> AioBatch[T]:
        return AioTypedBatch(self._engine, self._calls, options)

    async def transact(self, function: Callable[[Transaction[T]], A], **options: Unpack[WriteOptions]) -> A:
        turn, durable = self._calls.transact(function, options)
        return await self._engine._run(self.name, turn, durable)

    async def items(self, **within: Unpack[RangeOptions]) -> builtins.list[tuple[str, T]]:
        pairs = await self._engine._run(self.name, Pairs(range_of("items()", **within)))
        return list(self._calls.pairs(pairs))

    async def entries(self, **within: Unpack[RangeOptions]) -> builtins.list[EntryView[T]]:
        return self._calls.entries(await self._engine.entries(self.name, **within))

    async def values(self, **within: Unpack[RangeOptions]) -> builtins.list[T]:
        return [value for _, value in await self.items(**within)]

    async def pages(self, limit: int = PAGE_KEYS, **walk: Unpack[PageOptions]) -> AsyncIterator[Page[T]]:
        async for page in self._engine.pages(self.name, limit, **walk):
            yield self._calls.page(page)

    async def iter(self, **within: Unpack[RangeOptions]) -> AsyncIterator[tuple[str, T]]:
        pairs = await self._engine._run(self.name, Pairs(range_of("iter()", **within)))
        for pair in self._calls.pairs(pairs):
            yield pair

    def watch(self, **options: Unpack[WatchOptions]) -> AioChanges[T | None]:
        engine = self._engine._engine
        watch: AioChanges[T | None] = _watched(self._calls, engine, options, AioTypedChanges, AioTypedPolledChanges)
        return watch

    def __repr__(self) -> str:
        return f"<AioScope {self.name!r} of {self._calls.reader.kind.name}>"


def typed_handler(handler: F, reader: Reader[Any]) -> F:
    """Return a handler that calls `handler` with typed events."""

    def events_of(given: Any) -> Any:
        if isinstance(given, StateEvent):
            return typed_event(given, reader)
        return [typed_event(event, reader) for event in given]  # a batch

    if inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def call(given: Any, *delivery: Any) -> Any:
            return await handler(events_of(given), *delivery)

    else:

        @functools.wraps(handler)
        def call(given: Any, *delivery: Any) -> Any:
            return handler(events_of(given), *delivery)

    return call  # type: ignore[return-value]  # called as the handler is


def typed_scope(engine: Engine, scope: str, kind: Any, on_invalid: OnInvalid) -> TypedScope[Any]:
    """Return a handle on a scope of values of one type."""
    rule = engine._parts.values_of(scope)
    if rule is not None and rule.versions is not None:
        return TypedScope(engine, scope, VersionedReader(scope, value_type(kind), on_invalid, rule))
    return TypedScope(engine, scope, Reader(scope, value_type(kind), on_invalid))
