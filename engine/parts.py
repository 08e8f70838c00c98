"""Make the parts of an engine from its configuration, and change them while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.backlog import Limits, Tally
from scopestate.actors.clock import Clock
from scopestate.actors.consumers import JournalConsumers
from scopestate.actors.consuming import Consumers
from scopestate.actors.containment import Log, contained
from scopestate.actors.directory import Directory, Housekeeper
from scopestate.actors.dispatcher import Dispatcher, ThreadDispatcher
from scopestate.actors.expiry import ExpiryActor
from scopestate.actors.functions import Function, Functions
from scopestate.actors.journal import History
from scopestate.actors.loops import LoopThread
from scopestate.actors.ports import Backend, ChangeSource, Store, WriteRule
from scopestate.actors.residence import Residence
from scopestate.actors.router import EventRouter
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.actors.services import HandlerServices
from scopestate.actors.snapshot import SnapshotActor
from scopestate.actors.value_rules import ValueRule
from scopestate.config import (
    AuthConfig,
    Config,
    FunctionRef,
    KvOptions,
    LimitsConfig,
    ServerConfig,
    TriggerConfig,
)
from scopestate.config.functions import misfit_id
from scopestate.config.schema import options_of
from scopestate.durable_triggers import DurableTriggers
from scopestate.errors import (
    ConfigError,
    EngineClosed,
    InvalidRegistration,
    ScopestateError,
    StorageError,
)
from scopestate.missed import fire_missed
from scopestate.opening import durable_mistakes, history_of, no_store_for, open_backend, sharing_for, write_rule_of
from scopestate.ops import polls
from scopestate.ops.functions import BUILT_IN, FLUSH
from scopestate.ops.results import DeliveryFailure
from scopestate.ops.triggers import Trigger, read_options
from scopestate.ops.turns import checked_length
from scopestate.persistence.local import LocalBackend
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.durable_attempt import Attempt

log: Final = Log("scopestate.engine")

Report = Callable[[DeliveryFailure], None]

CLAIM_S: Final = 2.0
"""Seconds that an engine, after opening the store, holds back the events that followers of the owner before were
handling."""
_RESTART_ONLY: Final = ("store_method", "file_path", "durability", "share", "connect_wait_ms")


class Parts:
    """The parts of one engine, connected to each other."""

    def __init__(
        self,
        config: Config,
        adapter: Store | Backend | None,
        dispatcher: Dispatcher | None,
        report: Report,
        tell_hooks: Report,
    ) -> None:
        """Raises ConfigError for a function that cannot be registered, StorageError if the store cannot be opened."""
        check_functions(config)  # first: an opened store would stay locked
        self.config = self._started = config
        limits = self.limits = Limits()
        self.dispatcher: Dispatcher = dispatcher or ThreadDispatcher()
        self.sharing = sharing_for(config, adapter)
        """Its part in sharing the directory; None: the directory is not shared."""
        self.backend = open_backend(config, adapter) if self.sharing is None else self.sharing.open()
        set_limits(self.limits, config.limits, self.backend)
        self.functions = Functions()
        self.loop_thread = LoopThread("scopestate-loop")
        self.services = HandlerServices(
            self.dispatcher, self.functions, self.limits, self.loop_thread, report, tell_hooks
        )
        self.router = EventRouter(self.services)
        self.clock = Clock(self.dispatcher)
        self.snapshot = SnapshotActor(self.dispatcher, config.adapter.kv.save_interval_ms / 1000, self.clock)
        self.directory = Directory(self._make_scope)
        self.expiry = ExpiryActor(self.dispatcher, self.clock, self.directory)
        self._around = Surroundings(
            self.dispatcher, limits, self.router, self.snapshot, self.directory, self.clock, self._rule_of, self.expiry
        )
        self.consumers: DurableTriggers | None = None
        """The consumers of durable triggers; None: the backend has no journal."""
        self.make_transaction: Callable[[Attempt, str], Any] | None = None
        """Makes the transaction of a delivery; set by the engine."""
        try:
            self._attach(self.backend)
            if self.sharing is not None and self.sharing.succeeds:
                self.router.feed.prime()
        except BaseException:
            self.backend.close()  # otherwise the store would stay locked
            raise
        self.housekeeper = Housekeeper(self.dispatcher, self.directory, self.limits)
        self.residence = Residence(self.dispatcher, self.directory, self.limits, self.snapshot)
        self._exclusive = Guard()
        self._ends = False
        self.polls_behind: Callable[[float], bool] = lambda active_s: False
        """Tells whether a poll would find changes; set by the engine, as the next two."""
        self.hold: Callable[[], object] = lambda: None
        """Called when the engine has got another backend."""
        self.take_over_watches: Callable[[ChangeSource], Callable[[], object]] = lambda before: lambda: None
        """Called before another backend makes scopes; the function that it returns is called when that backend does."""
        self.reconfigured: Callable[[Config], object] | None = None
        """Called after each reload; set by a server that applies changes of the file."""
        self.tally = {function_id: Tally() for function_id in (*BUILT_IN, polls.FUNCTION_ID, FLUSH)}

    def described(self) -> str:
        """Describe where the state is kept, without reading the disk and without passwords."""
        if self.sharing is not None:
            return f"{self.sharing.directory}, {self.sharing.role}"
        options = self.config.adapter.config
        if not isinstance(options, KvOptions):
            return options.described()
        if not isinstance(self.backend, LocalBackend):
            return f"adapter {type(self.backend).__name__}"
        store = self.backend.store
        return "in memory" if store is None else f"adapter {type(store).__name__}"

    def _attach(self, backend: Backend) -> None:
        """Make everything that depends on the backend, except the scopes, use this one. Raises StorageError."""
        store = backend.store
        journal = None if store is None else store.journal
        feed, snapshot = self.router.feed, self.snapshot
        if store is not None:
            self.clock.at_least(store.clock_ms)
        set_limits(self.limits, self.config.limits, backend)
        snapshot.keep_in(store, None if journal is None else feed)
        self.expiry.keep_in(store)
        self._around.keep_in(store)
        feed.connect(self._around.store_id, journal, self.clock.now_ms, self._history_of, backend.durability)
        if journal is not None:
            feed.save_soon = snapshot.save_soon
        consumers = self._open_consumers(backend)
        if consumers is not None and self.consumers is not None:
            self.consumers.use(consumers)
        elif consumers is not None:
            self.consumers = DurableTriggers(consumers, self.router.triggers, self.services, self.clock)
            self.consumers.make_transaction = self._make_transaction

    def _open_consumers(self, backend: Backend) -> Consumers | None:
        consumers, store = backend.consumers, backend.store
        if consumers is None and store is not None and store.journal is not None:
            consumers = self.snapshot.consumers = JournalConsumers(
                store.journal,
                self.router.feed,
                self.snapshot,
                self.dispatcher,
                self.clock.now_ms,
                backend.durability,
                self.limits,
                CLAIM_S if self.sharing is not None and self.sharing.succeeds else 0.0,
            )
        return consumers

    def await_claims(self, for_s: float | None = None) -> None:
        """See `JournalConsumers.await_claims`. From any thread."""
        consumers = self.snapshot.consumers
        if isinstance(consumers, JournalConsumers):
            consumers.await_claims(for_s)

    def _make_transaction(self, attempt: Attempt, scope: str) -> Any:
        assert self.make_transaction is not None  # no delivery happens before the engine exists
        return self.make_transaction(attempt, scope)

    def register(self, trigger: Trigger) -> None:
        """Register a trigger. Raises what a durable one may raise; see `DurableTriggers.register`."""
        if trigger.durable is None:
            self.router.triggers.register(trigger)
            self.backend.listen()
            return
        if self.consumers is None:
            raise ConfigError(no_store_for(trigger.durable))
        self.consumers.register(trigger)

    def _make_scope(self, scope: str) -> ScopeActor:
        checked_length("scope", scope, self.limits.longest_name)
        return self.backend.make_scope(scope, self._around)

    def _rule_of(self, scope: str) -> WriteRule:
        return write_rule_of(scope, self.config.scopes, self._around.misfits)

    def values_of(self, scope: str) -> ValueRule | None:
        """Return the rule of the configuration for the values of a scope; None: there is none."""
        return self._rule_of(scope).values

    def _history_of(self, scope: str) -> History | None:
        return history_of(scope, self.config.scopes)

    def _give_rule(self, actor: ScopeActor) -> None:
        actor.apply_rule(self._rule_of(actor.scope))

    def configure(self) -> None:
        """Register the configured functions and triggers, and start saving."""
        self._check_durable_triggers(self.config)
        self._apply_functions({})
        self._apply_triggers(None)
        self._start()
        self.housekeeper.arm()
        self.residence.arm()

    def _start(self) -> None:
        """Start what an attached backend needs."""
        self.backend.start(self._around)
        self.snapshot.start_interval()
        self.expiry.begin()

    # ------------------------------------------------------------------------------------------------- taking over

    @exclusive
    def take_over(self, backend: Backend) -> None:
        """Continue with another backend, which this engine has opened. The program's handles and triggers continue too.

        The old backend must be able to leave (`Backend.leave`), as a bridge is. On return new calls go to the new
        backend. Calls that had not begun go there too, in their order. So do reads, and writes with an idempotency key,
        whose answers were lost; other writes in progress fail as possibly applied.

        From any thread. Raises StorageError if the new backend fails at once, and EngineClosed if the engine closes:
        then nothing has changed, and the caller still owns the new backend.
        """
        before = self.backend
        if self._ends:
            raise EngineClosed
        try:
            self._attach(backend)
            self.router.feed.prime()
        except BaseException:
            self._attach(before)
            raise
        # From here on it cannot be undone. Failures are logged, and do not stop the rest.
        told: list[str | None] = []
        contained(lambda: told.append(before.leave()), "leaving the other engine", log)
        if told and told[0] is not None:
            contained(partial(fire_missed, self.router, told[0]), "telling triggers what they have missed", log)
        watches: list[Callable[[], object]] = []
        if before.changes is not None:
            prepare = partial(self.take_over_watches, before.changes)
            contained(lambda: watches.append(prepare()), "preparing watches", log)
        self.directory.exclusively(partial(self._use, backend))
        for actor in list(self.directory.values()):
            contained(partial(self._replace, actor), f"handing over scope {actor.scope!r}", log)
        if self.consumers is not None:
            contained(self.consumers.move, "moving durable triggers", log)
        for begin in (self._start, self.hold, *watches, before.close):
            contained(begin, "taking over from another engine", log)

    def scopes(self) -> list[str]:
        """Return the names of scopes, as `Backend.scopes`. If the backend is replaced meanwhile, ask the next one."""
        backend = self.backend
        try:
            return backend.scopes()
        except StorageError:
            now = self._exclusive.run(lambda: self.backend)
            if now is backend:
                raise
        return now.scopes()

    def _use(self, backend: Backend) -> None:
        self.backend = backend

    def _replace(self, actor: ScopeActor) -> None:
        """Replace an actor of the old backend by one of the new backend, which gets the waiting calls."""
        if actor.can_leave:
            successor = actor.run_alone(partial(self.directory.replace, actor))
            if successor is not None:
                successor.wake_anyway()

    @exclusive
    def end(self) -> None:
        """Keep the backend from now on, as the engine closes. Waits for a `take_over` in progress."""
        self._ends = True

    # ---------------------------------------------------------------------------------------------------- reload

    def reconfigure(self, config: Config) -> None:
        """Apply new functions, triggers, limits and save interval. Changes nothing if it raises ConfigError."""
        check_functions(config)
        self._check_durable_triggers(config)
        before = self._exclusive.run(self._apply, config)
        # Without the guard: a durable trigger may have to wait for the other engine, and a `take_over` must not.
        self._apply_functions(before.functions)
        self._apply_triggers(before)
        if self.reconfigured is not None:
            self.reconfigured(config)

    def _apply(self, config: Config) -> Config:
        """Apply what concerns the backend, and return the configuration before."""
        before = self.config
        self._log_what_waits(before, config)
        set_limits(self.limits, config.limits, self.backend)
        if config.adapter.kv.save_interval_ms != before.adapter.kv.save_interval_ms:
            self.snapshot.set_interval(config.adapter.kv.save_interval_ms / 1000)
        if config.limits != before.limits and self.consumers is not None:
            self.consumers.limits_changed()
        if config.limits.passivate_after_ms != before.limits.passivate_after_ms:
            self.housekeeper.arm()
        if config.limits.max_resident_bytes != before.limits.max_resident_bytes:
            self.residence.arm()
        self.config = config
        if config.scopes != before.scopes:
            self.directory.each(self._give_rule)
            self.router.feed.history_changed()
        return before

    def _log_what_waits(self, before: Config, config: Config) -> None:
        """Log the changes in the file that apply only from the next start."""

        def waits(read: Callable[[Config], object]) -> bool:
            return read(config) != read(before) and read(config) != read(self._started)

        if waits(lambda one: one.adapter.name if one.adapter.name == "kv" else one.adapter):
            log.warning("the new `adapter:` is used from the next start: a running engine cannot change it")
        for name in _RESTART_ONLY:
            if waits(attrgetter(f"adapter.kv.{name}")):
                log.warning("the new value of `%s` is used from the next start: a running store cannot change it", name)
        if waits(_durabilities):
            log.warning("the new `durability` of rules under `scopes:` is used from the next start")
        if waits(_server_but_tokens if self.reconfigured is not None else attrgetter("server")):
            log.warning("the new options of `iii-worker-manager` are used from the next start")

    def _apply_functions(self, before: Mapping[str, FunctionRef]) -> None:
        for function_id, reference in self.config.functions.items():
            self.functions.add(Function(function_id, reference.callable))
        for function_id in before.keys() - self.config.functions.keys():
            self.functions.discard(function_id, before[function_id].callable)

    def _apply_triggers(self, before: Config | None) -> None:
        """Register new triggers, unregister those that only `before` has. Unchanged ones keep their waiting events."""
        old = (
            {} if before is None else {trigger.trigger_id: trigger for trigger in configured_triggers(before.triggers)}
        )
        new = {trigger.trigger_id: trigger for trigger in configured_triggers(self.config.triggers)}
        for trigger_id, trigger in new.items():
            if old.get(trigger_id) != trigger:
                try:
                    self.register(trigger)
                except ScopestateError as error:
                    if before is None:
                        raise
                    # A durable trigger whose store failed. The engine and the other triggers run.
                    log.error("trigger %r was not changed by the reload: %s", trigger_id, error)  # noqa: TRY400 - the text says it all
                    continue
                self._warn_of_unknown_functions(trigger)
        # Triggers that the program has unregistered or replaced are left alone.
        running = {handler.trigger.trigger_id: handler.trigger for handler in self.router.triggers.handlers()}
        for trigger_id in old.keys() - new.keys():
            if running.get(trigger_id) == old[trigger_id]:
                with suppress(InvalidRegistration):  # it has just been unregistered
                    self.router.triggers.unregister(trigger_id)

    def _check_durable_triggers(self, config: Config) -> None:
        """Raise ConfigError for a durable trigger that this engine cannot have, before anything is changed."""
        for mistake in durable_mistakes(config):
            raise mistake
        for number, entry in enumerate(config.triggers):
            if entry.durable is not None and self.consumers is None:
                key = f"triggers[{number}].durable"
                raise ConfigError(no_store_for(entry.durable), file=config.source, key=key)

    def _warn_of_unknown_functions(self, trigger: Trigger) -> None:
        """Log a trigger whose function is not registered. That is allowed: it may be registered later."""
        for function_id in (trigger.function_id, trigger.condition_function_id):
            if function_id is not None and self.functions.find(function_id) is None:
                log.warning(
                    "trigger %r names the function %r, which is not registered yet: until it is, its events fail",
                    trigger.trigger_id,
                    function_id,
                )


def check_functions(config: Config) -> None:
    """Raise ConfigError for a function that cannot be registered, such as one that would replace a built-in one."""
    for function_id in config.functions:
        misfit = misfit_id(function_id)
        if misfit is not None:
            raise ConfigError(misfit, file=config.source, key=f"functions.{function_id}")


def configured_triggers(entries: Iterable[TriggerConfig]) -> list[Trigger]:
    """Return the triggers of a configuration. Without an id, a trigger gets one that is made from its content."""
    triggers: list[Trigger] = []
    made: Counter[str] = Counter()
    for entry in entries:
        trigger_id = entry.id
        # There are no mistakes: the entry was checked when the file was read.
        fields, _ = read_options(options_of(entry))
        if trigger_id is None:
            content = _content(entry, fields)
            made[content] += 1
            trigger_id = content if made[content] == 1 else f"{content}#{made[content]}"
        triggers.append(Trigger(trigger_id, entry.function_id, **fields))
    return triggers


def _content(entry: TriggerConfig, fields: Mapping[str, Any]) -> str:
    """Return what distinguishes triggers without an id.

    That is the consumer, or else the function and what is watched. So after a reload that changes how events are
    delivered, such as `order` or `debounce`, the trigger is recognised and keeps its waiting events.
    """
    if entry.durable is not None:
        return f"config:consumer:{entry.durable}"
    content = f"config:{entry.function_id}:{entry.scope!r}:{entry.key!r}:{entry.condition_function_id!r}"
    if entry.events is not None:
        content += f":{fields['events']!r}"
    for name in ("scope_prefix", "prefix", "only_if_changed", "fields"):
        if name in fields:
            content += f":{name}={fields[name]!r}"
    return content


def _durabilities(config: Config) -> list[tuple[str | None, str | None, str]]:
    return [(rule.name, rule.prefix, rule.durability) for rule in config.scopes if rule.durability is not None]


def _server_but_tokens(config: Config) -> ServerConfig | None:
    server = config.server
    return None if server is None else msgspec.structs.replace(server, auth=AuthConfig())


def set_limits(limits: Limits, config: LimitsConfig, backend: Backend) -> None:
    """Copy the configured limits into the running ones; milliseconds become seconds."""
    # A value that can never be saved must not be acknowledged.
    holds = backend.largest_value
    limits.max_value_bytes = min(config.max_value_bytes or holds, holds or config.max_value_bytes)
    limits.max_batch_bytes = config.max_batch_bytes
    limits.longest_name = backend.longest_name
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
    limits.journal_events = config.journal_events
    limits.journal_bytes = config.journal_bytes
    limits.journal_when_full = config.journal_when_full
    limits.close_grace_s = config.close_grace_ms / 1000
    limits.passivate_after_s = config.passivate_after_ms / 1000
    limits.max_resident_bytes = config.max_resident_bytes
