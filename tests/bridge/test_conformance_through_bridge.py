"""The conformance cases through a bridge, against a second scopestate process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance import SCENARIOS, TRIGGER_CASES, VECTORS, complaints_about, run_step, run_trigger_case, same
from second_engine import OpenBridge, RemoteProcess, Seen

from scopestate import Engine


def run_vector(engine: Engine, vector: dict[str, Any]) -> list[str]:
    result = engine.call("state::update", {"scope": "vectors", "key": vector["name"], "ops": vector["ops"]})
    return complaints_about(vector, result)


def test_every_vector_holds_through_a_bridge(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(remote.url)

    def run(vector: dict[str, Any]) -> list[str]:
        if "old" in vector:
            engine.set("vectors", vector["name"], vector["old"])
        complaints = run_vector(engine, vector)
        if not same(engine.get("vectors", vector["name"], "lost"), vector["new"]):
            complaints.append(f"{vector['name']}: reads otherwise")
        return complaints

    with ThreadPoolExecutor(16) as pool:
        complaints = [line for lines in pool.map(run, VECTORS) for line in lines]

    assert complaints == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_and_fires_from_the_answers(
    scenario: dict[str, Any], remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change()(seen)

    for step in scenario["steps"]:
        run_step(engine.call, step)
        engine.drain(timeout=20)
        assert same(seen.take(), [] if step["event"] is None else [step["event"]]), step


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_and_fires_from_the_remotes_events(
    scenario: dict[str, Any], remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine, seen = open_bridge(remote.url, events="remote"), Seen()
    engine.on_change()(seen)
    expected: list[Any] = []

    for step in scenario["steps"]:
        run_step(engine.call, step)
        expected += [] if step["event"] is None else [step["event"]]
    engine.delete("after all", "that")  # its event comes last, and it leaves nothing behind

    events = [event.to_json() for event in seen.wait_for(len(expected) + 1)]
    assert same(events[:-1], expected)
    assert events[-1]["scope"] == "after all"


@pytest.mark.parametrize("case", TRIGGER_CASES, ids=lambda case: case["name"])
def test_every_trigger_case_holds(case: dict[str, Any], remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    run_trigger_case(open_bridge(remote.url), case)
