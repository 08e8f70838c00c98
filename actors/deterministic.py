"""A dispatcher for tests: one turn at a time, in an order that a seed decides, on a clock that the test moves."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.containment import Ended
from scopestate.actors.reply import Reply
from scopestate.actors.turn import HOLDER, TurnActor
from scopestate.errors import WouldDeadlock

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Timer

_SOMEBODY: Final = -2
"""Stands in the claim of a scope for a thread that is said to be in the middle of a turn; no thread has this id."""

PATIENCE_S: Final = 86_400.0
"""Virtual seconds after which a wait without a time limit counts as one that never ends."""


class DeterministicDispatcher:
    """Runs an engine, one turn at a time, in an order drawn from `seed`; the same seed gives the same run.

    ::

        dispatcher = DeterministicDispatcher(seed)
        with Engine(dispatcher=dispatcher) as engine:
            engine.set("users", "ada", 1)       # leaves the event behind: nothing runs by itself
            dispatcher.run_until_idle()         # router and handlers, in a seeded order
            dispatcher.advance(5.0)             # five seconds pass at once

    Nothing runs until the thread that made the dispatcher says so, by `step`, `run_until_idle` or `advance`, or by
    waiting for an answer: `engine.set` on a busy scope, `flush`, `drain` and `close` then run what the answer needs.
    Time passes when nothing else is left to run, or by `advance`.

    What other threads could do meanwhile is drawn from the seed too. With probability `switch`, the running code gives
    way where it takes or gives back an actor's claim, and where a fake under test calls `give_way`; with
    probability `busy` an idle scope counts as busy, so that the message goes through its mailbox.

    A turn that waits keeps its stack, so turns run on threads of their own, but never two at once: each hands over and
    stops. Refused: to run other turns on top of the stack of the one that waits. It cannot go on before they end, which
    is a deadlock that the engine does not have, and thread ids and context variables would be those of another turn.

    Coroutine handlers and `engine.aio` belong to event loops, which keep their own order: test those on real threads.
    """

    def __init__(self, seed: int, *, switch: float = 0.1, busy: float = 0.1) -> None:
        self.seed = seed
        self.history: list[tuple[float, str]] = []
        """(virtual seconds, what) of every turn that was begun or gone on with, in order."""
        self.waiter: Callable[[Reply[Any], float | None], None] | None = self._wait
        self._switch = switch
        self._busy = busy
        self._random = random.Random(seed)
        self._owner = get_ident()
        self._now = 0.0
        self._ready: list[tuple[str, Callable[[], object]]] = []
        self._timers: list[tuple[float, int, _Entry]] = []
        self._order = itertools.count()
        self._ringing = False
        self._workers: dict[int, _Worker] = {}
        self._idle: list[_Worker] = []
        self._parked: list[_Worker] = []
        self._closed = False

    # ---------------------------------------------------------------------------------- for the thread that drives

    def step(self) -> bool:
        """Run one turn, up to its end or its next wait; if none is ready, let time pass to the next timer first.

        Returns False if there is nothing left to run. An error that a submitted function raises comes out here.
        """
        self._refuse_others()
        return self._step(latest=float("inf"))

    def run_until_idle(self) -> int:
        """Run turns until none is ready; no time passes. Returns how many were run."""
        self._refuse_others()
        steps = 0
        while self._step(latest=self._now):
            steps += 1
        return steps

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, running everything that is ready or becomes due meanwhile."""
        self._refuse_others()
        until = self._now + seconds
        while self._step(latest=until):
            pass
        self._now = max(self._now, until)

    def waiting(self) -> list[str]:
        """What has begun and waits for an answer, for time to pass or for its next step."""
        return [worker.label for worker in self._parked]

    # ----------------------------------------------------------------------------------------------- for fakes

    def give_way(self) -> None:
        """A point where other threads may go first; the seed decides. From turns and from the driving thread."""
        if self._switch and not self._closed and self._random.random() < self._switch:
            worker = self._workers.get(get_ident())
            if worker is not None:
                self._park(worker, None, self._now)
            elif get_ident() == self._owner:
                self._step(latest=self._now)

    def sleep(self, seconds: float) -> None:
        """Take `seconds` of virtual time, as a slow disk or handler does."""
        worker = self._workers.get(get_ident())
        if worker is not None:
            self._park(worker, None, self._now + seconds)
        else:
            self.advance(seconds)

    # ------------------------------------------------------------------------------------------- as a Dispatcher

    def schedule(self, actor: TurnActor) -> None:
        """Have one message of the actor's mailbox handled in some later step."""
        actor.batch = 1
        self._add(actor.name, actor.run_batch)

    def schedule_next(self, actor: TurnActor) -> None:
        self.schedule(actor)

    def submit(self, work: Callable[[], object]) -> None:
        """Have `work()` called in some later step. It may wait for replies."""
        self._add(getattr(work, "__qualname__", "work"), work)

    def submit_program(self, work: Callable[[], object]) -> None:
        """As `submit`: there are as many threads as are needed."""
        self.submit(work)

    def held(self) -> int:
        """0: nothing waits for a thread."""
        return 0

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Have `callback()` called once the clock has come that far."""
        entry = _Entry(callback)
        if not self._closed:
            heapq.heappush(self._timers, (self._now + delay_s, next(self._order), entry))
        return entry

    def reply(self) -> Reply[Any]:
        """Make a future; waiting for it lets others run. Raises WouldDeadlock if nothing is left that could answer."""
        reply: Reply[Any] = Reply()
        reply.waiter = self.waiter
        return reply

    def claim(self, actor: TurnActor) -> dict[str, int]:
        """Make the claim of a new actor: one at which others may go first."""
        return _Claim(actor, self)

    def monotonic(self) -> float:
        """Virtual seconds since the dispatcher was made."""
        return self._now

    def threads(self) -> int:
        """Threads alive now."""
        return len(self._workers)

    def close(self) -> None:
        """Run what is ready, then end the rest as `kill` does. What comes later runs on the thread that brings it."""
        if get_ident() == self._owner:
            self.run_until_idle()
        self.kill()

    def kill(self) -> None:
        """End everything where it is, as when the process dies: a wait raises what no `except Exception` catches."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        for workers in (self._parked, self._idle):
            while workers:
                workers.pop().resume()
        for ident, worker in list(self._workers.items()):
            if ident != get_ident():
                worker.thread.join()
                del self._workers[ident]

    # -------------------------------------------------------------------------------------------------- one step

    def _add(self, label: str, work: Callable[[], object]) -> None:
        if not self._closed:
            self._ready.append((label, work))
        elif get_ident() not in self._workers:
            work()

    def _step(self, latest: float) -> bool:
        """Run one turn; to have one, let time pass up to `latest`. False if there is none until then."""
        while True:
            self._ring()
            ready = self._ready
            able = [worker for worker in self._parked if worker.can_go(self._now)]
            if ready or able:
                break
            due = self._next_due()
            if due is None or due > latest:
                return False
            self._now = max(self._now, due)
        choice = self._random.randrange(len(ready) + len(able))
        if choice < len(ready):
            worker = self._idle.pop() if self._idle else self._new_worker()
            worker.label, worker.work = ready.pop(choice)
        else:
            worker = able[choice - len(ready)]
            self._parked.remove(worker)
        self.history.append((self._now, worker.label))
        worker.resume()
        if worker.failure is not None:
            failure, worker.failure = worker.failure, None
            raise failure
        return True

    def _ring(self) -> None:
        """Make the timers that are due ready: as one piece of work, because a real timer thread keeps their order."""
        if not self._ringing and self._timers and self._timers[0][0] <= self._now:
            self._ringing = True
            self._add("timers", self._call_timers)

    def _call_timers(self) -> None:
        timers = self._timers
        try:
            while timers and timers[0][0] <= self._now:
                callback = heapq.heappop(timers)[2].callback
                if callback is not None:
                    callback()
        finally:
            self._ringing = False

    def _next_due(self) -> float | None:
        """When something will become ready by itself."""
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        dues = [worker.deadline for worker in self._parked if worker.deadline is not None]
        if timers and not self._ringing:
            dues.append(timers[0][0])
        return min(dues, default=None)

    def _new_worker(self) -> _Worker:
        worker = _Worker(self, f"scopestate-deterministic-{len(self._workers) + 1}")
        self._workers[worker.ident] = worker
        return worker

    # -------------------------------------------------------------------------------------------------- waiting

    def _wait(self, reply: Reply[Any], timeout: float | None) -> None:
        """Let others run until the reply is there, or `timeout` virtual seconds have passed."""
        deadline = None if timeout is None else self._now + max(timeout, 0.0)
        worker = self._workers.get(get_ident())
        if worker is not None:
            self._park(worker, reply, deadline)
            return
        self._refuse_others()
        latest = self._now + PATIENCE_S if deadline is None else deadline
        while not reply.done and self._step(latest):
            pass
        if reply.done:
            return
        if deadline is None or self._next_due() is None:
            raise WouldDeadlock(
                "nothing is left to run that could deliver this reply; "
                f"begun and waiting themselves: {', '.join(self.waiting()) or 'nothing'}"
            )
        self._now = max(self._now, deadline)

    def _park(self, worker: _Worker, reply: Reply[Any] | None, deadline: float | None) -> None:
        if not self._closed:
            worker.reply, worker.deadline = reply, deadline
            self._parked.append(worker)
            worker.hand_over()
        if self._closed:
            raise Ended

    def _refuse_others(self) -> None:
        if get_ident() != self._owner:
            raise RuntimeError(
                "only the thread that made this dispatcher drives it or waits in it: no turn, no other thread"
            )

    def _seem_busy(self, claim: _Claim, actor: TurnActor) -> None:
        """Perhaps claim an idle scope for a thread that does not exist and is soon done."""
        if self._busy and not self._closed and self._random.random() < self._busy:
            dict.__setitem__(claim, HOLDER, _SOMEBODY)

            def let_go() -> None:
                del claim[HOLDER]
                if actor._mailbox:
                    actor.wake_anyway()  # `wake` might find it busy again, for ever if `busy` is 1

            self._add(f"another thread in {actor.name}", let_go)


class _Entry:
    """A timer."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _Claim(dict[str, int]):
    """An actor's claim, around whose taking and giving back other threads may go first, as on real threads."""

    __slots__ = ("_actor", "_dispatcher")

    def __init__(self, actor: TurnActor, dispatcher: DeterministicDispatcher) -> None:
        super().__init__()
        self._actor = actor
        self._dispatcher = dispatcher

    def __bool__(self) -> bool:
        # Nobody goes first here: it is also read under locks, with which a turn must not stop.
        if self._actor.caller_runs and not len(self):
            self._dispatcher._seem_busy(self, self._actor)
        return len(self) > 0

    def setdefault(self, key: str, default: int, /) -> int:
        self._dispatcher.give_way()  # what `bool` said may be out of date by now
        holder = super().setdefault(key, default)
        self._dispatcher.give_way()
        return holder

    def __delitem__(self, key: str, /) -> None:
        super().__delitem__(key)
        self._dispatcher.give_way()


class _Worker:
    """A thread that runs only between `resume` and its next `hand_over`, while whoever resumed it stands still."""

    def __init__(self, dispatcher: DeterministicDispatcher, name: str) -> None:
        self._dispatcher = dispatcher
        self._go = threading.Lock()
        self._back = threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self.label = ""
        self.work: Callable[[], object] | None = None
        self.failure: BaseException | None = None
        self.reply: Reply[Any] | None = None
        """What it waits for, if it waits for an answer."""
        self.deadline: float | None = None
        """When it goes on in any case."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()
        self.ident: int = self.thread.ident or 0

    def can_go(self, now: float) -> bool:
        """True if what it waits for has come."""
        return (self.reply is not None and self.reply.done) or (self.deadline is not None and self.deadline <= now)

    def resume(self) -> None:
        """Let it run, and wait for it to hand over or to be done."""
        self._go.release()
        self._back.acquire()

    def hand_over(self) -> None:
        """On its own thread: stop here until the next `resume`."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            work, self.work = self.work, None
            if work is None:
                self._back.release()
                return
            try:
                work()
            except Ended:
                self._back.release()
                return
            except BaseException as error:  # noqa: BLE001 - it is raised again, on the thread that drives
                self.failure = error
            ended = self._dispatcher._closed
            if not ended:
                self._dispatcher._idle.append(self)
            self._back.release()
            if ended:
                return
