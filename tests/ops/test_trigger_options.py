"""What a trigger may be given, and which events it wants."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from scopestate import StateEvent
from scopestate.ops.deliveries import Retry
from scopestate.ops.triggers import OPTIONS, Trigger, TriggerOptions, fields_differ, read_options


def trigger(**options: Any) -> Trigger:
    fields, mistakes = read_options(options)
    assert not mistakes
    return Trigger("t", "f", **fields)


def event(old: bytes | None, new: bytes | None, scope: str = "orders", key: str = "o-1") -> StateEvent:
    kind: Any = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
    return StateEvent(kind, scope, key, old, new, 1)


def test_nothing_given_is_a_trigger_for_everything() -> None:
    assert read_options({}) == ({"order": "scope"}, [])
    assert trigger() == Trigger("t", "f")
    assert trigger(**dict.fromkeys(OPTIONS)) == Trigger("t", "f")


def test_the_options_of_python_are_those_that_are_read() -> None:
    exact = {"scope", "key", "condition_function_id", "events"}

    assert exact | set(TriggerOptions.__optional_keys__) == set(OPTIONS)
    fields = {field.name for field in msgspec.structs.fields(Trigger)}
    assert fields == set(OPTIONS) - {"metadata"} | {"metadata_json", "trigger_id", "function_id"}


@pytest.mark.parametrize(
    ("given", "order", "concurrency"),
    [
        ({}, "scope", 8),
        ({"durable": "c"}, "key", 8),
        ({"durable": "c", "order": "none", "concurrency": 3}, "none", 3),
        ({"order": "trigger"}, "trigger", 1),
        ({"batch": 10}, "trigger", 1),
        ({"batch": 10, "order": "scope"}, "scope", 8),
    ],
)
def test_the_order_follows_from_what_was_given(given: dict[str, Any], order: str, concurrency: int) -> None:
    made = trigger(**given)

    assert (made.order, made.concurrency) == (order, concurrency)


def test_seconds_are_numbers_or_timedeltas() -> None:
    made = trigger(debounce=timedelta(milliseconds=500), durable="c", ack_wait=7)

    assert (made.debounce, made.debounce_max, made.ack_wait) == (0.5, 5.0, 7.0)


def test_a_durable_trigger_retries_unless_told_otherwise() -> None:
    assert trigger(durable="c").retry == Retry()
    assert trigger(durable="c", retry={"attempts": 3, "first": 0.5}).retry == Retry(attempts=3, first=0.5)


def test_metadata_is_kept_as_text_and_read_anew_each_time() -> None:
    made = trigger(metadata={"tags": ["a"]})

    first = made.metadata
    assert first == {"tags": ["a"]}
    first["tags"].append("b")
    assert made.metadata == {"tags": ["a"]}
    assert hash(made) == hash(trigger(metadata={"tags": ["a"]}))


def test_the_options_that_were_given_can_be_shown() -> None:
    assert trigger().options() == {}
    assert trigger(scope="s", durable="c", retry={"attempts": 3}, metadata={"a": 1}, fields=["x"]).options() == {
        "scope": "s",
        "durable": "c",
        "order": "key",
        "retry": {"attempts": 3, "first": 1.0, "factor": 2.0, "longest": 300.0, "jitter": 0.2},
        "fields": ("x",),
        "metadata": {"a": 1},
    }


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "scope": ({"scope": 1}, "scope", "`scope` of a trigger is a string or null, not number"),
    "prefix": ({"prefix": ["a"]}, "prefix", "`prefix` of a trigger is a string or null, not array"),
    "both scopes": (
        {"scope": "s", "scope_prefix": "s"},
        "scope_prefix",
        "`scope` and `scope_prefix` of a trigger exclude each other: give one of them",
    ),
    "both keys": ({"key": "", "prefix": ""}, "prefix", "`key` and `prefix` of a trigger exclude each other"),
    "a kind": ({"events": ["made"]}, "events", "`events` of a trigger has 'made'; the kinds are created, updated"),
    "no kind": ({"events": []}, "events", "`events` of a trigger is empty: it would never fire"),
    "a text of kinds": ({"events": "created"}, "events", "`events` of a trigger is a list of kinds or null, not str"),
    "a field": (
        {"fields": "status"},
        "fields",
        "`fields` of a trigger is a list of names of top-level fields, not str",
    ),
    "no field": ({"fields": ()}, "fields", "`fields` of a trigger has 1 to 1000 names, not 0"),
    "a field's name": ({"fields": [1]}, "fields", "`fields` of a trigger has number"),
    "a flag": ({"only_if_changed": 1}, "only_if_changed", "`only_if_changed` of a trigger is true or false, not num"),
    "an order": ({"order": "keys"}, "order", "`order` of a trigger is one of scope, key, none, trigger, not 'keys'"),
    "a number": ({"concurrency": 0}, "concurrency", "`concurrency` of a trigger is a whole number from 1 to 10,000, n"),
    "true is no number": (
        {"batch": True},
        "batch",
        "`batch` of a trigger is a whole number from 1 to 10,000, not bool",
    ),
    "nothing to bound": ({"batch_wait": 1}, "batch_wait", "`batch_wait` of a trigger has no effect without `batch`"),
    "no wait": ({"debounce": 0}, "debounce", "`debounce` of a trigger is a number of seconds above 0"),
    "no end": ({"debounce": math.inf}, "debounce", "`debounce` of a trigger is a number of seconds above 0 up to a y"),
    "no number": ({"debounce": math.nan}, "debounce", "`debounce` of a trigger is a number of seconds above 0"),
    "a text of seconds": ({"debounce": "1s"}, "debounce", "`debounce` of a trigger is a number of seconds, not str"),
    "large": ({"debounce": 10**400}, "debounce", "`debounce` of a trigger is a number of seconds above 0 up to a"),
    "too short": ({"debounce": 2, "debounce_max": 1}, "debounce_max", "`debounce_max` of a trigger is not less than"),
    "alone": ({"debounce_max": 1}, "debounce_max", "`debounce_max` of a trigger has no effect without `debounce`"),
    "not durable": ({"ack_wait": 1}, "ack_wait", "`ack_wait` is for durable triggers: give `durable`"),
    "not durable either": ({"retry": Retry()}, "retry", "`retry` is for durable triggers: give `durable`"),
    "a name": ({"durable": ""}, "durable", "`durable` of a trigger is a name of 1 to 255 printable characters"),
    "two lines": ({"durable": "a\nb"}, "durable", "`durable` of a trigger is a name of 1 to 255 printable"),
    "a retry": ({"durable": "c", "retry": 3}, "retry", "`retry` is a Retry, or an object with attempts, first"),
    "attempts": ({"durable": "c", "retry": {"attempts": 0}}, "retry", "`attempts` of a retry is"),
    "giving up": ({"durable": "c", "on_giving_up": "stop"}, "on_giving_up", "`on_giving_up` of a trigger is one of sk"),
    "one at a time": ({"order": "trigger", "concurrency": 2}, "concurrency", "`concurrency` contradicts `order` trig"),
    "metadata": ({"metadata": [1]}, "metadata", "`metadata` of a trigger is an object, not array"),
    "no JSON": ({"metadata": {"a": {1}}}, "metadata", "`metadata` of a trigger is not JSON: "),
    "much": (
        {"metadata": {"a": "x" * 70_000}},
        "metadata",
        "`metadata` of a trigger has 70,008 bytes of JSON; at most",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    given, option, words = MISTAKES[name]

    [(found, said)] = read_options(given)[1]

    assert (found, said[: len(words)]) == (option, words)


OBJECT, OTHER = b'{"status":"new","total":1}', b'{"total":1,"status":"new"}'


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (None, OBJECT, True),
        (OBJECT, None, True),
        (OBJECT, OTHER, False),
        (OBJECT, b'{"status":"new","total":2}', False),
        (OBJECT, b'{"status":"old","total":1}', True),
        (b'{"status":1}', b'{"status":1.0}', True),
        (b'{"status":{"a":1,"b":2}}', b'{"status":{"b":2,"a":1}}', False),
        (b'{"total":1}', b'{"status":null,"total":1}', True),
        (b"1", b"2", False),
        (None, b"null", False),
        (b'["status"]', b'"status"', False),
        (b"1", OBJECT, True),
        (None, None, False),
    ],
)
def test_a_field_differs_if_it_changed_came_or_went(old: bytes | None, new: bytes | None, expected: bool) -> None:
    assert fields_differ(old, new, ("status",)) is expected
    assert trigger(fields=["status"]).matches(event(old, new)) is expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (None, OBJECT, True),
        (OBJECT, None, True),
        (OBJECT, OTHER, False),
        (b"1", b"1.0", True),
        (None, b"null", True),
        (None, None, False),
    ],
)
def test_only_a_change_of_the_value_counts_if_asked_for(old: bytes | None, new: bytes | None, expected: bool) -> None:
    assert trigger(only_if_changed=True).matches(event(old, new)) is expected
    assert trigger().matches(event(old, new))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scope": "orders", "key": "o-1"}, True),
        ({"scope": "order"}, False),
        ({"scope_prefix": "order"}, True),
        ({"scope_prefix": "orders-"}, False),
        ({"prefix": "o-"}, True),
        ({"prefix": "o-1"}, True),
        ({"prefix": "o-12"}, False),
        ({"prefix": "", "scope_prefix": ""}, True),
        ({"key": "o-"}, False),
        ({"events": ["updated", "deleted"]}, False),
        ({"events": ["created"]}, True),
    ],
)
def test_each_filter_must_fit(options: dict[str, Any], expected: bool) -> None:
    assert trigger(**options).matches(event(None, OBJECT)) is expected
