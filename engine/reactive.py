"""The reactive half of the engine: functions, triggers, and the hooks for what goes wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never, TypeVar, overload

from scopestate import catalogue
from scopestate.actors.containment import Log, described, is_from_outside
from scopestate.actors.functions import Function, Functions, is_async, is_generator, running_loop
from scopestate.actors.reports import DeliveryFailure
from scopestate.actors.router import EventRouter
from scopestate.errors import InvalidRegistration
from scopestate.lifecycle import stay_ahead_of_executors
from scopestate.triggers import TriggerHandle, read_trigger

log = Log("scopestate.triggers")

F = TypeVar("F", bound=Callable[..., Any])
Hook = Callable[[DeliveryFailure], object]


class Reactive:
    """Functions by id, and triggers that call them. Every method may be called from any thread."""

    _functions: Functions
    _router: EventRouter
    _hooks: dict[str, Hook | None]

    def _refuse_if_closed(self) -> None:
        """Raise EngineClosed if the engine takes no more registrations."""

    @overload
    def register_function(self, function_id: str, target: F, *, description: str | None = None) -> F: ...

    @overload
    def register_function(
        self, function_id: str, target: None = None, *, description: str | None = None
    ) -> Callable[[F], F]: ...

    def register_function(self, function_id: str, target: Any = None, *, description: str | None = None) -> Any:
        """Register a plain or `async` function of one argument, the payload; the same id again replaces it.

        Without `target` it is a decorator. A coroutine function belongs to the event loop that is running now, or to
        the engine's own. Raises InvalidRegistration for a built-in id or what is not callable.
        """
        if target is None:
            return lambda function: self.register_function(function_id, function, description=description)
        self._refuse_if_closed()
        self._functions.add(Function(function_id, target, running_loop(), description))
        stay_ahead_of_executors()
        return target

    def unregister_function(self, function_id: str) -> None:
        """Forget a function; its triggers stay, and their deliveries fail until it is back. Raises FunctionNotFound."""
        self._functions.remove(function_id)

    def functions(self) -> list[dict[str, Any]]:
        """Return a description of each function: the API reference's for the built-in ones."""
        return catalogue.functions(self._functions)

    # -------------------------------------------------------------------------------------------------- triggers

    def register_trigger(
        self,
        *,
        function_id: str,
        scope: str | None = None,
        key: str | None = None,
        condition_function_id: str | None = None,
        trigger_id: str | None = None,
        config: object = ...,
    ) -> TriggerHandle:
        """Have a function called when a matching key changes. It need not be registered yet.

        Filters are exact; None matches everything. Instead of them, `config` takes the raw object that the wire has.
        The same `trigger_id` again replaces. The trigger sees every write that begins after this has returned.
        Raises InvalidRegistration (docs/semantics.md, section 4).
        """
        filters = {"scope": scope, "key": key, "condition_function_id": condition_function_id}
        if config is ...:
            config = filters
        elif any(value is not None for value in filters.values()):
            raise InvalidRegistration("give the filters either by name or as `config`, not both")
        self._refuse_if_closed()
        trigger = read_trigger(function_id, trigger_id, config)
        self._router.triggers.register(trigger)
        return TriggerHandle(self._router.triggers, trigger)

    def on_change(
        self,
        *misplaced: Never,
        scope: str | None = None,
        key: str | None = None,
        condition: str | Callable[..., Any] | None = None,
        function_id: str | None = None,
    ) -> Callable[[F], F]:
        """Decorate a handler: registers the function and a trigger for it, and returns the function unchanged.

        `condition` is a function, or the id of one; only `False` skips the handler. The function id is made from the
        module and name, unless given. Raises InvalidRegistration for `@on_change` without parentheses.
        """
        if misplaced:
            raise InvalidRegistration(
                "on_change takes its filters by name: write `@engine.on_change(scope=..., key=...)`, "
                "or `@engine.on_change()` to hear of every change"
            )

        def register(handler: F) -> F:
            # Of a subclass, what it holds: an Enum's own format differs between versions of Python.
            given = str.__str__(function_id) if isinstance(function_id, str) else function_id
            name = given or catalogue.made_id(handler, self._functions)
            condition_id = condition if isinstance(condition, str) else None
            if callable(condition):
                condition_id = f"{name}::condition"
                self.register_function(condition_id, condition)
            self.register_function(name, handler)
            self.register_trigger(function_id=name, scope=scope, key=key, condition_function_id=condition_id)
            return handler

        return register

    def triggers(self) -> list[TriggerHandle]:
        """Return all triggers, in order of registration."""
        return [TriggerHandle(self._router.triggers, handler.trigger) for handler in self._router.triggers.handlers()]

    def trigger_types(self) -> list[dict[str, Any]]:
        """Return a description of each trigger type, as the API reference has it."""
        return catalogue.trigger_types()

    def on_error(self, hook: Hook) -> Hook:
        """Set the hook for failed attempts to deliver an event; also as a decorator. Runs on worker threads.

        Raises InvalidRegistration for a coroutine function: nothing would run what it returns.
        """
        self._hooks["error"] = checked_hook("on_error", hook)
        return hook

    def on_dead_letter(self, hook: Hook) -> Hook:
        """Set the hook for events that are given up; also as a decorator. Runs on worker threads.

        Raises as `on_error`.
        """
        self._hooks["dead letter"] = checked_hook("on_dead_letter", hook)
        return hook

    def _report(self, failure: DeliveryFailure) -> None:
        event = failure.event
        log.error(
            "event %d of scope %r, key %r: function %r of trigger %r %s: %s",
            event.sequence, event.scope, event.key, failure.function_id, failure.trigger_id,
            "failed" if failure.final else f"failed at attempt {failure.attempt} and is tried again",
            described(failure.error), exc_info=failure.error, extra=_facts(failure),
        )  # fmt: skip
        self._tell_hooks(failure)

    def _tell_hooks(self, failure: DeliveryFailure) -> None:
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
    """Return `hook`. Raises InvalidRegistration if it cannot be called, or calling it would run nothing."""
    given: object = hook  # whatever the program passed
    if given is None:
        return None
    if not callable(given):
        raise InvalidRegistration(f"{name} takes a function of one argument, not {type(given).__name__}")
    if is_async(given) or is_generator(given):
        raise InvalidRegistration(
            f"{name} takes a plain function: nothing would run the coroutine or generator that this one returns"
        )
    return hook


def _facts(failure: DeliveryFailure) -> dict[str, object]:
    """What a log handler may read from the record."""
    event = failure.event
    return {
        "scope": event.scope,
        "key": event.key,
        "sequence": event.sequence,
        "function_id": failure.function_id,
        "trigger_id": failure.trigger_id,
    }
