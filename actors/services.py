"""What the handlers of one engine share, and the actor that reports failures for other threads."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from scopestate.actors.backlog import Backlog, Limits, size_of
from scopestate.actors.containment import Log
from scopestate.actors.loops import LoopCalls, LoopThread
from scopestate.actors.turn import TurnActor
from scopestate.ops.results import DeliveryFailure
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.functions import Functions

log = Log("scopestate.triggers")


class Reporter(TurnActor):
    """Reports failures, in order, for threads that others depend on: the router's, the timer's, a closing one.

    The hooks and logging filters are code of the program, and may block. The number of waiting reports is bounded: any
    further failure is counted and not reported, because no calling thread may wait for a slow hook.
    """

    runs_program = True

    MOST = 10_000
    """Reports that may wait."""
    MOST_BYTES = 1 << 26
    """Bytes of values that they may hold together."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        report: Callable[[DeliveryFailure], None],
        tell_hooks: Callable[[DeliveryFailure], None],
    ) -> None:
        super().__init__(dispatcher)
        self._report = report
        self._tell_hooks = tell_hooks
        self._exclusive = Guard()
        self._waiting = self._waiting_bytes = 0
        self.left_out = 0
        """Failures that were not reported since the hooks last caught up."""

    def report(self, failure: DeliveryFailure, *, logged: bool = False) -> None:
        """Report `failure` on a worker thread, or count it if too many reports wait already.

        `logged`: it is in the log already, so only the hooks are called.
        """
        if self._takes(size_of(failure.event)):
            self.tell((failure, self._tell_hooks if logged else self._report))

    @exclusive
    def _takes(self, size: int) -> bool:
        if self._waiting >= self.MOST or self._waiting_bytes >= self.MOST_BYTES:
            self.left_out += 1
            return False
        self._waiting += 1
        self._waiting_bytes += size
        return True

    @exclusive
    def _is_done(self, size: int) -> int:
        self._waiting -= 1
        self._waiting_bytes -= size
        if self._waiting:
            return 0
        left_out, self.left_out = self.left_out, 0
        return left_out

    def on_receive(self, message: tuple[DeliveryFailure, Callable[[DeliveryFailure], None]]) -> None:
        failure, report = message
        try:
            report(failure)
        finally:
            if left_out := self._is_done(size_of(failure.event)):
                log.error("%d failed deliveries were not reported: the hooks or the log were too slow", left_out)

    def _fail(self) -> None:
        log.error("reporting a failed delivery failed", exc_info=sys.exc_info()[1])


class HandlerServices:
    """What the handlers of one engine share."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        functions: Functions,
        limits: Limits,
        loop_thread: LoopThread,
        report: Callable[[DeliveryFailure], None],
        tell_hooks: Callable[[DeliveryFailure], None] | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.functions = functions
        self.limits = limits
        self.loop_thread = loop_thread
        self.report = report
        self.tell_hooks = tell_hooks or report
        """As `report`, without a line in the log: for many events at once, which share one."""
        self.reporter = Reporter(dispatcher, report, self.tell_hooks)
        """Reports from threads that must not run the hooks themselves."""
        self.backlog = Backlog(dispatcher, limits)
        self.exclusive = Guard()
        """Held while a count is raised that several threads may raise at once."""
        self.loop_calls = LoopCalls(dispatcher, loop_thread.replace)
        """The calls in progress on event loops."""

    def on(self, dispatcher: Dispatcher) -> HandlerServices:
        """Return the same services for handlers whose turns belong to another dispatcher."""
        other = copy.copy(self)
        other.dispatcher = dispatcher
        return other
