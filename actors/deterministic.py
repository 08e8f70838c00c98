"""A dispatcher for tests: one turn at a time, in an order that a seed decides, on a clock that the test moves."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.attempts import Attempts
from scopestate.actors.containment import Ended
from scopestate.actors.reply import Reply
from scopestate.actors.turn import HOLDER, TurnActor
from scopestate.errors import WouldDeadlock

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Timer

_ANOTHER_THREAD: Final = -2
"""The holder of a claim that counts as busy. No thread has this id."""

START_S: Final = 1_767_225_600.0
"""2026-01-01 in UTC: the virtual time of day at which a dispatcher begins."""
PATIENCE_S: Final = 86_400.0
"""Virtual seconds after which a wait without a time limit counts as endless."""


class DeterministicDispatcher:
    """Runs an engine, one turn at a time, in an order drawn from `seed`; the same seed gives the same run.

    ::

        dispatcher = DeterministicDispatcher(seed)
        with Engine(dispatcher=dispatcher) as engine:
            engine.set("users", "ada", 1)       # queues the event: nothing runs by itself
            dispatcher.run_until_idle()         # router and handlers, in a seeded order
            dispatcher.advance(5.0)             # five virtual seconds pass

    Nothing runs until the thread that made the dispatcher calls `step`, `run_until_idle` or `advance`, or waits for an
    answer: `engine.set` on a busy scope, `flush`, `drain` and `close` run what the answer needs. Time passes when
    nothing else is left to run, or by `advance`.

    What other threads could do at the same time is drawn from the seed too. With probability `switch`, the running code
    gives way where it takes or releases an actor's claim, and where a fake under test calls `give_way`. With
    probability `busy` an idle scope counts as busy, so that the message goes through its mailbox.

    A turn that waits keeps its stack, so turns run on separate threads, but only one at a time: each hands over and
    stops. Refused: running other turns on top of the stack of the one that waits. It could not continue before they
    end, a deadlock that the engine does not have, and they would see its thread id and context variables.

    Coroutine handlers and `engine.aio` run on event loops, which have an order of their own: test those on real
    threads.
    """

    def __init__(self, seed: int, *, switch: float = 0.1, busy: float = 0.1, wall_s: float = START_S) -> None:
        """`wall_s`: the time of day at which it begins, in seconds since the epoch."""
        self.seed = seed
        self.history: list[tuple[float, str]] = []
        """(virtual seconds, what) of every turn that was started or continued, in order."""
        self.waiter: Callable[[Reply[Any], float | None], None] | None = self._wait
        self._switch = switch
        self._busy = busy
        self._random = random.Random(seed)
        self._random_apart = random.Random(f"{seed}, apart")
        self._owner = get_ident()
        self._now = 0.0
        self._wall_s = wall_s
        self._suspended_s = 0.0
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
        """Run one turn, up to its end or its next wait. If none is ready, first let time pass to the next timer.

        Returns False if there is nothing left to run. Raises what a submitted function raises.
        """
        self._refuse_others()
        return self._step(latest=float("inf"))

    def run_until_idle(self) -> int:
        """Run turns until none is ready, without letting time pass. Returns their number."""
        self._refuse_others()
        steps = 0
        while self._step(latest=self._now):
            steps += 1
        return steps

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and run everything that is ready or becomes due in that time."""
        self._refuse_others()
        until = self._now + seconds
        while self._step(latest=until):
            pass
        self._now = max(self._now, until)

    def pass_to(self, seconds: float) -> None:
        """Let time pass up to this second, and run nothing: for several dispatchers that have the same time."""
        self._now = max(self._now, seconds)

    def set_clock(self, seconds: float) -> None:
        """Set the time of day forward by `seconds`, or back if they are less than 0. No time passes."""
        self._wall_s += seconds

    def suspend(self, seconds: float) -> None:
        """Suspend the machine: the time of day passes, and no timer notices."""
        self._suspended_s += seconds

    def wall_s(self) -> float:
        """Return the time of day, in seconds since the epoch."""
        return self._wall_s + self._suspended_s + self._now

    def waiting(self) -> list[str]:
        """Return the turns that have begun and wait: for an answer, for time to pass, or for their next step."""
        return [worker.label for worker in self._parked]

    # ----------------------------------------------------------------------------------------------- for fakes

    def give_way(self) -> None:
        """Let other threads run first, if the seed says so. From turns and from the driving thread."""
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
        """Handle one message of the actor's mailbox in a later step."""
        actor.batch = 1
        if self._switch and isinstance(actor, Attempts):
            # As if its function were found to block: other turns may then run beside the next calls.
            actor.apart = actor.apart or self._random_apart.random() < self._switch
        self._add(actor.name, actor.run_batch)

    def schedule_next(self, actor: TurnActor) -> None:
        self.schedule(actor)

    def schedule_now(self, actor: TurnActor) -> None:
        self.schedule(actor)

    def submit(self, work: Callable[[], object]) -> None:
        """Call `work()` in a later step. It may wait for replies."""
        self._add(getattr(work, "__qualname__", "work"), work)

    def submit_program(self, work: Callable[[], object]) -> None:
        """As `submit`: there is no limit of threads."""
        self.submit(work)

    def held(self) -> int:
        """Return 0: nothing waits for a thread."""
        return 0

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` when `delay_s` virtual seconds have passed."""
        entry = _Entry(callback)
        if not self._closed:
            heapq.heappush(self._timers, (self._now + delay_s, next(self._order), entry))
        return entry

    def reply(self) -> Reply[Any]:
        """Make a future. Waiting for it runs other turns, and raises WouldDeadlock if there are none."""
        reply: Reply[Any] = Reply()
        reply.waiter = self.waiter
        return reply

    def claim(self, actor: TurnActor) -> dict[str, int]:
        """Make the claim of a new actor, at which other threads may go first."""
        return _Claim(actor, self)

    def monotonic(self) -> float:
        """Virtual seconds since the dispatcher was made."""
        return self._now

    def wall_ns(self) -> int:
        """Return the virtual time of day; see `set_clock`."""
        return round(self.wall_s() * 1_000_000) * 1000

    def uptime_ns(self) -> int:
        """Return the virtual time since the dispatcher was made, with that in which it was suspended."""
        return round((self._now + self._suspended_s) * 1_000_000) * 1000

    def random(self) -> float:
        """Return the next random number of the seed."""
        return self._random.random()

    def threads(self) -> int:
        """Threads alive now."""
        return len(self._workers)

    def close(self) -> None:
        """Run what is ready, then end the rest as `kill` does. Later work runs on the thread that submits it."""
        if get_ident() == self._owner:
            self.run_until_idle()
        self.kill()

    def kill(self) -> None:
        """End everything at once, as when the process is killed: waits raise what `except Exception` does not catch."""
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
        """Run one turn, letting time pass up to `latest` if necessary. Return False if no turn is ready by then."""
        while True:
            self._ring()
            ready = self._ready
            able = [worker for worker in self._parked if worker.can_go(self._now)]
            if ready or able:
                break
            due = self.next_due()
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
        """Make the due timers ready, as one piece of work: a real timer thread keeps their order."""
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

    def next_due(self) -> float | None:
        """Return the virtual second at which something becomes ready by itself; None if nothing will."""
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
        """Run other turns until the reply is there, or `timeout` virtual seconds have passed."""
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
        if deadline is None or self.next_due() is None:
            raise WouldDeadlock(
                "nothing is left to run that could deliver this reply; "
                f"turns that wait themselves: {', '.join(self.waiting()) or 'none'}"
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
            raise RuntimeError("only the thread that made this dispatcher may drive it or wait in it")

    def _seem_busy(self, claim: _Claim, actor: TurnActor) -> None:
        """If the seed says so, claim an idle scope as if another thread were in a short turn of it."""
        if self._busy and not self._closed and self._random.random() < self._busy:
            dict.__setitem__(claim, HOLDER, _ANOTHER_THREAD)

            def let_go() -> None:
                del claim[HOLDER]
                if actor._mailbox:
                    actor.wake_anyway()  # `wake` might find it busy again, without end if `busy` is 1

            self._add(f"another thread in {actor.name}", let_go)


class _Entry:
    """A timer."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _Claim(dict[str, int]):
    """An actor's claim. Other threads may run before and after it is taken or released, as on real threads."""

    __slots__ = ("_actor", "_dispatcher")

    def __init__(self, actor: TurnActor, dispatcher: DeterministicDispatcher) -> None:
        super().__init__()
        self._actor = actor
        self._dispatcher = dispatcher

    def __bool__(self) -> bool:
        # Other turns must not run here: it is also read under locks, with which a turn must not stop.
        if self._actor.caller_runs and not len(self):
            self._dispatcher._seem_busy(self, self._actor)
        return len(self) > 0

    def setdefault(self, key: str, default: int, /) -> int:
        self._dispatcher.give_way()  # the result of `bool` may be out of date
        holder = super().setdefault(key, default)
        self._dispatcher.give_way()
        return holder

    def __delitem__(self, key: str, /) -> None:
        super().__delitem__(key)
        self._dispatcher.give_way()


class _Worker:
    """A thread that runs only from `resume` to its next `hand_over`, while the thread that resumed it waits."""

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
        """The answer that it waits for, if any."""
        self.deadline: float | None = None
        """When it continues in any case; None: not by time."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()
        self.ident: int = self.thread.ident or 0

    def can_go(self, now: float) -> bool:
        """Tell whether it has what it waits for."""
        return (self.reply is not None and self.reply.done) or (self.deadline is not None and self.deadline <= now)

    def resume(self) -> None:
        """Let it run, and wait until it hands over or ends."""
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
            except BaseException as error:  # noqa: BLE001 - raised again on the driving thread
                self.failure = error
            ended = self._dispatcher._closed
            if not ended:
                self._dispatcher._idle.append(self)
            self._back.release()
            if ended:
                return
