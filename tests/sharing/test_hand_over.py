"""What happens to the followers when the owner of a directory ends."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import Process, role_of, wait_until

from scopestate import Engine, ScopestateError, StorageError
from scopestate.errors import CallTimeout, ConnectionLost

Open = Callable[..., Engine]
Start = Callable[..., Process]


def test_a_follower_serves_when_the_owner_is_killed(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    engine.set("s", "k", 1)

    owner.kill()

    assert engine.get("s", "k") == 1
    engine.set("s", "k", 2)
    wait_until(lambda: role_of(engine) == "owner")
    assert engine.stats().sharing.taken_over  # type: ignore[union-attr]


def test_one_of_many_followers_takes_over_and_the_rest_follow_it(start: Start, open_engine: Open) -> None:
    owner = start()
    followers = [start() for _ in range(3)]
    assert [process.role for process in followers] == ["follower"] * 3
    engine = open_engine()
    engine.set("s", "n", 1)

    owner.kill()

    add = (
        "import os; from scopestate import ops\n"
        "answer = engine.update('s', 'n', [ops.Increment('', 1)], idempotency_key=str(os.getpid())).new_value"
    )
    assert sorted(process.do(add) for process in followers) == [2, 3, 4]
    assert engine.get("s", "n") == 4
    roles = [process.do("answer = engine.stats().sharing.role") for process in followers] + [role_of(engine)]
    assert sorted(roles) == ["follower", "follower", "follower", "owner"]


def test_no_call_is_lost_when_owner_after_owner_closes(open_engine: Open, start: Start) -> None:
    process = start()
    engine = open_engine()
    failed: list[ScopestateError] = []
    counts = [0, 0]
    stop = threading.Event()

    def count(place: int) -> None:
        try:
            while not stop.is_set():
                engine.update("s", f"n{place}", [{"type": "increment", "path": "", "by": 1}])
                counts[place] += 1
        except ScopestateError as error:
            failed.append(error)

    threads = [threading.Thread(target=count, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        aims = [count + 20 for count in counts]
        wait_until(lambda aims=aims: (counts[0] > aims[0] and counts[1] > aims[1]) or failed)
        following = start()
        assert following.role == "follower"
        assert process.close() == 0
        process = following
        if role_of(engine) == "owner":
            break
    stop.set()
    for thread in threads:
        thread.join()

    assert failed == []
    assert [engine.get("s", "n0"), engine.get("s", "n1")] == counts


def test_a_stopped_owner_keeps_the_directory_and_is_named(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine(limits={"call_timeout_ms": 1500})
    engine.set("s", "k", 1)
    owner.send(signal.SIGSTOP)

    with pytest.raises(StorageError) as caught:
        engine.set("s", "k", 2)

    assert isinstance(caught.value.__cause__, CallTimeout)
    assert f"process {owner.pid}" in str(caught.value)
    assert "kill -CONT" in str(caught.value)
    assert "a write may have been applied" in str(caught.value)
    with pytest.raises(StorageError) as caught:
        engine.get("s", "k")
    assert "nothing was changed" in str(caught.value)
    assert "write" not in str(caught.value)
    assert role_of(engine) == "follower"
    owner.send(signal.SIGCONT)
    assert engine.get("s", "k") in (1, 2)


def test_a_write_under_way_when_the_owner_is_killed_may_have_been_applied(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    engine.set("s", "k", 1, idempotency_key="first")  # it asks the owner for its functions before
    owner.send(signal.SIGSTOP)  # so that it does not answer
    outcomes: list[object] = []

    def write(value: int, key: str | None) -> None:
        try:
            outcomes.append(engine.set("s", f"k{value}", value, idempotency_key=key).new_value)
        except StorageError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=write, args=args) for args in ((1, None), (2, "once"))]
    for thread in threads:
        thread.start()
    connection: Any = engine._parts.backend
    wait_until(lambda: len(connection.owner._under_way) == 2)  # the second one is sent by another thread
    owner.kill()
    for thread in threads:
        thread.join()

    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, StorageError)]
    assert isinstance(failed.__cause__, ConnectionLost)
    assert 2 in outcomes
    assert engine.get("s", "k2") == 2


def test_calls_of_every_kind_go_on_while_an_owner_closes(open_engine: Open, start: Start, tmp_path: Path) -> None:
    owner, every_kind = start(), tmp_path / "each of them has been made twice"
    owner.do(
        "import pathlib, time\n"
        "def slow(event):\n"
        f"    while not pathlib.Path({str(every_kind)!r}).exists(): time.sleep(0.02)\n"
        "engine.on_change(scope='slow')(slow)\n"
        "engine.set('slow', 'k', 1)"
    )
    engine = open_engine()
    engine.set("s", "k", 1)
    owner.begin("engine.close()")

    rounds: Counter[int] = Counter()

    def repeat(call: Callable[[int], bool]) -> None:
        while role_of(engine) != "owner":
            assert call(rounds[id(call)])
            rounds[id(call)] += 1
            if len(rounds) == len(calls) and min(rounds.values()) > 1:
                every_kind.touch()  # the owner can end

    def write(count: int) -> bool:
        with engine.scope("s").batch() as batch:
            batch.set("k", count)
        return engine.get("s", "k") == count

    # At the hand-over, each of them is in the middle of a call.
    calls: list[Callable[[int], bool]] = [
        write,
        lambda _: engine.flush() is None,
        lambda _: engine.list_groups() == ["s", "slow"],
        lambda _: list(engine.consumers()) == [],
        lambda _: engine.dead_letters().list() == [],
        lambda _: engine.dead_letters().get("none:1") is None,
        lambda _: engine.dead_letters().count() == 0,
        lambda _: engine.dead_letters().purge(all=True) == 0,
        lambda _: engine.dead_letters().replay(all=True) == 0,
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(repeat, calls))
    assert min(rounds.values()) > 1
