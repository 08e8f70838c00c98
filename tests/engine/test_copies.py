"""Events, results and errors travel: copied, pickled, into other processes, compared in a host's own tests."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest
from watching import Seen

from scopestate import DELETE, KEEP, Engine, StateEvent, errors, messages, ops
from scopestate.config import from_mapping
from scopestate.ops.results import BatchResult, CasResult, DeleteResult, ModifyResult, SetResult, UpdateResult

COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *[lambda item, protocol=protocol: pickle.loads(pickle.dumps(item, protocol)) for protocol in range(6)],
]


@pytest.fixture
def event(engine: Engine) -> StateEvent:
    """An event whose values have not been read."""
    seen = Seen()
    engine.on_change(scope="s", key="k")(seen)
    engine.set("s", "k", {"n": [1]})
    return seen.wait_for(1)[0]


def facts(event: StateEvent) -> tuple[Any, ...]:
    return (event.to_json(), event.old_json, event.new_json, event.revision, event.depth, event.existed, repr(event))


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("copy_of", COPIES)
def test_a_copy_of_an_event_has_its_values(copy_of: Callable[[Any], Any], read: bool, event: StateEvent) -> None:
    if read:
        assert event.new_value == {"n": [1]}

    other = copy_of(event)

    assert (other.old_value, other.new_value) == (None, {"n": [1]})
    assert facts(other) == facts(event)
    assert other == event


def test_a_copy_of_an_event_shares_no_value_with_it(event: StateEvent) -> None:
    event.new_value["n"].append(2)

    assert copy.copy(event).new_value == {"n": [1]}
    assert event.copy().new_value == {"n": [1]}
    assert event.new_value == {"n": [1, 2]}


def test_an_event_with_another_value_shows_that_value(event: StateEvent) -> None:
    assert event.new_value == {"n": [1]}

    assert msgspec.structs.replace(event, old_json=b"7", new_json=b"8").to_json() == {
        "type": "state",
        "event_type": "state:created",
        "scope": "s",
        "key": "k",
        "old_value": 7,
        "new_value": 8,
    }


def test_an_event_shows_the_same_before_and_after_it_is_read(event: StateEvent) -> None:
    fields, shown = msgspec.structs.asdict(event), repr(event)

    assert event.new_value == {"n": [1]}

    assert msgspec.structs.asdict(event) == fields
    assert repr(event) == shown
    assert "object at" not in shown
    assert json.loads(json.dumps(dict(event)))["new_value"] == {"n": [1]}


def new_value_of(event: StateEvent) -> Any:
    return event.new_value


def provoke(error: BaseException) -> None:
    raise error


CALL_TIMEOUT = errors.CallTimeout("f", 1.5, sent=False)

ERRORS = [
    errors.ScopestateError("x"),
    errors.InvalidValue("$.a", "no JSON"),
    errors.ValueTooLarge("s", "k", 2, 1),
    errors.SchemaViolation("s", "k", "$.a", "x", "User", written=False),
    errors.Conflict("s", [errors.KeyConflict(0, "k", 3, 4), errors.KeyConflict(1, "l", None, 0)]),
    errors.UpdateRefused("s", [ops.RefusedOp(0, "set.path.proto_polluted", "x", index=1)]),
    errors.BatchTooLarge("s", 1001, 1000, "keys"),
    errors.IdempotencyMismatch("s", "i"),
    errors.Unsupported("durable=True", "x"),
    errors.InvalidPageLimits("x"),
    errors.InvalidCursor("damaged"),
    errors.SerializationError("x"),
    errors.FunctionNotFound("f"),
    errors.FunctionFailed("f", "ValueError: x"),
    errors.RemoteFailure("f", "CODE", "message", "stack"),
    errors.Forbidden("x"),
    errors.InvalidRegistration("x"),
    errors.ConfigError("x", file="f.yaml", line=3, key="limits"),
    errors.StorageError("x", code="SET_ERROR"),
    errors.StoreLocked("x"),
    errors.StoreUnusable("x"),
    errors.StoreCorrupt("x", quarantined="/there"),
    errors.UnsavableValue("x", "s", "k"),
    errors.Compacted("c", "trimmed", "d"),
    errors.WatchOverrun("c", 1001),
    errors.RowTooLarge("s", "k", 5, 3),
    errors.SnapshotCapacity("x"),
    errors.MessageTooLarge("x"),
    errors.NotConnected("x"),
    errors.ConnectionLost("f", "ws://a", "x", may_be_applied=False),
    CALL_TIMEOUT,
    errors.Overloaded("x"),
    errors.ReplyTimeout("s", 1.0, "t (f)"),
    errors.WouldDeadlock("x"),
    errors.HandlerTimeout("f", 1.0),
    errors.EventLoopDetected("x"),
    errors.EventNotDelivered("x"),
    errors.EngineClosed(),
    errors.EngineForked("x"),
    errors.DeserializationError("x"),
]


def test_the_list_of_errors_here_is_complete() -> None:
    public = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}

    assert {type(error) for error in ERRORS} == public


@pytest.mark.parametrize("copy_of", COPIES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_copy_of_an_error_is_the_same_error(error: errors.ScopestateError, copy_of: Callable[[Any], Any]) -> None:
    other = copy_of(error)

    assert type(other) is type(error)
    assert (str(other), other.code, other.args, vars(other)) == (str(error), error.code, error.args, vars(error))


def test_events_and_errors_come_through_a_process_pool(event: StateEvent) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(new_value_of, event).result(60) == {"n": [1]}
        with pytest.raises(errors.CallTimeout) as caught:
            pool.submit(provoke, CALL_TIMEOUT).result(60)
    assert str(caught.value) == str(CALL_TIMEOUT)


@pytest.mark.parametrize("copy_of", COPIES)
def test_results_messages_ops_and_configurations_are_copied_whole(
    copy_of: Callable[[Any], Any], engine: Engine
) -> None:
    written = engine.set("s", "k", {"n": 1})
    refused = engine.update("s", "k", [ops.Increment("n", 1), ops.Append("n", 1)])
    message = messages.Update("s", "k", (ops.Merge({"a": 1}, ["b"]),))
    config = from_mapping({"functions": {"f": "os:getcwd"}, "limits": {"scope_mailbox": 5}})

    for item in (written, refused, message, config, refused.errors, engine.stats(), engine.health()):
        assert copy_of(item) == item
    assert copy_of(ops.MISSING) is ops.MISSING


def add(number: int) -> int:
    """A function that can be pickled."""
    return number + 1


@pytest.mark.parametrize("copy_of", COPIES)
def test_results_and_messages_of_transactions_are_copied_whole(copy_of: Callable[[Any], Any], engine: Engine) -> None:
    rows = engine.scope("rows")
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    rows.set("k", 1, ttl=60)
    with rows.batch(idempotency_key="i") as b:
        b.set("a", 1)
        b.update("b", [ops.Increment("", 1)])
        b.delete("a")
        b.touch("k", ttl=5)
    results = [
        rows.set("k", 2, keep_ttl=True, idempotency_key="j"),
        rows.set("k", 2, keep_ttl=True, idempotency_key="j"),
        rows.compare_and_set("k", 1, 2),
        rows.compare_and_set("k", 2, 3),
        rows.modify("k", add),
        b.result,
        *b.result.results,
        rows.entry("k"),
        next(rows.pages(1)),
        engine.ask(messages.DeleteRange("rows", prefix="x")),
    ]
    asked = [
        messages.Set("s", "k", [1], if_revision=3, expires_at=moment, durable=True, idempotency_key="i"),
        messages.Delete("s", "k", if_revision=3),
        messages.Update("s", "k", (ops.Increment("", 1),), atomic=True, ttl=timedelta(seconds=5)),
        messages.GetEntry("s", "k"),
        messages.CompareAndSet("s", "k", ops.MISSING, 1),
        messages.Modify("s", "k", add, 0),
        messages.Touch("s", "k"),
        messages.Touch("s", "k", None),
        messages.Batch("s", [messages.SetStep("a", 1), messages.TouchStep("a")], [messages.Check("a", absent=True)]),
        messages.Transact("s", add),
        messages.Keys("s", prefix="a", reverse=True, limit=3),
        messages.Count("s", start="a"),
        messages.DeleteRange("s", prefix="a"),
    ]

    for item in (*results, *asked):
        other = copy_of(item)
        assert type(other) is type(item)
        assert other == item
        assert repr(other) == repr(item)
    assert (copy_of(DELETE), copy_of(KEEP)) == (DELETE, KEEP)
    assert copy_of(KEEP) is KEEP


SAME = [
    (SetResult(None, b"1"), SetResult(None, b"1")),
    (SetResult(None, b'{"a":1,"b":2}'), SetResult(None, b'{"b":2,"a":1}')),
    (UpdateResult(None, b"1"), UpdateResult(None, b"1")),
    (StateEvent("state:created", "s", "k", None, b"1", 1), StateEvent("state:created", "s", "k", None, b"1", 9)),
    (
        StateEvent("state:created", "s", "k", None, b"1", 1),
        StateEvent("state:created", "s", "k", None, b"1", 1).to_json(),
    ),
    (SetResult(None, b"1"), ANY),
    (DeleteResult(b"1"), DeleteResult(b"1")),
    (CasResult(True, b"1"), CasResult(True, b"2")),
    (ModifyResult(b"1", b"2", revision=3), ModifyResult(b"1", b"2", revision=3)),
    (BatchResult((DeleteResult(b"1"),)), BatchResult((DeleteResult(b"1"),))),
    (StateEvent("state:created", "s", "k", None, b"1", 1), ANY),
]
DIFFERENT = [
    (SetResult(None, b"1"), SetResult(None, b"2")),
    (SetResult(None, b"1"), UpdateResult(None, b"1")),
    (UpdateResult(None, b"1"), UpdateResult(None, b"1", (ops.OpError(0, "c", "m"),))),
    (SetResult(None, b"1"), {"old_value": None, "new_value": 1}),
    (SetResult(None, b"1"), None),
    (DeleteResult(b"1"), DeleteResult(b"2")),
    (DeleteResult(b"1"), SetResult(b"1", b"1")),
    (CasResult(False, b"1"), CasResult(False, b"2")),
    (ModifyResult(b"1", b"2", revision=3), ModifyResult(b"1", b"2", revision=4)),
    (BatchResult((DeleteResult(b"1"),)), BatchResult((DeleteResult(b"2"),))),
    (StateEvent("state:created", "s", "k", None, b"1", 1), StateEvent("state:created", "s", "k", None, b"2", 1)),
    (StateEvent("state:created", "s", "k", None, b"1", 1), {"type": "state"}),
    (StateEvent("state:created", "s", "k", None, b"1", 1), None),
    (StateEvent("state:created", "s", "k", None, b"1", 1), SetResult(None, b"1")),
]


@pytest.mark.parametrize(("one", "other", "equal"), [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_equal_and_unequal_are_opposites_both_ways(one: Any, other: Any, equal: bool) -> None:
    assert [one == other, other == one, one != other, other != one] == [equal, equal, not equal, not equal]


@pytest.mark.parametrize("item", [SetResult(None, b"1"), UpdateResult(None, b"1"), SAME[3][0]])
def test_what_is_equal_by_its_values_has_no_hash(item: object) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(item)


def test_an_event_is_read_by_name_and_not_backwards(event: StateEvent) -> None:
    with pytest.raises(TypeError):
        reversed(event)  # type: ignore[call-overload]  # as of any mapping that is not a dict


def test_each_handler_gets_an_event_of_its_own_although_memory_was_short(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of, copies = StateEvent.copy, 0

    def scarce(event: StateEvent) -> StateEvent:
        nonlocal copies
        copies += 1
        if copies == 2:  # the one for the first handler
            raise MemoryError
        return copy_of(event)

    monkeypatch.setattr(StateEvent, "copy", scarce)
    first, second = Seen(), Seen()
    engine.on_change(scope="s", key="k")(first)
    engine.on_change(scope="s", key="k")(second)

    engine.set("s", "k", {"n": [1]})

    (one,), (other,) = first.wait_for(1), second.wait_for(1)
    assert copies == 4
    assert one is not other
    one.new_value["n"].append(2)
    assert other.new_value == {"n": [1]}
    engine.drain()
    assert engine.stats().deliveries == 2
