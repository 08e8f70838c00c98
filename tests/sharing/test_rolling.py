"""A rolling restart: each process ends in order, and another one takes its place. Triggers and watches miss nothing."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from processes import PATIENCE_S, role_of, wait_until

from scopestate import DeliveryFailure, Engine, ScopestateError, closing
from scopestate.persistence.bridge.backend import BridgeBackend
from scopestate.server import followers

Open = Callable[..., Engine]


class Worker:
    """One engine of the program, with a trigger and a watch."""

    def __init__(self, open_engine: Open, failures: list[DeliveryFailure]) -> None:
        self.engine = open_engine(on_error=failures.append, durability="interval")
        self.told: list[Any] = []
        self.engine.on_change(scope="s")(lambda event: self.told.append(event.new_value))
        self.seen: list[Any] = []
        self._changes = self.engine.watch(snapshot=False)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.began = 0

    def _read(self) -> None:
        try:
            self.seen += (change.value for change in self._changes if change.scope == "s")
        except ScopestateError as error:
            self.seen.append(error)

    def close(self) -> None:
        self.engine.close()
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive()


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an owner wait for its followers as long as a busy machine needs."""
    monkeypatch.setattr(closing, "CATCH_UP_S", PATIENCE_S)
    monkeypatch.setattr(followers, "LAST_POLL_S", PATIENCE_S)


def test_nothing_is_missed_and_nothing_is_logged_when_engine_after_engine_closes(
    open_engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    failures: list[DeliveryFailure] = []
    workers = [Worker(open_engine, failures) for _ in range(4)]
    number = 0
    for _ in range(3):
        for worker in workers:
            worker.engine.set("s", "k", number)
            worker.engine.set("other", "k", number)
            number += 1
        workers.pop(0).close()
        # Before the others have found the next owner, and then by another engine than that.
        for worker in reversed(workers):
            worker.engine.set("s", "k", number)
            number += 1
        fresh = Worker(open_engine, failures)
        fresh.began = number
        workers.append(fresh)

    for worker in workers:
        wanted = list(range(worker.began, number))
        for heard in (worker.told, worker.seen):
            wait_until(lambda heard=heard, wanted=wanted: len(heard) >= len(wanted), f"{heard} of {wanted}")  # type: ignore[misc]
            assert heard == wanted
    assert Counter(role_of(worker.engine) for worker in workers) == {"owner": 1, "follower": 3}
    for worker in sorted(workers, key=lambda worker: role_of(worker.engine)):  # the owner is the last one
        worker.close()
    assert failures == []
    # On a slow machine it is said that the next owner is waited for; that is all.
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    assert [record.getMessage() for record in caplog.records if record.name == "scopestate.triggers"] == []


def test_followers_miss_nothing_if_a_new_process_is_the_next_owner(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[DeliveryFailure] = []
    owner = open_engine(durability="interval")
    worker = Worker(open_engine, failures)
    owner.set("s", "k", 0)
    wait_until(lambda: len(worker.told) == len(worker.seen) == 1)
    may_own = threading.Event()
    sharing = worker.engine._parts.sharing
    assert sharing is not None
    monkeypatch.setattr(sharing, "_take_over", lambda *_: may_own.wait(PATIENCE_S) and False)

    owner.close()
    new = open_engine(durability="interval")
    new.set("s", "k", 1)  # before the follower has found it
    may_own.set()

    wait_until(lambda: len(worker.told) == len(worker.seen) == 2, f"{worker.told} {worker.seen}")
    assert role_of(new) == "owner"
    assert worker.told == worker.seen == [0, 1]
    worker.close()
    assert failures == []


def test_an_owner_that_closes_tells_its_followers_everything_first(open_engine: Open) -> None:
    failures: list[DeliveryFailure] = []
    owner = open_engine(durability="interval")
    worker = Worker(open_engine, failures)
    many = list(range(3_000))
    for number in many:
        owner.set("s", "k", number)

    owner.close()  # at once: the other has not had all of it

    wait_until(lambda: len(worker.told) >= len(many) and len(worker.seen) >= len(many), f"{len(worker.told)}")
    worker.close()
    assert worker.told == worker.seen == many
    assert failures == []


def test_an_owner_that_closes_waits_for_a_follower_that_takes_its_time(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "scopestate.sharing")
    failures: list[DeliveryFailure] = []
    owner = open_engine(durability="interval")
    worker = Worker(open_engine, failures)
    goes_on = threading.Event()
    bridge = worker.engine._parts.backend
    assert isinstance(bridge, BridgeBackend)
    bridge.on_loop(lambda: goes_on.wait(PATIENCE_S))
    many = list(range(3_000))
    for number in many:
        owner.set("s", "k", number)
    looks, are_behind = count(), owner._parts.polls_behind

    def look(active_s: float) -> bool:
        if next(looks) == 250:  # one each 2 ms
            goes_on.set()
        return are_behind(active_s)

    monkeypatch.setattr(owner._parts, "polls_behind", look)

    owner.close()

    wait_until(lambda: len(worker.told) >= len(many) and len(worker.seen) >= len(many), f"{len(worker.told)}")
    assert goes_on.is_set()
    wait_until(lambda: any("the previous owner ended normally" in record.getMessage() for record in caplog.records))
    worker.close()
    assert worker.told == worker.seen == many
    assert failures == []
