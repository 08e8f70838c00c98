"""Random schemas, values and writes: nothing is ever stored that does not fit, and all that fits is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate import Engine, ops
from scopestate.config import from_mapping
from scopestate.errors import SchemaViolation

FIELDS = ("a", "b")
KEYS = ("x", "y")

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "text", "a@b.c"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=2),
    max_leaves=5,
)
simple = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "boolean", "null", "array", "object"])}),
    st.fixed_dictionaries({"enum": st.lists(scalars, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"minimum": st.integers(-2, 2)}),
    st.fixed_dictionaries({"minLength": st.integers(0, 3)}),
    st.just({"format": "email"}),
    st.just({}),
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from(FIELDS), inner)}
        ),
        st.fixed_dictionaries(
            {"required": st.lists(st.sampled_from(FIELDS), unique=True), "additionalProperties": inner}
        ),
        st.fixed_dictionaries({"items": inner, "maxItems": st.integers(0, 2)}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=3,
)
paths = st.sampled_from(("", *FIELDS))
steps = st.one_of(
    st.builds(ops.Set, paths, values),
    st.builds(ops.Increment, paths, st.integers(-2, 2)),
    st.builds(ops.Append, paths, scalars),
    st.builds(ops.Remove, st.sampled_from(FIELDS)),
    st.builds(ops.Merge, st.dictionaries(st.sampled_from(FIELDS), scalars, max_size=2)),
)

Write = Callable[[Engine], object]


def _set(key: str, value: Any) -> Write:
    return lambda engine: engine.set("s", key, value)


def _timed(key: str, value: Any) -> Write:
    return lambda engine: engine.set("s", key, value, ttl=3600)


def _update(key: str, some: list[Any]) -> Write:
    return lambda engine: engine.update("s", key, some)


def _modify(key: str, value: Any) -> Write:
    return lambda engine: engine.modify("s", key, lambda old: [old, value])


def _swap(key: str, value: Any) -> Write:
    return lambda engine: engine.compare_and_set("s", key, engine.get("s", key), value)


def _delete(key: str) -> Write:
    return lambda engine: engine.delete("s", key)


def _batch(first: Any, second: Any) -> Write:
    def commit(engine: Engine) -> None:
        with engine.scope("s").batch() as batch:
            batch.set("x", first)
            batch.set("y", second)

    return commit


def _transact(value: Any, some: list[Any]) -> Write:
    def work(tx: Any) -> None:
        tx.set("x", value)
        tx.set("y", some)
        tx.set("x", some)

    return lambda engine: engine.scope("s").transact(work)


keys = st.sampled_from(KEYS)
writes = st.one_of(
    st.builds(_set, keys, values),
    st.builds(_timed, keys, values),
    st.builds(_update, keys, st.lists(steps, min_size=1, max_size=3)),
    st.builds(_modify, keys, values),
    st.builds(_swap, keys, values),
    st.builds(_delete, keys),
    st.builds(_batch, values, values),
    st.builds(_transact, values, st.lists(values, max_size=2)),
)


@settings(max_examples=50, deadline=None)
@given(schema=schemas, program=st.lists(writes, min_size=1, max_size=8))
def test_what_is_stored_fits_and_what_fits_is_stored(schema: dict[str, Any], program: list[Write]) -> None:
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    with Engine(from_mapping({"scopes": [{"name": "s", "schema": schema}]})) as held, Engine() as free:
        for write in program:
            before = dict(held.items("s"))
            free.delete_range("s", prefix="")
            for key, value in before.items():
                free.set("s", key, value)
            write(free)
            wanted = dict(free.items("s"))
            written = [wanted[key] for key in wanted if key not in before or repr(wanted[key]) != repr(before[key])]
            if all(judge.is_valid(value) for value in written):
                write(held)
                assert dict(held.items("s")) == wanted
            else:
                with pytest.raises(SchemaViolation):
                    write(held)
                assert dict(held.items("s")) == before
            assert all(judge.is_valid(value) for value in dict(held.items("s")).values())
