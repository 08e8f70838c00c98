"""Replies that event loops wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from scopestate.actors.functions import running_loop


class LoopReply:
    """A reply for a task: made on its event loop, delivered from any thread, awaited as `future`.

    If the task is cancelled while it waits, the message is abandoned.
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
        """Cancel the wait of the task: its time is over. On the loop's thread."""
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

    There is one timer for all waits of one length, of which the oldest is due first. A timer for each (`call_later`,
    `asyncio.wait_for`) took a quarter of the time of an asyncio write that shares a commit. Usually all waits have the
    same length; a reload of `call_timeout_ms` adds another, until the last wait of the old length is over. Refused: a
    heap, which would keep each reply until it is due, although nearly all are answered long before.
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
