"""The disk of the owner is full, or fails: what a follower is told, and that it goes on when the disk does."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import pytest
from processes import Process, role_of, wait_until
from reliability.living import Seen

from scopestate import Engine
from scopestate.errors import StorageError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of another process are set by prlimit")

Open = Callable[..., Engine]
Start = Callable[..., Process]

FAILING = """
from scopestate.persistence import FileAdapter
from scopestate.errors import StorageError
save = kept["save"] = FileAdapter.save
def broken(self, batch):
    raise StorageError("the database cannot be written: input/output error, says the test")
FileAdapter.save = broken
answer = True
"""
MENDED = """
from scopestate.persistence import FileAdapter
FileAdapter.save = kept["save"]
answer = True
"""


def follower_with(seen: Seen, open_engine: Open) -> Engine:
    engine = open_engine()
    assert role_of(engine) == "follower"
    engine.on_change(scope="orders")(seen)
    return engine


def test_a_write_that_does_not_fit_on_the_disk_of_the_owner_fails_and_never_was(
    open_engine: Open, start: Start
) -> None:
    owner, seen = start(), Seen()
    engine = follower_with(seen, open_engine)
    engine.set("orders", "small", 1)
    limits = resource.prlimit(owner.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(owner.pid, resource.RLIMIT_FSIZE, (1_000_000, limits[1]))

    with pytest.raises(StorageError) as caught:
        engine.set("orders", "big", "x" * 2_000_000)

    assert caught.value.code == "SET_ERROR"
    assert engine.get("orders", "big") is None
    assert engine.get("orders", "small") == 1
    assert owner.do('answer = engine.get("orders", "big")') is None
    resource.prlimit(owner.pid, resource.RLIMIT_FSIZE, limits)
    wait_until(lambda: can_write(engine, "big", "x" * 2_000_000))
    assert [event.key for event in seen.wait_for(2)] == ["small", "big"]


def can_write(engine: Engine, key: str, value: Any) -> bool:
    try:
        engine.set("orders", key, value)
    except StorageError:
        return False
    return True


def test_a_follower_is_told_that_the_disk_of_the_owner_fails_and_goes_on_when_it_works_again(
    open_engine: Open, start: Start
) -> None:
    owner, seen = start(), Seen()
    engine = follower_with(seen, open_engine)
    engine.set("orders", "a", 1)
    assert owner.do(FAILING)

    with pytest.raises(StorageError, match="input/output error, says the test") as caught:
        engine.set("orders", "a", 2)

    assert caught.value.code == "SET_ERROR"
    assert engine.get("orders", "a") == 1
    assert role_of(engine) == "follower"
    assert owner.do(MENDED)
    wait_until(lambda: can_write(engine, "a", 3))
    assert [event.new_value for event in seen.wait_for(2)] == [1, 3]


def test_what_an_owner_with_a_failing_disk_had_acknowledged_is_there_when_it_is_killed(
    open_engine: Open, start: Start
) -> None:
    owner, seen = start(), Seen()
    engine = follower_with(seen, open_engine)
    engine.set("orders", "a", 1)
    assert owner.do(FAILING)
    with pytest.raises(StorageError):
        engine.set("orders", "a", 2)

    owner.kill()

    assert engine.get("orders", "a") == 1
    engine.set("orders", "a", 3)
    assert role_of(engine) == "owner"
    assert [event.new_value for event in seen.wait_for(2)] == [1, 3]
