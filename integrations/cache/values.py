"""How a cache stores values that JSON cannot express, and keys that are not text.

A plain JSON value is stored as it is, so that other programs, the console and the command line see it. Any other value,
and one with a tag, is stored as an object with the field "~". Nothing is pickled, and reading runs no code of a value.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import decimal
import enum
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import msgspec

from scopestate.errors import DeserializationError, InvalidValue
from scopestate.ops.values import MAX_LEVELS, class_name

MARK: Final = "~"
"""The field that marks a stored object as not plain JSON, and the first character of a key that is not plain text."""
ABSENT: Final = object()
"""Stands for the value of a key that does not exist."""
PLAIN: Final = "plain"
TYPED: Final = "typed"

_INT_MIN: Final = -(2**63)
_INT_MAX: Final = 2**64 - 1

_to_json: Final = msgspec.json.Encoder(order="sorted").encode
_from_json: Final = msgspec.json.Decoder().decode


# -------------------------------------------------------------------------------------------------------------- values


def pack(value: Any, tag: str | None = None, took_s: float | None = None) -> Any:
    """Return the JSON data to store for a value, with the name of its tag and the seconds that computing it took.

    Raises InvalidValue, with the path, for a type that `_WRITERS` does not have: nothing is stored that would be read
    back as a different value.
    """
    form = PLAIN
    if not is_plain(value):
        form, value = TYPED, _typed(value, "$", MAX_LEVELS)
    elif tag is None and took_s is None and not (type(value) is dict and MARK in value):
        return value
    stored: dict[str, Any] = {MARK: form}
    if tag is not None:
        stored["tag"] = tag
    if took_s is not None:
        stored["took"] = took_s
    stored["v"] = value
    return stored


def unpack(stored: dict[str, Any]) -> Any:
    """Return the value of a stored object that has the field "~"."""
    form = stored.get(MARK)
    if "v" in stored:
        if form == PLAIN:
            return stored["v"]
        if form == TYPED:
            return _untyped(stored["v"])
    return stored  # it was not written by a cache


def value_of(stored: Any) -> Any:
    """Return the value for which `pack` returned `stored`."""
    return unpack(stored) if type(stored) is dict and MARK in stored else stored


def tag_of(stored: Any) -> str | None:
    """Return the name of the tag of a stored value, or None."""
    tag = stored.get("tag") if type(stored) is dict and stored.get(MARK) in (PLAIN, TYPED) else None
    return tag if type(tag) is str else None


def took_of(stored: Any) -> float | None:
    """Return how long computing a stored value took, in seconds; None if that is not known."""
    took = stored.get("took") if type(stored) is dict and stored.get(MARK) in (PLAIN, TYPED) else None
    return took if type(took) in (int, float) else None


def is_plain(value: Any, levels: int = MAX_LEVELS) -> bool:
    """Return whether JSON can hold a value so that it is read back with the same types."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return bool(_INT_MIN <= value <= _INT_MAX)
    if kind is float:
        return bool(value - value == 0.0)  # NaN and the infinities give NaN
    if kind is dict:
        if levels == 0:
            return False
        for key, item in value.items():
            if type(key) is not str:
                return False
            kind = type(item)
            if kind is not str and kind is not bool and not is_plain(item, levels - 1):
                return False
        return True
    if kind is list and levels:
        return all(type(item) is str or is_plain(item, levels - 1) for item in value)
    return False


def _typed(value: Any, path: str, levels: int) -> Any:
    """Return a value as JSON data; parts that JSON cannot express become objects with the field "~"."""
    kind = type(value)
    if levels < 0:
        raise InvalidValue(path, f"more than {MAX_LEVELS} levels of nesting")
    if kind is dict:
        if all(type(key) is str for key in value) and MARK not in value:
            return {key: _typed(item, f"{path}.{key}", levels - 1) for key, item in value.items()}
        pairs = [
            [_typed(key, f"{path}.keys()", levels - 2), _typed(item, f"{path}[{key!r:.40}]", levels - 2)]
            for key, item in value.items()
        ]
        return {MARK: "dict", "v": pairs}
    if kind in (list, tuple, set, frozenset):
        items = [_typed(item, f"{path}[{index}]", levels - 1) for index, item in enumerate(value)]
        if kind is list:
            return items
        # Sorted, as a set has no order: equal sets have the same text.
        return {MARK: kind.__name__, "v": items if kind is tuple else sorted(items, key=_to_json)}
    if is_plain(value):
        return value
    writer = _WRITERS.get(kind)
    if writer is None:
        raise InvalidValue(path, _refusal(value))
    return {MARK: _NAMES.get(kind, kind.__name__), "v": writer(value)}


def hold(kind: type, name: str, write: Callable[[Any], Any], read: Callable[[Any], Any]) -> None:
    """Let the caches of this process hold values of one more type, without its subclasses.

    `name` stands for the type in stored data. `write` turns a value into JSON data, and `read` turns that into a value.
    `read` gets whatever any process with access to the cache has stored, so it must not run code that the data names.
    """
    _WRITERS[kind], _NAMES[kind], _READERS[name] = write, name, read


def _refusal(value: Any) -> str:
    for base in (*_WRITERS, dict, list, tuple, set, frozenset, str):
        if isinstance(value, base):
            return f"a {class_name(value)} would be read back as a {base.__name__}: store {base.__name__}(value)"
    return (
        f"a cache does not hold a {class_name(value)}: it holds JSON, bytes, tuples, sets, dates and numbers, and "
        "pickles nothing. Store its parts, such as a dict of its fields"
    )


_WRITERS: Final[dict[type, Callable[[Any], Any]]] = {
    bytes: lambda value: base64.b64encode(value).decode("ascii"),
    int: hex,
    float: repr,
    dt.datetime: lambda value: [value.isoformat()] if value.fold else value.isoformat(),
    dt.date: dt.date.isoformat,
    dt.time: lambda value: [value.isoformat()] if value.fold else value.isoformat(),
    dt.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    decimal.Decimal: str,
    uuid.UUID: str,
}
"""Type -> function that turns a value into JSON data; containers are handled separately."""

_NAMES: Final[dict[type, str]] = {}
"""Type -> its name in stored data, if that is not the class name."""

_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "bytes": base64.b64decode,
    "int": lambda text: int(text, 16),
    "float": float,
    "datetime": lambda text: _time(dt.datetime, text),
    "date": dt.date.fromisoformat,
    "time": lambda text: _time(dt.time, text),
    "timedelta": lambda parts: dt.timedelta(*parts),
    "Decimal": decimal.Decimal,
    "UUID": uuid.UUID,
    "tuple": lambda items: tuple(map(_untyped, items)),
    "set": lambda items: set(map(_untyped, items)),
    "frozenset": lambda items: frozenset(map(_untyped, items)),
    "dict": lambda pairs: {_untyped(key): _untyped(item) for key, item in pairs},
}


def _time(kind: Any, text: Any) -> Any:
    """Return a time from its text; a list with the text means `fold=1`, the second of two equal local times."""
    return kind.fromisoformat(text[0]).replace(fold=1) if type(text) is list else kind.fromisoformat(text)


def _untyped(value: Any) -> Any:
    """Undo `_typed`. Raises DeserializationError for data that it does not make."""
    if type(value) is list:
        return [_untyped(item) for item in value]
    if type(value) is not dict:
        return value
    if MARK not in value:
        return {key: _untyped(item) for key, item in value.items()}
    try:
        return _READERS[value[MARK]](value["v"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise DeserializationError(
            f"this is not a value of a cache: {value!r:.80}; was it written by a newer version, or by hand?"
        ) from error


# ------------------------------------------------------------------------------------------------------------- entries


def with_facts(found: tuple[Any, int | None] | None, default: Any, *, expire_time: bool, tag: bool) -> Any:
    """Return the result of `get`. `found` has the stored value and its deadline in milliseconds; None: no such key."""
    value, expires_s, group = default, None, None
    if found is not None:
        stored, expires_ms = found
        value = value_of(stored)
        expires_s = None if expires_ms is None else expires_ms / 1000
        name = tag_of(stored)
        group = None if name is None else key_of(name)
    facts = [value, *([expires_s] if expire_time else []), *([group] if tag else [])]
    return tuple(facts) if expire_time or tag else value


def deadline(expire: float | dt.timedelta | None) -> dict[str, Any]:
    """Return `expire` as an engine takes it: `ttl`, or `expires_at` for a time in the past; {} for None."""
    if expire is None:
        return {}
    seconds = expire.total_seconds() if isinstance(expire, dt.timedelta) else expire
    return {"ttl": expire} if seconds > 0 else {"expires_at": _EPOCH}


def milliseconds_of(options: dict[str, Any]) -> int | None:
    """Return the deadline in milliseconds since the epoch; None if there is none."""
    if "expires_at" in options:
        return 0
    ttl = options.get("ttl")
    if ttl is None:
        return None
    return int((time.time() + (ttl.total_seconds() if isinstance(ttl, dt.timedelta) else ttl)) * 1000)


_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def added(key: Any, stored: Any, delta: float, default: float | None) -> Any:
    """Return the data to store for the sum of a number and `delta`; `stored` is ABSENT if the key does not exist.

    Raises KeyError if it does not exist and there is no default, and TypeError for a value that is not a number.
    """
    if stored is ABSENT:
        if default is None:
            raise KeyError(key)
        return pack(default + delta)
    value = value_of(stored)
    if isinstance(value, bool) or not isinstance(value, (int, float, decimal.Decimal)):
        raise TypeError(f"the value of {key!r:.80} is not a number but a {class_name(value)}: nothing was added to it")
    return pack(value + delta, tag_of(stored))  # type: ignore[operator]  # a Decimal takes whole numbers


# ---------------------------------------------------------------------------------------------------------------- keys


def name_of(key: Any) -> str:
    """Return the key in the scope for a key of the cache. Different keys have different names.

    Keys are text, bytes, numbers, bools, None and tuples of these. As in a dict, 1 and 1.0 are the same key; True is a
    different one. Raises DeserializationError for other keys.
    """
    if isinstance(key, str):
        key = str.__str__(key)
        return f"{MARK}s{key}" if key.startswith(MARK) else key
    if key is None or isinstance(key, bool):
        return f"{MARK}{key}"
    if isinstance(key, int):
        return f"{MARK}i{int(key):x}" if abs(key) >= _LONG else f"{MARK}{int(key)}"
    if isinstance(key, float):
        return f"{MARK}{int(key)}" if key.is_integer() and abs(key) < _LONG else f"{MARK}f{float(key)!r}"
    if isinstance(key, bytes):
        return f"{MARK}b{base64.b64encode(key).decode('ascii')}"
    if type(key) is tuple:
        return f"{MARK}{_to_json([name_of(part) for part in key]).decode()}"
    raise DeserializationError(
        f"a key of a cache is text, bytes, a number, a bool, None or a tuple of these, not a {class_name(key)}"
    )


_LONG: Final = 2**63
"""Numbers from here on are written in base 16, as Python refuses to write very long ones in base 10."""


def key_of(name: str) -> Any:
    """Return the key of the cache for a key in its scope. A name that no cache makes is its own key."""
    if not name.startswith(MARK):
        return name
    kind, rest = name[1:2], name[2:]
    try:
        if kind == "s":
            return rest
        if kind == "i":
            return int(rest, 16)
        if kind == "f":
            return float(rest)
        if kind == "b":
            return base64.b64decode(rest, validate=True)
        if kind == "[":
            return tuple(map(key_of, _from_json(name[1:])))
        return _CONSTANTS[name] if name in _CONSTANTS else int(name[1:])
    except (ValueError, TypeError, binascii.Error, msgspec.DecodeError):
        return name


_CONSTANTS: Final = {f"{MARK}None": None, f"{MARK}True": True, f"{MARK}False": False}


# ------------------------------------------------------------------------------------------------- keys of memoization


def call_name(base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the key in the scope for a call of a function, which `base` identifies.

    An argument may be any value that a cache can hold, or a member of an Enum. Arguments of different types are
    different, also 3 and 3.0. The order of named arguments does not matter. Raises InvalidValue, which names the
    argument.
    """
    try:
        if not kwargs:
            for arg in args:
                kind = type(arg)
                if kind is not str and not (kind is int and _INT_MIN <= arg <= _INT_MAX):
                    break
            else:
                return base + _to_json(args).decode()
        parts = [_argument(arg, f"argument {index}") for index, arg in enumerate(args)]
        if not kwargs:
            return base + _to_json(parts).decode()
        named = {name: _argument(arg, name) for name, arg in kwargs.items()}
        return base + _to_json(parts).decode() + _to_json(named).decode()
    except UnicodeEncodeError as error:
        raise InvalidValue(
            "arguments", f"text with half of a surrogate pair, which is not a character: {error}"
        ) from error


def _argument(arg: Any, path: str) -> Any:
    if isinstance(arg, enum.Enum):
        kind = type(arg)
        return {MARK: "Enum", "v": f"{kind.__module__}.{kind.__qualname__}.{arg.name}"}
    return _typed(arg, path, MAX_LEVELS)
