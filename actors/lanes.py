"""The lanes of one trigger: which of the events that were taken out of its mailbox may be handled now.

Pure bookkeeping: no threads, no clock, no calls of the program (docs/design/0047-side-by-side.md).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Coroutine, Hashable
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import Struct

from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.handler import HandlerActor
    from scopestate.actors.loops import Pending
    from scopestate.actors.reply import Reply
    from scopestate.actors.shapes import Item
    from scopestate.ops.triggers import Order

NO_LANE: Final = object()
"""The lane of an event that waits for no other."""

_DROPPED: Final = object()

Outcome = Literal["", "delivered", "skipped", "failed", "dropped"]


class Run(Struct, eq=False):
    """One event on its way through the function of its trigger: all attempts, with the pauses between them.

    Its fields belong to the thread that runs its next step, and between steps to the holder of the actor's claim. A
    Struct, because there is one for each event and `__init__` in Python would take three times as long.
    """

    event: Any = None
    """What is delivered; set before anything else is done."""
    lane: Hashable = None
    asking: bool = False
    """True while the condition runs."""
    attempt: int = 1
    """Number of the attempt that runs, or that comes next."""
    deadline: float | None = None
    """When the plain function that runs exceeds its time limit; None: none runs, or it has no limit."""
    overdue: bool = False
    """True once that was reported."""
    function_id: str = ""
    """The function that runs under a time limit."""
    delivery: Coroutine[Pending, Any, None] | None = None
    """The rest of the attempt, and of those that follow; None before the first call."""
    value: Any = None
    error: BaseException | None = None
    """The error that `delivery` continues with."""
    pending: Pending | None = None
    """The pause that it asks for."""
    passing: BaseException | None = None
    """An exception that must reach the caller of the turn."""
    news: Literal["", "over", "pause", "resumed", "answered"] = ""
    """The news for the holder of the claim."""
    outcome: Outcome = ""
    entered: bool = False
    """True while it is in `Lanes`."""
    stage: Stage | None = None
    """Where it counts for barriers; None: nowhere."""
    paused: bool = False
    item: Any = None
    """Where the event came from; for a subclass of the actor, as `extra`."""
    extra: Any = None


class Barrier:
    """A message that queues after the waiting events of every handler. Its reply is set when all have reached it."""

    def __init__(self, handlers: list[HandlerActor], reply: Reply[None]) -> None:
        self.handlers = tuple(handlers)
        self._waiting: dict[HandlerActor, bool] = dict.fromkeys(handlers, True)
        self._exclusive = Guard()
        self._reply = reply
        self.over = False
        """True once `withdraw` was called."""
        if not handlers:
            reply.set()

    def arrive(self, handler: HandlerActor) -> None:
        """Note that `handler` has handled everything that came before."""
        if self._exclusive.run(self._is_last, handler):
            self._reply.set()

    def _is_last(self, handler: HandlerActor) -> bool:
        return self._waiting.pop(handler, None) is not None and not self._waiting and not self._reply.done

    def withdraw(self) -> None:
        """Take it out of the mailboxes where it still is: the caller has stopped waiting."""
        self.over = True
        for handler in self._still():
            handler.withdraw(self)

    @exclusive
    def _still(self) -> list[HandlerActor]:
        return list(self._waiting)

    def missing(self) -> list[str]:
        """The triggers whose handlers have not reached it yet, each as `id (function id)`."""
        triggers = [handler.trigger for handler in self._still()]
        return [f"{trigger.trigger_id} ({trigger.function_id})" for trigger in triggers]


class Stage:
    """The runs between two barriers."""

    __slots__ = ("barriers", "open")

    def __init__(self) -> None:
        self.open = 0
        self.barriers: list[Barrier] = []
        """The barriers that are reached when these runs, and all before them, are over."""


class Lanes:
    """Everything that one trigger has taken out of its mailbox and that is not over.

    A run enters its lane. It is ready when all runs before it in the lane are over. A running one holds one of the
    places that `concurrency` allows; one that pauses between two attempts holds its lane but no place. Used only by the
    holder of the claim, except `aside`, from which other threads may take runs that have not begun.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        """Of all runs that are here."""
        self.running = 0
        """The number of runs that hold a place."""
        self.begun: dict[Run, None] = {}
        """Runs that have begun, including those that pause."""
        self.aside: OrderedDict[Run, None] = OrderedDict()
        """Runs that wait: for their lane, for a place, or for the next attempt. Oldest first. An ordered dict, because
        a plain one takes long to find its first key when many before it were removed."""
        self.going: deque[Run] = deque()
        """Runs with a place that can continue at once."""
        self._ready: deque[Run] = deque()
        self._behind: dict[Hashable, deque[Run] | None] = {}
        """Lane that is in use -> the runs that wait in it."""
        self._pausing: set[Hashable] = set()
        """The lanes whose first run pauses."""
        self.behind_pauses = 0
        """The number of runs that pause, and of those that wait for them in their lanes."""
        self._stages: deque[Stage] = deque((Stage(),))

    def is_idle(self) -> bool:
        """True if nothing is here."""
        return not (self.begun or self.aside or self._behind or len(self._stages) > 1 or self._stages[0].open)

    def is_free(self, lane: Hashable) -> bool:
        """Return whether nothing is in a lane."""
        return lane not in self._behind

    def lane_of(self, event: Item) -> Hashable:
        """Return the lane of an event: what it has in common with the events that it waits for."""
        order = self.order
        if order == "scope":
            return event.scope
        if order == "key":
            return (event.scope, event.key)
        return NO_LANE if order == "none" else ""

    def enter(self, run: Run) -> bool:
        """Put a run after those of its lane. Returns False if there are any: then it waits."""
        lane, behind = self.lane_of(run.event), self._behind
        run.lane, run.stage = lane, self._stages[-1]
        waits = False
        if lane is not NO_LANE:
            if lane in behind:
                queue = behind[lane]
                if queue is None:
                    queue = behind[lane] = deque()
                self.aside[run] = None
                queue.append(run)
                waits = True
                if lane in self._pausing:
                    self.behind_pauses += 1
            else:
                behind[lane] = None
        run.stage.open += 1
        run.entered = True
        return not waits

    def enter_ready(self, run: Run) -> None:
        """As `enter`; if its lane is free it is ready, and waits for a place."""
        if self.enter(run):
            self.aside[run] = None
            self._ready.append(run)

    def begin(self, run: Run) -> None:
        """Give a run that is ready a place."""
        self.begun[run] = None
        self.running += 1

    def pause(self, run: Run) -> None:
        """Take the place from a run, which keeps its lane."""
        run.paused = True
        self.aside[run] = None
        self.running -= 1
        self.behind_pauses += 1
        if run.lane is not NO_LANE:
            self._pausing.add(run.lane)
            self.behind_pauses += len(self._behind[run.lane] or ())

    def _is_back(self, run: Run) -> None:
        """End the pause of a run in the counts."""
        run.paused = False
        self.behind_pauses -= 1
        if run.lane is not NO_LANE:
            self._pausing.discard(run.lane)
            self.behind_pauses -= len(self._behind[run.lane] or ())

    def resume(self, run: Run) -> None:
        """End its pause: it is ready."""
        self._ready.append(run)

    def put_first(self, run: Run) -> None:
        """Let a run that is the first of its lane wait for a place."""
        self.aside[run] = None
        self._ready.append(run)

    def has_ready(self) -> bool:
        """Return whether a run may be waiting only for a place."""
        return bool(self._ready)

    def next_ready(self) -> Run | None:
        """Take out the run that has been ready longest; None if there is none."""
        ready = self._ready
        while ready:
            run = ready.popleft()
            if run.paused:
                self._is_back(run)
            if self.aside.pop(run, _DROPPED) is not _DROPPED:
                return run
            self._go_from_lane(run)  # it was dropped while it waited
        return None

    def end(self, run: Run) -> None:
        """End a run that has begun, with all its attempts. Does nothing if it has not entered."""
        if self.begun.pop(run, _DROPPED) is not _DROPPED:
            if run.paused:
                self._is_back(run)
                self.aside.pop(run, None)
            else:
                self.running -= 1
        self._go_from_lane(run)

    def _go_from_lane(self, run: Run) -> None:
        if not run.entered:
            return
        run.entered = False
        self.excuse(run)
        lane, behind = run.lane, self._behind
        if lane is not NO_LANE:
            queue = behind[lane]
            if queue:
                self._ready.append(queue.popleft())
            else:
                del behind[lane]

    def excuse(self, run: Run) -> None:
        """Make barriers not wait for this run."""
        stage, run.stage = run.stage, None
        if stage is not None:
            stage.open -= 1

    def drop_oldest(self) -> Run | None:
        """Take out the run that has waited longest for its first attempt; None if there is none. From any thread."""
        aside = self.aside
        while True:
            try:
                run = next((run for run in aside if not run.paused), None)
            except RuntimeError:
                continue  # another thread has changed it
            if run is None or aside.pop(run, _DROPPED) is not _DROPPED:
                return run

    def place(self, barrier: Barrier) -> None:
        """Put a barrier after all runs that are here now."""
        last = self._stages[-1]
        if not last.open and len(self._stages) > 1:
            self._stages[-2].barriers.append(barrier)
        else:
            last.barriers.append(barrier)
            self._stages.append(Stage())

    def withdraw(self, barrier: object) -> None:
        """Forget a barrier. From any thread."""
        for stage in self._stages.copy():
            stage.barriers[:] = [other for other in stage.barriers if other is not barrier]

    def barriers(self) -> list[Barrier]:
        """Return the barriers that are here. From any thread."""
        return [barrier for stage in self._stages.copy() for barrier in stage.barriers]

    def reached(self) -> list[Barrier]:
        """Take out the barriers that no longer have a run before them."""
        stages, reached = self._stages, []
        while len(stages) > 1 and not stages[0].open:
            reached += stages.popleft().barriers
        return reached
