"""Mistakes at the integrations, for type checkers: one in every line that ends with `# wrong`, and in no other."""

from __future__ import annotations

from fastapi import FastAPI, Request

from scopestate import Engine, StateEvent
from scopestate.integrations.asgi import lifespan, open_engine
from scopestate.integrations.cache import Cache
from scopestate.integrations.fastapi import EngineDep, scope_of, watch_response
from scopestate.integrations.key_value import StateStore
from scopestate.integrations.litestar import ScopestatePlugin
from scopestate.integrations.pytest_plugin import StateEvents
from scopestate.integrations.sse import open_stream

# The cache.
Cache(5)  # wrong
Cache("./data", durability="always")  # wrong
Cache("./data", size_limit="1 GiB")  # wrong
cache = Cache()
cache.set("ada", 1, "soon")  # wrong
cache.set("ada", 1, 60, "users")  # wrong
cache.set("ada", 1, expires=60)  # wrong
cache.get("ada", None, True)  # wrong
cache.incr("n", "one")  # wrong
cache.touch("ada", expire=b"60")  # wrong
cache.set_many([("ada", 1)])  # wrong
cache.transact(5)  # wrong
cache.memoize(60)(5)  # wrong
cache.memoize(ignore=5)  # wrong

with cache.transact() as transaction:
    transaction.clear()  # wrong


@cache.memoize(expire=60)
def square(number: int) -> float:
    return float(number)


square("three")  # wrong
square(3, 4)  # wrong
square.__cache_key__("three")  # wrong
square(3).upper()  # wrong


@cache.memoize  # wrong
def without_brackets(number: int) -> float:
    return float(number)


# Web frameworks.
lifespan("engine.yaml", nmae="state")  # wrong
lifespan(5)  # wrong
lifespan(setup="start")  # wrong
lifespan(setup=lambda: None)  # wrong
open_engine("engine.yaml", watch="no")  # wrong
ScopestatePlugin("engine.yaml", handle_error=False)  # wrong
scope_of("users", on_invalid="ignore")  # wrong
scope_of(5)  # wrong
app = FastAPI()


@app.get("/users/{name}")
async def user(name: str, engine: EngineDep) -> None:
    await engine.aio.set("users", 5, name)  # wrong
    engine.gett("users", name)  # wrong


async def stream(request: Request, engine: Engine) -> None:
    await watch_response(request, "jobs")  # wrong
    await cache.aio.set("ada", 1, "soon")  # wrong
    (await cache.aio.add("ada", 1)).value  # wrong
    cache.aio["ada"]  # wrong
    await cache.aio.transact(lambda: 5)  # wrong
    await watch_response(request, engine, prefx="a")  # wrong
    await open_stream(engine, events=["changed"])  # wrong
    await open_stream(engine, heartbeat_s="5")  # wrong


# py-key-value.
StateStore("./data", prefix=5)  # wrong
StateStore().open  # wrong


# The fixtures of the pytest plugin.
def test_events(state_events: StateEvents) -> None:
    state_events.wait_for("ada")  # wrong
    state_events.wait_for(lambda: True)  # wrong
    wanted: StateEvent[int] = state_events[0]
    del wanted
