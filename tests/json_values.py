"""Values of all kinds that JSON can and cannot hold, for the tests of the check of values."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum, IntEnum
from typing import Any

import msgspec
from hypothesis import strategies as st


def nested(levels: int, innermost: object = 1) -> Any:
    """Lists and objects in turn, `levels` of them around `innermost`."""
    for level in range(levels):
        innermost = [innermost] if level % 2 else {"k": innermost}
    return innermost


class Colour(Enum):
    RED = "red"

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    __hash__ = Enum.__hash__


class Level(IntEnum):
    HIGH = 3


class Word(str, Enum):  # noqa: UP042  # the older spelling: its str() is `Word.YES`, its text is not
    YES = "yes"


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Real(float):
    pass


@dataclasses.dataclass
class Account:
    name: str = "Ada"


class Row(msgspec.Struct):
    name: str = "Ada"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.sampled_from([-(2**63) - 1, -(2**63), 2**64 - 1, 2**64, 10**309]),
    st.floats(),
    st.text(),
)
ODD = st.sampled_from(
    ["\ud800", Colour.RED, Level.HIGH, Word.YES, Text("t"), Whole(2**64), Real(math.inf), b"x", {1}, Row(), Account()]
)
KEYS = st.one_of(st.text(max_size=4), st.sampled_from([1, None, True, "\udc00", Word.YES, Text("k"), Level.HIGH]))
ANYTHING = st.recursive(
    st.one_of(SCALARS, ODD),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=12
)
