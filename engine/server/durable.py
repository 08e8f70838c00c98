"""Durable triggers of workers: which worker serves a consumer, and how its function is called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from scopestate.errors import ConfigError, Forbidden, InvalidRegistration, Overloaded, ScopestateError
from scopestate.ops.deliveries import RetryLater
from scopestate.server.access import Claims
from scopestate.server.worker import LATER_S, WorkerFunction

if TYPE_CHECKING:
    from scopestate.actors.consuming import Consumers
    from scopestate.actors.durable_attempt import Attempt
    from scopestate.ops.deliveries import Delivery
    from scopestate.ops.results import StateEvent
    from scopestate.server.access import Access
    from scopestate.server.hub import Hub
    from scopestate.server.triggers import Registered, WorkerTrigger
    from scopestate.server.worker import Worker

MOST: Final = 1_000
"""Consumers that workers with one token, or all workers without tokens, may have. They outlive the workers."""


def trigger_id_of(consumer: str) -> str:
    """Return the id of the trigger of a consumer in the engine's table, whichever worker has registered it."""
    return f"consumer::{consumer}"


def refuse_too_many(consumers: Consumers, access: Access | None, name: str) -> None:
    """Raise InvalidRegistration for a new consumer if the workers of a token have too many."""
    names = consumers.names()
    if name in names:
        return
    own = [one for one in names if access is None or access.own_consumer(one) is not None]
    if len(own) >= MOST:
        raise InvalidRegistration(f"there are {MOST} consumers already: forget those that are not needed")


class WorkerConsumers:
    """Name of a consumer -> the triggers that workers offer for it. The newest serves. On the server's event loop only.

    A consumer outlives its workers: when the last one that offers a trigger for it leaves, its events are kept.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._table = hub.engine._router.triggers
        self._claims: Claims[Registered] = Claims("consumer")
        # One at a time: the last trigger registered in the engine must be the last one in `_claims`.
        self._registering = asyncio.Lock()

    def check(self, worker: Worker, trigger_id: str, name: str) -> None:
        """Refuse a trigger if its consumer has another one. Raises Forbidden, InvalidRegistration, ConfigError."""
        if self._hub.engine._parts.consumers is None:
            raise ConfigError("this engine has no store that outlives it, so it has no durable triggers")
        self._claims.check(name, worker.access)
        serving = self._claims.serving(name)
        if serving is not None and serving.owner is worker and serving.frame.id != trigger_id:
            raise InvalidRegistration(
                f"this worker has a trigger for the consumer {name!r} already: {serving.frame.id!r}"
            )

    async def add(self, registered: Registered) -> None:
        """Let the trigger take the events of its consumer, which is made if necessary. Raises as `check`."""
        trigger = registered.trigger
        assert trigger is not None
        assert trigger.durable is not None  # the caller has looked
        async with self._registering:
            await self._hub.engine.aio.elsewhere(lambda: self._register(trigger))
            self._claims.put(trigger.durable, registered.owner, registered)

    def _register(self, trigger: WorkerTrigger) -> None:
        """Register a trigger in the engine. On a worker thread: it may wait for a disk or a connection."""
        consumers, name = self._hub.engine._parts.consumers, trigger.durable
        assert consumers is not None  # as `check` has seen
        assert name is not None
        for handler in self._table.handlers():
            if handler.trigger.durable == name and handler.trigger.trigger_id != trigger.trigger_id:
                raise InvalidRegistration(f"the consumer {name!r} is one of the program itself: choose another name")
        refuse_too_many(consumers, trigger.owner.access, name)
        consumers.register(trigger, partial(self.call, trigger))

    def end(self, name: str, worker: Worker) -> None:
        """Stop the events of the trigger that a worker offers. A trigger of another worker continues."""
        serving = self._claims.serving(name)
        if not self._claims.remove(name, worker, keep=False):
            return
        before = self._claims.serving(name)
        if before is not None:
            self._hub.spawn(self._go_on(name, before))
        elif serving is not None and serving.trigger is not None:
            self._table.discard(serving.trigger)

    def remove_all_of(self, worker: Worker) -> None:
        """As `end`, for all consumers of a worker that is lost."""
        for name in self._claims.offered_by(worker):
            self.end(name, worker)

    async def _go_on(self, name: str, before: Registered) -> None:
        try:
            await self.add(before)
        except ScopestateError as error:
            self._hub.log.warning("trigger %r does not take over its consumer: %s", before.frame.id, error)
            return
        if before.owner.worker_id not in self._hub.workers:
            self.end(name, before.owner)

    # -------------------------------------------------------------------------------------------------- deliveries

    def call(self, trigger: WorkerTrigger, function_id: str, attempt: Attempt) -> Any:
        """Call the function or the condition of a delivery, with the worker's present rights.

        On a worker thread. Returns a coroutine if the call must be awaited.
        """
        owner, given = trigger.owner, attempt.event
        events = given if isinstance(given, list) else [given]
        for event in events:
            self._check(owner, trigger, function_id, event)
        if trigger.events is None:
            events = [event if event.expired_at is None else event.as_deleted() for event in events]
        event = events if isinstance(given, list) else events[0]
        if self._hub.own_function(function_id) is not None:
            data = [dict(one) for one in events] if isinstance(given, list) else dict(events[0])
            return self._on_hub(lambda: self._hub.call_for(owner, function_id, data))
        function = self._hub.functions.find(function_id)
        if function is None:
            raise RetryLater(LATER_S)  # its worker has just left
        target = function.target
        if function_id != trigger.function_id:  # a condition gets no metadata
            asked = events[0].copy()
            asked.metadata = None
            return target(asked)
        if type(target) is not WorkerFunction:
            return target(event)
        name = trigger.durable or ""
        if owner.access is not None:
            name = owner.access.own_consumer(name) or name
        return _deliver(target, event, attempt.handler.delivery_of(attempt), name)

    def _check(self, owner: Worker, trigger: WorkerTrigger, function_id: str, event: StateEvent) -> None:
        access = owner.access
        if access is None:
            return
        try:
            if access.own_consumer(trigger.durable or "") is None:
                raise Forbidden(f"the token of this connection does not have the consumer {trigger.durable!r} any more")
            access.check_delivery(function_id, event.scope)
        except Forbidden as error:
            self._hub.note_refusal(error)
            raise

    async def _on_hub(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), self._hub.loop))


async def _deliver(
    function: WorkerFunction, event: StateEvent | list[StateEvent], delivery: Delivery, consumer: str
) -> None:
    try:
        await function.deliver(event, delivery, consumer)
    except Overloaded as error:
        raise RetryLater(LATER_S) from error
