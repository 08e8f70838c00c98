"""Threads that hand over through a queue: what they cost is a floor for everything that does more for each call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from scopestate.inbox import Inbox

HandOver = Callable[[Any], None]
"""Hands an item over, and waits until the thread on the other side has dealt with it."""


@contextmanager
def handing_over(work: Callable[[Sequence[Any]], object]) -> Iterator[HandOver]:
    """Start a thread that calls `work(items)` with all that wait, then wakes the caller of each.

    A caller is woken as often as one of the engine: once for each call, by a lock of its own.
    """
    inbox: deque[tuple[Any, Any]] = deque()
    tokens: Inbox[bool] = Inbox()

    def call(item: Any) -> None:
        lock = threading.Lock()
        lock.acquire()
        inbox.append((item, lock))
        if tokens.empty():
            tokens.put(True)
        lock.acquire()

    def run() -> None:
        while tokens.get():
            batch = [inbox.popleft() for _ in range(len(inbox))]
            if batch:
                work([item for item, _ in batch])
            for _, lock in batch:
                lock.release()

    thread = threading.Thread(target=run, name="hand-over")
    thread.start()
    try:
        yield call
    finally:
        tokens.put(False)
        thread.join()
