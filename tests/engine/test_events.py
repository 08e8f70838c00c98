"""What an event is: typed attributes, and a mapping of exactly the reference's six fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from conformance import same
from watching import Seen

from scopestate import Engine, StateEvent
from scopestate.ops import Increment

SIX = ["type", "event_type", "scope", "key", "old_value", "new_value"]


@pytest.fixture
def seen(engine: Engine) -> Seen:
    """A handler of every change."""
    seen = Seen()
    engine.on_change()(seen)
    return seen


def test_an_event_is_a_mapping_with_exactly_the_six_fields_of_the_reference(engine: Engine, seen: Seen) -> None:
    engine.set("users", "ada", {"n": 1})

    [event] = seen.wait_for(1)

    assert isinstance(event, Mapping)
    assert list(event) == list(event.keys()) == SIX
    assert len(event) == 6
    expected = {
        "type": "state",
        "event_type": "state:created",
        "scope": "users",
        "key": "ada",
        "old_value": None,
        "new_value": {"n": 1},
    }
    assert same(dict(event), expected)
    assert same({**event}, expected)
    assert same(event.to_json(), expected)
    assert event == expected
    assert expected == event
    assert list(event.items()) == list(expected.items())
    assert list(event.values()) == list(expected.values())
    assert same(json.loads(json.dumps(event.to_json())), expected)


def test_its_fields_are_typed_attributes_too_and_more_stand_beside_them(engine: Engine, seen: Seen) -> None:
    engine.set("users", "ada", 1)
    engine.set("users", "ada", 2.0)

    event = seen.wait_for(2)[1]

    assert (event.type, event.event_type, event.scope, event.key) == ("state", "state:updated", "users", "ada")
    assert same([event.old_value, event.new_value], [1, 2.0])
    assert (event.revision, event.existed, event.depth) == (2, True, 0)


def test_what_is_not_one_of_the_six_is_not_in_the_mapping(engine: Engine, seen: Seen) -> None:
    engine.set("s", "k", 1)
    [event] = seen.wait_for(1)

    for name in ("revision", "depth", "existed", "old_json", "copy", "nothing"):
        assert name not in event
        assert event.get(name, "absent") == "absent"
        with pytest.raises(KeyError, match=name):
            event[name]
    assert "type" in event
    assert event.get("key") == "k"
    with pytest.raises(TypeError):
        hash(event)


@pytest.mark.parametrize(
    ("change", "event_type", "old", "new"),
    [
        (lambda e: e.set("s", "new", 1), "state:created", None, 1),
        (lambda e: e.set("s", "k", 1), "state:updated", "before", 1),
        (lambda e: e.set("s", "k", "before"), "state:updated", "before", "before"),
        (lambda e: e.set("s", "null", 1), "state:updated", None, 1),
        (lambda e: e.update("s", "k", []), "state:updated", "before", "before"),
        (lambda e: e.update("s", "new", []), "state:created", None, {}),
        (lambda e: e.update("s", "k", [Increment("", 1)]), "state:updated", "before", "before"),
        (
            lambda e: e.update("s", "new", [Increment("a", 1), Increment("b", 1)]),
            "state:created",
            None,
            {"a": 1, "b": 1},
        ),
        (lambda e: e.delete("s", "k"), "state:deleted", "before", None),
        (lambda e: e.delete("s", "new"), "state:deleted", None, None),
    ],
)
def test_each_call_that_writes_fires_exactly_one_event(
    change: Any, event_type: str, old: Any, new: Any, engine: Engine
) -> None:
    engine.set("s", "k", "before")
    engine.set("s", "null", None)
    seen = Seen()
    engine.on_change()(seen)

    change(engine)

    engine.drain(timeout=20)
    [event] = seen.take()
    assert (event["event_type"], event["old_value"], event["new_value"]) == (event_type, old, new)


def test_reads_fire_nothing(engine: Engine, seen: Seen) -> None:
    engine.get("s", "k")
    engine.list("s")
    engine.list_groups()

    engine.drain(timeout=20)
    assert seen.events == []


def test_an_event_tells_a_deletion_that_removed_nothing(engine: Engine, seen: Seen) -> None:
    engine.delete("s", "missing")
    engine.set("s", "k", None)
    engine.delete("s", "k")

    assert [event.existed for event in seen.wait_for(3)] == [False, False, True]


def test_sequence_numbers_count_the_writes_of_each_scope(engine: Engine, seen: Seen) -> None:
    for scope in ("a", "b", "a"):
        engine.set(scope, "k", 1)
    engine.delete("a", "k")
    engine.get("a", "k")
    engine.update("a", "k", [])

    assert [(event.scope, event.revision) for event in seen.wait_for(5)] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("a", 3),
        ("a", 4),
    ]


def test_writes_without_a_trigger_count_too(engine: Engine) -> None:
    engine.set("s", "k", 1)
    engine.delete("s", "unknown")
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 2)

    assert [event.revision for event in seen.wait_for(1)] == [3]


def test_sequence_numbers_go_on_after_a_restart(open_file_store: Any) -> None:
    first = open_file_store()
    for value in range(3):
        first.set("s", "k", value)
    first.delete("s", "k")
    first.close()

    second = open_file_store()
    seen = Seen()
    second.on_change()(seen)
    second.set("s", "k", 1)

    assert [event.revision for event in seen.wait_for(1)] == [5]


def test_each_handler_may_change_its_event_and_no_other_sees_it(engine: Engine) -> None:
    first, second = Seen(), Seen()

    def spoil(event: StateEvent) -> None:
        event.new_value["list"].append("spoilt")
        event["old_value"]["list"].clear()
        first(event)

    engine.set("s", "k", {"list": [1]})
    engine.on_change(scope="s")(spoil)
    engine.on_change(scope="s")(second)
    engine.set("s", "k", {"list": [2]})

    first.wait_for(1)
    [event] = second.wait_for(1)
    assert (event.old_value, event.new_value) == ({"list": [1]}, {"list": [2]})
    assert engine.get("s", "k") == {"list": [2]}


def test_condition_and_handler_get_the_same_event(engine: Engine) -> None:
    asked, handled = Seen(), Seen()
    engine.on_change(condition=asked)(handled)

    engine.set("s", "k", [1])

    assert handled.wait_for(1)[0] is asked.events[0]
