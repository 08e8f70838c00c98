"""Triggers that workers register, and the trigger types that they provide."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from scopestate.actors.handler import HandlerActor
from scopestate.errors import DeserializationError, Forbidden, InvalidRegistration, ScopestateError
from scopestate.ops.triggers import Trigger
from scopestate.ops.values import decode, parse
from scopestate.reactive import read_trigger
from scopestate.server.access import Claims
from scopestate.server.deliveries import LoopDispatcher, WorkerHandler
from scopestate.server.durable import WorkerConsumers, trigger_id_of
from scopestate.wire.frames import (
    RegisterTrigger,
    RegisterTriggerType,
    UnregisterTrigger,
    UnregisterTriggerType,
    encode,
)
from scopestate.wire.session import POLICY

if TYPE_CHECKING:
    from scopestate.server.access import Access
    from scopestate.server.hub import Hub
    from scopestate.server.worker import Worker

LOOK_PAUSE_S: Final = 0.05
"""Shortest time in seconds between two checks for overrun workers that are caused by events."""
PATIENCE_S: Final = 30.0
"""Seconds that a handler's mailbox may be full while its worker is silent, if calls may wait without a limit."""
STATE: Final = "state"
WORKERS_AVAILABLE: Final = "engine::workers-available"
FUNCTIONS_AVAILABLE: Final = "engine::functions-available"
ENGINE_TYPES: Final = {
    WORKERS_AVAILABLE: "Fired when a worker connects, disconnects or describes itself",
    FUNCTIONS_AVAILABLE: "Fired when the set of registered functions has changed",
}
"""Trigger types of the server itself (docs/reference/protocol.md, section 6.5)."""

NEEDED_TO_WATCH: Final = {WORKERS_AVAILABLE: "engine::workers::list", FUNCTIONS_AVAILABLE: "engine::functions::list"}
"""Trigger type of the server -> the function with the same data. A token needs the right to call that function."""


class WorkerTrigger(Trigger, frozen=True, kw_only=True):
    """A `state` trigger of a worker. Its function is called with the rights of that worker."""

    owner: Worker


class Registered(msgspec.Struct):
    """A trigger, and the worker that has registered it."""

    owner: Worker
    frame: RegisterTrigger
    trigger: WorkerTrigger | None = None
    """For the type `state`: the trigger in the engine's table."""
    provider: Access | None = None
    """For a custom type: the token whose workers provided it. No other provider receives its config."""

    @property
    def is_durable(self) -> bool:
        """Whether it is a durable trigger."""
        return self.trigger is not None and self.trigger.durable is not None

    @property
    def place(self) -> tuple[str, str]:
        """Its place in the engine. A trigger replaces an earlier one with the same place."""
        trigger = self.trigger
        return self.frame.trigger_type, self.frame.id if trigger is None else trigger.trigger_id


class ProvidedType(msgspec.Struct):
    """A trigger type and the worker that provides it."""

    owner: Worker
    frame: RegisterTriggerType


class WorkerTriggers:
    """Trigger id -> trigger, of any type. On the server's event loop only."""

    def __init__(self, hub: Hub, max_waiting_events: int, max_waiting_bytes: int) -> None:
        self._hub = hub
        self._table = hub.engine._router.triggers
        self._max_waiting = max_waiting_events
        self.max_waiting_bytes = max_waiting_bytes
        self._next_look = 0.0
        self.dispatcher = LoopDispatcher(hub.loop, hub.engine._parts.dispatcher)
        self._triggers: Claims[Registered] = Claims("trigger")
        self._types: Claims[ProvidedType] = Claims("trigger type")
        self._handlers: dict[str, WorkerHandler] = {}
        self._consumers = WorkerConsumers(hub)

    def all(self) -> list[Registered]:
        """Return the triggers of all workers, in order of registration."""
        return self._triggers.all()

    def types(self) -> list[ProvidedType]:
        """Return the trigger types that workers provide, in order of registration."""
        return self._types.all()

    def __len__(self) -> int:
        return len(self._triggers)

    # ------------------------------------------------------------------------------------------------ registration

    def register(self, worker: Worker, frame: RegisterTrigger) -> Awaitable[None] | None:
        """Add a trigger. It replaces one with the same id, and belongs to this worker.

        For a durable trigger it returns an awaitable that finishes the work, waits for the disk, and raises the same
        errors. Raises InvalidRegistration for an unknown type, a bad config, or the id of a trigger of the program
        itself; Forbidden; and ConfigError for a durable trigger of an engine without a store.
        """
        self._triggers.check(frame.id, worker.access)
        if not self._is_ours(frame.id):
            raise InvalidRegistration(f"trigger id {frame.id!r} is one of the program itself: choose another")
        refused = worker.refused.get(frame.function_id)
        if refused is not None and self._hub.functions.find(frame.function_id) is None:
            raise Forbidden(f"its function was not registered: {refused}")
        registered = Registered(worker, frame)
        if frame.trigger_type == STATE:
            registered.trigger = self._read_state_trigger(worker, frame)
        else:
            self._check_other(worker, frame)
        provided = self._types.serving(frame.trigger_type)
        if provided is not None:
            registered.provider = provided.owner.access
        if registered.is_durable:
            return self._register_durable(registered)
        self._begin(registered)
        self._put(registered)
        return None

    async def _register_durable(self, registered: Registered) -> None:
        await self._consumers.add(registered)
        if registered.owner.worker_id in self._hub.workers:
            self._put(registered)
        else:
            self._end(registered)  # the worker has left

    def _put(self, registered: Registered) -> None:
        """Note a trigger that has begun to fire. It replaces one with the same id."""
        trigger_id = registered.frame.id
        known = self._triggers.serving(trigger_id)
        if known is not None and known.place != registered.place:
            self._end(known)
        self._triggers.put(trigger_id, registered.owner, registered)

    def _is_ours(self, trigger_id: str) -> bool:
        """Return False for the id of a trigger of the program, which workers may not replace."""
        known = self._table.find(trigger_id)
        return known is None or type(known) is WorkerTrigger

    def _read_state_trigger(self, worker: Worker, frame: RegisterTrigger) -> WorkerTrigger:
        access = worker.access
        if access is not None:
            access.check_call(frame.function_id)
        try:
            config = decode(parse(bytes(frame.config)))
            beside = bytes(frame.metadata)
            if isinstance(config, dict) and config.get("metadata") is None and beside[:1] == b"{":
                config["metadata"] = decode(parse(beside))  # SDKs send it next to the config
        except DeserializationError as error:
            raise InvalidRegistration(f"its config is not JSON: {error}") from error
        read = read_trigger(frame.function_id, frame.id, config)
        if access is not None:
            access.check_watch(read.scope, read.scope_prefix)
            for function_id in (read.function_id, read.condition_function_id):
                if function_id is not None:
                    access.check_trigger_call(function_id, read.scope, read.scope_prefix)
        fields = msgspec.structs.asdict(read)
        if read.durable is not None:
            name = read.durable if access is None else access.consumer(read.durable)
            self._consumers.check(worker, frame.id, name)
            fields |= {"durable": name, "trigger_id": trigger_id_of(name)}
        return WorkerTrigger(**fields, owner=worker)

    def _check_other(self, worker: Worker, frame: RegisterTrigger) -> None:
        """Check a trigger of any type except `state`. The input that its function will get is not known here."""
        if worker.access is not None:
            self._check_rights(worker.access, frame)
        if frame.trigger_type in ENGINE_TYPES:
            if frame.function_id.startswith("engine::") and self._hub.own_function(frame.function_id) is not None:
                raise InvalidRegistration(
                    f"an event of the server cannot call {frame.function_id!r}, a function of the server: it might "
                    "fire the next event"
                )
        elif self._types.serving(frame.trigger_type) is None:
            raise InvalidRegistration(f"there is no trigger type {frame.trigger_type!r}")

    @staticmethod
    def _check_rights(access: Access, frame: RegisterTrigger) -> None:
        access.check_trigger_call(frame.function_id, None)
        needed = NEEDED_TO_WATCH.get(frame.trigger_type)
        if needed is not None:
            access.check_call(needed)

    def _begin(self, registered: Registered) -> None:
        """Make the router, or the provider of its type, fire a trigger from now on."""
        trigger = registered.trigger
        if trigger is not None:
            handler = self._table.register(trigger, self._make_handler)
            self._handlers[trigger.trigger_id] = cast(WorkerHandler, handler)
            self._hub.engine._parts.backend.listen(wait=False)
        provided = self._provider_of(registered)
        if provided is not None:
            provided.owner.send(encode(registered.frame))

    def _end(self, registered: Registered) -> None:
        """Stop the firing of a trigger."""
        trigger, frame = registered.trigger, registered.frame
        if trigger is not None and trigger.durable is not None:
            self._consumers.end(trigger.durable, registered.owner)
        elif trigger is not None:
            self._handlers.pop(trigger.trigger_id, None)
            self._table.discard(trigger)
        provided = self._provider_of(registered)
        if provided is not None:
            provided.owner.send(encode(UnregisterTrigger(frame.id, frame.trigger_type)))

    def _provider_of(self, registered: Registered) -> ProvidedType | None:
        """Return the provider of its type; None if no worker with the same token as before provides it now."""
        provided = self._types.serving(registered.frame.trigger_type)
        return provided if provided is not None and provided.owner.access is registered.provider else None

    def _make_handler(self, trigger: Trigger) -> HandlerActor:
        services = self._hub.engine._parts.services
        return WorkerHandler(trigger, services.on(self.dispatcher), self._hub, services.dispatcher)

    def unregister(self, worker: Worker, trigger_id: str) -> None:
        """Remove a trigger of a worker with the same token, not of this program (docs/reference/protocol.md 2.1)."""
        registered = self._triggers.serving(trigger_id)
        if registered is not None and self._triggers.belongs_to(trigger_id, worker.access):
            for offer in self._triggers.clear(trigger_id):
                offer.owner.session.forget(offer.frame)
                if offer is registered or offer.is_durable:
                    self._end(offer)

    def silence(self, worker: Worker) -> None:
        """Begin no more deliveries for the triggers of a worker that is lost."""
        for trigger_id, handler in self._handlers.items():
            # Not if the program has replaced it by a trigger of its own.
            if getattr(handler.trigger, "owner", None) is worker and self._triggers.only_by(trigger_id, worker):
                handler.active = False

    def remove_all_of(self, worker: Worker) -> None:
        """Remove the trigger types and then the triggers of a worker that is lost.

        A registration of the same name by another worker with the same token becomes active again.
        """
        for type_id in self._types.offered_by(worker):
            self._remove_type(worker, type_id, lost=True)
        for registered in self._triggers.all():
            trigger_id = registered.frame.id
            if self._triggers.remove(trigger_id, worker, keep=False):
                before = self._triggers.serving(trigger_id)
                if before is not None and not before.is_durable:
                    self._begin(before)
                if before is None or before.place != registered.place:
                    self._end(registered)
        self._consumers.remove_all_of(worker)

    def withdraw_forbidden(self, worker: Worker, access: Access) -> None:
        """Remove the trigger types, and the triggers of types other than `state`, that a worker may no longer have.

        A trigger of type `state` stays: its rights are checked for each event.
        """
        for type_id in self._types.offered_by(worker):
            try:
                access.check_register(type_id, "trigger type")
            except Forbidden as error:
                self._hub.log.warning("worker %s: a trigger type was withdrawn: %s", worker.worker_id, error)
                worker.session.forget(UnregisterTriggerType(type_id))
                self.unregister_type(worker, type_id)
        for registered in self._triggers.all():
            if registered.owner is worker and registered.trigger is None:
                try:
                    self._check_rights(access, registered.frame)
                except Forbidden as error:
                    trigger_id = registered.frame.id
                    self._hub.log.warning("worker %s: trigger %r was removed: %s", worker.worker_id, trigger_id, error)
                    self.unregister(worker, trigger_id)

    def last_worker_left(self, access: Access) -> None:
        """Free the trigger types of a token of which no worker is connected any more."""
        self._types.last_worker_left(access)

    # -------------------------------------------------------------------------------------------------- trigger types

    def register_type(self, worker: Worker, frame: RegisterTriggerType) -> None:
        """Add a trigger type that a worker provides, and send it the triggers of that type."""
        type_id, access = frame.id, worker.access
        try:
            if type_id == STATE or type_id in ENGINE_TYPES:
                raise InvalidRegistration(f"trigger type {type_id!r} is built in and was not replaced")
            if access is not None:
                access.check_register(type_id, "trigger type")
            self._types.check(type_id, access)
        except ScopestateError as error:
            self._hub.log.warning("worker %s: a trigger type was not registered: %s", worker.worker_id, error)
            self._hub.refuse(worker, frame, error)
            return
        self._hand_back(type_id, unless=worker)
        self._types.put(type_id, worker, ProvidedType(worker, frame))
        self._hand_over(type_id)

    def unregister_type(self, worker: Worker, type_id: str) -> None:
        """Withdraw a type that this worker provides; its triggers are kept for the next provider."""
        self._remove_type(worker, type_id, lost=False)

    def provides(self, worker: Worker, type_id: str) -> bool:
        """Return whether this worker serves a trigger type."""
        provided = self._types.serving(type_id)
        return provided is not None and provided.owner is worker

    def _remove_type(self, worker: Worker, type_id: str, *, lost: bool) -> None:
        if self._types.remove(type_id, worker, keep=lost):
            self._hand_over(type_id)

    def _hand_over(self, type_id: str) -> None:
        """Send all triggers of a type to the worker that provides it now."""
        for registered in self._of_type(type_id):
            provided = self._provider_of(registered)
            if provided is not None:
                provided.owner.send(encode(registered.frame))

    def _hand_back(self, type_id: str, unless: Worker) -> None:
        """Tell the old provider of a type to stop: otherwise two providers would fire each trigger."""
        for registered in self._of_type(type_id):
            provided = self._provider_of(registered)
            if provided is not None and provided.owner is not unless:
                provided.owner.send(encode(UnregisterTrigger(registered.frame.id, type_id)))

    def _of_type(self, type_id: str) -> Iterator[Registered]:
        return (registered for registered in self.all() if registered.frame.trigger_type == type_id)

    # --------------------------------------------------------------------------------------------------------- events

    def fire(self, type_id: str, event_for: Callable[[Worker], dict[str, Any] | None]) -> None:
        """Call the functions of all triggers of one of the server's own types, in the background.

        `event_for(worker)` returns the event as a trigger of this worker receives it; None: it receives no event.
        """
        for registered in self._of_type(type_id):
            event = event_for(registered.owner)
            if event is not None:
                self._hub.spawn(self._deliver(registered, event))

    def fire_worker_event(self, event: str, worker: Worker) -> None:
        """Fire `engine::workers-available` for something that has happened to a worker."""
        data = {"event": event, "worker_id": worker.worker_id}
        self.fire(WORKERS_AVAILABLE, lambda watcher: data if watcher.sees(worker) else None)

    async def _deliver(self, registered: Registered, event: dict[str, Any]) -> None:
        try:
            await self._hub.call_for(registered.owner, registered.frame.function_id, event)
        except ScopestateError as error:
            self._hub.note_refusal(error)
            self._hub.log.warning("a server event was not delivered to %r: %s", registered.frame.function_id, error)

    def watches(self, type_id: str) -> bool:
        """Return whether any trigger is of this type."""
        return next(self._of_type(type_id), None) is not None

    def look_soon(self) -> None:
        """Check for overrun workers before the timer does. From any thread."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_PAUSE_S
            self.dispatcher.submit_to_loop(self.close_overrun)

    def close_overrun(self) -> None:
        """Close the connections of workers for which too much waits, or that do not answer: they hold up writers."""
        now = time.monotonic()
        patience_s = self._hub.engine._limits.call_timeout_s or PATIENCE_S
        at_most: dict[Worker, int] = {}
        handlers: dict[Worker, list[WorkerHandler]] = {}
        for trigger_id, handler in list(self._handlers.items()):
            waiting, silent_s = handler.depth(), handler.silent_s(now)
            registered = self._triggers.serving(trigger_id)
            if not waiting or registered is None:
                continue
            function_id = registered.frame.function_id
            worker = self._to_blame(registered)
            if waiting > self._max_waiting:
                worker.close(POLICY, f"{waiting} events wait for its function {function_id!r}")
            elif silent_s >= patience_s:
                worker.close(
                    POLICY,
                    f"{waiting} events wait for its function {function_id!r}, the most allowed, and it does not answer",
                )
            at_most[worker] = at_most.get(worker, 0) + handler.waiting_bytes(exactly=False)
            handlers.setdefault(worker, []).append(handler)
        for worker, most in at_most.items():
            if most > self.max_waiting_bytes and not worker.session.closed:
                waiting = sum(handler.waiting_bytes(exactly=True) for handler in handlers[worker])
                if waiting > self.max_waiting_bytes:
                    worker.close(POLICY, f"events of {waiting} bytes wait for its functions")

    def _to_blame(self, registered: Registered) -> Worker:
        # The slow worker is the one with the function. But a trigger must not make it possible to close the connection
        # of a worker with another token.
        owner = registered.owner
        target = self._hub.functions.find(registered.frame.function_id)
        worker: Worker = getattr(getattr(target, "target", None), "worker", owner)
        return worker if worker.access is owner.access else owner
