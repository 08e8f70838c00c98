"""Objects with bad manners: each hook of theirs raises, lies, or is of the wrong type."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import math
import types
from collections import OrderedDict, UserDict, UserList, UserString
from collections.abc import Iterator
from typing import Any


class Rude(Exception):
    """What a hostile hook raises: no error of the engine's tree."""


def _raise(*_: Any, **__: Any) -> Any:
    raise Rude("boo")


_HOOKS = (
    "__eq__", "__hash__", "__str__", "__repr__", "__iter__", "__len__", "__bool__", "__contains__", "__getitem__",
    "__format__", "__int__", "__float__", "__index__", "__lt__", "__add__", "get", "items", "keys", "values", "encode",
    "isascii",
)  # fmt: skip

RudeStr = type("RudeStr", (str,), dict.fromkeys(_HOOKS, _raise))
RudeInt = type("RudeInt", (int,), dict.fromkeys(_HOOKS, _raise))
RudeFloat = type("RudeFloat", (float,), dict.fromkeys(_HOOKS, _raise))
RudeDict = type("RudeDict", (dict,), dict.fromkeys(_HOOKS, _raise))
RudeList = type("RudeList", (list,), dict.fromkeys(_HOOKS, _raise))
RudeTuple = type("RudeTuple", (tuple,), dict.fromkeys(_HOOKS, _raise))
RudeObject = type("RudeObject", (), dict.fromkeys(_HOOKS, _raise))


class Liar(str):  # noqa: SLOT000 - as bad as it gets
    """Equal to everything, with the hash of another text."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("k")

    def __str__(self) -> str:
        return "lie"

    def encode(self, *_: Any, **__: Any) -> bytes:
        return b"lie"


class Fickle(str):  # noqa: SLOT000 - it counts
    """Hashes well a few times, then raises: in the middle of whatever uses it."""

    left = 0

    def __hash__(self) -> int:
        if self.left <= 0:
            raise Rude("no more hashes")
        self.left -= 1
        return str.__hash__(self)


class RudeMapping(UserDict):  # type: ignore[type-arg]
    """A Mapping whose look-ups raise."""

    def __contains__(self, key: object) -> bool:
        raise Rude("boo")

    def __getitem__(self, key: object) -> Any:
        raise Rude("boo")


class Endless:
    """An iterable that never ends."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class Colour(str, enum.Enum):  # noqa: UP042 - StrEnum has better manners
    RED = "k"


class Bottomless(dict):  # type: ignore[type-arg]
    """Claims to hold itself."""

    def items(self) -> Any:
        return [("a", self)]


def loop() -> list[Any]:
    """A list that holds itself."""
    endless: list[Any] = []
    endless.append(endless)
    return endless


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def zoo() -> list[Any]:
    """Every kind of thing that is no proper JSON value, text or mapping."""
    return [
        RudeStr("k"), RudeInt(1), RudeFloat(1.5), RudeDict(a=1), RudeList([1]), RudeTuple((1,)), RudeObject(),
        Liar("k"), Fickle("k"), RudeMapping(scope="s", key="k", value=1), Endless(), Colour.RED, Bottomless(),
        UserDict(a=1), UserList([1]), UserString("k"), OrderedDict(a=1), types.MappingProxyType({"a": 1}),
        loop(), deep(127), deep(129), deep(100_000), math.nan, math.inf, -math.inf, -0.0, 10**400, 2**64, -(2**63) - 1,
        "\ud800", "a\udfffb", {"\ud800": 1}, {1: 2}, {None: 1}, {("a",): 1}, b"bytes", bytearray(b"x"),
        memoryview(b"x"),         {1, 2}, frozenset(), range(3), object(), type, len, lambda: 1,
        (x for x in "ab"), NotImplemented, ...,
        decimal.Decimal("1.5"), dt.datetime(2020, 1, 1, tzinfo=dt.UTC), 1j, "", "\x00", "../x", "__proto__",
        {"__proto__": {"a": 1}, "constructor": 1}, None, True, [], {}, (), "x" * 100_000,
    ]  # fmt: skip
