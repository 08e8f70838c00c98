"""Keys that expire on a real clock: when their events come, and how long they delay other calls."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from scopestate import Engine
from scopestate.actors.local import LocalScope
from scopestate.ops.results import StateEvent
from scopestate.ops.writes import Expire

PATIENCE_S = 60.0


def test_no_key_is_readable_after_its_deadline_and_no_event_comes_before_it() -> None:
    """How soon the events come depends on the machine: `python -m benchmarks.probes expiry_at_random 10000 10` says."""
    number, rng = 2000, random.Random(1)
    events: list[StateEvent] = []
    early: list[StateEvent] = []
    with Engine() as engine:

        @engine.on_change(scope="s", events=("expired",))
        def note(event: StateEvent) -> None:
            if time.time() < deadlines[event.key].timestamp() - 0.001:
                early.append(event)
            events.append(event)

        begin = datetime.now(UTC) + timedelta(seconds=2)
        deadlines = {f"k{index}": begin + timedelta(seconds=1.5 * rng.random()) for index in range(number)}
        for some in batched(list(deadlines.items())):
            with engine.batch("s") as batch:
                for key, deadline in some:
                    batch.set(key, 1, expires_at=deadline)
        assert datetime.now(UTC) < begin
        keys, until = list(deadlines), begin + timedelta(seconds=1.5)
        while (now := datetime.now(UTC)) < until:
            key = rng.choice(keys)
            there = engine.get("s", key) is not None
            assert not (there and now >= deadlines[key])
            assert len(engine.list("s")) <= sum(deadline > now for deadline in deadlines.values())
        await_(lambda: len(events) == number)

    assert {event.key for event in events} == set(keys)
    assert all((event.late_ms or 0) >= 0 for event in events)
    assert early == []


def test_keys_that_fall_due_together_hold_no_writer_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, told, spent_ms = 20_000, list[str](), list[float]()
    receive = LocalScope.on_receive
    expiring, over = threading.Event(), threading.Event()

    def timed(self: LocalScope, turn: Any) -> Any:
        if type(turn) is not Expire:
            return receive(self, turn)
        expiring.set()
        await_(lambda: self.has_mail() or over.is_set())  # until the writer waits for the end of this turn
        began = time.thread_time()
        answer = receive(self, turn)
        spent_ms.append((time.thread_time() - began) * 1000)
        return answer

    monkeypatch.setattr(LocalScope, "on_receive", timed)
    kv = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine.from_config({"workers": [worker]}) as engine:
        engine.on_change(scope="s", events=("expired",))(lambda event: told.append(event.key))

        def set_all(deadline: datetime) -> float:
            began = time.monotonic()
            for some in batched(range(number)):
                with engine.batch("s") as batch:
                    for index in some:
                        batch.set(f"k{index}", index, expires_at=deadline)
            return time.monotonic() - began

        takes_s = set_all(datetime.now(UTC) + timedelta(days=1))
        deadline = datetime.now(UTC) + timedelta(seconds=4 + 3 * takes_s)
        set_all(deadline)
        assert datetime.now(UTC) < deadline
        before = psutil.Process().memory_info().rss
        written = [0]

        def write() -> None:
            assert expiring.wait(PATIENCE_S)
            while not over.is_set():
                engine.set("s", "w", written[0])
                written[0] += 1

        writer = threading.Thread(target=write)
        writer.start()
        await_(lambda: len(told) == number)
        meanwhile = written[0]
        grown = psutil.Process().memory_info().rss - before
        over.set()
        writer.join()

    assert sorted(told) == sorted(f"k{index}" for index in range(number))
    assert len(spent_ms) >= number / 256
    # In processor time, which other processes do not change: the scope is held for this long.
    assert sorted(spent_ms)[len(spent_ms) * 95 // 100] < 20
    assert meanwhile >= number / 256 - 1  # the writer came between the turns
    assert grown < 64 << 20


def batched(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield as many at a time as one transaction may set: far quicker than a call for each."""
    return (items[begin : begin + 1000] for begin in range(0, len(items), 1000))


def await_(condition: Any) -> None:
    """Wait until something has happened on other threads."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        threading.Event().wait(0.005)
