"""The conformance cases through an engine whose scopes are in Redis.

No case asks for an order of keys other than that of their names, which is the order of lists here.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance import SCENARIOS, TRIGGER_CASES, VECTORS, complaints_about, run_step, run_trigger_case, same
from on_redis import Noted, OpenRedis, open_redis
from servers import Server

from scopestate import Engine

__all__ = ["open_redis"]


def run_vector(engine: Engine, vector: dict[str, Any]) -> list[str]:
    result = engine.call("state::update", {"scope": "vectors", "key": vector["name"], "ops": vector["ops"]})
    return complaints_about(vector, result)


@pytest.mark.parametrize("written", ["by this engine", "by another program"])
def test_every_vector_holds_and_its_outcome_is_what_another_engine_reads(
    redis_server: Server, open_redis: OpenRedis, written: str
) -> None:
    engine, other = open_redis(redis_server.url), open_redis(redis_server.url)
    elsewhere = redis_server.client()

    def run(vector: dict[str, Any]) -> list[str]:
        if "old" in vector:
            if written == "by this engine":
                engine.set("vectors", vector["name"], vector["old"])
            else:
                elsewhere.hset("state:vectors", vector["name"], json.dumps(vector["old"], indent=1))
        complaints = run_vector(engine, vector)
        if not same(other.get("vectors", vector["name"], "lost"), vector["new"]):
            complaints.append(f"{vector['name']}: reads otherwise")
        return complaints

    with ThreadPoolExecutor(8) as pool:
        complaints = [line for lines in pool.map(run, VECTORS) for line in lines]

    assert len(VECTORS) > 500
    assert complaints == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_and_fires_its_events(
    scenario: dict[str, Any], valkey: Server, open_redis: OpenRedis
) -> None:
    engine, seen = open_redis(valkey.url), Noted()
    engine.on_change()(seen)

    for step in scenario["steps"]:
        run_step(engine.call, step)
        engine.drain(timeout=20)
        assert same(seen.take(), [] if step["event"] is None else [step["event"]]), step


def test_every_scenario_holds_when_two_engines_take_turns(redis_server: Server, open_redis: OpenRedis) -> None:
    """Each call is made by the engine that did not make the last one, and that knows nothing of it."""
    engines = [open_redis(redis_server.url), open_redis(redis_server.url)]
    for scenario in SCENARIOS:
        redis_server.ask("FLUSHALL")
        for number, step in enumerate(scenario["steps"]):
            run_step(engines[number % 2].call, step)


@pytest.mark.parametrize("case", TRIGGER_CASES, ids=lambda case: case["name"])
def test_every_trigger_case_holds(case: dict[str, Any], valkey: Server, open_redis: OpenRedis) -> None:
    run_trigger_case(open_redis(valkey.url), case)
