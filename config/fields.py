"""What a field's type takes, in words: `expected a whole number from 1 to 86400000, found the string '5s'`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

import msgspec
import msgspec.inspect

from scopestate.config.scalars import Value, shorten


def misfit(wanted: object, value: Value) -> str | None:
    """Return what is wrong with `value` for a field of type `wanted`, or None if it fits.

    Types are strict: `true` is not 1, `5.0` is not 5, `"100"` is not 100 (docs/semantics.md 8.25).
    """
    info = msgspec.inspect.type_info(wanted)
    if _fits(info, value):
        return None
    hint = ""
    if value.kind == "string":
        hint = did_you_mean(str(value.value), _choices(info))
    elif _takes_strings(info) and value.kind in ("integer", "float", "boolean", "ambiguous") and value.text:
        hint = f"; quote it: {json.dumps(shorten(value.text, quote=False), ensure_ascii=False)}"
    return f"expected {_words(info)}, found {value.found}{hint}"


def misfit_shape(wanted: object, shape: str) -> str:
    """Return the message for a list or mapping where a scalar of type `wanted` must stand."""
    return f"expected {_words(msgspec.inspect.type_info(wanted))}, found {shape}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that `word` is most likely a misspelling of."""
    lowered = {name.lower(): name for name in known}
    # Cut: the comparison is quadratic, and no known word is nearly as long.
    close = difflib.get_close_matches(word[:80].lower().replace("-", "_"), lowered, n=1, cutoff=cutoff)
    return lowered[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean ...?` or nothing."""
    close = nearest(word, known)
    return f", did you mean `{close}`?" if close else ""


def _fits(info: msgspec.inspect.Type, value: Value) -> bool:
    match info:
        case msgspec.inspect.UnionType(types=types):
            return any(_fits(one, value) for one in types)
        case msgspec.inspect.IntType(ge=low, le=high):
            number = value.value
            if value.kind != "integer" or not isinstance(number, int):
                return False
            return (low is None or number >= low) and (high is None or number <= high)
        case msgspec.inspect.LiteralType(values=values):
            return value.kind == "string" and value.value in values
        case msgspec.inspect.StrType():
            return value.kind == "string"
        case msgspec.inspect.BoolType():
            return value.kind == "boolean"
        case _:  # NoneType; the fields of the schema have no other type, which the tests of each of them show
            return value.kind == "null"


def _words(info: msgspec.inspect.Type) -> str:
    match info:
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_words(one) for one in types)
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case msgspec.inspect.LiteralType(values=values):
            *front, last = (f"`{one}`" for one in values)
            return f"{', '.join(front)} or {last}"
        case msgspec.inspect.NoneType():
            return "null"
        case msgspec.inspect.BoolType():
            return "true or false"
        case _:
            return "a string"


def _choices(info: msgspec.inspect.Type) -> list[str]:
    return [str(one) for one in info.values] if isinstance(info, msgspec.inspect.LiteralType) else []


def _takes_strings(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_takes_strings(one) for one in info.types)
    return isinstance(info, msgspec.inspect.StrType)
