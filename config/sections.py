"""Turn nodes into a `Config`: which keys exist, where, and of what type. Every mistake is collected.

The file's shape is iii's (docs/reference/semantics.md 5). `functions`, `triggers`, `scopes` and `limits` are
scopestate's own. iii ignores an unknown key or a wrong type inside the adapter's `config`; here they are errors, as a
typo must not lose data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin

import msgspec

from scopestate.config.functions import TargetError, import_function, misfit_id, reference
from scopestate.config.nodes import Mapping, Node, Problems, Scalar, Sequence, from_python, join, parse
from scopestate.config.scalars import (
    Value,
    VariableError,
    content,
    did_you_mean,
    expand,
    misfit,
    misfit_shape,
    nearest,
    resolve_native,
    resolve_text,
    shorten,
)
from scopestate.config.schema import (
    ADAPTERS,
    TOKEN_NAME,
    AdapterConfig,
    AdapterName,
    AdapterOptions,
    Config,
    FunctionRef,
    LimitsConfig,
    SchemaRef,
    ScopeRule,
    ServerConfig,
    TokenConfig,
    TriggerConfig,
    TypeRef,
    full_token,
    options_of,
    with_every_list,
)
from scopestate.config.value_rules import import_type, inline_schema, read_schema, type_ref
from scopestate.errors import ConfigError, DeserializationError
from scopestate.ops.callbacks import refuse_callback
from scopestate.ops.functions import BUILT_IN_IDS
from scopestate.ops.json_schema import BadSchema
from scopestate.ops.triggers import read_options

log = logging.getLogger("scopestate.config")

WORKER = "iii-state"
SERVER = "iii-worker-manager"
_SECRETS = ("token", "password", "sentinel_password")
_TOP_KEYS = ("workers", "modules", "functions", "triggers", "scopes", "limits")
_ENTRY_KEYS = ("name", "image", "config")
_SAYS_SOMETHING = ("durability", "ttl_ms", "strict", "type", "schema", "version", "history")
"""Options of an entry of `scopes:`, of which it must have one."""
_MAX_HINTS = 100
_NAME = str

_S = TypeVar("_S", bound=msgspec.Struct)


Outcome = tuple[Config | None, list[ConfigError]]
"""The configuration, which counts only if the list beside it is empty; the mistakes in the order of their lines."""


def read_text(text: str, source: str | None, problems: Problems) -> Outcome:
    """Read YAML text. `problems` then also has the doubts, and the lines of the keys."""
    try:
        root = parse(text, problems)
    except ConfigError as error:
        problems.errors.append(error)
        return None, problems.by_line()
    if root is None:
        # Refused: reading it as "all defaults". A file caught while it is truncated and rewritten looks like this.
        return None, [problems.error("the configuration is empty; for the defaults write `workers: []`", 1)]
    return SectionReader(problems).read(root, source), problems.by_line()


def read_python(data: object) -> Outcome:
    """Read mappings and lists; mistakes have neither file nor line."""
    problems = Problems(None)
    try:
        root = from_python(data, problems)
    except ConfigError as error:
        return None, [error]
    return SectionReader(problems).read(root, None), problems.by_line()


class Place(NamedTuple):
    """A node and its place: the line of its key (in a list, its own line) and its path."""

    node: Node
    line: int | None
    path: str


class OtherWorker(NamedTuple):
    """A worker of another kind, by its name."""

    name: str
    line: int | None
    path: str


class SectionReader:
    """Reads one configuration. Mistakes go to `problems`; the result counts only if there are no mistakes."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._file = problems.file or "configuration"
        self._source: str | None = None
        self._worker: Place | None = None
        self._ignored: list[str] = []
        self._others: list[OtherWorker] = []
        self._broken: list[str] = []
        self._server: ServerConfig | None = None
        self._server_entry: Place | None = None

    def read(self, root: Node, source: str | None) -> Config:
        """Read the whole file. A bare list is the list of workers, as in the reference's sample."""
        self._source = None if source is None else os.path.abspath(source)
        top = Place(root, root.line, "")
        if isinstance(root, Sequence):
            sections = {}
            adapter = self._workers([top])
        else:
            sections = self._fields(top, _TOP_KEYS, what="a mapping with `workers:`, or a list of workers")
            adapter = self._workers([sections[name] for name in ("workers", "modules") if name in sections])
        functions = self._functions(sections.get("functions"))
        return Config(
            adapter=adapter,
            functions=functions,
            triggers=self._triggers(sections.get("triggers"), known=(*functions, *self._broken, *BUILT_IN_IDS)),
            scopes=self._scopes(sections.get("scopes")),
            limits=self._limits(sections.get("limits")),
            server=self._server,
            source=source,
        )

    # The list of workers, one of which is `iii-state`.

    def _workers(self, lists: Iterable[Place]) -> AdapterConfig:
        adapter = AdapterConfig("kv")
        for place in lists:
            for entry in self._items(place):
                adapter = self._entry(entry) or adapter
        if self._ignored:
            log.info("%s: ignored workers that are not %s: %s", self._file, WORKER, ", ".join(self._ignored))
            if self._worker is None:
                log.warning("%s: has no %s among its workers; state is kept in memory only", self._file, WORKER)
        for ours, found in ((WORKER, self._worker is not None), (SERVER, self._server_entry is not None)):
            # A misspelt entry would be ignored, with its store or the server's tokens.
            for other in () if found else self._others:
                if nearest(other.name, [ours.replace("-", "_")], cutoff=0.85):
                    self._problems.add(
                        f"there is no worker {ours} in this file; is {other.name!r} meant to be it? Rename it, or "
                        f"add an entry `name: {ours}` if it is another worker",
                        other.line,
                        other.path,
                    )
        return adapter

    def _entry(self, entry: Place) -> AdapterConfig | None:
        """Read one entry of `workers:`; None for another worker, whose keys and values do not matter here."""
        if not isinstance(entry.node, Mapping):
            self._misshapen(entry, "a mapping with `name` and `config`")
            return None
        found = {
            str(item.key.content): Place(item.value, item.line, join(entry.path, str(item.key.content)))
            for item in entry.node.entries
        }
        if "name" not in found and set(found) == {"adapter"}:
            # The registry's install snippet is the bare configuration of the worker.
            return self._own(entry, entry)
        if "name" not in found:
            self._problems.add("this entry has no `name`", entry.line, join(entry.path, "name"))
            return None
        name = self._typed(found["name"], _NAME)
        if name is None:
            return None
        if name == SERVER:
            self._read_server(entry, found.get("config"))
            return None
        if name != WORKER:
            if str(name).lower().replace("_", "-") == WORKER:
                self._problems.add(f"write `{WORKER}`, found {name!r}", found["name"].line, found["name"].path)
            else:
                self._others.append(OtherWorker(str(name), found["name"].line, found["name"].path))
            self._ignored.append(str(name))
            return None
        for key, place in found.items():
            if key not in _ENTRY_KEYS:
                # iii ignores any other key; one that looks like a misspelt `config` would silently mean in_memory.
                if nearest(key, _ENTRY_KEYS, cutoff=0.8):
                    self._unknown(place, key, _ENTRY_KEYS)
                else:
                    log.info("%s: key `%s` of %s is not known and was ignored", self._file, place.path, WORKER)
        return self._own(entry, found.get("config"))

    def _read_server(self, entry: Place, config: Place | None) -> None:
        if self._server_entry is not None:
            self._problems.add(f"a second {SERVER} entry; keep one", entry.line, entry.path)
            return
        self._server_entry = entry
        self._problems.lines[SERVER] = entry.line
        if config is not None:
            self._problems.lines[f"{SERVER}.config"] = config.line
        empty = config is None or self._is_null(config)
        self._server = ServerConfig() if empty else self._struct(config, ServerConfig)  # type: ignore[arg-type]

    def _own(self, entry: Place, config: Place | None) -> AdapterConfig | None:
        if self._worker is not None:
            line = f" on line {self._worker.line}" if self._worker.line else f" at `{self._worker.path}`"
            self._problems.add(f"a second {WORKER} entry; the first is{line}, keep one", entry.line, entry.path)
            return None
        self._worker = entry
        if config is None or self._is_null(config):
            return None
        adapter = self._fields(config, ("adapter",)).get("adapter")
        return None if adapter is None or self._is_null(adapter) else self._adapter(adapter)

    def _adapter(self, adapter: Place) -> AdapterConfig | None:
        if not isinstance(adapter.node, Mapping):
            self._misshapen(adapter, "a mapping with `name` and `config`")
            return None
        fields = self._fields(adapter, ("name", "config"))
        if "name" not in fields:
            self._problems.add("the adapter has no `name`; write `name: kv`", adapter.line, join(adapter.path, "name"))
            return None
        name = self._typed(fields["name"], _NAME)
        if name is None:
            return None
        if name not in ADAPTERS:
            hint = did_you_mean(str(name), ADAPTERS)
            self._problems.add(
                f"there is no adapter {shorten(str(name))}{hint}; this version has: {', '.join(ADAPTERS)}",
                fields["name"].line,
                fields["name"].path,
            )
            return None
        return AdapterConfig(cast("AdapterName", name), self._options(fields.get("config"), ADAPTERS[str(name)]))

    def _options(self, config: Place | None, kind: type[AdapterOptions]) -> AdapterOptions:
        options = None if config is None or self._is_null(config) else self._struct(config, kind)
        if config is None or options is None:
            return kind()
        fields = self._fields(config, kind.__struct_fields__)
        for key, problem, item in options.mistakes():
            place = fields[key] if item is None else self._items(fields[key])[item]
            self._problems.add(problem, place.line, place.path)
        return options

    def _line_of(self, place: Place, key: str) -> int | None:
        """Return the line of a key of a mapping; the mapping's own if it has no such key."""
        entries = place.node.entries if isinstance(place.node, Mapping) else ()
        return next((entry.line for entry in entries if entry.key.content == key), place.line)

    # The sections next to `workers`, which are scopestate's own.

    def _functions(self, place: Place | None) -> dict[str, FunctionRef]:
        functions: dict[str, FunctionRef] = {}
        for function_id, target in self._fields(place, None).items():
            misfit_of_id = misfit_id(function_id)
            if misfit_of_id is not None:
                self._problems.add(misfit_of_id, target.line, target.path)
                continue
            found = self._function_ref(target)
            if found is None:
                self._broken.append(function_id)
            else:
                functions[function_id] = found
        return functions

    def _function_ref(self, place: Place) -> FunctionRef | None:
        node = place.node
        if isinstance(node, Scalar) and node.style == "native" and callable(node.content):
            return reference(node.content)
        text = self._typed(place, _NAME)
        try:
            return None if text is None else import_function(str(text))
        except TargetError as error:
            self._unusable(place, error)
            return None

    def _unusable(self, place: Place, error: TargetError | BadSchema) -> None:
        """Report something that the file names and that cannot be used."""
        failure = self._problems.error(str(error), place.line, place.path)
        failure.__cause__ = error.__cause__
        self._problems.errors.append(failure)

    def _triggers(self, place: Place | None, known: Iterable[str]) -> tuple[TriggerConfig, ...]:
        triggers: list[TriggerConfig] = []
        seen: dict[object, Place] = {}
        for item in self._items(place):
            trigger = self._struct(item, TriggerConfig, aliases={"condition": "condition_function_id"})
            if trigger is None:
                continue
            for name in ("function_id", "id"):
                if getattr(trigger, name) == "":
                    key = join(item.path, name)
                    self._problems.add("expected a non-empty string", self._line_of(item, name), key)
            trigger = self._without_empty_lists(item, trigger)
            for name, problem in read_options(options_of(trigger))[1]:
                self._problems.add(problem, self._line_of(item, name), join(item.path, name))
            for name in ("function_id", "condition_function_id"):
                function_id = getattr(trigger, name)
                if function_id and function_id not in known:
                    self._problems.doubt(
                        f"no function {function_id!r} stands in `functions:`; until a worker or the program registers "
                        f"it, the events of this trigger fail{did_you_mean(function_id, known)}",
                        self._line_of(item, name),
                        join(item.path, name),
                    )
            twin = seen.setdefault(msgspec.json.encode(trigger) if trigger.id is None else trigger.id, item)
            if twin is not item:
                what = "this trigger" if trigger.id is None else f"trigger id {trigger.id!r}"
                where = f"on line {twin.line}" if twin.line else f"at `{twin.path}`"
                self._problems.add(
                    f"{what} stands {where} already; remove one or give it another id", item.line, item.path
                )
            triggers.append(trigger)
        return tuple(triggers)

    def _without_empty_lists(self, item: Place, trigger: TriggerConfig) -> TriggerConfig:
        """Report an empty list of a trigger. A list that is null counts as left out."""
        for name, meant in (("events", "kind"), ("fields", "field")):
            if getattr(trigger, name) == ():
                entries = item.node.entries if isinstance(item.node, Mapping) else ()
                if any(entry.key.content == name and isinstance(entry.value, Sequence) for entry in entries):
                    problem = f"an empty list would never fire; leave it out for every {meant}"
                    self._problems.add(problem, self._line_of(item, name), join(item.path, name))
                trigger = msgspec.structs.replace(trigger, **{name: None})
        return trigger

    def _scopes(self, place: Place | None) -> tuple[ScopeRule, ...]:
        rules: list[ScopeRule] = []
        for item in self._items(place):
            rule = self._struct(item, ScopeRule)
            if rule is None:
                continue
            if (rule.name is None) == (rule.prefix is None):
                found = "neither" if rule.name is None else "both"
                self._problems.add(f"give either `name` or `prefix`, found {found}", item.line, item.path)
            if rule.ttl_from is not None and not rule.ttl_ms:
                key = join(item.path, "ttl_from")
                self._problems.add("`ttl_from` has no effect without `ttl_ms`", self._line_of(item, "ttl_from"), key)
            elif not self._check_values(item, rule):
                pass
            elif all(getattr(rule, name) is None for name in _SAYS_SOMETHING):
                options = f"{', '.join(f'`{name}`' for name in _SAYS_SOMETHING[:-1])} or `{_SAYS_SOMETHING[-1]}`"
                self._problems.add(f"give {options}, found none", item.line, item.path)
            rules.append(rule)
        return tuple(rules)

    def _check_values(self, item: Place, rule: ScopeRule) -> bool:
        """Report options about values that do not go together in a rule; return whether there are none."""
        errors_before = len(self._problems.errors)
        if rule.type is not None and rule.schema is not None:
            key = join(item.path, "schema")
            self._problems.add("give `type` or `schema`, not both", self._line_of(item, "schema"), key)
        if rule.enforce is not None and rule.type is None and rule.schema is None:
            key = join(item.path, "enforce")
            self._problems.add(
                "`enforce` has no effect without `type` or `schema`", self._line_of(item, "enforce"), key
            )
        for name, problem in _mistakes_of_version(rule):
            self._problems.add(problem, self._line_of(item, name), join(item.path, name))
        return len(self._problems.errors) == errors_before

    def _type_ref(self, place: Place) -> TypeRef | None:
        node = place.node
        try:
            if isinstance(node, Scalar) and node.style == "native" and not isinstance(node.content, str | None):
                return type_ref(node.content)
            target = self._typed(place, _NAME)
            return None if target is None else import_type(str(target))
        except TargetError as error:
            self._unusable(place, error)
            return None

    def _schema_ref(self, place: Place) -> SchemaRef | None:
        node, files = place.node, self._problems.files
        try:
            if isinstance(node, Mapping):
                return inline_schema(self._json(place), place.path, self._source, files)  # type: ignore[arg-type]  # a mapping gives a dict
            if isinstance(node, Scalar) and isinstance(node.content, SchemaRef):
                return node.content
            path = self._typed(place, _NAME)
            folder = None if self._source is None else os.path.dirname(self._source)
            return None if path is None else read_schema(str(path), folder, files)
        except (BadSchema, ConfigError) as error:
            self._unusable(place, BadSchema(str(error)))
            return None

    def _limits(self, place: Place | None) -> LimitsConfig:
        if place is None or self._is_null(place):
            return LimitsConfig()
        return self._struct(place, LimitsConfig) or LimitsConfig()

    # Shapes and types.

    def _struct(self, place: Place, cls: type[_S], aliases: dict[str, str] | None = None) -> _S | None:
        """Read a mapping of scalars into `cls`; None if any part of it is wrong."""
        aliases = aliases or {}
        errors_before = len(self._problems.errors)
        declared = {field.encode_name: field for field in msgspec.structs.fields(cls)}
        values: dict[str, object] = {}
        for key, at in self._fields(place, (*declared, *aliases), removed=getattr(cls, "removed", {})).items():
            name = aliases.get(key, key)
            if name in values:
                both = sorted({name, *(alias for alias, meant in aliases.items() if meant == name)})
                self._problems.add(f"`{both[0]}` and `{both[1]}` mean the same; keep one of them", at.line, at.path)
                continue
            wanted = declared[name].type
            values[name] = self._secret(at, wanted) if name in _SECRETS else self._part(at, wanted)
        if isinstance(place.node, Mapping) or self._is_null(place):
            for name, field in declared.items():
                if field.required and name not in values:
                    self._problems.add(f"`{name}` is missing", place.line, join(place.path, name))
        return None if len(self._problems.errors) > errors_before else cls(**values)

    def _part(self, place: Place, wanted: Any) -> object:
        """Return the value of a field: a scalar, a mapping with fields of its own, or a list of either."""
        for kind in (wanted, *get_args(wanted)):
            if get_origin(kind) is tuple:  # an empty list stays one, even if the field may be left out
                return tuple(self._part(item, get_args(kind)[0]) for item in self._items(place))
        if wanted is TokenConfig:
            return self._token(place)
        if any(get_origin(kind) is dict for kind in get_args(wanted)):
            return None if self._is_null(place) else self._json(place)
        if FunctionRef in get_args(wanted):
            return None if self._is_null(place) else self._function_ref(place)
        if TypeRef in get_args(wanted):
            return None if self._is_null(place) else self._type_ref(place)
        if SchemaRef in get_args(wanted):
            return None if self._is_null(place) else self._schema_ref(place)
        for kind in (wanted, *get_args(wanted)):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                optional = kind is not wanted
                return None if optional and self._is_null(place) else self._struct(place, kind)
        return self._typed(place, wanted)

    def _secret(self, place: Place, wanted: object) -> object:
        """Read a password or token; if it looks like a number, the error must not show it."""
        if isinstance(place.node, Scalar):
            value = self._value(place, place.node)
            if value is None:
                return None
            if value.kind not in ("string", "null"):
                self._problems.add("expected a string; put it in quotes (it is not shown here)", place.line, place.path)
                return None
        return self._typed(place, wanted)

    def _token(self, place: Place) -> TokenConfig | None:
        """Read one token. Errors do not show it."""
        if isinstance(place.node, Scalar):
            value = self._value(place, place.node)
            token = full_token(str(value.value)) if value is not None and value.kind == "string" else None
            if value is not None and token is None:
                self._problems.add("a token is a string: put it in quotes", place.line, place.path)
        else:
            read = self._struct(place, TokenConfig)
            token = None if read is None else with_every_list(read)
        if token is not None and [token.token, token.env, token.file].count(None) != 2:
            self._problems.add("give one of `token`, `env` and `file`", place.line, place.path)
        elif token is not None and token.token is not None and not token.token.strip():
            self._problems.add("the token is empty", place.line, place.path)
        if token is not None and token.name is not None and not TOKEN_NAME.fullmatch(token.name):
            self._problems.add(
                "the name of a token has 1 to 100 letters, digits, `-`, `_` and `.`",
                place.line,
                join(place.path, "name"),
            )
        return token

    def _typed(self, place: Place, wanted: object) -> object:
        """Return the scalar's value if it is of the type `wanted`; else report it and return None."""
        if not isinstance(place.node, Scalar):
            self._problems.add(misfit_shape(wanted, _shape(place.node)), place.line, place.path)
            return None
        value = self._value(place, place.node)
        if value is None:
            return None
        problem = misfit(wanted, value)
        if problem is not None:
            self._problems.add(problem, place.line, place.path)
            return None
        return content(value)

    def _json(self, place: Place) -> object:
        """Return any JSON value."""
        if isinstance(place.node, Mapping):
            return {key: self._json(at) for key, at in self._fields(place, None).items()}
        if isinstance(place.node, Sequence):
            return [self._json(item) for item in self._items(place)]
        value = self._value(place, place.node)
        if value is None or value.kind in ("ambiguous", "other"):
            return None if value is None else self._typed(place, str)
        return content(value)

    def _value(self, place: Place, scalar: Scalar) -> Value | None:
        if scalar.style == "native":
            return resolve_native(scalar.content)
        try:
            return resolve_text(expand(scalar.content), scalar.style)
        except VariableError as error:
            self._problems.add(error.problem, place.line, place.path)
            return None

    def _is_null(self, place: Place) -> bool:
        """Tell whether a section is left empty. Any other scalar is reported when it is read."""
        if not isinstance(place.node, Scalar) or place.node.style == "quoted":
            return False
        if place.node.style == "native":
            return place.node.content is None
        try:
            return resolve_text(expand(place.node.content), "plain").kind == "null"
        except VariableError:
            return False

    def _fields(
        self,
        place: Place | None,
        known: Iterable[str] | None,
        what: str = "a mapping",
        removed: dict[str, str] | None = None,
    ) -> dict[str, Place]:
        """Return the keys and values of a mapping, {} without one. Keys that are not `known` are reported.

        `removed`: keys of earlier versions, with what to write instead.
        """
        if place is None or (place.path and self._is_null(place)):
            return {}
        if not isinstance(place.node, Mapping):
            self._misshapen(place, what)
            return {}
        fields: dict[str, Place] = {}
        for entry in place.node.entries:
            key = str(entry.key.content)
            at = Place(entry.value, entry.line, join(place.path, key))
            self._problems.lines[at.path] = at.line
            if removed and key in removed:
                self._problems.add(f"`{key}` is gone: {removed[key]}", at.line, at.path)
            elif known is not None and key not in known:
                self._unknown(at, key, known)
            elif known is None and (problem := misfit(_NAME, _key_value(entry.key))) is not None:
                self._problems.add(problem, at.line, at.path)
            else:
                fields[key] = at
        return fields

    def _items(self, place: Place | None) -> list[Place]:
        if place is None or self._is_null(place):
            return []
        if not isinstance(place.node, Sequence):
            self._misshapen(place, "a list")
            return []
        return [Place(item, item.line, f"{place.path}[{i}]") for i, item in enumerate(place.node.items)]

    def _misshapen(self, place: Place, what: str) -> None:
        """Report a node that is of another shape than `what`."""
        if isinstance(place.node, Scalar):
            value = self._value(place, place.node)
            if value is None:
                return
            found = value.found
        else:
            found = _shape(place.node)
        self._problems.add(f"expected {what}, found {found}", place.line, place.path or None)

    def _unknown(self, place: Place, key: str, known: Iterable[str]) -> None:
        if key == "<<":
            problem = "YAML merge keys are not read here; write the keys out"
        else:
            known = list(known)
            # The search for a similar word is slow: a file with many mistakes gets no suggestions.
            few = len(self._problems.errors) < _MAX_HINTS
            hint = (few and did_you_mean(key, known)) or f"; known here: {', '.join(known)}"
            problem = f"unknown key `{shorten(key, quote=False)}`{hint}"
        self._problems.add(problem, place.line, place.path)


def _mistakes_of_version(rule: ScopeRule) -> Iterator[tuple[str, str]]:
    """Yield the options about versions that do not go together in a rule."""
    if rule.version is None:
        for name in ("version_field", "upgrade"):
            if getattr(rule, name) is not None:
                yield name, f"`{name}` has no effect without `version`"
    else:
        if not rule.version_field:
            yield "version_field", "`version` needs the name of a field that has it, `version_field`"
        if rule.version > 1 and rule.upgrade is None:
            yield "upgrade", f"`version: {rule.version}` needs `upgrade`, for values of the versions before it"
    if rule.upgrade is not None:
        try:
            refuse_callback("upgrade", rule.upgrade.callable)
        except DeserializationError as error:
            yield "upgrade", str(error)


def _key_value(key: Scalar) -> Value:
    return resolve_native(key.content) if key.style == "native" else resolve_text(key.content, key.style)


def _shape(node: Mapping | Sequence) -> str:
    return "a mapping" if isinstance(node, Mapping) else "a list"
