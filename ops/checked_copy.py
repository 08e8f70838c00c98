"""Copies and encodes values that consist of exact JSON types only.

`values.encode` needs a copy that no other thread can change between the check and the encoding. A Python loop over all
parts takes several times as long as the encoding, so long lists and objects are checked as a whole: the types of all
items at once, and the ranges of numbers by msgspec. If a list or object has many small containers, such as the messages
of a chat, those are not copied. They are checked and encoded in one step, which no other thread can interrupt.

docs/design/0083-the-check-of-values.md has the reasons and the figures.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from functools import partial
from gc import get_referents
from operator import call, eq
from typing import Annotated, Any, Final

import msgspec

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
_LARGEST: Final = 1.7976931348623157e308

MANY: Final = 32
"""Lists and objects with at least this many items are checked as a whole. For shorter ones a loop is quicker."""

_Int = Annotated[int, msgspec.Meta(ge=INT_MIN, le=2**63 - 1)]  # msgspec accepts no larger bound
_Float = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]  # the bounds exclude NaN too


class _Numbers(msgspec.Struct, gc=False):
    items: list[_Int | float]


class _Scalars(msgspec.Struct, gc=False):
    items: list[_Int | _Float | str | bool | None]


_TEXT: Final = frozenset({str})
_ANY_VALUE: Final = frozenset({str, bool, type(None)})
"""Types of which every value is JSON, apart from strings with lone surrogates, which msgspec refuses."""
_NUMBERS: Final = frozenset({int, float})
_SCALARS: Final = _ANY_VALUE | _NUMBERS
_CONTAINERS: Final = frozenset({dict, list})
_KNOWN: Final = _SCALARS | _CONTAINERS

_convert = msgspec.convert
for _kind in (_Numbers, _Scalars):
    _convert({"items": []}, _kind)  # msgspec inspects the fields now, not on several threads at once

Shared = list[Any]
"""Dicts and lists that a value and its copy share, because they were not copied. `encode_copy` checks them."""


class NotPlain(RuntimeError):
    """A part of a value has no exact JSON type, so the value must go to `normalise`."""


def copy_object(value: dict[Any, Any], levels: int, shared: Shared, each: bool = False) -> dict[Any, Any] | None:
    """Return a copy of a dict that has only exact types and is at most `levels` deep. `type(value)` is dict.

    msgspec can encode the copy as it is, or raises UnicodeEncodeError. If this returns None or raises NotPlain, the
    value must go to `normalise`. Containers that are added to `shared` have not been checked; with `each`, each one was
    looked at before it was added.
    """
    if levels == 0:
        return None
    fields = value.copy()
    if len(fields) >= MANY:
        # The referents of a dict are its values only if all keys are exact strings; otherwise the keys as well.
        items = get_referents(fields)
        if len(items) == len(fields) and (checked := _checked_items(items, levels - 1, shared, each)) is not None:
            return fields if checked is items else dict(zip(fields, checked, strict=True))
    for key, item in fields.items():
        if type(key) is not str:
            return None
        kind = type(item)
        if kind is str or kind is bool or item is None:
            continue
        if kind is int:
            if -0x3FFFFFFF < item < 0x3FFFFFFF or INT_MIN <= item <= INT_MAX:
                continue
        elif kind is float:
            if -1e308 < item < 1e308 or item - item == 0.0:
                continue
        elif kind is dict or kind is list:
            deep = levels - 1
            inner = copy_object(item, deep, shared, each) if kind is dict else copy_array(item, deep, shared, each)
            if inner is not None:
                fields[key] = inner
                continue
        return None
    return fields


def copy_array(value: list[Any], levels: int, shared: Shared, each: bool = False) -> list[Any] | None:
    """Return a copy of a list that has only exact types and is at most `levels` deep. `type(value)` is list.

    Arguments, None and NotPlain as for `copy_object`.
    """
    if levels == 0:
        return None
    elements = value.copy()
    if len(elements) >= MANY and (checked := _checked_items(elements, levels - 1, shared, each)) is not None:
        return checked
    for item in elements:
        # A quick loop for lists of strings and numbers: it has no index and leaves out the rare cases.
        kind = type(item)
        if kind is str or (kind is int and -0x3FFFFFFF < item < 0x3FFFFFFF):
            continue
        if kind is float and -1e308 < item < 1e308:
            continue
        break
    else:
        return elements
    for index, item in enumerate(elements):
        kind = type(item)
        if kind is dict or kind is list:
            deep = levels - 1
            inner = copy_object(item, deep, shared, each) if kind is dict else copy_array(item, deep, shared, each)
            if inner is None:
                return None
            elements[index] = inner
        elif not (
            kind is str
            or (kind is int and INT_MIN <= item <= INT_MAX)
            or (kind is float and item - item == 0.0)
            or kind is bool
            or item is None
        ):
            return None
    return elements


def encode_copy(value: Any, copy: object, levels: int, shared: Shared, each: bool = False) -> bytes | None:
    """Return `copy` as JSON if the containers that it shares with `value` are plain, and the two are equal now.

    `copy` is the result of `copy_object` or `copy_array`; the other arguments are those given there. None and NotPlain
    mean the same as there.
    """
    texts_only = not each and {*map(type, get_referents(shared[0], shared[-1]))} == _TEXT
    # No other thread runs between these: they are C functions that call no Python code, and a C function calls them.
    # An unexpected object in a shared container can make msgspec call Python code, but by then `found` contains it.
    steps = (
        partial(eq, value, copy),
        partial(get_referents, *shared),
        partial(int) if texts_only else partial(sum, map(len, shared)),
        partial(_to_json, copy),
    )
    try:
        is_same, found, length, data = map(call, steps)
    except Exception:  # noqa: BLE001 - of msgspec, or of the `__eq__` of an object that another thread added; `normalise` raises the right one
        return None
    if not is_same:
        return None
    kinds = _kinds_of(found)
    # A dict whose keys are not all exact strings has its keys as referents too. So all keys are exact strings if there
    # are as many referents as fields, or if all referents are exact strings.
    if kinds == _TEXT or (kinds <= _SCALARS and len(found) == length and (kinds <= _ANY_VALUE or _are_in_range(found))):
        json: bytes = data
        return json
    if each or not kinds <= _KNOWN:
        return None
    shared = []
    copy = (copy_array if type(value) is list else copy_object)(value, levels, shared, True)
    if not shared or copy is None:
        return None
    return encode_copy(value, copy, levels, shared, True)


def _checked_numbers(items: list[Any]) -> list[Any] | None:
    """Return a copy of a list of 64-bit integers and finite floats; None if it may have other items.

    The copy has plain integers in place of instances of subclasses of int. msgspec accepts a Decimal as a float; adding
    it to a float raises TypeError, so it is found by the sum.
    """
    try:
        numbers = _convert({"items": items}, _Numbers).items
        total = sum(items, 0.0)
    except (msgspec.ValidationError, TypeError):
        return None
    return numbers if total - total == 0.0 else None  # NaN or an infinity makes the total one too


def _checked_items(items: list[Any], levels: int, shared: Shared, each: bool) -> list[Any] | None:
    """Return the items of the copy if all of `items` are scalars, or all are dicts and lists that hold mostly scalars.

    None: the items must be looked at one by one.
    """
    if type(items[0]) in _NUMBERS and (numbers := _checked_numbers(items)) is not None:
        return numbers
    kinds = _kinds_of(items)
    if kinds <= _SCALARS:
        return items if kinds <= _ANY_VALUE or _are_in_range(items) else None
    if levels == 0 or not kinds <= _CONTAINERS:
        return None
    sample = items[:: len(items) // 8 | 1]  # an odd step: the rows of a chat often alternate
    inside = [*map(type, get_referents(*sample))]
    if not each and _SCALARS.issuperset(inside):
        shared += items
        return items
    if sum(map(_CONTAINERS.__contains__, inside)) >= len(sample) // 2:
        return None
    return _checked_each(items, levels, shared)


def _checked_each(items: list[Any], levels: int, shared: Shared) -> list[Any]:
    """Return the items of the copy for `items`, which are dicts and lists. Most of them have only scalars."""
    copies = []
    for item in items:
        inner = item
        for part in item.values() if type(item) is dict else item:
            if type(part) not in _SCALARS:
                inner = (copy_object if type(item) is dict else copy_array)(item, levels, shared, True)
                if inner is None:
                    raise NotPlain  # not None: the caller would look at the same items again
                break
        else:
            shared.append(item)
        copies.append(inner)
    return copies


def _kinds_of(items: list[Any]) -> AbstractSet[type]:
    """Return the types of the items. Most lists have one type, which `count` finds faster than building a set does."""
    types = [*map(type, items)]
    if types and types.count(types[0]) == len(types):
        return {types[0]}
    return {*types}


def _are_in_range(items: list[Any]) -> bool:
    """Return whether all integers of a list of scalars are within 64 bits, and all floats are finite."""
    try:
        _convert({"items": items}, _Scalars)
    except msgspec.ValidationError:
        pass  # there may be integers between 2^63 and 2^64
    else:
        return True
    for item in items:
        kind = type(item)
        if (kind is int and not INT_MIN <= item <= INT_MAX) or (kind is float and item - item != 0.0):
            return False
    return True


_to_json = msgspec.json.Encoder().encode
