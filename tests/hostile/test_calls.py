"""Hostile input to the functions: an error of our tree or a proper result, never a half-applied write."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from effort import size
from hostile.weird import Fickle, Liar, Rude, RudeDict, RudeMapping, RudeStr, deep, zoo
from hypothesis import HealthCheck, given, settings
from reliability.figures import record

from scopestate import Engine, ScopestateError
from scopestate.errors import DeserializationError, InvalidValue
from scopestate.ops.functions import BUILT_IN
from scopestate.persistence import FileAdapter

OpenEngine = Callable[..., Engine]

QUICK = settings(max_examples=size(400, 1500), deadline=None, suppress_health_check=list(HealthCheck))

cases = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Keep how many hostile calls were made."""
    yield
    record("hostile input", calls=next(cases))


def contents(engine: Engine) -> Any:
    """Everything that a failed call might have touched: memory, what is to be saved, and the numbers of writes."""
    return {
        name: (
            dict(actor._values or {}),
            dict(actor._revisions),
            dict(actor._deadlines),
            dict(actor._dirty or {}),
            dict(actor._created),
            list(actor._removed),
            actor._sequence,
        )
        for name, actor in engine._scopes.items()
        if actor._sequence
    }


def attempt(engine: Engine, call: Callable[[], Any]) -> Any:
    """Make a call that may fail with an error of our tree; if it does, nothing has changed."""
    next(cases)
    before = contents(engine)
    try:
        return call()
    except ScopestateError as error:
        refusal = error
    assert refusal.code
    assert str(refusal)
    assert contents(engine) == before
    return refusal


def sound(engine: Engine) -> None:
    """The state is plain JSON under plain strings, each key has its revision, and no thread holds a claim."""
    for name, (values, revisions, deadlines, dirty, created, _, number) in contents(engine).items():
        assert type(name) is str
        for key in (*values, *revisions, *deadlines, *dirty, *created):
            assert type(key) is str
        for data in values.values():
            msgspec.json.decode(data)
        assert revisions.keys() == values.keys()
        assert all(0 < revision <= number for revision in revisions.values())
        if engine._scopes[name]._dirty is not None:
            assert created.keys() == values.keys()
            assert all(created[key] <= revision for key, revision in revisions.items())
        assert not engine._scopes[name]._claim


# --- every field of every function, with everything ------------------------------------------------------------------


@pytest.mark.parametrize("function_id", sorted(BUILT_IN))
@pytest.mark.parametrize("durability", ["memory", "interval"])
def test_any_object_in_any_field_is_refused_or_stored_whole(
    open_engine: OpenEngine, function_id: str, durability: str
) -> None:
    engine = open_engine(durability, save_interval_ms=3_600_000)
    engine.set("s", "k", {"a": 1})
    good = {"scope": "s", "key": "k", "value": 1, "ops": [{"type": "increment", "path": "a", "by": 1}]}

    attempt(engine, lambda: engine.call(function_id, good))
    for thing in zoo():
        attempt(engine, lambda thing=thing: engine.call(function_id, thing))
        for field in good:
            payload = {**good, field: thing}
            attempt(engine, lambda payload=payload: engine.call(function_id, payload))
            attempt(engine, lambda payload=payload: asyncio.run(engine.aio.call(function_id, payload)))
            attempt(engine, lambda payload=payload: engine.call(function_id, RudeDict(payload)))
        for name in ("type", "path", "by", "value"):
            ops = [{"type": "set", "path": "a", "value": 1}, {"type": "increment", "path": "a", "by": 1, name: thing}]
            attempt(engine, lambda ops=ops: engine.call(function_id, {**good, "ops": ops}))
    sound(engine)
    engine.flush()


@pytest.mark.parametrize("function_id", sorted(BUILT_IN))
def test_a_mapping_that_raises_is_an_error_of_our_tree(open_engine: OpenEngine, function_id: str) -> None:
    engine = open_engine()

    if function_id == "state::list_groups":
        assert engine.call(function_id, RudeMapping()) == {"groups": []}
    else:
        with pytest.raises(DeserializationError):
            engine.call(function_id, RudeMapping(scope="s", key="k", value=1, ops=[]))


@pytest.mark.parametrize(
    "function_id", ["", "state::", "state::set ", "STATE::SET", "__init__", "\ud800", "x" * 10_000]
)
def test_an_unknown_function_id_is_an_error_of_our_tree(open_engine: OpenEngine, function_id: str) -> None:
    assert isinstance(attempt(open_engine(), lambda: open_engine().call(function_id, {})), ScopestateError)


def test_any_object_as_a_function_id_is_an_error_of_our_tree(open_engine: OpenEngine) -> None:
    engine = open_engine()

    for thing in zoo():
        assert isinstance(attempt(engine, lambda thing=thing: engine.call(thing, {})), ScopestateError)


# --- the typed methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
def test_any_object_as_a_value_is_refused_or_stored_whole(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability, save_interval_ms=3_600_000)

    for thing in zoo():
        result = attempt(engine, lambda thing=thing: engine.set("s", "k", thing))
        if not isinstance(result, ScopestateError):
            assert json.dumps(engine.get("s", "k")) == json.dumps(result.new_value)
        attempt(engine, lambda thing=thing: engine.update("s", "k", [{"type": "set", "path": "", "value": thing}]))
    sound(engine)


@pytest.mark.parametrize("durability", ["memory", "interval"])
def test_a_key_with_bad_manners_never_leaves_half_a_write(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability, save_interval_ms=3_600_000)
    engine.set("s", "k", 0)
    for name in (RudeStr("k"), Liar("k"), Liar("other"), *(fickle(left) for left in range(8))):
        for write in (
            lambda name=name: engine.set("s", name, 1),
            lambda name=name: engine.update("s", name, [{"type": "increment", "path": "", "by": 1}]),
            lambda name=name: engine.delete("s", name),
        ):
            engine.set("s", "k", 0)
            before = contents(engine)
            try:
                write()
            except (Rude, ScopestateError):
                assert contents(engine) == before
            sound(engine)
    engine.flush()
    assert engine.health().ok


def fickle(left: int) -> Fickle:
    key = Fickle("k")
    key.left = left
    return key


def test_a_key_that_only_looks_like_text_is_stored_as_plain_text(open_engine: OpenEngine) -> None:
    engine = open_engine("interval")
    engine.set("s", "k", 1)

    engine.set("s", Liar("other"), 2)
    engine.call("state::set", {"scope": Liar("s"), "key": Liar("third"), "value": 3})

    assert list(engine._scopes["s"]._values or {}) == ["k", "other", "third"]


# --- text ------------------------------------------------------------------------------------------------------------

NAMES = [
    "", "\x00", "a\x00b", "../../etc/passwd", "/", "C:\\x", ".", "..", "__proto__", "constructor", "e\u0301", "\u202e",
    "\n", "%s%n", "'; DROP TABLE state; --", "x" * 10_000, "\U0001f600", "\ufffe", "state.db", "NUL", " ",
]  # fmt: skip


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_every_name_is_a_name_and_comes_back_after_a_restart(open_engine: OpenEngine, durability: str) -> None:
    engine = open_engine(durability)
    for number, name in enumerate(NAMES):
        engine.set(name, name, number)
        engine.set("all", name, number)
    engine.close()
    again = open_engine(durability)

    assert again.list_groups() == sorted([*NAMES, "all"], key=lambda name: name.encode())
    assert again.list("all") == list(range(len(NAMES)))
    for number, name in enumerate(NAMES):
        assert again.get(name, name) == number


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb", "\udc80" * 1000])
def test_a_lone_surrogate_is_no_name(open_engine: OpenEngine, name: str) -> None:
    engine = open_engine("interval", save_interval_ms=3_600_000)

    for call in (
        lambda: engine.set(name, "k", 1),
        lambda: engine.set("s", name, 1),
        lambda: engine.get("s", name),
        lambda: engine.get(name, "k"),
        lambda: engine.delete("s", name),
        lambda: engine.update("s", name, []),
        lambda: engine.list(name),
        lambda: engine.call("state::set", {"scope": "s", "key": name, "value": 1}),
        lambda: asyncio.run(engine.aio.set("s", name, 1)),
        lambda: asyncio.run(engine.aio.get(name, "k")),
        lambda: engine.scope(name),
    ):
        assert isinstance(attempt(engine, call), DeserializationError)
    engine.flush()
    assert engine.list_groups() == []


def test_values_deeper_than_128_levels_name_the_place(open_engine: OpenEngine) -> None:
    engine = open_engine()
    engine.set("s", "k", deep(128))

    with pytest.raises(InvalidValue, match="128"):
        engine.set("s", "k", deep(129))
    with pytest.raises(ScopestateError):
        engine.update("s", "k", [{"type": "append", "path": "", "value": deep(200)}])

    assert engine.get("s", "k") == deep(128)


def test_an_update_cannot_nest_a_value_deeper_than_the_limit_step_by_step(open_engine: OpenEngine) -> None:
    engine = open_engine("interval", save_interval_ms=3_600_000)
    engine.set("s", "k", {"a": deep(127)})
    before = contents(engine)

    result = attempt(engine, lambda: engine.update("s", "k", [{"type": "append", "path": "a", "value": deep(127)}]))

    assert isinstance(result, ScopestateError)
    assert contents(engine) == before


def test_huge_numbers_are_floats_or_refused(open_engine: OpenEngine) -> None:
    engine = open_engine()

    assert engine.set("s", "k", 2**64).new_value == float(2**64)
    assert engine.set("s", "k", 2**64 - 1).new_value == 2**64 - 1
    for number in (10**400, float("inf"), float("nan"), -(10**400)):
        assert isinstance(attempt(engine, lambda number=number: engine.set("s", "k", number)), InvalidValue)
    assert engine.get("s", "k") == 2**64 - 1


# --- fuzz ------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
ZOO = zoo()
# By number: hypothesis would ask these objects for their hash.
ANYTHING = JSON | st.integers(0, len(ZOO) - 1).map(lambda number: ZOO[number])
FIELDS = st.sampled_from(["scope", "key", "value", "data", "ops", "path", "__proto__", ""])
OP = st.fixed_dictionaries(
    {"type": st.sampled_from(["set", "merge", "increment", "decrement", "append", "remove"]) | ANYTHING},
    optional={
        "path": st.sampled_from(["", "a", "__proto__", ["a", "b"], ["x"] * 33]) | ANYTHING,
        "by": ANYTHING,
        "value": ANYTHING,
    },
)
PAYLOAD = st.one_of(
    ANYTHING,
    st.dictionaries(FIELDS, ANYTHING, max_size=5),
    st.fixed_dictionaries(
        {"scope": st.sampled_from("st"), "key": st.sampled_from("kl")},
        optional={"value": ANYTHING, "data": ANYTHING, "ops": st.lists(OP, max_size=4) | ANYTHING},
    ),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("fuzz") / "store"
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 3_600_000}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine.from_config({"workers": [worker], "limits": {"max_value_bytes": 1_000_000}}) as engine:
        engine.register_function("test::echo", lambda payload: payload)
        yield engine
        memory = {scope: engine.list(scope) for scope in engine.list_groups()}
    adapter = FileAdapter(directory)
    assert adapter.check() == []
    saved = {
        name: [msgspec.json.decode(row.json) for row in adapter.load(name).entries.values()]
        for name in adapter.scopes()
    }
    assert repr(saved) == repr(memory)
    adapter.close()


@QUICK
@given(function_id=st.sampled_from([*sorted(BUILT_IN), "test::echo"]), payload=PAYLOAD)
def test_fuzzed_calls_give_a_json_result_or_an_error_of_our_tree(
    fuzzed: Engine, function_id: str, payload: Any
) -> None:
    result = attempt(fuzzed, lambda: fuzzed.call(function_id, payload))

    if not isinstance(result, ScopestateError):
        json.dumps(result, allow_nan=False)
    sound(fuzzed)


@QUICK
@given(config=ANYTHING | st.dictionaries(st.sampled_from(["scope", "key", "condition_function_id", "x"]), ANYTHING))
def test_fuzzed_registrations_give_a_trigger_or_an_error_of_our_tree(fuzzed: Engine, config: Any) -> None:
    before = len(fuzzed.triggers())
    try:
        fuzzed.register_trigger(function_id="test::echo", config=config).unregister()
    except ScopestateError:
        next(cases)
    assert len(fuzzed.triggers()) == before
