"""One trigger of a worker, many events: several calls are under way, those of one lane never together."""

from __future__ import annotations

from typing import Any

import pytest
from raw import PATIENCE_S, masked
from serving import OpenRaw

from scopestate import Engine, ReplyTimeout


def test_events_of_several_scopes_reach_a_worker_side_by_side_as_many_as_asked(
    connect: OpenRaw, engine: Engine
) -> None:
    worker = connect()
    worker.register("on")
    worker.trigger("on", {"concurrency": 3})
    for number in range(6):
        engine.set(f"s{number}", "k", number)

    calls = [worker.take("on") for _ in range(3)]
    assert [call["data"]["new_value"] for call in calls] == [0, 1, 2]
    worker.settle()  # a fourth one has not come
    worker.answer(calls[1])
    calls.append(worker.take("on"))
    assert calls[3]["data"]["new_value"] == 3
    worker.settle()
    for call in (calls[3], calls[0], calls[2]):
        worker.answer(call, error={"code": "c", "message": "m"})
    for _ in range(2):
        worker.answer(worker.take("on"))
    engine.drain(timeout=PATIENCE_S)
    stats = engine.stats()
    assert (stats.deliveries, stats.failures) == (3, 3)


@pytest.mark.parametrize(
    ("config", "together"),
    [
        ({}, ["a1", "c1"]),
        ({"order": "scope"}, ["a1", "c1"]),
        ({"order": "key"}, ["a1", "b1", "c1"]),
        ({"order": "none"}, ["a1", "a2", "b1", "c1"]),
        ({"order": "trigger"}, ["a1"]),
    ],
)
@pytest.mark.parametrize("condition", [None, "app::yes"])
def test_a_worker_gets_what_its_order_allows(
    config: dict[str, Any], together: list[str], condition: str | None, connect: OpenRaw, engine: Engine
) -> None:
    engine.register_function("app::yes", lambda event: True)
    worker = connect()
    worker.register("on")
    worker.trigger("on", config if condition is None else {**config, "condition_function_id": condition})
    for scope, key, value in (("x", "a", "a1"), ("x", "a", "a2"), ("x", "b", "b1"), ("y", "c", "c1")):
        engine.set(scope, key, value)

    calls = [worker.take("on") for _ in together]
    assert sorted(call["data"]["new_value"] for call in calls) == together
    worker.settle()
    seen = [call["data"]["new_value"] for call in calls]
    for call in calls:
        worker.answer(call)
    for _ in range(4 - len(together)):
        call = worker.take("on")
        seen.append(call["data"]["new_value"])
        worker.answer(call)
    engine.drain(timeout=PATIENCE_S)
    assert sorted(seen) == ["a1", "a2", "b1", "c1"]
    assert seen.index("a1") < seen.index("a2")


def test_when_a_worker_leaves_what_it_had_fails_and_what_waited_is_dropped(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("on")
    worker.trigger("on", {"concurrency": 2})
    for number in range(5):
        engine.set(f"s{number}", "k", number)
    for _ in range(2):
        worker.take("on")
    worker.socket.close()

    engine.drain(timeout=PATIENCE_S)
    stats = engine.stats()
    assert (stats.deliveries, stats.failures + stats.dropped) == (0, 5)


def test_events_of_a_workers_own_writes_keep_their_order_and_are_counted(connect: OpenRaw, engine: Engine) -> None:
    writer, worker = connect(), connect()
    worker.register("on")
    worker.trigger("on", {"scope": "s"})
    for number in range(3):
        writer.call("state::set", {"scope": "s", "key": "k", "value": number})

    for number in range(3):  # the first was sent within its write, the others wait for the answer to the one before
        call = worker.take("on")
        assert call["data"]["new_value"] == number
        worker.settle()
        assert engine.stats().deliveries == number
        worker.answer(call)
    engine.drain(timeout=PATIENCE_S)
    assert engine.stats().deliveries == 3


def test_drain_waits_for_an_event_that_was_sent_within_its_write(connect: OpenRaw, engine: Engine) -> None:
    writer, worker = connect(), connect()
    worker.register("on")
    worker.trigger("on", {"scope": "s"})
    writer.call("state::set", {"scope": "s", "key": "k", "value": 1})

    with pytest.raises(ReplyTimeout):
        engine.drain(timeout=0.01)
    worker.answer(worker.take("on"))
    engine.drain(timeout=PATIENCE_S)


def test_a_replaced_trigger_has_the_new_order_when_nothing_is_under_way(connect: OpenRaw, engine: Engine) -> None:
    writer, worker = connect(), connect()
    worker.register("on")
    for order, together in (("scope", 1), ("key", 2), ("scope", 1)):
        worker.trigger("on", {"scope": "s", "order": order}, id="t")
        for key in "ab":
            writer.call("state::set", {"scope": "s", "key": key, "value": order})
        calls = [worker.take("on") for _ in range(together)]
        worker.settle()  # no other one has come
        for call in calls:
            worker.answer(call)
        for _ in range(2 - together):
            worker.answer(worker.take("on"))
        engine.drain(timeout=PATIENCE_S)


def test_a_set_that_many_triggers_watch_is_told_to_each_worker_and_answered(connect: OpenRaw) -> None:
    writer, other = connect(), connect()
    for worker, name in ((writer, "mine"), (other, "theirs")):
        worker.register(name)
        for number in range(3):
            worker.trigger(name, {"scope": "s"}, id=f"{name}{number}")

    for value in (1, 2):
        asked = writer.invoke("state::set", {"scope": "s", "key": "k", "value": value})
        answered = False
        for worker in (writer, other):
            calls = []
            while len(calls) < 3:
                message = worker.receive()
                if message.get("invocation_id") == asked:
                    answered = True
                else:
                    calls.append(message)
            assert [call["data"]["new_value"] for call in calls] == [value] * 3
            for call in calls:
                worker.answer(call)
        if not answered:
            assert writer.receive()["invocation_id"] == asked


def test_sets_in_one_write_that_many_triggers_watch_are_told_in_order(connect: OpenRaw) -> None:
    writer, worker = connect(), connect()
    worker.register("on")
    for number in range(2):
        worker.trigger("on", {"scope": "s", "concurrency": 8, "order": "none"}, id=f"t{number}")
    sets = [
        {
            "type": "invokefunction",
            "function_id": "state::set",
            "data": {"scope": "s", "key": "k", "value": value},
        }
        for value in range(3)
    ]

    writer.socket.socket.sendall(b"".join(map(masked, sets)))

    calls = [worker.take("on") for _ in range(6)]
    assert [call["data"]["new_value"] for call in calls] == [0, 0, 1, 1, 2, 2]
    for call in calls:
        worker.answer(call)
