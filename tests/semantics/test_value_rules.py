"""A type or a schema in the rule of a scope, at each place: what does not fit it is written by no call."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from places import Events, Place, restarted

from scopestate import Engine, messages, ops
from scopestate.aio import AioEngine
from scopestate.errors import Conflict, SchemaViolation, UpdateRefused, WouldDeadlock


class User(msgspec.Struct):
    name: str
    logins: int = 0


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "logins": {"type": "integer"}},
    "required": ["name"],
}
ADA: dict[str, Any] = {"name": "Ada", "logins": 1}
MISFIT: Any = {"name": 7}
BREAKS = [ops.Set("name", 7)]
PLUS_ONE = [ops.Increment("logins", 1)]

both = pytest.mark.parametrize("rule", [{"type": User}, {"schema": SCHEMA}], ids=["type", "schema"])


def opened(place: Place, **rule: Any) -> Engine:
    return place.open(scopes=[{"name": "users", **rule}])


def refused(engine: Engine) -> dict[str, Callable[[], object]]:
    users = engine.scope("users")

    def in_transaction(tx: Any) -> None:
        tx.set("other", ADA)
        tx.set("ada", MISFIT)

    def in_batch() -> None:
        with users.batch() as batch:
            batch.set("other", ADA)
            batch.update("ada", BREAKS)

    def sets_in_batch() -> None:
        with users.batch() as batch:
            batch.set("other", ADA)
            batch.set("new", MISFIT)

    calls: dict[str, Callable[[], object]] = {
        "set": lambda: users.set("ada", MISFIT),
        "set of a new key": lambda: users.set("new", MISFIT),
        "set with a deadline": lambda: users.set("ada", MISFIT, ttl=60),
        "set with a key": lambda: users.set("ada", MISFIT, idempotency_key="once"),
        "set on a condition": lambda: users.set("new", MISFIT, if_absent=True),
        "update": lambda: users.update("ada", BREAKS),
        "update, atomic": lambda: users.update("ada", BREAKS, atomic=True),
        "update of a new key": lambda: users.update("new", PLUS_ONE),
        "compare and set": lambda: users.compare_and_set("ada", ADA, MISFIT),
        "modify": lambda: users.modify("ada", lambda old: MISFIT),
        "transact": lambda: users.transact(in_transaction),
        "batch": in_batch,
        "batch of sets": sets_in_batch,
        "mapping": lambda: users.mapping().__setitem__("ada", MISFIT),
        "a message": lambda: engine.ask(messages.Set("users", "ada", MISFIT)),
        "a function": lambda: engine.call("state::set", {"scope": "users", "key": "ada", "value": MISFIT}),
    }
    return calls


@both
def test_what_does_not_fit_is_written_by_no_call_and_fires_no_event(place: Place, rule: dict[str, Any]) -> None:
    engine = opened(place, **rule)
    engine.set("users", "ada", ADA)
    events = Events(engine, "users")
    for what, call in refused(engine).items():
        with pytest.raises(SchemaViolation) as caught:
            call()
        violation = caught.value
        assert (violation.scope, violation.written, violation.code) == ("users", True, "SCHEMA_VIOLATION"), what
        assert violation.path in ("$.name", "$"), what
        assert violation.key in ("ada", "new"), what
        assert "nothing was written" in str(violation), what
    assert dict(engine.items("users")) == {"ada": ADA}
    assert events.take() == []


@both
def test_what_fits_is_written_as_without_a_rule(place: Place, rule: dict[str, Any]) -> None:
    engine = opened(place, **rule)
    users, events = engine.scope("users"), Events(engine, "users")

    first = users.set("ada", ADA)
    result = users.update("ada", PLUS_ONE)

    assert (first.old_value, first.new_value, first.created) == (None, ADA, True)
    assert (result.old_value, result.new_value, result.errors) == (ADA, {"name": "Ada", "logins": 2}, ())
    assert users.update("ada", [ops.Increment("name", 1)]).errors
    with pytest.raises(Conflict):
        users.set("ada", ADA, if_absent=True)
    with pytest.raises(UpdateRefused):
        users.update("ada", [ops.Increment("name", 1)], atomic=True)
    assert users.modify("ada", lambda old: {**old, "logins": 3}).new_value == {"name": "Ada", "logins": 3}
    assert users.touch("ada", ttl=60)
    assert users.delete("ada") == {"name": "Ada", "logins": 3}
    assert users.delete("ada") is None
    assert [kind for kind, *_ in events.take()] == ["created", "updated", "updated", "updated", "deleted", "deleted"]
    engine.set("elsewhere", "any", MISFIT)


@both
def test_asyncio_and_typed_handles_are_held_to_it(place: Place, rule: dict[str, Any]) -> None:
    engine = opened(place, **rule)
    engine.set("users", "ada", ADA)

    class Loose(msgspec.Struct):
        name: Any

    async def main() -> None:
        users = AioEngine(engine).scope("users")
        for call in (
            users.set("ada", MISFIT),
            users.update("ada", BREAKS),
            users.modify("ada", lambda old: MISFIT),
            users.set("ada", MISFIT, ttl=5),
        ):
            with pytest.raises(SchemaViolation, match="name"):
                await call

    asyncio.run(main())
    with pytest.raises(SchemaViolation, match="name"):
        engine.scope("users", type=Loose).set("ada", Loose(7))
    assert engine.get("users", "ada") == ADA


def test_a_rule_that_warns_lets_the_write_through_counts_it_and_logs_some(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(place, type=User, enforce="warn")
    with caplog.at_level(logging.WARNING, "scopestate.scope"):
        for number in range(20):
            engine.set("users", f"old{number}", MISFIT)
        engine.set("users", "ada", ADA)
    assert engine.get("users", "old7") == MISFIT
    lines = [record.getMessage() for record in caplog.records if "enforce: warn" in record.getMessage()]
    assert len(lines) == 1
    assert "'old0' of scope 'users' does not fit User" in lines[0]
    if place.name != "follower":  # there the engine counts that writes
        assert engine.stats().misfits == 20


@restarted
def test_old_values_stay_readable_and_are_mended_by_a_write_that_fits(place: Place) -> None:
    before = place.open()
    before.set("users", "old", MISFIT)
    before.set("users", "gone", MISFIT)
    before.close()
    engine = opened(place, schema=SCHEMA)

    assert engine.get("users", "old") == MISFIT
    with pytest.raises(SchemaViolation):
        engine.update("users", "old", PLUS_ONE)
    assert engine.update("users", "old", [ops.Set("name", "Old")]).new_value == {"name": "Old"}
    assert engine.delete("users", "gone") == MISFIT


class Hostile(msgspec.Struct):
    name: str

    def __post_init__(self) -> None:
        if self.name == "engine":
            ENGINE[0].get("other", "key")
        if self.name == "breaks":
            raise ZeroDivisionError("broken validator")


ENGINE: list[Engine] = []


def test_a_checker_that_breaks_or_calls_the_engine_refuses_its_write_only(place: Place) -> None:
    engine = opened(place, type=Hostile)
    ENGINE[:] = [engine]

    with pytest.raises(SchemaViolation, match="ZeroDivisionError: broken validator"):
        engine.set("users", "ada", {"name": "breaks"})
    if place.name != "follower":  # there another engine checks it
        with pytest.raises(SchemaViolation, match="has called an engine") as caught:
            engine.set("users", "ada", {"name": "engine"})
        assert isinstance(caught.value.__cause__, WouldDeadlock)
    engine.set("users", "ada", {"name": "Ada"})
    assert dict(engine.items("users")) == {"ada": {"name": "Ada"}}


def test_no_reader_ever_sees_a_value_that_does_not_fit(place: Place) -> None:
    engine = opened(place, schema=SCHEMA)
    engine.set("users", "ada", ADA)
    seen: list[Any] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.append(engine.get("users", "ada"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(30):
            for ops_ in (PLUS_ONE, BREAKS):
                try:
                    engine.update("users", "ada", ops_)
                except SchemaViolation:
                    continue
    finally:
        ended.set()
        reader.join(30)
    assert all(value["name"] == "Ada" for value in seen)
    assert engine.get("users", "ada") == {"name": "Ada", "logins": 31}


def test_it_is_the_rule_of_the_first_entry_that_has_one(place: Place) -> None:
    rules = [
        {"name": "users:guests", "strict": True},
        {"prefix": "users:", "schema": {"type": "string"}},
        {"prefix": "users", "type": User},
    ]
    engine = place.open(scopes=rules)

    engine.set("users:guests", "a", "text")
    engine.set("users", "a", ADA)
    with pytest.raises(SchemaViolation) as caught:
        engine.set("users:guests", "a", ADA)
    assert caught.value.type_name == "scopes[1].schema"
    with pytest.raises(UpdateRefused):
        engine.update("users:guests", "a", [ops.Increment("", 1)])


@pytest.mark.parametrize("revisions", [True, False])
def test_in_redis_what_was_seen_earlier_refuses_nothing(redis_url: str, revisions: bool) -> None:
    options = {"redis_url": redis_url, "revisions": revisions, "key_prefix": f"seen-{revisions}:"}
    workers = [{"name": "iii-state", "config": {"adapter": {"name": "redis", "config": options}}}]
    rule = {
        "name": "users",
        "schema": SCHEMA,
        "version": 2,
        "version_field": "v",
        "upgrade": lambda value, version: value,
    }
    with (
        Engine.from_config({"workers": workers, "scopes": [rule]}) as held,
        Engine.from_config({"workers": workers}) as free,
    ):
        free.set("users", "ada", MISFIT)
        with pytest.raises(SchemaViolation):
            held.update("users", "ada", PLUS_ONE)  # it has seen the value now
        free.set("users", "ada", ADA)
        assert held.update("users", "ada", PLUS_ONE).new_value == {"name": "Ada", "logins": 2, "v": 2}
        with pytest.raises(SchemaViolation):
            held.set("users", "bob", MISFIT)
        free.set("users", "bob", ADA)
        assert held.get("users", "bob") == {**ADA, "v": 2}
        assert held.list("users") == [{"name": "Ada", "logins": 2, "v": 2}, {**ADA, "v": 2}]
        assert free.get("users", "bob") == ADA
        free.set("users", "bob", {"v": 3})
        with pytest.raises(SchemaViolation, match="newer than 2"):
            held.set("users", "bob", ADA)
        assert held.delete("users", "bob") == {"v": 3}
        free.delete("users", "ada")
