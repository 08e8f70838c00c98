"""Descriptions of functions and trigger types, as in the API reference, generated from the structs.

Their JSON schemas are made from type hints in the dialect of the reference. msgspec's own `json.schema` writes the
2020-12 dialect; the reference is draft-07 as iii writes it: `definitions`, `true` for any value, `null` in a list of
types, ops inline in a `oneOf`. Scalars are left to msgspec.

- A `Meta` with a `title` makes a type a definition of that name; notes after it belong to the field that has it.
- A result says by `json_fields` which of its fields and properties its JSON has.
- `Meta(extra=OPTIONAL)` takes a field out of `required`.
- The fields that scopestate adds to the reference's are optional: without them the schemas are the reference's.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import NODEFAULT

from scopestate.actors.functions import Functions
from scopestate.ops.functions import DESCRIBED
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.ops.update_ops import OPTIONAL
from scopestate.ops.values import decode, encode

_DIALECT: Final = "http://json-schema.org/draft-07/schema#"


def functions(registered: Functions) -> list[dict[str, Any]]:
    """Describe the built-in functions as the API reference does, then the registered ones in order of registration.

    The schemas of a registered function are those of the types it was registered with; without types they are `{}`,
    which allows anything.
    """
    described: list[dict[str, Any]] = decode(_builtin_functions())
    described += [
        _entry(function.function_id, function.description, function.request_schema, function.response_schema)
        for function in registered.all()
        if not function.builtin
    ]
    return described


def trigger_types() -> list[dict[str, Any]]:
    """Describe the trigger type `state` as the API reference does."""
    described: list[dict[str, Any]] = decode(_builtin_trigger_types())
    return described


def _entry(function_id: str, description: str | None, request: Any = None, response: Any = None) -> dict[str, Any]:
    return {
        "name": function_id,
        "description": description,
        "metadata": {},
        "request_schema": copy.deepcopy(request) or {},
        "response_schema": copy.deepcopy(response) or {},
    }


# Made at the first call and kept as bytes: each caller gets its own copy.


@functools.cache
def _builtin_functions() -> bytes:
    return encode(
        [
            _entry(
                row.function_id,
                summary(row.given),
                schema(row.request, row.given),
                None if row.response is None else schema(*row.response),
            )
            for row in DESCRIBED
        ]
    )


@functools.cache
def _builtin_trigger_types() -> bytes:
    return encode(
        [
            {
                "name": "state",
                "description": "State trigger",
                "metadata": {},
                "invocation_schema": schema("StateTriggerConfig", Trigger),
                "return_schema": schema("StateCallRequest", StateEvent),
            }
        ]
    )


def schema(title: str, hint: Any) -> dict[str, Any]:
    """Return the schema of a struct or TypedDict, which may be null, under a name.

    A type of the reference keeps the reference's name.
    """
    writer = _Writer()
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType] if _may_be_null(hint) else [hint]
    made: dict[str, Any] = {"$schema": _DIALECT, "title": title, **writer.object(kinds[0])}
    if _may_be_null(hint):
        made["type"] = ["object", "null"]
    if writer.definitions:
        made["definitions"] = writer.definitions
    return made


def summary(documented: object) -> str:
    """Return the first sentence or paragraph of a docstring as the reference writes descriptions.

    One sentence loses its full stop, several keep theirs.
    """
    paragraph = " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())
    return paragraph if ". " in paragraph else paragraph.removesuffix(".")


class _Writer:
    """Writes one schema and collects its definitions."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def of(self, hint: Any) -> Any:
        """Return the schema of any type; `True` for a type without constraints."""
        kind, metas = _split(hint)
        for place, meta in enumerate(metas):
            if meta.title is not None:
                self.definitions.setdefault(meta.title, self._plain(kind, metas[: place + 1]))
                reference = {"$ref": f"#/definitions/{meta.title}"}
                words = _words(metas[place + 1 :])
                # Draft-07 ignores what stands beside a $ref.
                return {"allOf": [reference], **words} if words else reference
        return self._plain(kind, metas) or True

    def object(self, hint: Any) -> dict[str, Any]:
        """Return the schema of a struct or TypedDict: its fields by name, the required ones, and the tag."""
        kind, metas = _split(hint)
        properties: dict[str, Any] = {}
        required: list[str] = []
        config = getattr(kind, "__struct_config__", None)
        if config is not None and config.tag is not None:
            properties[config.tag_field] = _enumeration([config.tag])
            required.append(config.tag_field)
        for name, field, needed in _fields(kind):
            properties[name] = self.of(field)
            if needed:
                required.append(name)
        made: dict[str, Any] = {"type": "object", **_words(metas)}
        if properties:
            made["properties"] = dict(sorted(properties.items()))
        if required:
            made["required"] = sorted(required)
        return made

    def _plain(self, kind: Any, metas: tuple[msgspec.Meta, ...]) -> dict[str, Any]:
        words = _words(metas)
        origin, args = get_origin(kind), get_args(kind)
        if kind is Any or isinstance(kind, TypeVar):  # a value, which may be anything
            return words
        if origin is Literal:
            return {**_enumeration(list(args)), **words}
        if origin in (list, tuple):
            return {"type": "array", "items": self.of(args[0]), **words}
        if origin in (Union, types.UnionType):
            if any(isinstance(member, TypeVar) for member in args):
                return words
            given = tuple([member for member in args if member is not msgspec.UnsetType])  # the field may be left out
            return {**(self._union(given) if len(given) > 1 else self.of(given[0])), **words}
        if _is_struct(kind):
            return self.object(Annotated[(kind, *metas)] if metas else kind)
        scalar = msgspec.json.schema(Annotated[(kind, *metas)] if metas else kind)
        scalar.pop("title", None)
        return scalar

    def _union(self, members: tuple[Any, ...]) -> dict[str, Any]:
        if all(_is_struct(_split(member)[0]) for member in members):
            return {"oneOf": [self._described(member) for member in members]}
        choices = [{"type": "null"} if member is types.NoneType else self.of(member) for member in members]
        if len(choices) == 2 and choices[1] == {"type": "null"} and isinstance(choices[0].get("type"), str):
            return {**choices[0], "type": [choices[0]["type"], "null"]}
        return {"anyOf": choices}

    def _described(self, struct: Any) -> dict[str, Any]:
        return {"description": summary(struct), **self.object(struct)}


def _split(hint: Any) -> tuple[Any, tuple[msgspec.Meta, ...]]:
    """Return a hint's type and its annotations, from the inside out."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    kind, *notes = get_args(hint)
    return kind, tuple(note for note in notes if isinstance(note, msgspec.Meta))


def _may_be_null(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _fields(kind: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield (name, hint, required) of each field that the JSON of `kind` has."""
    hints = get_type_hints(kind, include_extras=True)
    if not _is_struct(kind):  # a TypedDict
        yield from ((name, hint, name in kind.__required_keys__) for name, hint in hints.items())
        return
    struct_fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name in getattr(kind, "json_fields", ()) or struct_fields:
        field = struct_fields.get(name)
        if field is None:  # a property
            hint = get_type_hints(getattr(kind, name).fget, include_extras=True)["return"]
            needed = True
        else:
            hint = hints[field.name]
            needed = field.default is NODEFAULT and field.default_factory is NODEFAULT
        yield name, hint, needed and not any(meta.extra == OPTIONAL for meta in _split(hint)[1])


def _enumeration(words: list[Any]) -> dict[str, Any]:
    return {"type": "string", "enum": words}


def _words(metas: tuple[msgspec.Meta, ...]) -> dict[str, Any]:
    """Return what the annotations say about a type, except its name."""
    words: dict[str, Any] = {}
    for meta in metas:
        if meta.description is not None:
            words["description"] = meta.description
        words.update(meta.extra_json_schema or {})
    return words
