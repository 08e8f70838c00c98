"""Values as JSON bytes: encoded once at the boundary, immutable from then on.

Four functions: `encode` and `decode` between Python values and bytes, `parse` for JSON text from outside, `normalise`
for plain JSON data without the bytes. What they accept and refuse is docs/semantics.md 1: text without lone surrogates,
string keys, finite numbers, at most 128 levels; integers from -2^63 to 2^64-1 are exact, larger ones become floats.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from scopestate.errors import DeserializationError, InvalidValue

MAX_LEVELS: Final = 128
"""Deepest nesting of arrays and objects; a scalar is 0 levels, `[]` is 1."""

_INT_MIN: Final = -(2**63)
_INT_MAX: Final = 2**64 - 1

_to_json = msgspec.json.Encoder().encode

decode = msgspec.json.Decoder().decode
"""decode(data: bytes) -> Any: a fresh Python value from bytes that `encode` or `parse` returned."""


def encode(value: Any) -> bytes:
    """Return `value` as compact JSON.

    dict, list, tuple, str, int, float, bool, None and their subclasses are accepted. Raises InvalidValue, which names
    the place in the value, for everything that JSON cannot hold.
    """
    # msgspec alone would write NaN as null, the key 1 as "1" and a datetime as text, so the value is looked at first.
    # Refused: comparing `decode(data) == value` afterwards. Quicker only for small nested values, it trusts the
    # `__eq__` of any object (an Enum may equal its text) and does not see integers beyond 64 bits.
    try:
        kind = type(value)
        if kind is dict:
            # The loop of `_are_plain` once more: most values are an object of a few fields, and the call shows there.
            for key, item in value.items():
                if type(key) is not str:
                    break
                kind = type(item)
                if kind is str:
                    continue
                if kind is int:
                    # The short range is the quicker test, and nearly always enough.
                    if -0x3FFFFFFF < item < 0x3FFFFFFF or _INT_MIN <= item <= _INT_MAX:
                        continue
                elif kind is bool or item is None:
                    continue
                elif kind is float:
                    if item - item == 0.0:  # NaN and the infinities give NaN
                        continue
                elif _are_plain(item, MAX_LEVELS - 1):
                    continue
                break
            else:
                return _to_json(value)
        elif kind is str or _are_plain([value], MAX_LEVELS + 1):
            return _to_json(value)
    except UnicodeEncodeError:
        pass  # the exact check says in which string the lone surrogate is
    return _to_json(normalise(value))


def encode_plain(value: Any) -> bytes:
    """Return plain JSON data, as `decode`, `normalise` and `apply` return it, as compact JSON.

    For what is known to be plain: only the number of levels is looked at, because ops can nest values in values.
    Raises InvalidValue for more than 128.
    """
    data = _to_json(value)
    # More than 128 levels take more than 256 brackets.
    if len(data) > 2 * MAX_LEVELS and data.count(b"{") + data.count(b"[") > MAX_LEVELS:
        normalise(value)
    return data


def _are_plain(value: object, levels: int) -> bool:
    """Say whether msgspec writes the array or object `value` as it is, or raises UnicodeEncodeError.

    True only for exact types, at most `levels` deep. False means "not sure": then `normalise` decides.
    """
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                return False
        items: Iterable[Any] = value.values()
    elif type(value) is list:
        items = value
    else:
        return False
    if levels == 0:
        return False
    for item in items:
        kind = type(item)
        if kind is str:
            continue
        if kind is int:
            if -0x3FFFFFFF < item < 0x3FFFFFFF or _INT_MIN <= item <= _INT_MAX:
                continue
        elif kind is bool or item is None:
            continue
        elif kind is float:
            if item - item == 0.0:
                continue
        elif _are_plain(item, levels - 1):
            continue
        return False
    return True


def normalise(value: object, path: str = "$") -> Any:
    """Return `value` as plain JSON data that shares no list or dict with it: the exact, slow check.

    Subclasses become plain, tuples become lists, integers beyond 64 bits floats. Raises InvalidValue; `path` is the
    name of `value` in its text.
    """
    return _plain(value, (path,), 0)


def parse(text: bytes | str) -> bytes:
    """Return JSON text from a file, the wire or Redis as `encode` would write it.

    As docs/semantics.md 1 says: integers beyond 64 bits and `-0` are floats, the last of duplicate keys wins. Raises
    DeserializationError for text that is not JSON, numbers beyond binary64, lone surrogates, more than 128 levels.
    """
    try:
        value = decode(text)
        if _MINUS_ZERO.search(text if isinstance(text, bytes) else text.encode()):
            # msgspec reads `-0` as the integer 0 and has no hook for integers; the standard library has one. By now
            # the text is known to be JSON, so their other differences do not matter.
            value = json.loads(text, parse_int=_integer)
        return encode(value)
    except msgspec.DecodeError as error:
        raise DeserializationError(str(error)) from error
    except UnicodeError as error:
        raise DeserializationError(f"not Unicode text: {error}") from error
    except RecursionError as error:
        raise DeserializationError(f"more than {MAX_LEVELS} nested levels") from error


_MINUS_ZERO: Final = re.compile(rb"-0(?![0-9.eE])")


def _integer(literal: str) -> int | float:
    return -0.0 if literal == "-0" else int(literal)


_Steps = tuple[Any, ...]
"""(root name,) at the root, (steps of the parent, key or index) below: cheap to grow, read only for an error."""


def _plain(value: object, steps: _Steps, level: int) -> Any:
    match value:
        case None | bool():
            return value
        case str():
            text = str.__str__(value)
            if _has_lone_surrogate(text):
                raise _refusal(steps, "a string with a lone surrogate is not Unicode text; JSON cannot hold it")
            return text
        case int():
            return _number(int.__int__(value), steps)
        case float():
            number = float.__float__(value)
            if not math.isfinite(number):
                raise _refusal(steps, f"{number} is not a JSON number; store None or a string")
            return number
        case dict():
            level = _deeper(level, steps)
            return {_key(key, steps): _plain(item, (steps, key), level) for key, item in dict.items(value)}
        case list() | tuple():
            level = _deeper(level, steps)
            return [_plain(item, (steps, index), level) for index, item in enumerate(_elements(value))]
        case _:
            raise _refusal(steps, _advice(value))


def _key(key: object, steps: _Steps) -> str:
    if not isinstance(key, str):
        raise _refusal(steps, f"the keys of a JSON object are strings, found {_named(key)}; use str(key)")
    text = str.__str__(key)
    if _has_lone_surrogate(text):
        raise _refusal((steps, text), "a key with a lone surrogate is not Unicode text; JSON cannot hold it")
    return text


def _number(number: int, steps: _Steps) -> int | float:
    if _INT_MIN <= number <= _INT_MAX:
        return number
    try:
        return float(number)
    except OverflowError:
        problem = "an integer this large overflows a 64-bit float; store it as a string"
        raise _refusal(steps, problem) from None


def _deeper(level: int, steps: _Steps) -> int:
    if level == MAX_LEVELS:
        raise _refusal(steps, f"more than {MAX_LEVELS} nested levels, or a value that contains itself; flatten it")
    return level + 1


def _elements(value: list[Any] | tuple[Any, ...]) -> Any:
    """Iterate what a list or tuple really holds, as msgspec does: a subclass may override `__iter__`."""
    return list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_ADVICE: Final = {
    "datetime.datetime": "store value.isoformat()",
    "datetime.date": "store value.isoformat()",
    "datetime.time": "store value.isoformat()",
    "datetime.timedelta": "store value.total_seconds()",
    "decimal.Decimal": "store str(value), or float(value) if rounding is acceptable",
    "fractions.Fraction": "store str(value), or float(value) if rounding is acceptable",
    "uuid.UUID": "store str(value)",
    "builtins.bytes": "store base64.b64encode(value).decode()",
    "builtins.bytearray": "store base64.b64encode(value).decode()",
    "builtins.set": "store sorted(value)",
    "builtins.frozenset": "store sorted(value)",
    "msgspec.Raw": "store msgspec.json.decode(value)",
    "msgspec.Struct": "store msgspec.to_builtins(value)",
    "numpy.generic": "store value.tolist()",
    "numpy.ndarray": "store value.tolist()",
    "enum.Enum": "store value.value",
}
"""By name, so that naming a type does not import its module."""


def _advice(value: object) -> str:
    """Say what `value` is and what to store instead: a type changed in silence would come back as another one."""
    kind = type(value)
    if isinstance(value, Mapping):  # before its bases: an event of ours is a struct too, with other fields
        return f"{kind.__name__} is not JSON; store dict(value)"
    for base in kind.__mro__:
        advice = _ADVICE.get(f"{base.__module__}.{base.__qualname__}")
        if advice is not None:
            break
    else:
        if dataclasses.is_dataclass(kind):
            advice = "store msgspec.to_builtins(value)"
        elif isinstance(value, Iterable):
            advice = "store list(value)"
        else:
            advice = "store what describes it: dict, list, str, int, float, bool or None"
    return f"{kind.__name__} is not JSON; {advice}"


def _refusal(steps: _Steps, problem: str) -> InvalidValue:
    names: list[str] = []
    while len(steps) == 2:
        steps, step = steps
        if isinstance(step, int):
            names.append(f"[{step}]")
        elif re.fullmatch(r"[^\W\d]\w*", step):
            names.append(f".{step}")
        else:
            names.append(f"[{json.dumps(step)}]")
    return InvalidValue("".join([steps[0], *reversed(names)]), problem)


def _named(key: Any) -> str:
    """Name a key without asking an object of unknown size or manners for its repr."""
    kind = type(key)
    if key is None or kind is bool or kind is float or (kind is int and _INT_MIN <= key <= _INT_MAX):
        return f"{key} ({kind.__name__})"
    return f"a key of type {kind.__name__}"
