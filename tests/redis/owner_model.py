"""The hand-over of `RedisConnectionOwner`, in every order of everything that can happen, on the class itself.

Callers that may lead, threads that post, an event loop and the I/O thread run to each of their points in each order,
while commands meet rivals, connections break, callers give up and signal handlers raise. In each state: no call is
answered twice, none is sent twice. From each state: without a further fault, rest is reached.

`test_owner_model.py` explores the small scenarios; the others are for a command, with `tests` in `PYTHONPATH`:
`python tests/redis/owner_model.py two_callers losses=1`. Faults: cuts, timeouts, losses, rivals, dials.
"""

# ruff: noqa: T201 - a command talks to its user

from __future__ import annotations

import json
import sys
import time
import types
from contextlib import suppress
from typing import Any

import hiredis
import pytest
from interleaving import SharedList, World, explore
from played_owner import LEFT_OUT, Loop, ReplyTo, enter_worlds, give_points, is_at_rest
from played_server import PlayedServer

from scopestate.actors.backlog import Limits
from scopestate.actors.ports import NO_RULE
from scopestate.errors import NotConnected, ScopestateError
from scopestate.ops import turns
from scopestate.ops.update_ops import Append
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.connections.pump import Means
from scopestate.persistence.redis import scope as scope_module
from scopestate.persistence.redis.calls import Call
from scopestate.persistence.redis.commands import ScopeCommands
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.owner import RedisConnectionOwner
from scopestate.persistence.redis.scope import RedisScope
from scopestate.persistence.redis.script import SOURCE, Shape
from scopestate.persistence.redis.tail import Published

_LEFT_OUT = LEFT_OUT | {
    "_around", "_batches", "_head_of_set", "_largest", "_store", "_limits", "_scope", "_changed", "_routes", "_session",
    "name", "hash_key", "scope_name", "_to_post"
}  # fmt: skip


class Line:
    """A connection to the played server: what is sent is done at once; then the answer is there, or the line breaks."""

    address = "played"

    def __init__(self, model: Model) -> None:
        self.model = model
        self.replies: list[Any] = []
        self.is_closed = self.is_shut = False
        self._session = model.server.connect(self._arrive)

    def _arrive(self, reply: bytes) -> None:
        if self.is_shut or self.is_closed:
            return
        reader = hiredis.Reader(replyError=Refusal)
        reader.feed(reply)
        self.replies.append(reader.gets())

    def send(self, data: bytes) -> None:
        fate = self.model.world.choose(
            "sends", ("", "", None), ("it breaks before", "before", "losses"), ("it breaks after", "after", "losses")
        )
        assert not self.is_closed, "sent on a closed connection"
        if fate != "before":
            if self.model.is_slow and not fate:
                self.model.sent.append((self._session, data))
                return
            self._session.feed(data)
        if fate or self.is_shut:
            self.is_shut = True
            self.replies.clear()
            self._session.close()
            if fate == "before":
                raise self._broken()

    def receive(self) -> None:
        self.model.world.wait("receives", self.readable)
        if self.is_shut or self.is_closed:
            raise self._broken()

    def next_reply(self) -> Any:
        return self.replies.pop(0) if self.replies else NOT_ALL

    def exchange(self, data: bytes) -> Any:
        self.send(data)
        self.receive()
        return self.next_reply()

    def readable(self) -> bool:
        return bool(self.replies) or self.is_shut or self.is_closed

    is_stale = readable

    def plain_fd(self) -> int:
        return 1

    def send_now(self, data: bytes) -> int:
        self.send(data)
        return len(data)

    def close(self) -> None:
        self.is_closed = True
        self._session.close()

    def shut(self) -> None:
        self.is_shut = True

    def _broken(self) -> Broken:
        self.close()
        return Broken("the line broke")


class Store:
    """The part of the adapter that scopes need."""

    update_attempts = 100
    shares_events = False
    shape = Shape("state:")

    def nothing(self, *_: object) -> None:
        """Count and note nothing."""

    note_attempt = note_conflict = note_misfit = note_fit = nothing

    def __init__(self, model: Model) -> None:
        self.model = model

    def published_of(self, hash_key: bytes) -> Published:
        return Published()

    def is_held_here(self) -> bool:
        return bool(self.model.owner.is_held_here())


class Scope(RedisScope):
    """The real scope, without an engine around it."""

    mailbox_limit = 10  # type: ignore[assignment]  # a property of the real one

    def __init__(self, model: Model, name: str) -> None:
        self.scope = name
        self.rule = NO_RULE
        limits = Limits(scope_mailbox=self.mailbox_limit)
        self._around = types.SimpleNamespace(limits=limits)  # type: ignore[assignment]  # no more is needed of it
        self.events: list[tuple[Any, ...]] = []
        self.commands = ScopeCommands(
            self, Store(model), Limits(), self._note, clock=model.clock, uniform=lambda low, high: high
        )
        self.owner = model.owner
        self.mailbox = self._mailbox = SharedList(model.world, f"mailbox of {name}")
        self.listed = self._passivated = False
        self.since = 0.0
        self._store = self.commands._store
        self._batches = 0

    def _note(self, call: Call, *change: Any) -> None:
        self.events.append(change)

    def _refuse_bytes(self, call: Call) -> None:
        """Nothing here is large."""


class Model:
    """An owner with its scopes, callers and server, in one run."""

    def __init__(self, world: World, kind: type[Any] = RedisConnectionOwner, *, is_slow: bool = False) -> None:
        """`is_slow`: the server does what it was sent some time later, not at once."""
        self.world = world
        self.is_slow = is_slow
        self.sent: list[tuple[Any, bytes]] = []
        self.may_fail = bool(world.budgets)
        self.time = [0.0]
        self.server = PlayedServer()
        self.server.do("SCRIPT", "LOAD", SOURCE)
        self.server.wrote = self._wrote
        self.server.before = self._before
        self.writes: list[bytes | None] = []
        self.posted: list[ReplyTo] = []
        self.callers: list[Any] = []
        self.failures: list[tuple[str, str]] = []
        owner: Any = kind(
            types.SimpleNamespace(address="played", dial=self._dial),
            RedisOptions(call_timeout_ms=5000, connect_wait_ms=1000),
            Means(self._deliver, self.clock, lambda low, high: high),
        )
        self.owner = owner
        give_points(owner, self)
        owner.connect()
        world.roots += [owner, self.time, self.server.databases, self.posted, self.failures, self.callers]
        world.left_out = _LEFT_OUT
        world.is_at_rest = self.is_at_rest
        world.check = self.check
        world.settle(world.spawn("I/O", owner.run))
        if is_slow:
            world.roots.append(self.sent)
            world.settle(world.spawn("server", self._serve))

    def clock(self) -> float:
        return self.time[0]

    def scope(self, name: str = "s") -> Scope:
        """Make a scope."""
        scope = Scope(self, name)
        self.world.roots.append(scope)
        return scope

    def caller(
        self, name: str, scope: Scope, turn: Any, *, timeout_s: float | None = None, can_be_cut: bool = False
    ) -> None:
        """Add a thread that makes one call, and may lead for it."""

        def work() -> None:
            call = Call(turn, None, 0)
            try:
                self.owner.call(scope, call, timeout_s)
                assert call.done, "a call returned before it had ended"
                if call.error is not None:
                    raise call.error
            except ScopestateError as error:
                self.failures.append((name, type(error).__name__))

        self.callers.append(self.world.spawn(name, work, can_be_cut=can_be_cut))

    def poster(self, name: str, scope: Scope, turn: Any) -> None:
        """Add a thread that leaves a call behind, as an event loop does."""
        reply_to = ReplyTo()
        self.posted.append(reply_to)

        def work() -> None:
            scope.post(Call(turn, reply_to, 0))  # type: ignore[arg-type]

        self.callers.append(self.world.spawn(name, work))

    def task(self, scope: Scope, turn: Any) -> None:
        """Add a thread with an event loop, in which a task makes one call."""
        reply_to, loop = ReplyTo(), Loop(self)
        self.posted.append(reply_to)
        self.world.roots.append(loop)

        def work() -> None:
            call: Any = Call(turn, reply_to, 0)  # type: ignore[arg-type]
            call.loop = loop
            scope.post(call)
            loop.run()

        self.world.spawn("loop", work)

    def main_task(self, scope: Scope, turn: Any) -> None:
        """Add a thread as the main one is, with an event loop: a task makes one call, and signal handlers may raise."""
        reply_to, loop = ReplyTo(), Loop(self)
        self.posted.append(reply_to)
        self.world.roots.append(loop)

        def work() -> None:
            call: Any = Call(turn, reply_to, 0)  # type: ignore[arg-type]
            waiter = types.SimpleNamespace(loop=loop, future=types.SimpleNamespace(cancel=bool))
            try:
                self.owner.call_for_task(scope, call, waiter)
            except KeyboardInterrupt:
                self.posted.remove(reply_to)  # the task has ended with it
            while True:
                with suppress(KeyboardInterrupt):
                    loop.run()  # again after an interruption, as asyncio.run does

        self.world.spawn("main", work, can_be_cut=True)

    def is_at_rest(self) -> bool:
        return (
            all(thread.is_over for thread in self.callers)
            and all(reply_to.answers == 1 for reply_to in self.posted)
            and is_at_rest(self.owner)
        )

    def check(self) -> None:
        assert len(self.writes) == len(set(self.writes)), f"a write was done twice: {self.writes}"
        appended = [json.loads(data) for data in self.writes if data is not None and data.startswith(b"[")]
        assert all(len(values) == len(set(values)) for values in appended), f"an append was done twice: {self.writes}"
        assert self.may_fail or not self.failures, f"a call failed, and nothing went wrong: {self.failures}"
        assert all(reply_to.answers <= 1 for reply_to in self.posted), "a posted call was answered twice"

    def _serve(self) -> None:
        while True:
            self.world.wait("the server waits", lambda: bool(self.sent))
            session, data = self.sent.pop(0)
            session.feed(data)

    def _deliver(self, outcomes: list[Any]) -> None:
        for reply_to, _, error in outcomes:
            reply_to.answers += 1
            if error is not None:
                self.failures.append(("a posted call", type(error).__name__))

    def _wrote(self, hash_key: bytes, field: bytes, old: bytes | None, new: bytes | None) -> None:
        self.writes.append(new)

    def _before(self, session: object, parts: list[bytes]) -> bool:
        if parts[0] == b"EVALSHA" and self.world.choose(
            "is done", ("", False, None), ("behind a rival", True, "rivals")
        ):
            self.server.do("HSET", parts[3], "k", "[]")
        return True

    def _dial(self) -> Line:
        if self.world.choose("dials", ("", False, None), ("in vain", True, "dials")):
            raise NotConnected("no server there")
        return Line(self)


def put(value: int) -> turns.Set:
    return turns.Set("k", b"%d" % value)


def add(value: int) -> turns.Update:
    return turns.Update("k", (Append("", value),))


def two_callers(world: World, kind: type[RedisConnectionOwner] = RedisConnectionOwner) -> None:
    model = Model(world, kind)
    scope = model.scope()
    model.caller("A", scope, put(1))
    model.caller("B", scope, put(2))


def a_caller_and_a_poster(world: World, kind: type[RedisConnectionOwner] = RedisConnectionOwner) -> None:
    model = Model(world, kind)
    scope = model.scope()
    model.caller("A", scope, put(1), can_be_cut=True, timeout_s=9.0)
    model.poster("P", scope, put(2))


def an_update_and_a_poster(world: World) -> None:
    model = Model(world)
    world.time_passes_amid = False
    scope = model.scope()
    model.caller("A", scope, add(1), can_be_cut=True, timeout_s=9.0)
    model.poster("P", scope, add(2))


def a_pause_and_a_caller(world: World, kind: type[RedisConnectionOwner] = RedisConnectionOwner) -> None:
    model = Model(world, kind)
    scope = model.scope("a")
    model.server.do("HSET", "state:a", "k", "[0]")
    scope.commands.seen.remember("k", (b"[0]", b"[0]", None))  # so that it need not be read first
    model.poster("P", scope, add(1))
    model.caller("B", model.scope("b"), put(2))


def two_scopes(world: World) -> None:
    model = Model(world)
    model.caller("A", model.scope("a"), add(1))
    model.caller("B", model.scope("b"), put(2))


def a_caller_and_a_task(world: World, kind: type[RedisConnectionOwner] = RedisConnectionOwner) -> None:
    model = Model(world, kind)
    world.time_passes_amid = False
    scope = model.scope()
    model.caller("A", scope, put(1), timeout_s=9.0)
    model.task(scope, put(2))


def a_task_and_housekeeping(world: World) -> None:
    model = Model(world, is_slow=True)
    world.time_passes_amid = False
    model.task(model.scope("a"), put(1))
    model.callers.append(world.spawn("housekeeper", lambda: model.owner.passivate(lambda: False)))


def a_task_and_a_poster(world: World) -> None:
    model = Model(world)
    world.time_passes_amid = False
    model.poster("P", model.scope("a"), put(1))
    model.task(model.scope("b"), add(2))


def a_main_task_and_a_poster(world: World, kind: type[RedisConnectionOwner] = RedisConnectionOwner) -> None:
    model = Model(world, kind, is_slow=True)
    world.time_passes_amid = False
    scope = model.scope("a")
    model.main_task(scope, put(1))
    model.poster("P", scope, put(2))


def a_main_task_that_reads_first(world: World) -> None:
    model = Model(world)
    world.time_passes_amid = False
    model.main_task(model.scope("a"), add(1))
    model.poster("P", model.scope("b"), put(2))


def a_main_task_and_a_caller(world: World) -> None:
    model = Model(world)
    world.time_passes_amid = False
    scope = model.scope()
    model.main_task(scope, put(1))
    model.caller("A", scope, put(2), timeout_s=9.0)


def all_of_them(world: World) -> None:
    """For a machine that has the time."""
    model = Model(world)
    scope = model.scope()
    model.caller("A", scope, add(1), can_be_cut=True, timeout_s=9.0)
    model.caller("B", model.scope("b"), put(2), timeout_s=1.0)
    model.poster("P", scope, add(3))
    model.task(scope, put(4))


def main(arguments: list[str]) -> None:
    """Explore one scenario: its name, then `fault=how often`."""
    name, *faults = arguments
    budgets = {fault: int(count) for fault, count in (part.split("=") for part in faults)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter_worlds(monkeypatch, RedisConnectionOwner, scope_module)
        began = time.perf_counter()
        graph = explore(globals()[name], budgets, most=20_000_000)
    print(f"{name} {budgets}: {graph}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
