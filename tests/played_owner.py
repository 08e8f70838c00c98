"""What stands in for threads, locks, event loops and descriptors when a connection owner is stepped through worlds.

Used with `interleaving`: `tests/redis/owner_model.py` and `tests/connections/patient_model.py`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from interleaving import SharedDeque, SharedDict, World, sharing

from scopestate.inbox import Empty
from scopestate.persistence.connections import owner as owner_module
from scopestate.persistence.connections import watch as watch_module
from scopestate.persistence.connections.owner import ConnectionOwner

_SHARED = ("_wanted", "_is_news", "_at_socket")
LEFT_OUT = frozenset(
    {
        "_pushed", "_round", "_sent_at", "_due", "_trip_s", "since", "thread",  # only speed depends on these
        "model", "world", "_world", "_clock", "_uniform", "_deliver", "_target", "_wake", "_thread", "_log", "_peer",
        "_pauses_s", "me", "now",  # constant
    }
)  # fmt: skip
"""Names of fields and local variables that make no difference."""


class Model(Protocol):
    """What a model has that uses these."""

    world: World
    time: list[float]
    """Seconds on its clock, as its only item."""


def is_limit(wait_s: float | None) -> bool:
    """True if a wait ends by itself."""
    return wait_s is not None and wait_s < math.inf


class Tokens:
    """Stands in for the inbox at which the I/O thread sleeps. Time passes only there."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.count = 0

    def put(self, token: object) -> None:
        self.model.world.point("asks")
        self.count = min(self.count + 1, 2)  # more of them say no more

    def empty(self) -> bool:
        self.model.world.point("asked already?")
        return self.count == 0

    def get_within(self, wait_s: float | None) -> None:
        came = self.model.world.wait("sleeps", lambda: self.count > 0, "time" if is_limit(wait_s) else None)
        if not came:
            assert wait_s is not None
            self.model.time[0] += wait_s
            raise Empty
        self.count -= 1

    def get_nowait(self) -> None:
        self.model.world.point("takes a token")
        if not self.count:
            raise Empty
        self.count -= 1


class Lock:
    """Stands in for the lock at which a caller waits for its answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_free = True

    def acquire(self, timeout: float | None = None) -> bool:
        if self.is_free and self.world.current is None:
            self.is_free = False
            return True
        if self.is_free and timeout is None:
            self.is_free = False
            return True
        came = self.world.wait("waits for its answer", lambda: self.is_free, "timeouts")
        if came:
            self.is_free = False
        return came

    def release(self) -> None:
        assert not self.is_free, "a call was answered twice"
        self.is_free = True


class Loop:
    """An event loop: calls back when the line has something, when it was asked to, and when time is over."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.reader: tuple[Callable[[Any], None], Any] | None = None
        self.soon: list[tuple[Any, ...]] = []
        self.timers: list[tuple[float, Any, Any]] = []

    def add_reader(self, fd: int, callback: Callable[[Any], None], watch: Any) -> None:
        self.reader = (callback, watch)

    def remove_reader(self, fd: int) -> None:
        self.reader = None

    def call_soon(self, *callback: Any) -> None:
        self.soon.append(callback)

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, callback: Any, argument: Any) -> None:
        self.timers.append((self.model.time[0] + delay_s, callback, argument))

    def time(self) -> float:
        return self.model.time[0]

    def is_closed(self) -> bool:
        return False

    def has_work(self) -> bool:
        return bool(self.soon) or (self.reader is not None and self.reader[1].connection.readable())

    def run(self) -> None:
        """Run forever."""
        while True:
            if not self.model.world.wait("the loop waits", self.has_work, "time" if self.timers else None):
                due, callback, argument = self.timers.pop(0)
                self.model.time[0] = max(self.model.time[0], due)
                callback(argument)
            elif self.soon:
                callback, *arguments = self.soon.pop(0)
                callback(*arguments)
            elif self.reader is not None:
                callback, watch = self.reader
                callback(watch)


class LoopWatch(watch_module.Watch):
    """The real one, without a file descriptor of the system."""

    def __init__(self, loop: Any, connection: Any, fd: int, drive: Any) -> None:
        self.loop, self.connection, self.thread = loop, connection, loop.model.world.ident()
        self.active = self._is_soon = self._checks = False
        self._due = 0.0
        self._drive, self._fd = drive, fd

    def _close(self) -> None:
        if self._fd >= 0:
            self.stop()
            self._fd = -1

    def __del__(self) -> None:
        """There is nothing to let go of."""


class ReplyTo:
    """Where the answer of a posted call goes."""

    abandoned = False
    loop_reply = None
    answers = 0

    def __init__(self, number: int = 0) -> None:
        self.number = number
        """That of the call, which is its answer if calls have numbers."""


def deque_len(inbox: Any) -> int:
    return len(list(inbox))


class PlayedBell:
    """Stands in for what wakes a thread that waits for a socket."""

    fd = 2

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_rung = False

    def ring(self) -> None:
        self.world.point("rings")
        self.is_rung = True

    def silence(self) -> None:
        self.is_rung = False

    def close(self) -> None:
        """There is nothing to let go of."""


def give_points(owner: Any, model: Model) -> None:
    """Make an owner stop where it touches what threads share; not in its `__init__`, which may not stop."""
    kind, world = type(owner), model.world
    shared = {name: owner.__dict__.pop(name) for name in _SHARED}
    owner.__class__ = sharing(kind, *_SHARED)
    owner.__dict__.update(shared, world=world, _begun=True)
    owner._claim = SharedDict(world, "claim")
    owner._inbox = SharedDeque(world, "inbox")
    owner._tokens = Tokens(model)


def is_at_rest(owner: Any) -> bool:
    """Nothing is left to do, and no thread has the claim or wants it."""
    state = owner.__dict__
    busy = owner._ready or owner._under_way or owner.over or owner._later or state["_wanted"]
    return not (busy or dict.__len__(owner._claim) or deque_len(owner._inbox))


def enter_worlds(
    monkeypatch: pytest.MonkeyPatch, kind: type[ConnectionOwner[Any, Any, Any]], *modules: types.ModuleType
) -> None:
    """Have the modules take threads, locks and their ids from the world that runs."""
    here: list[World] = []
    begin = World.__init__

    def init(world: World, budgets: dict[str, int]) -> None:
        begin(world, budgets)
        here[:] = [world]

    monkeypatch.setattr(World, "__init__", init)

    def ident() -> int:
        return here[0].ident()

    monkeypatch.setattr(owner_module, "Watch", LoopWatch)
    monkeypatch.setattr(owner_module, "Bell", lambda: PlayedBell(here[0]))
    for module in (owner_module, watch_module, *modules):
        monkeypatch.setattr(module, "get_ident", ident, raising=False)
    monkeypatch.setattr(owner_module, "threading", types.SimpleNamespace(Lock=lambda: Lock(here[0])))
    monkeypatch.setattr(owner_module, "wait_for", lambda wait, timeout_s: wait(timeout_s))
    monkeypatch.setattr(kind.log, "disabled", True)
