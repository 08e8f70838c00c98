"""The engine: scoped key-value state in this process, and functions that react when it changes."""

from __future__ import annotations

import builtins
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import pykka

from scopestate import lifecycle
from scopestate.acknowledging import TransactionOfDelivery
from scopestate.actors.backlog import HandlerFull, no_room
from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback, run_callback
from scopestate.actors.consuming import Consumers
from scopestate.actors.dispatcher import Dispatcher
from scopestate.actors.functions import Function
from scopestate.actors.ports import Backend, ChangeSource, Store
from scopestate.actors.reply import PatientReply, Reply, Told
from scopestate.actors.snapshot import Flush
from scopestate.calls import Caller
from scopestate.closing import Closing, forked
from scopestate.config import Config, ConfigWatcher, from_mapping, load, validate
from scopestate.consumer_functions import EVERYTHING, ConsumerFunctions
from scopestate.consumers import DeadLetters, EngineConsumers
from scopestate.draining import drain, refuse_on_loop_of_handlers
from scopestate.errors import (
    ConfigError,
    ConnectionLost,
    EngineClosed,
    NotConnected,
    Overloaded,
    ReplyTimeout,
    StorageError,
    WouldDeadlock,
)
from scopestate.handles import PlainScope, Scope
from scopestate.mapping import ScopeMapping
from scopestate.ops import checked, messages, polls, turns
from scopestate.ops.arguments import answer_of, delete_turn, set_turn, turn_of, update_turn
from scopestate.ops.consumer_functions import CONSUMER_FUNCTIONS
from scopestate.ops.functions import BUILT_IN, FLUSH, from_payload, read_flush, read_request
from scopestate.ops.options import DeleteOptions, SetOptions, UpdateOptions, WatchOptions
from scopestate.ops.results import SetResult, T, UpdateResult
from scopestate.ops.triggers import Trigger
from scopestate.ops.turns import checked_name, refuse_size
from scopestate.ops.update_ops import AnyOp
from scopestate.ops.values import decode, encode
from scopestate.ops.writes import Durable
from scopestate.parts import Parts
from scopestate.polled_watching import Polled, watch_now
from scopestate.polls import Polls
from scopestate.reactive import FAILURES_KEPT, Hook, Reactive, checked_hook
from scopestate.snapshots import REFUSED, Call, Snapshots
from scopestate.state import StateCalls
from scopestate.stats import Health, Stats, check_health, measure
from scopestate.watch_settings import WatchSettings
from scopestate.watching import Changes
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.aio import AioEngine
    from scopestate.observing import Observer
    from scopestate.typed_results import OnInvalid

A = TypeVar("A")


class Engine(Reactive, StateCalls):
    """Scoped key-value state with reactive triggers; `aio` has the same calls for asyncio.

    Every method may be called from any thread and from handlers. Each call takes effect in one step, and every later
    call sees it. Errors are `ScopestateError`s. What differs between scopes in memory, in files, in Redis and behind a
    bridge is in the docstrings, and in a table in docs/reference/state.md.
    """

    _observer: Observer | None = None
    """Set while the engine is observed: see `scopestate.observing`."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        on_error: Hook | None = None,
        on_dead_letter: Hook | None = None,
        adapter: Store | Backend | None = None,
        dispatcher: Dispatcher | None = None,
        handle_sigterm: bool = True,
    ) -> None:
        """Open an engine. Without a config it keeps everything in memory only.

        `on_error` is called with a DeliveryFailure for each failed attempt to deliver an event, and for each event that
        reached no handler; `on_dead_letter` is called only when the event is given up. Both run on worker threads.
        `adapter` and `dispatcher` replace the configured ones. With `handle_sigterm`, if the backend keeps the state,
        SIGTERM and SIGHUP close the engine before they end the process; if the program handles SIGTERM itself,
        everything is saved before its handler runs.

        Raises ConfigError, and StorageError if the store cannot be opened.
        """
        given: object = config  # the program may pass anything
        if given is not None and not isinstance(given, Config):
            raise ConfigError(
                f"Engine() takes a Config, not {type(given).__name__}: for a file or a mapping use "
                "Engine.from_config(...)"
            )
        checked_hook("on_error", on_error)
        checked_hook("on_dead_letter", on_dead_letter)
        self._failures = deque(maxlen=FAILURES_KEPT)
        parts = Parts(config or Config(), adapter, dispatcher, self._report, self._tell_hooks)
        self._parts = parts
        self._limits = parts.limits
        self._scopes = parts.directory
        self._router = parts.router
        self._snapshot = parts.snapshot
        self._functions = parts.functions
        self._tally = parts.tally
        self._count_set = parts.tally["state::set"].add
        self._count_get = parts.tally["state::get"].add
        self._count_delete = parts.tally["state::delete"].add
        self._count_update = parts.tally["state::update"].add
        self._hooks: dict[str, Hook | None] = {"error": on_error, "dead letter": on_dead_letter}
        self._caller = Caller(parts.services)
        self._snapshots = Snapshots(parts.dispatcher)
        self._polls = Polls(self)
        self._polled: dict[int, weakref.ref[Polled]] = {}
        """The watches that poll another engine."""
        self._hubs: list[Any] = []
        """The hub of each server of this engine (`server/hub.py`); it knows the server's workers."""
        self._closing = Closing(parts)
        self._watcher: ConfigWatcher | None = None
        self._forked = False
        self._aio: AioEngine | None = None
        self._consumer_functions = ConsumerFunctions(lambda: parts.consumers)
        self._add_built_in()
        parts.make_transaction = partial(TransactionOfDelivery, self)
        parts.polls_behind = self._polls.are_behind
        parts.hold = partial(lifecycle.hold_backend, self)
        parts.take_over_watches = self._take_over_watches
        self._begin(handle_sigterm=handle_sigterm)

    def _begin(self, *, handle_sigterm: bool) -> None:
        """Start working, once all parts are made."""
        try:
            self._parts.configure()
            if self._parts.sharing is not None:
                self._parts.sharing.start(self)
        except BaseException:
            self._closing.close(0.0)  # the caller gets no engine that it could close
            raise
        lifecycle.watch_over(self)
        if handle_sigterm and self._parts.backend.keeps:
            lifecycle.close_on_signals()

    def _take_over_watches(self, before: ChangeSource) -> Callable[[], object]:
        """Prepare the watches that poll, before this engine takes over the scopes; return what resumes them."""
        from scopestate.own_changes import OwnChanges  # noqa: PLC0415 - asyncio takes 20 ms; it is loaded by now

        watches = [watch for ref in list(self._polled.values()) if (watch := ref()) is not None]
        for watch in watches:
            watch.prepare()

        def go_on() -> None:
            source = OwnChanges(self)
            before.hand_over(source)
            for watch in watches:
                watch.go_on(source)

        return go_on

    def _add_built_in(self) -> None:
        for function_id in BUILT_IN:
            self._functions.add(Function(function_id, partial(self._call_builtin, function_id), builtin=True))
        self._functions.add(Function(polls.FUNCTION_ID, self._poll, builtin=True))
        self._functions.add(Function(FLUSH, self._call_flush, builtin=True))
        for row in CONSUMER_FUNCTIONS:
            called = partial(self._call_consumers, row.function_id)
            self._functions.add(Function(row.function_id, called, builtin=True))

    @property
    def aio(self) -> AioEngine:
        """The same calls as coroutines, which never block the event loop."""
        # Not a `cached_property`: its access to `__dict__` would make every later attribute read slower (20 ns in each
        # call of the engine).
        made = self._aio
        if made is None:
            from scopestate.aio import AioEngine  # noqa: PLC0415 - asyncio takes 20 ms to import

            made = self._aio = AioEngine(self)
        return made

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
        *,
        watch: bool = True,
        on_error: Hook | None = None,
        on_dead_letter: Hook | None = None,
        handle_sigterm: bool = True,
    ) -> Self:
        """Open an engine from a YAML file, a mapping of the same shape, a Config, or nothing (in memory).

        A file is watched, unless `watch` is false. A valid change is applied while the engine runs; an invalid one is
        logged and changes nothing. Raises ConfigError (file, line, key) and StorageError.
        """
        if isinstance(source, Config):
            validate(source)
            config: Config | None = source
        elif source is None:
            config = None
        elif isinstance(source, (str, os.PathLike)):
            config = load(source)
        else:
            config = from_mapping(source)
        engine = cls(config, on_error=on_error, on_dead_letter=on_dead_letter, handle_sigterm=handle_sigterm)
        if watch and isinstance(source, (str, os.PathLike)):
            engine._watch(source)
        return engine

    def _watch(self, path: str | os.PathLike[str]) -> None:
        here = weakref.ref(self)  # the watcher's thread must not keep an engine that was dropped

        def apply(config: Config) -> None:
            engine = here()
            if engine is not None:
                engine.reconfigure(config)

        self._watcher = ConfigWatcher(path, apply, lambda _: None, running=self._parts.config)  # it logs
        self._watcher.start()

    def reconfigure(self, config: Config) -> None:
        """Apply the settings that can change while the engine runs: functions, triggers, limits, `save_interval_ms`.

        Raises EngineClosed, and ConfigError if a function would replace a built-in one. Changes that need a restart are
        logged.
        """
        self._refuse_if_closed()
        self._parts.reconfigure(config)

    # --------------------------------------------------------------------------------------------- the functions

    def set(self, scope: str, key: str, value: object, **options: Unpack[SetOptions]) -> SetResult:
        """Set a value: any JSON value, None included. Fires `state:created` or `state:updated`.

        Options (`SetOptions` says what each means): `if_revision` or `if_absent` for a condition, which raises Conflict
        if it does not hold; `ttl`, `expires_at` or `keep_ttl` for the deadline (by default it is cleared, or set by the
        rule of the scope); `durable`; `idempotency_key`.

        Raises InvalidValue (with the path of what JSON cannot hold), ValueTooLarge, StorageError `SET_ERROR`,
        Overloaded, ReplyTimeout and EngineClosed. After an error nothing was written, with two exceptions: after
        ReplyTimeout the write may still be made; in Redis and behind a bridge it may have been made if the cause of the
        StorageError is ConnectionLost or CallTimeout.
        """
        if options:
            return self._set_with(scope, key, value, options)
        if IN_CALLBACK:
            refuse_in_callback()
        data = encode(value)
        limit = self._limits.max_value_bytes
        if limit:
            refuse_size(scope, key, data, limit)
        self._count_set()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        turn = turns.Set(key, data)
        try:
            return self._scopes[scope].run(turn)
        except HandlerFull as full:
            return self._run_when_room(scope, turn, full)

    def _set_with(self, scope: str, key: str, value: object, options: SetOptions) -> SetResult:
        if IN_CALLBACK:
            refuse_in_callback()
        data = encode(value)
        limit = self._limits.max_value_bytes
        if limit:
            refuse_size(scope, key, data, limit)
        self._count_set()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        turn, durable = set_turn(key, data, options)
        if durable is not None:
            return self._run_with(scope, turn, durable)
        try:
            return self._scopes[scope].run(turn)
        except HandlerFull as full:
            return self._run_when_room(scope, turn, full)

    def get(self, scope: str, key: str, default: Any = None) -> Any:
        """Return a new copy of a value, or `default` if the key does not exist. A stored null is None.

        Raises StorageError `GET_ERROR` if the scope cannot be loaded, if Redis or the other engine cannot be reached,
        or if the value in Redis is not JSON; ReplyTimeout, Overloaded and EngineClosed.
        """
        if IN_CALLBACK:
            refuse_in_callback()
        self._count_get()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if type(key) is not str:
            key = checked_name("key", key)
        actor = self._scopes[scope]
        values = actor.readable
        if values is not None:
            actor.touched = True
            data = values.get(key)
            if data is not None and actor.readable is values:
                return decode(data)
        # Either only a turn can tell, or the key does not exist, or no key can have this name.
        key = checked_name("key", key)
        if values is None or actor.readable is not values:
            data = actor.run(turns.Get(key))
        return default if data is None else decode(data)

    def delete(self, scope: str, key: str, **options: Unpack[DeleteOptions]) -> Any:
        """Delete a key and return the value it had, or None if it did not exist. Fires `state:deleted` in both cases.

        Options: `if_revision`, `durable`, `idempotency_key`. Raises StorageError `DELETE_ERROR`, Overloaded,
        ReplyTimeout and EngineClosed, as `set` does.
        """
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        if options:
            turn_with, durable = delete_turn(key, **options)
            return self._run(scope, turn_with, durable).old_value
        if IN_CALLBACK:
            refuse_in_callback()
        self._count_delete()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        turn = turns.Delete(key)
        try:
            data = self._scopes[scope].run(turn)
        except HandlerFull as full:
            data = self._run_when_room(scope, turn, full)
        return None if data is None else decode(data)

    def update(self, scope: str, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]) -> UpdateResult:
        """Apply ops to a value in one step: structs of `scopestate.ops`, or dicts with the same fields.

        An op that does not fit the value is skipped and reported in `errors`; the others are applied
        (docs/reference/semantics.md 3). A missing key starts as `{}`. Fires `state:created` or `state:updated`. Raises
        DeserializationError for an invalid op, ValueTooLarge if the new value exceeds the limit, StorageError
        `UPDATE_ERROR`, and what `set` raises. In Redis the update is computed again if another engine changes the key;
        after `update_attempts` attempts it fails.

        The options are those of `set`, except that the deadline stays unless a new one is given; and `atomic=True`,
        which raises UpdateRefused instead of skipping an op, and then writes nothing.
        """
        if options:
            turn_with, durable = update_turn(checked_name("key", key), ops, **options)
            return self._run(scope, turn_with, durable)
        if IN_CALLBACK:
            refuse_in_callback()
        self._count_update()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        turn = turns.Update(key, checked(ops))
        try:
            return self._scopes[scope].run(turn)
        except HandlerFull as full:
            return self._run_when_room(scope, turn, full)

    def list(self, scope: str) -> builtins.list[Any]:
        """Return all values of a scope, without their keys; [] if it has none.

        In memory and in files the order is that in which the keys were first set. In Redis values are sorted by key,
        and a value that is not JSON is left out. Through a bridge the order is that of the other engine. Raises
        StorageError `LIST_ERROR`, ReplyTimeout, Overloaded and EngineClosed.
        """
        if IN_CALLBACK:
            refuse_in_callback()
        self._tally["state::list"].add()
        actor = self._scopes[checked_name("scope", scope)]
        everything = actor.values_now()
        if everything is None:
            everything = actor.run(turns.List())
        return [decode(data) for data in everything]

    def list_groups(self) -> builtins.list[str]:
        """Return the names of the scopes that hold at least one key, sorted by their UTF-8 bytes.

        The scopes are not read at one moment: a scope that is created or emptied meanwhile may be missing or included.
        Through a bridge to iii 0.11.6, scopes whose last key was deleted may be included. Raises StorageError
        `LIST_GROUPS_ERROR` and EngineClosed.
        """
        self._tally["state::list_groups"].add()
        parts = self._parts
        self._refuse_if_closed()
        try:
            # Memory first, then the backend: a scope that leaves memory in between has been saved by then.
            in_memory = {actor.scope: actor.holds_keys() for actor in list(parts.directory.values())}
            groups = {scope for scope, holds in in_memory.items() if holds}
            known = [scope for scope, holds in in_memory.items() if holds is not None]
            groups.update(set(parts.scopes()).difference(known))
        except StorageError as error:
            reason = error.__cause__
            cause = reason if isinstance(reason, NotConnected | ConnectionLost) else error
            # A scope of which a part is in memory reports that one of its own calls has failed.
            problem = reason if isinstance(reason, StorageError) and error.code != StorageError.code else error
            raise StorageError(f"Failed to list groups: {problem}", code="LIST_GROUPS_ERROR") from cause
        return sorted(groups)

    def watch(
        self, scope: str | None = None, scope_prefix: str | None = None, **options: Unpack[WatchOptions]
    ) -> Changes:
        """Watch a scope, or all scopes with a prefix, or all scopes: an iterator of their changes, for `with`.

        It begins with the existing entries (`Change.initial`), unless `since` or `snapshot=False` is given. Then each
        change comes once, in the order in which the changes were made, without a gap; those of one transaction follow
        one another. Writers do not wait for the watch. Options (`WatchOptions` says what each means): `key`, `prefix`,
        `events`, `snapshot`, `since`, `values`, `latest`, `buffer`, `on_compacted`, `known`, `markers`.

        A change of a `commit` scope comes when it is on disk, a change of an `interval` scope when it is made. A cursor
        stays valid for 60 s after the watch has ended, or for as long as the rule `history` of the scopes says; in a
        store of files that includes restarts.

        Raises Compacted if the changes after `since` are gone, InvalidCursor, DeserializationError for arguments that
        make no sense, Unsupported if the scopes are kept in a place that has no watch, and what `get` raises. Through a
        bridge WatchOverrun is never raised: a watch that is not read for a minute needs `history` in the other engine.
        """
        return watch_now(self, WatchSettings(scope, scope_prefix, options))

    @overload
    def scope(self, scope: str) -> PlainScope: ...

    @overload
    def scope(self, scope: str, *, type: builtins.type[T], on_invalid: OnInvalid = "raise") -> Scope[T]: ...

    @overload
    def scope(self, scope: str, *, type: Any, on_invalid: OnInvalid = "raise") -> Scope: ...

    def scope(self, scope: str, *, type: Any = None, on_invalid: OnInvalid = "raise") -> Scope[Any]:  # noqa: A002 - as msgspec, pydantic and attrs name it
        """Return a handle on one scope, which need not exist.

        With `type` its values are of that type: a msgspec Struct, a dataclass, a TypedDict, an attrs class, a pydantic
        model, or what is made of these (docs/how-to/typed-scopes.md). They are stored as JSON. A write through this
        handle whose result does not fit raises SchemaViolation and writes nothing; other handles may still write
        anything. `on_invalid` says what reading a value that does not fit does: "raise" (SchemaViolation), "skip" (as
        if the key did not exist; it is logged), or a function of key, plain value and SchemaViolation that returns the
        value to use instead.
        """
        name = checked_name("scope", scope)
        if type is None:
            return PlainScope(self, name)
        from scopestate.typed import typed_scope  # noqa: PLC0415 - only programs that give types need it

        return typed_scope(self, name, type, on_invalid)

    def schema(self, scope: str) -> dict[str, Any] | None:
        """Return the JSON schema that the configuration of this engine has for the values of a scope, or None.

        For a type, the schema is generated from it. In a follower or behind a bridge the rule of the other engine
        applies.
        """
        rule = self._parts.values_of(checked_name("scope", scope))
        return None if rule is None else rule.json_schema()

    def mapping(self, scope: str) -> ScopeMapping:
        """Return a scope as a `collections.abc.MutableMapping` of keys to values. See `ScopeMapping`."""
        return self.scope(scope).mapping()

    # ------------------------------------------------------------------------------------------------- messages

    @overload
    def ask(self, message: messages.Message, *, block: Literal[False], timeout: float | None = None) -> Reply[Any]: ...

    @overload
    def ask(self, message: messages.Message, *, block: Literal[True] = True, timeout: float | None = None) -> Any: ...

    def ask(self, message: messages.Message, *, block: bool = True, timeout: float | None = None) -> Any:
        """Send a message and return its answer, which is what the method of the same name returns.

        With `block=False`, return a future at once (`get`, `await`). `timeout` is in seconds, by default
        `call_timeout_ms`; when it is over, ReplyTimeout is raised, and a write may still be made.
        """
        if isinstance(message, messages.ListGroups):
            groups = self.list_groups()
            if block:
                return groups
            settled: Reply[Any] = Reply()
            settled.set(groups)
            return settled
        reply = self._send(message, PatientReply, waits=block)
        if not block:
            return reply
        timeout_s = self._limits.call_timeout_s if timeout is None else timeout
        try:
            return reply.get(timeout=timeout_s)
        except pykka.Timeout as error:
            reply.abandoned = True
            raise ReplyTimeout(getattr(message, "scope", ""), timeout_s or 0.0) from error

    def tell(self, message: messages.Message) -> None:
        """Send a message without waiting. A later refusal is logged.

        Raises at once if `message` is not a message, if its value is not JSON, and if the engine is closed.
        """
        _ = self._send(message, Told, waits=False)  # the answer is not read

    def _send(self, message: messages.Message, kind: type[PatientReply], *, waits: bool) -> PatientReply:
        self._refuse_if_closed()
        turn, durable = turn_of(message, self._limits, run_callback)
        self._tally[turn.function_id].add()
        scope = checked_name("scope", message.scope)  # type: ignore[union-attr]  # ListGroups is handled before
        if durable is not None:
            turn = self._scopes[scope].with_durability(turn, durable)
        reply = kind(self._router, self._scopes, scope, lambda answer: answer_of(message, answer))
        actor = self._scopes[scope]
        actor.send(reply.wrap(turn))
        if not waits:
            actor.keep_order()
        return reply

    # ------------------------------------------------------------------------------------------------- functions

    def call(self, function_id: str, payload: object = None) -> Any:
        """Call a built-in or registered function by its id, with JSON data as input and result.

        A plain function runs on this thread, a coroutine function on its event loop while this thread waits, and a
        function of a worker in that worker. Raises FunctionNotFound, DeserializationError, FunctionFailed (its cause is
        what the function raised), SerializationError, and for a built-in function what the method of the same name
        raises.
        """
        function = self._functions.get(function_id)
        if function.builtin and not function.is_async:  # a server's `engine::*` functions run on its event loop
            return function.target(payload)
        self._refuse_if_closed()
        return self._caller.call(function, payload)

    def _call_builtin(self, function_id: str, payload: object) -> Any:
        row = BUILT_IN[function_id]
        fields = row.plain_fields(payload)
        if fields is not None:
            return row.plain(getattr(self, row.method)(*fields))
        if row.read is None:
            from_payload(function_id, payload)
            return {"groups": self.list_groups()}
        call = self._builtin_call(function_id, payload)
        text = call.answer_at_hand()
        if text is not None:
            self._refuse_if_closed()
            self._tally[function_id].add()
        else:
            request = call.request
            try:
                text = call.answer(self._run(request.scope, request.turn, request.durable))
            except REFUSED as error:
                text = call.refusal(error)
        return None if text is None else decode(text)

    def _poll(self, payload: object) -> Any:
        self._refuse_if_closed()
        self._tally[polls.FUNCTION_ID].add()
        return decode(self._polls.answer(payload))

    def _call_flush(self, payload: object) -> None:
        read_flush(payload)
        self.flush()

    def _call_consumers(self, function_id: str, payload: object) -> Any:
        self._refuse_if_closed()
        return self._consumer_functions.call(EVERYTHING, function_id, payload)

    def _builtin_call(self, function_id: str, payload: object) -> Call:
        """Read the input of a built-in function on one scope. Raises what `read_request` raises."""
        request = read_request(function_id, payload, self._limits)
        return Call(BUILT_IN[function_id], request, self._snapshots)

    # ------------------------------------------------------------------------------------------------ waiting

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every event fired so far has been handled, and every event that those handlers fired.

        In Redis with `events: shared` it waits for the events of this engine's own writes; another engine with the same
        durable trigger may still be handling some of them (docs/how-to/from-one-process-to-many.md). Through a bridge
        with `events: remote` it waits for the events of all earlier writes, by any engine. With durable triggers
        everything is saved first; their retries are waited for if they are due within a second.

        `timeout` is in seconds. Raises ReplyTimeout, which names the triggers that are behind; StorageError if what
        durable triggers wait for cannot be saved, or if the other engine cannot be reached; and WouldDeadlock where it
        would wait for itself: in a handler, and on an event loop that runs handlers (use `await engine.aio.drain()`
        there).
        """
        self._refuse_if_drained()
        refuse_on_loop_of_handlers(self._parts, "drain")
        drain(self._parts, timeout)

    def _refuse_if_drained(self) -> None:
        """Raise what `drain` raises when the engine is closed or forked."""
        if IN_CALLBACK:
            refuse_in_callback()
        if self._forked:
            raise forked()
        if self._closing.done:
            raise EngineClosed

    def flush(self) -> None:
        """Wait until everything acknowledged so far is on disk, apart from scopes that are kept in memory only.

        Through a bridge it waits until the other engine has saved, if that engine is scopestate. In Redis it returns at
        once: the server does the saving. Raises StorageError if saving fails now, or if the other engine ends before it
        has confirmed the save, and WouldDeadlock in a signal handler that has interrupted a turn whose write must be
        saved.
        """
        self._refuse_if_closed()
        self._snapshot.refuse_in_turns()
        self._tally[FLUSH].add()
        self._parts.backend.flush()
        self._snapshot.ask(Flush()).get()

    def stats(self) -> Stats:
        """Return counts since the engine was made, and sizes now."""
        return measure(self._parts)

    def health(self) -> Health:
        """Return whether the engine works as it should, and its problems if not."""
        return check_health(self._parts, closed=self._closing.done, forked=str(forked()) if self._forked else None)

    # ------------------------------------------------------------------------------------------------- closing

    @property
    def closed(self) -> bool:
        """True once the engine refuses calls."""
        return self._closing.begun or self._forked

    def __repr__(self) -> str:
        parts: Parts | None = getattr(self, "_parts", None)
        if parts is None:
            return "<Engine: not opened>"
        state = "closed" if self.closed else "open"
        return f"<Engine: {parts.described()}; {state}, {len(parts.directory):,} scopes in use>"

    def close(self) -> None:
        """Close the engine: refuse calls, save, deliver events for at most `close_grace_ms`, save, release the store.

        Idempotent; a second thread waits for the first. In a handler it returns at once, and the engine closes when
        that handler has ended; a signal handler that has interrupted a call of this engine is treated the same. Raises
        StorageError if the last save failed: then everything is still in memory, and `close()` can be called again.
        Raises WouldDeadlock on an event loop that runs handlers: use `await engine.aio.close()` there. In a forked
        child it does nothing.
        """
        self._close(None)

    def _close(self, grace_s: float | None) -> None:
        """Close as `close` does, with a grace time of its own. None: the configured one."""
        if self._forked or self._closing.done:
            return
        if event_depth.get():
            self._close_behind_this()
            return
        refuse_on_loop_of_handlers(self._parts, "close")
        try:
            self._close_now(grace_s)
        except WouldDeadlock:
            self._close_behind_this()

    def __del__(self) -> None:
        """Save and release everything, with a ResourceWarning, if the engine was dropped without close()."""
        closing = getattr(self, "_closing", None)
        if closing is not None and not closing.done and not self._forked and hasattr(self, "_watcher"):
            lifecycle.close_dropped(self)

    def _close_behind_this(self) -> None:
        """Close on another thread, which first waits for the turn or handler that runs on this one."""
        threading.Thread(target=self._close_now, name="scopestate-close", daemon=True).start()

    def _close_now(self, grace_s: float | None = None) -> None:
        if self._watcher is not None:
            self._watcher.stop()
        self._closing.close(grace_s)
        lifecycle.release(self)

    def disown(self) -> None:
        """In a forked child: refuse every call. The store and the threads belong to the parent."""
        self._forked = True
        if self._parts.sharing is not None:
            self._parts.sharing.disown()
        self._parts.clock.disown()
        self._parts.expiry.end()
        self._scopes.disown(forked)
        self._router.triggers.disown()
        self._router.feed.disown()

    def consumers(self) -> EngineConsumers:
        """Return the consumers of durable triggers: iterate over their status, or call `pause`, `resume` or `forget`.

        All consumers in the store are included, also those without a trigger in this program. Without a journal it is
        empty.
        """
        return EngineConsumers(self)

    def dead_letters(self, consumer: str | None = None) -> DeadLetters:
        """Return the events that durable triggers have given up, of one consumer or all: `list`, `get`, `replay`,
        `purge`, `count`."""
        return DeadLetters(self, consumer)

    def _register(self, trigger: Trigger) -> None:
        self._parts.register(trigger)

    def _consumers(self) -> Consumers | None:
        return self._parts.consumers

    def _refuse_if_closed(self) -> None:
        if IN_CALLBACK:
            refuse_in_callback()
        if self._forked:
            raise forked()
        if self._closing.done or (self._closing.begun and not event_depth.get()):
            raise EngineClosed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aio.close()

    # ------------------------------------------------------------------------------------------- the slower ways

    def _run(self, scope: str, turn: turns.Turn[A], durable: bool | None = None) -> A:
        """Count a turn, run it, and wait for its answer; with `durable=True` until the write is on disk.

        Raises what the turn raises, Unsupported if it cannot be durable, Overloaded, ReplyTimeout and EngineClosed.
        """
        if IN_CALLBACK:
            refuse_in_callback()
        self._tally[turn.function_id].add()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if durable is not None:
            return self._run_with(scope, turn, durable)
        try:
            return self._scopes[scope].run(turn)
        except HandlerFull as full:
            return self._run_when_room(scope, turn, full)

    def _run_with(self, scope: str, turn: turns.Turn[A], durable: bool) -> A:
        turn = self._scopes[scope].with_durability(turn, durable)
        try:
            return self._run_once(scope, turn)
        except HandlerFull as full:
            return self._run_when_room(scope, turn, full)

    def _run_once(self, scope: str, turn: turns.Turn[A]) -> A:
        actor = self._scopes[scope]
        return actor.send_and_wait(turn) if type(turn) is Durable else actor.run(turn)

    def _run_when_room(self, scope: str, turn: turns.Turn[A], full: HandlerFull) -> A:
        """Run `turn` when the handler that `full` names has caught up."""
        dispatcher, backlog = self._parts.dispatcher, self._router.backlog
        timeout_s = self._limits.call_timeout_s
        deadline = None if timeout_s is None else dispatcher.monotonic() + timeout_s
        while True:
            # Requested before the next attempt, so that room made in between is not missed.
            room: Reply[Any] = dispatcher.reply()
            backlog.when_room(room.set)
            try:
                answer = self._run_once(scope, turn)
                backlog.stop_waiting(room.set)
                return answer
            except HandlerFull as still:
                full = still
            try:
                room.get(timeout=None if deadline is None else deadline - dispatcher.monotonic())
            except pykka.Timeout:
                backlog.stop_waiting(room.set)
                backlog.refused.add()
                raise Overloaded(no_room(scope, full)) from full
