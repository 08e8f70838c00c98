"""The dispatcher: the worker threads that run turns, and the timer."""

from __future__ import annotations

import _thread
import functools
import heapq
import itertools
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from scopestate.actors.containment import Log, contained
from scopestate.actors.reply import Reply
from scopestate.inbox import Empty, Inbox
from scopestate.signals import Guard, certainly

if TYPE_CHECKING:
    from scopestate.actors.turn import TurnActor

log = Log("scopestate.actors")

_SINCE_BOOT: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)
"""Linux's clock that includes suspended time. Elsewhere, that time shows only in the wall clock, unless it is set."""


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel the call if it has not been made. Idempotent, from any thread."""


class Dispatcher(Protocol):
    """Gives actors threads and time. It is passed in, so that tests can order every turn (see `deterministic`)."""

    def schedule(self, actor: TurnActor) -> None:
        """Call `actor.run_batch()` soon, on a thread where no signal handler runs."""

    def schedule_next(self, actor: TurnActor) -> None:
        """As `schedule`, but called at the end of a short turn: this worker may run `actor` itself after that turn."""

    def schedule_now(self, actor: TurnActor) -> None:
        """As `schedule`, for an actor whose turns are known to block threads: ensures at once that another is free."""

    def submit(self, work: Callable[[], object]) -> None:
        """Call `work()`, which is code of the engine, soon on a worker thread. It may wait for disks or connections."""

    def submit_program(self, work: Callable[[], object]) -> None:
        """Call `work()`, which is code of the program and may never return, soon on a worker thread.

        The number of threads for such code is limited, so that work of the engine never waits for it.
        """

    def held(self) -> int:
        """Return how many calls of the program's code wait because all threads for it are in use."""

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` after `delay_s` seconds. It must be quick and must not raise."""

    waiter: Callable[[Reply[Any], float | None], None] | None
    """Waits for a reply, at most the given seconds; None: threads block."""

    def reply(self) -> Reply[Any]:
        """Make a future that threads of this dispatcher can wait for."""

    def claim(self, actor: TurnActor) -> dict[str, int]:
        """Return the claim of a new actor: an empty dict, in which a thread enters its id while it runs a turn."""

    def monotonic(self) -> float:
        """Return the time of the clock that `call_later` uses, in seconds."""

    def wall_ns(self) -> int:
        """Return the time of day in nanoseconds since the epoch. It may be set back, or forward."""

    def uptime_ns(self) -> int:
        """Return the nanoseconds since a fixed moment, including suspended time where the system counts it."""

    def random(self) -> float:
        """Return a random number from 0 to 1, 1 not included."""

    def threads(self) -> int:
        """Return the number of live threads, not counting the timer's."""

    def close(self) -> None:
        """End every thread once the scheduled work is done. Later work runs on the thread that submits it."""


class ThreadDispatcher:
    """Worker threads with one queue of ready work, and a timer thread; all are started when first needed.

    The pool grows when all workers are blocked and work waits, because a handler may block for any time and must not
    delay others. Workers end after ten idle seconds. At most `MOST` threads run code of the program at a time. Further
    calls of such code are held back, so that routing, saving, commits and closing always have a thread
    (docs/design/0009-isolation.md). The threads are daemons: the engine's exit hook saves before they end.
    """

    IDLE_S = 10.0
    """A worker ends after this idle time."""
    STALL_S = 0.005
    """One more worker is started if work waits this long while all workers are blocked."""
    MOST = 512
    """The most threads that run code of the program. Further such work is held back, which is logged."""
    RESERVE = 64
    """Additional threads for the engine's own work."""

    waiter: Callable[[Reply[Any], float | None], None] | None = None

    def __init__(self, name: str = "scopestate") -> None:
        self._name = name
        self._ready: Inbox[Any] = Inbox()
        self._idle: list[None] = []
        self._coming: list[None] = []
        """Its length is the number of workers that are being started."""
        self._workers = 0
        self._exclusive = Guard()
        self._in_program: list[None] = []
        """Its length is the number of workers in code of the program. Append, pop and len are atomic."""
        self._held: deque[Callable[[], object]] = deque()
        self._full = False
        self._numbers = itertools.count(1)
        self._taken = 0
        """Changes whenever a worker takes something from the queue."""
        self._looks = 0
        self._look_asked = -1
        self._closed = False
        self._mine = threading.local()
        self._timer = _TimerThread(f"{name}-timer")

    def schedule(self, actor: TurnActor) -> None:
        self.submit(self._turns_of(actor))

    def schedule_next(self, actor: TurnActor) -> None:
        # Waking a second worker costs 20 us, as the two then compete for the interpreter lock.
        mine = self._mine
        if getattr(mine, "is_worker", False) and mine.next is None:
            mine.next = self._turns_of(actor)
        else:
            self.schedule(actor)

    def schedule_now(self, actor: TurnActor) -> None:
        self._ready.put(self._turns_of(actor))
        if len(self._idle) + len(self._coming) < 2 and not self._closed:
            # One more than is needed now: work that comes next must not wait until all workers are found to be blocked.
            self._add_worker()
        if not self._idle:
            self._look_after_queue()

    def submit(self, work: Callable[[], object]) -> None:
        self._ready.put(work)
        if not self._idle:
            self._look_after_queue()

    def submit_program(self, work: Callable[[], object]) -> None:
        self.submit(_ProgramWork(work, self))

    def held(self) -> int:
        return len(self._held)

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._timer.call_later(delay_s, callback)

    def reply(self) -> Reply[Any]:
        return Reply()

    def claim(self, actor: TurnActor) -> dict[str, int]:
        return {}

    def monotonic(self) -> float:
        return time.monotonic()

    # The functions themselves, without a method around them: a write with a deadline calls both.
    wall_ns = staticmethod(time.time_ns)
    uptime_ns = staticmethod(
        time.monotonic_ns if _SINCE_BOOT is None else functools.partial(time.clock_gettime_ns, _SINCE_BOOT)
    )

    def random(self) -> float:
        return random.random()

    def threads(self) -> int:
        return self._workers

    def close(self) -> None:
        for _ in range(self._exclusive.run(self._begin_to_close)):
            self._ready.put(None)
        self._timer.close()

    def _begin_to_close(self) -> int:
        self._closed = True
        return self._workers

    def _turns_of(self, actor: TurnActor) -> Callable[[], object]:
        return _ProgramWork(actor.run_batch, self) if actor.runs_program else actor.run_batch

    def _look_after_queue(self) -> None:
        """If no worker is idle, start the first one now, or check soon whether another one is needed."""
        look = self._looks
        if self._closed:
            self._run_left_over()
        elif self._workers == 0:
            if not start_thread(self._add_first_worker):
                self._run_left_over()
        elif self._look_asked != look:
            # The number is recorded last, so that after an interruption by a signal the next call does this again.
            taken = self._taken
            self._timer.call_later(self.STALL_S, lambda: self._relieve(look, taken))
            self._look_asked = look

    def _relieve(self, look: int, taken: int) -> None:
        if look != self._looks:
            return  # two threads asked for the same check
        self._looks += 1
        if self._idle or self._ready.empty() or self._closed:
            return
        if taken == self._taken:
            # No worker has taken work since, so all are blocked. If they were computing, one more would not help.
            self._add_worker()
        self._look_after_queue()

    def _run_program(self, work: Callable[[], object]) -> None:
        """On a worker thread: call `work`, or hold it back if all threads for such code are in use."""
        busy, held = self._in_program, self._held
        try:
            busy.append(None)
        except MemoryError:
            certainly(functools.partial(self.submit_program, work))  # `work` has not begun
            raise
        if len(busy) > self.MOST and not self._closed:
            busy.pop()
            self._hold(work)
            return
        try:
            _call(work)
            while held:
                # Run it here, because later work would overtake it otherwise.
                try:
                    work = held.popleft()
                except IndexError:
                    break
                _call(work)
        finally:
            busy.pop()
        self._full = False
        self._let_go()

    def _hold(self, work: Callable[[], object]) -> None:
        self._held.append(work)
        if not self._full:
            self._full = True
            log.error(
                "all %d threads for handlers and functions are in use; further calls wait for one to end", self.MOST
            )
        self._let_go()  # a thread may have become free before `work` was on the list

    def _let_go(self) -> None:
        """Submit one call that is held back, if a thread is free for it."""
        if self._held and len(self._in_program) < self.MOST:
            try:
                self.submit_program(self._held.popleft())
            except IndexError:
                return  # another worker has taken it

    def _run_left_over(self) -> None:
        """Run scheduled work on this thread if no worker will take it, so that no caller waits forever.

        This is so for messages that are sent while the engine closes, which their actors refuse. It is also so at exit,
        when the interpreter starts no more threads (3.12): the exit hook closes the engine on its own thread.
        """
        ends = 0
        try:
            while True:
                work = self._ready.get_nowait()
                if work is None:
                    ends += 1
                else:
                    _call(work)
        except Empty:
            for _ in range(ends):
                self._ready.put(None)  # for workers that are still in a turn

    def _add_first_worker(self) -> None:
        self._add_worker(only_first=True)

    def _add_worker(self, *, only_first: bool = False) -> None:
        worker = threading.Thread(target=self._work, name=f"{self._name}-{next(self._numbers)}", daemon=True)
        # The guard is held while the thread starts. So once `close` has taken it, no more threads are started.
        if not self._exclusive.run(self._start_worker, worker, 1 if only_first else self.MOST + self.RESERVE):
            self._run_left_over()

    def _start_worker(self, worker: threading.Thread, most: int) -> bool:
        """Start the worker, unless there are `most`. Return False if the interpreter starts no more threads."""
        if self._closed or self._workers >= most:
            return True
        self._workers += 1
        self._coming.append(None)
        try:
            worker.start()
        except RuntimeError as error:
            self._workers -= 1
            self._coming.pop()
            # At exit the interpreter starts no more threads, and the work runs on the thread that closes.
            (log.debug if "shutdown" in str(error) else log.error)("no worker thread can be started: %s", error)
            return False
        return True

    def _work(self) -> None:
        try:
            self._work_until_idle()
        finally:
            # In every case, even after a MemoryError outside of a turn, so that the count stays right.
            self._exclusive.run(self._end_worker)
            if not self._ready.empty():
                # Even when closed: a thread that queued work in the meantime saw an idle worker and started none.
                self._look_after_queue()

    def _end_worker(self) -> None:
        self._workers -= 1

    def _work_until_idle(self) -> None:
        ready, idle, mine = self._ready, self._idle, self._mine
        mine.is_worker, mine.next = True, None
        self._coming.pop()
        while True:
            work = None
            idle.append(None)
            try:
                try:
                    work = ready.get_or_idle(self.IDLE_S)
                except Empty:
                    work = None
                finally:
                    idle.pop()
                self._taken += 1
                if work is None:
                    break
                if not idle and not ready.empty():
                    # The threads that queued this may have started no worker, because this one was idle.
                    self._look_after_queue()
            except BaseException:  # a MemoryError: this worker ends, but the work that it has taken must not be lost
                if work is not None:
                    certainly(functools.partial(ready.put, work))
                raise
            while work is not None:
                _call(work)
                work, mine.next = mine.next, None


class _ProgramWork:
    """Work that runs code of the program."""

    __slots__ = ("_dispatcher", "_work")

    def __init__(self, work: Callable[[], object], dispatcher: ThreadDispatcher) -> None:
        self._work = work
        self._dispatcher = dispatcher

    def __call__(self) -> None:
        self._dispatcher._run_program(self._work)


def _call(work: Callable[[], object]) -> None:
    contained(work, "a turn, outside its actor,", log)


class _Scheduled:
    """One entry of the timer's heap."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _TimerThread:
    """Makes scheduled calls on one thread, which is started when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._new: Inbox[tuple[float, int, _Scheduled] | None] = Inbox()
        self._order = itertools.count()
        self._runs: dict[str, int] = {}
        self._exclusive = Guard()
        self._closed = False

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        entry = _Scheduled(callback)
        if not self._closed:
            # One C call, which no signal can interrupt. Refused: a Condition around the heap. Its methods are Python
            # code, and a KeyboardInterrupt in them could leave its lock taken.
            self._new.put((time.monotonic() + delay_s, next(self._order), entry))
            if not self._runs:
                start_thread(self._begin)
        return entry

    def close(self) -> None:
        self._exclusive.run(self._begin_to_close)
        self._new.put(None)

    def _begin_to_close(self) -> None:
        self._closed = True

    def _begin(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._exclusive.run(self._start, thread)

    def _start(self, thread: threading.Thread) -> None:
        if not self._closed and not self._runs:
            try:
                thread.start()
            except RuntimeError as error:
                log.debug("no timer thread can be started: %s", error)  # the interpreter is exiting

    def _run(self) -> None:
        me = _thread.get_ident()
        if self._runs.setdefault("thread", me) != me:
            return  # two threads were started at once
        new, heap = self._new, list[tuple[float, int, _Scheduled]]()
        while not self._closed:
            wait_s = heap[0][0] - time.monotonic() if heap else None
            if wait_s is None or wait_s > 0:
                try:
                    item = new.get_within(wait_s)
                except Empty:
                    continue
                if item is not None:
                    heapq.heappush(heap, item)
                continue
            callback = heapq.heappop(heap)[2].callback
            if callback is not None:
                contained(callback, "a timer's callback", log)


def weakly(method: Callable[[], object]) -> Callable[[], object]:
    """Return a function that calls a bound method while its object exists, for `call_later`.

    A timer must not keep an engine in memory that the program dropped without close().
    """
    here = weakref.WeakMethod(method)

    def call() -> None:
        found = here()
        if found is not None:
            found()

    return call


def start_thread(target: Callable[[], object]) -> bool:
    """Call `target()`, which is short, on a new thread. Returns False if the interpreter starts no more threads.

    This is one C call. `Thread.start()` is Python code that waits for the new thread, and a KeyboardInterrupt in it can
    leave that thread waiting forever. No signal handler runs on the new thread, so it may use `Thread.start()`.
    """
    try:
        _thread.start_new_thread(target, ())
    except RuntimeError:
        return False
    return True
