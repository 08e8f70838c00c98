"""Four processes change the same keys of one Redis by conditions and transactions: nothing is lost, or seen in half."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from linearizability.checker import check
from linearizability.revised_model import RevisedModel
from on_redis import OpenRedis, open_redis
from reliability.figures import record
from servers import Server
from writer_process import run_together

__all__ = ["open_redis"]

PROCESSES = 4
ACCOUNTS = 20
EACH = 1_000
MOVES = 150


@pytest.mark.parametrize(
    ("scopes", "threads", "calls"), [(["a", "b", ""], 2, 120), (["one"], 3, 40)], ids=["three scopes", "one scope"]
)
def test_every_history_with_conditions_and_transactions_is_linearizable(
    redis_server: Server, scopes: list[str], threads: int, calls: int
) -> None:
    seed = random.randrange(10**6)

    outcomes = run_together(
        "revised_history",
        PROCESSES,
        seed,
        url=redis_server.url,
        calls=calls,
        threads=threads,
        scopes=scopes,
        keys=["k", "l", "m"],
    )

    assert [refused for _, refused, _ in outcomes] == [[]] * PROCESSES
    recorded = [call for calls_, _, _ in outcomes for call in calls_]
    assert [str(call) for _, call in recorded if call.cut_off] == []
    for scope in scopes:
        ours = [call for where, call in recorded if where == scope]
        check(ours, RevisedModel(by_key=True), f"scope {scope!r}, seed {seed}")
    came_out: Counter[str] = Counter()
    for _, _, found in outcomes:
        came_out.update(found)
    assert min(came_out[f"{kind} {word}"] for kind in ("set_if", "pair") for word in ("written", "conflict")) > 0
    assert min(came_out["compare_and_set swapped"], came_out["compare_and_set missed"]) > 0
    given_up = sum(call.result == ("gave up",) for _, call in recorded)
    record(f"Redis: processes race with conditions, scopes: {len(scopes)}", calls=len(recorded), given_up=given_up)
    assert given_up <= len(recorded) / 100


@pytest.mark.parametrize("threads", [1, 3])
def test_four_processes_that_modify_one_key_count_to_the_sum(
    redis_server: Server, open_redis: OpenRedis, threads: int
) -> None:
    calls = 150

    outcomes = run_together("modify", PROCESSES, 0, url=redis_server.url, calls=calls, threads=threads)

    results = sorted(result for outcome in outcomes for result in outcome)
    assert results == list(range(1, PROCESSES * calls + 1))
    assert open_redis(redis_server.url).get("s", "n") == PROCESSES * calls


@pytest.mark.parametrize("threads", [1, 3])
def test_the_sum_of_accounts_holds_in_every_snapshot_of_every_process(
    redis_server: Server, open_redis: OpenRedis, threads: int
) -> None:
    bank = open_redis(redis_server.url).scope("bank")
    with bank.batch() as batch:
        for place in range(ACCOUNTS):
            batch.set(f"account-{place}", EACH)

    outcomes = run_together(
        "move",
        PROCESSES,
        random.randrange(10**6),
        url=redis_server.url,
        calls=MOVES,
        threads=threads,
        accounts=ACCOUNTS,
    )

    assert [outcome["failures"] for outcome in outcomes] == [[]] * PROCESSES
    assert {total for outcome in outcomes for total in outcome["sums"]} == {ACCOUNTS * EACH}
    assert sum(bank.values()) == ACCOUNTS * EACH
    snapshots = sum(len(outcome["sums"]) for outcome in outcomes)
    moves = [amount for outcome in outcomes for amount in outcome["moved"]]
    record(f"Redis: processes move money, threads of each: {threads}", moves=len(moves), snapshots=snapshots)
    assert len(moves) == PROCESSES * MOVES
    assert sum(map(bool, moves)) > len(moves) / 2
