"""Open the place where the scopes of an engine are kept. No other module depends on which kind of place it is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from scopestate.actors.consumers import no_memory_for
from scopestate.actors.journal import History
from scopestate.actors.ports import NO_RULE, Backend, Durability, Store, WriteRule
from scopestate.actors.reply import deliver
from scopestate.actors.value_rules import Misfits, ValueRule
from scopestate.config import AdapterConfig, BridgeOptions, Config, KvOptions, RedisOptions, ScopeRule
from scopestate.config.schema import TriggerConfig
from scopestate.errors import ConfigError, InvalidCursor, StoreLocked
from scopestate.lifecycle import wait_for_dropped
from scopestate.ops.cursors import read_start
from scopestate.ops.turns import TtlRule
from scopestate.ops.value_types import ValueType, value_type
from scopestate.ops.versions import Upgrade, Versions
from scopestate.persistence.local import LocalBackend
from scopestate.sharing import Sharing

if TYPE_CHECKING:
    from scopestate.persistence.bridge.backend import BridgeBackend
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.sqlite.adapter import FileAdapter

log = logging.getLogger("scopestate.engine")


def load_libraries(config: AdapterConfig) -> None:
    """Import what an adapter needs beyond the base installation. Raises ConfigError if its extra is not installed."""
    match config.config:
        case BridgeOptions():
            try:
                import scopestate.persistence.bridge.backend  # noqa: PLC0415 - brings asyncio and a WebSocket library
            except ImportError as error:
                raise ConfigError(str(error), key="adapter.name") from error
        case RedisOptions():
            try:
                import scopestate.persistence.redis.backend  # noqa: F401, PLC0415 - brings redis-py, which takes 100 ms
            except ImportError as error:
                raise ConfigError(
                    f"the redis adapter needs redis-py and hiredis ({error}): pip install 'scopestate[redis]'",
                    key="adapter.name",
                ) from error


def open_backend(config: Config, given: Store | Backend | None = None) -> Backend:
    """Open the backend that the configuration names, or use the one that the program gives.

    Raises ConfigError, and StorageError if it cannot be opened.
    """
    if isinstance(given, Backend):
        return given
    store: object = given  # the program may pass anything
    if store is not None and not isinstance(store, Store):
        raise ConfigError(
            f"`adapter` is a Store or a Backend of scopestate.persistence, not {type(store).__name__}; inherit from one"
        )
    options = config.adapter.config
    if given is None and isinstance(options, BridgeOptions | RedisOptions):
        if any(rule.durability is not None for rule in config.scopes):
            log.warning(
                "`durability` under `scopes:` has no effect with the adapter %s: how long a write lasts is decided "
                "where the state is",
                config.adapter.name,
            )
        if isinstance(options, BridgeOptions) and any(_is_about_writes(rule) for rule in config.scopes):
            log.warning(
                "`ttl_ms`, `strict`, `type`, `schema` and `version` under `scopes:` have no effect with the adapter "
                "bridge: the other engine's configuration applies"
            )
        return open_shared(config.adapter)
    return LocalBackend(given, partial(durability_of, rules=config.scopes, otherwise=config.adapter.kv.durability))


def sharing_for(config: Config, given: Store | Backend | None) -> Sharing | None:
    """Return the object that opens and shares the engine's directory; None if it shares none."""
    kv = config.adapter.config
    if given is not None or not isinstance(kv, KvOptions) or kv.store_method != "file_based":
        return None
    return Sharing(config, partial(durability_of, rules=config.scopes, otherwise=kv.durability))


def open_for_tool(config: Config) -> Backend | None:
    """Open a directory for a moment, or follow the engine that has it open; None: the configuration has none.

    While the tool has it open, engines wait for its end. Raises StorageError.
    """
    kv = config.adapter.config
    if not isinstance(kv, KvOptions) or kv.store_method != "file_based":
        return None
    return Sharing(config, partial(durability_of, rules=config.scopes, otherwise=kv.durability), tool=True).open()


def durable_mistakes(config: Config) -> Iterator[ConfigError]:
    """Yield the mistakes in durable triggers of a configuration that can be found without opening anything."""
    first: dict[str, int] = {}
    for number, entry in enumerate(config.triggers):
        if entry.durable is None:
            continue
        key = f"triggers[{number}]."
        problem = _refused_durable(config, entry)
        if problem is not None:
            yield ConfigError(problem, file=config.source, key=key + "durable")
        other = first.setdefault(entry.durable, number)
        if other != number:
            problem = f"triggers[{other}] has the name {entry.durable!r} already: a name belongs to one durable trigger"
            yield ConfigError(problem, file=config.source, key=key + "durable")
        if entry.start not in (None, "now", "earliest"):
            try:
                read_start(entry.start)
            except InvalidCursor as error:
                yield ConfigError(str(error), file=config.source, key=key + "start")


def _refused_durable(config: Config, entry: TriggerConfig) -> str | None:
    options = config.adapter.config
    if isinstance(options, BridgeOptions):
        return f"a bridge has no durable triggers: register {entry.durable!r} in the other engine, as a worker"
    if isinstance(options, RedisOptions):
        return None if options.shares_events else no_store_for(entry.durable)
    if options.store_method != "file_based":
        return no_store_for(entry.durable)
    if entry.scope is not None and durability_of(entry.scope, config.scopes, options.durability) == "memory":
        return no_memory_for(entry.scope)
    return None


def no_store_for(consumer: str | None) -> str:
    """Return why an engine has no consumers."""
    return (
        f"the durable trigger {consumer!r} needs a store that outlives the process: give the adapter kv "
        "`store_method: file_based`, or the adapter redis `events: shared`; or leave out `durable`"
    )


def durability_of(scope: str, rules: Iterable[ScopeRule], otherwise: Durability) -> Durability:
    """Return the durability of `scope`: that of the first matching rule that has one, or `otherwise`."""
    for rule in _fitting(scope, rules):
        if rule.durability is not None:
            return rule.durability
    return otherwise


def write_rule_of(scope: str, rules: Sequence[ScopeRule], misfits: Misfits) -> WriteRule:
    """Return the options of the rules for writes of `scope`, each from the first matching rule that has it.

    `misfits` counts values that do not fit and are written nevertheless.
    """
    ttl_ms = strict = None
    from_creation = False
    for rule in _fitting(scope, rules):
        if ttl_ms is None and rule.ttl_ms is not None:
            ttl_ms, from_creation = rule.ttl_ms, rule.ttl_from == "create"
        if strict is None:
            strict = rule.strict
    values = value_rule_of(scope, rules, misfits)
    if not ttl_ms and not strict and values is None:
        return NO_RULE
    return WriteRule(TtlRule(ttl_ms, from_creation) if ttl_ms else None, bool(strict), values)


def value_rule_of(scope: str, rules: Iterable[ScopeRule], misfits: Misfits) -> ValueRule | None:
    """Return the options of the rules for values of `scope`; None: there are none."""
    for rule in _fitting(scope, rules):
        kind = type_in(rule)
        if kind is None and rule.version is None:
            continue
        return ValueRule(scope, kind, misfits, _versions_in(rule), refuses=rule.enforce != "warn")
    return None


def _versions_in(rule: ScopeRule) -> Versions | None:
    if rule.version is None:
        return None
    asked = (rule.version, rule.version_field or "", None if rule.upgrade is None else rule.upgrade.callable)
    try:
        return _versions(*asked)
    except TypeError:  # a callable object that is not hashable
        return Versions(*asked)


@functools.lru_cache(maxsize=256)
def _versions(version: int, field: str, upgrade: Upgrade | None) -> Versions:
    """Return the same object for all scopes of a rule: making one takes longer than making a scope."""
    return Versions(version, field, upgrade)


def type_in(rule: ScopeRule) -> ValueType[Any] | None:
    """Return the type or schema that a rule requires of values; None: anything fits."""
    if rule.schema is not None:
        return rule.schema.schema
    return None if rule.type is None else value_type(rule.type.type)


def history_of(scope: str, rules: Iterable[ScopeRule]) -> History | None:
    """Return how many changes of `scope` are kept, by the first matching rule with `history`; None: no changes."""
    for rule in _fitting(scope, rules):
        if rule.history is not None:
            return rule.history.limits()
    return None


def _is_about_writes(rule: ScopeRule) -> bool:
    return any(option is not None for option in (rule.ttl_ms, rule.strict, rule.type, rule.schema, rule.version))


def _fitting(scope: str, rules: Iterable[ScopeRule]) -> Iterator[ScopeRule]:
    for rule in rules:
        if scope == rule.name or (rule.prefix is not None and scope.startswith(rule.prefix)):
            yield rule


def open_store(kv: KvOptions) -> FileAdapter:
    """Open a store of files. Raises StorageError."""
    from scopestate.persistence.sqlite.adapter import FileAdapter  # noqa: PLC0415 - SQLite takes 12 ms to import

    try:
        return FileAdapter(kv.file_path)
    except StoreLocked:
        # Perhaps it is held by an engine that the program has dropped and that is just being closed.
        if not wait_for_dropped():
            raise
        return FileAdapter(kv.file_path)


def open_shared(adapter: AdapterConfig) -> BridgeBackend | RedisBackend:
    """Open a backend that other programs also use: Redis or another engine. Raises ConfigError and StorageError."""
    load_libraries(adapter)
    if isinstance(adapter.config, BridgeOptions):
        from scopestate.persistence.bridge.backend import BridgeBackend  # noqa: PLC0415 - see load_libraries

        return BridgeBackend(adapter.config)  # it connects in the background
    assert isinstance(adapter.config, RedisOptions)
    from scopestate.persistence.redis.backend import RedisBackend  # noqa: PLC0415 - see load_libraries

    return RedisBackend(adapter.config, deliver)
