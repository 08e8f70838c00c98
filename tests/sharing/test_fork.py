"""Forks of processes that share a directory: a child keeps no lock, no socket and no connection of its parent's."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from processes import Process, wait_until

FORK = """
import os, signal, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
answer = os.fork()
if not answer:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()
"""
"""The child stays, and does nothing."""

FORK_AND_OPEN = """
import os, warnings
from scopestate import Engine
from scopestate.errors import EngineClosed
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
reader, writer = os.pipe()
child = os.fork()
if not child:
    try:
        engine.get("s", "k")
    except EngineClosed as error:
        refused = f"{type(error).__name__} {engine.health().ok}"
    with Engine(engine._parts.config) as own:
        own.set("s", "child", os.getpid())
        os.write(writer, f"{refused} {own.stats().sharing.role}".encode())
    os._exit(0)
os.close(writer)
os.waitpid(child, 0)
answer = os.read(reader, 100).decode(), child
"""


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Processes to be ended."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_child_of_a_killed_owner_lets_another_process_take_over(
    start: Callable[..., Process], children: list[int]
) -> None:
    owner, follower = start(), start()
    follower.do('engine.set("s", "k", 1)')
    children.append(owner.do(FORK))

    owner.kill()

    # The child may not have let go of the connection yet: with a key, the write is sent again.
    follower.do('engine.set("s", "k", 2, idempotency_key="2")')
    assert follower.do("answer = engine.stats().sharing.role") == "owner"


def test_a_child_of_a_killed_follower_does_not_follow(start: Callable[..., Process], children: list[int]) -> None:
    owner, follower = start(), start()
    follower.do('engine.on_change(scope="s")(print)\nengine.set("t", "k", 1)')
    assert owner.do("answer = engine.stats().sharing.followers") == 1
    children.append(follower.do(FORK))

    follower.kill()

    wait_until(lambda: owner.do("answer = engine.stats().sharing.followers") == 0)


@pytest.mark.parametrize("role", ["owner", "follower"])
def test_a_child_opens_an_engine_of_its_own_and_its_parent_goes_on(start: Callable[..., Process], role: str) -> None:
    processes = {"owner": start(), "follower": start()}
    process = processes[role]
    process.do('engine.set("s", "k", 1)')

    for _ in range(3):
        said, child = process.do(FORK_AND_OPEN)
        assert said == "EngineForked False follower"
        assert process.do('answer = engine.get("s", "child")') == child

    assert {name: each.do("answer = engine.stats().sharing.role") for name, each in processes.items()} == {
        "owner": "owner",
        "follower": "follower",
    }
    assert [each.do('answer = engine.get("s", "k")') for each in processes.values()] == [1, 1]
    assert [each.close() for each in processes.values()] == [0, 0]
