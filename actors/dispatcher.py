"""Who runs the turns: the dispatcher gives actors threads and time."""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from scopestate.actors.reply import Reply

if TYPE_CHECKING:
    from scopestate.actors.turn import TurnActor

log = logging.getLogger("scopestate.actors")


class Timer(Protocol):
    """A call that will happen later."""

    def cancel(self) -> None:
        """Let it not happen, if it has not yet. Idempotent, from any thread."""


class Dispatcher(Protocol):
    """Gives actors threads and time. Injected, so that tests can order every turn (see `deterministic`)."""

    def schedule(self, actor: TurnActor) -> None:
        """Have `actor.run_batch()` called soon, on a thread where no signal handler runs."""

    def submit(self, work: Callable[[], object]) -> None:
        """Call `work()` soon on a worker thread, where it may block."""

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` after `delay_s` seconds; it must be quick and must not raise."""

    waiter: Callable[[Reply[Any], float | None], None] | None
    """How threads wait for a reply, some seconds at most; None: they block."""

    def reply(self) -> Reply[Any]:
        """Make a future that threads of this dispatcher can wait for."""

    def claim(self, actor: TurnActor) -> dict[str, int]:
        """Make the claim of a new actor: an empty dict, into which the thread that runs a turn puts itself."""

    def monotonic(self) -> float:
        """Seconds on the clock that `call_later` goes by."""

    def threads(self) -> int:
        """Threads alive now, without the timer's."""

    def close(self) -> None:
        """End every thread once it is done with what is scheduled; what comes later runs on the thread that brings it."""


class ThreadDispatcher:
    """Worker threads fed by one queue of ready actors, and a timer thread; all started when first needed.

    The pool grows when every worker is busy and actors wait, because a handler may block for as long as it likes and
    must not delay the others; it shrinks again after ten idle seconds. Threads are daemons: the engine's exit hook
    saves before they die.
    """

    IDLE_S = 10.0
    """A worker that had nothing to do for this long ends."""
    STALL_S = 0.005
    """Actors that wait this long while no worker is idle get one more worker."""
    MOST = 512
    """Workers at most; more are never started, and that is logged."""

    waiter = None

    def __init__(self, name: str = "scopestate") -> None:
        self._name = name
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle: list[None] = []
        self._workers = 0
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._watched = False
        self._closed = False
        self._timer = _TimerThread(f"{name}-timer")

    def schedule(self, actor: TurnActor) -> None:
        self.submit(actor.run_batch)

    def submit(self, work: Callable[[], object]) -> None:
        self._ready.put(work)
        if not self._idle:
            self._look_after_queue()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._timer.call_later(delay_s, callback)

    def reply(self) -> Reply[Any]:
        return Reply()

    def claim(self, actor: TurnActor) -> dict[str, int]:  # noqa: ARG002 - all claims are alike here
        return {}

    def monotonic(self) -> float:
        return time.monotonic()

    def threads(self) -> int:
        return self._workers

    def close(self) -> None:
        with self._guard:
            self._closed = True
            workers = self._workers
        for _ in range(workers):
            self._ready.put(None)
        self._timer.close()

    def _look_after_queue(self) -> None:
        """Nobody is idle: start the first worker at once, and see in a moment whether one more is needed."""
        if self._closed:
            self._run_left_over()
        elif self._workers == 0:
            self._add_worker()
        elif not self._watched:
            self._watched = True
            self._timer.call_later(self.STALL_S, self._relieve)

    def _relieve(self) -> None:
        self._watched = False
        if self._idle or self._ready.empty() or self._closed:
            return
        self._add_worker()
        self._look_after_queue()

    def _run_left_over(self) -> None:
        """No worker will come any more: what is scheduled now runs here, so that nobody waits for ever.

        These are messages that crossed with the engine's end; their actors refuse them.
        """
        ends = 0
        try:
            while True:
                work = self._ready.get_nowait()
                if work is None:
                    ends += 1
                else:
                    work()
        except queue.Empty:
            for _ in range(ends):
                self._ready.put(None)  # for the workers that are still in a turn

    def _add_worker(self) -> None:
        with self._guard:
            if self._closed or self._workers >= self.MOST:
                return
            self._workers += 1
            if self._workers == self.MOST:
                log.error("all %d worker threads are blocked in handlers; events now wait for one to end", self.MOST)
        threading.Thread(target=self._work, name=f"{self._name}-{next(self._numbers)}", daemon=True).start()

    def _work(self) -> None:
        ready, idle = self._ready, self._idle
        while True:
            idle.append(None)
            try:
                work = ready.get(timeout=self.IDLE_S)
            except queue.Empty:
                work = None
            idle.pop()
            if work is None:
                break
            if not idle and not ready.empty():
                # Whoever scheduled those may have counted on this worker.
                self._look_after_queue()
            try:
                work()
            except Exception:
                log.exception("a turn failed outside its actor")
        with self._guard:
            self._workers -= 1
        if not self._closed and not ready.empty():
            self._look_after_queue()


class _Scheduled:
    """One entry of the timer's heap."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _TimerThread:
    """Calls back at set times, on one thread that is started when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._heap: list[tuple[float, int, _Scheduled]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        entry = _Scheduled(callback)
        due = time.monotonic() + delay_s
        with self._changed:
            if self._closed:
                return entry
            heapq.heappush(self._heap, (due, next(self._order), entry))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._heap[0][2] is entry:
                self._changed.notify()
        return entry

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while True:
                    if self._closed:
                        return
                    wait_s = self._heap[0][0] - time.monotonic() if self._heap else None
                    if wait_s is not None and wait_s <= 0:
                        break
                    self._changed.wait(wait_s)
                callback = heapq.heappop(self._heap)[2].callback
            if callback is not None:
                try:
                    callback()
                except Exception:
                    log.exception("a timer's callback failed")
