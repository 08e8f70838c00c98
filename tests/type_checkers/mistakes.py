"""Mistakes, each of which a type checker must find: in every line that ends with `# wrong`, and in no other."""

from __future__ import annotations

import msgspec

from scopestate import Engine, StateEvent, ops


class User(msgspec.Struct):
    name: str
    logins: int = 0


engine = Engine()
users = engine.scope("users", type=User)

users.set("ada", {"name": "Ada"})  # wrong
users.set("ada", "Ada")  # wrong
users.set(1, User("Ada"))  # wrong
users.set("ada", User("Ada"), if_revision="1")  # wrong
users.set("ada", User("Ada"), ttl="soon")  # wrong
users.set("ada", User("Ada"), if_revison=1)  # wrong
users.get("ada").name  # wrong
users.get(b"ada")  # wrong
users.modify("ada", lambda user: user.name)  # wrong
users.modify("ada", lambda user: 5, User("Ada"))  # wrong
users.compare_and_set("ada", None, 5)  # wrong
users.transact(lambda tx: tx.set("ada", 5))  # wrong
users.mapping()["ada"] = 5  # wrong
users.update("ada", [ops.Increment("logins", "one")])  # wrong
users.update("ada", ops.Increment("logins", 1))  # wrong
users.update("ada", [5])  # wrong
users.update("ada", ["increment"])  # wrong
engine.update("users", "ada", [ops.Increment])  # wrong
users.keys(prefx="a")  # wrong
users.watch(bufer=1)  # wrong
engine.scope("users", type=User, on_invalid="ignore")  # wrong
engine.scope(5)  # wrong

with users.batch() as batch:
    batch.set("ada", 5)  # wrong


@users.on_change()  # wrong
def no_event() -> None: ...


@users.on_change()  # wrong
def an_int(event: int) -> None: ...


@users.on_change()  # wrong
def three(event: StateEvent[User | None], delivery: object, more: int) -> None: ...


@users.on_change()  # wrong
def of_another_type(event: StateEvent[int]) -> None: ...


@users.on_change(kye="ada")  # wrong
def misspelt(event: StateEvent[User | None]) -> None: ...


@users.on_change()
def assumes(event: StateEvent[User | None]) -> None:
    event.new_value.name  # wrong
    event.new_value = User("Ada")  # wrong


@engine.on_change()  # wrong
def number(event: int) -> None: ...


async def main() -> None:
    await users.aio.set("ada", 5)  # wrong
    (await users.aio.get("ada")).name  # wrong
    users.aio.get("ada").name  # wrong
