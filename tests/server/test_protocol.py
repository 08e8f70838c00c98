"""What a worker sees on the wire: docs/reference/protocol.md sections 1 to 9, message by message."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import urllib.error
import urllib.request
import uuid
from itertools import chain
from typing import Any

import pytest
from raw import PATIENCE_S, RawWorker
from serving import OpenRaw, server_config
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scopestate import Engine
from scopestate.errors import FunctionNotFound, InvalidRegistration, RemoteFailure
from scopestate.ops.functions import BUILT_IN, BUILT_IN_IDS, FLUSH
from scopestate.ops.polls import FUNCTION_ID
from scopestate.server.server import Server

PLACE = {"scope": "users", "key": "profile"}


# ---------------------------------------------------------------------------------------------------------- paths


def test_healthz_is_json(server: Server) -> None:
    with urllib.request.urlopen(server.url.replace("ws", "http") + "/healthz", timeout=PATIENCE_S) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert json.load(answer)["status"] == "ok"


@pytest.mark.parametrize("path", ["/nowhere", "/ws", "/ws/channels/x", "/otel/", "//"])
def test_other_paths_are_not_found(server: Server, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.url.replace("ws", "http") + path, timeout=PATIENCE_S)
    with pytest.raises(InvalidStatus, match="404"):
        RawWorker(server.url, path=path)


def test_telemetry_is_taken_and_never_answered(connect: OpenRaw) -> None:
    sink = connect(path="/otel", greeted=False)

    for start in (b"OTLP", b"MTRC", b"LOGS", b"else"):
        sink.send(start + b"{}" * 1_000)

    assert sink.socket.ping().wait(PATIENCE_S)


# ------------------------------------------------------------------------------------------------------- transport


def test_a_websocket_ping_is_answered(connect: OpenRaw) -> None:
    assert connect().socket.ping(b"are you there").wait(PATIENCE_S)


def test_binary_json_fragments_and_blank_messages(connect: OpenRaw) -> None:
    worker = connect()

    worker.send(b'{"type":"ping"}')
    assert worker.receive() == {"type": "pong"}
    worker.send(b"OTLP...")
    worker.send("")
    worker.socket.send(['{"ty', 'pe":', '"ping"}'])
    assert worker.receive() == {"type": "pong"}


def test_a_ping_between_fragments_is_answered(connect: OpenRaw) -> None:
    worker = connect()

    def pieces() -> Any:
        yield '{"type":'
        assert worker.socket.ping().wait(PATIENCE_S)
        yield '"ping"}'

    worker.socket.send(pieces())
    assert worker.receive() == {"type": "pong"}


def test_compression_is_declined(connect: OpenRaw) -> None:
    assert "Sec-WebSocket-Extensions" not in connect().socket.response.headers  # type: ignore[union-attr]


def test_a_message_of_64_mebibytes_and_not_a_byte_more(connect: OpenRaw) -> None:
    limit = 64 * 1024 * 1024
    worker = connect()
    head, tail = b'{"type":"ping","padding":"', b'"}'
    message = head + b"x" * (limit - len(head) - len(tail)) + tail
    assert len(message) == limit

    worker.socket.send(message.decode())
    assert worker.receive() == {"type": "pong"}

    # The head of a frame is enough; who closes while more comes in resets the connection, close frame and all.
    worker.socket.socket.sendall(b"\x81\xff" + (limit + 1).to_bytes(8, "big") + bytes(4))
    assert worker.closed_with()[0] == 1009


def test_fragments_of_more_than_the_limit_are_refused(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_message_bytes": 10_000})) as small:
        worker = connect(small)
        with contextlib.suppress(ConnectionClosed):  # it may be told while it is still sending
            worker.socket.send("x" * 5_000 for _ in range(3))
        assert worker.closed_with()[0] == 1009
        endless = connect(small)
        with contextlib.suppress(ConnectionClosed):
            endless.socket.send(chain(["x"], ("" for _ in range(200))))
        assert endless.closed_with()[0] == 1009


def test_a_value_of_one_megabyte_comes_back_as_it_went(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    big = {"text": "é" * 500_000}

    worker.call("state::set", {**PLACE, "value": big})

    assert worker.call("state::get", PLACE) == big
    assert engine.get("users", "profile") == big


# --------------------------------------------------------------------------------------------------- state functions


def test_the_state_functions_as_the_reference_has_them(connect: OpenRaw) -> None:
    worker = connect()

    assert worker.call("state::set", {**PLACE, "data": 1}) == {"old_value": None, "new_value": 1}
    assert worker.call("state::set", {**PLACE, "value": None}) == {"old_value": 1, "new_value": None}
    assert "result" in worker.ask("state::get", PLACE)
    worker.call("state::set", {**PLACE, "value": {}})
    assert worker.call("state::update", {**PLACE, "ops": [{"type": "set", "path": "a", "value": 1}]})["new_value"] == {
        "a": 1
    }
    assert worker.call("state::list", {"scope": "users"}) == [{"a": 1}]
    assert worker.call("state::list", {"scope": "nobody"}) == []
    assert worker.call("state::list_groups", {"extra": 1}) == {"groups": ["users"]}
    assert worker.call("state::delete", PLACE) == {"a": 1}
    assert "result" not in worker.ask("state::delete", PLACE)
    assert "result" not in worker.ask("state::get", PLACE)


@pytest.mark.parametrize(
    ("function_id", "data", "reason"),
    [
        ("state::get", {"scope": "s"}, "missing field `key`"),
        ("state::get", {"key": "k"}, "missing field `scope`"),
        ("state::get", {"scope": 1, "key": "k"}, "invalid type"),
        ("state::get", None, "expected an object"),
        ("state::get", [], "expected an object"),
        ("state::set", {"scope": "s", "key": "k"}, "missing field `value`"),
        ("state::set", {"scope": "s", "key": "k", "value": 1, "data": 1}, "duplicate field `value`"),
        ("state::update", {"scope": "s", "key": "k"}, "missing field `ops`"),
        ("state::update", {"scope": "s", "key": "k", "ops": [{"type": "explode"}]}, "explode"),
        ("state::list", {}, "missing field `scope`"),
        ("state::list_groups", 3, "expected an object"),
    ],
)
def test_input_that_does_not_fit(connect: OpenRaw, function_id: str, data: Any, reason: str) -> None:
    error = connect().ask(function_id, data)["error"]

    assert error["code"] == "deserialization_error"
    assert error["message"].startswith(f"Failed to deserialize input for {function_id}: ")
    assert reason in error["message"]


def test_integers_and_minus_zero_survive_as_semantics_says(connect: OpenRaw) -> None:
    worker = connect()
    text = '{"scope":"s","key":"k","value":[9007199254740993,-0,18446744073709551615,1e2,1.0]}'
    invocation_id = str(uuid.uuid4())
    worker.send(
        f'{{"type":"invokefunction","invocation_id":"{invocation_id}","function_id":"state::set","data":{text}}}'
    )
    worker.receive()

    worker.invoke("state::get", {"scope": "s", "key": "k"})

    assert '"result":[9007199254740993,-0.0,18446744073709551615,100.0,1.0]' in worker.socket.recv(timeout=PATIENCE_S)


def test_an_unknown_function(connect: OpenRaw) -> None:
    assert connect().ask("nobody::home", {})["error"] == {
        "code": "function_not_found",
        "message": "Function nobody::home not found",
    }


def test_a_value_over_the_limit_of_the_engine(connect: OpenRaw) -> None:
    with Engine.from_config({"limits": {"max_value_bytes": 10}}) as engine, Server(engine, port=0) as server:
        worker = connect(server)
        for number in range(2):
            exact = f"{number}1234567"  # ten bytes with its quotes
            for function_id, inputs in (
                ("state::set", lambda text: {"value": text}),
                ("state::update", lambda text: {"ops": [{"type": "set", "path": "", "value": text}]}),
            ):
                assert "error" not in worker.ask(function_id, {**PLACE, **inputs(exact)})
                refused = worker.ask(function_id, {**PLACE, **inputs(f"{exact}8")})
                assert refused["error"]["code"] == "VALUE_TOO_LARGE"
                assert worker.call("state::get", PLACE) == exact


# -------------------------------------------------------------------------------------------------- worker functions


def test_a_call_between_workers_names_the_caller_and_passes_the_trace(connect: OpenRaw) -> None:
    caller, executor = connect(), connect()
    executor.register("math.add")
    invocation_id = caller.invoke("math.add", {"a": 1}, traceparent="tp", baggage="b=1", metadata={"side": 1})

    call = executor.take("math.add")
    assert call == {
        "type": "invokefunction",
        "invocation_id": invocation_id,
        "function_id": "math.add",
        "data": {"a": 1, "_caller_worker_id": caller.worker_id},
        "traceparent": "tp",
        "baggage": "b=1",
        "metadata": {"side": 1},
    }
    executor.answer(call, result=3)
    assert caller.receive() == {
        "type": "invocationresult",
        "invocation_id": invocation_id,
        "function_id": "math.add",
        "result": 3,
        "traceparent": "tp",
        "baggage": "b=1",
    }


def test_a_void_call_is_executed_with_an_id_and_its_answer_goes_nowhere(connect: OpenRaw) -> None:
    caller, executor = connect(), connect()
    executor.register("audit.log")

    caller.invoke("audit.log", [1], action={"type": "void"})

    call = executor.take("audit.log")
    uuid.UUID(call["invocation_id"])
    assert call["data"] == [1]
    executor.answer(call, result=1)
    executor.settle()
    caller.settle()  # would have failed on an answer


def test_two_callers_with_the_same_id_get_their_own_answers(connect: OpenRaw) -> None:
    first, second, executor = connect(), connect(), connect()
    executor.register("echo")
    same = str(uuid.uuid4())
    for caller, data in ((first, 1), (second, 2)):
        message = {"type": "invokefunction", "invocation_id": same, "function_id": "echo", "data": data}
        caller.send(message)
        caller.settle()

    for _ in range(2):
        call = executor.take("echo")
        executor.answer(call, result=call["data"])

    assert (first.receive()["result"], second.receive()["result"]) == (1, 2)


def test_the_program_calls_a_workers_function(connect: OpenRaw, engine: Engine) -> None:
    executor = connect()
    executor.register("math.add", description="adds")
    answers: queue.Queue[Any] = queue.Queue()
    with Beside(lambda: answers.put(engine.call("math.add", {"a": 1}))):
        call = executor.take("math.add")
        assert call["data"] == {"a": 1}
        executor.answer(call, result={"sum": 3})
    assert answers.get(timeout=PATIENCE_S) == {"sum": 3}
    assert {"math.add"} <= {entry["name"] for entry in engine.functions()}


def test_a_workers_error_reaches_the_program_unchanged(connect: OpenRaw, engine: Engine) -> None:
    executor = connect()
    executor.register("math.fail")
    errors: queue.Queue[BaseException] = queue.Queue()

    def call() -> None:
        try:
            engine.call("math.fail", {})
        except RemoteFailure as error:
            errors.put(error)

    with Beside(call):
        executor.answer(
            executor.take("math.fail"), error={"code": "MY_CODE", "message": "no such number", "stacktrace": "line 1"}
        )
    error = errors.get(timeout=PATIENCE_S)
    assert isinstance(error, RemoteFailure)
    assert (error.code, str(error), error.stacktrace) == ("MY_CODE", "no such number", "line 1")


def test_a_worker_calls_the_program(connect: OpenRaw, engine: Engine) -> None:
    seen: list[Any] = []
    engine.register_function("app.plain", lambda data: seen.append(data) or {"got": data["n"]})

    @engine.register_function("app.async")
    async def double(data: Any) -> int:
        return int(data["n"]) * 2

    engine.register_function("app.nothing", lambda data: None)
    engine.register_function("app.fails", lambda data: data["missing"])
    worker = connect()

    assert worker.call("app.plain", {"n": 1}) == {"got": 1}
    assert seen == [{"n": 1, "_caller_worker_id": worker.worker_id}]
    assert worker.call("app.async", {"n": 2}) == 4
    assert "result" not in worker.ask("app.nothing", {})
    assert worker.ask("app.fails", {})["error"]["code"] == "invocation_failed"


def test_builtins_cannot_be_shadowed(connect: OpenRaw, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.register_function("app.own", lambda data: "mine")
    worker = connect()

    for name in ("state::get", "engine::functions::list", "app.own"):
        worker.register(name)

    engine.set("users", "profile", 1)
    assert worker.call("state::get", PLACE) == 1
    assert worker.call("app.own", {}) == "mine"
    assert "'state::get' is built in" in caplog.text
    assert "'app.own' is a function of the program itself" in caplog.text


def test_the_last_registration_wins_and_leaves_nothing_behind(connect: OpenRaw) -> None:
    caller, first, second = connect(), connect(), connect()
    first.register("f")
    second.register("f")

    caller.invoke("f", 1)
    second.answer(second.take("f"), result="second")
    assert caller.receive()["result"] == "second"

    first.send({"type": "unregisterfunction", "id": "f"})
    first.settle()
    caller.invoke("f", 2)
    second.answer(second.take("f"), result="still second")
    assert caller.receive()["result"] == "still second"

    second.send({"type": "unregisterfunction", "id": "f"})
    second.settle()
    assert caller.ask("f", 3)["error"]["code"] == "function_not_found"


# --------------------------------------------------------------------------------------------------------- disconnect


@pytest.mark.parametrize("how", ["close", "cut"])
def test_a_lost_executor_stops_its_calls_and_takes_its_functions(connect: OpenRaw, how: str, engine: Engine) -> None:
    caller, executor = connect(), connect()
    executor.register("slow")
    invocation_id = caller.invoke("slow", {})
    executor.take("slow")

    getattr(executor, how)()

    assert caller.receive() == {
        "type": "invocationresult",
        "invocation_id": invocation_id,
        "function_id": "slow",
        "error": {"code": "invocation_stopped", "message": "Invocation stopped"},
    }
    assert caller.ask("slow", {})["error"]["code"] == "function_not_found"
    with pytest.raises(FunctionNotFound):
        engine.call("slow", {})


def test_a_lost_caller_is_forgotten_by_the_executor(connect: OpenRaw, server: Server) -> None:
    caller, executor, other = connect(), connect(), connect()
    executor.register("slow")
    caller.invoke("slow", {})
    call = executor.take("slow")

    caller.close()
    other.register("barrier")

    executor.answer(call, result="too late")
    executor.settle()
    assert server.status().workers == 2


def test_triggers_leave_with_their_worker_and_not_with_their_function(connect: OpenRaw, engine: Engine) -> None:
    owner, executor, other = connect(), connect(), connect()
    executor.register("on")
    owner.trigger("on", {"scope": "users"})
    assert len(engine.triggers()) == 1

    executor.close()
    assert other.ask("on", {})["error"]["code"] == "function_not_found"
    assert len(engine.triggers()) == 1

    other.register("on")
    engine.set("users", "k", 1)
    other.answer(other.take("on"))
    owner.close()
    other.register("barrier")
    wait_until_gone(other, engine)
    assert engine.triggers() == []


def wait_until_gone(worker: RawWorker, engine: Engine) -> None:
    """Ask until the server has noticed the loss: a question takes a moment, and the loss is under way."""
    for _ in range(1_000):
        if not engine.triggers():
            return
        worker.settle()


@pytest.mark.parametrize("how", ["close", "cut"])
def test_what_a_worker_said_before_it_left_is_done(connect: OpenRaw, server: Server, engine: Engine, how: str) -> None:
    leaving, other = connect(), connect()
    for number in range(2_000):
        leaving.invoke("state::set", {"scope": "s", "key": "k", "value": number}, action={"type": "void"})

    if how == "close":
        leaving.close()
    else:
        leaving.socket.socket.shutdown(socket.SHUT_WR)  # everything sent arrives, and then nothing more
    while server.status().workers > 1:
        other.settle()

    assert engine.get("s", "k") == 1_999


# ----------------------------------------------------------------------------------------------------------- triggers


def test_a_handler_gets_the_six_fields_and_no_caller(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("on")
    worker.trigger("on", {"scope": "users", "unknown": 1})

    engine.set("users", "profile", {"n": 1})
    call = worker.take("on")

    assert call["data"] == {
        "type": "state",
        "event_type": "state:created",
        "scope": "users",
        "key": "profile",
        "old_value": None,
        "new_value": {"n": 1},
    }
    worker.answer(call)
    engine.delete("users", "profile")
    call = worker.take("on")
    assert (call["data"]["event_type"], call["data"]["old_value"], call["data"]["new_value"]) == (
        "state:deleted",
        {"n": 1},
        None,
    )


def fire_expired(engine: Engine, scope: str, key: str) -> None:
    """Publish the event of a key that has expired."""
    router = engine._router
    watch = router.triggers.watchers(scope)
    router.publish(router.prepare_late(scope, watch, key, b"1", None, 7, 0, (1000, 5)))


@pytest.mark.parametrize("condition", [None, "if"])
def test_a_worker_that_names_no_events_is_told_of_expired_keys_as_the_reference_would(
    connect: OpenRaw, engine: Engine, condition: str | None
) -> None:
    worker = connect()
    worker.register("on")
    worker.register("if")
    worker.trigger("on", {"scope": "s", "condition_function_id": condition})

    fire_expired(engine, "s", "k")

    plain = {
        "type": "state",
        "event_type": "state:deleted",
        "scope": "s",
        "key": "k",
        "old_value": 1,
        "new_value": None,
    }
    if condition is not None:
        asked = worker.take("if")
        assert asked["data"] == plain
        worker.answer(asked)
    call = worker.take("on")
    assert call["data"] == plain
    worker.answer(call)


@pytest.mark.parametrize("condition", [None, "if"])
def test_a_worker_that_names_events_gets_those(connect: OpenRaw, engine: Engine, condition: str | None) -> None:
    worker = connect()
    worker.register("on")
    worker.register("if")
    worker.trigger("on", {"scope": "s", "condition_function_id": condition, "events": ["expired"]})

    engine.set("s", "k", 1)
    engine.delete("s", "k")
    fire_expired(engine, "s", "k")

    if condition is not None:
        worker.answer(worker.take("if"))
    call = worker.take("on")
    assert call["data"] == {
        "type": "state",
        "event_type": "state:expired",
        "scope": "s",
        "key": "k",
        "old_value": 1,
        "new_value": None,
        "expired_at": 1000,
        "late_ms": 5,
    }
    worker.answer(call)
    assert worker.call("engine::triggers::list", {})["triggers"][0]["config"]["events"] == ["expired"]


def test_events_of_one_trigger_come_one_after_another(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("on")
    worker.trigger("on", {})
    for number in range(5):
        engine.set("s", "k", number)

    for number in range(5):
        call = worker.take("on")
        assert call["data"]["new_value"] == number
        worker.settle()  # the next one has not come
        worker.answer(call)


@pytest.mark.parametrize(
    ("verdict", "proceeds"),
    [
        ({"result": False}, False),
        ({"result": True}, True),
        ({"result": 0}, True),
        ({"result": None}, True),
        ({}, True),
        ({"error": {"code": "c", "message": "m"}}, False),
    ],
)
def test_only_a_literal_false_or_an_error_blocks(
    connect: OpenRaw, engine: Engine, verdict: dict[str, Any], *, proceeds: bool
) -> None:
    worker = connect()
    worker.register("on")
    worker.register("if")
    worker.trigger("on", {"condition_function_id": "if"})

    engine.set("s", "k", 1)
    worker.answer(worker.take("if"), **verdict)

    if proceeds:
        worker.answer(worker.take("on"))
    else:
        worker.settle()
    engine.drain(timeout=PATIENCE_S)


def test_conditions_and_handlers_of_program_and_workers_mix(connect: OpenRaw, engine: Engine) -> None:
    handled: queue.Queue[Any] = queue.Queue()
    engine.register_function("app.if", lambda event: event["key"] != "skip")
    engine.register_function("app.on", lambda event: handled.put(event["new_value"]))
    worker = connect()
    worker.register("on")
    worker.register("if")
    worker.trigger("on", {"scope": "a", "condition_function_id": "app.if"})
    worker.trigger("app.on", {"scope": "b", "condition_function_id": "if"})
    engine.register_trigger(function_id="on", scope="c")

    engine.set("a", "skip", 1)
    engine.set("a", "k", 2)
    call = worker.take("on")
    assert call["data"]["new_value"] == 2
    worker.answer(call)
    engine.set("b", "k", 3)
    worker.answer(worker.take("if"), result=True)
    assert handled.get(timeout=PATIENCE_S) == 3
    engine.set("c", "k", 4)
    call = worker.take("on")
    assert call["data"]["new_value"] == 4
    worker.answer(call)
    engine.drain(timeout=PATIENCE_S)


def test_the_same_trigger_id_again_replaces_and_an_unknown_one_is_ignored(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("on")
    trigger_id = worker.trigger("on", {"scope": "a"})
    worker.trigger("on", {"scope": "b"}, id=trigger_id)

    engine.set("a", "k", 1)
    engine.set("b", "k", 2)
    call = worker.take("on")
    assert call["data"]["scope"] == "b"
    worker.answer(call)

    worker.send({"type": "unregistertrigger", "id": "unknown"})
    worker.send({"type": "unregistertrigger", "id": trigger_id, "trigger_type": "whatever"})
    worker.settle()
    assert engine.triggers() == []


@pytest.mark.parametrize(
    "config", [None, 1, [], {"scope": 1}, {"key": []}, {"condition_function_id": {}}, {"events": "expired"}]
)
def test_a_bad_trigger_is_refused_and_says_so(connect: OpenRaw, engine: Engine, config: Any) -> None:
    worker = connect()

    worker.send({"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f", "config": config})

    refusal = worker.receive()
    assert (refusal["type"], refusal["id"], refusal["error"]["code"]) == (
        "triggerregistrationresult",
        "t",
        "trigger_registration_failed",
    )
    assert engine.triggers() == []


def test_triggers_of_the_program_are_out_of_reach(connect: OpenRaw, engine: Engine) -> None:
    engine.register_trigger(function_id="app.on", trigger_id="own", scope="s")
    worker = connect()

    worker.send({"type": "unregistertrigger", "id": "own"})
    worker.send({"type": "registertrigger", "id": "own", "trigger_type": "state", "function_id": "f", "config": {}})

    assert worker.receive()["error"]["code"] == "trigger_registration_failed"
    assert [(handle.trigger_id, handle.trigger.function_id) for handle in engine.triggers()] == [("own", "app.on")]


def test_the_replay_of_a_reconnected_worker_takes_its_triggers_over(connect: OpenRaw, engine: Engine) -> None:
    old, new, other = connect(), connect(), connect()
    trigger_id = old.trigger("on", {"scope": "s"})
    new.register("on")
    new.trigger("on", {"scope": "s"}, id=trigger_id)

    old.close()
    for _ in range(10):
        other.settle()

    engine.set("s", "k", 1)
    new.answer(new.take("on"))


# ------------------------------------------------------------------------------------------------ custom trigger types


def test_a_worker_provides_a_trigger_type(connect: OpenRaw) -> None:
    provider, user = connect(), connect()
    provider.send({"type": "registertriggertype", "id": "cron", "description": "at times"})
    provider.settle()

    trigger = {
        "type": "registertrigger",
        "id": "t1",
        "trigger_type": "cron",
        "function_id": "on",
        "config": {"at": "noon"},
    }
    user.send(trigger)
    assert provider.receive() == trigger

    provider.send({"type": "triggerregistrationresult", "id": "t1", "trigger_type": "cron", "function_id": "on"})
    types = user.call("engine::trigger-types::list", {})["trigger_types"]
    assert [entry["id"] for entry in types] == ["state", "cron"]

    user.send({"type": "unregistertrigger", "id": "t1"})
    assert provider.receive() == {"type": "unregistertrigger", "id": "t1", "trigger_type": "cron"}

    user.send(trigger)
    assert provider.receive() == trigger
    user.close()
    assert provider.receive()["type"] == "unregistertrigger"


def test_a_new_provider_is_told_of_the_triggers_that_wait(connect: OpenRaw) -> None:
    first, user, second = connect(), connect(), connect()
    first.send({"type": "registertriggertype", "id": "cron", "description": "at times"})
    first.settle()
    user.send({"type": "registertrigger", "id": "t1", "trigger_type": "cron", "function_id": "on", "config": 1})
    first.receive()

    first.close()
    while "cron" in {entry["id"] for entry in user.call("engine::trigger-types::list", {})["trigger_types"]}:
        continue
    second.send({"type": "registertriggertype", "id": "cron", "description": "again"})

    assert second.receive()["id"] == "t1"


def test_a_trigger_type_is_listed_with_the_formats_that_it_was_registered_with(connect: OpenRaw) -> None:
    provider = connect()
    formats = {"trigger_request_format": {"type": "object"}, "call_request_format": {"type": "string"}}
    for name, given in (("neither", []), ("one", ["call_request_format"]), ("other", ["trigger_request_format"])):
        kept = {field: formats[field] for field in given}
        provider.send({"type": "registertriggertype", "id": name, "description": "d", **kept})
        provider.settle()
        listed = {entry["id"]: entry for entry in provider.call("engine::trigger-types::list", {})["trigger_types"]}
        assert listed[name] == {"id": name, "description": "d", **kept}


def test_an_unknown_trigger_type_is_refused(connect: OpenRaw) -> None:
    worker = connect()

    worker.send({"type": "registertrigger", "id": "t", "trigger_type": "moon", "function_id": "f", "config": {}})

    assert "'moon'" in worker.receive()["error"]["message"]


# ----------------------------------------------------------------------------------------------------------- engine::*


def test_workers_describe_themselves(connect: OpenRaw) -> None:
    worker, other = connect(), connect()
    worker.register("f")
    metadata = {"name": "box:1", "runtime": "python", "version": "1", "os": "Linux", "pid": 7, "telemetry": {"x": 1}}
    worker.invoke("engine::workers::register", metadata, action={"type": "void"})
    worker.settle()

    listed = other.call("engine::workers::list", {})["workers"]
    assert [(entry["id"], entry["name"], entry["pid"]) for entry in listed] == [(worker.worker_id, "box:1", 7)]
    assert listed[0]["functions"] == ["f"]
    assert listed[0]["status"] == "connected"
    assert listed[0]["ip_address"] == "127.0.0.1"
    hidden = other.call("engine::workers::list", {"worker_id": other.worker_id})["workers"]
    assert [entry["id"] for entry in hidden] == [other.worker_id]


def test_functions_and_triggers_are_listed(connect: OpenRaw, engine: Engine) -> None:
    engine.register_function("app.f", print, description="prints")
    engine.register_trigger(function_id="app.f", trigger_id="own", key="k")
    worker = connect()
    worker.register("w.f", description="does", request_format={"type": "object"}, metadata={"team": "x"})
    trigger_id = worker.trigger("w.f", {"scope": "s"}, metadata={"m": 1})

    functions = {entry["function_id"]: entry for entry in worker.call("engine::functions::list", {})["functions"]}
    assert set(functions) == {*BUILT_IN, FUNCTION_ID, FLUSH, "app.f", "w.f"}
    assert functions["w.f"] == {
        "function_id": "w.f",
        "description": "does",
        "request_format": {"type": "object"},
        "response_format": None,
        "metadata": {"team": "x"},
    }
    internal = worker.call("engine::functions::list", {"include_internal": True})["functions"]
    assert "engine::functions::list" in {entry["function_id"] for entry in internal}
    assert worker.call("engine::triggers::list", {})["triggers"] == [
        {
            "id": trigger_id,
            "trigger_type": "state",
            "function_id": "w.f",
            "config": {"scope": "s"},
            "metadata": {"m": 1},
        },
        {"id": "own", "trigger_type": "state", "function_id": "app.f", "config": {"key": "k"}},
    ]


def test_the_program_asks_too(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("w.f")

    listed = engine.call("engine::functions::list", {})["functions"]

    assert "w.f" in {entry["function_id"] for entry in listed}
    assert engine.call("engine::workers::list", {"worker_id": worker.worker_id})["workers"][0]["functions"] == ["w.f"]


def test_connections_and_losses_are_events(connect: OpenRaw) -> None:
    watcher = connect()
    watcher.register("on")
    watcher.trigger("on", {}, "engine::workers-available")

    worker = connect()
    worker.close()

    assert watcher.take("on")["data"] == {"event": "worker_connected", "worker_id": worker.worker_id}
    assert watcher.take("on")["data"] == {"event": "worker_disconnected", "worker_id": worker.worker_id}


def test_changed_functions_are_an_event(connect: OpenRaw, server: Server) -> None:
    watcher = connect()
    watcher.register("on")
    watcher.trigger("on", {}, "engine::functions-available")
    assert server._loop is not None
    assert server._hub is not None

    server._loop.call_soon_threadsafe(server._hub.tell_changed_functions)  # what a timer does every five seconds

    call = watcher.take("on")
    assert call["data"]["event"] == "functions_changed"
    assert {"on", "engine::functions::list"} <= {entry["function_id"] for entry in call["data"]["functions"]}
    watcher.answer(call)
    server._loop.call_soon_threadsafe(server._hub.tell_changed_functions)
    watcher.settle()  # nothing has changed since


# ------------------------------------------------------------------------------------------------------------- channels


def end(connect: OpenRaw, ref: dict[str, str], **options: Any) -> RawWorker:
    path = f"/ws/channels/{ref['channel_id']}?key={ref['access_key']}&dir={ref['direction']}"
    return connect(path=path, greeted=False, **options)


def test_a_channel_relays_text_and_bytes_and_ends_with_its_writer(connect: OpenRaw) -> None:
    refs = connect().call("engine::channels::create", {})
    writer = end(connect, refs["writer"])
    writer.socket.send("early")
    reader = end(connect, refs["reader"])

    writer.socket.send(b"\x00\xff")
    writer.socket.send(["in ", "pieces"])

    assert [reader.socket.recv(timeout=PATIENCE_S) for _ in range(3)] == ["early", b"\x00\xff", "in pieces"]
    writer.close()
    assert reader.closed_with()[0] == 1000


def test_the_ends_of_a_channel_are_taken_once_and_with_the_right_key(connect: OpenRaw) -> None:
    refs = connect().call("engine::channels::create", {"buffer_size": None})
    end(connect, refs["writer"])

    for wrong in (
        refs["writer"],
        {**refs["reader"], "access_key": "wrong"},
        {**refs["reader"], "direction": "both"},
        {**refs["reader"], "channel_id": str(uuid.uuid4())},
    ):
        with pytest.raises(InvalidStatus, match="404"):
            end(connect, wrong)


def test_a_writer_is_held_back_while_nobody_reads(connect: OpenRaw) -> None:
    refs = connect().call("engine::channels::create", {"buffer_size": 4})
    writer = end(connect, refs["writer"])
    with Beside(lambda: [writer.socket.send(b"x" * 100_000) for _ in range(200)]):
        reader = end(connect, refs["reader"])
        received = [len(reader.socket.recv(timeout=PATIENCE_S)) for _ in range(200)]
    assert received == [100_000] * 200


# --------------------------------------------------------------------------------------------------------- the end


def test_a_server_that_stops_closes_with_1012_and_frees_the_engine(
    connect: OpenRaw, server: Server, engine: Engine
) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {})

    server.stop()

    assert worker.closed_with() == (1012, "the server stops")
    assert engine.triggers() == []
    assert {entry["name"] for entry in engine.functions()} == BUILT_IN_IDS
    with Server(engine, port=0):
        assert engine.call("engine::workers::list", {})["workers"] == []


STATE = ("get", "set", "delete", "update", "list", "list_groups")


def test_one_server_per_engine(server: Server, engine: Engine) -> None:
    with pytest.raises(InvalidRegistration, match="has a server already"):
        Server(engine, port=0).start()


def test_a_port_in_use_is_said(server: Server) -> None:
    with Engine() as other, pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        Server(other, port=server.port).start()


def test_a_server_of_its_own_engine_closes_it() -> None:
    server = Server.from_config([{"name": "iii-worker-manager", "config": {"port": 0}}])
    with server:
        worker = RawWorker(server.url)
        worker.close()
    assert server.engine.closed


async def _serve(server: Server) -> None:
    import asyncio

    serving = asyncio.create_task(server.serve())
    await asyncio.to_thread(server._listening.wait, PATIENCE_S)
    worker = await asyncio.to_thread(RawWorker, server.url)
    assert await asyncio.to_thread(worker.call, "state::list_groups", {}) == {"groups": []}
    server.stop()
    await serving
    assert worker.closed_with()[0] == 1012


def test_a_server_on_the_programs_own_event_loop(engine: Engine) -> None:
    import asyncio

    asyncio.run(_serve(Server(engine, port=0)))


class Beside:
    """Run something beside the block, and wait for its end."""

    def __init__(self, work: Any) -> None:
        import threading

        self._thread = threading.Thread(target=work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
