"""Events, changes, deliveries and results that a unit test makes without an engine, and compares with those of one."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import Struct

from scopestate import (
    Change,
    DeleteResult,
    Delivery,
    EntryView,
    ModifyResult,
    SetResult,
    StateEvent,
    UpdateResult,
    ops,
)
from scopestate.errors import InvalidValue, SchemaViolation, Unsupported
from scopestate.ops.results import CasResult
from scopestate.testing import Engines, VirtualClock, typed


class User(Struct):
    name: str


ADA = {"name": "Ada"}


def test_results_are_equal_to_those_of_an_engine() -> None:
    with Engines() as engines:
        engine = engines.open()
        assert engine.set("s", "k", 1) == SetResult.example(1)
        assert engine.set("s", "k", ADA) == SetResult.example(ADA, old_value=1)
        assert engine.set("s", "k", ADA) != SetResult.example(ADA)
        assert engine.update("s", "k", [ops.Merge({"age": 3})]) == UpdateResult.example(ADA | {"age": 3}, old_value=ADA)
        assert engine.modify("s", "k", lambda _: 2) == ModifyResult.example(2, old_value=ADA | {"age": 3}, revision=5)
        assert engine.compare_and_set("s", "k", 2, 3) == CasResult.example(True)
        assert engine.compare_and_set("s", "k", 2, 3) == CasResult.example(False, 3)
        assert engine.entry("s", "k") == EntryView.example(3, revision=6, key="k")
        users = engine.scope("users", type=User)
        assert users.set("ada", User("Ada")) == SetResult.example(ADA)
        assert SetResult.example(ADA, old_value=ADA) == users.set("ada", User("Ada"))
    assert SetResult.example(None, old_value=None) == SetResult(b"null", b"null")
    assert SetResult.example(1) != UpdateResult.example(1)
    assert repr(SetResult.example(1)) == "SetResult(old_value=None, new_value=1, revision=1)"
    assert DeleteResult.example(1) == DeleteResult(b"1", revision=1, detailed=True)
    when = datetime(2030, 1, 1, tzinfo=UTC)
    assert EntryView.example(1, expires_at=when).expires_at == when
    with pytest.raises(InvalidValue):
        SetResult.example(object())


def test_changes_are_equal_to_those_of_a_watch() -> None:
    with VirtualClock() as clock:
        engine = clock.open()
        with engine.watch("s", snapshot=False) as watch:
            engine.set("s", "k", ADA)
            engine.delete("s", "k")
            found = [next(watch), next(watch)]
    wanted = [
        Change.example(scope="s", key="k", value=ADA),
        Change.example("delete", scope="s", key="k", old_value=ADA, revision=2),
    ]
    assert found == wanted
    assert found != wanted[::-1]
    assert len({*found, *wanted}) == 2
    assert copy.copy(found[0]) == found[0]
    assert Change.example().value == {}
    assert Change.example("synced").key == ""
    assert Change.example(cursor="c").cursor == "c"
    assert Change.example() != Change.example(value=None)
    assert Change.example() != "put"
    assert repr(Change.example(value=1)) == "Change('put', scope='scope', key='key', value=1, revision=1)"


def test_a_handler_of_a_durable_trigger_can_be_called_with_examples() -> None:
    def ship(event: StateEvent, delivery: Delivery) -> str:
        delivery.extend(30)
        return f"{delivery.id}: {event.key}, attempt {delivery.attempt}"

    event = StateEvent.example(key="ada")
    assert ship(event, Delivery.example(event, attempt=2)) == "consumer:1: ada, attempt 2"
    delivery = Delivery.example(event, consumer="ship", position=7, metadata={"region": 1})
    assert (delivery.id, delivery.metadata, delivery.first_at.year) == ("ship:7", {"region": 1}, 2026)
    with pytest.raises(ValueError, match="more than 0"):
        delivery.extend(0)
    with pytest.raises(Unsupported, match="state_store"), delivery.transaction("s"):
        pass


@pytest.mark.parametrize(
    "example",
    [
        StateEvent.example(new_value=ADA),
        Change.example(value=ADA),
        EntryView.example(ADA),
        SetResult.example(ADA),
        UpdateResult.example(ADA),
        ModifyResult.example(ADA),
        CasResult.example(False, ADA),
    ],
    ids=lambda example: type(example).__name__,
)
def test_examples_of_typed_scopes_have_objects(example: Any) -> None:
    names = {"Change": "value", "EntryView": "value", "CasResult": "current"}
    name = names.get(type(example).__name__, "new_value")
    shown = typed(example, User)
    assert getattr(shown, name) == User("Ada")
    assert isinstance(shown, type(example))
    assert typed(example, User).to_dict() == example.to_dict()
    with pytest.raises(SchemaViolation):
        getattr(typed(example, int), name)
