"""Callers that vanish, give up or call again in the middle of their own call."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from pathlib import Path
from types import FrameType

import pykka
import pytest
from reliability.conftest import OpenEngine
from reliability.living import PATIENCE_S, InThread, in_a_turn, saved
from reliability.slow import Gate, SlowDisk, busy, check_agreement, watched

from scopestate import Engine, messages
from scopestate.errors import ReplyTimeout, WouldDeadlock

DURABILITIES = ["memory", "interval", "commit"]

# ------------------------------------------------------------------------------------------------------- giving up


@pytest.mark.parametrize("durability", DURABILITIES)
def test_an_ask_that_times_out_says_that_the_write_may_still_apply(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", "before")
    gate, holder = busy(engine)

    with pytest.raises(ReplyTimeout, match=r"may still be applied: read the key before retrying") as caught:
        engine.ask(messages.Set("s", "k", "late"), timeout=0.05)

    gate.open()
    holder.result()
    assert caught.value.code == "TIMEOUT"
    check_agreement(engine, seen)
    assert engine.get("s", "k") in ("before", "late")


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_call_that_times_out_says_so_and_the_scope_goes_on(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", "before")
    gate, holder = busy(engine)
    engine._limits.call_timeout_s = 0.05

    with pytest.raises(ReplyTimeout, match=r"'s' sent no reply within 0.05 s"):
        engine.set("s", "k", "late")
    with pytest.raises(ReplyTimeout):
        asyncio.run(engine.aio.delete("s", "k"))

    engine._limits.call_timeout_s = PATIENCE_S
    gate.open()
    holder.result()
    engine.set("s", "after", 1)
    check_agreement(engine, seen)


def test_a_commit_that_outlasts_the_call_is_there_all_the_same(slow_disk: tuple[Engine, SlowDisk]) -> None:
    engine, disk = slow_disk
    seen = watched(engine)
    engine.set("s", "k", "before")
    engine._limits.call_timeout_s = 0.05
    gate = Gate()
    disk.at_save = gate

    with pytest.raises(ReplyTimeout, match="may still be applied"):
        engine.set("s", "k", "late")

    gate.open()
    engine._limits.call_timeout_s = PATIENCE_S
    assert engine.get("s", "k") == "late"
    check_agreement(engine, seen)


# ---------------------------------------------------------------------------------------------------------- dying


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_thread_that_dies_in_the_middle_of_its_turn_leaves_the_scope_to_the_others(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", "before")

    def die() -> None:
        raise SystemExit

    for _ in range(20):
        dying = InThread(lambda: in_a_turn(engine, die))
        waiting = [InThread(lambda: engine.update("s", "n", [{"type": "increment", "path": "", "by": 1}]))] * 3
        with pytest.raises(SystemExit):
            dying.result()
        for thread in waiting:
            thread.result()

    engine.set("s", "k", "after")
    check_agreement(engine, seen)
    assert "turn" not in (engine._scopes["s"]._values or {})
    engine.close()
    if durability != "memory":
        assert saved(tmp_path / "store", "s")[1]["k"] == b'"after"'


def test_a_thread_that_dies_while_it_waits_for_a_busy_scope(open_engine: OpenEngine) -> None:
    engine = open_engine()
    seen = watched(engine)
    engine.set("s", "k", "before")
    gate, holder = busy(engine)
    program = threading.Thread(target=lambda: engine.set("s", "k", "orphaned"), daemon=True)
    program.start()
    actor = engine._scopes["s"]
    while not actor._mailbox:
        threading.Event().wait(0.001)
    # Nobody will ever ask for this answer, as after the death of a daemon thread.
    gate.open()
    holder.result()
    program.join(PATIENCE_S)
    assert engine.get("s", "k") == "orphaned"
    check_agreement(engine, seen)


# --------------------------------------------------------------------------------------------------- in the middle


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_signal_handler_that_writes_to_the_scope_it_interrupts_is_told_instead_of_hanging(
    open_engine: OpenEngine, durability: str
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", "before")
    told: list[BaseException] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for call in (
            lambda: engine.set("s", "k", "from the signal handler"),
            lambda: engine.update("s", "k", []),
            lambda: engine.delete("s", "k"),
            lambda: engine.ask(messages.Set("s", "k", 1)),
        ):
            try:
                call()
            except WouldDeadlock as error:
                told.append(error)
        if durability != "commit":  # there, nobody sees a scope in the middle of a write
            assert engine.get("s", "k") == "before"
        engine.set("a scope of its own", "k", "from the signal handler")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        in_a_turn(engine, lambda: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert len(told) == 4
    assert "in the middle of a turn of scope 's'" in str(told[0])
    assert engine.get("s", "turn") == 1
    assert engine.get("a scope of its own", "k") == "from the signal handler"
    engine.drain(PATIENCE_S)
    assert [event.revision for event in seen.events if event.scope == "s"] == [1, 2]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_finalizer_that_calls_the_engine_in_the_middle_of_a_turn(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", "before")
    told: list[BaseException] = []

    class Finalized:
        def __init__(self) -> None:
            self.me = self  # only the garbage collector ends this one

        def __del__(self) -> None:
            engine.set("finalized", "k", 1)
            try:
                engine.set("s", "k", "from a finalizer")
            except WouldDeadlock as error:
                told.append(error)

    gc.disable()  # a collection of its own accord would end it before the turn
    try:
        Finalized()
        in_a_turn(engine, gc.collect)
    finally:
        gc.enable()

    assert len(told) == 1
    assert engine.get("s", "k") == "before"
    assert engine.get("s", "turn") == 1
    assert engine.get("finalized", "k") == 1


@pytest.mark.parametrize("durability", DURABILITIES)
def test_finalizers_that_the_garbage_collector_runs_anywhere(open_engine: OpenEngine, durability: str) -> None:
    """With a collection at every few allocations they run in the middle of everything, on every thread."""
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", 0)
    ran = []

    class Finalized:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            ran.append(1)
            try:
                engine.set("s", f"k{len(ran) % 3}", len(ran))
            except WouldDeadlock:
                return

    before = gc.get_threshold()
    gc.set_threshold(25, 1, 1)
    try:
        for number in range(60):
            Finalized()
            InThread(lambda number=number: engine.set("s", "k", number)).result()  # type: ignore[misc]
            engine.update("s", "n", [{"type": "increment", "path": "", "by": 1}])
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(ran) == 60
    check_agreement(engine, seen)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_host_program_that_stops_all_pykka_actors_stops_only_its_own(
    open_engine: OpenEngine, durability: str
) -> None:
    class Theirs(pykka.ThreadingActor):
        pass

    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", 1)
    ref = engine.scope("s").actor_ref
    theirs = Theirs.start()

    pykka.ActorRegistry.stop_all(timeout=PATIENCE_S)

    assert not theirs.is_alive()
    assert ref.is_alive()
    assert ref.ask(messages.Get("s", "k"), timeout=PATIENCE_S) == 1
    engine.set("s", "k", 2)
    assert [event.new_value for event in seen.wait_for(2)] == [1, 2]
    check_agreement(engine, seen)
