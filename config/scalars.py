"""What one scalar means: `${VAR:default}` expansion, type, and whether it fits a field. Reads only the environment.

Expansion happens after parsing, one scalar at a time, so a variable may change the type of a scalar but never the
structure of the file (docs/reference/semantics.md 5 and 8.39: iii-state expands the raw text).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import msgspec.inspect
import yaml
from yaml.resolver import Resolver

Kind = Literal["string", "integer", "float", "boolean", "null", "ambiguous", "other"]
Style = Literal["plain", "quoted", "native"]

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INTEGER = re.compile(r"[-+]?[0-9]+\Z")
_BASED_INTEGER = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
_OCTAL_OR_NOT = re.compile(r"[-+]?0[0-9]+\Z")
# No option needs more digits; Python refuses to convert more than 4300.
_MAX_DIGITS = 40

_YAML_1_1 = Resolver()
_YAML_1_1_KINDS: dict[str, Kind] = {
    "tag:yaml.org,2002:str": "string",
    "tag:yaml.org,2002:int": "integer",
    "tag:yaml.org,2002:float": "float",
    "tag:yaml.org,2002:bool": "boolean",
    "tag:yaml.org,2002:null": "null",
}
_YAML_1_1_WORDS = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:timestamp": "a date",
    "tag:yaml.org,2002:merge": "a merge key",
    "tag:yaml.org,2002:value": "a default key",
}


@dataclass(slots=True, frozen=True)
class Value:
    """A scalar with its type. `text` is its source; `found` names it in an error."""

    kind: Kind
    value: object
    text: str
    found: str


class VariableError(Exception):
    """`${NAME}` without a default, and NAME is not set (or cannot be read as UTF-8)."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem


def expand(text: str) -> str:
    """Replace each `${NAME}` and `${NAME:default}` in `text`, once. A variable set to "" counts as set.

    An unclosed `${`, `${}` and a bare `$NAME` are left as they are.

    Raises:
        VariableError: a variable is not set and has no default, or its value is not UTF-8.
    """
    return replace_placeholders(text, _lookup)


def replace_placeholders(text: str, replacement: Callable[[str, str | None], str]) -> str:
    """Replace each `${NAME}` and `${NAME:default}` by `replacement(name, default)`, from left to right, once.

    NAME is one or more characters except `}` and `:`, not trimmed; the default is everything up to the next `}`, or
    None. Refused: a regular expression, whose time is quadratic in the number of unclosed `${`.
    """
    parts: list[str] = []
    done, end = 0, -1
    start = text.find("${")
    while start != -1:
        if end < start + 2:
            end = text.find("}", start + 2)
        if end == -1:
            break
        if text[start + 2] in "}:":
            start = text.find("${", start + 2)
            continue
        name, colon, default = text[start + 2 : end].partition(":")
        parts += text[done:start], replacement(name, default if colon else None)
        done = end + 1
        start = text.find("${", done)
    return "".join([*parts, text[done:]])


def _lookup(name: str, default: str | None) -> str:
    value = os.environ.get(name) if "\0" not in name and is_utf8(name) else None
    if value is None:
        if default is None:
            raise VariableError(
                name, f"environment variable {name!r} is not set; set it, or write `${{{name}:default}}`"
            )
        return default
    if not is_utf8(value):
        # Refused: to take the default as if nothing were set, as iii-state does; a mistake would go unnoticed.
        raise VariableError(name, f"environment variable {name!r} is not valid UTF-8")
    return value


def is_utf8(text: str) -> bool:
    """Tell whether `text` can be written as UTF-8, that is, holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def resolve_text(text: str, style: Style) -> Value:
    """Type a scalar after expansion: a quoted one is a string; a plain one follows the YAML 1.2 core schema.

    If YAML 1.1 reads a plain scalar differently (`on`, `1:30`, `010`, `2026-01-31`), the kind is "ambiguous": no field
    accepts it, because people and tools read it differently.
    """
    if style == "quoted":
        return Value("string", text, text, f"the string {shorten(text)}")
    text = text.strip()
    tag = _yaml_1_1_tag(text)
    kind, value = _core_value(text)
    if _YAML_1_1_KINDS.get(tag) != kind or (kind == "integer" and _OCTAL_OR_NOT.match(text)):
        reading = "an octal number" if _OCTAL_OR_NOT.match(text) else _YAML_1_1_WORDS[tag]
        return Value("ambiguous", text, text, f"`{shorten(text, quote=False)}`, which YAML 1.1 reads as {reading}")
    found = {
        "null": "null",
        "string": f"the string {shorten(text)}",
        "boolean": f"the boolean {text.lower()}",
    }.get(kind, f"the {'integer' if kind == 'integer' else 'number'} {shorten(text, quote=False)}")
    return Value(kind, value, text, found)


def resolve_native(value: object) -> Value:
    """Type a Python value of `from_mapping`. Strings stay strings; nothing is expanded."""
    if value is None:
        return Value("null", None, "null", "null")
    if isinstance(value, bool):
        return Value("boolean", value, str(value), f"the boolean {str(value).lower()}")
    if isinstance(value, int):
        return Value("integer", value, "a number", f"the integer {shorten(_digits(value), quote=False)}")
    if isinstance(value, float):
        return Value("float", value, repr(value), f"the number {value!r}")
    if isinstance(value, str):
        return Value("string", value, value, f"the string {shorten(value)}")
    return Value("other", value, "", f"a Python {type(value).__name__}")


def shorten(text: str, *, quote: bool = True) -> str:
    """Cut `text` for an error message; with `quote` as a Python literal, so that blanks and controls show.

    The part before the `@` of an address may hold a password, and is masked.
    """
    start, end = text.find("://"), text.rfind("@")
    if -1 < start < end:
        text = f"{text[: start + 3]}***{text[end:]}"
    cut = text if len(text) <= 60 else text[:57] + "..."
    return repr(cut) if quote else cut


def _digits(value: int) -> str:
    return str(value) if value.bit_length() < 200 else f"of {value.bit_length()} bits"


def _core_value(text: str) -> tuple[Kind, object]:
    if _NULL.match(text):
        return "null", None
    if _BOOLEAN.match(text):
        return "boolean", text.lower() == "true"
    if _INTEGER.match(text):
        # A longer number is cut: it stays far outside of every bound.
        return "integer", int(text[:_MAX_DIGITS])
    if _BASED_INTEGER.match(text):
        return "integer", int(text[:_MAX_DIGITS], 0)
    if _FLOAT.match(text):
        return "float", text
    return "string", text


def _yaml_1_1_tag(text: str) -> str:
    tag = _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call] # stubs
    return str(tag)


# ---------------------------------------------------------------------------------------------------- fields


def misfit(wanted: object, value: Value) -> str | None:
    """Return what is wrong with `value` for a field of type `wanted`, or None if it fits.

    Types are strict: `true` is not 1, `5.0` is not 5, `"100"` is not 100 (docs/reference/semantics.md 8.25).
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


def content(value: Value) -> object:
    """Return the Python value of a scalar that fits. The text of a fractional number is converted here."""
    if value.kind != "float":
        return value.value
    return float(value.text.lower().replace(".inf", "inf").replace(".nan", "nan"))


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
        case msgspec.inspect.FloatType():
            return value.kind in ("integer", "float")
        case msgspec.inspect.LiteralType(values=values):
            return value.kind == "string" and value.value in values
        case msgspec.inspect.StrType():
            return value.kind == "string"
        case msgspec.inspect.BoolType():
            return value.kind == "boolean"
        case _:  # NoneType: no field of the schema has another type, as the tests of each field show
            return value.kind == "null"


def _words(info: msgspec.inspect.Type) -> str:
    match info:
        case msgspec.inspect.UnionType(types=types):
            return ", or ".join(map(_words, types)) if _choices(info) else " or ".join(map(_words, types))
        case msgspec.inspect.IntType(ge=low, le=high):
            return "a whole number" if low is None else f"a whole number from {low} to {high}"
        case msgspec.inspect.FloatType():
            return "a number"
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
    if isinstance(info, msgspec.inspect.UnionType):
        return [choice for one in info.types for choice in _choices(one)]
    return [str(one) for one in info.values] if isinstance(info, msgspec.inspect.LiteralType) else []


def _takes_strings(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_takes_strings(one) for one in info.types)
    return isinstance(info, msgspec.inspect.StrType)
