"""A follower answers as an engine alone does: the conformance cases, and random calls beside an engine in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance import SCENARIOS, TRIGGER_CASES, VECTORS, complaints_about, run_step, run_trigger_case, same

from scopestate import Engine, StateEvent, ops
from scopestate.errors import ScopestateError

PATIENCE_S = 60.0


def test_every_vector_holds_in_a_follower(following: Engine) -> None:
    def run(vector: dict[str, Any]) -> list[str]:
        key = vector["name"]
        if "old" in vector:
            following.set("vectors", key, vector["old"])
        result = following.call("state::update", {"scope": "vectors", "key": key, "ops": vector["ops"]})
        complaints = complaints_about(vector, result)
        if not same(following.get("vectors", key, "lost"), vector["new"]):
            complaints.append(f"{key}: reads otherwise")
        return complaints

    with ThreadPoolExecutor(8) as pool:
        complaints = [line for lines in pool.map(run, VECTORS) for line in lines]

    assert complaints == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_scenario_holds_in_a_follower(scenario: dict[str, Any], following: Engine) -> None:
    seen: list[StateEvent] = []
    following.on_change()(seen.append)

    for step in scenario["steps"]:
        run_step(following.call, step)
        following.drain(PATIENCE_S)
        expected = [] if step["event"] is None else [step["event"]]
        assert same([event.to_json() for event in seen], expected), step
        seen.clear()


@pytest.mark.parametrize("case", TRIGGER_CASES, ids=lambda case: case["name"])
def test_every_trigger_case_holds_in_a_follower(case: dict[str, Any], following: Engine) -> None:
    run_trigger_case(following, case)


Call = Callable[[Engine], Any]
VALUES = [None, 0, 1, -2, 1.5, "", "text", [], [1, "a"], {}, {"n": 1}, {"n": "x", "l": [1]}]
KEYS = ["a", "b", "ab", "", "ü", "\U0001f600"]


def any_call(chance: random.Random) -> tuple[str, Call]:
    """Return a call with its description, the same for each engine."""
    key, other, value = chance.choice(KEYS), chance.choice(KEYS), chance.choice(VALUES)
    revision = chance.randrange(12)
    update = [
        chance.choice(
            [ops.Increment("n", 1), ops.Set("s", value), ops.Merge({"m": 1}), ops.Append("l", value), ops.Remove("n")]
        )
        for _ in range(chance.randrange(4))
    ]
    token = f"token-{chance.randrange(4)}"

    def batch(engine: Engine) -> Any:
        with engine.scope("s").batch(idempotency_key=token) as steps:
            steps.set(key, value)
            steps.update(other, update)
            steps.delete(key)
        return steps.result

    def transact(engine: Engine) -> Any:
        def work(tx: Any) -> Any:
            found = tx.get(key)
            tx.set(other, [found, value])
            return found

        return engine.transact("s", work)

    calls: list[tuple[str, Call]] = [
        ("set", lambda engine: engine.set("s", key, value)),
        ("set if revision", lambda engine: engine.set("s", key, value, if_revision=revision)),
        ("set if absent", lambda engine: engine.set("s", key, value, if_absent=True)),
        ("set once", lambda engine: engine.set("s", key, value, idempotency_key=token)),
        ("update", lambda engine: engine.update("s", key, update)),
        ("update all or nothing", lambda engine: engine.update("s", key, update, atomic=True)),
        ("delete", lambda engine: engine.delete("s", key)),
        ("delete if revision", lambda engine: engine.delete("s", key, if_revision=revision)),
        ("get", lambda engine: engine.get("s", key, "nothing")),
        ("entry", lambda engine: engine.scope("s").entry(key)),
        ("list", lambda engine: engine.list("s")),
        ("keys", lambda engine: engine.scope("s").keys(prefix=key, limit=3)),
        ("count", lambda engine: engine.scope("s").count(start=key)),
        ("delete range", lambda engine: engine.scope("s").delete_range(prefix=key)),
        ("compare and set", lambda engine: engine.scope("s").compare_and_set(key, value, [value])),
        ("modify", lambda engine: engine.scope("s").modify(key, lambda found: [found])),
        ("batch", batch),
        ("transact", transact),
        ("groups", lambda engine: engine.list_groups()),
    ]
    name, call = chance.choice(calls)
    return f"{name} {key!r} {other!r} {value!r} {revision} {update} {token}", call


def outcome(engine: Engine, call: Call) -> str:
    try:
        return repr(call(engine))
    except ScopestateError as error:
        facts = {name: value for name, value in vars(error).items() if not name.startswith("__")}
        return f"{type(error).__name__} {error.code} {error} {facts}"


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_are_answered_and_told_as_in_an_engine_alone(seed: int, following: Engine) -> None:
    chance = random.Random(seed)
    told: dict[str, list[StateEvent]] = {"alone": [], "follower": []}
    with Engine() as alone:
        for name, engine in (("alone", alone), ("follower", following)):
            engine.on_change(scope="s")(told[name].append)
        for _ in range(150):
            said, call = any_call(chance)
            assert outcome(following, call) == outcome(alone, call), said
        alone.drain(PATIENCE_S)
        following.drain(PATIENCE_S)

    def facts(event: StateEvent) -> tuple[Any, ...]:
        return event.event_type, event.key, event.old_json, event.new_json, event.revision, event.existed

    assert [facts(event) for event in told["follower"]] == [facts(event) for event in told["alone"]]
    assert len(told["alone"]) > 50


def test_a_thousand_watches_of_a_follower_are_told_what_each_wants(following: Engine) -> None:
    watches = [following.watch(f"s{number % 50}", key=f"k{number}", snapshot=False) for number in range(1_000)]
    try:
        for number in range(1_000):
            following.set(f"s{number % 50}", f"k{number}", number)
        assert [watch.get(PATIENCE_S).value for watch in watches] == list(range(1_000))
    finally:
        for watch in watches:
            watch.close()


def test_a_watch_that_is_not_read_keeps_no_other_call_waiting(following: Engine) -> None:
    with following.watch("s", snapshot=False) as unread, following.watch("s", snapshot=False) as read:
        for number in range(3_000):
            following.set("s", "k", number)
        assert [read.get(PATIENCE_S).value for _ in range(3_000)] == list(range(3_000))
        assert unread.get(PATIENCE_S).value == 0


def test_a_follower_that_drains_again_and_again_leaves_nothing_behind(open_engine: Callable[..., Engine]) -> None:
    owner, follower = open_engine(), open_engine()
    follower.on_change(scope="s")(lambda event: None)

    for number in range(20):
        follower.set("s", "k", number)
        follower.drain(60)

    assert len(owner._polls._kept) <= 1


def test_watches_that_followers_have_closed_are_kept_up_to_a_limit(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.polls.KEPT_FOR_A_FOLLOWER", 3)
    owner, follower = open_engine(), open_engine()

    for number in range(10):
        follower.set("s", "k", number)
        with follower.watch("s") as watch:
            assert next(watch).value == number

    assert len(owner._polls._kept) <= 3
