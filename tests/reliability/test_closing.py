"""close(): called twice, at once, from handlers, signal handlers and event loops, under load, and on a failing disk."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from reliability.conftest import OpenEngine
from reliability.living import PATIENCE_S, InThread, Seen, in_a_turn, saved, settings

from scopestate import DeliveryFailure, Engine, StateEvent, StorageError, messages
from scopestate.config import from_mapping
from scopestate.errors import EngineClosed, EventNotDelivered, WouldDeadlock
from scopestate.persistence import FileAdapter, ScopeChange

KEEPING = ["interval", "commit"]
ONE_HOUR_MS = 3_600_000


class FailingDisk(FileAdapter):
    """A store whose disk can fail."""

    broken = False

    def save(self, batch: Sequence[ScopeChange]) -> None:
        if self.broken:
            raise StorageError("cannot save: the disk is on fire")
        super().save(batch)


@contextmanager
def on_signal(handler: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Have `handler()` called on this thread for SIGUSR1; yields what sends it."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield lambda: signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("durability", ["memory", *KEEPING])
def test_closing_twice_is_closing_once(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", 1)

    engine.close()
    engine.close()

    with pytest.raises(EngineClosed):
        engine.set("s", "k", 2)


@pytest.mark.parametrize("durability", KEEPING)
def test_all_of_eight_threads_that_close_at_once_return_when_it_is_closed(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    for attempt in range(10):
        engine = open_engine(durability, folder=f"store-{attempt}", save_interval_ms=ONE_HOUR_MS)
        engine.set("s", "k", attempt)
        together = threading.Barrier(8)

        def close(engine: Engine = engine, together: threading.Barrier = together) -> None:
            together.wait(PATIENCE_S)
            engine.close()
            assert engine._closing.done

        for thread in [InThread(close) for _ in range(8)]:
            thread.result()
        assert saved(tmp_path / f"store-{attempt}", "s") == (1, {"k": b"%d" % attempt})


@pytest.mark.parametrize("durability", KEEPING)
def test_closing_while_16_threads_write_each_write_is_on_disk_or_refused(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    for attempt in range(2):
        # Thousands of events may wait by then, and all of them are delivered.
        limits = {"close_grace_ms": int(PATIENCE_S * 1000)}
        engine = open_engine(durability, folder=f"store-{attempt}", save_interval_ms=ONE_HOUR_MS, limits=limits)
        seen = Seen()
        engine.register_function("watch", seen)
        engine.register_trigger(function_id="watch")
        acknowledged = [0] * 16
        enough = threading.Semaphore(0)

        def write(number: int, engine: Engine = engine, acknowledged: list[int] = acknowledged) -> None:
            scope = f"scope-{number % 4}"  # contended, and some of it queued
            while True:
                try:
                    engine.set(scope, f"k{number}", acknowledged[number] + 1)
                except EngineClosed:
                    return
                acknowledged[number] += 1
                if acknowledged[number] == 5:
                    enough.release()  # noqa: B023 - the threads end within this round

        threads = [InThread(lambda number=number: write(number)) for number in range(16)]  # type: ignore[misc]
        for _ in range(16):
            assert enough.acquire(timeout=PATIENCE_S)

        engine.close()

        for thread in threads:
            thread.result()
        for number in range(16):
            _, values = saved(tmp_path / f"store-{attempt}", f"scope-{number % 4}")
            assert values[f"k{number}"] == b"%d" % acknowledged[number]
        assert len(seen.events) == sum(acknowledged)


@pytest.mark.parametrize("durability", ["memory", *KEEPING])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_closing_from_a_handler_ends_the_engine_when_the_handler_has_ended(
    open_engine: OpenEngine, tmp_path: Path, durability: str, kind: str
) -> None:
    engine = open_engine(durability, save_interval_ms=ONE_HOUR_MS)
    closed = threading.Event()

    def plain(event: StateEvent) -> None:
        engine.set("s", "written by the handler", event.new_value)
        engine.close()
        closed.set()

    async def coroutine(event: StateEvent) -> None:
        await engine.aio.set("s", "written by the handler", event.new_value)
        await engine.aio.close()
        closed.set()

    engine.on_change(scope="s", key="k")(plain if kind == "plain" else coroutine)
    engine.set("s", "k", 1)

    assert closed.wait(PATIENCE_S)
    InThread(engine.close).result()  # waits for the other one
    if durability != "memory":
        assert saved(tmp_path / "store", "s")[1] == {"k": b"1", "written by the handler": b"1"}


def test_a_hung_handler_holds_close_up_for_the_grace_time_and_is_reported(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.closing.HOOKS_S", PATIENCE_S)
    failures: list[DeliveryFailure] = []
    engine = open_engine(limits={"close_grace_ms": 200}, on_dead_letter=failures.append)
    begun, over = threading.Event(), threading.Event()

    @engine.on_change(scope="s")
    def hang(event: StateEvent) -> None:
        begun.set()
        over.wait(PATIENCE_S)

    for number in range(3):
        engine.set("s", "k", number)
    assert begun.wait(PATIENCE_S)
    start = time.monotonic()

    engine.close()

    waited_s = time.monotonic() - start
    over.set()
    assert 0.19 <= waited_s < PATIENCE_S
    assert sorted(failure.event.new_value for failure in failures) == [0, 1, 2]
    assert {type(failure.error) for failure in failures} == {EventNotDelivered}
    by_value = {failure.event.new_value: failure for failure in failures}
    assert "may or may not have done its work" in str(by_value[0].error)
    assert by_value[0].attempt == 1
    assert "before its turn came" in str(by_value[1].error)


@pytest.mark.parametrize("durability", KEEPING)
def test_a_failing_disk_keeps_close_from_forgetting_anything(
    tmp_path: Path, durability: str, nothing_left: None
) -> None:
    disk = FailingDisk(tmp_path / "store")
    config = from_mapping(settings(durability, tmp_path / "store", save_interval_ms=ONE_HOUR_MS))
    engine = Engine(config, adapter=disk)
    engine.set("s", "k", 1)
    disk.broken = True
    if durability == "commit":
        with pytest.raises(StorageError, match="Failed to set value"):
            engine.set("s", "k", 2)
        engine.close()  # nothing acknowledged is missing on disk
    else:
        with pytest.raises(StorageError, match=r"1 scopes are not on disk.*call close\(\) again"):
            engine.close()
        with pytest.raises(StorageError, match=r"call close\(\) again"):
            engine.close()
        with pytest.raises(EngineClosed):
            engine.set("s", "k", 3)
        assert "on fire" in str(engine.health())

        disk.broken = False
        engine.close()

    assert saved(tmp_path / "store", "s") == (1, {"k": b"1"})


@pytest.mark.parametrize("durability", ["memory", *KEEPING])
def test_async_with_closes_and_lets_handlers_of_that_loop_finish(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    handled: list[Any] = []

    async def main() -> None:
        async with open_engine(durability, save_interval_ms=ONE_HOUR_MS) as engine:

            @engine.on_change(scope="s", key="k")
            async def handle(event: StateEvent) -> None:
                await asyncio.sleep(0)
                await engine.aio.set("s", "copy", event.new_value)
                handled.append(event.new_value)

            for number in range(20):
                await engine.aio.set("s", "k", number)

    asyncio.run(main())

    assert handled == list(range(20))
    if durability != "memory":
        assert saved(tmp_path / "store", "s")[1] == {"k": b"19", "copy": b"19"}


def test_a_blocking_close_on_the_loop_of_its_handlers_is_refused_at_once_and_aio_close_works(
    open_engine: OpenEngine,
) -> None:
    async def main() -> None:
        engine = open_engine()
        handled = asyncio.Event()

        @engine.on_change(scope="s")
        async def handle(event: StateEvent) -> None:
            handled.set()

        engine.set("s", "k", 1)
        with pytest.raises(WouldDeadlock, match=r"await engine.aio.close\(\)"):
            engine.close()
        with pytest.raises(WouldDeadlock, match=r"await engine.aio.drain\(\)"):
            engine.drain()
        engine.set("s", "k", 2)  # nothing was closed
        await asyncio.wait_for(engine.aio.drain(), PATIENCE_S)
        assert handled.is_set()
        await asyncio.wait_for(engine.aio.close(), PATIENCE_S)
        assert engine.closed

    asyncio.run(main())


def test_a_blocking_close_on_a_loop_without_handlers_closes(open_engine: OpenEngine) -> None:
    async def main() -> list[Any]:
        engine = open_engine()
        seen = Seen()
        engine.on_change(scope="s")(seen)
        await engine.aio.set("s", "k", 1)
        engine.close()
        return seen.events

    assert [event.new_value for event in asyncio.run(main())] == [1]


@pytest.mark.parametrize("durability", KEEPING)
def test_close_in_a_signal_handler_in_the_middle_of_a_turn_closes_behind_that_turn(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    engine = open_engine(durability, save_interval_ms=ONE_HOUR_MS)
    engine.set("s", "k", 1)
    with on_signal(engine.close) as send:
        in_a_turn(engine, send)
    InThread(engine.close).result()

    sequence, values = saved(tmp_path / "store", "s")
    assert (sequence, values) == (2, {"k": b"1", "turn": b"1"})


def test_close_in_a_signal_handler_in_the_middle_of_close_does_not_wait_for_itself(open_engine: OpenEngine) -> None:
    engine = open_engine()
    times = []
    with on_signal(lambda: (engine.close(), times.append(1))) as send:

        @engine.on_dead_letter
        def never(failure: DeliveryFailure) -> None:
            raise AssertionError(failure)

        original = engine._closing._save
        engine._closing._save = lambda: (send(), original())[1]  # type: ignore[method-assign]
        engine.close()

    assert times == [1]
    assert engine.closed
    assert engine._closing.done


@pytest.mark.parametrize("durability", KEEPING)
def test_flush_and_drain_in_the_middle_of_a_turn_are_refused_instead_of_waiting_for_it(
    open_engine: OpenEngine, durability: str
) -> None:
    engine = open_engine(durability, save_interval_ms=ONE_HOUR_MS)
    engine.set("s", "k", 1)
    actor = engine._scopes["s"]
    actor._registry["s"] = actor  # as between a write and its commit
    for wait in (engine.flush, engine.drain):

        def refused(wait: Callable[[], None] = wait) -> None:
            with pytest.raises(WouldDeadlock):
                wait()

        in_a_turn(engine, refused)
    engine.flush()
    engine.drain(PATIENCE_S)


def test_what_waits_is_refused_on_a_closed_engine(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.on_change(scope="s")(lambda event: None)
    engine.close()
    for wait in (engine.drain, engine.flush):
        with pytest.raises(EngineClosed):
            wait()


def test_a_drain_that_crosses_with_close_ends(open_engine: OpenEngine) -> None:
    for _ in range(30):
        engine = open_engine()
        engine.on_change(scope="s")(lambda event: None)
        together = threading.Barrier(3)

        def drain(engine: Engine = engine, together: threading.Barrier = together) -> None:
            together.wait(PATIENCE_S)
            try:
                while True:
                    engine.drain()
            except EngineClosed:
                return

        threads = [InThread(drain) for _ in range(2)]
        engine.set("s", "k", 1)
        together.wait(PATIENCE_S)
        engine.close()
        for thread in threads:
            thread.result()


@pytest.mark.parametrize("durability", KEEPING)
def test_two_engines_in_one_process_close_each_for_itself(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    first = open_engine(durability, folder="first", save_interval_ms=ONE_HOUR_MS)
    second = open_engine(durability, folder="second", save_interval_ms=ONE_HOUR_MS)
    first.set("s", "k", "first")
    second.set("s", "k", "second")

    first.close()

    second.set("s", "k", "second, later")
    assert second.get("s", "k") == "second, later"
    assert saved(tmp_path / "first", "s") == (1, {"k": b'"first"'})
    second.close()
    assert saved(tmp_path / "second", "s") == (2, {"k": b'"second, later"'})


@pytest.mark.parametrize("durability", KEEPING)
def test_messages_that_wait_when_the_engine_closes_are_all_answered(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", 0)
    replies = []

    def pour() -> None:
        try:
            while True:
                replies.append(engine.ask(messages.Set("s", "k", len(replies)), block=False))
        except EngineClosed:
            return

    pouring = InThread(pour)
    while len(replies) < 100:
        threading.Event().wait(0.001)
    engine.close()
    pouring.result()

    for reply in replies:
        try:
            reply.get(timeout=PATIENCE_S)
        except EngineClosed:
            continue
