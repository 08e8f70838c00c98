"""Threads and tasks through two bridges to one remote: every history is linearizable."""

from __future__ import annotations

import asyncio
import random

import pytest
from linearizability.history import History, run_clients
from linearizability.revised_history import RevisedHistory
from second_engine import OpenBridge, RemoteProcess

SCOPES = ("a", "b", "")
KEYS = ("k", "l", "m")
CALLS = 150


@pytest.mark.parametrize("kind", [History, RevisedHistory])
@pytest.mark.parametrize("events", ["local", "remote"])
def test_every_history_of_two_bridges_is_linearizable(
    events: str, kind: type[History], remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    seed = random.randrange(10**9)
    one, other = (kind(open_bridge(remote.url, events=events), SCOPES, KEYS) for _ in range(2))
    other.note_into(one)

    async def tasks() -> None:
        await asyncio.gather(*(side.task(seed + 10 + n, CALLS, f"task-{n}") for n, side in enumerate((one, other))))

    run_clients([side.thread(seed + n, CALLS, f"thread-{n}") for n, side in enumerate((one, other))], tasks)

    assert len(one) >= 4 * CALLS
    one.check()
    assert one.refused == other.refused == []
