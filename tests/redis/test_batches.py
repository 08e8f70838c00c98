"""Many calls go to Redis as one command: they take effect in the order in which they came all the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conformance import same
from on_redis import OpenRedis, bytes_client, open_redis
from opening import INCREMENT, open_at
from servers import Server, StartServer, wait_until

from scopestate import Engine, SetResult, UpdateResult, messages
from scopestate.ops.functions import from_payload
from scopestate.persistence.connections import pump
from scopestate.persistence.redis import commands as redis_commands
from scopestate.persistence.redis.connection import Connection

__all__ = ["open_redis"]

MISSING = object()


def replay(model: Engine, scope: str, function_id: str, payload: dict[str, Any], keys: list[str]) -> Any:
    """What the call gives in memory, where each is made by itself; a list by key."""
    if function_id == "state::list":
        values = [model.get(scope, key, MISSING) for key in sorted(keys)]
        return [value for value in values if value is not MISSING]
    return model.call(function_id, payload)


def plain(answer: Any) -> Any:
    """The answer to a message as `call` gives it, without what an op was refused for."""
    if isinstance(answer, SetResult | UpdateResult):
        return {"old_value": answer.old_value, "new_value": answer.new_value}
    if isinstance(answer, dict) and "new_value" in answer:
        return {"old_value": answer["old_value"], "new_value": answer["new_value"]}
    return answer


@pytest.mark.parametrize("keys", [["k"], ["k", "l", "m", ""]], ids=["one key", "mixed keys"])
@pytest.mark.parametrize("seed", [1, 2])
def test_hundreds_of_messages_at_once_take_effect_in_their_order(
    keys: list[str], seed: int, redis_server: Server, open_redis: OpenRedis
) -> None:
    draw = random.Random(seed)
    engine, model = open_redis(redis_server.url), Engine()
    replies, expected = [], []
    with model:
        for number in range(800):
            key = draw.choice(keys)
            payload: dict[str, Any] = {"scope": "s", "key": key}
            match draw.choices(("set", "update", "delete", "get", "list"), weights=(25, 40, 10, 20, 5))[0]:
                case "set":
                    function_id, payload = "state::set", {**payload, "value": draw.choice([number, "t", [number]])}
                case "update":
                    op = draw.choice([{"type": "append", "path": "", "value": "x"}, INCREMENT[0]])
                    function_id, payload = "state::update", {**payload, "ops": [op]}
                case "delete":
                    function_id = "state::delete"
                case "get":
                    function_id = "state::get"
                case _:
                    function_id, payload = "state::list", {"scope": "s"}
            message = from_payload(function_id, payload)
            wanted = plain(replay(model, "s", function_id, payload, keys))
            if draw.random() < 0.3:
                engine.tell(message)
            else:
                replies.append(engine.ask(message, block=False))
                expected.append((number, function_id, wanted))
    answers = [reply.get(timeout=20) for reply in replies]

    wrong = [
        (what, plain(answer))
        for what, answer in zip(expected, answers, strict=True)
        if not same(plain(answer), what[2])
    ]
    assert wrong == []


@pytest.mark.parametrize("scopes", [1, 64], ids=["one scope", "a scope each"])
@pytest.mark.parametrize(("pace_s", "expected"), [(1.0, [1, 31, 32]), (0.0, [1, 63])], ids=["near", "far away"])
def test_of_many_who_wait_one_half_goes_first_unless_the_server_is_far_away(
    pace_s: float, expected: list[int], scopes: int, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = Connection.send

    def counting(self: Connection, data: bytes) -> None:
        sent.append(max(data.count(b"\r\n$1\r\ns\r\n"), data.count(b"EVALSHA")))
        send(self, data)

    server = start_server()
    with open_at(server.url) as engine:
        for number in range(scopes):
            # By the link's thread, which takes the time.
            engine.ask(messages.Set(str(number), "k", "before"), block=False).get(timeout=20)
        engine.delete("0", "none")  # the server knows the other script too
        monkeypatch.setattr(pump, "_PACE_S", pace_s)
        monkeypatch.setattr(Connection, "send", counting)
        server.pause()
        replies = [engine.ask(messages.Set("0", "k", 0), block=False)]
        wait_until(lambda: sent, "a command on its way")
        replies += [
            engine.ask(messages.Set(str(number % scopes), f"k{number}", number), block=False) for number in range(1, 64)
        ]
        server.resume()
        for reply in replies:
            reply.get(timeout=20)
    assert sent == expected


def test_appends_sent_at_once_beside_reads_show_every_state_on_the_way(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    reads, lists = [], []
    for number in range(500):
        payload = {"scope": "s", "key": "k", "ops": [{"type": "append", "path": "", "value": number}]}
        engine.tell(from_payload("state::update", payload))
        reads.append(engine.ask(messages.Get("s", "k"), block=False))
        if number % 50 == 0:
            lists.append((number, engine.ask(messages.List("s"), block=False)))

    for number, read in enumerate(reads):
        assert read.get(timeout=20) == list(range(number + 1))
    for number, listed in lists:
        assert listed.get(timeout=20) == [list(range(number + 1))]


@pytest.mark.parametrize("together", [False, True], ids=["behind a paused update", "in one command with it"])
def test_what_comes_behind_an_update_that_must_be_tried_again_stays_behind_it(
    together: bool, redis_server: Server, open_redis: OpenRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_commands, "_PAUSE_S", (0.3, 0.3))
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    engine, there = open_redis(redis_server.url), bytes_client(redis_server)
    engine.set("s", "k", [])
    there.hset("state:s", "k", b"[0]")

    def append(value: int) -> messages.Message:
        op = {"type": "append", "path": "", "value": value}
        return from_payload("state::update", {"scope": "s", "key": "k", "ops": [op]})

    adapter: Any = engine._parts.backend
    sent = [append(1), messages.Get("s", "k"), append(2), messages.List("s"), messages.Set("s", "a", 1)]
    sent += [messages.List("s"), append(3), messages.Get("s", "k"), messages.Get("s", "a")]
    if together:
        redis_server.pause()
        try:
            engine.tell(messages.Get("s", "elsewhere"))
            replies = [engine.ask(message, block=False) for message in sent]
        finally:
            redis_server.resume()
    else:
        replies = [engine.ask(sent[0], block=False)]
        wait_until(lambda: adapter.counts()["update_conflicts"] == 1, "a conflict")
        replies += [engine.ask(message, block=False) for message in sent[1:]]

    assert [plain(reply.get(timeout=20)) for reply in replies] == [
        {"old_value": [0], "new_value": [0, 1]},
        [0, 1],
        {"old_value": [0, 1], "new_value": [0, 1, 2]},
        [[0, 1, 2]],
        {"old_value": None, "new_value": 1},
        [1, [0, 1, 2]],
        {"old_value": [0, 1, 2], "new_value": [0, 1, 2, 3]},
        [0, 1, 2, 3],
        1,
    ]


def test_an_update_behind_other_writes_of_its_command_knows_what_they_leave(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    adapter: Any = engine._parts.backend

    def message(name: str, **more: Any) -> messages.Message:
        return from_payload(f"state::{name}", {"scope": "s", "key": "k", **more})

    engine.set("s", "k", 1)
    before = adapter.counts()
    redis_server.pause()
    try:
        engine.tell(messages.Get("s", "elsewhere"))
        sent = [
            message("set", value=5),
            message("update", ops=INCREMENT),
            message("delete"),
            message("update", ops=INCREMENT),
            message("update", ops=INCREMENT),
            message("set", value=8),
            message("update", ops=INCREMENT),
        ]
        replies = [engine.ask(one, block=False) for one in sent]
    finally:
        redis_server.resume()

    assert [plain(reply.get(timeout=20)) for reply in replies] == [
        {"old_value": 1, "new_value": 5},
        {"old_value": 5, "new_value": 6},
        6,
        {"old_value": None, "new_value": 1},
        {"old_value": 1, "new_value": 2},
        {"old_value": 2, "new_value": 8},
        {"old_value": 8, "new_value": 9},
    ]
    # None had to be computed again: each knew the value that it would find.
    assert adapter.counts()["update_conflicts"] == before["update_conflicts"]
    assert adapter.counts()["update_attempts"] == before["update_attempts"] + 4


def test_an_update_after_other_calls_knows_what_they_left(redis_server: Server, open_redis: OpenRedis) -> None:
    engine = open_redis(redis_server.url)
    adapter: Any = engine._parts.backend
    for leave in (
        lambda: engine.set("s", "k", 1),
        lambda: engine.get("s", "k"),
        lambda: engine.update("s", "k", INCREMENT),
        lambda: engine.delete("s", "k"),
    ):
        leave()
        asked = int(redis_server.ask("INFO", "commandstats")["cmdstat_evalsha"]["calls"])
        engine.update("s", "k", INCREMENT)
        # One command: it did not have to look first.
        assert int(redis_server.ask("INFO", "commandstats")["cmdstat_evalsha"]["calls"]) == asked + 1
    assert adapter.counts()["update_conflicts"] == 0
