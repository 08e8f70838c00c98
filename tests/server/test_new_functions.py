"""Functions and fields that scopestate adds, for workers: answers, errors with their facts, input that is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from raw import RawWorker
from serving import OpenRaw, OpenServer, eventually

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import EngineClosed, SchemaViolation, ScopestateError
from scopestate.server.server import Server

STEPS: list[tuple[str, dict[str, Any], Any]] = [
    (
        "set",
        {"key": "a", "value": {"n": 1}, "if_absent": True},
        {"old_value": None, "new_value": {"n": 1}, "revision": 1},
    ),
    ("get-entry", {"key": "a"}, {"value": {"n": 1}, "revision": 1}),
    ("get-entry", {"key": "absent"}, None),
    ("set", {"key": "b", "value": 2}, {"old_value": None, "new_value": 2}),
    ("set", {"key": "b", "value": 3, "if_revision": 2}, {"old_value": 2, "new_value": 3, "revision": 3}),
    ("set", {"key": "b", "value": 4, "if_revision": None}, {"old_value": 3, "new_value": 4, "revision": 4}),
    (
        "update",
        {"key": "b", "ops": [{"type": "increment", "path": "", "by": 1}], "atomic": True},
        {"old_value": 4, "new_value": 5, "revision": 5},
    ),
    ("compare-and-set", {"key": "b", "expected": 5, "value": 6}, {"swapped": True}),
    ("compare-and-set", {"key": "b", "expected": 5, "value": 7}, {"swapped": False, "current": 6}),
    ("compare-and-set", {"key": "c", "value": None}, {"swapped": True}),
    ("compare-and-set", {"key": "c", "expected": None, "value": 1}, {"swapped": True}),
    ("delete", {"key": "c", "if_revision": 8}, {"old_value": 1, "revision": 9}),
    ("delete", {"key": "c"}, None),
    ("delete", {"key": "c", "if_absent": True}, {"old_value": None, "revision": 11}),
    (
        "transaction",
        {
            "checks": [{"key": "a", "value": {"n": 1}}, {"key": "z", "absent": True}],
            "ops": [{"type": "set", "key": "z", "value": 1}, {"type": "delete", "key": "a"}],
        },
        {
            "committed": True,
            "revision": 13,
            "results": [{"old_value": None, "new_value": 1}, {"old_value": {"n": 1}}],
        },
    ),
    (
        "transaction",
        {"checks": [{"key": "z", "revision": 1}], "ops": []},
        {"committed": False, "conflicts": [{"index": 0, "key": "z", "revision": 12}], "errors": []},
    ),
    ("list_keys", {}, {"keys": ["b", "z"]}),
    ("list_keys", {"after": "b"}, {"keys": ["z"]}),
    ("count", {"prefix": "b"}, {"count": 1}),
    (
        "list_entries",
        {},
        {"entries": [["b", 6], ["z", 1]], "next_cursor": None, "done": True, "offset": 0, "total": 2},
    ),
    ("list_entries", {"reverse": True}, {"entries": [["z", 1], ["b", 6]], "next_cursor": None, "done": True}),
    ("touch", {"key": "z", "ttl_ms": None}, {"touched": True}),
    ("touch", {"key": "absent", "ttl_ms": 5}, {"touched": False}),
    ("set", {"key": "i", "value": 1, "idempotency_key": "i"}, {"old_value": None, "new_value": 1, "revision": 14}),
    (
        "set",
        {"key": "i", "value": 1, "idempotency_key": "i"},
        {"old_value": None, "new_value": 1, "revision": 14, "replayed": True},
    ),
    ("delete-range", {"prefix": "", "limit": 2}, {"deleted": 2, "more": True}),
    ("delete-range", {"start": "a"}, {"deleted": 1, "more": False}),
]


def test_every_function_answers_workers_and_the_program_alike_and_as_its_schema_says(
    connect: OpenRaw, engine: Engine
) -> None:
    worker = connect()
    schemas = {entry["name"]: entry for entry in engine.functions()}
    for name, fields, expected in STEPS:
        function = f"state::{name}"
        for scope, answer in (
            ("w", worker.call(function, {"scope": "w", **fields})),
            ("p", engine.call(function, {"scope": "p", **fields})),
        ):
            assert answer == expected, (name, fields, scope)
            jsonschema.validate({"scope": scope, **fields}, schemas[function]["request_schema"])
            jsonschema.validate(answer, schemas[function]["response_schema"])


def test_options_may_stand_in_any_order_and_twice(connect: OpenRaw) -> None:
    worker = connect()
    call = '{"type":"invokefunction","invocation_id":"%s","function_id":"state::set","data":%s}'
    data = '{"if_revision":5,"value":1,"if_revision":0,"key":"k","scope":"s"}'
    worker.send(call % ("0" * 32, data))

    assert worker.receive()["result"] == {"old_value": None, "new_value": 1, "revision": 1}


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_conflict_carries_its_facts(connect: OpenRaw) -> None:
    worker = connect()
    worker.call("state::set", {"scope": "s", "key": "k", "value": 1})

    error = worker.ask("state::set", {"scope": "s", "key": "k", "value": 2, "if_revision": 7})["error"]

    assert error["code"] == "CONFLICT"
    assert "expected to have revision 7 but has revision 1" in error["message"]
    conflict = {"index": 0, "key": "k", "expected_revision": 7, "revision": 1}
    assert error["details"] == {
        "scope": "s",
        "key": "k",
        "expected_revision": 7,
        "revision": 1,
        "conflicts": [conflict],
    }


def test_other_refusals_carry_their_facts(connect: OpenRaw) -> None:
    worker = connect()
    ops = [{"type": "increment", "path": "n", "by": 1}]
    worker.call("state::set", {"scope": "s", "key": "k", "value": 1, "idempotency_key": "i"})

    def details(name: str, **fields: Any) -> Any:
        error = worker.ask(f"state::{name}", {"scope": "s", **fields})["error"]
        return error["code"], error["details"]

    code, facts = details("update", key="k", ops=ops, atomic=True)
    assert (code, facts["scope"], facts["errors"][0]["code"]) == ("UPDATE_REFUSED", "s", "increment.target_not_object")
    assert details("set", key="k", value=2, idempotency_key="i") == (
        "IDEMPOTENCY_MISMATCH",
        {"scope": "s", "idempotency_key": "i"},
    )
    many = [{"type": "delete", "key": str(number)} for number in range(1_001)]
    assert details("transaction", ops=many) == (
        "BATCH_TOO_LARGE",
        {"scope": "s", "size": 1_001, "limit": 1_000, "unit": "keys"},
    )
    assert details("list_entries", prefix="", cursor="x") == ("INVALID_CURSOR", {"reason": "damaged"})
    assert details("set", key="k", value=2, durable=True)[0] == "UNSUPPORTED"


def test_a_value_that_breaks_the_rule_of_its_scope_is_refused_to_workers_and_bridges(
    connect: OpenRaw, engine: Engine, server: Server
) -> None:
    name = {"type": "object", "properties": {"name": {"type": "string"}}}
    engine.reconfigure(from_mapping({"scopes": [{"name": "s", "schema": name}]}))
    bridge = {"name": "bridge", "config": {"bridge_url": server.url}}
    facts = {
        "scope": "s",
        "key": "k",
        "path": "$.name",
        "reason": "7 is not of type 'string'",
        "type_name": "scopes[0].schema",
        "written": True,
    }

    error = connect().ask("state::set", {"scope": "s", "key": "k", "value": {"name": 7}})["error"]
    with (
        Engine.from_config([{"name": "iii-state", "config": {"adapter": bridge}}]) as other,
        pytest.raises(SchemaViolation) as caught,
    ):
        other.modify("s", "k", lambda old: {"name": 7})

    assert (error["code"], error["details"]) == ("SCHEMA_VIOLATION", facts)
    assert {name: getattr(caught.value, name) for name in facts} == facts
    assert engine.get("s", "k") is None


def test_errors_of_the_reference_have_no_details(connect: OpenRaw) -> None:
    error = connect().ask("state::get", {"scope": "s"})["error"]

    assert set(error) == {"code", "message"}


def test_details_of_a_workers_own_error_are_not_passed_on(connect: OpenRaw) -> None:
    provider, caller = connect(), connect()
    provider.register("f")
    caller.invoke("f", {})
    provider.answer(provider.take("f"), error={"code": "CONFLICT", "message": "m", "details": {"scope": "made up"}})

    assert caller.receive()["error"] == {"code": "CONFLICT", "message": "m"}


# ------------------------------------------------------------------------------------------------------ hostile input


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("set", {"key": "k", "value": 1, "if_revision": 1.0}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "if_revision": 2**53}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "if_revision": 10**400}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "if_revision": "1"}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "if_revision": [1]}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "ttl_ms": 0}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "ttl_ms": 1.5}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "ttl_ms": 1, "expires_at": 1}, "deserialization_error"),
    ("set", {"key": "k", "value": 1, "idempotency_key": "x" * 100_000}, "deserialization_error"),
    ("update", {"key": "k", "ops": [], "atomic": "yes"}, "deserialization_error"),
    ("compare-and-set", {"key": "k"}, "deserialization_error"),
    ("compare-and-set", {"key": "k", "value": 1, "expected_revision": -1}, "deserialization_error"),
    ("compare-and-set", {"key": "k", "value": deep(200)}, "deserialization_error"),
    ("compare-and-set", {"key": "k", "value": 1, "expected": deep(200)}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": deep(200)}]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": 1}, {"type": "x"}]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": 1}, 5]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": 1, "ttl": 5}]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": 5, "value": 1}]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "update", "key": "k", "ops": [{"type": "x"}]}]}, "deserialization_error"),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": 1}] * 50_000}, ""),
    ("transaction", {"ops": [{"type": "set", "key": "k", "value": "x" * 9_000_000}]}, "BATCH_TOO_LARGE"),
    ("transaction", {"ops": [], "checks": [{"key": str(n), "absent": True} for n in range(2_000)]}, "BATCH_TOO_LARGE"),
    ("list_entries", {"limit": 10**9}, "INVALID_PAGE_LIMITS"),
    ("list_entries", {"max_bytes": 0}, "INVALID_PAGE_LIMITS"),
    ("list_entries", {"cursor": "snapshot." + "x" * 100}, "INVALID_CURSOR"),
    ("list_entries", {"cursor": 5}, "deserialization_error"),
    ("list_keys", {"limit": 1.0}, "deserialization_error"),
    ("list_keys", {"prefix": ["a"]}, "deserialization_error"),
    ("delete-range", {}, "deserialization_error"),
    ("delete-range", {"prefx": "a"}, "deserialization_error"),
    ("touch", {"key": "there", "ttl_ms": -5}, "deserialization_error"),
]


@pytest.mark.parametrize(("name", "fields", "code"), HOSTILE)
def test_input_that_does_not_fit_is_refused_and_nothing_is_done(
    connect: OpenRaw, engine: Engine, name: str, fields: dict[str, Any], code: str
) -> None:
    engine.set("s", "there", 1)
    before = engine.entry("s", "there")
    worker = connect()
    data = {"scope": "s", **fields}

    answer = worker.ask(f"state::{name}", data)

    if not code:  # much, and all right
        assert answer["result"]["committed"]
        return
    assert answer["error"]["code"] == code, answer["error"]
    assert len(json.dumps(answer)) < 5_000
    with pytest.raises(ScopestateError) as caught:
        engine.call(f"state::{name}", data)
    assert caught.value.code == code
    assert engine.keys("s") == ["there"]
    assert engine.entry("s", "there") == before


@pytest.mark.parametrize("data", ["[]", "5", '"x"', "null", '{"scope":"s","key":"\\ud800","ttl_ms":1,"value":1}'])
@pytest.mark.parametrize("name", ["compare-and-set", "transaction", "touch", "list_entries", "get-entry"])
def test_what_is_no_object_of_json_is_refused(connect: OpenRaw, name: str, data: str) -> None:
    if name == "list_entries" and "scope" in data:
        data = '{"scope":"\\ud800"}'
    worker = connect()
    call = '{"type":"invokefunction","invocation_id":"%s","function_id":"state::%s","data":%s}'

    worker.send(call % ("0" * 32, name, data))

    assert worker.receive()["error"]["code"] == "deserialization_error"


def test_an_event_is_no_range_to_delete(connect: OpenRaw, engine: Engine) -> None:
    """A trigger calls its function with the event, which has no bounds: it must not empty the scope."""
    failures: list[Any] = []
    engine.on_error(failures.append)
    engine.set("s", "kept", 1)
    connect().trigger("state::delete-range", {"scope": "s"})

    engine.set("s", "k", 1)
    engine.drain(timeout=20)

    assert engine.keys("s") == ["k", "kept"]
    assert "name what to delete" in str(failures[0].error)


def test_an_entry_as_a_condition_lets_events_through(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.register("f")
    worker.trigger("f", {"scope": "s", "condition_function_id": "state::get-entry"})

    engine.set("s", "k", 1)

    assert worker.take("f")["data"]["key"] == "k"


# ---------------------------------------------------------------------------------------------------------- snapshots


def first_page(worker: RawWorker, scope: str = "s") -> str:
    """Begin a snapshot; return the cursor."""
    cursor: str = worker.call("state::list_entries", {"scope": scope, "limit": 1})["next_cursor"]
    return cursor


def fill(engine: Engine, scope: str = "s", count: int = 3) -> None:
    for number in range(count):
        engine.set(scope, f"k{number}", number)


def test_a_snapshot_stays_as_it_was(connect: OpenRaw, engine: Engine) -> None:
    fill(engine)
    worker = connect()
    cursor = first_page(worker)
    engine.set("s", "k1", "changed")
    engine.delete("s", "k2")
    engine.set("s", "new", 1)

    rest = worker.call("state::list_entries", {"scope": "s", "cursor": cursor})

    assert rest == {"entries": [["k1", 1], ["k2", 2]], "next_cursor": None, "done": True, "offset": 1, "total": 3}


def test_a_cursor_is_used_once_and_belongs_to_its_caller_and_scope(connect: OpenRaw, engine: Engine) -> None:
    fill(engine)
    worker, other = connect(), connect()
    cursor = first_page(worker)

    def code(caller: RawWorker, scope: str = "s") -> str:
        answer: str = caller.ask("state::list_entries", {"scope": scope, "cursor": cursor})["error"]["code"]
        return answer

    assert code(other) == "INVALID_CURSOR"
    assert code(worker, "other scope") == "INVALID_CURSOR"
    with pytest.raises(ScopestateError, match="belongs to another caller"):
        engine.call("state::list_entries", {"scope": "s", "cursor": cursor})
    assert worker.call("state::list_entries", {"scope": "s", "cursor": cursor})["done"]
    assert code(worker) == "INVALID_CURSOR"


def test_a_worker_that_leaves_takes_its_snapshots_with_it(connect: OpenRaw, engine: Engine) -> None:
    fill(engine)
    worker = connect()
    for _ in range(5):
        first_page(worker)
    assert len(engine._snapshots) == 5

    worker.close()
    eventually(lambda: not len(engine._snapshots))


def test_a_hostile_worker_does_not_use_up_the_snapshots_of_others(connect: OpenRaw, engine: Engine) -> None:
    fill(engine)
    greedy, other = connect(), connect()
    answers = [greedy.ask("state::list_entries", {"scope": "s", "limit": 1}) for _ in range(30)]
    assert ["error" in answer for answer in answers] == [False] * 16 + [True] * 14
    assert answers[-1]["error"]["code"] == "SNAPSHOT_CAPACITY"
    cursors = [first_page(other) for _ in range(8)]

    assert all(other.call("state::list_entries", {"scope": "s", "cursor": cursor})["done"] for cursor in cursors)


def test_the_workers_of_one_token_share_their_part(open_server: OpenServer, connect: OpenRaw, engine: Engine) -> None:
    fill(engine)
    server = open_server(auth={"tokens": ["many-workers", "one-worker"]})

    def bearer(token: str) -> RawWorker:
        return connect(server, additional_headers={"Authorization": f"Bearer {token}"})

    many = [bearer("many-workers") for _ in range(4)]
    cursors = [first_page(worker) for worker in many for _ in range(4)]
    one = bearer("one-worker")
    mine = [first_page(one) for _ in range(8)]

    assert all(one.call("state::list_entries", {"scope": "s", "cursor": cursor})["done"] for cursor in mine)
    left = [
        "error" not in many[number // 4].ask("state::list_entries", {"scope": "s", "cursor": cursor})
        for number, cursor in enumerate(cursors)
    ]
    assert left == [False] * 8 + [True] * 8


def test_a_row_that_is_too_large_leaves_the_cursor(connect: OpenRaw, engine: Engine) -> None:
    engine.set("s", "a", 1)
    engine.set("s", "b", "x" * 1_000)
    worker = connect()
    cursor = first_page(worker)

    error = worker.ask("state::list_entries", {"scope": "s", "cursor": cursor, "max_bytes": 500})["error"]

    assert (error["code"], error["details"]["key"], error["details"]["limit"]) == ("ROW_TOO_LARGE", "b", 500)
    assert worker.call("state::list_entries", {"scope": "s", "cursor": cursor, "max_bytes": 2_000})["done"]


def test_a_closed_engine_gives_no_further_page(engine: Engine) -> None:
    fill(engine)
    cursor = engine.call("state::list_entries", {"scope": "s", "limit": 1})["next_cursor"]
    engine.close()

    with pytest.raises(EngineClosed):
        engine.call("state::list_entries", {"scope": "s", "cursor": cursor})
