"""Functions whose results are kept; each result is computed by one caller at a time."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    NamedTuple,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    overload,
)

from scopestate.errors import Conflict, DeserializationError, ScopestateError, Unsupported
from scopestate.integrations.cache.values import (
    ABSENT,
    MARK,
    call_name,
    deadline,
    name_of,
    pack,
    took_of,
    unpack,
    value_of,
)
from scopestate.ops.values import class_name, decode

if TYPE_CHECKING:
    from scopestate.engine import Engine
    from scopestate.integrations.cache.cache import Cache
    from scopestate.ops.results import SetResult

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")

log = logging.getLogger("scopestate.integrations")

FIRST_PAUSE_S: Final = 0.005
LONGEST_PAUSE_S: Final = 0.1
"""Longest pause, in seconds, between two looks for the result of another process."""
NO_LEASE: Final = 0
"""Used as the lease if the backend has no conditional writes: then only this process is limited to one computation."""


class Outcome(NamedTuple):
    """How a computation has ended. Without a value or an error, it was given up, or another process has the result."""

    stored: bytes | None = None
    """What was stored, as JSON."""
    error: Exception | None = None


class Computation:
    """One computation of a result in this process, for others to wait for."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        """The thread or task that computes."""
        self.outcome: Outcome = Outcome()
        self.ended: Future[Outcome] = Future()
        self.ended.set_running_or_notify_cancel()  # a waiting task that is cancelled must not cancel it

    def told(self) -> Any:
        """Return the result, or raise its error; ABSENT if there is neither."""
        outcome = self.ended.result()
        if outcome.error is not None:
            raise outcome.error
        return ABSENT if outcome.stored is None else value_of(decode(outcome.stored))


class Memoized(Protocol[P, R]):
    """A function whose results are kept. It is called like the function, and may be a method."""

    __wrapped__: Callable[P, R]
    """The function itself."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the result of a call, kept or computed."""

    def __cache_key__(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of a call in the cache."""

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: Memoized[Concatenate[Any, Q], S], instance: object, owner: type | None = None
    ) -> Callable[Q, S]: ...


class Memoize:
    """What `Cache.memoize` returns: decorates a function."""

    def __init__(
        self,
        cache: Cache,
        expire: float | timedelta | None,
        name: str | None,
        tag: Any,
        ignore: Iterable[int | str],
        key: Callable[..., Any] | None,
        lease: float,
        early: float,
    ) -> None:
        self._cache = cache
        self._options = deadline(expire)
        self._name = name
        self._tag = None if tag is None else name_of(tag)
        self._ignore = frozenset(ignore)
        self._key = key
        self._lease = lease
        self._early = early

    def __call__(self, function: Callable[P, R]) -> Memoized[P, R]:
        """Return a function that calls `function` and keeps its results."""
        base = self._base(function)
        memo = Memo(self._cache, function, self._options, self._tag, self._lease, self._early)
        key_of_call = self._key_of_call(base)
        wrapper: Any
        if inspect.iscoroutinefunction(function):
            from scopestate.integrations.cache.memoize_async import decorated  # noqa: PLC0415 - imports asyncio

            wrapper = decorated(memo, key_of_call)
        else:
            wrapper = _decorated(memo, key_of_call)
        wrapper = functools.wraps(function)(wrapper)
        wrapper.__cache_key__ = lambda *args, **kwargs: key_of_call(args, kwargs)
        return cast("Memoized[P, R]", wrapper)

    def _base(self, function: Callable[..., Any]) -> str:
        if not callable(function):
            raise DeserializationError(f"memoize decorates a function, not a {class_name(function)}")
        name = self._name
        if name is None:
            name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', class_name(function))}"
        # The rest of a key is JSON and begins with one of these two, so different calls have different keys.
        if name.startswith(MARK) or "[" in name or "{" in name:
            raise DeserializationError(
                f"the name of a memoized function has no [ or {{, and no ~ at its start: {name!r}"
            )
        return name

    def _key_of_call(self, base: str) -> Callable[[tuple[Any, ...], dict[str, Any]], str]:
        ignore, key = self._ignore, self._key
        if key is not None:
            if ignore:
                raise DeserializationError(
                    "give `key` or `ignore`: a function that returns the key ignores what it will"
                )
            return lambda args, kwargs: call_name(base, (key(*args, **kwargs),), {})
        if ignore:
            return lambda args, kwargs: call_name(
                base,
                tuple([arg for index, arg in enumerate(args) if index not in ignore]),
                {name: arg for name, arg in kwargs.items() if name not in ignore},
            )
        return functools.partial(call_name, base)


class Memo:
    """The results of one function in a cache, and its computations in this process."""

    def __init__(
        self,
        cache: Cache,
        function: Callable[..., Any],
        options: dict[str, Any],
        tag: str | None,
        lease_s: float,
        early: float,
    ) -> None:
        self.cache = cache
        self.scope: Final = cache.scope
        self.leases: Final = f"{cache.scope}:leases"
        self.function = function
        self.options = options
        self.lease_s = lease_s
        self.early = early
        self.running: dict[str, Computation] = {}
        """Key -> its computation in this process."""
        self._tag = tag
        cache._memos.add(self)

    @property
    def engine(self) -> Engine:
        """The engine of the cache."""
        return self.cache._source.engine

    def once(self) -> dict[str, Any]:
        """As `EngineSource.once`."""
        return self.cache._source.once()

    def writing(self) -> dict[str, Any]:
        """Return the options with which a result is stored."""
        return {**self.options, **self.once()}

    def packed(self, result: Any, began: float) -> Any:
        """Return the JSON data to store for a result. Raises InvalidValue."""
        return pack(result, self._tag, time.perf_counter() - began if self.early else None)

    def kept(self, mine: Computation, result: SetResult) -> None:
        """Note that a result is in the cache."""
        mine.outcome = Outcome(result.new_json)
        self.cache._grown(len(result.new_json))

    def give_up(self, name: str, other: Computation) -> None:
        """Stop waiting for a computation that takes longer than a lease, or whose thread a signal has ended."""
        if self.running.get(name) is other:
            self.running.pop(name, None)

    def end(self, name: str, mine: Computation) -> None:
        """End a computation, and wake the callers that wait for it."""
        self.give_up(name, mine)
        mine.ended.set_result(mine.outcome)

    def is_early(self, took_s: float, left_s: float | None) -> bool:
        """Decide by chance whether a result is recomputed before it expires.

        The method is that of Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention"
        (2015).
        """
        return left_s is not None and -math.log(1.0 - random.random()) * took_s * self.early >= left_s

    def count(self, *, found: bool) -> None:
        """Count a hit or a miss, if the cache counts them."""
        if self.cache._counts is not None:
            self.cache._counts.count(found=found)


def _decorated(memo: Memo, key_of_call: Callable[[tuple[Any, ...], dict[str, Any]], str]) -> Callable[..., Any]:
    source, scope, early = memo.cache._source, memo.scope, memo.early
    computing = _Computing(memo)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        name = key_of_call(args, kwargs)
        value = source.engine.get(scope, name, ABSENT)
        if memo.cache._counts is not None:
            memo.count(found=value is not ABSENT)
        if value is ABSENT:
            return computing.result(name, args, kwargs)
        if type(value) is dict and MARK in value:
            if early and (took := took_of(value)) is not None and memo.is_early(took, source.engine.ttl(scope, name)):
                return computing.renewed(name, value, args, kwargs)
            return unpack(value)
        return value

    return wrapper


class _Computing:
    """Computes results on the callers' threads."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo

    def result(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call that is not in the cache."""
        memo, me = self._memo, threading.get_ident()
        until = time.monotonic() + memo.lease_s
        mine = Computation(me)
        while (other := memo.running.setdefault(name, mine)) is not mine:
            if other.owner == me:  # the function has called itself with the same arguments
                return memo.function(*args, **kwargs)
            try:
                other.ended.result(max(0.0, until - time.monotonic()))
            except TimeoutError:
                memo.give_up(name, other)
                return self._compute(name, Computation(me), args, kwargs)
            value = other.told()
            if value is ABSENT:
                value = self._look(name)
            if value is not ABSENT:
                return value
        lease = None
        try:
            lease, value = self._lease_or_value(name, until)
            return self._compute(name, mine, args, kwargs) if value is ABSENT else value
        finally:
            memo.end(name, mine)
            self._give_back(name, lease)

    def renewed(self, name: str, stored: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Recompute a result before it expires. If another caller does so, or it fails, return the stored one."""
        memo, mine = self._memo, Computation(threading.get_ident())
        if memo.running.setdefault(name, mine) is not mine:
            return unpack(stored)
        lease = None
        try:
            lease = self._take_lease(name)
            return unpack(stored) if lease is None else self._compute(name, mine, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the function raises
            mine.outcome = Outcome()
            log.warning("%s could not be recomputed before it expires: %s: %s", name, class_name(error), error)
            return unpack(stored)
        finally:
            memo.end(name, mine)
            self._give_back(name, lease)

    def _compute(self, name: str, mine: Computation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        memo, began = self._memo, time.perf_counter()
        try:
            result = memo.function(*args, **kwargs)
            memo.kept(mine, memo.engine.set(memo.scope, name, memo.packed(result, began), **memo.writing()))
        except Exception as error:
            mine.outcome = Outcome(error=error)
            raise
        return result

    def _look(self, name: str) -> Any:
        value = self._memo.engine.get(self._memo.scope, name, ABSENT)
        return value if value is ABSENT else value_of(value)

    def _lease_or_value(self, name: str, until: float) -> tuple[int | None, Any]:
        """Take the lease of a result, or wait for another process's result; (None, ABSENT) if neither comes in time."""
        pause_s = FIRST_PAUSE_S
        while True:
            lease = self._take_lease(name)
            value = self._look(name)
            if lease is not None or value is not ABSENT:
                return lease, value
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None, ABSENT
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _take_lease(self, name: str) -> int | None:
        memo = self._memo
        try:
            return memo.engine.set(memo.leases, name, 1, if_absent=True, ttl=memo.lease_s, **memo.once()).revision
        except Conflict:
            return None
        except Unsupported:
            return NO_LEASE

    def _give_back(self, name: str, lease: int | None) -> None:
        if lease:
            try:
                self._memo.engine.delete(self._memo.leases, name, if_revision=lease, **self._memo.once())
            except Conflict:
                pass  # the lease has ended, and may belong to another process
            except ScopestateError as error:
                log.warning("the lease of %s could not be given back; it ends on its own: %s", name, error)
