"""One worker's conversation without a socket: docs/reference/protocol.md sections 1 to 4, and the limits."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from msgspec import Raw

from scopestate.errors import MessageTooLarge
from scopestate.wire.frames import (
    LONGEST_NAME,
    InvocationResult,
    InvokeFunction,
    RegisterFunction,
    RegisterTrigger,
    _answer_heads,
    _call_heads,
    fresh_id,
    with_caller,
)
from scopestate.wire.session import Answered, Close, Send, SessionLimits, WorkerSession, stopped

ID = "0b0a1111-2222-4333-8444-555566667777"
OTHER_ID = "1c1b1111-2222-4333-8444-555566667777"


def session(**limits: int) -> WorkerSession:
    return WorkerSession("worker-1", SessionLimits(**limits))


def say(to: WorkerSession, message: dict[str, Any] | str | bytes, *, text: bool = True) -> Any:
    if isinstance(message, dict):
        message = json.dumps(message)
    return to.receive(message.encode() if isinstance(message, str) else message, text)


def invoke(function_id: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "invokefunction", "function_id": function_id, "invocation_id": ID, "data": {}, **fields}


def sent(message: bytes | None) -> Any:
    assert message is not None
    return json.loads(message)


def test_the_greeting_names_the_worker() -> None:
    assert sent(session().greeting()) == {"type": "workerregistered", "worker_id": "worker-1"}


def test_a_json_ping_is_answered() -> None:
    action = say(session(), {"type": "ping"})

    assert isinstance(action, Send)
    assert sent(action.message) == {"type": "pong"}


# ------------------------------------------------------------------------------------------------- what is dropped


@pytest.mark.parametrize(
    "message",
    [
        "",
        "   \n",
        "nonsense",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"type": null}',
        '{"type": "InvokeFunction", "function_id": "f", "data": {}}',
        '{"type": "reattach", "previous_worker_id": "w"}',
        '{"type": "workerregistered", "worker_id": "me"}',
        '{"type": "invokefunction", "data": {}}',
        '{"type": "invokefunction", "function_id": 1, "data": {}}',
        '{"type": "invokefunction", "function_id": "f", "data": {}, "action": {"type": "later"}}',
        '{"type": "invokefunction", "function_id": "f", "data": {}, "action": {"type": "enqueue"}}',
        '{"type": "invokefunction", "function_id": "f", "data": {}, "action": "void"}',
        '{"type": "invokefunction", "function_id": "f", "data": {}, "invocation_id": "1"}',
        '{"type": "invokefunction", "function_id": "f", "invocation_id": "zzzzzzzz-zzzz-zzzz-zzzz-zzzzzzzzzzzz"}',
        '{"type": "invokefunction", "function_id": "f", "data": {}',
        '{"type": "invokefunction", "function_id": "f", "data": 01}',
        '{"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f"}',
        '{"type": "registertriggertype", "id": "t"}',
        '{"type": "invocationresult", "function_id": "f"}',
        '{"type": "registerservice", "id": "s", "name": "x"}',
        '{"type": "pong"}',
        "[" * 100_000,
        '{"type": "invokefunction", "function_id": "f", "data": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_what_is_no_message_is_dropped_without_a_reply(message: str) -> None:
    worker = session()

    assert say(worker, message) is None
    assert worker.closed is False
    assert isinstance(say(worker, {"type": "ping"}), Send)


def test_dropped_messages_are_logged_ten_times_at_most(caplog: pytest.LogCaptureFixture) -> None:
    worker = session()

    with caplog.at_level(logging.WARNING, "scopestate.wire"):
        for _ in range(100):
            say(worker, "nonsense")

    dropped = [record for record in caplog.records if "worker-1" in record.message]
    assert len(dropped) == 10
    assert caplog.records[-1].message.startswith("further lines like the previous one are left out")


def test_too_many_messages_that_are_none_close_the_connection() -> None:
    worker = session(faults=20)
    for _ in range(20):
        assert say(worker, "nonsense") is None

    closing = say(worker, "nonsense")

    assert closing == Close(1008, "more than 20 malformed or refused messages")
    assert say(worker, {"type": "ping"}) is None


def test_good_messages_make_up_for_bad_ones() -> None:
    worker = session(faults=2)

    for _ in range(50):
        assert say(worker, "nonsense") is None
        assert isinstance(say(worker, {"type": "ping"}), Send)


def test_text_that_is_not_utf8_closes_with_1007_and_binary_is_dropped() -> None:
    bad = b'{"type":"invokefunction","function_id":"f","data":"\xff"}'

    assert say(session(), bad, text=False) is None
    closing = say(session(), bad)
    assert isinstance(closing, Close)
    assert closing.code == 1007


@pytest.mark.parametrize("start", [b"OTLP", b"MTRC", b"LOGS"])
def test_binary_telemetry_is_thrown_away_and_other_binary_is_json(start: bytes) -> None:
    worker = session(faults=1)

    for _ in range(10):
        assert say(worker, start + b"{}", text=False) is None
    assert isinstance(say(worker, b'{"type":"ping"}', text=False), Send)


def test_unknown_fields_are_ignored() -> None:
    call = say(session(), invoke(message_type="invokefunction", namespace="default", caller=None, observe_depth=3))

    assert isinstance(call, InvokeFunction)


# --------------------------------------------------------------------------------------------------------- calls


def test_a_call_is_answered_with_its_id_function_and_trace() -> None:
    worker = session()
    call = say(worker, invoke("state::get", traceparent="00-a-b-01", baggage="k=v"))

    assert sent(worker.answer(call, b'{"n":1}')) == {
        "type": "invocationresult",
        "invocation_id": ID,
        "function_id": "state::get",
        "result": {"n": 1},
        "traceparent": "00-a-b-01",
        "baggage": "k=v",
    }


def test_no_value_has_neither_result_nor_error_and_null_is_a_value() -> None:
    worker = session()

    nothing = sent(worker.answer(say(worker, invoke("state::get"))))
    null = sent(worker.answer(say(worker, invoke("state::get")), b"null"))

    assert nothing == {"type": "invocationresult", "invocation_id": ID, "function_id": "state::get"}
    assert null == {**nothing, "result": None}


def test_an_odd_function_id_is_quoted_in_the_answer() -> None:
    worker = session()
    odd = 'a"b\\c\u2028é'

    assert sent(worker.answer(say(worker, invoke(odd)), b"1"))["function_id"] == odd


@pytest.mark.parametrize("fields", [{"invocation_id": None}, {"action": {"type": "void"}}])
def test_nobody_waits_for_a_call_without_an_id_or_with_void(fields: dict[str, Any]) -> None:
    worker = session()
    call = say(worker, invoke(**fields))

    assert isinstance(call, InvokeFunction)
    assert worker.answer(call, b"1") is None


def test_an_enqueued_call_is_refused_if_anybody_waits() -> None:
    action = {"type": "enqueue", "queue": "default"}

    refused = say(session(), invoke(action=action))

    assert sent(refused.message)["error"] == {"code": "enqueue_error", "message": "QueueModule not loaded"}
    assert say(session(), invoke(action=action, invocation_id=None)) is None


def test_absent_data_is_taken_as_null() -> None:
    worker = session()
    call = say(worker, {"type": "invokefunction", "function_id": "f", "invocation_id": ID})

    started = worker.execute("f", call.data, lambda _: None)

    assert started is not None
    assert sent(started[1])["data"] is None


def test_too_many_calls_in_progress_are_answered_overloaded() -> None:
    worker = session(calls=2)
    first = say(worker, invoke())
    say(worker, invoke())

    refused = say(worker, invoke())

    assert sent(refused.message)["error"]["code"] == "OVERLOADED"
    worker.answer(first)
    assert isinstance(say(worker, invoke()), InvokeFunction)


# ----------------------------------------------------------------------------------------- the caller's id in the data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{}", {"_caller_worker_id": "w"}),
        ('{ "a" : 1 }', {"a": 1, "_caller_worker_id": "w"}),
        ('{"_caller_worker_id":"forged"}', {"_caller_worker_id": "w"}),
        ('{"\\u005fcaller_worker_id":"forged","b":2}', {"_caller_worker_id": "w", "b": 2}),
        ('{"text":"_caller_worker_id"}', {"text": "_caller_worker_id", "_caller_worker_id": "w"}),
        ("[1]", [1]),
        ("1", 1),
        ('"{}"', "{}"),
        ("null", None),
    ],
)
def test_the_caller_is_named_in_objects_only(data: str, expected: Any) -> None:
    named = bytes(with_caller(Raw(data.encode()), "w"))

    assert json.loads(named) == expected
    assert b"forged" not in named


# ------------------------------------------------------------------------------------------------- executing calls


def answer(invocation_id: str, **outcome: Any) -> dict[str, Any]:
    return {"type": "invocationresult", "invocation_id": invocation_id, "function_id": "f", **outcome}


def test_an_executed_call_keeps_the_callers_id_and_its_answer_is_passed_on() -> None:
    caller, executor = session(), session()
    call = say(caller, invoke("f", traceparent="tp"))
    started = executor.execute("f", call.data, lambda _: None, invocation_id=call.invocation_id, traceparent="tp")
    assert started is not None
    assert sent(started[1]) == {
        "type": "invokefunction",
        "invocation_id": ID,
        "function_id": "f",
        "data": {},
        "traceparent": "tp",
    }

    answered = say(executor, answer(ID, result={"ok": True}))

    assert isinstance(answered, Answered)
    assert answered.execution is started[0]
    assert sent(caller.pass_on(call, answered.frame)) == {
        "type": "invocationresult",
        "invocation_id": ID,
        "function_id": "f",
        "result": {"ok": True},
        "traceparent": "tp",
    }


@pytest.mark.parametrize("outcome", [{}, {"result": None}, {"result": None, "error": None}])
def test_an_answer_of_null_or_nothing_is_no_value(outcome: dict[str, Any]) -> None:
    caller, executor = session(), session()
    call = say(caller, invoke())
    executor.execute("f", call.data, lambda _: None, invocation_id=ID)

    passed = sent(caller.pass_on(call, say(executor, answer(ID, **outcome)).frame))

    assert passed == {"type": "invocationresult", "invocation_id": ID, "function_id": "f"}


def test_an_error_wins_over_a_result_and_is_passed_on_unchanged() -> None:
    caller, executor = session(), session()
    call = say(caller, invoke())
    executor.execute("f", call.data, lambda _: None, invocation_id=ID)
    error = {"code": "invocation_failed", "message": "no", "stacktrace": "line 1"}

    passed = sent(caller.pass_on(call, say(executor, answer(ID, result=1, error=error)).frame))

    assert passed == {"type": "invocationresult", "invocation_id": ID, "function_id": "f", "error": error}


def test_late_unknown_and_second_answers_are_ignored() -> None:
    executor = session()
    started = executor.execute("f", Raw(b"{}"), lambda _: None, invocation_id=ID)
    assert started is not None

    assert say(executor, answer(OTHER_ID, result=1)) is None
    assert isinstance(say(executor, answer(ID, result=1)), Answered)
    assert say(executor, answer(ID, result=1)) is None
    assert started[0].forget() is False


def test_an_id_that_is_in_use_is_replaced_by_a_fresh_one() -> None:
    executor = session()
    first = executor.execute("f", Raw(b"{}"), lambda _: None, invocation_id=ID)
    second = executor.execute("f", Raw(b"{}"), lambda _: None, invocation_id=ID)

    assert first is not None
    assert second is not None
    assert first[0].invocation_id == ID
    assert second[0].invocation_id != ID
    assert first[0].forget() is True
    assert list(executor.executing.values()) == [second[0]]


def test_a_worker_executes_no_more_than_its_limit() -> None:
    executor = session(calls=1)

    assert executor.execute("f", Raw(b"{}"), lambda _: None) is not None
    assert executor.execute("f", Raw(b"{}"), lambda _: None) is None


def test_the_end_gives_back_every_call_and_takes_nothing_more() -> None:
    executor = session()
    outcomes: list[InvocationResult] = []
    for _ in range(3):
        executor.execute("f", Raw(b"{}"), outcomes.append)

    for execution in executor.end():
        execution.settle(stopped(execution))

    assert [outcome.error.code for outcome in outcomes if outcome.error] == ["invocation_stopped"] * 3
    assert say(executor, {"type": "ping"}) is None


def test_fresh_ids_are_uuids_and_differ() -> None:
    import uuid

    ids = [fresh_id() for _ in range(1_000)]

    assert len(set(ids)) == 1_000
    assert all(str(uuid.UUID(made)) == made for made in ids)


# --------------------------------------------------------------------------------------------------- registrations


def test_registrations_are_passed_on_as_they_came() -> None:
    worker = session()

    function = say(worker, {"type": "registerfunction", "id": "f", "metadata": {"team": "x"}})
    trigger = say(
        worker, {"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f", "config": {"a": 1}}
    )

    assert isinstance(function, RegisterFunction)
    assert bytes(function.metadata) == b'{"team": "x"}'
    assert isinstance(trigger, RegisterTrigger)
    assert bytes(trigger.config) == b'{"a": 1}'


def test_a_function_called_over_http_is_not_registered() -> None:
    worker = session()

    assert say(worker, {"type": "registerfunction", "id": "f", "invocation": {"url": "http://x"}}) is None
    assert say(worker, {"type": "registerfunction", "id": "f", "invocation": None}) is not None


def test_too_many_registrations_close_the_connection_and_repeats_do_not_count() -> None:
    worker = session(registrations=3)
    for _ in range(10):
        for name in ("a", "b", "c"):
            assert isinstance(say(worker, {"type": "registerfunction", "id": name}), RegisterFunction)

    say(worker, {"type": "unregisterfunction", "id": "a"})
    assert isinstance(say(worker, {"type": "registerfunction", "id": "d"}), RegisterFunction)
    closing = say(worker, {"type": "registerfunction", "id": "e"})

    assert closing == Close(1008, "more than 3 functions and triggers registered")


def test_a_refused_registration_leaves_what_it_would_have_replaced_counted() -> None:
    worker = session(registrations=2, faults=100)
    for _ in range(5):
        for name in ("a", "b"):
            registered = say(worker, {"type": "registerfunction", "id": name, "metadata": "x" * 100})
            again = say(worker, {"type": "registerfunction", "id": name})
            assert isinstance(registered, RegisterFunction)
            assert isinstance(again, RegisterFunction)
            assert worker.refused(again) is None

    assert isinstance(say(worker, {"type": "registerfunction", "id": "c"}), Close)


def test_registrations_of_too_many_bytes_close_the_connection() -> None:
    worker = session(registration_bytes=1_000)
    for _ in range(10):
        assert isinstance(say(worker, {"type": "registerfunction", "id": "f", "metadata": "x" * 800}), RegisterFunction)

    closing = say(worker, {"type": "registerfunction", "id": "g", "metadata": "x" * 800})

    assert closing == Close(1008, "functions and triggers of more than 1000 bytes registered")


def test_registrations_of_exactly_the_limits_are_taken_and_one_more_is_not() -> None:
    first, second = (json.dumps({"type": "registerfunction", "id": name}) for name in "ab")
    worker = session(registrations=2, registration_bytes=len(first) + len(second))

    assert isinstance(say(worker, first), RegisterFunction)
    assert isinstance(say(worker, second), RegisterFunction)
    assert not worker.closed
    assert isinstance(say(worker, {"type": "registerfunction", "id": "c"}), Close)

    worker = session(registration_bytes=len(first) + len(second) - 1)
    say(worker, first)
    assert isinstance(say(worker, second), Close)


@pytest.mark.parametrize("leave", ["unregistered", "refused"])
def test_what_a_worker_withdraws_or_may_not_register_gives_its_bytes_back(leave: str) -> None:
    message = json.dumps(
        {"type": "registertrigger", "id": "t", "trigger_type": "state", "function_id": "f", "config": {}}
    )
    worker = session(registration_bytes=len(message), registrations=1, faults=1_000)

    for _ in range(20):
        registered = say(worker, message)
        assert isinstance(registered, RegisterTrigger), registered
        if leave == "refused":
            assert worker.refused(registered) is None
        else:
            say(worker, {"type": "unregistertrigger", "id": "t", "trigger_type": "state"})

    assert (worker._sizes, worker._registered_bytes) == ({}, 0)


def test_a_refusal_that_replaces_nothing_after_one_that_did_counts_nothing() -> None:
    worker = session(faults=1_000)
    say(worker, {"type": "registerfunction", "id": "a"})
    kept = dict(worker._sizes)
    for name in ("a", "b"):
        refused = say(worker, {"type": "registerfunction", "id": name, "metadata": "x" * 50})
        assert worker.refused(refused) is None

    assert worker._sizes == kept
    assert worker._registered_bytes == sum(kept.values())


def test_a_function_called_over_http_counts_as_a_fault_until_there_are_too_many() -> None:
    over_http = {"type": "registerfunction", "id": "f", "invocation": {"url": "http://x"}}
    worker = session(faults=3)

    answers = [say(worker, over_http) for _ in range(4)]

    # Each counts as two, and the next message, which is well formed, takes one back.
    assert answers == [None, None, Close(1008, "more than 3 malformed or refused messages"), None]


WAYS_TO_CALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "traced": {"traceparent": "00-1-2-01"},
    "with metadata": {"metadata": {"a": 1}},
    "void": {"action": {"type": "void"}},
    "void with metadata": {"action": {"type": "void"}, "metadata": {"a": 1}},
    "without an id": {"invocation_id": None},
    "with metadata without an id": {"invocation_id": None, "metadata": {"a": 1}},
}


@pytest.mark.parametrize("fields", WAYS_TO_CALL.values(), ids=WAYS_TO_CALL)
def test_calls_of_exactly_the_limit_are_taken_whichever_way_they_are_made(fields: dict[str, Any]) -> None:
    worker = session(calls=2)
    waits = fields.get("invocation_id", ID) is not None and "action" not in fields
    for _ in range(3):
        calls = [say(worker, invoke(**fields)) for _ in range(2)]
        assert all(isinstance(call, InvokeFunction) for call in calls)
        assert worker.waiting == 2
        third = say(worker, invoke(**fields))
        assert sent(third.message)["error"]["code"] == "OVERLOADED" if waits else third is None
        assert worker.waiting == 2
        for call in calls:
            assert (worker.answer(call, b"1") is not None) == waits
        assert worker.waiting == 0


@pytest.mark.parametrize("traced", [{}, {"traceparent": "00-1-2-01"}], ids=["plain", "traced"])
@pytest.mark.parametrize("way", ["answer", "pass on", "void answer", "void pass on"])
def test_each_way_to_answer_gives_the_place_of_its_call_back(way: str, traced: dict[str, str]) -> None:
    worker = session(calls=1)
    action = {"action": {"type": "void"}} if "void" in way else {}
    for _ in range(3):
        call = say(worker, invoke(**traced, **action))
        assert isinstance(call, InvokeFunction)
        if "pass on" in way:
            message = worker.pass_on(call, InvocationResult("other id", "f", Raw(b"1")))
        else:
            message = worker.answer(call, b"1")
        assert worker.waiting == 0
        assert message is None if action else sent(message)["result"] == 1


@pytest.mark.parametrize("traced", [{}, {"traceparent": "00-1-2-01"}], ids=["plain", "traced"])
def test_a_message_of_exactly_the_limit_is_sent_and_one_byte_more_is_not(traced: dict[str, str]) -> None:
    sizing = session()
    answer = sizing.answer(say(sizing, invoke(**traced)), b'"12345"')
    started = sizing.execute("f", Raw(b'"12345"'), lambda _: None, invocation_id=ID, **traced)
    assert answer is not None
    assert started is not None

    exact = session(message_bytes=len(answer))
    assert sent(exact.answer(say(exact, invoke(**traced)), b'"12345"'))["result"] == "12345"
    refused = sent(exact.answer(say(exact, invoke(**traced)), b'"123456"'))
    assert (refused["error"]["code"], exact.waiting) == ("MESSAGE_TOO_LARGE", 0)

    exact = session(message_bytes=len(started[1]))
    assert exact.execute("f", Raw(b'"12345"'), lambda _: None, invocation_id=ID, **traced) is not None
    with pytest.raises(MessageTooLarge):
        exact.execute("f", Raw(b'"123456"'), lambda _: None, invocation_id=OTHER_ID, **traced)
    assert list(exact.executing) == [ID]


def test_a_worker_executes_again_after_each_way_in_which_a_call_ends() -> None:
    worker = session(calls=1)
    for _ in range(3):
        started = worker.execute("f", Raw(b"1"), lambda _: None)
        assert started is not None
        assert worker.execute("f", Raw(b"1"), lambda _: None) is None
        say(worker, {"type": "invocationresult", "invocation_id": started[0].invocation_id, "function_id": "f"})
        given_up = worker.execute("f", Raw(b"1"), lambda _: None)
        assert given_up is not None
        assert given_up[0].forget()
        assert not given_up[0].forget()
    assert not worker.executing


def test_the_beginnings_of_messages_are_kept_for_ids_up_to_the_limit_only() -> None:
    worker = session()
    longest, longer = "x" * LONGEST_NAME, "x" * (LONGEST_NAME + 1)
    for name in (longest, longer):
        for _ in range(2):
            assert sent(worker.answer(say(worker, invoke(name)), b"1"))["function_id"] == name
            started = worker.execute(name, Raw(b"1"), lambda _: None)
            assert started is not None
            assert sent(started[1])["function_id"] == name

    for heads in (_answer_heads, _call_heads):
        assert longest in heads
        assert longer not in heads


def test_a_call_without_a_depth_is_as_deep_as_what_the_worker_was_given_last() -> None:
    worker = session()
    call = say(worker, invoke())
    assert worker.depth_of(call) == 0
    outer = worker.execute("f", Raw(b"1"), lambda _: None, depth=2)
    inner = worker.execute("f", Raw(b"1"), lambda _: None, depth=5)
    assert outer is not None
    assert inner is not None
    assert worker.depth_of(call) == 5
    inner[0].forget()
    assert worker.depth_of(call) == 2
    outer[0].forget()
    assert worker.depth_of(call) == 0


def test_an_answer_that_cannot_be_read_fails_its_call_and_no_other() -> None:
    worker = session()
    answer = b'{"type":"invocationresult","invocation_id":"%b","function_id":"f","result":}'
    for _ in range(2):
        first, second = (worker.execute("f", Raw(b"1"), lambda _: None, invocation_id=one) for one in (ID, OTHER_ID))
        assert first is not None
        assert second is not None
        assert say(worker, b'{"invocation_id":"%b","result":}' % ID.encode()) is None, "it is no answer"
        failed = say(worker, answer % ID.encode())
        assert isinstance(failed, Answered)
        assert failed.execution is first[0]
        assert failed.frame.error is not None
        assert list(worker.executing) == [OTHER_ID]
        assert say(worker, answer % ID.encode()) is None, "that call is over"
        assert second[0].forget()


def test_a_call_that_cannot_be_read_is_answered_and_takes_no_place() -> None:
    worker = session(calls=1)
    for _ in range(2):
        refused = say(worker, b'{"type":"invokefunction","invocation_id":"%b","function_id":"f","data":}' % ID.encode())
        assert sent(refused.message)["error"]["code"] == "deserialization_error"
        assert sent(refused.message)["invocation_id"] == ID
        assert worker.waiting == 0


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ('"function_id":"f\\ud800","config":{}', "surrogate"),
        ('"function_id":"f","config":' + "[" * 1_100 + "]" * 1_100, "nested too deep"),
    ],
)
def test_the_registration_of_a_trigger_that_cannot_be_read_is_answered(rest: str, why: str) -> None:
    message = '{"type":"registertrigger","id":"t","trigger_type":"state",' + rest + "}"

    action = WorkerSession("w").receive(message.encode())

    assert isinstance(action, Send)
    answer = json.loads(action.message)
    assert (answer["type"], answer["id"], answer["trigger_type"]) == ("triggerregistrationresult", "t", "state")
    assert answer["error"]["code"] == "trigger_registration_failed"
    assert why in answer["error"]["message"]


def test_what_cannot_be_read_is_explained_with_the_types_of_json() -> None:
    call = '{"type":"invokefunction","invocation_id":"6a8a4a2e-7a37-4c8a-9d5e-111111111111","function_id":5}'

    action = WorkerSession("w").receive(call.encode())

    assert isinstance(action, Send)
    assert "Expected `string`, got `integer` - at `$.function_id`" in json.loads(action.message)["error"]["message"]
