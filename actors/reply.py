"""Replies that threads wait for. Those that event loops wait for are in `loops`."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pykka

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.loops import LoopReply
from scopestate.errors import Overloaded
from scopestate.signals import certainly, wait_for
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.router import EventRouter
    from scopestate.actors.scope import ScopeActor
    from scopestate.ops.turns import Turn

log = Log("scopestate.actors")
engine_log = Log("scopestate.engine")

T = TypeVar("T")
_ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class ReplyTo(Protocol):
    """Where an answer goes. `set` or `fail` is called once, from any thread."""

    @property
    def abandoned(self) -> bool:
        """True if the caller has stopped waiting: a message whose turn has not begun is then skipped."""

    def set(self, value: Any = None) -> None:
        """Deliver the answer."""

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""

    @property
    def loop_reply(self) -> LoopReply | None:
        """Return this reply if an event loop waits for it, else None. Such replies are delivered many at a time."""


class Envelope:
    """A message, and the reply that its answer goes to."""

    __slots__ = ("depth", "message", "reply_to")

    def __init__(self, message: Any, reply_to: ReplyTo) -> None:
        self.message = message
        self.reply_to = reply_to
        self.depth = event_depth.get()
        """The event depth of its sender, for a turn on another thread."""


class Reply(pykka.Future[T]):
    """A Pykka future for threads to wait on; every method may be called from any thread.

    Unlike Pykka's own, awaiting one suspends the task instead of blocking the event loop (docs/design/0003-turns.md).
    """

    loop_reply = None

    submit_program: Callable[[Callable[[], object]], object] | None = None
    """Runs callbacks of the program; None: they run where the outcome is delivered."""

    convert: Callable[[Any], T] | None = None
    """Converts what is delivered into the value; None: it is the value."""

    waiter: Callable[[Reply[T], float | None], None] | None = None
    """Waits instead of blocking, on a dispatcher that runs one turn at a time (see `deterministic`)."""

    _is_derived = False
    """True if its outcome is computed from that of other futures."""

    def __init__(self) -> None:
        super().__init__()
        # A lock that is held until the outcome is delivered: a threading.Event takes ten times as long to make.
        self._arrival = threading.Lock()
        self._arrival.acquire()
        self._open = [None]
        """Emptied by the thread that delivers. `pop` is one step; an exception could leave a lock taken."""
        self._callbacks: list[Callable[[Reply[T]], object]] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False
        """True once the outcome was delivered."""
        self.abandoned: bool = False

    def __repr__(self) -> str:
        return f"<scopestate reply, {'delivered' if self.done else 'open'}>"

    def set_get_hook(self, func: Callable[[float | None], T]) -> None:
        """Compute the outcome by `func(timeout)`, as Pykka's `map`, `filter`, `reduce` and `join` do."""
        super().set_get_hook(func)
        self._is_derived = True

    def get(self, *, timeout: float | None = None) -> T:
        """Wait for the outcome, at most `timeout` seconds, and return it or raise it.

        Raises `pykka.Timeout` if no answer comes in time; the message may still be handled later.
        """
        if self._is_derived:
            return super().get(timeout=timeout)
        if not self.done:
            self._wait(timeout)
        if not self.done:
            raise pykka.Timeout(f"no reply within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # None is the value then, and T admits it

    def set(self, value: T | None = None) -> None:
        """Deliver the value and wake every waiter."""
        if self.convert is not None:
            try:
                value = self.convert(value)
            except Exception as error:  # noqa: BLE001 - such as a MemoryError: the caller gets it
                self.fail(error)
                return
        self._arrive(value, None)

    def fail(self, error: BaseException) -> None:
        """Deliver an error and wake every waiter."""
        self._arrive(None, error)

    def set_exception(self, exc_info: _ExcInfo | None = None) -> None:
        """Deliver an exception as Pykka does: the given one, or the one being handled."""
        error = (exc_info or sys.exc_info())[1]
        if error is None:
            raise ValueError("set_exception() needs an exception: pass exc_info, or call it while handling one")
        self.fail(error)

    def add_done_callback(self, callback: Callable[[Reply[T]], object]) -> None:
        """Call `callback(self)` once the outcome is delivered: now if it already is, else on a worker thread.

        Not on the thread that delivers it, which is in the middle of a turn or of a save: a callback may block.
        """
        submit = self.submit_program
        if submit is None or self.done:
            self.when_done(callback)
        else:
            self.when_done(lambda reply: submit(lambda: callback(reply)))

    def when_done(self, callback: Callable[[Reply[T]], object]) -> None:
        """As `add_done_callback`, for quick callbacks: they run on the thread that delivers the outcome."""
        self._callbacks.append(callback)
        # Checked after that: a thread that delivers in between has seen the callback, or its outcome is seen here.
        if self.done:
            self._call_back()

    def __await__(self) -> Generator[Any, None, T]:
        """Suspend the running task until the outcome is delivered."""
        if not self.done and not self._is_derived:
            waiter = LoopReply()
            self.when_done(lambda _: waiter.set())
            yield from waiter.future.__await__()
        return self.get()

    def _wait(self, timeout: float | None) -> None:
        if self.waiter is not None:
            self.waiter(self, timeout)
            return
        wait_for(self._arrived, timeout)

    def _arrived(self, timeout_s: float) -> bool:
        if self._arrival.acquire(timeout=timeout_s):
            self._arrival.release()  # for the next thread that waits
        return self.done

    def _arrive(self, value: T | None, error: BaseException | None) -> None:
        try:
            self._open.pop()
        except IndexError:
            raise RuntimeError("a reply was delivered twice") from None
        self._value, self._error = value, error
        self.done = True
        self._arrival.release()
        if self._callbacks:
            self._call_back()

    def _call_back(self) -> None:
        """Call each callback once. Several threads may do so at the same time."""
        callbacks = self._callbacks
        passes: BaseException | None = None
        while callbacks:
            try:
                callback = callbacks.pop(0)
            except IndexError:
                break
            try:
                callback(self)
            except BaseException as problem:
                # This runs in the middle of another call, and other answers must still be delivered.
                if is_from_outside(problem):
                    passes = problem
                else:
                    log.exception("a callback of a reply failed")
        if passes is not None:
            raise passes


class PatientReply(Reply[Any]):
    """A reply that sends its turn again once a full handler has room, so that the sender need not wait for it."""

    def __init__(
        self, router: EventRouter, scopes: Mapping[str, ScopeActor], scope: str, convert: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.waiter = router._dispatcher.waiter
        self.submit_program = router._dispatcher.submit_program
        self.convert = convert
        self._backlog = router.backlog
        self._scopes = scopes
        self._scope = scope
        self._envelope: Envelope | None = None

    def wrap(self, turn: Turn[Any]) -> Envelope:
        """Return the envelope that the sender sends, and that is sent again."""
        self._envelope = Envelope(turn, self)
        return self._envelope

    def set(self, value: Any = None) -> None:
        super().set(value)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, HandlerFull):
            size = self._envelope.message.size() if self._envelope is not None else 0
            if self._backlog.has_waiting_room():
                self._backlog.when_room(self._send_again, error, size)
            else:
                self._backlog.refused.add()
                self.fail(
                    Overloaded("nothing was written: a handler is behind, and too many messages wait for it already")
                )
        else:
            super().fail(error)
            self._let_go()

    def _let_go(self) -> None:
        """Drop the turn. The envelope refers to this reply, so only the garbage collector would free the two."""
        self._envelope = None

    def _send_again(self) -> None:
        # Called for one sender after another: a refusal is the answer of this one, and must not stop the others.
        envelope = self._envelope
        if envelope is None:
            return
        try:
            # Queued: the thread that has made room is in the middle of a handler's turn.
            self._scopes[self._scope].post(envelope)
        except BaseException as error:
            if is_from_outside(error):
                raise
            self.fail(error)


class Told(PatientReply):
    """The reply to a `tell`. It is not read, so a refusal is logged."""

    def set(self, value: Any = None) -> None:
        """Take the answer, which is not read."""
        self._let_go()

    def fail(self, error: BaseException) -> None:
        if isinstance(error, HandlerFull):
            super().fail(error)
        else:
            engine_log.error("a message sent with tell() was refused: %s", error, exc_info=error)
            self._let_go()


def deliver(outcomes: Iterable[tuple[ReplyTo, Any, BaseException | None]]) -> None:
    """Deliver many (reply, value, error) at once, waking each event loop only once.

    Waking a loop is a system call: half of the time of an asyncio write when 512 of them share a commit.
    """
    for_loops: list[tuple[LoopReply, Any, BaseException | None]] = []
    for reply, value, error in outcomes:
        waiter = reply.loop_reply
        if waiter is not None:
            for_loops.append((waiter, value, error))
        else:
            settle(reply, value, error)
    if for_loops:
        for_loops[0][0].deliver_all(for_loops)


def settle(reply: ReplyTo, value: Any, error: BaseException | None) -> None:
    """Deliver one outcome. If that raises, log it, so that the other callers get theirs."""
    try:
        if error is None:
            reply.set(value)
        else:
            reply.fail(error)
    except BaseException as problem:
        if is_from_outside(problem):
            raise
        certainly(functools.partial(fail_if_open, reply, problem))
        log.exception("an answer could not be delivered")


def fail_if_open(reply: ReplyTo, error: BaseException) -> None:
    """Deliver `error` if the delivery of the answer was interrupted, as by a MemoryError: its thread still waits."""
    if not getattr(reply, "done", True):
        reply.fail(error)
