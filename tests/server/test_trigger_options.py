"""Options of triggers beside the reference's three, over the wire."""

from __future__ import annotations

from typing import Any

import pytest
from raw import RawWorker
from serving import OpenRaw, OpenServer

from scopestate import Engine

GUEST = "guest-token-0002"


def refused(worker: RawWorker, config: dict[str, Any]) -> str:
    """Register a trigger and return why it was refused; "" if it was not."""
    worker.send({"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f", "config": config})
    worker.send({"type": "ping"})
    answer = worker.receive()
    if answer == {"type": "pong"}:
        return ""
    assert worker.receive() == {"type": "pong"}
    reason: str = answer["error"]["message"]
    return reason


def test_metadata_reaches_the_function_beside_the_event(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s", "metadata": {"team": "x"}})

    engine.set("s", "k", 1)

    call = worker.take("f")
    assert call["metadata"] == {"team": "x"}
    assert "metadata" not in call["data"]


def test_a_condition_gets_no_metadata(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.register("c")
    worker.trigger("f", {"scope": "s", "condition_function_id": "c", "metadata": {"team": "x"}})

    engine.set("s", "k", 1)

    condition = worker.take("c")
    assert "metadata" not in condition
    worker.answer(condition, result=True)
    assert worker.take("f")["metadata"] == {"team": "x"}


def test_without_metadata_a_call_has_none(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s"})

    engine.set("s", "k", 1)

    assert set(worker.take("f")) == {"type", "invocation_id", "function_id", "data", "baggage"}


def test_keys_and_scopes_are_filtered_by_their_beginning(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope_prefix": "shop-", "prefix": "o-", "only_if_changed": True})

    for scope, key, value in (("shop", "o-1", 1), ("shop-eu", "x", 1), ("shop-eu", "o-1", 1), ("shop-eu", "o-1", 1)):
        engine.set(scope, key, value)
    engine.set("shop-eu", "o-2", 2)

    seen = []
    for _ in range(2):
        call = worker.take("f")
        seen.append((call["data"]["scope"], call["data"]["key"], call["data"]["event_type"]))
        worker.answer(call)
    assert seen == [("shop-eu", "o-1", "state:created"), ("shop-eu", "o-2", "state:created")]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"prefix": 1}, "prefix"),
        ({"key": "k", "prefix": "k"}, "prefix"),
        ({"order": "backwards"}, "order"),
        ({"concurrency": 0}, "concurrency"),
        ({"metadata": "text"}, "metadata"),
        ({"retry": {"attempts": 3}}, "durable"),
    ],
)
def test_an_option_that_is_wrong_is_refused(connect: OpenRaw, config: dict[str, Any], problem: str) -> None:
    assert problem in refused(connect(), config)


def test_a_token_needs_every_scope_that_begins_so(open_server: OpenServer, connect: OpenRaw) -> None:
    guest = {"token": GUEST, "functions": ["f"], "registers": ["f"], "read": ["shop-*"]}
    server = open_server(auth={"tokens": ["admin-token-0001", guest]})
    worker = connect(server, additional_headers={"Authorization": f"Bearer {GUEST}"})

    assert refused(worker, {"scope_prefix": "shop-eu"}) == ""
    assert "'shop'" in refused(worker, {"scope_prefix": "shop"})
    assert "name one" in refused(worker, {})


def test_metadata_that_an_sdk_has_beside_the_config_is_the_same(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s"}, metadata={"team": "x"})

    engine.set("s", "k", 1)

    assert worker.take("f")["metadata"] == {"team": "x"}


def test_a_worker_gets_a_list_of_events_and_the_next_one_after_its_answer(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s", "batch": 2, "batch_wait": 0.01, "metadata": {"team": "x"}})

    for number in range(3):
        engine.set("s", f"k{number}", number)

    first = worker.take("f")
    assert [event["key"] for event in first["data"]] == ["k0", "k1"]
    assert first["metadata"] == {"team": "x"}
    worker.answer(first)
    second = worker.take("f")
    assert [(event["key"], event["new_value"]) for event in second["data"]] == [("k2", 2)]
    worker.answer(second)
    engine.drain()


def test_a_worker_gets_a_debounced_event(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s", "debounce": 0.05})

    for number in range(3):
        engine.set("s", "k", number)

    call = worker.take("f")
    assert (call["data"]["event_type"], call["data"]["old_value"], call["data"]["new_value"]) == (
        "state:created",
        None,
        2,
    )
    worker.answer(call)
    engine.drain()


def test_the_list_of_triggers_shows_the_options_of_the_program_and_what_is_paused(
    engine: Engine, connect: OpenRaw
) -> None:
    engine.register_trigger(function_id="f", trigger_id="plain", scope="s")
    engine.register_trigger(function_id="f", trigger_id="other", prefix="o-", batch=3).pause()

    assert connect().call("engine::triggers::list", {})["triggers"] == [
        {"id": "plain", "trigger_type": "state", "function_id": "f", "config": {"scope": "s"}},
        {
            "id": "other",
            "trigger_type": "state",
            "function_id": "f",
            "config": {"prefix": "o-", "order": "trigger", "concurrency": 1, "batch": 3},
            "paused": True,
        },
    ]
