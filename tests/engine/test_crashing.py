"""Engines on real threads that a test crashes: what is left, and what the old engine can still do, which is nothing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability.living import until

from scopestate import Delivery, Engine, StateEvent
from scopestate.errors import ConfigError, EngineClosed, ScopestateError, Unsupported, WouldDeadlock
from scopestate.persistence.sqlite import files as files_of
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.testing import Engines, VirtualClock

PATIENCE_S = 60.0


def files(directory: Path, *, scopes: Any = (), **more: Any) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 3_600_000, **more}
    return {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
        "scopes": list(scopes),
    }


@pytest.fixture
def engines() -> Iterator[Engines]:
    with Engines() as engines:
        yield engines


def test_what_was_not_saved_is_gone_and_the_old_engine_refuses_everything(engines: Engines, tmp_path: Path) -> None:
    old = engines.open(files(tmp_path))
    scope = old.scope("s")
    watch = scope.watch()
    old.set("s", "saved", 1)
    old.flush()
    old.set("s", "lost", 1)
    old.set("t", "durable", 1, durable=True)
    new = engines.crash(old)
    assert (new.scope("s").keys(), new.scope("t").keys()) == (["saved"], ["durable"])
    for call in (
        lambda: old.set("s", "x", 1),
        lambda: old.get("s", "saved"),
        lambda: scope.set("x", 1),
        lambda: scope.get("saved"),
        lambda: old.list("s"),
        old.list_groups,
        old.flush,
        old.drain,
        lambda: old.transact("s", lambda tx: tx.set("x", 1)),
        lambda: old.watch("s").__enter__(),
        lambda: old.register_function("f", print),
    ):
        with pytest.raises(EngineClosed):
            call()
    assert (old.closed, old.health().ok, new.health().ok) == (True, False, True)
    old.close()  # does nothing
    assert new.get("s", "saved") == 1
    assert len(list(watch)) <= 3  # it has ended


def test_an_engine_in_memory_is_empty_behind_it(engines: Engines) -> None:
    engine = engines.open({"limits": {"max_value_bytes": 10}})
    engine.set("s", "a", 1)
    engine = engines.crash(engine)
    assert engine.list_groups() == []
    with pytest.raises(ScopestateError):
        engine.set("s", "a", "x" * 100)  # the configuration is the same


def test_the_files_are_as_a_killed_process_leaves_them(engines: Engines, tmp_path: Path) -> None:
    engine = engines.open(files(tmp_path))
    engine.set("s", "a", 1, durable=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix in {".db", ".db-wal", ".lock"}}
    assert before["state.db-wal"]
    found: dict[str, bytes] = {}
    opened = engines.open

    def look(config: Any) -> Engine:
        found.update({name: (tmp_path / name).read_bytes() for name in before})
        return opened(config)

    engines.open = look  # type: ignore[method-assign]  # looks between the end and the next opening
    assert engines.crash(engine).get("s", "a") == 1
    assert found == before


CHILD = """
import json, os, signal, sys
from scopestate import Engine
kept = []
for config, steps in json.load(sys.stdin):
    kept.append(engine := Engine.from_config(config))
    for what, key in steps:
        if what == "set": engine.set("s", key, what)
        elif what == "durable": engine.set("s", key, what, **({"durable": True} if "interval" in str(config) else {}))
        elif what == "delete": engine.delete("s", key)
        elif what == "all": engine.transact("s", lambda tx: [tx.set(key + more, 1) for more in "xy"])
        else: engine.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _take(engine: Engine, steps: list[tuple[str, str]], durability: str) -> None:
    for what, key in steps:
        match what:
            case "set":
                engine.set("s", key, what)
            case "durable":
                engine.set("s", key, what, **({"durable": True} if durability == "interval" else {}))
            case "delete":
                engine.delete("s", key)
            case "all":
                engine.transact("s", lambda tx, key=key: [tx.set(key + more, 1) for more in "xy"])  # type: ignore[misc]  # mypy cannot infer a default argument
            case _:
                engine.flush()


def test_a_crash_leaves_what_sigkill_leaves(engines: Engines, tmp_path: Path) -> None:
    chosen, cases = random.Random(14), []
    for number in range(10):
        durability = ("interval", "commit")[number % 2]
        kinds = ["set", "set", "delete", "flush", "all", "durable"]
        steps = [(chosen.choice(kinds), chosen.choice("abc")) for _ in range(chosen.randrange(12))]
        cases.append((durability, steps))
    theirs = [
        (files(tmp_path / f"killed{number}", durability=durability), steps)
        for number, (durability, steps) in enumerate(cases)
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(theirs),
        text=True,
        env=dict(os.environ),
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    for number, (durability, steps) in enumerate(cases):
        engine = engines.open(files(tmp_path / f"mine{number}", durability=durability))
        _take(engine, steps, durability)
        engine, killed = engines.crash(engine), engines.open(theirs[number][0])
        assert list(engine.scope("s").entries()) == list(killed.scope("s").entries()), (durability, steps)
        engine.close()
        killed.close()


def test_in_the_middle_of_a_transaction_nothing_of_it_is_written(engines: Engines, tmp_path: Path) -> None:
    old = engines.open(files(tmp_path))
    old.set("s", "a", 1, durable=True)
    began, go_on, raised = threading.Event(), threading.Event(), list[BaseException]()

    def change(tx: Any) -> None:
        tx.set("a", 2)
        began.set()
        go_on.wait(PATIENCE_S)
        tx.set("b", 2)

    def write(call: Any) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - compared below
            raised.append(error)

    calls = [lambda: old.transact("s", change), lambda: old.set("s", "behind", 1)]
    threads = [threading.Thread(target=write, args=(call,)) for call in calls]
    threads[0].start()
    assert began.wait(PATIENCE_S)
    threads[1].start()  # waits behind it
    new = engines.crash(old)
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [type(error) for error in raised] == [EngineClosed, EngineClosed]
    assert list(new.scope("s").items()) == [("a", 1)]


def test_in_the_middle_of_a_batch_the_end_of_the_block_is_refused(engines: Engines, tmp_path: Path) -> None:
    old = engines.open(files(tmp_path, durability="commit"))
    with pytest.raises(EngineClosed), old.scope("s").batch() as batch:
        batch.set("a", 1)
        new = engines.crash(old)
    assert new.scope("s").keys() == []


def test_a_function_within_a_transaction_cannot_crash_it(engines: Engines) -> None:
    engine = engines.open()
    with pytest.raises(WouldDeadlock, match="transact"):
        engine.transact("s", lambda tx: engines.crash(engine))
    assert not engine.closed


def test_what_was_acknowledged_is_there_and_every_writer_goes_on(engines: Engines, tmp_path: Path) -> None:
    old = engines.open(files(tmp_path, durability="commit"))
    acknowledged: list[str] = []
    enough = threading.Event()

    def write(name: str) -> None:
        for number in range(100_000):
            try:
                old.set(name, str(number), 1)
            except ScopestateError:
                return
            acknowledged.append(f"{name}{number}")
            if len(acknowledged) > 50:
                enough.set()

    async def tasks() -> None:
        async def one(name: str) -> None:
            number = 0
            with pytest.raises(ScopestateError):
                while True:
                    await old.aio.set(name, str(number), 1)
                    acknowledged.append(f"{name}{number}")
                    number += 1

        await asyncio.gather(*map(one, "xyz"))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
    for thread in threads:
        thread.start()
    assert enough.wait(PATIENCE_S)
    new = engines.crash(old)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [thread for thread in threads if thread.is_alive()] == []
    kept = {f"{name}{key}" for name in "abcxyz" for key in new.scope(name).keys()}  # noqa: SIM118 - no mapping
    assert set(acknowledged) <= kept


def test_handlers_that_run_reach_nothing_and_durable_events_come_again(engines: Engines, tmp_path: Path) -> None:
    config = files(tmp_path, durability="commit")
    old, seen = engines.open(config), list[tuple[str, str, int]]()
    holds, go_on, came, refused = threading.Event(), threading.Event(), threading.Event(), list[BaseException]()

    def handle(event: StateEvent, delivery: Delivery) -> None:
        seen.append(("old", event.key, delivery.attempt))
        if event.key == "two":
            holds.set()
            go_on.wait(PATIENCE_S)
            try:
                old.set("orders", "by the handler", 1)
            except EngineClosed as error:
                refused.append(error)
                came.set()
                raise

    old.register_function("ship", handle)
    old.register_trigger(function_id="ship", durable="ship", scope="orders", order="scope")
    old.set("orders", "one", 1)
    old.drain(PATIENCE_S)
    old.set("orders", "two", 1)
    old.set("orders", "three", 1)
    assert holds.wait(PATIENCE_S)
    new = engines.crash(old)
    go_on.set()
    assert came.wait(PATIENCE_S)
    assert len(refused) == 1
    new.register_function("ship", lambda event, delivery: seen.append(("new", event.key, delivery.attempt)))
    new.register_trigger(function_id="ship", durable="ship", scope="orders", order="scope")
    new.drain(PATIENCE_S)
    assert sorted(seen) == [("new", "three", 1), ("new", "two", 2), ("old", "one", 1), ("old", "two", 1)]
    assert sorted(new.scope("orders").keys()) == ["one", "three", "two"]
    assert engines.failures == []


def test_a_coroutine_handler_is_cancelled(engines: Engines) -> None:
    old, began, ended = engines.open(), threading.Event(), threading.Event()

    @old.on_change(scope="s")
    async def handle(event: StateEvent) -> None:
        began.set()
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            ended.set()

    old.set("s", "a", 1)
    assert began.wait(PATIENCE_S)
    engines.crash(old)
    assert ended.wait(PATIENCE_S)


def test_plain_handlers_that_wait_do_not_run_and_no_failure_is_reported(engines: Engines) -> None:
    old, seen, began, go_on = engines.open(), list[str](), threading.Event(), threading.Event()

    @old.on_change(scope="s")
    def handle(event: StateEvent) -> None:
        seen.append(event.key)
        began.set()
        go_on.wait(PATIENCE_S)
        raise ValueError(event.key)

    old.set("s", "a", 1)
    assert began.wait(PATIENCE_S)
    old.set("s", "a", 2)  # waits behind it
    waiting = list[BaseException]()

    def drain() -> None:
        with pytest.raises(EngineClosed) as caught:
            old.drain()
        waiting.append(caught.value)

    thread = threading.Thread(target=drain)
    thread.start()
    while not old._parts.dispatcher.waiting:  # type: ignore[attr-defined]  # until it waits
        thread.join(0.001)
    new = engines.crash(old)
    thread.join(PATIENCE_S)
    go_on.set()
    while old._parts.dispatcher.threads():  # until nothing of it runs
        threading.Event().wait(0.001)
    new.set("s", "c", 1)
    new.drain(PATIENCE_S)
    assert (seen, len(waiting), engines.failures) == (["a"], 1, [])


def test_of_engines_that_share_a_directory_one_goes_on_as_the_owner(engines: Engines, tmp_path: Path) -> None:
    config = files(tmp_path, durability="commit")
    owner, follower = engines.open(config), engines.open(config)
    follower.set("s", "a", 1)
    assert [role(owner), role(follower)] == ["owner", "follower"]
    new = engines.crash(owner)
    assert follower.get("s", "a") == new.get("s", "a") == 1
    follower.set("s", "b", 1)
    assert new.get("s", "b") == 1
    assert sorted([role(follower), role(new)]) == ["follower", "owner"]
    last = engines.crash(new if role(new) == "follower" else follower)
    assert last.get("s", "b") == 1
    assert role(last) == "follower"


def role(engine: Engine) -> str | None:
    sharing = engine.stats().sharing
    return None if sharing is None else sharing.role


def test_what_cannot_crash(engines: Engines) -> None:
    with Engines() as others, pytest.raises(ValueError, match="opened here"):
        engines.crash(others.open())
    with VirtualClock() as clock, pytest.raises(ValueError, match="opened here"):
        engines.crash(clock.open())
    with pytest.raises(ConfigError):
        engines.open({"workers": 1})
    closed = engines.open()
    closed.close()
    with pytest.raises(ValueError, match="that is open"):
        engines.crash(closed)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("kept", ["threads", "clock"])
def test_a_torn_save_is_left_out_and_nothing_else_is_lost(
    engines: Engines, tmp_path: Path, kept: str, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`logged`: there is a write-ahead log already, and the torn save is at its end; otherwise it begins one."""
    with VirtualClock() as clock:
        opened: Engines | VirtualClock = engines if kept == "threads" else clock
        engine = opened.open(files(tmp_path, scopes=[{"name": "safe", "durability": "commit"}]))
        engine.set("safe", "a", 1)
        engine.set("s", "saved", 1)
        engine.flush()
        if not logged:
            engine.close()
            engine = opened.open(files(tmp_path, scopes=[{"name": "safe", "durability": "commit"}]))
        before = (tmp_path / "state.db-wal").read_bytes() if logged else b""
        for number in range(200):
            engine.set("s", f"unsaved-{number}", "x" * 100)
        engine.set("s", "saved", 2)
        rows: list[bytes] = []
        real = files_of.write_whole

        def see(path: str, content: bytes | None) -> None:
            if path.endswith("-wal"):
                rows.append(content or b"")
            real(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scopestate.persistence.sqlite.adapter.write_whole", see)
            again = opened.crash(engine, torn=True)
        (log,) = rows
        assert b"unsaved-0" in log
        assert not logged or (len(log) > len(before) and log[: len(before)] == before)
        assert (len(log) - 32) % (24 + 4096) != 0  # it ends within a page

        assert dict(again.scope("s").items()) == {"saved": 1}
        assert again.get("safe", "a") == 1
        assert again.health().ok
        again.set("s", "new", 1)
        again.flush()
        assert again.set("s", "saved", 3).old_value == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    with StoreReader(tmp_path) as reader:
        assert reader.problems() == []


def test_a_commit_that_its_caller_waits_for_may_be_torn(engines: Engines, tmp_path: Path) -> None:
    """The caller is told that it was not saved; what is acknowledged is there."""
    engine = engines.open(files(tmp_path, durability="commit"))
    engine.set("s", "n", 0)
    acknowledged = [0]

    def write() -> None:
        with pytest.raises(ScopestateError):
            while True:
                engine.set("s", "n", acknowledged[0] + 1)
                acknowledged[0] += 1

    thread = threading.Thread(target=write)
    thread.start()
    until(lambda: acknowledged[0] >= 5, "a few writes")
    again = engines.crash(engine, torn=True)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()

    # One more if it was on disk, and its caller was not told any more.
    assert again.get("s", "n") - acknowledged[0] in (0, 1)
    assert again.health().ok


def test_there_must_be_files_to_tear(engines: Engines, tmp_path: Path) -> None:
    owner = engines.open(files(tmp_path))
    follower = engines.open(files(tmp_path))
    with VirtualClock() as clock:
        for opened, engine in ((engines, engines.open()), (engines, follower), (clock, clock.open())):
            with pytest.raises(Unsupported, match="no files open"):
                opened.crash(engine, torn=True)
            engine.set("s", "k", 1)  # it was not crashed
    owner.flush()
    assert engines.crash(owner, torn=True).get("s", "k") == 1  # all was saved: there is nothing to tear
