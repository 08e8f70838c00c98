"""Plain data and short texts of what the engine returns: for `json.dumps`, for web frameworks, and for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, get_args, get_origin, get_type_hints

import msgspec

from scopestate.ops.values import class_name, decode

LONGEST_SHOWN: Final = 200
"""Characters of one value that a repr shows. Of a longer value it shows the beginning and the size."""


class Plain:
    """A base of results, events and figures: they have `to_dict()`, and a repr of limited length.

    FastAPI and pydantic write them as `to_dict()` by themselves. Nothing is prepared when an object is made.
    """

    __slots__ = ()

    json_fields: ClassVar[tuple[str, ...]] = ()
    """The fields and properties that the plain data has, in order; empty: all fields."""
    json_values: ClassVar[Mapping[str, str]] = {}
    """Property whose value is that of a key -> the field that has this value as JSON."""
    json_optional: ClassVar[tuple[str, ...]] = ()
    """The names that are left out of the plain data if they have no information."""

    def to_dict(self) -> dict[str, Any]:
        """Return a new dict of JSON data: for `json.dumps`, logs and answers.

        The names are those of the attributes. Values are as they were written, times are milliseconds since the epoch,
        and an error is its class and text.
        """
        values = self.json_values
        return {
            name: _decoded(getattr(self, values[name])) if name in values else plain(getattr(self, name))
            for name in names_of(type(self))
        }

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # FastAPI writes what `vars()` returns
        return self.to_dict()

    def __repr__(self) -> str:
        values, defaults = self.json_values, _defaults_of(type(self))
        shown = []
        for name in names_of(type(self)):
            if name in values:
                shown.append(f"{name}={json_shown(getattr(self, values[name]))}")
            elif (found := getattr(self, name)) != defaults.get(name, msgspec.NODEFAULT):
                shown.append(f"{name}={shortened(found)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Called by pydantic only: accepts objects of the class, and serialises them as `to_dict()`."""
        from pydantic_core import core_schema  # noqa: PLC0415 - it is there if pydantic calls

        fields = {
            name: core_schema.typed_dict_field(handler.generate_schema(hint), required=name not in cls.json_optional)
            for name, hint in _hints(cls)
        }
        shape = core_schema.typed_dict_schema(fields)
        return core_schema.is_instance_schema(
            cls,
            ref=f"{cls.__module__}.{cls.__qualname__}:{id(cls)}",
            serialization=core_schema.plain_serializer_function_ser_schema(_written, return_schema=shape),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        """Called by pydantic only: returns the JSON schema of `to_dict()`."""
        first = (cls.__doc__ or "").split("\n\n")[0]
        shape = handler(schema["serialization"]["return_schema"])
        return {**shape, "title": cls.__name__, "description": " ".join(first.split())}


def _written(given: Plain | dict[str, Any]) -> dict[str, Any]:
    """Return what pydantic serialises. A nested object is a dict already, made by `to_dict()` of the outer one."""
    return given if isinstance(given, dict) else given.to_dict()


def plain(given: Any) -> Any:
    """Return a field of a result as JSON data."""
    if isinstance(given, Plain):
        return given.to_dict()
    if isinstance(given, Mapping):
        return {name: plain(one) for name, one in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [plain(one) for one in given]
    if isinstance(given, BaseException):
        return f"{class_name(given)}: {_text_of(given)}"
    return given


def _text_of(given: object, text: Callable[[Any], str] = str) -> str:
    """Return `str` or `repr` of an object that the program has given. These run its methods, which may raise."""
    try:
        return text(given)
    except Exception as problem:  # noqa: BLE001 - whatever the program's own method raises
        return f"(its text could not be read: {class_name(problem)})"


def _decoded(data: bytes | None) -> Any:
    return None if data is None else decode(data)


def json_shown(data: bytes | None) -> str:
    """Return the repr of a value kept as JSON. A long value is cut without decoding it."""
    if data is None or len(data) <= LONGEST_SHOWN:
        return repr(_decoded(data))
    return f"{data[:LONGEST_SHOWN].decode(errors='ignore')}... ({len(data):,} bytes)"


def shortened(given: Any) -> str:
    """Return a repr of limited length: of a key, or of another object that the program has given."""
    if isinstance(given, str) and len(given) > LONGEST_SHOWN:
        return f"{given[:LONGEST_SHOWN]!r}... ({len(given):,} characters)"
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) > _MOST_ITEMS:
        return f"<{len(given):,} of {type(given[0]).__name__}>"
    text = _text_of(given, repr)
    return text if len(text) <= _LONGEST_OTHER else f"{text[:_LONGEST_OTHER]}..."


_MOST_ITEMS: Final = 5
_LONGEST_OTHER: Final = 1000


def names_of(kind: type[Plain]) -> tuple[str, ...]:
    """Return the names in the plain data of a class."""
    return kind.json_fields or _fields_of(kind)


def _fields_of(kind: type[Plain]) -> tuple[str, ...]:
    names: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]  # all such classes are structs
    return names


def _defaults_of(kind: type[Plain]) -> dict[str, Any]:
    """Return the defaults of the fields of a class. A repr leaves out fields that have their default."""
    defaults: tuple[Any, ...] = kind.__struct_defaults__  # type: ignore[attr-defined]  # as above
    return dict(zip(reversed(_fields_of(kind)), reversed(defaults), strict=False))


def _hints(kind: type[Plain]) -> list[tuple[str, Any]]:
    """Return the names in the plain data of a class, each with its type."""
    fields = get_type_hints(kind)
    hints = []
    for name in names_of(kind):
        hint = Any if name in kind.json_values else fields.get(name)
        if hint is None:
            hint = get_type_hints(getattr(kind, name).fget)["return"]
        hints.append((name, _plain_hint(hint)))
    return hints


def _plain_hint(hint: Any) -> Any:
    """Return the type that a field has after `plain`."""
    if hint is BaseException:
        return str
    if get_origin(hint) in (tuple, Sequence):
        return list[get_args(hint)[0]]  # type: ignore[misc]  # made for pydantic, not for a type checker
    return hint
