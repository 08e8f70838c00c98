"""The durable triggers of one engine: the handler of each consumer, and the calls about consumers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from scopestate.actors.consuming import Consumers, ConsumerStatus, DeadLetter
from scopestate.actors.containment import Log
from scopestate.actors.durable import DurableHandler
from scopestate.errors import EngineClosed, NotConnected, ScopestateError, StorageError
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.clock import Clock
    from scopestate.actors.durable_attempt import Attempt
    from scopestate.actors.services import HandlerServices
    from scopestate.actors.shared_consumer import SharedConsumer
    from scopestate.actors.triggers import TriggerTable
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

A = TypeVar("A")


class DurableTriggers(Consumers):
    """The consumers of the backend, with the handlers that take their events in this engine.

    Methods may be called from any thread.
    """

    def __init__(self, consumers: Consumers, table: TriggerTable, services: HandlerServices, clock: Clock) -> None:
        self._consumers = consumers
        self._table = table
        self._services = services
        self._clock = clock
        self._exclusive = Guard()
        self._handlers: dict[str, DurableHandler] = {}
        self.make_transaction: Callable[[Attempt, str], Any] | None = None
        """Makes the transaction of a delivery; set by the engine."""

    @exclusive
    def register(self, trigger: Trigger, call: Callable[[str, Attempt], Any] | None = None) -> DurableHandler:
        """Register a durable trigger. One with the same name is replaced: its consumer, and what waits, are kept.

        `call(function_id, attempt)` calls its function and its condition, instead of the handler. Raises ConfigError,
        InvalidRegistration, InvalidCursor, Compacted and StorageError; nothing is changed then.
        """
        name = trigger.durable
        assert name is not None  # the caller has checked
        handler, consumers = self._handlers.get(name), self._consumers
        port = consumers.open(name, trigger)
        if handler is not None and handler.active and handler.trigger.function_id != trigger.function_id:
            log.warning(
                "consumer %r has the function %r instead of %r: a name belongs to one durable trigger; if both "
                "should get the events, give each its own name",
                name,
                trigger.function_id,
                handler.trigger.function_id,
            )
        if handler is None:
            handler = DurableHandler(trigger, self._services, port, self._clock)
            handler.make_transaction = self.make_transaction
        self._table.enter(trigger, handler)
        self._handlers[name] = handler
        handler.call = call
        handler.replace(trigger)
        if self._consumers is not consumers:  # since then
            handler.move_to(self._consumers.open(name, trigger))
        return handler

    def open(self, name: str, trigger: Trigger) -> Any:
        return self._consumers.open(name, trigger)

    def share(self, name: str, trigger: Trigger) -> SharedConsumer:
        return self._consumers.share(name, trigger)

    def settle(self, names: Sequence[str], marks: Mapping[str, int], wait_s: float) -> dict[str, int]:
        return self._ask(lambda consumers: consumers.settle(names, marks, wait_s))

    def served_elsewhere(self) -> list[str]:
        return self._consumers.served_elsewhere()

    def use(self, consumers: Consumers) -> None:
        """Use other consumers for calls from now on; `move` follows."""
        self._consumers = consumers

    def _ask(self, call: Callable[[Consumers], A]) -> A:
        """Make a call to the current consumers. If they were replaced before it began, make it to the new ones."""
        consumers = self._consumers
        try:
            return call(consumers)
        except StorageError as error:
            now = self._consumers
            if now is consumers or not isinstance(error.__cause__, EngineClosed | NotConnected):
                raise
        return call(now)

    def move(self) -> None:
        """Take the events of all durable triggers from the new consumers, which have the same names.

        A trigger that they refuse is reported, and takes no more events.
        """
        for name, handler in list(self._handlers.items()):
            try:
                handler.move_to(self._consumers.open(name, handler.trigger))
            except ScopestateError as error:
                log.error("consumer %r does not continue: %s", name, error)  # noqa: TRY400 - the text says it all

    def handlers(self) -> list[DurableHandler]:
        """Return the handlers, also of triggers that were unregistered."""
        return list(self._handlers.values())

    def stop(self) -> None:
        """Begin no more attempts, as the engine closes. Running ones may end."""
        for handler in self.handlers():
            handler.stop()

    def problems(self) -> list[str]:
        """Return the problems of consumers, for `Health.problems`, without waiting."""
        found = self._consumers.problems()
        served = set(self._consumers.served_elsewhere())
        for name, why in self._consumers.states():
            handler = self._handlers.get(name)
            if name in served and (handler is None or not handler.active):
                pass  # a follower has its trigger
            elif handler is None or not handler.active:
                found.append(
                    f"the consumer {name!r} has no trigger here: its events are kept; register one with "
                    f"durable={name!r}, or forget it"
                )
            elif (problem := handler.problem()) is not None:
                found.append(problem)
            if why:
                found.append(f"the consumer {name!r} is paused: {why}")
        return found

    def states(self) -> list[tuple[str, str | None]]:
        return self._consumers.states()

    def limits_changed(self) -> None:
        self._consumers.limits_changed()

    # ------------------------------------------------------------------------------------------------------ consumers

    def names(self) -> list[str]:
        return self._ask(lambda consumers: consumers.names())

    def status(self, name: str) -> ConsumerStatus | None:
        status = self._ask(lambda consumers: consumers.status(name))
        return None if status is None else self._with_handler(status)

    def statuses(self) -> list[ConsumerStatus]:
        return [self._with_handler(status) for status in self._ask(lambda consumers: consumers.statuses())]

    def _with_handler(self, status: ConsumerStatus) -> ConsumerStatus:
        handler = self._handlers.get(status.name)
        return status if handler is None else handler.status_from(status)

    def pause(self, name: str, why: str) -> bool:
        return self._ask(lambda consumers: consumers.pause(name, why))

    def resume(self, name: str) -> bool:
        done = self._ask(lambda consumers: consumers.resume(name))
        handler = self._handlers.get(name)
        if handler is not None:
            handler.wake_up()
        return done

    @exclusive
    def forget(self, name: str) -> bool:
        done = self._ask(lambda consumers: consumers.forget(name))
        handler = self._handlers.pop(name, None)
        if handler is None:
            return done
        handler.forget()
        if handler.active:
            # Its trigger continues as a new consumer with the events from now on; the start of the old one no longer
            # applies.
            trigger = handler.trigger
            handler.port = self._consumers.open(name, msgspec.structs.replace(trigger, start="now"))
            self._handlers[name] = handler
            handler.replace(trigger)
        return done

    # --------------------------------------------------------------------------------------------------- dead letters

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        return self._ask(lambda consumers: consumers.letters(consumer, limit, after))

    def letter(self, letter_id: str) -> DeadLetter | None:
        return self._ask(lambda consumers: consumers.letter(letter_id))

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        return self._ask(lambda consumers: consumers.replay(consumer, ids, reset=reset))

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        return self._ask(lambda consumers: consumers.purge(consumer, ids, before_ms=before_ms))

    def count(self, consumer: str | None) -> int:
        return self._ask(lambda consumers: consumers.count(consumer))
