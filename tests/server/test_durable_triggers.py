"""Durable triggers of workers: events outlive the worker, and belong to the token that has asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raw import RawWorker
from serving import OpenRaw, OpenServer, eventually

from scopestate import Engine
from scopestate.config import AuthConfig, TokenConfig, from_mapping
from scopestate.server.durable import MOST
from scopestate.server.server import Server

ADMIN = "admin-token-0001"
GUEST = "guest-token-0002"
OTHER = "other-token-0003"

QUICK = {"first": 0.01, "jitter": 0}

OpenEngine = Callable[[], Engine]


@pytest.fixture
def open_engine(tmp_path: Path, nothing_left_behind: None) -> Iterator[OpenEngine]:
    """Open the same store, one engine after the other."""
    opened: list[Engine] = []

    def open_() -> Engine:
        config = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 20}
        adapter = {"name": "kv", "config": config}
        opened.append(Engine(from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})))
        return opened[-1]

    yield open_
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(open_engine: OpenEngine) -> Engine:
    return open_engine()


def as_(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


def limited(token: str, **rights: Any) -> dict[str, Any]:
    lists = {"functions": ["f", "engine::*", "state::*"], "registers": ["f"], "read": ["s"], "write": ["s"]}
    return {"token": token, **lists, **rights}


@pytest.fixture
def guarded(open_server: OpenServer) -> Server:
    tokens = [
        ADMIN,
        limited(GUEST, name="shop"),
        limited(OTHER, name="bank", registers=["g"], functions=["g", "engine::*"]),
    ]
    return open_server(auth={"tokens": tokens})


def durable(worker: RawWorker, function_id: str = "f", name: str = "ship", **options: Any) -> str:
    """Offer a function, register a durable trigger for it, and return the id of the trigger."""
    worker.register(function_id)
    trigger_id = options.pop("id", None)
    return worker.trigger(function_id, {"scope": "s", "durable": name, "retry": QUICK, **options}, id=trigger_id)


def durable_again(worker: RawWorker) -> None:
    """As `durable`, for a consumer with events that wait: they come before the answer to anything sent behind."""
    worker.register("f")
    frame = {"type": "registertrigger", "id": "again", "trigger_type": "state", "function_id": "f"}
    worker.send({**frame, "config": {"scope": "s", "durable": "ship", "retry": QUICK}})


def refused(worker: RawWorker, config: dict[str, Any], trigger_id: str = "t") -> str:
    """Register a trigger and return why it was refused; "" if it was not."""
    frame = {"type": "registertrigger", "id": trigger_id, "trigger_type": "state", "function_id": "f"}
    worker.send({**frame, "config": {"scope": "s", **config}})
    worker.send({"type": "ping"})
    answer = worker.receive()
    if answer == {"type": "pong"}:
        return ""
    assert worker.receive() == {"type": "pong"}
    reason: str = answer["error"]["message"]
    return reason


def consumers(asker: RawWorker) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in asker.call("engine::consumers::list", {})["consumers"]}


def take_and_answer(worker: RawWorker, function_id: str = "f", **outcome: Any) -> dict[str, Any]:
    call = worker.take(function_id)
    worker.answer(call, **outcome)
    data: dict[str, Any] = call["data"]
    return data


# ---------------------------------------------------------------------------------------------------- deliveries


def test_an_event_comes_with_its_delivery_and_the_metadata_beside_it(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    durable(worker, metadata={"team": "x"})

    engine.set("s", "k", 1)

    call = worker.take("f")
    facts = call["data"].pop("_delivery")
    assert call["data"] == {
        "type": "state",
        "event_type": "state:created",
        "scope": "s",
        "key": "k",
        "old_value": None,
        "new_value": 1,
    }
    assert call["metadata"] == {"team": "x", "_delivery": facts}
    assert facts["id"].startswith("ship:")
    assert (facts["consumer"], facts["attempt"]) == ("ship", 1)
    assert facts["first_at"] > 1_700_000_000_000
    worker.answer(call)


def test_a_result_acknowledges_and_an_error_is_tried_again(engine: Engine, connect: OpenRaw) -> None:
    worker, asker = connect(), connect()
    durable(worker)
    engine.set("s", "k", 1)

    first = take_and_answer(worker, error={"code": "invocation_failed", "message": "no"})
    second = take_and_answer(worker, result={"ok": True})

    assert [one["_delivery"]["attempt"] for one in (first, second)] == [1, 2]
    assert first["_delivery"]["id"] == second["_delivery"]["id"]
    eventually(lambda: consumers(asker)["ship"]["lag_events"] == 0)
    worker.settle()  # nothing more comes


@pytest.mark.parametrize(
    "outcome",
    [
        {"error": {"code": "RETRY_LATER", "message": "busy", "details": {"seconds": 0.01}}},
        {"result": {"_delivery": {"retry_later": 0.01}}},
    ],
)
def test_a_worker_may_ask_for_a_later_delivery(engine: Engine, connect: OpenRaw, outcome: dict[str, Any]) -> None:
    worker = connect()
    durable(worker, retry={"attempts": 1})
    engine.set("s", "k", 1)

    attempts = [take_and_answer(worker, **outcome)["_delivery"]["attempt"] for _ in range(3)]
    attempts.append(take_and_answer(worker)["_delivery"]["attempt"])

    assert attempts == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        ({"error": {"code": "DISCARD", "message": "no such customer"}}, "no such customer"),
        ({"result": {"_delivery": {"discard": "no such customer"}}}, "no such customer"),
        ({"error": {"code": "invocation_failed", "message": "broken"}}, "broken"),
    ],
)
def test_what_is_given_up_is_a_dead_letter(engine: Engine, connect: OpenRaw, outcome: dict[str, Any], why: str) -> None:
    worker, asker = connect(), connect()
    durable(worker, retry={"attempts": 1})
    engine.set("s", "k", {"n": 1})

    take_and_answer(worker, **outcome)

    eventually(lambda: asker.call("engine::dead-letters::count", {}) == {"count": 1})
    [letter] = asker.call("engine::dead-letters::list", {"consumer": "ship"})["letters"]
    assert why in letter["error"]
    assert letter["event"]["new_value"] == {"n": 1}
    assert asker.call("engine::dead-letters::replay", {"ids": [letter["id"]]}) == {"replayed": 1}
    assert take_and_answer(worker)["_delivery"]["attempt"] == 1
    assert asker.call("engine::dead-letters::count", {}) == {"count": 0}


@pytest.mark.parametrize(
    "result", [{"_delivery": {"retry_later": "soon"}}, {"_delivery": 7}, {"_delivery": {"retry_later": -1}}]
)
def test_a_verdict_that_cannot_be_read_is_a_failure(engine: Engine, connect: OpenRaw, result: Any) -> None:
    worker = connect()
    durable(worker)
    engine.set("s", "k", 1)

    take_and_answer(worker, result=result)

    assert take_and_answer(worker)["_delivery"]["attempt"] == 2


def test_a_function_that_returns_its_input_has_handled_it(engine: Engine, connect: OpenRaw) -> None:
    worker, asker = connect(), connect()
    durable(worker)
    engine.set("s", "k", 1)

    call = worker.take("f")
    worker.answer(call, result=call["data"])

    eventually(lambda: consumers(asker)["ship"]["lag_events"] == 0)
    worker.settle()


def test_a_delivery_that_takes_too_long_is_tried_again(engine: Engine, connect: OpenRaw) -> None:
    worker, asker = connect(), connect()
    durable(worker, ack_wait=0.05)
    engine.set("s", "k", 1)

    late = worker.take("f")
    again = worker.take("f")
    worker.answer(late, result="too late")
    worker.answer(again)

    assert again["data"]["_delivery"]["attempt"] == 2
    while consumers(asker)["ship"]["lag_events"]:  # on a busy machine this answer may be too late as well
        worker.send({"type": "ping"})
        while (message := worker.receive()) != {"type": "pong"}:
            worker.answer(message)
    worker.settle()


def test_a_condition_is_asked_first_and_gets_no_metadata(engine: Engine, connect: OpenRaw) -> None:
    worker, asker = connect(), connect()
    worker.register("c")
    durable(worker, condition_function_id="c", metadata={"team": "x"})
    engine.set("s", "k", 1)
    engine.set("s", "k", 2)

    first = worker.take("c")
    assert "metadata" not in first
    worker.answer(first, result=False)
    worker.answer(worker.take("c"), result=True)

    assert take_and_answer(worker)["new_value"] == 2
    eventually(lambda: consumers(asker)["ship"]["lag_events"] == 0)


def test_a_state_function_may_be_the_target(engine: Engine, connect: OpenRaw) -> None:
    worker, asker = connect(), connect()
    worker.trigger("state::delete", {"scope": "s", "key": "k", "durable": "clean", "events": ["created"]})

    engine.set("s", "k", 1)

    eventually(lambda: engine.get("s", "k") is None and consumers(asker)["clean"]["lag_events"] == 0)


# ---------------------------------------------------------------------------------------------- coming and going


def test_what_a_worker_sends_behind_the_registration_is_done_behind_it(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    config = {"scope": "s", "durable": "ship"}
    worker.send({"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f", "config": config})
    for number in range(5):
        worker.invoke("state::set", {"scope": "s", "key": "k", "value": number})

    seen: list[int] = []
    while len(seen) < 5:
        message = worker.receive()
        if message["type"] == "invokefunction":
            seen.append(message["data"]["new_value"])
            worker.answer(message)
    assert seen == [0, 1, 2, 3, 4]


def test_events_wait_for_a_worker_that_comes_again(
    engine: Engine, open_engine: OpenEngine, open_server: OpenServer, connect: OpenRaw
) -> None:
    worker = connect(open_server())
    durable(worker)
    engine.set("s", "k", 1)
    worker.take("f")
    worker.cut()
    eventually(lambda: engine.call("engine::consumers::list")["consumers"][0]["active"] is False)
    engine.set("s", "k", 2)
    engine.close()

    engine = open_engine()
    worker = connect(open_server(engine=engine))
    engine.set("s", "k", 3)
    durable_again(worker)

    seen = [take_and_answer(worker) for _ in range(3)]
    assert [one["new_value"] for one in seen] == [1, 2, 3]
    assert [one["_delivery"]["attempt"] for one in seen] == [2, 1, 1]


def test_a_replica_takes_over_when_the_newest_leaves(engine: Engine, connect: OpenRaw) -> None:
    old, new = connect(), connect()
    durable(old, id="one")
    durable(new, id="two")
    engine.set("s", "k", 1)
    assert take_and_answer(new)["new_value"] == 1

    engine.set("s", "k", 2)
    new.take("f")
    new.cut()

    again = take_and_answer(old)
    assert (again["new_value"], again["_delivery"]["attempt"]) == (2, 2)
    engine.set("s", "k", 3)
    assert take_and_answer(old)["new_value"] == 3


def test_a_trigger_that_is_taken_away_leaves_its_consumer(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    trigger_id = durable(worker)
    worker.send({"type": "unregistertrigger", "id": trigger_id})
    worker.settle()

    engine.set("s", "k", 1)
    engine.flush()

    assert (consumers(worker)["ship"]["active"], consumers(worker)["ship"]["lag_events"]) == (False, 1)
    durable_again(worker)
    assert take_and_answer(worker)["new_value"] == 1


def test_a_trigger_may_become_durable_and_plain_again(engine: Engine, connect: OpenRaw, server: Server) -> None:
    worker = connect()
    worker.register("f")
    for config, is_durable in (({}, False), ({"durable": "ship"}, True), ({}, False)):
        worker.trigger("f", {"scope": "s", **config}, id="t")
        engine.set("s", "k", 1)
        assert ("_delivery" in take_and_answer(worker)) is is_durable
        worker.settle()
        assert server.status().triggers == 1


def test_a_worker_has_one_trigger_for_a_consumer(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    durable(worker, id="one")

    assert "'one'" in refused(worker, {"durable": "ship"}, "two")
    assert refused(worker, {"durable": "ship"}, "one") == ""


def test_a_consumer_of_the_program_is_not_for_workers(engine: Engine, connect: OpenRaw) -> None:
    engine.register_function("mine", lambda event: None)
    engine.register_trigger(function_id="mine", scope="s", durable="ship")

    assert "program" in refused(connect(), {"durable": "ship"})


def test_an_engine_without_a_store_refuses(open_server: OpenServer, connect: OpenRaw) -> None:
    with Engine() as engine:
        worker = connect(open_server(engine=engine))
        assert "store" in refused(worker, {"durable": "ship"})
        worker.close()


def test_a_scope_in_memory_is_refused(open_server: OpenServer, connect: OpenRaw, tmp_path: Path) -> None:
    config = {"store_method": "file_based", "file_path": str(tmp_path / "other")}
    entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": config}}}
    rules = [{"name": "s", "durability": "memory"}]
    with Engine(from_mapping({"workers": [entry], "scopes": rules})) as engine:
        worker = connect(open_server(engine=engine))
        assert refused(worker, {"durable": "ship"}) != ""
        worker.close()


# -------------------------------------------------------------------------------------------------------- rights


def test_the_consumers_of_two_tokens_are_apart(guarded: Server, engine: Engine, connect: OpenRaw) -> None:
    shop, bank, admin = (connect(guarded, **as_(token)) for token in (GUEST, OTHER, ADMIN))
    durable(shop, "f")
    durable(bank, "g")

    engine.set("s", "k", 1)
    facts = [take_and_answer(shop, "f")["_delivery"], take_and_answer(bank, "g")["_delivery"]]

    assert [one["consumer"] for one in facts] == ["ship", "ship"]
    assert sorted(consumers(admin)) == ["bank/ship", "shop/ship"]
    assert list(consumers(shop)) == list(consumers(bank)) == ["ship"]


def test_a_token_cannot_take_read_or_forget_the_consumer_of_another(
    guarded: Server, engine: Engine, connect: OpenRaw
) -> None:
    shop, bank, admin = (connect(guarded, **as_(token)) for token in (GUEST, OTHER, ADMIN))
    durable(bank, "g", retry={"attempts": 1})
    engine.set("s", "k", 1)
    take_and_answer(bank, "g", error={"code": "x", "message": "no"})
    eventually(lambda: admin.call("engine::dead-letters::count", {}) == {"count": 1})
    [letter] = admin.call("engine::dead-letters::list", {})["letters"]

    assert refused(shop, {"durable": "bank/ship"}) == ""
    assert sorted(consumers(admin)) == ["bank/ship", "shop/bank/ship"]
    for name in ("ship", "bank/ship", "../bank/ship"):
        for what in ("pause", "resume"):
            shop.call(f"engine::consumers::{what}", {"name": name})
        shop.call("engine::consumers::forget", {"name": name})
    assert shop.call("engine::dead-letters::get", {"id": letter["id"]}) is None
    assert shop.call("engine::dead-letters::purge", {"all": True}) == {"purged": 0}
    assert shop.call("engine::dead-letters::replay", {"ids": [letter["id"]]}) == {"replayed": 0}
    status = consumers(bank)["ship"]
    assert (status["dead"], status["paused"]) == (1, None)


def test_a_token_without_a_name_has_no_consumers(open_server: OpenServer, connect: OpenRaw) -> None:
    worker = connect(open_server(auth={"tokens": [ADMIN, limited(GUEST)]}), **as_(GUEST))

    assert "`name`" in refused(worker, {"durable": "ship"})
    assert worker.ask("engine::consumers::forget", {"name": "ship"})["error"]["code"] == "FORBIDDEN"


@pytest.mark.parametrize("function_id", ["engine::consumers::list", "engine::dead-letters::purge"])
def test_the_functions_must_be_granted(open_server: OpenServer, connect: OpenRaw, function_id: str) -> None:
    tokens = [ADMIN, limited(GUEST, name="shop", functions=["state::*", "f"])]
    worker = connect(open_server(auth={"tokens": tokens}), **as_(GUEST))

    assert worker.ask(function_id, {})["error"]["code"] == "FORBIDDEN"


def test_the_rights_of_the_moment_count_for_each_delivery(guarded: Server, engine: Engine, connect: OpenRaw) -> None:
    shop, admin = connect(guarded, **as_(GUEST)), connect(guarded, **as_(ADMIN))
    durable(shop, retry={"attempts": 1})
    tokens = guarded.config.auth.tokens
    now = TokenConfig(token=GUEST, name="shop", functions=("f", "engine::*"), registers=("f",), read=("other",))
    guarded._access_check.reload(AuthConfig((tokens[0], now, tokens[2])))

    engine.set("s", "k", "secret")

    eventually(lambda: admin.call("engine::dead-letters::count", {}) == {"count": 1})
    shop.settle()
    [letter] = admin.call("engine::dead-letters::list", {})["letters"]
    assert "Forbidden" in letter["error"]
    assert shop.ask("engine::dead-letters::get", {"id": letter["id"]})["error"]["code"] == "FORBIDDEN"
    assert shop.call("engine::dead-letters::list", {})["letters"] == []


def test_consumers_that_outlive_their_workers_are_bounded(
    engine: Engine, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.server.durable.MOST", 3)
    assert MOST > 3
    worker = connect()
    for number in range(3):
        assert refused(worker, {"durable": f"c{number}"}, f"t{number}") == ""

    assert "forget" in refused(worker, {"durable": "one-more"}, "more")
    assert refused(worker, {"durable": "c1"}, "t1") == ""
    worker.call("engine::consumers::forget", {"name": "c2"})


def test_a_list_of_events_is_one_delivery(engine: Engine, connect: OpenRaw) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s", "durable": "ship", "retry": QUICK, "batch": 2, "batch_wait": 0.05}, id="t")
    for number in range(2):
        engine.set("s", f"k{number}", number)

    first = worker.take("f")
    worker.answer(first, error={"code": "X", "message": "no"})
    again = worker.take("f")
    worker.answer(again)

    assert [event["key"] for event in first["data"]] == ["k0", "k1"]
    assert again["data"] == first["data"]
    assert (first["metadata"]["_delivery"]["attempt"], again["metadata"]["_delivery"]["attempt"]) == (1, 2)
    assert again["metadata"]["_delivery"]["id"] == first["metadata"]["_delivery"]["id"]
