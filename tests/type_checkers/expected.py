"""What a type checker sees. Checked by mypy and pyright, both strict; test_checkers.py says how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

import msgspec

from scopestate import DELETE, Change, Delivery, Engine, EntryView, SetResult, StateEvent, UpdateResult, ops
from scopestate.handles import AioScope, Scope
from scopestate.testing import Engines, VirtualClock, typed


class User(msgspec.Struct):
    name: str
    logins: int = 0


engine = Engine()
users = engine.scope("users", type=User)
plain = engine.scope("plain")
numbers = engine.scope("numbers", type=int)

assert_type(users, Scope[User])
assert_type(users.get("ada"), User | None)
assert_type(users.get("ada", User("nobody")), User)
assert_type(users.get("ada", 5), User | int)
assert_type(users.set("ada", User("Ada")), SetResult[User])
assert_type(users.set("ada", User("Ada"), ttl=60, if_absent=True).old_value, User | None)
assert_type(users.set("ada", User("Ada")).new_value, User)
assert_type(users.update("ada", [ops.Increment("logins", 1)]), UpdateResult[User])
assert_type(users.update("ada", [ops.Increment("logins", 1)]).new_value, User)
assert_type(users.delete("ada"), User | None)
assert_type(users.entry("ada"), EntryView[User] | None)
assert_type(users.items(prefix="a"), list[tuple[str, User]])
assert_type(users.values(), list[User])
assert_type(users.list(), list[User])
assert_type(users.keys(), list[str])
assert_type(users.iter(), Iterator[tuple[str, User]])
assert_type(users.compare_and_set("ada", None, User("Ada")).current, User | None)
assert_type(users.modify("ada", lambda user: user or DELETE).new_value, User | None)
assert_type(users.modify("ada", lambda user: User(user.name), User("Ada")).new_value, User | None)
assert_type(users.transact(lambda tx: tx["ada"].name), str)
assert_type(users.transact(lambda tx: tx.items()), list[tuple[str, User]])
assert_type(users.mapping()["ada"], User)
assert_type(dict(users.mapping()), dict[str, User])
assert_type(numbers.get("n"), int | None)
assert_type(next(users.pages()).entries[0].value, User)

with users.batch() as batch:
    batch.set("ada", User("Ada"))

with users.watch() as changes:
    for change in changes:
        assert_type(change, Change[User | None])
        assert_type(change.value, User | None)
        assert_type(change.old_value, User | None)

# Examples for unit tests.
assert_type(typed(StateEvent.example(new_value={"name": "Ada"}), User), StateEvent[User | None])
assert_type(typed(Change.example(), User).value, User | None)
assert_type(typed(SetResult[Any].example(1), User).new_value, User)
assert_type(Delivery.example(StateEvent.example()), Delivery)
with VirtualClock() as clock, Engines() as engines:
    assert_type(clock.crash(clock.open()), Engine)
    assert_type(engines.crash(engines.open({})), Engine)

# Without a type, values are of any type.
assert_type(plain.get("a"), Any)
plain.get("a")["field"]
assert_type(plain.delete("a"), Any)
assert_type(engine.get("a", "b"), Any)


@users.on_change(key="ada")
def on_ada(event: StateEvent[User | None]) -> int:
    assert_type(event.new_value, User | None)
    return 5


@users.on_change()
async def on_any(event: StateEvent[User | None]) -> None:
    assert_type(event.old_value, User | None)


@users.on_change(durable="ship")
def on_durable(event: StateEvent[User | None], delivery: Delivery) -> None:
    assert_type(delivery.attempt, int)


@users.on_change(batch=100)
def on_batch(events: list[StateEvent[User | None]]) -> None:
    assert_type(events[0].new_value, User | None)


@plain.on_change()
def on_plain(event: StateEvent) -> None:
    assert_type(event.new_value, Any)
    event.new_value["field"]


@engine.on_change(scope="users")
def on_engine(event: StateEvent) -> None:
    event.new_value["field"]


assert_type(on_ada(StateEvent("state:created", "users", "ada", None, b"{}", 1)), int)


async def main() -> None:
    assert_type(users.aio, AioScope[User])
    assert_type(await users.aio.get("ada"), User | None)
    assert_type(await users.aio.get("ada", 5), User | int)
    assert_type((await users.aio.set("ada", User("Ada"))).new_value, User)
    assert_type(await users.aio.values(), list[User])
    assert_type(await users.aio.transact(lambda tx: tx["ada"].name), str)
    assert_type(await plain.aio.get("a"), Any)
    async with users.aio.batch() as batch:
        batch.set("ada", User("Ada"))
    async with users.aio.watch() as changes:
        assert_type((await anext(changes)).value, User | None)
    async for key, value in users.aio.iter():
        assert_type((key, value), tuple[str, User])
