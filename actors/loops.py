"""Event loops: calls onto them from other threads, replies that their tasks wait for, and the engine's own loop.

asyncio takes 20 ms to import, which programs without coroutines can save: it is imported where it is needed.
"""

from __future__ import annotations

import contextvars
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

from scopestate.actors.containment import Log, contained, is_from_outside
from scopestate.actors.functions import close_unrun, running_loop
from scopestate.signals import Guard, exclusive, join

if TYPE_CHECKING:
    import asyncio

    from scopestate.actors.dispatcher import Dispatcher

log = Log("scopestate.triggers")

Continue = Callable[[Any, BaseException | None], None]
"""Takes the outcome of an awaitable: a value, or an error."""

CANCEL_GRACE_S: Final = 1.0
"""How long a cancelled coroutine may take to end before it is abandoned. It is cancelled at its time limit, or when the
engine's own loop ends."""

LOOK_S: Final = 0.25
"""How often open calls are checked: their event loop may have been closed."""

ANSWER_S: Final = 1.0
"""An event loop that has not answered for this long counts as blocked."""


class Thrown:
    """An error as an outcome, for `unwrapped`.

    Throwing GeneratorExit into a coroutine closes the coroutines that it awaits, before any of them can handle it.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def unwrapped(outcome: Any) -> Any:
    """Return an outcome, or raise the error that it is."""
    if type(outcome) is Thrown:
        raise outcome.error
    return outcome


class Pending(Protocol):
    """What the delivery of a handler waits for without a thread."""

    def start(self, go_on: Continue) -> None:
        """Begin; call `go_on` once, from any thread, with the outcome. Must not raise."""


class Overdue(Exception):
    """The awaitable took longer than its time limit. Not TimeoutError, which the awaitable itself may raise."""


class LoopCalls:
    """The calls of one engine that are in progress on event loops.

    An event loop that is blocked, stopped or closed runs no timers, so the dispatcher's timer keeps the time limits and
    checks the loops. Every method may be called from any thread.
    """

    def __init__(self, dispatcher: Dispatcher, replace: Callable[[asyncio.AbstractEventLoop], object]) -> None:
        self._dispatcher = dispatcher
        self._replace = replace
        self._open: dict[OnLoop, None] = {}
        self._next_look = math.inf
        self._pulses: dict[asyncio.AbstractEventLoop, _Pulse] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, call: OnLoop) -> None:
        """Watch a call until `remove`."""
        now = self._dispatcher.monotonic()
        call.began_s = now
        if call.timeout_s:
            call.due_s = now + call.timeout_s
        self._open[call] = None
        self._look_at(min(call.due_s, now + LOOK_S), now)

    def remove(self, call: OnLoop) -> None:
        """Stop watching a call, which has its outcome."""
        self._open.pop(call, None)

    def give_up(self, call: OnLoop) -> None:
        """Replace the engine's own loop by a new one if it is the loop of `call`, which it could not even cancel."""
        self._replace(call.loop)

    def problems(self) -> list[str]:
        """Describe the open calls that wait for a loop that does not run, or are overdue."""
        now = self._dispatcher.monotonic()
        return [problem for call in list(self._open) if (problem := self._problem_of(call, now)) is not None]

    def _problem_of(self, call: OnLoop, now: float) -> str | None:
        if call.is_settled():
            return None
        loop = call.loop
        if loop.is_closed():
            return f"{call.what} waits for an event loop that is closed"
        if not loop.is_running():
            return f"{call.what} waits for an event loop that is not running"
        pulse = self._pulses.get(loop)
        silent_s = max(0.0 if call.has_begun else now - call.began_s, 0.0 if pulse is None else pulse.silent_s(now))
        if silent_s > ANSWER_S:
            return f"{call.what} waits for an event loop that has been blocked for {silent_s:.1f} s"
        if call.is_overdue:
            return f"{call.what} is overdue"
        return None

    def _look_at(self, due: float, now: float) -> None:
        # A check that is overdue may never come: the call that had asked for it may have been interrupted between these
        # two lines.
        if due < self._next_look or self._next_look < now - LOOK_S:
            self._next_look = due
            self._dispatcher.call_later(max(due - now, 0.0), lambda: self._look(due))

    def _look(self, due: float) -> None:
        # Cleared before the calls are listed: a call that is added in between is either listed or asks for a check.
        if due == self._next_look:
            self._next_look = math.inf
        now = self._dispatcher.monotonic()
        for call in list(self._open):
            contained(lambda call=call: call.look(now), "checking a call on an event loop", log)  # type: ignore[misc]  # mypy cannot infer a default argument
        calls = list(self._open)
        loops = {call.loop: None for call in calls}
        for loop in loops:
            self._pulses.setdefault(loop, _Pulse(loop)).look(now)
        for loop in list(self._pulses):
            if loop not in loops:
                del self._pulses[loop]
        if calls:
            self._look_at(min([now + LOOK_S, *(call.due_s for call in calls)]), now)


class _Pulse:
    """Checks regularly whether one event loop still runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked_s = -math.inf
        self._answered = True

    def silent_s(self, now: float) -> float:
        """Return for how long it has not answered."""
        return 0.0 if self._answered else now - self._asked_s

    def look(self, now: float) -> None:
        if not self._answered:
            return
        self._asked_s, self._answered = now, False
        try:
            self._loop.call_soon_threadsafe(self._answer)
        except RuntimeError:
            return  # the loop is closed; its calls find that out

    def _answer(self) -> None:
        self._answered = True


class OnLoop:
    """An awaitable that runs on an event loop while the actor that awaits it keeps no thread.

    Whatever it raises is its outcome, including SystemExit and CancelledError; the loop continues. It is cancelled at
    its time limit. If it does not end then, or its loop does not run, it is abandoned.
    """

    def __init__(
        self,
        awaitable: Awaitable[Any],
        loop: asyncio.AbstractEventLoop,
        calls: LoopCalls,
        what: str,
        timeout_s: float = 0.0,
        stopped_s: float | None = None,
    ) -> None:
        """`what` names it in messages.

        `stopped_s`: abandon it when its loop has not been running for this many seconds, or has been blocked for this
        many seconds before it began.
        """
        self.loop = loop
        self.what = what
        self.timeout_s = timeout_s
        self.began_s = 0.0
        self.due_s = math.inf
        """When it must next be checked because of a time limit."""
        self.has_begun = False
        self.is_overdue = False
        self._awaitable = awaitable
        self._calls = calls
        self._stopped_s = stopped_s
        self._ran_s = -math.inf
        self._outlets: list[Continue] = []
        self._task: asyncio.Task[Any] | None = None
        self._cancel_was_taken = False
        self._cancelled = False

    def __await__(self) -> Generator[OnLoop, Any, Any]:
        return unwrapped((yield self))

    def is_settled(self) -> bool:
        """True once there is an outcome."""
        return not self._outlets

    def start(self, go_on: Continue) -> None:
        """Run it on its loop; `go_on` is called once, with the outcome."""
        self._outlets.append(go_on)
        try:
            self._calls.add(self)
            # In the context of the caller, which holds the depth of the event.
            self.loop.call_soon_threadsafe(self._begin, context=contextvars.copy_context())
        except BaseException as error:
            self._settle(None, RuntimeError(f"the event loop it belongs to takes no calls: {error}"))
            if is_from_outside(error):
                raise

    def cancel(self) -> None:
        """Cancel it: the caller has stopped waiting. From any thread."""
        self._cancelled = True
        self._settle(None, _cancelled("the caller was cancelled"))
        self._ask_to_cancel()

    def look(self, now: float) -> None:
        """Check whether it is late, or its loop was closed. Called on the dispatcher's timer."""
        loop = self.loop
        if loop.is_closed():
            self._settle(None, RuntimeError("the event loop it belongs to was closed before it was done"))
            return
        running = loop.is_running()
        if running and self.has_begun:
            self._ran_s = now
        elif self._stopped_s is not None and now - max(self._ran_s, self.began_s) >= self._stopped_s:
            problem = (
                f"has been blocked for {self._stopped_s:g} s, so it was not begun" if running else "is not running"
            )
            self._settle(None, RuntimeError(f"the event loop it belongs to {problem}"))
            return
        if now < self.due_s:
            return
        if not self.is_overdue:
            self.is_overdue = True
            if self.has_begun and loop.is_running():
                self.due_s = now + CANCEL_GRACE_S
                self._ask_to_cancel()
                return
        if not self._cancel_was_taken:
            self._calls.give_up(self)
        self._settle(None, None)

    def _ask_to_cancel(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:
            return  # the loop is closed; the next check finds that out

    # ------------------------------------------------------------------------------------------------- on the loop

    def _begin(self) -> None:
        self.has_begun = True
        if self.is_settled():
            self._drop()
            return
        outcome = _outcome(self._awaitable)
        try:
            self._task = self.loop.create_task(outcome)
            self._task.add_done_callback(self._finished)
        except BaseException as error:  # a loop of a class, or with a task factory, of the program's own
            outcome.close()
            self._settle(None, error)
            if is_from_outside(error):
                raise

    def _cancel(self) -> None:
        self._cancel_was_taken = True
        if self._task is not None:
            self._task.cancel()

    def _finished(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():  # before its first step
            self._drop()
            self._settle(None, _cancelled("the task was cancelled"))
        elif (passing := task.exception()) is not None:
            self._settle(None, passing)
        else:
            self._settle(*task.result())

    # ------------------------------------------------------------------------------------------------- the outcome

    def _settle(self, value: Any, error: BaseException | None) -> None:
        try:
            go_on = self._outlets.pop()  # atomic: one of two threads gets it
        except IndexError:
            return
        self._calls.remove(self)
        if self.is_overdue:
            value, error = None, Overdue(f"not done within {self.timeout_s:g} s")
        if not self.has_begun:
            self._drop()  # if the loop runs again later, it finds the call settled
        contained(lambda: go_on(value, error), f"continuing after {self.what}", log)

    def _drop(self) -> None:
        """Close a coroutine that never began: otherwise Python warns that it was never awaited."""
        close_unrun(self._awaitable)


def _cancelled(text: str) -> BaseException:
    import asyncio  # noqa: PLC0415 - see above

    return asyncio.CancelledError(text)


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result of `awaitable`, or the error that it raises.

    A task that raised SystemExit would end its event loop.
    """
    import asyncio  # noqa: PLC0415 - see above

    try:
        return await awaitable, None
    except asyncio.CancelledError as error:
        return None, error if error.args else _cancelled("the task was cancelled")
    except BaseException as error:
        if is_from_outside(error):
            raise
        return None, error


_Running = tuple["asyncio.AbstractEventLoop | None", threading.Thread | None]


class LoopThread:
    """An event loop on a thread of its own, for coroutine functions registered outside any loop.

    Code that stops the loop (a task that raises SystemExit, `stop()`) does not end the thread: it runs the loop again.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._exclusive = Guard()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ending: set[asyncio.AbstractEventLoop] = set()

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first call, and one after its end, starts a thread."""
        loop = self._loop
        return loop if loop is not None and not loop.is_closed() else self._begin()

    @exclusive
    def _begin(self) -> asyncio.AbstractEventLoop:
        import asyncio  # noqa: PLC0415 - see above

        if self._loop is None or self._loop.is_closed():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
            thread.start()
            # Only now: an interrupted start is repeated.
            self._loop, self._thread = loop, thread
        return self._loop

    @exclusive
    def _take(self, wanted: asyncio.AbstractEventLoop | None) -> _Running:
        """Take the loop and its thread out of use, if it is the `wanted` one; None: whichever it is."""
        loop, thread = self._loop, self._thread
        if wanted is not None and loop is not wanted:
            return None, None
        self._loop = self._thread = None
        return loop, thread

    def replace(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abandon `loop`, which is blocked, if it is the one in use. The next call gets a new loop."""
        if self._take(loop)[0] is None:
            return
        log.error(
            "the engine's event loop is blocked by a coroutine that never yields; it is abandoned, and a new one "
            "runs all further calls"
        )
        self._end(loop)

    def close(self) -> None:
        """Cancel the tasks that still run on it, end the thread and close the loop. Idempotent."""
        loop, thread = self._take(None)
        if loop is None or thread is None:
            return
        self._end(loop)
        if thread is not threading.current_thread():
            join(thread, 5.0)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ending.add(loop)
        try:
            loop.call_soon_threadsafe(loop.stop)
        except RuntimeError:
            return  # closed already

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio  # noqa: PLC0415 - see above

        asyncio.set_event_loop(loop)
        try:
            while loop not in self._ending:
                self._run_until_stopped(loop)
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                self._finish(loop, asyncio.wait(left, timeout=CANCEL_GRACE_S))
            self._finish(loop, loop.shutdown_asyncgens())
        finally:
            loop.close()
            self._ending.discard(loop)

    @staticmethod
    def _finish(loop: asyncio.AbstractEventLoop, rest: Coroutine[Any, Any, Any]) -> None:
        try:
            loop.run_until_complete(rest)
        except BaseException as error:
            log.exception("%s at the end of the engine's event loop", type(error).__name__)

    @staticmethod
    def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        except BaseException as error:
            log.exception(
                "%s escaped from a task or callback on the engine's event loop, which keeps running",
                type(error).__name__,
            )


class LoopReply:
    """A reply for a task: made on its event loop, delivered from any thread, awaited as `future`.

    If the task is cancelled while it waits, the message is abandoned.
    """

    __slots__ = ("expired", "future", "loop")

    def __init__(self) -> None:
        self.expired = False
        loop = running_loop()
        if loop is None:
            raise RuntimeError("no running event loop")  # as asyncio says it
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()

    def expire(self) -> None:
        """Cancel the wait of the task, whose time is over. On the loop's thread."""
        if not self.future.done():
            self.expired = True
            self.future.cancel()

    def set(self, value: Any = None) -> None:
        """Deliver the answer. The task continues in a later iteration of its loop."""
        self.deliver_all([(self, value, None)])

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""
        self.deliver_all([(self, None, error)])

    @property
    def loop_reply(self) -> LoopReply:
        return self

    @staticmethod
    def deliver_all(outcomes: Iterable[tuple[LoopReply, Any, BaseException | None]]) -> None:
        """Deliver many, waking each event loop only once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any, BaseException | None]]] = {}
        for reply, value, error in outcomes:
            by_loop.setdefault(reply.loop, []).append((reply.future, value, error))
        here = running_loop()
        for loop, settled in by_loop.items():
            if loop is here:
                _settle(settled)
                continue
            try:
                loop.call_soon_threadsafe(_settle, settled)
            except RuntimeError:
                continue  # the loop was closed, so it has no tasks to wake


class Deadlines:
    """Expires the replies of one event loop that have waited too long. Used on the loop's thread only.

    There is one timer for all waits of the same length, of which the oldest is due first. A timer for each
    (`call_later`, `asyncio.wait_for`) took a quarter of the time of an asyncio write that shares a commit. Usually all
    waits have the same length; a reload of `call_timeout_ms` adds another, until the last wait of the old length is
    over. Refused: a heap, which would keep each reply until it is due, although nearly all are answered long before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waits: dict[float, dict[LoopReply, float]] = {}
        """Length of the wait in seconds -> reply -> when it is due. Each length in here has a timer."""

    def add(self, reply: LoopReply, timeout_s: float) -> None:
        """Expire `reply` in `timeout_s` seconds."""
        waits = self._waits.get(timeout_s)
        if waits is None:
            waits = self._waits[timeout_s] = {}
            self._loop.call_later(timeout_s, self._look, timeout_s)
        waits[reply] = self._loop.time() + timeout_s

    def remove(self, reply: LoopReply) -> None:
        """Forget a reply whose wait is over."""
        for waits in self._waits.values():
            waits.pop(reply, None)

    def _look(self, timeout_s: float) -> None:
        now, waits = self._loop.time(), self._waits[timeout_s]
        for reply, due in list(waits.items()):
            if due > now:
                self._loop.call_later(due - now, self._look, timeout_s)
                return
            del waits[reply]
            reply.expire()
        del self._waits[timeout_s]


def _settle(settled: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, value, error in settled:
        if future.done():
            continue  # it was cancelled
        if error is None:
            future.set_result(value)
        elif isinstance(error, StopIteration):
            # A future does not accept it, and the other futures must still get their outcomes.
            future.set_exception(RuntimeError(f"StopIteration was raised: {error}"))
        else:
            future.set_exception(error)
