"""A typed handle, at each place: what it writes fits its type, and what it returns has it."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
from typing import Any

import msgspec
import pytest
from places import PATIENCE_S, Place

from scopestate import DELETE, KEEP, MISSING, Delivery, Engine, StateEvent, ops
from scopestate.aio import AioEngine
from scopestate.engine import Scope
from scopestate.errors import Conflict, InvalidValue, SchemaViolation, Unsupported, UpdateRefused


class User(msgspec.Struct):
    name: str
    logins: int = 0


class Text(msgspec.Struct):
    text: str


ADA, BOB = User("Ada"), User("Bob", 3)
MISFIT: Any = {"name": 1}
PLUS_ONE = [ops.Increment("logins", 1)]
BREAKS = [ops.Set("name", 7)]


@pytest.fixture
def people(engine: Engine) -> Scope[User]:
    return engine.scope("users", type=User)


def plain(engine: Engine) -> dict[str, Any]:
    return dict(engine.items("users"))


def test_values_are_stored_as_json_and_read_as_the_type(people: Scope[User], engine: Engine) -> None:
    result = people.set("ada", ADA)

    assert (result.old_value, result.new_value, result.created) == (None, ADA, True)
    assert people.get("ada") == ADA
    assert people.get("bob") is None
    assert people.get("bob", BOB) == BOB
    assert plain(engine) == {"ada": {"name": "Ada", "logins": 0}}
    assert people.set("ada", BOB, if_revision=result.revision).old_value == ADA
    with pytest.raises(Conflict):
        people.set("ada", ADA, if_absent=True)
    assert people.delete("ada") == BOB
    assert people.delete("ada") is None


def test_what_does_not_fit_is_refused_and_nothing_is_written(people: Scope[User], engine: Engine) -> None:
    people.set("ada", ADA)
    wrong: Any = User(7)  # type: ignore[arg-type]  # msgspec does not look at what a struct is made of
    calls = [
        lambda: people.set("ada", wrong),
        lambda: people.set("ada", wrong, ttl=5),
        lambda: people.update("ada", BREAKS),
        lambda: people.update("ada", BREAKS, atomic=True),
        lambda: people.update("new", [ops.Set("logins", 1)]),
        lambda: people.modify("ada", lambda user: wrong),
        lambda: people.transact(lambda tx: tx.set("ada", wrong)),
        lambda: people.transact(lambda tx: tx.update("ada", BREAKS)),
        lambda: people.compare_and_set("ada", ADA, wrong),
        lambda: people.mapping().setdefault("new", wrong),
    ]
    for call in calls:
        with pytest.raises(SchemaViolation) as caught:
            call()
        assert (caught.value.scope, caught.value.written) == ("users", True)
        assert caught.value.path in ("$.name", "$")
        assert "nothing was written" in str(caught.value)
    assert plain(engine) == {"ada": {"name": "Ada", "logins": 0}}


def test_updates_return_the_type_and_keep_their_conditions(people: Scope[User]) -> None:
    revision = people.set("ada", ADA).revision

    result = people.update("ada", PLUS_ONE, if_revision=revision)

    assert (result.old_value, result.new_value, result.errors) == (ADA, User("Ada", 1), ())
    with pytest.raises(Conflict):
        people.update("ada", PLUS_ONE, if_revision=revision)
    skipped = people.update("ada", [ops.Increment("name", 1), *PLUS_ONE])
    assert (skipped.new_value, len(skipped.errors)) == (User("Ada", 2), 1)
    with pytest.raises(UpdateRefused):
        people.update("ada", [ops.Increment("name", 1), *PLUS_ONE], atomic=True)
    assert people.update("new", [ops.Set("name", "New")], if_absent=True).new_value == User("New")


def test_an_update_with_an_idempotency_key_is_done_once_or_refused(people: Scope[User], place: Place) -> None:
    people.set("ada", ADA)
    if place.name in ("bridge", "follower"):
        with pytest.raises(Unsupported, match="transact"):
            people.update("ada", PLUS_ONE, idempotency_key="once")
        return
    first = people.update("ada", PLUS_ONE, idempotency_key="once")
    again = people.update("ada", PLUS_ONE, idempotency_key="once")
    assert (again.new_value, again.replayed, again.revision) == (User("Ada", 1), True, first.revision)


def test_functions_get_and_return_the_type(people: Scope[User]) -> None:
    people.set("ada", ADA)

    assert people.modify("ada", lambda user: User("Ada", 5)).new_value == User("Ada", 5)
    assert people.modify("new", lambda user: user, BOB).old_value is None
    assert people.modify("none", lambda user: KEEP).new_value is None
    assert people.modify("new", lambda user: DELETE).old_value == BOB
    with pytest.raises(KeyError, match="function"):
        people.modify("ada", lambda user: {}["function"])

    def move(tx: Any) -> Any:
        assert tx.get("ada") == tx["ada"] == tx.entry("ada").value == User("Ada", 5)
        assert tx.get("none", BOB) == BOB
        assert tx.update("ada", PLUS_ONE) == User("Ada", 6)
        tx["bob"] = BOB
        with pytest.raises(KeyError):
            tx["none"]
        assert [key for key in tx if key in tx] == ["ada", "bob"]
        assert tx.items() == [("ada", User("Ada", 6)), ("bob", BOB)]
        return tx.delete("bob")

    assert people.transact(move) == BOB
    assert people.items() == [("ada", User("Ada", 6))]


def test_comparing_takes_the_type(people: Scope[User]) -> None:
    assert people.compare_and_set("ada", MISSING, ADA).swapped
    missed = people.compare_and_set("ada", BOB, BOB)
    assert (missed.swapped, missed.current) == (False, ADA)
    assert people.compare_and_set("ada", ADA, BOB, idempotency_key="swap").swapped
    assert people.get("ada") == BOB


def test_a_batch_takes_the_type(people: Scope[User], engine: Engine) -> None:
    with people.batch() as batch:
        batch.check("ada", absent=True)
        batch.set("ada", ADA)
        batch.set("bob", BOB, ttl=100)
    with pytest.raises(Conflict), people.batch() as batch:
        batch.check("ada", value=BOB)
        batch.set("ada", BOB)
    wrong: Any = MISFIT
    with pytest.raises(SchemaViolation), people.batch() as batch:
        batch.set("bob", ADA)
        batch.set("ada", wrong)
    with pytest.raises(Unsupported, match="transact"), people.batch() as batch:
        batch.update("ada", PLUS_ONE)
    assert people.values() == [ADA, BOB]


def test_reading_many(people: Scope[User]) -> None:
    people.set("ada", ADA)
    people.set("bob", BOB)

    assert people.items(prefix="b") == [("bob", BOB)]
    assert people.values() == people.list() == [ADA, BOB]
    assert list(people.iter(reverse=True)) == [("bob", BOB), ("ada", ADA)]
    assert [entry.value for entry in people.entries()] == [ADA, BOB]
    assert [entry.value for page in people.pages(limit=1) for entry in page.entries] == [ADA, BOB]
    entry = people.entry("ada")
    assert entry is not None
    assert (entry.key, entry.value, entry.expires_at) == ("ada", ADA, None)
    assert people.entry("none") is None
    assert people.keys() == ["ada", "bob"]
    assert "ada" in people


def test_a_mapping_has_the_type(people: Scope[User]) -> None:
    mapping = people.mapping()
    mapping["ada"] = ADA

    assert mapping.setdefault("bob", BOB) == BOB
    assert dict(mapping) == {"ada": ADA, "bob": BOB}
    assert list(mapping.values()) == [ADA, BOB]
    assert mapping["ada"] == ADA
    assert mapping.pop("ada") == ADA
    assert mapping.popitem() == ("bob", BOB)
    assert mapping.get("ada") is None
    with pytest.raises(KeyError):
        mapping["ada"]


def test_what_others_have_written_is_refused_left_out_or_replaced(engine: Engine, caplog: Any) -> None:
    engine.set("users", "ada", {"name": "Ada"})
    engine.set("users", "bad", MISFIT)
    strict = engine.scope("users", type=User)
    lenient = engine.scope("users", type=User, on_invalid="skip")
    fixing = engine.scope("users", type=User, on_invalid=lambda key, value, error: User(f"{key} {value['name']}"))

    with pytest.raises(SchemaViolation, match="on_invalid") as caught:
        strict.get("bad")
    assert (caught.value.key, caught.value.path, caught.value.written) == ("bad", "$.name", False)
    for call in (
        strict.values,
        strict.entries,
        strict.items,
        lambda: strict.entry("bad"),
        lambda: list(strict.pages()),
    ):
        with pytest.raises(SchemaViolation):
            call()
    assert lenient.get("bad", BOB) == BOB
    assert lenient.items() == [("ada", ADA)]
    assert [entry.key for entry in lenient.entries()] == ["ada"]
    assert lenient.entry("bad") is None
    assert caplog.text.count("it is left out") == 1
    assert fixing.values() == [ADA, User("bad 1")]
    assert lenient.set("bad", BOB).old_value is None
    assert strict.get("bad") == BOB


def test_handlers_get_typed_events(people: Scope[User], engine: Engine) -> None:
    got: list[Any] = []
    failures: list[Any] = []
    engine.on_error(failures.append)

    @people.on_change(key="ada")
    def plain_handler(event: StateEvent[User]) -> None:
        got.append(("plain", event.old_value, event.new_value, event["new_value"]))
        assert copy.copy(event).new_value == event.copy().new_value == event.new_value

    @people.on_change(key="ada", events=("deleted",))
    async def async_handler(event: StateEvent[User]) -> None:
        got.append(("async", event.old_value, event.new_value))

    people.set("ada", ADA)
    engine.drain(PATIENCE_S)
    people.delete("ada")
    engine.drain(PATIENCE_S)
    assert sorted(got, key=str) == [
        ("async", ADA, None),
        ("plain", None, ADA, {"name": "Ada", "logins": 0}),
        ("plain", ADA, None, None),
    ]
    engine.set("users", "ada", MISFIT)
    engine.drain(PATIENCE_S)
    assert [type(failure.error) for failure in failures] == [SchemaViolation]


def test_a_handler_of_batches_gets_typed_events(people: Scope[User], engine: Engine) -> None:
    got: list[Any] = []

    @people.on_change(batch=10)
    def handle(events: list[StateEvent[User]]) -> None:
        got.extend(event.new_value for event in events)

    people.set("ada", ADA)
    people.set("bob", BOB)
    engine.drain(PATIENCE_S)
    assert got == [ADA, BOB]


def test_a_watch_yields_the_type(people: Scope[User], engine: Engine, place: Place) -> None:
    if engine._parts.backend.unwatchable is not None:
        with pytest.raises(Unsupported):
            people.watch()
        return
    people.set("ada", ADA)
    with people.watch() as changes:
        first = changes.get(PATIENCE_S)
        assert (first.key, first.value, first.old_value) == ("ada", ADA, None)
        assert pickle.loads(pickle.dumps(first)).value == {"name": "Ada", "logins": 0}
        people.set("ada", BOB)
        second = next(changes)
        assert (second.value, second.old_value) == (BOB, ADA)
        engine.set("users", "bad", MISFIT)
        with pytest.raises(SchemaViolation):
            changes.get(PATIENCE_S)
        people.set("eve", ADA)
        assert changes.get(PATIENCE_S).key == "eve"
    lenient = engine.scope("users", type=User, on_invalid="skip")
    with lenient.watch() as changes:
        assert [changes.get(PATIENCE_S).key, next(changes).key] == ["ada", "eve"]


def test_asyncio_has_all_of_it(people: Scope[User], engine: Engine) -> None:
    async def main() -> None:
        users = people.aio
        assert (await users.set("ada", ADA)).new_value == ADA
        assert await users.get("ada") == ADA
        assert await users.get("none", BOB) == BOB
        assert (await users.update("ada", PLUS_ONE)).new_value == User("Ada", 1)
        with pytest.raises(SchemaViolation):
            await users.update("ada", BREAKS)
        assert (await users.modify("ada", lambda user: BOB)).new_value == BOB
        assert (await users.compare_and_set("ada", BOB, ADA)).swapped
        assert await users.transact(lambda tx: tx.get("ada")) == ADA
        async with users.batch() as batch:
            batch.set("bob", BOB)
        assert await users.items() == [("ada", ADA), ("bob", BOB)]
        assert await users.values() == await users.list() == [ADA, BOB]
        assert [pair async for pair in users.iter()] == [("ada", ADA), ("bob", BOB)]
        assert [entry.value for entry in await users.entries()] == [ADA, BOB]
        assert [entry.value async for page in users.pages(limit=1) for entry in page.entries] == [ADA, BOB]
        entry = await users.entry("bob")
        assert entry is not None
        assert entry.value == BOB
        assert await users.delete("bob") == BOB
        if engine._parts.backend.unwatchable is None:
            async with users.watch() as changes:
                assert (await changes.get(PATIENCE_S)).value == ADA
                await users.set("ada", BOB)
                assert (await anext(changes)).value == BOB

    asyncio.run(main())
    assert isinstance(engine.aio, AioEngine)
    assert repr(engine.aio.scope("users", type=User)) == "<AioScope 'users' of User>"
    assert repr(people) == "<Scope 'users' of User>"


def test_two_handles_may_have_two_types(engine: Engine) -> None:
    engine.scope("users", type=User).set("ada", ADA)
    engine.scope("users", type=Text).set("text", Text("hello"))

    assert engine.scope("users", type=Text, on_invalid="skip").values() == [Text("hello")]
    assert engine.scope("users", type=dict[str, str | int]).get("text") == {"text": "hello"}


def test_nan_is_refused_as_everywhere(engine: Engine) -> None:
    @dataclasses.dataclass
    class Score:
        value: float | None

    scores = engine.scope("scores", type=Score)
    with pytest.raises(InvalidValue, match=r"\$\.value"):
        scores.set("a", Score(float("nan")))
    assert scores.set("a", Score(None)).new_value == Score(None)


@pytest.mark.parametrize("place", ["interval", "commit", "follower"], indirect=True)
def test_a_durable_handler_gets_the_type_and_the_delivery(people: Scope[User], engine: Engine) -> None:
    got: list[Any] = []

    @people.on_change(durable="ship")
    def handle(event: StateEvent[User], delivery: Delivery) -> None:
        got.append((event.new_value, delivery.attempt))

    people.set("ada", ADA)
    engine.drain(PATIENCE_S)
    assert got == [(ADA, 1)]
