"""Durable triggers over Redis; engines and servers are killed: every promise holds after each death."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from durable.places import CONSUMERS, EFFECTS, KEYS, SCOPE
from effort import size
from reliability.figures import record
from servers import Server, StartServer, wait_until

from tests.durable.checker import Counted, Finished, Over
from tests.durable.test_kills import Child

KILLS = size(4, 50)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    marks = tmp_path / "marks"
    marks.mkdir()
    made = Child(marks)
    yield made
    made.end()


def there(server: Server) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str, int], int]]:
    """Return the number of each key, and how often the effect of each event is there: nothing is under way."""
    with server.client() as client:
        wait_until(lambda: len(client.client_list()) == 1, "the end of the killed engine's connections")
        numbers = {(SCOPE, key): int(json) for key, json in client.hgetall(f"state:{SCOPE}").items()}
        effects: dict[Any, int] = {}
        for name, json in client.hgetall(f"state:{EFFECTS}").items():
            key, number = name.split()
            effects[SCOPE, key, int(number)] = int(json)
    return numbers, effects


@pytest.mark.timeout(1800)
def test_killed_engines_and_servers_lose_no_event_of_a_durable_trigger(child: Child, start_server: StartServer) -> None:
    server = start_server(persistent=True)
    moments = random.Random(12)
    numbers: dict[tuple[str, str], int] = {}
    servers_killed = 0
    for kill in range(KILLS):
        child.live(server.url, "", {key: numbers.get((SCOPE, key), 0) for key in KEYS}, moments.uniform(0.05, 0.4))
        if kill % 3 == 2:
            server.kill()
            server.start()
            servers_killed += 1
        numbers, effects = there(server)
        child.checker.take(Counted("counts", effects, is_all=False))
        child.checker.take(Over(numbers))
        assert child.checker.violations == []
    child.live(server.url, "", {}, 0.0, is_last=True)
    numbers, effects = there(server)
    child.checker.take(Over(numbers, killed=False))
    child.checker.take(Counted("counts", effects))
    child.checker.take(Finished(numbers))

    assert child.checker.violations == []
    written = sum(numbers.values())
    assert set(child.checker.consumers) == CONSUMERS
    assert child.delivered > len(CONSUMERS) * written > 50
    record(
        "SIGKILL with durable triggers: Redis",
        engines=KILLS,
        servers=servers_killed,
        committed=written,
        deliveries=child.delivered,
    )
