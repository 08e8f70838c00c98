"""What a type checker sees of the integrations. Checked by mypy and pyright, both strict."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any, assert_type

import msgspec
from fastapi import FastAPI, Request
from litestar import Litestar
from starlette.applications import Starlette

from scopestate import Engine, Scope, StateEvent
from scopestate.integrations.asgi import lifespan, open_engine
from scopestate.integrations.cache import AioCache, Cache, CacheStats, CacheTransaction
from scopestate.integrations.fastapi import (
    EngineDep,
    WatchResponse,
    exception_handlers,
    problem_responses,
    scope_of,
    watch_response,
)
from scopestate.integrations.key_value import StateStore
from scopestate.integrations.litestar import ScopestatePlugin
from scopestate.integrations.pytest_plugin import StateEvents
from scopestate.integrations.sse import WatchStream, open_stream
from scopestate.integrations.starlette import engine_of


class User(msgspec.Struct):
    name: str


# The cache.
cache = Cache("./data/cache", size_limit=None, durability="commit")
assert_type(cache.get("ada"), Any)
assert_type(cache.set("ada", {"name": "Ada"}, timedelta(minutes=1), tag="users"), bool)
assert_type(cache.add("ada", b"bytes", 0.5), bool)
assert_type(cache.touch("ada", expire=60), bool)
assert_type(cache.delete("ada"), bool)
assert_type(cache.evict("users"), int)
assert_type(cache.stats(), CacheStats)
assert_type(cache.stats().hits, int)
assert_type(cache.engine, Engine)
assert_type(cache.directory, str | None)
assert_type(len(cache), int)
assert_type(iter(cache), Iterator[Any])
cache["pair", 5] = (b"bytes", {1, 2})
del cache["pair", 5]
with cache.transact() as transaction:
    assert_type(transaction, CacheTransaction)
    assert_type(transaction.delete("ada"), bool)
assert_type(cache.transact(lambda: 5), int)


@cache.memoize(expire=60, tag="squares", ignore={"log"}, early=1)
def square(number: int, *, log: str = "") -> float:
    return float(number)


@cache.memoize()
async def fetch(name: str) -> bytes:
    return name.encode()


class Shop:
    @cache.memoize(ignore={0})
    def price(self, item: str) -> int:
        return len(item)


assert_type(square(3), float)
assert_type(square(3, log="on"), float)
assert_type(square.__wrapped__(3), float)
assert_type(square.__cache_key__(3), str)
assert_type(Shop().price("apple"), int)

# Web frameworks.
Users = Annotated[Scope[User], scope_of("users", type=User, on_invalid="skip")]
app = FastAPI(
    lifespan=lifespan("engine.yaml", setup=lambda engine: None, watch=False),
    exception_handlers=exception_handlers,
    responses=problem_responses,
)


@app.get("/users/{name}")
async def user(name: str, engine: EngineDep, users: Users) -> dict[str, Any]:
    assert_type(engine, Engine)
    assert_type(users.get(name), User | None)
    return {"user": await users.aio.get(name)}


@app.get("/changes")
async def changes(request: Request, users: Users) -> WatchResponse:
    assert_type(engine_of(request), Engine)
    return await watch_response(request, users, prefix="a", heartbeat_s=5, data=lambda change: change.key)


async def set_up(engine: Engine) -> None:
    engine.on_change(scope="users")(on_user)


def on_user(event: StateEvent) -> None:
    del event


Starlette(lifespan=lifespan({"limits": {}}, setup=set_up, on_error=print))
Litestar([], plugins=[ScopestatePlugin("engine.yaml", name="state", handle_errors=False)])


async def streams(engine: Engine) -> None:
    assert_type(await open_stream(engine.scope("users", type=User)), WatchStream)
    await open_stream(engine, scope_prefix="user:", events=["created"], latest=True)
    async with open_engine(engine) as opened:
        assert_type(opened, Engine)


async def fetched() -> None:
    assert_type(cache.aio, AioCache)
    assert_type(await cache.aio.add("ada", b"bytes", 0.5), bool)
    assert_type(await cache.aio.count(), int)
    assert_type([key async for key in cache.aio], list[Any])
    async with cache.aio.transact() as inside:
        assert_type(await inside.delete("ada"), bool)
    assert_type(await cache.aio.transact(shared), float)
    async with Cache().aio as opened:
        assert_type(opened, AioCache)
    assert_type(await fetch("ada"), bytes)


async def shared() -> float:
    return 0.5


# py-key-value.
async def stored() -> None:
    async with StateStore("./data/state", max_entries_per_collection=10) as store:
        await store.put("ada", {"name": "Ada"}, collection="users", ttl=60)  # for mypy, a call of Any
        assert_type(store.engine, Engine)


# The fixtures of the pytest plugin.
def test_events(state_engine: Engine, state_events: StateEvents) -> None:
    event = state_events.wait_for(lambda event: event.key == "ada", timeout=5)
    assert_type(event, StateEvent)
    assert_type(state_events[0].new_value, Any)
    assert_type(state_engine.get("users", "ada"), Any)
