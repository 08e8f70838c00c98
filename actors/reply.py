"""Replies to messages: one kind that threads wait for, one that an event loop waits for."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Protocol, TypeVar

import pykka

T = TypeVar("T")
_ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class ReplyTo(Protocol):
    """Where an answer goes. Both methods may be called from any thread, one of them, once."""

    abandoned: bool
    """True if nobody waits any more: a message whose turn has not begun is then skipped."""

    def set(self, value: Any = None) -> None:
        """Deliver the answer."""

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""


class Reply(pykka.Future[T]):
    """A Pykka future for threads to wait on; every method may be called from any thread.

    Unlike Pykka's own, awaiting one suspends the task instead of blocking the event loop (DESIGN, section 2).
    """

    def __init__(self) -> None:
        super().__init__()
        # A bare lock, held until the outcome is there: a threading.Event costs ten times as much to make.
        self._arrival = threading.Lock()
        self._arrival.acquire()
        self._guard = threading.Lock()
        self._callbacks: list[Callable[[Reply[T]], object]] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False
        """True once the outcome is there; it never turns back."""
        self.abandoned = False

    def __repr__(self) -> str:
        return f"<scopestate reply, {'arrived' if self.done else 'not yet here'}>"

    def get(self, *, timeout: float | None = None) -> T:
        """Wait for the outcome, at most `timeout` seconds, and return it or raise it.

        Raises `pykka.Timeout` if nothing came in time; the message may still be handled later.
        """
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self.done:
            self._wait(timeout)
        if not self.done:
            raise pykka.Timeout(f"no reply within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # None is the value then, and T admits it

    def set(self, value: T | None = None) -> None:
        """Deliver the value and wake everybody who waits."""
        self._value = value
        self._arrive()

    def fail(self, error: BaseException) -> None:
        """Deliver an error and wake everybody who waits."""
        self._error = error
        self._arrive()

    def set_exception(self, exc_info: _ExcInfo | None = None) -> None:
        """Deliver an exception as Pykka does: the given one, else the one being handled."""
        error = (exc_info or sys.exc_info())[1]
        if error is None:
            raise ValueError("set_exception() needs an exception: pass exc_info, or call it while handling one")
        self.fail(error)

    def add_done_callback(self, callback: Callable[[Reply[T]], object]) -> None:
        """Call `callback(self)` when the outcome is there: at once if it is, else on the thread that delivers it."""
        with self._guard:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback(self)

    def __await__(self) -> Generator[Any, None, T]:
        """Suspend the running task until the outcome is there."""
        if not self.done and self._get_hook is None:
            waiter = LoopReply()
            self.add_done_callback(lambda _: waiter.set())
            yield from waiter.future.__await__()
        return self.get()

    def _wait(self, timeout: float | None) -> None:
        if self._arrival.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            self._arrival.release()  # the next one who waits gets through too

    def _arrive(self) -> None:
        with self._guard:
            if self.done:
                raise RuntimeError("a reply was delivered twice")
            self.done = True
            callbacks, self._callbacks = self._callbacks, []
        self._arrival.release()
        for callback in callbacks:
            callback(self)


class LoopReply:
    """A reply for a task: made on its event loop, delivered from any thread, awaited as `future`.

    A task that is cancelled while it waits abandons its message.
    """

    __slots__ = ("expired", "future", "loop")

    def __init__(self) -> None:
        self.expired = False
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()

    def expire(self) -> None:
        """The task has waited long enough: cancel its wait. On the loop's thread."""
        if not self.future.done():
            self.expired = True
            self.future.cancel()

    def set(self, value: Any = None) -> None:
        """Deliver the answer; the task goes on in a later round of its loop."""
        deliver([(self, value, None)])

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""
        deliver([(self, None, error)])


def deliver(outcomes: Iterable[tuple[ReplyTo, Any, BaseException | None]]) -> None:
    """Deliver many (reply, value, error) at once, waking each event loop one time only.

    Waking a loop is a system call, half the price of an asyncio writer's turn when 512 of them share a commit.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any, BaseException | None]]] = {}
    for reply, value, error in outcomes:
        if isinstance(reply, LoopReply):
            by_loop.setdefault(reply.loop, []).append((reply.future, value, error))
        elif error is None:
            reply.set(value)
        else:
            reply.fail(error)
    for loop, settled in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, settled)
        except RuntimeError:
            continue  # the loop was closed: no task is left there to wake


def _settle(settled: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, value, error in settled:
        if future.done():
            continue  # cancelled meanwhile
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
