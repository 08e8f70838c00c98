"""What `type:` and `schema:` of a rule for scopes name: a Python type, and a JSON schema in a file or in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import msgspec

from scopestate.config.functions import TargetError, import_object
from scopestate.config.loader import read_bytes
from scopestate.config.schema import SchemaRef, TypeRef
from scopestate.errors import ConfigError, DeserializationError
from scopestate.ops.json_schema import BadSchema, JsonSchema
from scopestate.ops.value_types import value_type
from scopestate.paths import expand_home


def import_type(target: str) -> TypeRef:
    """Import `package.module:Type`. Raises TargetError, also for a type to which values cannot be converted."""
    return type_ref(import_object(target, "Type"), target)


def type_ref(kind: Any, target: str | None = None) -> TypeRef:
    """Return a type that the program hands over itself. Raises TargetError."""
    try:
        found = value_type(kind)
    except DeserializationError as error:
        raise TargetError(str(error)) from error
    return TypeRef(found.name if target is None else target, kind)


def read_schema(path: str, folder: str | None, files: set[str]) -> SchemaRef:
    """Read a schema from a file. A relative path begins at `folder`, that of the configuration; None: the current one.

    `files` gets every file that is read, or looked for. Raises BadSchema.
    """
    file = os.path.abspath(os.path.join(folder or "", expand_home(path)))
    document = _read(file, files)
    return SchemaRef(path, JsonSchema(path, _mapping(document), _uri_of(file), _Beside(file, document, files)))


def inline_schema(document: Mapping[str, Any], place: str, source: str | None, files: set[str]) -> SchemaRef:
    """Return a schema that is part of the configuration `source`. If that is None, it may not refer to files.

    Raises BadSchema.
    """
    if source is None:
        return SchemaRef(None, JsonSchema(place, document))
    return SchemaRef(None, JsonSchema(place, document, _uri_of(source), _Beside(source, document, files)))


class _Beside:
    """Loads what a schema refers to: files in its folder, and in folders below."""

    def __init__(self, file: str, document: Any, files: set[str]) -> None:
        self._folder = os.path.dirname(file)
        self._files = files
        id_ = document.get("$id") if isinstance(document, Mapping) else None
        self._bases = [_uri_of(self._folder) + "/"]
        if isinstance(id_, str) and urlsplit(id_).scheme:
            self._bases.append(urljoin(id_, "."))  # names relative to its id mean files relative to its file

    def __call__(self, uri: str) -> Any:
        for base in self._bases:
            if uri.startswith(base):
                name = unquote(urldefrag(uri).url[len(base) :])
                file = os.path.normpath(os.path.join(self._folder, name))
                if name and os.path.commonpath([self._folder, file]) == self._folder:
                    return _read(file, self._files)
        raise BadSchema(
            f"the reference {uri!r} is neither in the schema nor a file beside it, and nothing is read over the network"
        )


def _read(file: str, files: set[str]) -> Any:
    files.add(file)
    try:
        return msgspec.json.decode(read_bytes(file))
    except ConfigError as error:
        raise BadSchema(f"{file}: {error.problem}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSchema(f"{file}: it is not JSON: {error}") from error


def _mapping(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise BadSchema(f"a JSON schema is an object, not {type(document).__name__}")
    return document


def _uri_of(file: str) -> str:
    from urllib.request import pathname2url  # noqa: PLC0415 - 20 ms, only for schemas

    return "file://" + pathname2url(file)
