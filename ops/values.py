"""Values as JSON bytes: encoded once at the boundary, and immutable from then on.

Four functions: `encode` and `decode` between Python values and bytes, `parse` for JSON text from outside, `normalise`
for plain JSON data without encoding it. docs/reference/semantics.md 1 says what they accept: text without lone
surrogates, string keys, finite numbers, at most 128 levels. Integers from -2^63 to 2^64-1 are exact, larger ones become
floats.
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
from scopestate.ops.checked_copy import (
    INT_MAX,
    INT_MIN,
    MANY,
    Shared,
    copy_array,
    copy_object,
    encode_copy,
)

MAX_LEVELS: Final = 128
"""Deepest nesting of arrays and objects; a scalar is 0 levels, `[]` is 1."""

_READINGS: Final = 100
"""How often a value that other threads change is read again, until it did not change during a reading."""

_to_json = msgspec.json.Encoder().encode

decode = msgspec.json.Decoder().decode
"""decode(data: bytes) -> Any: a fresh Python value from bytes that `encode` or `parse` returned."""


# `encode` checks each part of a value first, because msgspec alone would write NaN as null, the key 1 as "1" and a
# datetime as text. It checks and encodes a copy, because another thread may change the original between the two steps.
# Copying one dict or list is a single step for other threads.
# Refused: comparing `decode(data) == value` afterwards. It is quicker only for small nested values, trusts the `__eq__`
# of any object (an Enum may equal its text) and does not see integers beyond 64 bits.
def encode(value: Any) -> bytes:
    """Return `value` as compact JSON.

    Accepts dict, list, tuple, str, int, float, bool, None and their subclasses. Raises InvalidValue, which names the
    place, if JSON cannot hold the value or if other threads keep changing it.
    """
    try:
        kind = type(value)
        if kind is dict:
            # The loop of `copy_object` again: most values are objects with a few fields, for which a call is expensive.
            copy = value.copy()
            shared: Shared | None = None  # a list if there are containers inside
            for key, item in copy.items():
                if type(key) is not str:
                    break
                kind = type(item)
                if kind is str or kind is bool or item is None:
                    continue
                if kind is int:  # the short range is quicker to test, and nearly always enough
                    if -0x3FFFFFFF < item < 0x3FFFFFFF or INT_MIN <= item <= INT_MAX:
                        continue
                elif kind is float:
                    if -1e308 < item < 1e308 or item - item == 0.0:  # NaN and the infinities give NaN
                        continue
                elif kind is list or kind is dict:
                    if kind is list:
                        # A list of strings, such as tags: avoiding a call here saves a tenth of the time.
                        texts = item.copy()
                        for text in texts:
                            if type(text) is not str:
                                break
                        else:
                            copy[key] = texts
                            shared = shared or _NOTHING
                            continue
                    if not shared:
                        if len(copy) >= MANY:
                            return _encode_container(value)
                        shared = []
                    inner = copy_array(item, _INSIDE, shared) if kind is list else copy_object(item, _INSIDE, shared)
                    if inner is not None:
                        copy[key] = inner
                        continue
                break
            else:
                if shared is None or (not shared and value == copy):
                    return _to_json(copy)
                if shared and (data := encode_copy(value, copy, MAX_LEVELS, shared)) is not None:
                    return data
        elif kind is list:
            return _encode_container(value)
        elif kind is str or kind is bool or value is None:  # noqa: SIM114 - one condition would take eight lines
            return _to_json(value)
        elif (kind is int and INT_MIN <= value <= INT_MAX) or (kind is float and value - value == 0.0):
            return _to_json(value)
    except InvalidValue:
        raise
    except Exception:  # noqa: BLE001, S110 - too deep, changed by another thread, or raised by code of a class of the caller
        pass  # `normalise` runs no such code, and finds the place
    return _to_json(normalise(value))


_NOTHING: Final[Shared] = []
_INSIDE: Final = MAX_LEVELS - 1


def _encode_container(value: Any) -> bytes:
    """Return an array or object of any length as JSON. Raises the errors of `encode`, or RuntimeError."""
    shared: Shared = []
    copy: Any = (copy_array if type(value) is list else copy_object)(value, MAX_LEVELS, shared)
    if copy is not None:
        if not shared:
            # The parts were copied one after another. If the original equals the copy now, the copy is consistent.
            if value == copy:
                return _to_json(copy)
        elif (data := encode_copy(value, copy, MAX_LEVELS, shared)) is not None:
            return data
    return _to_json(normalise(value))


def encode_plain(value: Any) -> bytes:
    """Encode plain JSON data, as `decode`, `normalise` and `apply` return it, as compact JSON.

    Checks only the number of levels, because ops can put values inside other values.
    Raises InvalidValue for more than 128.
    """
    data = _to_json(value)
    # More than 128 levels take more than 256 brackets.
    if len(data) > 2 * MAX_LEVELS and data.count(b"{") + data.count(b"[") > MAX_LEVELS:
        normalise(value)
    return data


def normalise(value: object, path: str = "$") -> Any:
    """Return `value` as plain JSON data that shares no list or dict with it. This is the complete, slow check.

    Instances of subclasses become instances of the base class, tuples become lists, integers beyond 64 bits become
    floats. Raises InvalidValue, in which `path` is the name of `value`.
    """
    for _ in range(_READINGS):
        read: _Read = []
        plain = _plain(value, (path,), 0, read)
        # A container is read in one step. Several are consistent if none has changed since it was read.
        if len(read) <= 1 or _is_unchanged(read):
            return plain
    raise _refusal((path,), "another thread changed the value each time that it was read; store a copy of it")


def json_type(value: object) -> str:
    """Return the JSON name of a value's type: `null boolean number string array object`; otherwise Python's name."""
    kind = type(value)
    if value is None:
        return "null"
    for name, kinds in _JSON_TYPES:
        if issubclass(kind, kinds):
            return name
    return class_name(value)


def prepare(*kinds: Any) -> None:
    """Make msgspec inspect the fields of these classes now, while a module is imported.

    Otherwise it does so when it first reads an instance. If several threads do that at once, the process may crash with
    SIGSEGV.
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


def class_name(thing: object) -> str:
    """Return the name of a thing's class without running code of its metaclass."""
    name: str = vars(type)["__name__"].__get__(type(thing))
    return name


def json_words(problem: object) -> str:
    """Return a message of msgspec with JSON's names of types instead of Python's."""
    return _MISFIT.sub(lambda found: _PYTHON_NAME.sub(lambda name: _JSON_NAMES[name[0]], found[0]), str(problem))


_JSON_NAMES: Final = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_MISFIT: Final = re.compile(r"Expected `[^`]*`, got `[^`]*`")
_PYTHON_NAME: Final = re.compile(r"\b(?:str|int|float|bool)\b")

_JSON_TYPES: Final[tuple[tuple[str, tuple[type, ...]], ...]] = (
    ("boolean", (bool,)),
    ("number", (int, float)),
    ("string", (str,)),
    ("array", (list, tuple)),
    ("object", (Mapping,)),
)


def _as_is(value: Any) -> bytes | None:
    """Return what msgspec alone writes for a decoded value.

    If that equals the text the value was decoded from, `encode` would write the same, unless `_may_change` is true.
    """
    try:
        return _to_json(value)
    except (ArithmeticError, ValueError, RecursionError):
        return None


def _may_change(text: bytes) -> bool:
    """True if the text may have a number with more than 64 bits, or too many levels."""
    return text.count(b"[") + text.count(b"{") > MAX_LEVELS or _NINETEEN_DIGITS.search(text) is not None


def parse(text: bytes | str) -> bytes:
    """Return JSON text from a file, the wire or Redis in the form that `encode` writes.

    Integers beyond 64 bits and `-0` are floats, and of duplicate keys the last one counts (docs/reference/semantics.md
    1). Raises DeserializationError for text that is not JSON, numbers beyond binary64, lone surrogates, and more than
    128 levels.
    """
    try:
        value = decode(text)
        if isinstance(text, bytes) and text == _as_is(value) and not _may_change(text):
            return text
        if _MINUS_ZERO.search(text if isinstance(text, bytes) else text.encode()):
            # msgspec reads `-0` as the integer 0 and has no hook for integers; the standard library has one. The text
            # is known to be JSON, so other differences between the two do not matter.
            value = json.loads(text, parse_int=_integer)
        return encode(value)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DeserializationError(_why_not(text, error)) from error
    except RecursionError as error:
        raise DeserializationError(f"more than {MAX_LEVELS} nested levels") from error


def _why_not(text: bytes | str, problem: Exception) -> str:
    """Say why text cannot be read: where it is not Unicode, which msgspec does not say since version 0.23."""
    try:
        _ = text.decode() if isinstance(text, bytes) else text.encode()
    except UnicodeError as error:
        return f"not Unicode text: {error}"
    return str(problem)


def check(text: bytes) -> None:
    """Raise DeserializationError for text that `parse` refuses. Used for text that is passed on unchanged.

    Quicker than `parse`, because it searches the bytes while `parse` checks each part in Python.
    """
    try:
        decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DeserializationError(_why_not(text, error)) from error
    except RecursionError as error:
        raise DeserializationError(f"more than {MAX_LEVELS} nested levels") from error
    if len(text) > 2 * MAX_LEVELS and (
        text.count(b"[") + text.count(b"{") > MAX_LEVELS or _LONG_NUMBER in text.translate(_DIGITS)
    ):
        parse(text)


_DIGITS: Final = bytes(0x30 if chr(byte).isdigit() and byte < 0x80 else 0x20 for byte in range(256))
_LONG_NUMBER: Final = b"0" * 309
"""A number with this many digits may be beyond binary64."""

_NINETEEN_DIGITS: Final = re.compile(rb"[0-9]{19}")
"""Every integer beyond 64 bits contains this."""
_MINUS_ZERO: Final = re.compile(rb"-0(?![0-9.eE])")


def _integer(literal: str) -> int | float:
    return -0.0 if literal == "-0" else int(literal)


_Steps = tuple[Any, ...]
"""(root name,) at the root, (steps of the parent, key or index) below it. Cheap to extend; read only for an error."""


_Read = list[tuple[Any, list[Any]]]
"""Each dict and list that was read, with the content it had."""


def _is_unchanged(read: _Read) -> bool:
    try:
        return all(_content(container) == content for container, content in read)
    except Exception:  # noqa: BLE001 - from the `__eq__` of a new item: an unchanged one is the same object, which needs no `__eq__`
        return False


def _content(container: Any) -> list[Any]:
    """Copy the content of a dict or list as msgspec reads it: a subclass may override `items` and `__iter__`."""
    return [*(dict.items(container) if issubclass(type(container), dict) else list.__iter__(container))]


def _plain(value: object, steps: _Steps, level: int, read: _Read) -> Any:
    # By `type(value)`, not `isinstance`, which believes the `__class__` of proxies and mocks and runs their code.
    kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        text = str.__str__(value)
        if _has_lone_surrogate(text):
            raise _refusal(steps, "a string with a lone surrogate is not Unicode text; JSON cannot hold it")
        return text
    if issubclass(kind, int):
        return _number(int.__int__(value), steps)  # type: ignore[arg-type]  # as above
    if issubclass(kind, float):
        number = float.__float__(value)  # type: ignore[arg-type]  # as above
        if not math.isfinite(number):
            raise _refusal(steps, f"{number} is not a JSON number; store None or a string")
        return number
    if issubclass(kind, dict):
        level = _deeper(level, steps)
        content = _content(value)
        read.append((value, content))
        return {_key(key, steps): _plain(item, (steps, key), level, read) for key, item in content}
    if issubclass(kind, list):
        level = _deeper(level, steps)
        content = _content(value)
        read.append((value, content))
        return [_plain(item, (steps, index), level, read) for index, item in enumerate(content)]
    if issubclass(kind, tuple):
        level = _deeper(level, steps)
        elements = tuple.__iter__(value)  # type: ignore[arg-type,var-annotated]  # as above
        return [_plain(item, (steps, index), level, read) for index, item in enumerate(elements)]
    raise _refusal(steps, _advice(value))


def _key(key: object, steps: _Steps) -> str:
    if not issubclass(type(key), str):
        raise _refusal(steps, f"the keys of a JSON object are strings, found {_named(key)}; use str(key)")
    text = str.__str__(key)
    if _has_lone_surrogate(text):
        raise _refusal((steps, text), "a key with a lone surrogate is not Unicode text; JSON cannot hold it")
    return text


def _number(number: int, steps: _Steps) -> int | float:
    if INT_MIN <= number <= INT_MAX:
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
    "builtins.complex": "store [value.real, value.imag]",
    "uuid.UUID": "store str(value)",
    "pathlib.PurePath": "store str(value)",
    "ipaddress._IPAddressBase": "store str(value)",
    "zoneinfo.ZoneInfo": "store str(value)",
    "yarl.URL": "store str(value)",
    "pydantic._BaseUrl": "store str(value)",
    "pydantic_core.Url": "store str(value)",
    "collections.UserString": "store str(value)",
    "builtins.BaseException": "store str(value)",
    "re.Pattern": "store value.pattern",
    "builtins.bytes": "store base64.b64encode(value).decode()",
    "builtins.bytearray": "store base64.b64encode(value).decode()",
    "builtins.memoryview": "store base64.b64encode(value).decode()",
    "builtins.set": "store sorted(value)",
    "builtins.frozenset": "store sorted(value)",
    "builtins.coroutine": "await it, and store its result",
    "builtins.async_generator": "store [item async for item in value]",
    "scopestate.Plain": "store value.to_dict()",
    "scopestate.Missing": "MISSING stands for a key that does not exist: delete the key, or store None",
    "scopestate.Absence": "KEEP and DELETE are what the function of `modify` may return; to remove the key, delete it",
    "msgspec.Raw": "store msgspec.json.decode(value)",
    "msgspec.Struct": "store msgspec.to_builtins(value)",
    "numpy.generic": "store value.item()",
    "numpy.ndarray": "store value.tolist()",
    "pandas.NaTType": "store None",
    "pandas.NAType": "store None",
    "pandas.Series": "store value.tolist()",
    "pandas.Index": "store value.tolist()",
    "pandas.DataFrame": 'store value.to_dict("records")',
    "polars.Series": "store value.to_list()",
    "polars.DataFrame": "store value.to_dicts()",
    "torch.Tensor": "store value.tolist()",
    "sqlite3.Row": "store dict(value)",
    "sqlalchemy.Row": "store value._asdict()",
    "google.Message": "store google.protobuf.json_format.MessageToDict(value)",
    "enum.Enum": "store value.value",
}
"""By package and class name, so that no module is imported, and a class may move within its package."""


def _advice(value: object) -> str:
    """Say what `value` is and what to store instead. Not converted: it would be read back as another type."""
    kind = type(value)
    try:
        advice = _advice_for(kind)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - from a metaclass or a `__subclasshook__`
        advice = _DESCRIBE_IT
    return f"{class_name(value)} is not JSON; {advice}"


_DESCRIBE_IT: Final = "store what describes it: dict, list, str, int, float, bool or None"


def _advice_for(kind: type) -> str:
    if issubclass(kind, Mapping):  # before its bases: a StateEvent is a struct with other fields
        return "store dict(value)"
    for base in kind.__mro__:
        name = f"{base.__module__.partition('.')[0]}.{base.__qualname__}"
        if name in _ADVICE:
            return _ADVICE[name]
        if name == "pydantic.BaseModel":
            second = hasattr(kind, "model_dump")
            return 'store value.model_dump(mode="json")' if second else "store json.loads(value.json())"
    if dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__"):
        return "store msgspec.to_builtins(value)"
    if issubclass(kind, Iterable):
        return "store list(value)"
    return _DESCRIBE_IT


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
    """Describe a key without calling the repr of an unknown object."""
    kind = type(key)
    if key is None or kind is bool or kind is float or (kind is int and INT_MIN <= key <= INT_MAX):
        return f"{key} ({json_type(key)})"
    return f"a key of type {class_name(key)}"
