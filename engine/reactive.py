"""The reactive half of the engine: functions, triggers, and the hooks for failed deliveries."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Never, Protocol, TypeGuard, TypeVar, Unpack, overload

from scopestate.actors.consuming import BY_THE_PROGRAM, Consumers
from scopestate.actors.containment import Log, described, is_from_outside
from scopestate.actors.functions import Function, Functions, is_async, is_generator, misfit_of, running_loop
from scopestate.actors.router import EventRouter
from scopestate.actors.triggers import TriggerTable
from scopestate.errors import HandlerTimeout, InvalidRegistration
from scopestate.lifecycle import stay_ahead_of_executors
from scopestate.ops.deliveries import Delivery
from scopestate.ops.options import refuse_unknown
from scopestate.ops.results import DeliveryFailure, StateEvent, T
from scopestate.ops.triggers import OPTIONS, EventNames, Trigger, TriggerOptions, read_options
from scopestate.ops.value_types import value_type
from scopestate.ops.values import class_name, json_type

log = Log("scopestate.triggers")

F = TypeVar("F", bound=Callable[..., Any])
Hook = Callable[[DeliveryFailure], object]
R = TypeVar("R")


FAILURES_KEPT: Final = 100
"""How many of the newest failed deliveries are kept for the console."""
_LONGEST_ERROR: Final = 1_000


class FailureNote(NamedTuple):
    """A DeliveryFailure without its event and exception, which would keep values in memory."""

    time_ms: int
    """When it was reported, in milliseconds since the epoch."""
    trigger_id: str
    function_id: str
    scope: str
    key: str
    revision: int
    attempt: int
    final: bool
    error: str


class Registrar(Protocol[T]):
    """Registers a handler of a scope, plain or `async`, and returns it."""

    @overload
    def __call__(self, handler: Callable[[StateEvent[T | None]], R], /) -> Callable[[StateEvent[T | None]], R]: ...

    @overload
    def __call__(
        self, handler: Callable[[StateEvent[T | None], Delivery], R], /
    ) -> Callable[[StateEvent[T | None], Delivery], R]: ...

    @overload
    def __call__(
        self, handler: Callable[[list[StateEvent[T | None]]], R], /
    ) -> Callable[[list[StateEvent[T | None]]], R]: ...

    @overload
    def __call__(
        self, handler: Callable[[list[StateEvent[T | None]], Delivery], R], /
    ) -> Callable[[list[StateEvent[T | None]], Delivery], R]: ...

    @overload
    def __call__(self, handler: Callable[[Mapping[str, Any]], R], /) -> Callable[[Mapping[str, Any]], R]: ...


class Reactive:
    """Functions by id, and triggers that call them. Every method may be called from any thread."""

    _functions: Functions
    _router: EventRouter
    _hooks: dict[str, Hook | None]
    _failures: deque[FailureNote]
    """The newest failures of deliveries, the oldest first."""

    def _refuse_if_closed(self) -> None:
        """Raise EngineClosed if the engine no longer takes registrations."""

    def _register(self, trigger: Trigger) -> None:
        """Deliver the events of `trigger` from now on."""

    def _consumers(self) -> Consumers | None:
        """Return the consumers of durable triggers, if there can be any."""

    @overload
    def register_function(
        self, function_id: str, target: F, *, description: str | None = None, request: Any = None, response: Any = None
    ) -> F: ...

    @overload
    def register_function(
        self,
        function_id: str,
        target: None = None,
        *,
        description: str | None = None,
        request: Any = None,
        response: Any = None,
    ) -> Callable[[F], F]: ...

    def register_function(
        self,
        function_id: str,
        target: Any = None,
        *,
        description: str | None = None,
        request: Any = None,
        response: Any = None,
    ) -> Any:
        """Register a plain or `async` function of one argument, the payload. A function with the same id is replaced.

        Without `target` it is a decorator. A coroutine function belongs to the event loop that is running now, or to
        the engine's own. `request` and `response` are types, as for typed scopes, whose JSON schemas `functions()` and
        the server show; payloads and results are not checked against them. Raises InvalidRegistration for a built-in id
        or a target that is not callable, and DeserializationError for a type that is not one.
        """
        if target is None:
            return lambda function: self.register_function(
                function_id, function, description=description, request=request, response=response
            )
        self._refuse_if_closed()
        schemas = [None if kind is None else value_type(kind).json_schema() for kind in (request, response)]
        self._functions.add(Function(function_id, target, running_loop(), description, schemas[0], schemas[1]))
        stay_ahead_of_executors()
        return target

    def unregister_function(self, function_id: str) -> None:
        """Forget a function; its triggers stay, and their deliveries fail until it is back. Raises FunctionNotFound."""
        self._functions.remove(function_id)

    def functions(self) -> list[dict[str, Any]]:
        """Return a description of each function: the API reference's for the built-in ones."""
        from scopestate import catalogue  # noqa: PLC0415 - few programs need it

        return catalogue.functions(self._functions)

    # -------------------------------------------------------------------------------------------------- triggers

    def register_trigger(
        self,
        *,
        function_id: str,
        scope: str | None = None,
        key: str | None = None,
        condition_function_id: str | None = None,
        events: EventNames | None = None,
        trigger_id: str | None = None,
        config: object = ...,
        **options: Unpack[TriggerOptions],
    ) -> TriggerHandle:
        """Have a function called when a matching key changes. The function need not be registered yet.

        `scope` and `key` are exact; None matches everything. `events` names kinds of changes: "created", "updated",
        "deleted", "expired". The other options: `TriggerOptions` (docs/reference/triggers.md). `config` takes the raw
        object of the wire protocol instead of all these options. A trigger with the same `trigger_id` is replaced. The
        trigger sees every write that begins after this has returned. Raises InvalidRegistration
        (docs/reference/semantics.md, section 4).
        """
        _refuse_unknown_options("register_trigger()", options)
        filters = {
            "scope": scope,
            "key": key,
            "condition_function_id": condition_function_id,
            "events": events,
            **options,
        }
        if config is ...:
            config = filters
        elif any(value is not None for value in filters.values()):
            raise InvalidRegistration("give the filters either by name or as `config`, not both")
        self._refuse_if_closed()
        trigger = read_trigger(function_id, trigger_id, config)
        self._register(trigger)
        return TriggerHandle(self._router.triggers, trigger, self._consumers)

    def on_change(
        self,
        *misplaced: Never,
        scope: str | None = None,
        key: str | None = None,
        condition: str | Callable[..., Any] | None = None,
        events: EventNames | None = None,
        function_id: str | None = None,
        **options: Unpack[TriggerOptions],
    ) -> Registrar[Any]:
        """Decorate a handler: registers the function and a trigger for it, and returns the function unchanged.

        `events` names kinds of changes, such as `("created", "expired")`; None: all of them. `condition` is a function,
        or the id of one; only `False` skips the handler. The function id is made from the module and name, unless
        given. The other options: `TriggerOptions` (docs/reference/triggers.md). Raises InvalidRegistration for options
        that are wrong, before the function is registered, and for `@on_change` without parentheses.
        """
        if misplaced:
            raise InvalidRegistration(
                "on_change takes its filters by name: write `@engine.on_change(scope=..., key=...)`, "
                "or `@engine.on_change()` for every change"
            )

        _refuse_unknown_options("on_change()", options)
        filters = {"scope": scope, "key": key, "events": events, **options}
        read_trigger("checked before the function is there", None, filters)

        def register(handler: Any) -> Any:
            # The plain string of a subclass: the format of an Enum differs between Python versions.
            given = str.__str__(function_id) if isinstance(function_id, str) else function_id
            if options.get("durable") is not None and (misfit := misfit_of(handler)) is not None:
                raise InvalidRegistration(f"{_name_of(handler)}: {misfit}")
            name = given or self._functions.free_id(_name_of(handler))
            condition_id = condition if isinstance(condition, str) else None
            if callable(condition):
                condition_id = f"{name}::condition"
                self.register_function(condition_id, condition)
            self.register_function(name, handler)
            self.register_trigger(function_id=name, config={**filters, "condition_function_id": condition_id})
            return handler

        return register

    def triggers(self) -> list[TriggerHandle]:
        """Return all triggers, in order of registration."""
        table = self._router.triggers
        return [TriggerHandle(table, handler.trigger, self._consumers) for handler in table.handlers()]

    def trigger_types(self) -> list[dict[str, Any]]:
        """Return a description of each trigger type, as the API reference has it."""
        from scopestate import catalogue  # noqa: PLC0415 - few programs need it

        return catalogue.trigger_types()

    def on_error(self, hook: Hook) -> Hook:
        """Set the hook for failed attempts to deliver an event; may be used as a decorator. It runs on worker threads.

        Raises InvalidRegistration for a coroutine function: nothing would run what it returns.
        """
        self._hooks["error"] = checked_hook("on_error", hook)
        return hook

    def on_dead_letter(self, hook: Hook) -> Hook:
        """Set the hook for events that are given up; may be used as a decorator. It runs on worker threads.

        Raises as `on_error`.
        """
        self._hooks["dead letter"] = checked_hook("on_dead_letter", hook)
        return hook

    def _report(self, failure: DeliveryFailure) -> None:
        event = failure.event
        log.error(
            "event %d of scope %r, key %r%s: function %r of trigger %r %s: %s",
            event.revision, event.scope, event.key,
            f", and {failure.batched - 1} more of its batch" if failure.batched > 1 else "",
            failure.function_id, failure.trigger_id,
            _what_happened(failure),
            described(failure.error), exc_info=failure.error, extra=_facts(failure),
        )  # fmt: skip
        self._tell_hooks(failure)

    def _tell_hooks(self, failure: DeliveryFailure) -> None:
        event = failure.event
        self._failures.append(
            FailureNote(
                time.time_ns() // 1_000_000, failure.trigger_id, failure.function_id, event.scope, event.key,
                event.revision, failure.attempt, failure.final,
                f"{class_name(failure.error)}: {described(failure.error)}"[:_LONGEST_ERROR],
            )
        )  # fmt: skip
        for name, wanted in (("error", True), ("dead letter", failure.final)):
            hook = self._hooks[name]
            if hook is not None and wanted:
                try:
                    hook(failure)
                except BaseException as error:
                    if is_from_outside(error):
                        raise
                    log.exception("the %s hook failed", name, extra=_facts(failure))


def checked_hook(name: str, hook: Hook | None) -> Hook | None:
    """Return `hook`. Raises InvalidRegistration if it is not callable, or is a coroutine function."""
    given: object = hook  # the program may pass anything
    if given is None:
        return None
    if not callable(given):
        raise InvalidRegistration(f"{name} takes a function of one argument, not {type(given).__name__}")
    if is_async(given) or is_generator(given):
        raise InvalidRegistration(
            f"{name} takes a plain function: nothing would run the coroutine or generator that this one returns"
        )
    return hook


def _what_happened(failure: DeliveryFailure) -> str:
    if failure.final:
        return "failed"
    if issubclass(type(failure.error), HandlerTimeout):
        return f"is overdue at attempt {failure.attempt}"  # it is not known before its end whether it is tried again
    return f"failed at attempt {failure.attempt} and is tried again"


def _facts(failure: DeliveryFailure) -> dict[str, object]:
    """Return the attributes of the log record."""
    event = failure.event
    return {
        "scope": event.scope,
        "key": event.key,
        "revision": event.revision,
        "function_id": failure.function_id,
        "trigger_id": failure.trigger_id,
    }


class TriggerHandle:
    """A registered trigger."""

    def __init__(
        self, triggers: TriggerTable, trigger: Trigger, consumers: Callable[[], Consumers | None] = lambda: None
    ) -> None:
        self._triggers = triggers
        self._trigger = trigger
        self._consumers = consumers

    @property
    def trigger_id(self) -> str:
        """Its id: the given one, or a generated one."""
        return self._trigger.trigger_id

    @property
    def trigger(self) -> Trigger:
        """What it watches and calls."""
        return self._trigger

    def unregister(self) -> None:
        """Remove it: no call of its function begins after this has returned, and waiting events are dropped.

        Raises InvalidRegistration if it was already removed.
        """
        self._triggers.unregister(self.trigger_id)

    def pause(self) -> None:
        """Begin no calls of its function until `resume`; calls that have begun continue. May be called from any thread.

        Up to `handler_mailbox` events wait; after that `handler_when_full` applies, so with `block` writers wait too.
        `drain()` does not wait for these events; `close()` reports them as not delivered. The events of a durable
        trigger stay in the store, and the pause is kept for its consumer: it lasts over a restart. Raises
        InvalidRegistration if the trigger was removed, StorageError if the store cannot save the pause.
        """
        self._set_paused(True)

    def resume(self) -> None:
        """Continue after a pause, with the events that wait. Raises as `pause`."""
        self._set_paused(False)

    @property
    def paused(self) -> bool:
        """True if it is paused, by the program or, if it is durable, by the engine. False if it was removed."""
        name, consumers = self._trigger.durable, self._consumers()
        if name is not None and consumers is not None:
            return dict(consumers.states()).get(name) is not None
        handler = self._triggers.handler(self.trigger_id)
        return handler is not None and handler.paused

    def _set_paused(self, paused: bool) -> None:
        handler = self._triggers.handler(self.trigger_id)
        if handler is None:
            raise InvalidRegistration(
                f"no trigger has the id {self.trigger_id!r}; it may have been unregistered before"
            )
        name, consumers = self._trigger.durable, self._consumers()
        if name is not None and consumers is not None:
            if paused:
                consumers.pause(name, BY_THE_PROGRAM)
            else:
                consumers.resume(name)
        elif paused:
            handler.pause()
        else:
            handler.go_on()

    def __repr__(self) -> str:
        state = ", paused" if self.paused else ""
        return f"<TriggerHandle {self.trigger_id!r} -> {self._trigger.function_id!r}{state}>"


def _name_of(handler: Callable[..., Any]) -> str:
    """Return the module and name of a function."""
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    return f"{getattr(handler, '__module__', None) or 'python'}::{name}"


def read_trigger(
    function_id: object,
    trigger_id: object,
    config: object,
) -> Trigger:
    """Read a trigger from the arguments of a caller or the wire (docs/reference/semantics.md, section 4).

    `config` is the raw config object: each of its fields is an option (`ops.triggers.read_options`), or null or absent
    for its default. Other fields are ignored with a warning, because a misspelt one makes a catch-all trigger. Raises
    InvalidRegistration for any other mistake; then nothing is registered.
    """
    if not _is_text(function_id) or not str.__len__(function_id):
        raise InvalidRegistration(f"a trigger needs a function_id, a non-empty string, not {_shown(function_id)}")
    if trigger_id is not None and (not _is_text(trigger_id) or not str.__len__(trigger_id)):
        raise InvalidRegistration(f"a trigger_id is a non-empty string, not {_shown(trigger_id)}")
    if not isinstance(config, Mapping):
        raise InvalidRegistration(f"a trigger's config is an object, not {json_type(config)}; for no filters pass {{}}")
    try:
        given = {str.__str__(name) if isinstance(name, str) else f"{name!r:.80}": config[name] for name in config}
    except Exception as error:
        # A mapping class of the program whose methods raise.
        raise InvalidRegistration(f"reading a trigger's config failed with {class_name(error)}") from error
    fields, mistakes = read_options(given)
    if mistakes:
        raise InvalidRegistration(mistakes[0][1])
    unknown = sorted(name for name in given if name not in OPTIONS)
    if unknown:
        log.warning(
            "trigger for function %r: field(s) %s are not known and ignored; known are %s",
            str.__str__(function_id),
            ", ".join(unknown),
            ", ".join(OPTIONS),
        )
    made_id = str.__str__(trigger_id) if trigger_id is not None else str(uuid.uuid4())
    return Trigger(made_id, str.__str__(function_id), **fields)


def _refuse_unknown_options(call: str, options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that triggers do not have."""
    unknown = [name for name in options if name not in TriggerOptions.__optional_keys__]
    if unknown:
        refuse_unknown(call, unknown, TriggerOptions)


def _is_text(name: object) -> TypeGuard[str]:
    """Tell whether `name` is a string. isinstance is not used: it trusts the `__class__` of a mock."""
    return issubclass(type(name), str)


def _shown(name: object) -> str:
    """Describe an object that was given instead of a name, without calling its `repr`, which may do anything."""
    return '""' if _is_text(name) else json_type(name)
