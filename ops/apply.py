"""Applying update ops to a value: pure, no I/O. docs/reference/semantics.md 3 has the rules, 3.4 the codes.

Ops run in order on a working copy. An op that fails is skipped and reported; the others still run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, assert_never

import msgspec

from scopestate.ops.update_ops import (
    Append,
    Decrement,
    Increment,
    Merge,
    OpError,
    Remove,
    Set,
    UpdateOp,
)
from scopestate.ops.values import json_type

MAX_SEGMENTS: Final = 32
MAX_SEGMENT_BYTES: Final = 256
MAX_MERGE_KEYS: Final = 1024
MAX_MERGE_LEVELS: Final = 16
FORBIDDEN: Final = ("__proto__", "constructor", "prototype")
"""Names that an op may not create at a path or at the top of a merge value. In byte order: the first is reported."""

_FORBIDDEN: Final = frozenset(FORBIDDEN)
_SURELY_SHORT: Final = MAX_SEGMENT_BYTES // 4
"""A name with at most this many characters cannot have too many bytes: UTF-8 takes at most 4 for each."""
_I64_MIN: Final = -(2**63)
_U64_MAX: Final = 2**64 - 1


class Missing(Enum):
    """The type of MISSING, so that `is MISSING` narrows."""

    MISSING = "MISSING"


MISSING: Final = Missing.MISSING
"""The old value of a key that does not exist. Not None: JSON null is a value (docs/reference/semantics.md 3.2)."""


class _Working(msgspec.Struct):
    """The working copy."""

    root: Any
    """The value so far. It may still belong to the caller, so write to it only through `fields()`."""
    fresh: bool
    """The key is missing and no op has succeeded yet, so there is no root (docs/reference/semantics.md 3.2)."""
    owned: bool
    """True if `root` is an object made here, which may be written to."""

    def replace(self, root: object) -> None:
        """Make `root` the value. It may be shared, so it is not written to."""
        self.root = root
        self.owned = False

    def fields(self) -> dict[str, Any]:
        """Return the root object for writing. It is copied once for each update, whatever the number of ops."""
        if not self.owned:
            self.root = self.root.copy()
            self.owned = True
        return self.root  # type: ignore[no-any-return]  # callers have checked that the root is an object

    def note_made(self, value: Any) -> None:
        """Note that `value` is new, so later ops may write to it."""

    def is_made(self, value: Any) -> bool:
        """Return whether `value`, which is inside the root, may be written to."""
        return False

    def extended(self, text: str, more: str, holder: dict[str, Any] | None, name: str) -> str | _Text:
        """Return what to store in place of `text`, the field `name` of `holder` (None: the root), to append `more`."""
        return text + more

    def result(self) -> Any:
        """Return the root as plain data."""
        return self.root


class _ManyWorking(_Working):
    """The working copy of several ops: a part that one op has copied is not copied again by the next."""

    made: dict[int, Any] = {}
    """id -> array or object inside the root that was made here and is referred to from nowhere else."""
    texts: list[tuple[dict[str, Any], str]] = []
    """(object made here, field name) for each field that may hold a `_Text`."""

    def note_made(self, value: Any) -> None:
        self.made[id(value)] = value  # a reference, so that no other value gets its id

    def is_made(self, value: Any) -> bool:
        return self.made.get(id(value)) is value

    def extended(self, text: str, more: str, holder: dict[str, Any] | None, name: str) -> str | _Text:
        if holder is not None:
            self.texts.append((holder, name))
        return _Text(text, more)

    def result(self) -> Any:
        for holder, name in self.texts:
            text = holder.get(name)
            if type(text) is _Text:
                holder[name] = text.joined()
        return self.root.joined() if type(self.root) is _Text else self.root


class _Text:
    """A string that is being appended to. An `append` takes time for what it adds, not for the whole string."""

    __slots__ = ("parts",)

    def __init__(self, *parts: str) -> None:
        self.parts = list(parts)

    def joined(self) -> str:
        return "".join(self.parts)


class _Refusal(msgspec.Struct, frozen=True):
    reason: str
    """The code, without the name of the op."""
    message: str


def apply(old: object, ops: Sequence[UpdateOp]) -> tuple[Any, list[OpError]]:
    """Return the new value and an error for each op that was skipped.

    `old` is plain JSON data or MISSING; the values of `ops` are plain JSON data (see `checked`). Nothing passed in is
    changed, and the result may share parts with it.
    """
    missing = old is MISSING
    working = (_Working if len(ops) == 1 else _ManyWorking)({} if missing else old, missing, missing)
    errors: list[OpError] = []
    index = -1  # counted here: for one op, the usual case, `enumerate` takes as long as the `match` below
    for op in ops:
        index += 1
        match op:
            case Increment():
                refusal = _add(working, op.path, op.by)
            case Decrement():
                refusal = _add(working, op.path, -op.by)
            case Set():
                refusal = _set(working, op.path, op.value)
            case Merge():
                refusal = _merge(working, op.path, op.value)
            case Append():
                refusal = _append(working, op.path, op.value)
            case Remove():
                refusal = _remove(working, op.path)
            case _:
                assert_never(op)
        if refusal is None:
            working.fresh = False
        else:
            word = op.__struct_config__.tag
            errors.append(OpError(index, f"{word}.{refusal.reason}", refusal.message))
    return working.root if type(working) is _Working else working.result(), errors


# Each function below applies one op to the working copy. If it returns a refusal, the copy is unchanged.


def _set(working: _Working, path: str, value: object) -> _Refusal | None:
    if path == "":
        working.replace(value)
        return None
    refusal = _check_field(working, path)
    if refusal is None:
        working.fields()[path] = value
    return refusal


def _add(working: _Working, path: str, by: int) -> _Refusal | None:
    if path == "":
        found = 0 if working.fresh else working.root
    else:
        refusal = _check_field(working, path)
        if refusal is not None:
            return refusal
        found = working.root.get(path, 0)
    kind = type(found)  # not isinstance: a boolean is not a number
    if kind is not int and kind is not float:
        return _Refusal("not_number", f"expected a number at {_place(path)}, found {_type(found)}")
    total = found + by
    if not (_I64_MIN <= total <= _U64_MAX if kind is int else math.isfinite(total)):
        # The code is that of iii-state 0.11.6; its message says that it expected a number and got a number.
        limits = f"{_I64_MIN} to {_U64_MAX}" if kind is int else "64-bit floats"
        problem = f"the number at {_place(path)} would leave the range of {limits}: it is {found}, changed by {by}"
        return _Refusal("not_number", problem)
    if path == "":
        working.replace(total)
    else:
        working.fields()[path] = total
    return None


def _append(working: _Working, path: str | list[str] | None, value: object) -> _Refusal | None:
    name = path
    if type(name) is not str:  # null, or segments to walk
        segments = path or []
        refusal = _check_segments(segments)
        if refusal is not None:
            return refusal
        if len(segments) > 1:
            return _append_at(working, segments, value)
        name = segments[0] if segments else ""
    if name == "":
        joined = _joined(working, None if working.fresh else working.root, value, None, name)
        if type(joined) is _Refusal:
            return joined
        working.replace(joined)
        return None
    refusal = _check_field(working, name)
    if refusal is not None:
        return refusal
    fields = working.fields()
    joined = _joined(working, fields.get(name), value, fields, name)
    if type(joined) is _Refusal:
        return joined
    fields[name] = joined
    return None


def _append_at(working: _Working, segments: Sequence[str], value: object) -> _Refusal | None:
    """Append at a checked path of two or more segments."""
    if type(working.root) is not dict:
        return _needs_object(working, segments)
    *steps, name = segments
    fields = _walk(working, steps)
    if name not in fields:
        # An array even for a string, unlike at the root and its fields (docs/reference/semantics.md 3.3).
        joined: object = [value]
        working.note_made(joined)
    else:
        joined = _joined(working, fields[name], value, fields, segments)
        # Objects that the walk has made are empty, so a refusal here means that nothing was changed.
        if type(joined) is _Refusal:
            return joined
    fields[name] = joined
    return None


def _joined(
    working: _Working, target: Any, value: object, holder: dict[str, Any] | None, path: str | Sequence[str]
) -> object:
    """Return `target`, at `path` in `holder` (None: the root), with `value` appended, or a _Refusal."""
    match target:
        case list():
            if working.is_made(target):
                target.append(value)
                return target
            joined: object = [*target, value]
            working.note_made(joined)
            return joined
        case _Text() if isinstance(value, str):
            target.parts.append(value)
            return target
        case str() if isinstance(value, str):
            return working.extended(target, value, holder, path if isinstance(path, str) else path[-1])
        case str() | _Text():
            problem = f"expected a string to append to the string at {_place(path)}, found {json_type(value)}"
            return _Refusal("type_mismatch", problem)
        case None:
            joined = value if isinstance(value, str) else [value]
            working.note_made(joined)
            return joined
        case _:
            problem = f"expected an array or a string at {_place(path)}, found {json_type(target)}"
            return _Refusal("type_mismatch", problem)


def _remove(working: _Working, path: str) -> _Refusal | None:
    if path == "":
        working.replace(None)
        return None
    refusal = _check_field(working, path)
    if refusal is None and path in working.root:
        del working.fields()[path]
    return refusal


def _merge(working: _Working, path: str | list[str] | None, value: object) -> _Refusal | None:
    segments = path if isinstance(path, list | tuple) else [path] if path else []
    refusal = _check_segments(segments) or _check_merge_value(value)
    if refusal is not None:
        return refusal
    assert isinstance(value, dict)  # _check_merge_value refuses other values
    if not segments:
        if isinstance(working.root, dict):
            working.fields().update(value)
        # A root that is not an object stays as it is, without an error, as in 0.11.6 (docs/reference/semantics.md 3.3).
        return None
    if not isinstance(working.root, dict):
        working.replace({})
    _walk(working, segments).update(value)
    return None


def _walk(working: _Working, segments: Sequence[str]) -> dict[str, Any]:
    """Return the object at a path, for writing. The root is an object; steps that are not become `{}`."""
    fields = working.fields()
    for segment in segments:
        step = fields.get(segment)
        if not working.is_made(step):
            fields[segment] = step = step.copy() if isinstance(step, dict) else {}
            working.note_made(step)
        elif not isinstance(step, dict):  # an array made by `append`
            fields[segment] = step = {}
            working.note_made(step)
        fields = step
    return fields


def _check_field(working: _Working, path: str) -> _Refusal | None:
    """Check the field name `path`, which is not "", and then that the root is an object."""
    if (len(path) > _SURELY_SHORT or path in _FORBIDDEN) and (refusal := _check_segments([path])) is not None:
        return refusal
    return None if type(working.root) is dict else _needs_object(working, path)


def _needs_object(working: _Working, path: str | Sequence[str]) -> _Refusal:
    problem = f"field {_place(path)} needs an object as the root value, found {_type(working.root)}"
    return _Refusal("target_not_object", problem)


def _check_segments(segments: Sequence[str]) -> _Refusal | None:
    if len(segments) > MAX_SEGMENTS:
        return _Refusal("path.too_deep", f"the path has {len(segments)} segments, the limit is {MAX_SEGMENTS}")
    for segment in segments:
        if segment == "":
            return _Refusal("path.empty_segment", "a segment of the path is empty")
        # An op that was made in Python may have a lone surrogate. It counts as 3 bytes.
        size = len(segment.encode(errors="surrogatepass"))
        if size > MAX_SEGMENT_BYTES:
            problem = f"a path segment has {size} bytes, the limit is {MAX_SEGMENT_BYTES}"
            return _Refusal("path.segment_too_long", problem)
        if segment in FORBIDDEN:
            return _Refusal("path.proto_polluted", f'the path segment "{segment}" is not allowed')
    return None


def _check_merge_value(value: object) -> _Refusal | None:
    if not isinstance(value, dict):
        return _Refusal("value.not_an_object", f"the value to merge must be an object, found {json_type(value)}")
    if len(value) > MAX_MERGE_KEYS:
        return _Refusal("value.too_many_keys", f"the value has {len(value)} fields, the limit is {MAX_MERGE_KEYS}")
    for name in FORBIDDEN:
        if name in value:
            return _Refusal("value.proto_polluted", f'the field "{name}" is not allowed at the top of a merge value')
    levels = _levels(value)
    if levels > MAX_MERGE_LEVELS:
        return _Refusal("value.too_deep", f"the value has {levels} nested levels, the limit is {MAX_MERGE_LEVELS}")
    return None


def _levels(value: object) -> int:
    """Return how many levels are nested: 0 for a scalar, 1 + its deepest child for a container."""
    levels = 0
    generation = [value]
    while containers := [item for item in generation if isinstance(item, dict | list)]:
        levels += 1
        generation = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return levels


def _type(value: object) -> str:
    return "string" if type(value) is _Text else json_type(value)


def _place(path: str | Sequence[str]) -> str:
    if isinstance(path, str):
        return f'"{path}"' if path else "root"
    return "[" + ", ".join([f'"{segment}"' for segment in path]) + "]"
