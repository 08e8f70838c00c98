"""A scope's turns as calls, and answers as results: also those of an engine that is not scopestate."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pykka
import pytest
from conformance import load, same

from scopestate.actors.reply import Reply
from scopestate.errors import RemoteFailure
from scopestate.ops import checked, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.persistence.bridge.computed import Computation, Here
from scopestate.persistence.bridge.events import _read_event
from scopestate.persistence.bridge.scope import _effects_of

VECTORS: list[dict[str, Any]] = load("vectors.json")


@pytest.mark.parametrize(
    ("turn", "function_id", "payload"),
    [
        (
            turns.Set("k", b'{"a":[1.0]}'),
            "state::set",
            {"scope": "s", "key": "k", "value": {"a": [1.0]}, "_existed": True},
        ),
        (turns.Set("k", b"null"), "state::set", {"scope": "s", "key": "k", "value": None, "_existed": True}),
        (turns.Delete("k"), "state::delete", {"scope": "s", "key": "k"}),
        (turns.Get(""), "state::get", {"scope": "s", "key": ""}),
        (turns.List(), "state::list", {"scope": "s"}),
        (turns.Items(), "state::list", {"scope": "s", "_keys": True}),
    ],
)
def test_a_turn_as_a_call(turn: Any, function_id: str, payload: dict[str, Any]) -> None:
    assert turn.function_id == function_id
    assert same(json.loads(msgspec.json.encode(turn.call("s"))), payload)


def test_ops_go_out_in_the_form_in_which_they_came_in() -> None:
    for vector in VECTORS:
        ops = checked(vector["ops"])
        data = msgspec.json.encode(turns.Update("k", ops).call("s"))
        assert checked(json.loads(data)["ops"]) == ops, vector["name"]


@pytest.mark.parametrize(
    ("turn", "result", "answer", "change"),
    [
        # Another engine does not say `existed`: there a stored null looks like a missing key
        # (docs/reference/protocol.md 13.4).
        (turns.Set("k", b"1"), b'{"old_value":null,"new_value":1}', SetResult(None, b"1"), (None, b"1")),
        (turns.Set("k", b"1"), b'{"old_value":0,"new_value":1}', SetResult(b"0", b"1"), (b"0", b"1")),
        (
            turns.Set("k", b"1"),
            b'{"old_value":null,"new_value":1,"existed":true}',
            SetResult(b"null", b"1"),
            (b"null", b"1"),
        ),
        (
            turns.Set("k", b"1"),
            b'{"old_value":null,"new_value":1,"existed":false}',
            SetResult(None, b"1"),
            (None, b"1"),
        ),
        (turns.Set("k", b"1"), b'{"new_value":1,"more":2}', SetResult(None, b"1"), (None, b"1")),
        (turns.Update("k", ()), b'{"old_value":{ },"new_value":-0}', UpdateResult(b"{}", b"-0.0"), (b"{}", b"-0.0")),
        (turns.Delete("k"), None, None, (None, None)),
        (turns.Delete("k"), b"null", b"null", (b"null", None)),
        (turns.Get("k"), None, None, None),
        (turns.Get("k"), b"null", b"null", None),
        (turns.Get("k"), b'{ "a" : 1 }', b'{"a":1}', None),
        (turns.List(), b"[1, null]", [b"1", b"null"], None),
        (turns.List(), None, [], None),
        (turns.Items(), b'{"keys":["b","a"],"values":[1, {}]}', [("b", b"1"), ("a", b"{}")], None),
    ],
)
def test_a_result_as_an_answer(turn: Any, result: bytes | None, answer: Any, change: Any) -> None:
    changes, found = turn.effects_of(result)

    assert found == answer
    assert changes == (() if change is None else (turns.Change("k", *change),))
    if isinstance(answer, SetResult):
        assert (found.old_json, found.new_json) == (answer.old_json, answer.new_json)


def test_refused_ops_come_through() -> None:
    result = b'{"old_value":1,"new_value":1,"errors":[{"op_index":0,"code":"c","message":"m","doc_url":"u"}]}'

    _, updated = turns.Update("k", ()).effects_of(result)
    (error,) = updated.errors

    assert (error.op_index, error.code, error.message, error.doc_url) == (0, "c", "m", "u")


@pytest.mark.parametrize(
    ("turn", "result"),
    [
        (turns.Set("k", b"1"), None),
        (turns.Set("k", b"1"), b"[]"),
        (turns.Update("k", ()), b'{"old_value":null}'),
        (turns.Update("k", ()), b'{"old_value":null,"new_value":1e999}'),
        (turns.Get("k"), b'"\\ud800"'),
        (turns.List(), b"{}"),
        (turns.Items(), b"[1]"),
        (turns.Items(), b'{"keys":["a"],"values":[]}'),
    ],
)
def test_a_result_of_another_shape_is_an_error_and_not_an_answer(turn: Any, result: bytes | None) -> None:
    with pytest.raises(RemoteFailure) as caught:
        _effects_of(turn, result)

    assert caught.value.code == "serialization_error"
    assert "state::" in str(caught.value)


class _Dispatcher:
    def reply(self) -> Reply[Any]:
        return Reply()


@pytest.mark.parametrize("granted_first", [True, False])
def test_a_computation_whose_caller_has_gone_is_given_up_however_often_that_is_said(granted_first: bool) -> None:
    here = Here(_Dispatcher())  # type: ignore[arg-type]  # as far as it is used
    ended: list[Any] = []
    computation = Computation(lambda: ((), 1), lambda effects, error: ended.append((effects, error)))
    if granted_first:

        def interrupted() -> Any:
            raise KeyboardInterrupt

        here.grant(computation)
        computation.run = interrupted  # type: ignore[method-assign]  # a signal arrives before it begins
        with pytest.raises(KeyboardInterrupt):
            here.work_here(None)
        assert not ended
        here.give_up()
    else:
        with pytest.raises(pykka.Timeout):
            here.work_here(0.0)
        here.give_up()
        assert not ended
        here.grant(computation)

    here.give_up()
    assert ended
    for effects, error in ended:  # the scope takes the first one
        assert effects is None
        assert "stopped waiting" in str(error)


def test_an_outcome_that_may_not_have_been_delivered_is_delivered_again() -> None:
    ended: list[Any] = []
    computation = Computation(lambda: ((), 1), lambda effects, error: ended.append((effects, error)))
    computation.run()
    computation.give_up()

    assert ended == [(((), 1), None)] * 2


@pytest.mark.parametrize(
    ("kind", "old", "new", "expected"),
    [
        ("state:created", "null", "1", (None, b"1")),
        ("state:created", "null", "null", (None, b"null")),
        ("state:updated", "null", "1", (b"null", b"1")),
        ("state:updated", "2", "null", (b"2", b"null")),
        ("state:deleted", "2", "null", (b"2", None)),
        ("state:deleted", "null", "null", (None, None)),
        ("state:expired", "null", "null", (b"null", None)),
    ],
)
def test_an_event_of_the_remote(kind: str, old: str, new: str, expected: tuple[bytes | None, bytes | None]) -> None:
    event = f'{{"type":"state","event_type":"{kind}","scope":"s","key":"k","old_value":{old},"new_value":{new}}}'

    read = _read_event(event.encode()).arrived(1, 0)

    assert (read.scope, read.key, read.old, read.new, read.expired) == ("s", "k", *expected, None)


def test_an_event_of_a_key_that_has_expired_tells_when() -> None:
    event = b'{"event_type":"state:expired","scope":"s","key":"k","old_value":1,"expired_at":5,"late_ms":2}'

    assert _read_event(event).arrived(1, 0).expired == (5, 2)
