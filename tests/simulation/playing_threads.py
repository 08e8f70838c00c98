"""Threads, locks, events and time of modules that make their own, as a deterministic dispatcher runs them."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import pykka

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.reply import Reply
from scopestate.inbox import Empty
from tests.simulation.model import Violation

_LATE_S: Final = 1e-6
"""A thread is woken this much later than it asked for, so that rounding cannot make it wait for a time that is now."""


MOST_WAITS: Final = 50_000
"""A run in which threads go to sleep more often than this does not end."""


class Play:
    """Which dispatcher runs what is made now: one for all modules that are patched."""

    def __init__(self) -> None:
        self.use(DeterministicDispatcher(0))

    def use(self, dispatcher: DeterministicDispatcher) -> None:
        """Make everything that is created from now on run on this dispatcher."""
        self.dispatcher = dispatcher
        self.waits = 0

    def wait(self, waiting: list[Reply[None]], timeout_s: float | None) -> bool:
        """Stop until another thread sets the reply that this puts into `waiting`; False after `timeout_s`."""
        self.waits += 1
        if self.waits > MOST_WAITS:
            raise Violation("threads wake and sleep again without end")
        reply: Reply[None] = self.dispatcher.reply()
        waiting.append(reply)
        try:
            reply.get(timeout=None if timeout_s is None else timeout_s + _LATE_S)
        except pykka.Timeout:
            with contextlib.suppress(ValueError):
                waiting.remove(reply)
            return reply.done
        return True

    @staticmethod
    def wake(waiting: list[Reply[None]]) -> None:
        """Wake the thread that has waited longest."""
        if waiting:
            waiting.pop(0).set(None)

    def monotonic(self) -> float:
        """Seconds on the clock of the dispatcher that is in use."""
        return self.dispatcher.monotonic()

    def sleep(self, pause_s: float) -> None:
        """Let this many seconds pass."""
        self.dispatcher.sleep(pause_s)

    @contextlib.contextmanager
    def in_modules(self, *modules: types.ModuleType) -> Iterator[None]:
        """Make these modules take threads and time from here."""
        stand_ins = {
            "threading": types.SimpleNamespace(
                Lock=lambda: PlayedLock(self),
                Event=lambda: PlayedEvent(self),
                Thread=lambda **options: PlayedThread(self, **options),
                main_thread=threading.main_thread,
            ),
            "_thread": types.SimpleNamespace(start_new_thread=lambda work, _: self.dispatcher.submit(work)),
            "time": types.SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep),
            "Inbox": lambda: PlayedInbox(self),
            "wait_for": lambda wait, timeout_s=None: wait(timeout_s),
            "join": lambda thread, timeout_s=None: thread.join(timeout_s),
        }
        with contextlib.ExitStack() as patches:
            for module in modules:
                for name, stand_in in stand_ins.items():
                    if hasattr(module, name):
                        patches.enter_context(mock.patch.object(module, name, stand_in))
            yield


class PlayedLock:
    """A lock; taking it is a point where other threads may go first."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._is_taken = False
        self._waiting: list[Reply[None]] = []

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if self._is_taken:
            limit_s = None if timeout is None or timeout < 0 else timeout
            if not blocking or not self._play.wait(self._waiting, limit_s):
                return False
        self._is_taken = True
        return True

    def release(self) -> None:
        assert self._is_taken, "a lock is released twice: a call was answered twice"
        if self._waiting:
            self._play.wake(self._waiting)  # it stays taken: by the thread that is woken
        else:
            self._is_taken = False

    def locked(self) -> bool:
        return self._is_taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class PlayedEvent:
    """An event."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._is_set = False
        self._waiting: list[Reply[None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        while self._waiting:
            self._play.wake(self._waiting)

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._is_set or self._play.wait(self._waiting, timeout)


class PlayedThread:
    """A thread, as work on a worker of the dispatcher."""

    def __init__(self, play: Play, target: Callable[[], object], name: str = "", daemon: bool = True) -> None:
        self._play = play
        self._target = target
        self._waiting: list[Reply[None]] = []
        self.name = name
        self.daemon = daemon
        self._is_over = False

    def start(self) -> None:
        def work() -> None:
            try:
                self._target()
            finally:
                self._is_over = True
                while self._waiting:
                    self._play.wake(self._waiting)

        work.__qualname__ = self.name
        self._play.dispatcher.submit(work)

    def join(self, timeout: float | None = None) -> bool:
        return self._is_over or self._play.wait(self._waiting, timeout)

    def is_alive(self) -> bool:
        return not self._is_over


class PlayedInbox:
    """The queue that a thread sleeps at."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._items: list[Any] = []
        self._waiting: list[Reply[None]] = []
        self.sleeps_until: float | None = None
        """While a thread sleeps here: until when, at the latest."""

    def put(self, item: Any) -> None:
        self._play.dispatcher.give_way()
        self._items.append(item)
        self._play.wake(self._waiting)

    def get_within(self, timeout_s: float | None) -> Any:
        self.sleeps_until = float("inf") if timeout_s is None else self._play.monotonic() + timeout_s
        try:
            while not self._items:
                if not self._play.wait(self._waiting, timeout_s):
                    raise Empty
            return self._items.pop(0)
        finally:
            self.sleeps_until = None

    def get_nowait(self) -> Any:
        if not self._items:
            raise Empty
        return self._items.pop(0)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class PlayedClaim(dict[str, int]):
    """A claim, around whose taking and giving back other threads may go first."""

    def __init__(self, play: Play) -> None:
        super().__init__()
        self._play = play

    def setdefault(self, key: str, default: int, /) -> int:
        self._play.dispatcher.give_way()
        holder = super().setdefault(key, default)
        self._play.dispatcher.give_way()
        return holder

    def pop(self, key: str, *default: Any) -> Any:
        found = super().pop(key, *default)
        self._play.dispatcher.give_way()
        return found

    def __delitem__(self, key: str, /) -> None:
        super().__delitem__(key)
        self._play.dispatcher.give_way()
