"""A scope as a mapping of Python's."""

from __future__ import annotations

import inspect
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from threading import get_ident
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload

from scopestate.ops.apply import MISSING
from scopestate.ops.options import range_of
from scopestate.ops.ranges import Pairs
from scopestate.ops.results import DeleteResult
from scopestate.ops.transactions import Batch, DeleteStep, Transaction
from scopestate.ops.turns import checked_name
from scopestate.ops.values import decode, encode

if TYPE_CHECKING:
    from scopestate.engine import Engine

T = TypeVar("T")

_ALL: Final = range_of()


class ScopeMapping(MutableMapping[str, Any]):
    """The keys of one scope as a `dict` of values, live: it holds nothing itself.

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
    Iteration is over a snapshot, in the order of the UTF-8 bytes of the keys; `dict(mapping)` and `==` see one moment.
    Values are copies: changing one changes nothing in the scope; set it again, or use `modify`.

    It raises KeyError and TypeError where a dict does, and otherwise what the methods of `Engine` raise. `update`
    writes at most 1,000 keys; `clear` takes one step for each 1,000, as `delete_range` does.
    """

    def __init__(self, engine: Engine, scope: str) -> None:
        self._engine = engine
        self._scope = scope
        self._copies: dict[int, _Copy] = {}
        """Thread id -> the copy that C code is making there."""

    # ----------------------------------------------------------------------------------------------------- reading

    def __getitem__(self, key: str) -> Any:
        if self._copies and (copy := self._copies.pop(get_ident(), None)) is not None:
            data = copy.take(key)
            if data is not None:
                if copy.left:
                    self._copies[get_ident()] = copy
                return decode(data)
        value = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or `default` if the key does not exist."""
        name: object = key  # whatever the program passed: a dict has no such key either
        return self._engine.get(self._scope, key, default) if isinstance(name, str) else default

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key, MISSING) is not MISSING

    def __len__(self) -> int:
        return self._engine.count(self._scope)

    def __bool__(self) -> bool:
        return bool(self._engine.keys(self._scope, limit=1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._engine.keys(self._scope))

    def __reversed__(self) -> Iterator[str]:
        return iter(self._engine.keys(self._scope, reverse=True))

    def keys(self) -> KeysView[str]:
        """Return a view of the keys."""
        return _Keys(self, _caller())

    def _copied_keys(self) -> Iterator[str]:
        pairs = self._engine._run(self._scope, Pairs(_ALL))
        if pairs:
            self._copies[get_ident()] = _Copy(pairs)
        return iter([key for key, _ in pairs])

    def items(self) -> ItemsView[str, Any]:
        """Return a view of the keys and values; each iteration over it sees one moment."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """Return a view of the values; each iteration over it sees one moment."""
        return _Values(self)

    def copy(self) -> dict[str, Any]:
        """Return everything, as of one moment."""
        return dict(self._engine.items(self._scope))

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

    def __setitem__(self, key: str, value: Any) -> None:
        self._engine.set(self._scope, key, value)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    @overload
    def pop(self, key: str, /) -> Any: ...

    @overload
    def pop(self, key: str, /, default: T) -> Any | T: ...

    def pop(self, key: str, /, default: Any = MISSING) -> Any:
        """Delete a key and return its value; if it does not exist, return `default`, or raise KeyError."""
        name: object = key
        if isinstance(name, str):
            # Not `delete`, which fires an event if there is no such key.
            answer = self._engine._run(self._scope, Batch((DeleteStep(checked_name("key", name)),)))
            (deleted,) = answer.results
            if isinstance(deleted, DeleteResult) and deleted.old_json is not None:
                return decode(deleted.old_json)
        if default is MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[str, Any]:
        """Delete the last key of the iteration, and return it with its value. Raises KeyError if there is none."""

        def take(tx: Transaction) -> tuple[str, Any] | None:
            for key in tx.keys(reverse=True, limit=1):
                return key, tx.delete(key)
            return None

        taken = self._engine.transact(self._scope, take)
        if taken is None:
            raise KeyError("popitem(): the scope is empty")
        return taken

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, which is set to `default` if it does not exist."""
        name, data = checked_name("key", key), encode(default)

        def look(tx: Transaction) -> Any:
            value = tx.get(name, MISSING)
            if value is MISSING:
                value = decode(data)
                tx.set(name, value)
            return value

        return self._engine.transact(self._scope, look)

    def update(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:  # type: ignore[override]  # the overloads of typeshed
        """Set several keys in one step: from a mapping, pairs, and named arguments. At most 1,000."""
        with self._engine.batch(self._scope) as batch:
            for key, value in {**dict(other), **named}.items():
                batch.set(key, value)

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        self.update(other)
        return self

    def clear(self) -> None:
        """Delete every key, in one step for each 1,000."""
        self._engine.delete_range(self._scope, prefix="")

    def __repr__(self) -> str:
        return f"<mapping of scope {self._scope!r}>"


# `dict(mapping)` asks for all keys and then, one by one, for their values. To give it one moment, the values are read
# with the keys. It is known by the place of the calls: C code calls `keys()` and iterates over it in one instruction
# of one frame. Python code does that in two, gets other key objects, and always reads what is there now. Refused: keys
# of a class of their own that bring their values along, as they would stay in the dict.
_Caller = tuple[int, int, CodeType]
"""A frame by its id, the instruction that it is at, and its code, which keeps the id from meaning another function."""


def _caller() -> _Caller:
    """Return the place that has called the method which calls this."""
    here = inspect.currentframe()
    frame = here.f_back.f_back if here is not None and here.f_back is not None else None
    return (0, 0, _caller.__code__) if frame is None else (id(frame), frame.f_lasti, frame.f_code)


class _Copy:
    """The rest of what `dict(mapping)` will ask for."""

    def __init__(self, pairs: list[tuple[str, bytes]]) -> None:
        self._pairs = iter(pairs)
        self.left = len(pairs)

    def take(self, key: str) -> bytes | None:
        """Return the value of the next key; None if another one is asked for, or one of another object."""
        expected, data = next(self._pairs)
        self.left -= 1
        return data if expected is key else None


class _Keys(KeysView[str]):
    """The keys of a scope."""

    def __init__(self, mapping: ScopeMapping, caller: _Caller) -> None:
        super().__init__(mapping)
        self._of = mapping
        self._caller = caller

    def __iter__(self) -> Iterator[str]:
        return self._of._copied_keys() if _caller() == self._caller else iter(self._of)


class _Items(ItemsView[str, Any]):
    """The keys of a scope with their values."""

    def __init__(self, mapping: ScopeMapping) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._of._engine.items(self._of._scope))

    def __reversed__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._of._engine.items(self._of._scope, reverse=True))


class _Values(ValuesView[Any]):
    """The values of a scope, in the order of their keys."""

    def __init__(self, mapping: ScopeMapping) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._of._engine.values(self._of._scope))

    def __contains__(self, value: object) -> bool:
        return value in list(self)
