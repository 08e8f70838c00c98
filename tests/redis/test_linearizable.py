"""Four processes write one Redis: every history is linearizable, no update is lost, and few are tried in vain."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
from effort import size
from linearizability.checker import Call, NotLinearizable, check
from linearizability.model import ScopeModel, State
from on_redis import OpenRedis, open_redis
from opening import INCREMENT
from reliability.figures import record
from servers import Server
from writer_process import run_together

from scopestate.persistence.redis import commands as redis_commands

__all__ = ["open_redis"]

PROCESSES = 4
SCOPES = ["a", "b", ""]
KEYS = ["k", "l", "m"]


class ByKey(ScopeModel):
    """A scope whose list comes by key, as those in Redis do."""

    @staticmethod
    def apply(state: State, name: str, arguments: tuple[Any, ...]) -> tuple[State, Any]:
        after, result = ScopeModel.apply(state, name, arguments)
        return tuple(sorted(after)), result


def histories(server: Server, seed: int, **options: Any) -> list[tuple[str, Call]]:
    """Return the calls of all processes, each with its scope."""
    outcomes = run_together("history", PROCESSES, seed, url=server.url, **options)
    assert [refused for _, refused in outcomes] == [[]] * PROCESSES
    recorded = [call for calls, _ in outcomes for call in calls]
    assert [str(call) for _, call in recorded if call.cut_off] == [], "nobody may wait until he gives up"
    return recorded


@pytest.mark.parametrize(
    ("scopes", "threads", "calls"),
    [(SCOPES, 2, size(120, 250)), (["one"], 3, size(40, 60))],
    ids=["three scopes", "one scope"],
)
def test_every_history_of_four_processes_is_linearizable(
    redis_server: Server, scopes: list[str], threads: int, calls: int
) -> None:
    seed = random.randrange(10**6)

    recorded = histories(redis_server, seed, calls=calls, threads=threads, scopes=scopes, keys=KEYS)

    assert len(recorded) >= PROCESSES * threads * calls
    overlaps = 0
    for scope in scopes:
        ours = sorted((call for where, call in recorded if where == scope), key=lambda call: call.began)
        check(ours, ByKey(), f"scope {scope!r}, seed {seed}")
        overlaps += sum(
            one.client[0] != other.client[0] and other.began < (one.ended or 0)
            for one, other in itertools.pairwise(ours)
        )
    record(f"Redis: processes race, scopes: {len(scopes)}", calls=len(recorded), overlapping=overlaps)
    assert overlaps > 0, "the processes have not met"


def test_a_lost_write_would_be_found(valkey: Server) -> None:
    """The check itself: a history in which one process read something older than what was there is refused."""
    recorded = histories(valkey, 1, calls=60, threads=1, scopes=["a"], keys=["k"])
    ours = sorted((call for _, call in recorded), key=lambda call: call.began)
    check(ours, ByKey(), "the history as it was")
    now = ours[-1].ended or 0
    late = [
        Call("set", ("k", '"new"'), ("missing", '"new"'), now + 1, now + 2),
        Call("get", ("k",), "missing", now + 3, now + 4),
    ]

    with pytest.raises(NotLinearizable):
        check([*ours, *late], ByKey(), "the history with a lost write")


@pytest.mark.parametrize("threads", [1, 4])
def test_four_processes_that_increment_one_key_count_to_the_sum(redis_server: Server, threads: int) -> None:
    """Each of them exactly once, each tried few times, and not more than every fourth try in vain."""
    calls = size(300, 1000)

    outcomes = run_together("count", PROCESSES, 0, url=redis_server.url, calls=calls, threads=threads)

    assert [outcome["failures"] for outcome in outcomes] == [[]] * PROCESSES
    results = sorted(result for outcome in outcomes for result in outcome["results"])
    assert results == list(range(1, PROCESSES * calls + 1))
    assert redis_server.ask("HGET", "state:s", "n") == str(PROCESSES * calls)
    attempts = sum(outcome["update_attempts"] for outcome in outcomes)
    conflicts = sum(outcome["update_conflicts"] for outcome in outcomes)
    record(f"Redis: processes race to increment, threads of each: {threads}", counted=len(results), in_vain=conflicts)
    assert attempts == PROCESSES * calls + conflicts
    assert 0 < conflicts <= attempts / 4


def test_an_engine_lets_others_come_to_a_key_that_they_update_too(
    valkey: Server, open_redis: OpenRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes on without a rest is always done before the others, who have to look first, can compare."""
    monkeypatch.setattr(redis_commands, "_HOLD_S", 0.0)
    monkeypatch.setattr(redis_commands, "_REST_S", 0.2)
    engine, there = open_redis(valkey.url), valkey.client()

    def longest_of(updates: int) -> float:
        moments = [time.monotonic()]
        for _ in range(updates):
            engine.update("s", "n", INCREMENT)
            moments.append(time.monotonic())
        return max(after - before for before, after in itertools.pairwise(moments))

    longest_of(5)
    assert engine._scopes["s"].commands.paused == {}  # type: ignore[attr-defined]  # nobody else was there
    there.hincrby("state:s", "n", 1)
    assert longest_of(5) >= 0.2
    assert engine.get("s", "n") == 11
    monkeypatch.setattr(redis_commands, "_RIVALRY_S", -1.0)
    there.hincrby("state:s", "n", 1)
    longest_of(5)
    assert engine._scopes["s"].commands.paused == {}  # type: ignore[attr-defined]  # that is over
    assert engine.get("s", "n") == 17
