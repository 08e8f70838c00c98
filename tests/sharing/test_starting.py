"""Many processes that open one directory at once: one of them owns it, and each is served."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from effort import size
from reliability.figures import record
from sharing.facts import Death, read
from sharing.killing import Killing, Plan
from stored import values_of

from scopestate.persistence import FileAdapter

PROCESSES = 16
ROUNDS = size(1, 20)

# More than the processes of a test are waited for: then the failure says where each of them is.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Killing]:
    made = Killing(Plan(0, PROCESSES, 0), tmp_path)
    yield made
    made.close()


def counted(starting: Killing, names: list[str]) -> dict[str, int]:
    """Return what each process has counted, of those that have."""
    found = {}
    for name in names:
        for fact in read(starting.folder / f"{name}.log"):
            if fact.word == "counted":
                found[name] = fact.rest[0]
    return found


def end(starting: Killing, names: list[str]) -> None:
    """Close every process in order: the directory is handed over until the last one is gone."""
    for name in random.sample(names, len(names)):
        starting.expect(name)
        os.kill(starting.alive[name], signal.SIGTERM)
    starting.until(lambda: not starting.alive, "a process does not close")
    assert all(read(starting.folder / f"{name}.log")[-1].word == "closed" for name in names)


def on_disk(starting: Killing) -> int:
    """Return the count that is on disk; the store is sound."""
    adapter = FileAdapter(starting.store)
    try:
        assert adapter.check() == []
        return int(values_of(adapter.load("starts"))["n"])
    finally:
        adapter.close()


def test_of_many_processes_that_begin_at_once_one_owns_the_directory_and_all_are_served(starting: Killing) -> None:
    began = time.monotonic()
    for number in range(ROUNDS):
        names = [starting.start(brief=True) for _ in range(PROCESSES)]
        starting.until(lambda names=names: len(counted(starting, names)) == PROCESSES, "a process is not served")
        assert sorted(counted(starting, names).values()) == [
            PROCESSES * number + place for place in range(1, PROCESSES + 1)
        ]
        end(starting, names)
        assert on_disk(starting) == PROCESSES * (number + 1)
    record("processes that begin at once", rounds=ROUNDS, processes=PROCESSES, seconds=time.monotonic() - began)


def test_owners_that_die_while_others_connect_leave_one_owner_and_lose_nothing(starting: Killing) -> None:
    killed = 0
    for number in range(ROUNDS):
        names = [starting.start(brief=True) for _ in range(PROCESSES)]
        for _ in range(4):
            starting.until(lambda: starting.name_of(starting.holder()) is not None, "no process owns the directory")
            owner = starting.name_of(starting.holder())
            assert owner is not None
            starting.expect(owner)
            starting.deaths.append(Death(time.monotonic_ns(), owner, "kill", was_owner=True))
            os.kill(starting.alive[owner], signal.SIGKILL)
            starting.until(lambda owner=owner: owner not in starting.alive, "a process does not die")
            killed += 1
        left = [name for name in names if name in starting.alive]
        starting.until(lambda left=left: len(counted(starting, left)) == len(left), "a process is not served")
        numbers = list(counted(starting, names).values())
        assert len(set(numbers)) == len(numbers)
        end(starting, left)
        # A killed process may have counted without knowing.
        assert max(numbers) <= on_disk(starting) <= PROCESSES * (number + 1)
    record("owners that die while others connect", rounds=ROUNDS, processes=PROCESSES, kills=killed)


def test_a_socket_that_a_killed_owner_has_left_is_in_no_way(starting: Killing) -> None:
    names = [starting.start(brief=True) for _ in range(2)]
    starting.until(lambda: len(counted(starting, names)) == 2, "a process is not served")
    for name in names:
        starting.expect(name)
        os.kill(starting.alive[name], signal.SIGKILL)
    starting.until(lambda: not starting.alive, "a process does not die")
    left = sorted(path.name for path in starting.store.iterdir())
    assert any("sock" in name for name in left), left

    again = [starting.start(brief=True) for _ in range(2)]
    starting.until(lambda: len(counted(starting, again)) == 2, "a process is not served")
    assert sorted(counted(starting, again).values()) == [3, 4]
    end(starting, again)
