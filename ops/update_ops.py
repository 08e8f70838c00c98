"""The six update ops, and how they are read from JSON and from Python.

Ops are frozen structs with the tag `type`, the same in Python, on the wire and in files. Reading them checks only their
shape (docs/reference/semantics.md 3, "Op shape rules"); `apply` decides whether an op fits the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, cast

import msgspec

from scopestate.errors import DeserializationError, InvalidValue
from scopestate.ops import values
from scopestate.ops.plain import Plain
from scopestate.ops.values import json_type

MAX_OPS: Final = 10_000
"""The most ops of one update. They run in one turn, during which no other call on the scope is served."""
I64_MIN: Final = -(2**63)
I64_MAX: Final = 2**63 - 1

OPTIONAL: Final = {"required": False}
"""`Meta(extra=OPTIONAL)`: the schema does not list the field as required, although it has no default."""

# The schemas are made from the `Meta` notes and the first sentence of each docstring, which are the API reference's.
FieldPath = Annotated[str, msgspec.Meta(title="FieldPath", description="Represents a path to a field in a JSON object")]
"""One literal top-level field name; "" is the value itself. Dots do not split."""

MergePath = Annotated[
    str | list[str],
    msgspec.Meta(
        title="MergePath",
        description=(
            "Path target of a merge: one string, a literal first-level field, or an array of literal segments to walk. "
            'Absent, "" and [] are the root. Dots do not split.'
        ),
    ),
]
"""One literal field name, or a list of names to walk; "" and [] are the value itself."""

Int64 = Annotated[int, msgspec.Meta(extra_json_schema={"format": "int64"})]


class Set(msgspec.Struct, frozen=True, tag_field="type", tag="set"):
    """Set a value at path (overwrite).

    Replaces the value, or one field of it, by `value`.
    """

    path: FieldPath
    """One literal top-level field name; "" is the value itself. Dots do not split."""
    value: Any = None
    """Any JSON value; left out means null."""


class Merge(msgspec.Struct, frozen=True, tag_field="type", tag="merge"):
    """Merge object into existing value (object-only). Path may be omitted (root merge), a single first-level key, or
    an array of literal segments for nested merge. See [`MergePath`].

    Overwrites the top-level fields of an object with those of `value`. A `null` is stored; it does not delete.
    """

    value: Any
    """An object of at most 1024 fields and 16 levels; `apply` refuses anything else."""
    path: MergePath | None = None
    """Where: one literal field name, or a list of names to walk; None, "" and [] are the value itself."""


class Increment(msgspec.Struct, frozen=True, tag_field="type", tag="increment"):
    """Increment numeric value.

    Adds `by` to a number; an absent field counts as 0.
    """

    path: FieldPath
    """One literal top-level field name; "" is the value itself. Dots do not split."""
    by: Int64
    """A whole number within 64 bits; may be negative."""


class Decrement(msgspec.Struct, frozen=True, tag_field="type", tag="decrement"):
    """Decrement numeric value.

    Subtracts `by` from a number; an absent field counts as 0.
    """

    path: FieldPath
    """One literal top-level field name; "" is the value itself. Dots do not split."""
    by: Int64
    """A whole number within 64 bits; may be negative."""


class Append(msgspec.Struct, frozen=True, tag_field="type", tag="append"):
    """Append an element to an array or concatenate a string.

    An array gets `value` as one element. An absent field becomes `[value]`, or the text.
    """

    path: Annotated[MergePath | None, msgspec.Meta(extra=OPTIONAL)]
    """Where: one literal field name, or a list of names to walk; None, "" and [] are the value itself."""
    value: Any
    """Any JSON value. An array is added as one element."""


class Remove(msgspec.Struct, frozen=True, tag_field="type", tag="remove"):
    """Remove a field.

    An absent field is not an error. At the root, the value becomes null.
    """

    path: FieldPath
    """One literal top-level field name; "" is the value itself, which becomes null."""


UpdateOp = Annotated[
    Set | Merge | Increment | Decrement | Append | Remove,
    msgspec.Meta(title="UpdateOp", description="Operations that can be performed atomically on a stream value"),
]


AnyOp = Set | Merge | Increment | Decrement | Append | Remove | Mapping[str, Any]
"""An op as Python code gives it: a struct, or a dict with the same fields."""


class OpError(Plain, msgspec.Struct, frozen=True, omit_defaults=True):
    """Why one op was skipped. The ops after it still ran."""

    json_optional: ClassVar[tuple[str, ...]] = ("doc_url",)

    op_index: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            description="Index of the offending op within the original `ops` array.",
            extra_json_schema={"format": "uint"},
        ),
    ]
    """Place of the op in the update, from 0."""
    code: Annotated[str, msgspec.Meta(description='Stable error code, e.g. `"merge.path.too_deep"`.')]
    """`<op>.<reason>`, which is stable and what clients compare. docs/reference/semantics.md 3.4 has all codes."""
    message: Annotated[
        str, msgspec.Meta(description="Human-readable description with concrete numbers when applicable.")
    ]
    """Text for people: the place, what was found, and for a limit both numbers. The wording may change."""
    doc_url: Annotated[str | None, msgspec.Meta(description="Optional documentation URL for this error class.")] = None
    """A page about the code; left out of the JSON if it is None."""

    def to_dict(self) -> dict[str, Any]:
        """Return the error in the form that it has in the JSON of an `update`."""
        made: dict[str, Any] = msgspec.to_builtins(self)
        return made


class RefusedOp(OpError, frozen=True, omit_defaults=True):
    """Why a write that is all or nothing was refused."""

    index: int = 0
    """Place of the update in its transaction, from 0; 0 for an update outside of a transaction."""


_KINDS: Final = (Set, Merge, Increment, Decrement, Append, Remove)
_WORDS: Final = "`set`, `merge`, `increment`, `decrement`, `append`, `remove`"
_ABSENT: Final = object()


def convert_ops(payload: object) -> tuple[UpdateOp, ...]:
    """Read the `ops` of a `state::update` call from plain JSON data, as `values.decode` returns it.

    The ops share `value` with `payload`. Unknown fields are ignored. Raises DeserializationError, with the place
    (`$.ops[1].by`), for every shape that docs/reference/semantics.md 3 refuses.
    """
    if not isinstance(payload, list | tuple):
        raise _misfit(f"invalid type: {json_type(payload)}, expected an array of ops", "$.ops")
    if len(payload) > MAX_OPS:
        raise _too_many(str(len(payload)))
    return tuple([_convert(item, f"$.ops[{index}]", _as_is) for index, item in enumerate(payload)])


def checked(ops: Iterable[object]) -> tuple[UpdateOp, ...]:
    """Check ops from Python code: structs, dicts with the same fields, or both.

    The values of the result are plain JSON data (`values.encode`) and share nothing mutable with the caller's. Raises
    DeserializationError for a wrong field, InvalidValue for a value that JSON cannot hold; both name the place.
    """
    found: list[UpdateOp] = []
    try:
        items = iter(ops)
    except TypeError:
        raise _misfit(f"invalid type: {json_type(ops)}, expected a list of ops", "$.ops") from None
    for op in items:
        if len(found) == MAX_OPS:
            raise _too_many("more")
        kind = type(op)
        if kind is Increment or kind is Decrement:
            # The most frequent op: with exact types this is all that needs to be checked.
            path, by = op.path, op.by  # type: ignore[attr-defined]  # mypy does not narrow by `type(op) is`
            if type(path) is str and path.isascii() and type(by) is int and I64_MIN <= by <= I64_MAX:
                found.append(op)  # type: ignore[arg-type]  # as above
                continue
        item = op
        if kind in _KINDS:
            struct = cast(UpdateOp, op)
            item = {"type": kind.__struct_config__.tag, **msgspec.structs.asdict(struct)}
        found.append(_convert(item, f"$.ops[{len(found)}]", _as_json))
    return tuple(found)


def _convert(item: object, where: str, plain: Callable[[object, str], object]) -> UpdateOp:
    """Build the op that the object `item` describes; `plain` makes its value JSON data."""
    if not isinstance(item, dict):
        raise _misfit(f"invalid type: {json_type(item)}, expected an op: an object with a `type`", where)
    word = item.get("type", _ABSENT)
    if type(word) is not str and issubclass(type(word), str):
        word = str.__str__(cast(str, word))  # the plain string that a subclass holds
    match word:
        case "set":
            return Set(_path(item, where), plain(item.get("value"), f"{where}.value"))
        case "merge":
            value = plain(_required(item, "value", where), f"{where}.value")
            return Merge(value, _path_to_walk(item, where))
        case "increment":
            return Increment(_path(item, where), _by(item, where))
        case "decrement":
            return Decrement(_path(item, where), _by(item, where))
        case "append":
            return Append(_path_to_walk(item, where), plain(_required(item, "value", where), f"{where}.value"))
        case "remove":
            return Remove(_path(item, where))
        case _ if type(word) is str:
            raise _misfit(f"unknown variant `{word[:80]}`, expected one of {_WORDS}", f"{where}.type")
        case _:
            _required(item, "type", where)
            raise _misfit(f"invalid type: {json_type(word)}, expected one of {_WORDS}", f"{where}.type")


def _required(item: Mapping[str, object], name: str, where: str) -> object:
    value = item.get(name, _ABSENT)
    if value is _ABSENT:
        raise _misfit(f"missing field `{name}`", f"{where}.{name}")
    return value


def _path(item: Mapping[str, object], where: str) -> str:
    return _text(_required(item, "path", where), f"{where}.path")


def _path_to_walk(item: Mapping[str, object], where: str) -> str | list[str] | None:
    path = item.get("path")
    if path is None:
        return None
    if isinstance(path, list | tuple):
        return [_text(segment, f"{where}.path[{index}]") for index, segment in enumerate(path)]
    return _text(path, f"{where}.path", "a string, an array of strings or null")


def _text(value: object, where: str, expected: str = "a string") -> str:
    if not issubclass(type(value), str):  # not isinstance, which believes the `__class__` of a mock
        raise _misfit(f"invalid type: {json_type(value)}, expected {expected}", where)
    if type(value) is str and value.isascii():
        return value
    return cast(str, values.normalise(value, where))


def _by(item: Mapping[str, object], where: str) -> int:
    by = _required(item, "by", where)
    kind = type(by)
    if kind is bool or not issubclass(kind, int):
        found = "floating point number" if issubclass(kind, float) else json_type(by)
        raise _misfit(f"invalid type: {found}, expected a whole number within 64 bits", f"{where}.by")
    number = int.__int__(cast(int, by))  # the plain integer that a subclass holds
    if not I64_MIN <= number <= I64_MAX:
        raise _misfit(f"invalid value: expected a whole number from {I64_MIN} to {I64_MAX}", f"{where}.by")
    return number


def _as_is(value: object, where: str) -> object:
    """Return the value itself. For data that was decoded from JSON: there is nothing to check or copy."""
    return value


def _as_json(value: object, where: str) -> object:
    """Return `value` as plain JSON data that shares nothing mutable with it."""
    try:
        return values.decode(values.encode(value))
    except InvalidValue as error:
        raise InvalidValue(where + error.path.removeprefix("$"), error.problem) from None


def _too_many(found: str) -> DeserializationError:
    return _misfit(f"an update has at most {MAX_OPS} ops, found {found}: send several updates", "$.ops")


def _misfit(problem: str, where: str) -> DeserializationError:
    return DeserializationError(f"{problem} - at `{where}`")
