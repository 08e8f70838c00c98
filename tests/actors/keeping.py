"""A consumer that keeps everything in lists, and a durable handler that takes its events from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scopestate.actors.backlog import Limits
from scopestate.actors.clock import Clock
from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, Held, Outcome
from scopestate.actors.dispatcher import Dispatcher
from scopestate.actors.durable import DurableHandler
from scopestate.actors.functions import Function, Functions
from scopestate.actors.loops import LoopThread
from scopestate.actors.services import HandlerServices
from scopestate.errors import StorageError
from scopestate.ops.deliveries import Retry
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.ops.triggers import Trigger


class Kept(ConsumerPort):
    """A consumer in lists, which records what it is told."""

    name = "ship"

    def __init__(self) -> None:
        self.events: list[Held] = []
        self.begun: list[tuple[int, int]] = []
        self.outcomes: list[Outcome] = []
        self.trigger: Trigger | None = None
        self.wake: Callable[[], object] = lambda: None
        self.lost: Callable[[Sequence[int]], object] = lambda positions: None
        self.why: str | None = None
        self.room = 1000
        self.failing = 0

    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        self.trigger, self.wake, self.lost = trigger, wake, lost
        wake()

    def stop(self) -> None:
        self.trigger = None

    def fetch(self, most: int) -> list[Held]:
        if self.failing:
            self.failing -= 1
            raise StorageError("the disk is away")
        if self.trigger is None:
            return []
        found, self.events = self.events[:most], self.events[most:]
        return found

    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        self.begun += attempts

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes += outcomes
        self.room -= len([one for one in outcomes if one.verdict in ("dead", "held")])

    def flush(self) -> None:
        pass

    def transaction(self, position: int, scope: str) -> Any:
        raise NotImplementedError

    def pause(self, why: str) -> None:
        self.why = why

    def full(self, letters: int) -> bool:
        return self.room <= 0

    def paused(self) -> str | None:
        return self.why

    def status(self) -> ConsumerStatus:
        return ConsumerStatus(self.name, 0, 0.0, 0, 0, 0, self.why)

    def reached(self, mark: int) -> bool:
        return not self.events

    def put(self, *keys: str, scope: str = "orders") -> None:
        """Commit an event for each key."""
        begin = len(self.begun) + len(self.events) + 1
        for number, key in enumerate(keys, max(begin, getattr(self, "last", 0) + 1)):
            self.last = number
            self.events.append(
                Held(StateEvent("state:updated", scope, key, b"1", str(number).encode(), number, position=number))
            )
        self.wake()

    def ended_as(self) -> list[tuple[int, str]]:
        return [(one.position, one.verdict) for one in self.outcomes]


class Stage:
    """A durable handler, with its port and what was reported."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.port = Kept()
        self.failures: list[DeliveryFailure] = []
        self.functions = Functions()
        self.limits = Limits()
        self.loop_thread = LoopThread("test-loop")
        self.services = HandlerServices(dispatcher, self.functions, self.limits, self.loop_thread, self.failures.append)
        self.handler: DurableHandler

    def begin(self, target: Callable[..., Any], **options: Any) -> DurableHandler:
        self.functions.add(Function("f", target))
        options = {"order": "key", "retry": Retry(jitter=0.0), **options}
        trigger = Trigger("t", "f", durable="ship", **options)
        self.handler = DurableHandler(trigger, self.services, self.port, Clock(self.dispatcher))
        self.handler.replace(trigger)
        return self.handler
