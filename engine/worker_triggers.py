"""Triggers that workers register, and the trigger types that they provide."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.handler import HandlerActor, HandlerServices, Trigger
from scopestate.errors import DeserializationError, InvalidRegistration, ScopestateError
from scopestate.ops.values import decode, parse
from scopestate.triggers import read_trigger
from scopestate.wire.frames import RegisterTrigger, RegisterTriggerType, UnregisterTrigger, encode
from scopestate.wire.session import POLICY
from scopestate.worker_handlers import LoopDispatcher, WorkerHandler

if TYPE_CHECKING:
    from scopestate.worker import Worker
    from scopestate.workers import Hub

log = logging.getLogger("scopestate.server")

STATE: Final = "state"
WORKERS_AVAILABLE: Final = "engine::workers-available"
FUNCTIONS_AVAILABLE: Final = "engine::functions-available"
ENGINE_TYPES: Final = {
    WORKERS_AVAILABLE: "Fired when a worker connects, disconnects or describes itself",
    FUNCTIONS_AVAILABLE: "Fired when the set of registered functions has changed",
}
"""Trigger types of the server itself (docs/protocol.md, section 6.5)."""


class Registered(msgspec.Struct):
    """A trigger and the worker with which it goes."""

    owner: Worker
    frame: RegisterTrigger


class ProvidedType(msgspec.Struct):
    """A trigger type and the worker that provides it."""

    owner: Worker
    frame: RegisterTriggerType


class WorkerTriggers:
    """Trigger id -> trigger, whatever its type. On the server's event loop only."""

    def __init__(self, hub: Hub, max_waiting_events: int) -> None:
        self._hub = hub
        self._router = hub.engine._router
        self._max_waiting = max_waiting_events
        self.dispatcher = LoopDispatcher(hub.loop, hub.engine._parts.dispatcher)
        self._by_id: dict[str, Registered] = {}
        self.types: dict[str, ProvidedType] = {}
        self._handlers: dict[str, HandlerActor] = {}

    def all(self) -> list[Registered]:
        """Return the triggers of all workers, in order of registration."""
        return list(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    # ------------------------------------------------------------------------------------------------ registration

    def register(self, worker: Worker, frame: RegisterTrigger) -> None:
        """Add a trigger; the same id again replaces it and makes it this worker's.

        Raises InvalidRegistration for an unknown type, a bad config, or the id of a trigger of the program itself, and
        Forbidden.
        """
        if worker.access is not None:
            worker.access.check_call(frame.function_id)
        known = self._by_id.get(frame.id)
        if known is None and frame.trigger_type == STATE and frame.id in self._router._by_id:
            raise InvalidRegistration(f"trigger id {frame.id!r} is one of the program itself: choose another")
        if known is not None and not self._may_change(worker, known):
            raise InvalidRegistration(f"trigger id {frame.id!r} is another worker's: choose another")
        if frame.trigger_type == STATE:
            self._register_state(worker, frame)
        elif frame.trigger_type in ENGINE_TYPES:
            pass
        elif frame.trigger_type not in self.types:
            raise InvalidRegistration(f"there is no trigger type {frame.trigger_type!r}")
        if known is not None and (known.frame.trigger_type != frame.trigger_type):
            self._remove(known)
        self._by_id[frame.id] = Registered(worker, frame)
        provided = self.types.get(frame.trigger_type)
        if provided is not None:
            provided.owner.send(encode(frame))

    def _register_state(self, worker: Worker, frame: RegisterTrigger) -> None:
        try:
            config = decode(parse(bytes(frame.config)))
        except DeserializationError as error:
            raise InvalidRegistration(f"its config is not JSON: {error}") from error
        trigger = read_trigger(frame.function_id, frame.id, config)
        access = worker.access
        if access is not None:
            access.check_watch(trigger.scope)
            if trigger.condition_function_id is not None:
                access.check_call(trigger.condition_function_id)
        self._handlers[frame.id] = self._router.register(trigger, self._make_handler)

    def _make_handler(self, trigger: Trigger, services: HandlerServices) -> HandlerActor:
        own = HandlerServices(
            self.dispatcher, services.functions, services.limits, services.loop_thread, services.report
        )
        own.made_room = services.made_room
        return WorkerHandler(trigger, own, self._hub, services.dispatcher)

    def unregister(self, worker: Worker, trigger_id: str) -> None:
        """Remove a trigger of any worker (docs/protocol.md 2.1: no owner check); not one of the program itself."""
        registered = self._by_id.get(trigger_id)
        if registered is None or not self._may_change(worker, registered):
            return
        del self._by_id[trigger_id]
        self._remove(registered)

    @staticmethod
    def _may_change(worker: Worker, registered: Registered) -> bool:
        return worker.access is None or registered.owner is worker

    def _remove(self, registered: Registered) -> None:
        frame = registered.frame
        if frame.trigger_type == STATE:
            self._handlers.pop(frame.id, None)
            try:
                self._router.unregister(frame.id)
            except InvalidRegistration:
                log.debug("trigger %r was unregistered by the program already", frame.id)
        provided = self.types.get(frame.trigger_type)
        if provided is not None:
            provided.owner.send(encode(UnregisterTrigger(frame.id, frame.trigger_type)))

    def silence(self, worker: Worker) -> None:
        """Begin no more deliveries for the triggers of a worker that is gone: its functions are gone, too."""
        for trigger_id, handler in self._handlers.items():
            if self._by_id[trigger_id].owner is worker:
                handler.active = False

    def remove_all_of(self, worker: Worker) -> None:
        """A worker is gone: remove the trigger types that it provides, then its triggers."""
        for type_id, provided in list(self.types.items()):
            if provided.owner is worker:
                del self.types[type_id]
        for trigger_id, registered in list(self._by_id.items()):
            if registered.owner is worker:
                del self._by_id[trigger_id]
                self._remove(registered)

    # -------------------------------------------------------------------------------------------------- trigger types

    def register_type(self, worker: Worker, frame: RegisterTriggerType) -> None:
        """Note that a worker provides a trigger type, and tell it of the triggers that wait for it."""
        if frame.id == STATE or frame.id in ENGINE_TYPES:
            worker.session.forget(frame)
            log.warning("worker %s: trigger type %r is built in and was not replaced", worker.worker_id, frame.id)
            return
        self.types[frame.id] = ProvidedType(worker, frame)
        for registered in self._of_type(frame.id):
            worker.send(encode(registered.frame))

    def unregister_type(self, worker: Worker, type_id: str) -> None:
        """Withdraw a type that this worker provides; its triggers are kept for the next provider."""
        provided = self.types.get(type_id)
        if provided is not None and provided.owner is worker:
            del self.types[type_id]

    def _of_type(self, type_id: str) -> Iterator[Registered]:
        return (registered for registered in self.all() if registered.frame.trigger_type == type_id)

    # --------------------------------------------------------------------------------------------------------- events

    def fire(self, type_id: str, data: dict[str, Any]) -> None:
        """Call the functions of all triggers of one of the server's own types, in the background."""
        for registered in self._of_type(type_id):
            self._hub.spawn(self._deliver(registered.frame.function_id, data))

    async def _deliver(self, function_id: str, data: dict[str, Any]) -> None:
        try:
            await self._hub.engine.aio.call(function_id, data)
        except ScopestateError as error:
            log.warning("a server event was not delivered to %r: %s", function_id, error)

    def watches(self, type_id: str) -> bool:
        """Return whether any trigger is of this type."""
        return next(self._of_type(type_id), None) is not None

    def close_overrun(self) -> None:
        """Close the connection of a worker that lets too many events wait: in the end they would hold up writers."""
        for trigger_id, handler in list(self._handlers.items()):
            waiting = handler.depth()
            registered = self._by_id.get(trigger_id)
            if waiting > self._max_waiting and registered is not None:
                target = self._hub.functions.find(registered.frame.function_id)
                # Whoever is slow: the worker with the function, which need not be the one with the trigger.
                worker = getattr(getattr(target, "target", None), "worker", registered.owner)
                worker.close(POLICY, f"{waiting} events wait for its function {registered.frame.function_id!r}")
