"""JSON schemas as types of values: JSON Schema 2020-12, checked by the library `jsonschema`.

Pure: when a schema is compiled, the caller provides the schema and a function that loads the documents it refers to.
Nothing is loaded afterwards, and nothing is ever read over the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from scopestate.ops.json_formats import format_checker
from scopestate.ops.value_types import Misfit, ValueType, path_of
from scopestate.ops.values import class_name, decode, encode

Load = Callable[[str], Any]
"""Returns the document of a URI that a `$ref` names. Raises BadSchema."""

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_REFERENCES: Final = ("$ref", "$dynamicRef")
_MOST_ERRORS: Final = 20
"""How many errors of one value are compared to find the most specific one, which is reported."""
_LONGEST_REASON: Final = 400
_FORMATS: Final = frozenset(
    {
        *("date", "date-time", "duration", "time", "uuid", "regex", "ipv4", "ipv6"),
        *("email", "hostname", "idn-email", "idn-hostname", "json-pointer", "relative-json-pointer"),
        *("iri", "iri-reference", "uri", "uri-reference", "uri-template"),
    }
)
"""The formats of the standard. Other formats are not checked, as the standard says."""
_INSTALL: Final = "pip install 'scopestate[schema]'"


class BadSchema(Exception):
    """A schema that cannot be used; the text says why."""


class JsonSchema(ValueType[Any]):
    """A compiled JSON schema. Two are equal if their documents are."""

    def __init__(self, name: str, document: Mapping[str, Any], uri: str = "", load: Load | None = None) -> None:
        """`uri`: the base of relative references. `load` returns the documents that it refers to.

        Raises BadSchema if the schema is not valid, if something that it refers to does not exist, or if `jsonschema`
        is not installed.
        """
        super().__init__(name)
        self._uri = uri or "scopestate:schema"
        self._others: dict[str, Any] = {}
        """The documents that the schema refers to, by URI."""
        try:
            self._document = copy.deepcopy(dict(document))
            self._validator, self._best = self._compiled(load or _nothing_beside)
        except RecursionError as error:
            raise BadSchema("the schema is nested too deep") from error

    def _compiled(self, load: Load) -> tuple[Any, Callable[[list[Any]], Any]]:
        try:
            from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # noqa: PLC0415 - of the extra
            from jsonschema.exceptions import best_match  # type: ignore[import-untyped]  # noqa: PLC0415 - as above
            from jsonschema_specifications import REGISTRY as STANDARD  # type: ignore[import-untyped]  # noqa: PLC0415 - as above
            from referencing import Registry  # noqa: PLC0415 - as above
        except ImportError as error:
            raise BadSchema(f"a schema needs the library jsonschema ({error}): {_INSTALL}") from error

        def retrieve(uri: str) -> Any:
            self._others[uri] = document = load(uri)
            return _resource(document, uri)

        make: Any = Registry  # its type stubs lack the arguments
        registry = make(retrieve=retrieve).combine(STANDARD)
        root = _resource(self._document, "")
        registry = registry.with_resource(self._uri, root)
        checker = format_checker()
        _follow(registry, self._uri, frozenset(checker.checkers))
        complete = make().combine(STANDARD)
        for uri, document in ((self._uri, self._document), *self._others.items()):
            complete = complete.with_resource(uri, _resource(document, uri))
        # A reference to the schema, not the schema itself, so that references in it are relative to its URI.
        whole = {"$schema": DIALECT, "$ref": root.id() or self._uri}
        return Draft202012Validator(whole, registry=complete.crawl(), format_checker=checker), best_match

    def encode(self, value: Any) -> bytes:
        data = encode(value)
        self.check(data)
        return data

    def decode(self, json: bytes) -> Any:
        self.check(json)
        return decode(json)

    def check(self, json: bytes) -> None:
        try:
            errors = list(islice(self._validator.iter_errors(decode(json)), _MOST_ERRORS))
            error = self._best(errors) if errors else None
        except Exception as problem:
            raise Misfit("$", f"the schema could not be applied: {class_name(problem)}: {problem}") from problem
        if error is not None:
            raise Misfit(path_of(tuple(error.absolute_path)), _shortened(error.message))

    def json_schema(self) -> dict[str, Any]:
        return copy.deepcopy(self._document)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JsonSchema) and (self.name, self.documents()) == (other.name, other.documents())

    def __hash__(self) -> int:
        return hash(self.name)

    def documents(self) -> list[Any]:
        """Return the document of the schema, then those that it refers to, sorted by URI."""
        return [self._document, *[self._others[uri] for uri in sorted(self._others)]]


def _nothing_beside(uri: str) -> Any:
    raise BadSchema(f"the reference {uri!r} leads out of the schema, and there is no file beside which to look for it")


def _resource(document: Any, uri: str) -> Any:
    """Return a document as the library expects it. Raises BadSchema if it is not a valid schema."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - see `_compiled`
    from jsonschema.exceptions import SchemaError  # noqa: PLC0415 - as above
    from referencing.jsonschema import DRAFT202012  # noqa: PLC0415 - as above

    where = f"{uri}: " if uri else ""
    if not isinstance(document, dict):
        raise BadSchema(f"{where}a JSON schema is an object, not {class_name(document)}")
    dialect = document.get("$schema", DIALECT)
    if not isinstance(dialect, str) or dialect.rstrip("#") != DIALECT:
        raise BadSchema(f"{where}its `$schema` is {dialect!r:.100}; write it in JSON Schema 2020-12, {DIALECT}")
    try:
        Draft202012Validator.check_schema(document, format_checker=Draft202012Validator.FORMAT_CHECKER)
    except SchemaError as error:
        place = path_of(tuple(error.absolute_path))
        raise BadSchema(f"{where}it is not a valid JSON schema: {_shortened(error.message)} - at `{place}`") from error
    return DRAFT202012.create_resource(document)


def _follow(registry: Any, uri: str, formats: frozenset[str]) -> None:
    """Resolve every reference of a schema, and those of the documents it refers to. Raises BadSchema."""
    from referencing.jsonschema import DRAFT202012  # noqa: PLC0415 - see `_compiled`

    root = registry.get_or_retrieve(uri)
    pending = [(root.registry.resolver(base_uri=uri).in_subresource(root.value), root.value)]
    seen: set[int] = set()
    while pending:
        resolver, resource = pending.pop()
        schema = resource.contents
        if id(schema) in seen or not isinstance(schema, Mapping):
            continue
        seen.add(id(schema))
        known = schema.get("format")
        if known in _FORMATS and known not in formats:
            raise BadSchema(f"the format {known!r} cannot be checked here: {_INSTALL}")
        for name in _REFERENCES:
            if name in schema:
                found = _found(resolver, schema[name])
                pending.append((found.resolver, DRAFT202012.create_resource(found.contents)))
        pending += [(resolver.in_subresource(part), part) for part in resource.subresources()]


def _found(resolver: Any, reference: str) -> Any:
    from referencing.exceptions import Unresolvable  # noqa: PLC0415 - see `_compiled`

    try:
        return resolver.lookup(reference)
    except Unresolvable as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, BadSchema):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise BadSchema(f"the reference {reference!r} leads nowhere") from error


def _shortened(text: str) -> str:
    """Return a shortened message of the library, which may contain the whole value."""
    if len(text) <= _LONGEST_REASON:
        return text
    half = _LONGEST_REASON // 2
    return f"{text[:half]} ... {text[-half:]}"
