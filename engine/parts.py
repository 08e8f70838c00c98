"""Putting an engine together from its configuration, and changing a running one."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import msgspec

from scopestate.actors.commit import CommitScopeActor
from scopestate.actors.directory import Directory
from scopestate.actors.dispatcher import Dispatcher, ThreadDispatcher
from scopestate.actors.functions import Function, Functions
from scopestate.actors.handler import DeliveryFailure, HandlerServices, Trigger
from scopestate.actors.housekeeping import Housekeeper
from scopestate.actors.limits import Limits
from scopestate.actors.loop_thread import LoopThread
from scopestate.actors.router import TriggerRouter
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.actors.snapshot import SnapshotActor
from scopestate.config import (
    AuthConfig,
    Config,
    FunctionRef,
    LimitsConfig,
    ScopeRule,
    ServerConfig,
    TriggerConfig,
)
from scopestate.config.functions import misfit_id
from scopestate.errors import ConfigError, InvalidRegistration
from scopestate.opening import open_adapter
from scopestate.ops.messages import FUNCTION_IDS
from scopestate.ops.turns import checked_length
from scopestate.persistence import Adapter
from scopestate.stats import Tally

if TYPE_CHECKING:
    from scopestate.persistence.bridge.scopes import RemoteScopes
    from scopestate.persistence.redis.sharing import Arrivals, RedisScopes

log = logging.getLogger("scopestate.engine")

Report = Callable[[DeliveryFailure], None]

_RESTART_ONLY: Final = ("store_method", "file_path", "durability")


class Parts:
    """What one engine consists of, wired up."""

    def __init__(
        self, config: Config, adapter: Adapter | None, dispatcher: Dispatcher | None, report: Report, tell_hooks: Report
    ) -> None:
        """Raises ConfigError for a function that cannot be registered, StorageError if the store cannot be opened."""
        check_functions(config)  # before the store is opened, which would stay locked
        self.config = self._started = config
        self.limits = Limits()
        self.dispatcher: Dispatcher = dispatcher or ThreadDispatcher()
        self.adapter: Adapter = adapter or open_adapter(config.adapter)
        set_limits(self.limits, config.limits, self.adapter)
        self.functions = Functions()
        self.loop_thread = LoopThread("scopestate-loop")
        self.services = HandlerServices(
            self.dispatcher, self.functions, self.limits, self.loop_thread, report, tell_hooks
        )
        self.router = TriggerRouter(self.services)
        self.snapshot = SnapshotActor(self.dispatcher, self.adapter, config.adapter.kv.save_interval_ms / 1000)
        self.directory = Directory(self._make_scope)
        self._around = Surroundings(
            self.dispatcher, self.adapter, self.limits, self.router, self.snapshot, self.directory
        )
        self._elsewhere = _scopes_elsewhere(self.adapter, self.directory, self.router, self.dispatcher)
        self.arrivals: Arrivals | None = getattr(self._elsewhere, "arrivals", None)
        """What brings events that other engines fire too; None if all are fired here."""
        if self._elsewhere is not None and config.scopes:
            log.warning(
                "the rules under `scopes:` do nothing with the adapter %s: how long a write lasts is decided where the "
                "state is",
                config.adapter.name,
            )
        self.housekeeper = Housekeeper(self.dispatcher, self.directory, self.limits)
        self._rules = config.scopes
        self.reconfigured: Callable[[Config], object] | None = None
        """Called after each reload; set by a server that follows the file."""
        self.tally = {function_id: Tally() for function_id in FUNCTION_IDS}

    def is_kept(self, scope: str) -> bool:
        """False if the rules say `memory`: what the store has of such a scope is from before the rule."""
        return durability_of(scope, self._rules, "interval") != "memory"

    def _make_scope(self, scope: str) -> ScopeActor:
        checked_length("scope", scope, self.limits.longest_name)
        if self._elsewhere is not None:
            return self._elsewhere.make_scope(scope, self._around)
        if not self.adapter.keeps:
            return ScopeActor(scope, self._around, keeps=False)
        durability = durability_of(scope, self._rules, self.config.adapter.kv.durability)
        if durability == "commit":
            return CommitScopeActor(scope, self._around, keeps=True)
        return ScopeActor(scope, self._around, keeps=durability != "memory")

    def configure(self) -> None:
        """Register the configured functions and triggers, and begin to save."""
        self._apply_functions({})
        self._apply_triggers(None)
        if self.arrivals is not None:
            self.arrivals.start()
        self.snapshot.start_interval()
        self.housekeeper.arm()

    # ---------------------------------------------------------------------------------------------------- reload

    def reconfigure(self, config: Config) -> None:
        """Apply what can change live: functions, triggers, limits, the save interval. Raises ConfigError, unchanged."""
        before = self.config
        check_functions(config)
        self._log_what_waits(before, config)
        set_limits(self.limits, config.limits, self.adapter)
        if config.adapter.kv.save_interval_ms != before.adapter.kv.save_interval_ms:
            self.snapshot.set_interval(config.adapter.kv.save_interval_ms / 1000)
        if config.limits.passivate_after_ms != before.limits.passivate_after_ms:
            self.housekeeper.arm()
        self.config = config
        self._apply_functions(before.functions)
        self._apply_triggers(before)
        if self.reconfigured is not None:
            self.reconfigured(config)

    def _log_what_waits(self, before: Config, config: Config) -> None:
        """Log what differs from the last file and from what runs: it is used from the next start."""

        def waits(read: Callable[[Config], object]) -> bool:
            return read(config) != read(before) and read(config) != read(self._started)

        if waits(lambda one: one.adapter.name if one.adapter.name == "kv" else one.adapter):
            log.warning("the new `adapter:` is used from the next start: a running engine cannot change it")
        for name in _RESTART_ONLY:
            if waits(attrgetter(f"adapter.kv.{name}")):
                log.warning("the new value of `%s` is used from the next start: a running store cannot change it", name)
        if waits(attrgetter("scopes")):
            log.warning("the new `scopes:` rules are used from the next start")
        if waits(_server_but_tokens if self.reconfigured is not None else attrgetter("server")):
            log.warning("the new options of `iii-worker-manager` are used from the next start")

    def _apply_functions(self, before: Mapping[str, FunctionRef]) -> None:
        for function_id, reference in self.config.functions.items():
            self.functions.add(Function(function_id, reference.callable))
        for function_id in before.keys() - self.config.functions.keys():
            self.functions.discard(function_id, before[function_id].callable)

    def _apply_triggers(self, before: Config | None) -> None:
        """Register what is new, unregister what only `before` has. Unchanged triggers keep the events that wait."""
        old = (
            {} if before is None else {trigger.trigger_id: trigger for trigger in configured_triggers(before.triggers)}
        )
        new = {trigger.trigger_id: trigger for trigger in configured_triggers(self.config.triggers)}
        for trigger_id, trigger in new.items():
            if old.get(trigger_id) != trigger:
                self.router.register(trigger)
                self._warn_of_unknown_functions(trigger)
        # What the program has unregistered or replaced by now is its own.
        running = {handler.trigger.trigger_id: handler.trigger for handler in self.router.handlers()}
        for trigger_id in old.keys() - new.keys():
            if running.get(trigger_id) == old[trigger_id]:
                with suppress(InvalidRegistration):  # at this very moment
                    self.router.unregister(trigger_id)

    def _warn_of_unknown_functions(self, trigger: Trigger) -> None:
        """Log a trigger that names no function; that is allowed, code or a worker may register it later."""
        for function_id in (trigger.function_id, trigger.condition_function_id):
            if function_id is not None and self.functions.find(function_id) is None:
                log.warning(
                    "trigger %r names the function %r, which is not registered yet: until it is, its events fail",
                    trigger.trigger_id,
                    function_id,
                )


def check_functions(config: Config) -> None:
    """Raise ConfigError for a function that cannot be registered, as one that would replace a built-in one."""
    for function_id in config.functions:
        misfit = misfit_id(function_id)
        if misfit is not None:
            raise ConfigError(misfit, file=config.source, key=f"functions.{function_id}")


def configured_triggers(entries: Iterable[TriggerConfig]) -> list[Trigger]:
    """Return the triggers of a configuration. One without an id gets one made from its content, the same each time."""
    triggers: list[Trigger] = []
    made: Counter[str] = Counter()
    for entry in entries:
        trigger_id = entry.id
        if trigger_id is None:
            content = f"config:{entry.function_id}:{entry.scope!r}:{entry.key!r}:{entry.condition_function_id!r}"
            made[content] += 1
            trigger_id = content if made[content] == 1 else f"{content}#{made[content]}"
        triggers.append(Trigger(trigger_id, entry.function_id, entry.scope, entry.key, entry.condition_function_id))
    return triggers


def durability_of(scope: str, rules: Iterable[ScopeRule], default: str) -> str:
    """Return how long the writes of `scope` must last: by the first rule that fits, else `default`."""
    for rule in rules:
        if scope == rule.name or (rule.prefix is not None and scope.startswith(rule.prefix)):
            return rule.durability
    return default


def _server_but_tokens(config: Config) -> ServerConfig | None:
    server = config.server
    return None if server is None else msgspec.structs.replace(server, auth=AuthConfig())


def set_limits(limits: Limits, config: LimitsConfig, adapter: Adapter) -> None:
    """Copy the configured limits into the running ones; milliseconds become seconds."""
    # A value that can never be saved must not be acknowledged.
    holds = getattr(adapter, "largest_value", 0)
    limits.max_value_bytes = min(config.max_value_bytes or holds, holds or config.max_value_bytes)
    limits.longest_name = getattr(adapter, "longest_name", sys.maxsize)
    limits.scope_mailbox = config.scope_mailbox
    limits.scope_mailbox_bytes = config.scope_mailbox_bytes
    limits.handler_mailbox = config.handler_mailbox
    limits.handler_mailbox_bytes = config.handler_mailbox_bytes
    limits.events_bytes = config.events_bytes
    limits.handler_when_full = config.handler_when_full
    limits.handler_timeout_s = config.handler_timeout_ms / 1000
    limits.handler_attempts = config.handler_attempts
    limits.handler_backoff_s = config.handler_backoff_ms / 1000
    limits.max_event_depth = config.max_event_depth
    limits.call_timeout_s = config.call_timeout_ms / 1000 or None
    limits.close_grace_s = config.close_grace_ms / 1000
    limits.passivate_after_s = config.passivate_after_ms / 1000


def _scopes_elsewhere(
    adapter: Adapter, directory: Directory, router: TriggerRouter, dispatcher: Dispatcher
) -> RemoteScopes | RedisScopes | None:
    """Return what makes the scopes if `adapter` does not give them to this engine alone; else None."""
    if hasattr(adapter, "bulk_link"):
        from scopestate.persistence.redis.sharing import RedisScopes  # noqa: PLC0415 - as above

        return RedisScopes(adapter, router, dispatcher)
    if hasattr(adapter, "sequence_floor"):
        from scopestate.persistence.bridge.scopes import RemoteScopes  # noqa: PLC0415 - as above

        return RemoteScopes(adapter, directory, router)
    return None
