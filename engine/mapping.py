"""A scope as a Python mapping."""

from __future__ import annotations

import inspect
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from threading import get_ident
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, overload

from scopestate.ops.apply import MISSING
from scopestate.ops.options import range_of
from scopestate.ops.ranges import Pairs
from scopestate.ops.results import DeleteResult, T
from scopestate.ops.transactions import Batch, DeleteStep, Transaction
from scopestate.ops.turns import checked_name

if TYPE_CHECKING:
    from scopestate.handles import Scope

A = TypeVar("A")

_ALL: Final = range_of()


class ScopeMapping(MutableMapping[str, T], Generic[T]):
    """The keys and values of one scope, used as a `dict`. It is live and holds no data itself.

    >>> from scopestate import Engine
    >>> engine = Engine()
    >>> users = engine.mapping("users")
    >>> users["ada"] = {"logins": 1}
    >>> users.setdefault("bob", {"logins": 0})
    {'logins': 0}
    >>> dict(users)
    {'ada': {'logins': 1}, 'bob': {'logins': 0}}
    >>> engine.close()

    Each method is one step, which no other call can interrupt: `setdefault`, `pop`, `popitem`, `update` and `|=` too.
    Iteration is over a snapshot, in the order of the UTF-8 bytes of the keys; `dict(mapping)` and `==` also read one
    moment. Values are copies: changing a copy does not change the scope; set the value again, or use `modify`.

    It raises KeyError and TypeError where a dict does, and otherwise what the methods of `Engine` raise. `update`
    writes at most 1,000 keys; `clear` takes one step for each 1,000, as `delete_range` does.
    """

    def __init__(self, scope: Scope[T]) -> None:
        self._scope = scope
        self._copies: dict[int, _Copy] = {}
        """Thread id -> the copy that C code is making there."""

    # ----------------------------------------------------------------------------------------------------- reading

    def __getitem__(self, key: str) -> T:
        if self._copies and (copy := self._copies.pop(get_ident(), None)) is not None:
            data = copy.take(key)
            if data is not None:
                if copy.left:
                    self._copies[get_ident()] = copy
                return self._scope._read(key, data)
        value: Any = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value  # type: ignore[no-any-return]  # a value of the scope

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` if the key does not exist."""
        name: object = key  # the program may pass anything; a dict returns the default too
        return self._scope.get(key, default) if isinstance(name, str) else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key, MISSING) is not MISSING

    def __len__(self) -> int:
        return self._scope.count()

    def __bool__(self) -> bool:
        return bool(self._scope.keys(limit=1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._scope.keys())

    def __reversed__(self) -> Iterator[str]:
        return iter(self._scope.keys(reverse=True))

    def keys(self) -> KeysView[str]:
        """Return a view of the keys."""
        return _Keys(self, _caller())

    def _copied_keys(self) -> Iterator[str]:
        pairs = self._scope._engine._run(self._scope.name, Pairs(_ALL))
        if pairs:
            self._copies[get_ident()] = _Copy(pairs)
        return iter([key for key, _ in pairs])

    def items(self) -> ItemsView[str, T]:
        """Return a view of the keys and values; each iteration over it reads one moment."""
        return _Items(self)

    def values(self) -> ValuesView[T]:
        """Return a view of the values; each iteration over it reads one moment."""
        return _Values(self)

    def copy(self) -> dict[str, T]:
        """Return everything, as of one moment."""
        return dict(self._scope.items())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ScopeMapping):
            return self.copy() == other.copy()
        return self.copy() == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compares what it holds, as a dict does

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.copy(), **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self.copy()}

    # ----------------------------------------------------------------------------------------------------- writing

    def __setitem__(self, key: str, value: T) -> None:
        self._scope.set(key, value)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    @overload
    def pop(self, key: str, /) -> T: ...

    @overload
    def pop(self, key: str, /, default: A) -> T | A: ...

    def pop(self, key: str, /, default: Any = MISSING) -> Any:
        """Delete a key and return its value; if it does not exist, return `default`, or raise KeyError."""
        name: object = key
        if isinstance(name, str):
            # Not `delete`, which fires an event if there is no such key.
            answer = self._scope._engine._run(self._scope.name, Batch((DeleteStep(checked_name("key", name)),)))
            (deleted,) = answer.results
            if isinstance(deleted, DeleteResult) and deleted.old_json is not None:
                return self._scope._read(key, deleted.old_json)
        if default is MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[str, T]:
        """Delete the last key of the iteration, and return it with its value. Raises KeyError if there is none."""

        def take(tx: Transaction[T]) -> tuple[str, Any] | None:
            for key in tx.keys(reverse=True, limit=1):
                return key, tx.delete(key)
            return None

        taken = self._scope.transact(take)
        if taken is None:
            raise KeyError("popitem(): the scope is empty")
        return taken

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; if the key does not exist, set it to `default` first."""
        name = checked_name("key", key)
        data = self._scope._data(name, default)

        def look(tx: Transaction[T]) -> Any:
            value = tx.get(name, MISSING)
            if value is MISSING:
                value = self._scope._read(name, data)
                tx.set(name, value)
            return value

        return self._scope.transact(look)

    def update(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:  # type: ignore[override]  # the overloads of typeshed
        """Set several keys in one step: from a mapping, pairs, and named arguments. At most 1,000."""
        with self._scope.batch() as batch:
            for key, value in {**dict(other), **named}.items():
                batch.set(key, value)

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        self.update(other)
        return self

    def clear(self) -> None:
        """Delete every key, in one step for each 1,000."""
        self._scope.delete_range(prefix="")

    def __repr__(self) -> str:
        return f"<mapping of scope {self._scope.name!r}>"


# `dict(mapping)` asks for all keys and then, one by one, for their values. So that it reads one moment, the values are
# read with the keys. Its calls are recognised by their place: C code calls `keys()` and iterates over it in one
# instruction of one frame. Python code takes two instructions, gets other key objects, and always reads the current
# values. Refused: keys of a special class that carry their values, as they would stay in the dict.
_Caller = tuple[int, int, CodeType]
"""The id of a frame, its current instruction, and its code, as another function may reuse the id."""


def _caller() -> _Caller:
    """Return the place that called the calling method."""
    here = inspect.currentframe()
    frame = here.f_back.f_back if here is not None and here.f_back is not None else None
    return (0, 0, _caller.__code__) if frame is None else (id(frame), frame.f_lasti, frame.f_code)


class _Copy:
    """The keys and values that `dict(mapping)` has not asked for yet."""

    def __init__(self, pairs: list[tuple[str, bytes]]) -> None:
        self._pairs = iter(pairs)
        self.left = len(pairs)

    def take(self, key: str) -> bytes | None:
        """Return the value of the next key; None if `key` is not that key, or an equal key that is another object."""
        expected, data = next(self._pairs)
        self.left -= 1
        return data if expected is key else None


class _Keys(KeysView[str]):
    """The keys of a scope."""

    def __init__(self, mapping: ScopeMapping[Any], caller: _Caller) -> None:
        super().__init__(mapping)
        self._of = mapping
        self._caller = caller

    def __iter__(self) -> Iterator[str]:
        return self._of._copied_keys() if _caller() == self._caller else iter(self._of)


class _Items(ItemsView[str, Any]):
    """The keys of a scope with their values."""

    def __init__(self, mapping: ScopeMapping[Any]) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._of._scope.items())

    def __reversed__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._of._scope.items(reverse=True))


class _Values(ValuesView[Any]):
    """The values of a scope, in the order of their keys."""

    def __init__(self, mapping: ScopeMapping[Any]) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._of._scope.values())

    def __contains__(self, value: object) -> bool:
        return value in list(self)
