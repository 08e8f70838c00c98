"""Values that JSON cannot hold are refused at once wherever they stand; of duplicate fields the last counts."""

from __future__ import annotations

import json
import threading
import uuid
from typing import Any

import pytest
from raw import RawWorker
from serving import OpenRaw

from scopestate import Engine
from scopestate.errors import DeserializationError, FunctionFailed
from scopestate.ops.values import check, parse

BAD = {
    "beyond binary64": "1e999",
    "many digits": "1" * 400,
    "half a character": '"\\ud800"',
    "129 levels": "[" * 129 + "]" * 129,
    "100,000 levels": "[" * 100_000 + "]" * 100_000,
}
bad_values = pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())


def ask(worker: RawWorker, function_id: str, data: str, more: str = "") -> dict[str, Any]:
    """Call with JSON text as it is; return the answer, which must be the next message."""
    invocation_id = str(uuid.uuid4())
    worker.send(
        f'{{"type":"invokefunction","invocation_id":"{invocation_id}","function_id":"{function_id}","data":{data}{more}}}'
    )
    answer = worker.receive()
    assert (answer["type"], answer["invocation_id"]) == ("invocationresult", invocation_id), answer
    return answer


@bad_values
@pytest.mark.parametrize(
    ("function_id", "data"),
    [
        ("state::set", '{"scope":"s","key":"k","value":BAD}'),
        ("state::set", '{"scope":"s","key":"k","data":[{"x":BAD}]}'),
        ("state::set", '{"scope":"s","key":"k","value":1,"more":BAD}'),
        ("state::get", '{"scope":"s","key":"k","more":{"x":BAD}}'),
        ("state::delete", '{"scope":"s","key":"k","more":BAD}'),
        ("state::list", '{"scope":"s","more":[BAD]}'),
        ("state::list_groups", '{"more":BAD}'),
        ("state::update", '{"scope":"s","key":"k","ops":[{"type":"set","path":"","value":BAD}]}'),
        ("state::update", '{"scope":"s","key":"k","ops":[],"more":BAD}'),
        ("engine::workers::list", '{"more":BAD}'),
        ("engine::workers::register", '{"name":"x","more":BAD}'),
        ("engine::channels::create", '{"buffer_size":BAD}'),
        ("engine::channels::create", '{"more":BAD}'),
        ("mine", "BAD"),
        ("mine", '{"x":BAD}'),
    ],
)
def test_an_input_that_json_cannot_hold_is_answered_at_once(
    connect: OpenRaw, engine: Engine, function_id: str, data: str, bad: str
) -> None:
    worker = connect()
    worker.register("mine")

    answer = ask(worker, function_id, data.replace("BAD", bad))

    assert answer["error"]["code"] == "deserialization_error"
    assert engine.list_groups() == []
    worker.settle()  # nothing was sent to the function


@bad_values
@pytest.mark.parametrize("function_id", ["state::list_groups", "mine"])
def test_metadata_of_a_call_that_json_cannot_hold_is_answered_at_once(
    connect: OpenRaw, function_id: str, bad: str
) -> None:
    worker = connect()
    worker.register("mine")
    answer = ask(worker, function_id, "{}", f',"metadata":{{"x":{bad}}}')
    assert answer["error"]["code"] == "deserialization_error"
    worker.settle()


def test_good_metadata_is_passed_on_and_counts(connect: OpenRaw) -> None:
    worker = connect()
    worker.register("mine")
    worker.invoke("mine", {}, metadata={"x": 1})
    call = worker.take("mine")
    assert call["metadata"] == {"x": 1}
    worker.answer(call, result=1)
    assert worker.receive()["result"] == 1
    assert worker.ask("state::list_groups", {}, metadata={"x": 1})["result"] == {"groups": []}


@bad_values
def test_a_result_that_json_cannot_hold_fails_its_call_at_once(connect: OpenRaw, engine: Engine, bad: str) -> None:
    worker, caller = connect(), connect()
    worker.register("mine")

    caller.invoke("mine", {})
    call = worker.take("mine")
    worker.send(
        f'{{"type":"invocationresult","invocation_id":"{call["invocation_id"]}","function_id":"mine","result":{bad}}}'
    )

    assert caller.receive()["error"]["code"] in {"serialization_error", "deserialization_error"}
    worker.settle()


@bad_values
@pytest.mark.parametrize(
    "message",
    [
        '{"type":"registerfunction","id":"f","metadata":BAD}',
        '{"type":"registerfunction","id":"f","request_format":{"x":BAD}}',
        '{"type":"registerfunction","id":"f","response_format":[BAD]}',
        '{"type":"registertriggertype","id":"t","description":"d","trigger_request_format":BAD}',
        '{"type":"registertriggertype","id":"t","description":"d","call_request_format":BAD}',
    ],
)
def test_a_registration_that_json_cannot_hold_is_not_made(connect: OpenRaw, message: str, bad: str) -> None:
    worker = connect()
    worker.send(message.replace("BAD", bad))
    worker.settle()
    functions = worker.call("engine::functions::list", {})["functions"]
    assert "f" not in {function["function_id"] for function in functions}
    assert "t" not in {kind["id"] for kind in worker.call("engine::trigger-types::list", {})["trigger_types"]}


@pytest.mark.parametrize(
    "bad", [bad for name, bad in BAD.items() if name in {"beyond binary64", "many digits", "129 levels"}]
)
@pytest.mark.parametrize("field", ["config", "metadata"])
@pytest.mark.parametrize("kind", ["state", "custom"])
def test_a_trigger_that_json_cannot_hold_is_refused_with_an_answer(
    connect: OpenRaw, kind: str, field: str, bad: str
) -> None:
    worker = connect()
    worker.send({"type": "registertriggertype", "id": "custom", "description": "d"})
    config = '{"x":BAD}' if field == "config" else '{},"metadata":BAD'
    worker.send(
        f'{{"type":"registertrigger","id":"t","trigger_type":"{kind}","function_id":"f","config":{config}}}'.replace(
            "BAD", bad
        )
    )

    refused = worker.receive()

    assert refused["type"] == "triggerregistrationresult"
    assert refused["error"]["code"] == "trigger_registration_failed"
    assert worker.call("engine::triggers::list", {}) == {"triggers": []}


@pytest.mark.parametrize(
    ("function_id", "data"),
    [
        ("state::get", '{"scope":1,"scope":"s","key":null,"key":"k"}'),
        ("state::set", '{"scope":[],"key":"x","scope":"s","key":"k","value":1,"value":5}'),
        ("state::update", '{"scope":"s","key":3,"key":"k","ops":1,"ops":[]}'),
        ("state::list", '{"scope":{},"scope":"s"}'),
        ("state::delete", '{"scope":"x","key":1,"scope":"s","key":"k"}'),
        ("engine::workers::list", '{"worker_id":1,"worker_id":null}'),
        ("engine::channels::create", '{"buffer_size":"x","buffer_size":4}'),
    ],
)
def test_of_a_field_that_stands_twice_the_last_counts(
    connect: OpenRaw, engine: Engine, function_id: str, data: str
) -> None:
    engine.set("s", "k", 5)
    answer = ask(connect(), function_id, data)
    assert "error" not in answer
    if function_id in ("state::get", "state::delete"):
        assert answer["result"] == 5
    if function_id.startswith("state::"):
        for wrong in ('"key":"k","key":1', '"scope":"s","scope":null'):
            text = f'{{"scope":"s","key":"k","value":1,"ops":[],{wrong}}}'
            if function_id != "state::list" or "scope" in wrong[:7]:
                assert ask(connect(), function_id, text)["error"]["code"] == "deserialization_error"


def test_of_a_field_of_a_message_that_stands_twice_the_last_counts(connect: OpenRaw) -> None:
    worker = connect()
    worker.send('{"type":"registerfunction","id":1,"id":"f","description":[],"description":"d"}')
    worker.send('{"type":7,"type":"ping"}')
    assert worker.receive() == {"type": "pong"}
    (function,) = [one for one in worker.call("engine::functions::list", {})["functions"] if one["function_id"] == "f"]
    assert function["description"] == "d"
    answer = ask(worker, 'x","function_id":"state::list_groups', '1,"data":{}')
    assert answer["result"] == {"groups": []}


def test_a_result_for_the_program_that_json_cannot_hold_is_an_error(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("mine")

    def answer() -> None:
        call = worker.take("mine")
        worker.send(
            f'{{"type":"invocationresult","invocation_id":"{call["invocation_id"]}","function_id":"mine","result":1e999}}'
        )

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(FunctionFailed):
        engine.call("mine", {})
    thread.join(30)


@pytest.mark.parametrize("text", [bad.encode() for bad in BAD.values()] + [b"{", b"nan", b'"\\udc00"', b"01"])
def test_check_refuses_what_parse_refuses(text: bytes) -> None:
    for wrapped in (text, b'{"x":[' + text + b"]}"):
        for read in (parse, check):
            with pytest.raises(DeserializationError):
                read(wrapped)


@pytest.mark.parametrize(
    "value", [None, 1, 2**64 - 1, 2**70, -0.0, 1e308, "x" * 500, "9" * 400, [0] * 300, [[]] * 300, {"a": "[" * 300}]
)
def test_check_takes_what_parse_takes(value: Any) -> None:
    text = json.dumps(value).encode()
    parse(text)
    check(text)
    deep = b"[" * 127 + text + b"]" * 127
    if not isinstance(value, list | dict):
        check(deep)
