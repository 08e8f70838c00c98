"""A scope as a mapping: everything that a dict can do, each method in one step, in memory and in files."""

from __future__ import annotations

import sys
import threading
from collections import ChainMap
from collections.abc import ItemsView, KeysView, Mapping, MutableMapping, ValuesView
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watching import Seen, in_thread

from scopestate import Engine
from scopestate.errors import BatchTooLarge, DeserializationError, InvalidValue
from scopestate.mapping import ScopeMapping
from tests.engine.conftest import OpenEngine


@pytest.fixture
def users(open_store: OpenEngine) -> ScopeMapping:
    return open_store().scope("users").mapping()


@pytest.fixture
def rows(engine: Engine) -> ScopeMapping:
    return engine.mapping("rows")


def test_it_is_a_mutable_mapping_that_reads_and_writes_the_scope(users: ScopeMapping) -> None:
    assert isinstance(users, MutableMapping)
    assert not users
    users["b"] = {"n": [1]}
    users["a"] = None
    assert users
    assert (users["a"], users["b"], len(users)) == (None, {"n": [1]}, 2)
    assert ("a" in users, "x" in users, 5 in users) == (True, False, False)
    assert (users.get("x"), users.get("x", 7), users.get("a", 7), users.get(5, 7)) == (None, 7, None, 7)  # type: ignore[call-overload]
    assert list(users) == ["a", "b"]
    assert list(reversed(users)) == ["b", "a"]
    del users["a"]
    assert users == {"b": {"n": [1]}}
    assert users != {"b": 1}
    assert users != 5
    users.clear()
    assert users == {}
    assert repr(users) == "<mapping of scope 'users'>"


def test_a_missing_key_is_a_key_error(users: ScopeMapping) -> None:
    for call in (
        lambda: users["x"],
        lambda: users[5],  # type: ignore[index]
        lambda: users.pop("x"),
        lambda: users.pop(5),  # type: ignore[call-overload]
        lambda: users.__delitem__("x"),
        users.popitem,
    ):
        with pytest.raises(KeyError):
            call()
    assert users.pop("x", None) is None
    assert users.pop("x", default=7) == 7


def test_values_are_copies(users: ScopeMapping) -> None:
    users["a"] = {"n": [1]}
    users["a"]["n"].append(2)
    assert users["a"] == {"n": [1]}


def test_views_are_live_and_each_iteration_shows_one_moment(users: ScopeMapping) -> None:
    keys, items, values = users.keys(), users.items(), users.values()
    users.update(a=1, b=2)
    assert (list(keys), list(items), list(values)) == (["a", "b"], [("a", 1), ("b", 2)], [1, 2])
    assert (isinstance(keys, KeysView), isinstance(items, ItemsView), isinstance(values, ValuesView)) == (True,) * 3
    assert (len(keys), len(items), len(values)) == (2, 2, 2)
    assert ("a" in keys, ("a", 1) in items, ("a", 2) in items, 2 in values, 3 in values) == (
        True,
        True,
        False,
        True,
        False,
    )
    assert keys & {"a", "x"} == {"a"}
    assert keys == {"a", "b"}
    iterated = iter(items)
    users.clear()
    assert list(iterated) == [("a", 1), ("b", 2)]
    assert list(keys) == []
    users["c"] = 3
    assert list(reversed(items)) == [("c", 3)]


def test_setdefault_pop_and_popitem(users: ScopeMapping) -> None:
    assert users.setdefault("a", [1]) == [1]
    assert users.setdefault("a", [2]) == [1]
    assert users.setdefault("n") is None
    assert "n" in users
    users["z"] = 5
    assert users.popitem() == ("z", 5)
    assert users.pop("n") is None
    assert users.pop("a") == [1]
    assert users == {}


def test_update_takes_what_a_dict_takes(users: ScopeMapping) -> None:
    users.update({"a": 1, "b": 1})
    users.update([("b", 2), ("c", 3)], d=4)
    users.update(iter([("e", 5)]))
    users.update(users)
    users |= {"f": 6}
    users |= [("g", 7)]
    assert users == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}
    assert (users | {"a": 0})["a"] == 0
    assert ({"a": 0} | users)["a"] == 1
    assert users["a"] == 1
    assert isinstance(users.copy(), dict)
    assert ChainMap({}, users)["g"] == 7  # type: ignore[arg-type]  # what typeshed asks for


def test_update_is_one_step_or_nothing(rows: ScopeMapping) -> None:
    for wrong, error in (
        ({"a": 1, "b": {2}}, InvalidValue),
        ({"a": 1, 5: 2}, DeserializationError),
        ({f"k{number}": 1 for number in range(1001)}, BatchTooLarge),
        (5, TypeError),
    ):
        with pytest.raises(error):
            rows.update(wrong)  # type: ignore[arg-type]
    assert rows == {}


def test_events_are_those_of_the_changes(engine: Engine) -> None:
    seen, rows = Seen(), engine.mapping("rows")
    engine.on_change(scope="rows")(seen)
    rows["a"] = 1
    rows.setdefault("a", 2)
    rows.pop("x", None)
    rows.pop("a")
    rows.update({"b": 1, "c": 1})
    rows.popitem()
    engine.drain()
    assert [(event.event_type, event.key) for event in seen.wait_for(5)] == [
        ("state:created", "a"),
        ("state:deleted", "a"),
        ("state:created", "b"),
        ("state:created", "c"),
        ("state:deleted", "c"),
    ]


# ------------------------------------------------------------------------------------------------------ one moment


def changing(rows: ScopeMapping) -> Any:
    """Have another thread change all keys together until the result is called."""
    enough = threading.Event()

    def write() -> None:
        number = 0
        while not enough.is_set():
            number += 1
            rows.update({f"k{place}": number for place in range(5)})
            with rows._scope.batch() as b:
                for place in range(5):
                    b.delete(f"k{place}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or one thread makes all of a copy before the other one runs
    wait = in_thread(write)

    def stop() -> None:
        sys.setswitchinterval(interval)
        enough.set()
        wait()

    return stop


def no_arguments() -> None:
    pass


def keywords(**given: Any) -> dict[str, Any]:
    return given


@pytest.mark.parametrize(
    "copy",
    [
        dict,
        lambda mapping: {**mapping},
        lambda mapping: keywords(**mapping),
        lambda mapping: {} | mapping,
        lambda mapping: mapping | {},
        lambda mapping: mapping.copy(),
        lambda mapping: dict(mapping.items()),
    ],
    ids=["dict", "unpack", "keywords", "or", "ror", "copy", "items"],
)
def test_a_copy_shows_one_moment(copy: Any, rows: ScopeMapping) -> None:
    stop, seen = changing(rows), list[int]()
    try:
        while len(set(seen)) < 2 or len(seen) < 300:
            copied = copy(rows)
            assert len(copied) in (0, 5)
            assert len(set(copied.values())) <= 1
            seen.append(len(copied))
    finally:
        stop()
    assert rows._copies == {}


class Disturbed(ScopeMapping):
    """A mapping whose scope is changed by another caller before each value is read."""

    def __getitem__(self, key: str) -> Any:
        with self._scope.batch() as b:
            b.set("a", "changed")
            b.delete("b")
        return super().__getitem__(key)


@pytest.mark.parametrize(
    "copy", [dict, lambda mapping: {**mapping}, lambda mapping: keywords(**mapping)], ids=["dict", "unpack", "keywords"]
)
def test_a_copy_shows_the_moment_at_which_it_began(copy: Any, engine: Engine) -> None:
    rows = Disturbed(engine.scope("rows"))
    rows.update(a=1, b=2)

    assert copy(rows) == {"a": 1, "b": 2}
    assert rows.copy() == {"a": "changed"}
    assert rows._copies == {}


def test_code_that_reads_key_by_key_sees_what_is_there_now(rows: ScopeMapping) -> None:
    rows.update(a=1, b=1)
    read = []
    keys = rows.keys()
    for key in keys:
        rows._scope.set(key, 2)
        read.append(rows[key])
    listed = list(rows.keys())
    rows._scope.set("a", 3)
    read += [rows[key] for key in listed]
    assert read == [2, 2, 3, 2]
    assert rows._copies == {}


def test_a_copy_that_broke_off_does_no_harm(rows: ScopeMapping) -> None:
    rows.update(a=1, b=1)

    with pytest.raises(TypeError):
        no_arguments(**rows)
    rows["a"] = 5
    assert (rows["a"], rows["b"], dict(rows)) == (5, 1, {"a": 5, "b": 1})


KEYS = st.text(st.characters(codec="utf-8"), max_size=2)
VALUES = st.none() | st.integers(-5, 5) | st.lists(st.integers(0, 3), max_size=2)
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "pop", "del", "default", "update", "popitem", "clear", "ior"]), KEYS, VALUES),
    max_size=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=STEPS)
def test_it_does_what_a_dict_does(steps: list[tuple[str, str, Any]], engine: Engine) -> None:
    rows: MutableMapping[str, Any] = engine.mapping("rows")
    rows.clear()
    model: dict[str, Any] = {}
    for kind, key, value in steps:
        outcomes = [_outcome(target, kind, key, value) for target in (model, rows)]
        assert outcomes[0] == outcomes[1]
        assert rows == model
        assert len(rows) == len(model)
        assert list(rows) == sorted(model)
        assert dict(rows) == model
        assert set(rows.items() if all(isinstance(one, int) for one in model.values()) else ()) <= set(
            model.items() if all(isinstance(one, int) for one in model.values()) else ()
        )


def _outcome(target: MutableMapping[str, Any], kind: str, key: str, value: Any) -> Any:
    try:
        match kind:
            case "set":
                target[key] = value
            case "pop":
                return target.pop(key)
            case "del":
                del target[key]
            case "default":
                return target.setdefault(key, value)
            case "update":
                target.update({key: value, key + "x": value})
            case "ior":
                target |= {key: value}  # type: ignore[operator]
            case "popitem":
                # The order of the two differs: what is taken from one is taken from the other.
                if not isinstance(target, Mapping) or not target:
                    target.popitem()
                return target.pop(max(target))
            case "clear":
                target.clear()
    except KeyError:
        return "KeyError"
    return None
