"""A connection owner whose other side answers in any order and when it likes, in every order of what can happen.

The class under test is the real `ConnectionOwner`; what is sent is only the number of a call, and that is its answer.
`test_patient_model.py` explores the small scenarios; the others are for a command, with `tests` in `PYTHONPATH`:
`python tests/connections/patient_model.py two_callers losses=1`. Faults: cuts, timeouts, losses, silence, dials.
"""

# ruff: noqa: T201 - a command talks to its user

from __future__ import annotations

import logging
import math
import sys
import time
import types
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

import pytest
from interleaving import World, explore
from played_owner import LEFT_OUT, Loop, ReplyTo, enter_worlds, give_points, is_at_rest, is_limit

from scopestate.errors import CallTimeout, ConnectionLost, NotConnected, ReplyTimeout, ScopestateError
from scopestate.persistence.connections.calls import Call
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.connections.owner import ConnectionOwner
from scopestate.persistence.connections.pump import PATIENCE_S, Means, TimeLimits

_LEFT_OUT = LEFT_OUT | {"name"}


class NumberedCall(Call):
    """A call, which is its own item. Its turn is its number."""

    since = 0.0
    overdue_at = 0.0

    @property
    def data(self) -> bytes:
        """What is sent."""
        return b"%d;" % self.message


class PatientOwner(ConnectionOwner[NumberedCall, NumberedCall, Any]):
    """As a bridge's, without what a call means. Answers are matched by number."""

    peer = "a played engine"
    log = logging.getLogger("played engine")
    thread_name = "played"
    prompt = False

    def __init__(self, target: Any, limits: TimeLimits, means: Means) -> None:
        super().__init__(target, limits, means)
        self._under_way: dict[int, NumberedCall] = {}

    def _lead(self, home: Any, call: NumberedCall) -> bool:
        connection = self._connection
        if connection is None or self._leaving or self._under_way or self._inbox or self._ready:
            return False
        if connection.is_stale():
            self._drop_idle(connection)
            return False
        self._led = call
        self._note(call, self._clock())
        try:
            connection.send(call.data)
            while not call.done and connection.wait(PATIENCE_S, None):
                connection.receive()
                self._take_answers(connection)
        except Broken as error:
            self._lose(connection, error)
        self._led = None
        self.over.clear()
        if not call.done:
            self._overdue_at = call.overdue_at
            self._leave_to_thread(call)
        return True

    def _abort_attempt(self) -> None:
        """A played line is there at once."""

    def _recover_led(self, home: Any, call: NumberedCall) -> None:
        if self._led is None:
            return
        # Bytes that were received may not have been taken in: the next ones would make no sense.
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._under_way.clear()
        self.over.clear()
        self._led = None

    def _queue(self, home: Any, call: NumberedCall) -> None:
        self.post(call)

    def _find_abandoned(self, home: Any, call: NumberedCall) -> None:
        """It is skipped when its turn comes."""

    def _too_late(self, home: Any, timeout_s: float) -> Exception:
        return ReplyTimeout("s", timeout_s)

    def _note(self, call: NumberedCall, now: float) -> None:
        call.overdue_at = now + self._call_timeout_s
        self._under_way[call.message] = call

    def _sort_in(self, item: NumberedCall, now: float) -> None:
        item.since = now
        self._ready.append(item)

    def _begin(self, item: NumberedCall, connection: Any, now: float) -> bytes | None:
        if item.is_abandoned:
            return None
        self._note(item, now)
        self._round += 1
        return item.data

    def _take_answers(self, connection: Any) -> None:
        while (number := connection.next_reply()) is not NOT_ALL:
            call = self._under_way.pop(number, None)
            if call is not None:  # else: it was given up
                self._end(call, number, None)

    def _fail_under_way(self, error: Broken) -> None:
        for call in list(self._under_way.values()):
            self._end(call, None, ConnectionLost("a call", "played", str(error)))
        self._under_way.clear()

    def _end_overdue(self, now: float) -> float | None:
        for number, call in list(self._under_way.items()):
            if call.overdue_at > now:
                return call.overdue_at
            del self._under_way[number]
            self._end(call, None, CallTimeout("a call", self._call_timeout_s, sent=True))
        return None

    def _refuse(self, item: NumberedCall, error: ScopestateError) -> None:
        self._end(item, None, error)

    def _is_of_loop(self, loop: AbstractEventLoop) -> bool:
        return all(call.loop is loop for call in self._under_way.values())

    def _end(self, call: NumberedCall, answer: Any, error: ScopestateError | None) -> None:
        call.answer, call.error, call.done = answer, error, True
        self.over.append(call)


class Line:
    """A connection to an engine that answers later."""

    address = "played"

    def __init__(self, model: Model) -> None:
        self.model = model
        self.answers: list[int] = []
        self.is_closed = self.is_shut = False

    def send(self, data: bytes) -> None:
        fate = self.model.world.choose(
            "sends", ("", "", None), ("it breaks before", "before", "losses"), ("it breaks after", "after", "losses")
        )
        assert not self.is_closed, "sent on a closed connection"
        if fate != "before" and not self.is_shut:
            self.model.sent += [(self, int(number)) for number in data.split(b";") if number]
        if fate or self.is_shut:
            self.is_shut = True
            self.answers.clear()
            if fate == "before":
                raise self._broken()

    def send_now(self, data: bytes) -> int:
        self.send(data)
        return len(data)

    def wait(self, timeout_s: float | None, fd: int | None) -> bool:
        world, bell = self.model.world, self.model.owner._bell
        if fd is None:  # for a moment
            if not self.readable() and world.choose("waits", ("for an answer", True, None), ("a moment", False, None)):
                world.wait("waits for an answer", self.readable, "time")
            return self.readable()
        assert fd == bell.fd
        came = world.wait(
            "sleeps at the socket", lambda: self.readable() or bell.is_rung, "time" if is_limit(timeout_s) else None
        )
        if not came:
            assert timeout_s is not None
            self.model.time[0] += timeout_s
        return self.readable()

    def receive(self) -> None:
        assert self.readable(), "it would wait with the claim"
        if self.is_shut or self.is_closed:
            raise self._broken()

    def next_reply(self) -> Any:
        return self.answers.pop(0) if self.answers else NOT_ALL

    def readable(self) -> bool:
        return bool(self.answers) or self.is_shut or self.is_closed

    def is_stale(self) -> bool:
        return self.is_shut or self.is_closed

    def plain_fd(self) -> int:
        return 1

    def close(self) -> None:
        self.is_closed = True

    def shut(self) -> None:
        self.is_shut = True

    def _broken(self) -> Broken:
        self.close()
        return Broken("the line broke")


class Model:
    """A connection owner with its callers and the other side, in one run."""

    def __init__(self, world: World, kind: type[Any] = PatientOwner, *, last: int = 0) -> None:
        """`last`: the number of a call that has no answer before every other one, and no time limit."""
        self.world = world
        self.last = last
        self.sent: list[tuple[Line, int]] = []
        """What the other side has to answer."""
        self.may_fail = bool(world.budgets)
        self.time = [0.0]
        self.begun: list[int] = []
        self.posted: list[ReplyTo] = []
        self.callers: list[Any] = []
        self.failures: list[tuple[str, str]] = []
        self.mixed: list[tuple[int, int]] = []
        """Posted calls that got the answers of others."""
        target = types.SimpleNamespace(address="played", dial=self._dial)
        owner: Any = kind(
            target, TimeLimits(math.inf if last else 5.0, 1.0), Means(self._deliver, self.clock, lambda low, high: high)
        )
        self.owner = owner
        give_points(owner, self)
        owner.connect()
        world.time_passes_amid = False
        world.roots += [owner, self.time, self.sent, self.begun, self.posted, self.failures, self.callers]
        world.left_out = _LEFT_OUT
        world.is_at_rest = self.is_at_rest
        world.check = self.check
        world.settle(world.spawn("I/O", owner.run))
        world.settle(world.spawn("other side", self._answer))

    def clock(self) -> float:
        return self.time[0]

    def caller(self, number: int, *, timeout_s: float | None = None, can_be_cut: bool = False) -> None:
        """Add a thread that makes one call, and may lead for it."""

        def work() -> None:
            call = NumberedCall(number, None, 0)
            try:
                self.owner.call(None, call, timeout_s)
                assert call.done, "a call returned before it had ended"
                if call.error is not None:
                    raise call.error
                assert call.answer == number, f"call {number} has the answer of call {call.answer}"
            except ScopestateError as error:
                self.failures.append((f"call {number}", type(error).__name__))

        self.callers.append(self.world.spawn(f"caller {number}", work, can_be_cut=can_be_cut))

    def poster(self, number: int) -> None:
        """Add a thread that leaves a call behind, as an event loop of the main thread does."""
        reply_to = ReplyTo(number)
        self.posted.append(reply_to)

        def work() -> None:
            self.owner.post(NumberedCall(number, reply_to, 0))  # type: ignore[arg-type]

        self.callers.append(self.world.spawn(f"poster {number}", work))

    def task(self, number: int) -> None:
        """Add a thread with an event loop, in which a task makes one call."""
        reply_to, loop = ReplyTo(number), Loop(self)
        self.posted.append(reply_to)
        self.world.roots.append(loop)

        def work() -> None:
            call: Any = NumberedCall(number, reply_to, 0)  # type: ignore[arg-type]
            call.loop = loop
            self.owner.post_on_loop(call, loop)
            loop.run()

        self.world.spawn("loop", work)

    def is_at_rest(self) -> bool:
        return (
            all(thread.is_over for thread in self.callers)
            and all(reply_to.answers == 1 for reply_to in self.posted)
            and is_at_rest(self.owner)
        )

    def check(self) -> None:
        assert len(self.begun) == len(set(self.begun)), f"a call was done twice: {self.begun}"
        assert self.may_fail or not self.failures, f"a call failed, and nothing went wrong: {self.failures}"
        assert not self.mixed, f"a posted call has the answer of another: {self.mixed}"
        assert all(reply_to.answers <= 1 for reply_to in self.posted), "a posted call was answered twice"

    def _answer(self) -> None:
        while True:
            self.world.wait("the other side waits", self._can_answer)
            place = 0
            if self.last and self.sent[0][1] == self.last:
                place = -1
            elif len(self.sent) > 1 and not self.last:
                place = self.world.choose("answers", ("the oldest", 0, None), ("the newest", -1, None))
            line, number = self.sent.pop(place)
            self.begun.append(number)
            if self.world.choose("answers", ("", True, None), ("never", False, "silence")) and not line.is_stale():
                line.answers.append(number)

    def _can_answer(self) -> bool:
        others = len(self.callers) - 1
        return bool(self.sent) and (self.sent[-1][1] != self.last or len(self.begun) >= others)

    def _deliver(self, outcomes: list[Any]) -> None:
        for reply_to, answer, error in outcomes:
            reply_to.answers += 1
            if error is not None:
                self.failures.append(("a posted call", type(error).__name__))
            elif answer != reply_to.number:
                self.mixed.append((reply_to.number, answer))

    def _dial(self) -> Line:
        if self.world.choose("dials", ("", False, None), ("in vain", True, "dials")):
            raise NotConnected("nothing there")
        return Line(self)


def one_caller(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.caller(1, can_be_cut=True, timeout_s=9.0)


def a_caller_and_a_poster(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.caller(1, can_be_cut=True, timeout_s=9.0)
    model.poster(2)


def two_callers(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.caller(1, timeout_s=9.0)
    model.caller(2, timeout_s=9.0)


def two_posters(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.poster(1)
    model.poster(2)


def a_long_call_and_a_poster(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind, last=1)
    model.poster(1)
    model.poster(2)


def a_long_caller_and_a_poster(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind, last=1)
    model.caller(1)
    model.poster(2)


def a_task_and_a_poster(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.task(1)
    model.poster(2)


def a_task_and_housekeeping(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.task(1)
    model.callers.append(world.spawn("housekeeper", lambda: model.owner.passivate(lambda: False)))


def a_caller_and_a_task(world: World, kind: type[PatientOwner] = PatientOwner) -> None:
    model = Model(world, kind)
    model.caller(1, timeout_s=9.0)
    model.task(2)


def main(arguments: list[str]) -> None:
    """Explore one scenario: its name, then `fault=how often`."""
    name, *faults = arguments
    scenario: Callable[[World], None] = globals()[name]
    budgets = {fault: int(count) for fault, count in (part.split("=") for part in faults)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter_worlds(monkeypatch, PatientOwner)
        began = time.perf_counter()
        graph = explore(scenario, budgets, most=20_000_000)
    print(f"{name} {budgets}: {graph}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
