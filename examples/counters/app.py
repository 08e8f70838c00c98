"""A web service that counts visits, for any number of workers: each has an engine, and all have one state.

    uvicorn app:app --workers 4
    gunicorn app:app -w 4 -k uvicorn_worker.UvicornWorker

`python counters.py` starts one of them, makes requests, and restarts the workers meanwhile.
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from scopestate import Conflict, Delivery, Engine, StateEvent, ops
from scopestate.integrations.asgi import lifespan

CONFIG = Path(__file__).with_name("engine.yaml")

PAGES = ("home", "news", "shop")
MILESTONE = 100
"""A page is celebrated once for each multiple of this number of visits."""


async def set_up(engine: Engine) -> None:
    """Register the triggers of this worker, and do what is to be done once for all workers."""

    # Every worker registers it under the same name: each event is handled by one of them, and by another one if that
    # is killed. What is written in the transaction is written once, however often the event was delivered.
    @engine.on_change(scope="visits", durable="milestones")
    def celebrate(event: StateEvent, delivery: Delivery) -> None:
        if event.new_value and event.new_value % MILESTONE == 0:
            with delivery.transaction("milestones") as tx:
                tx.update(f"{event.key} {event.new_value}", [ops.Increment("celebrated", 1)])

    try:
        # The first worker opens the site: the others, and those that come later, find that it is done.
        await engine.aio.set("site", "opened", {"by": os.getpid()}, if_absent=True)
    except Conflict:
        return
    await engine.aio.set("site", "pages", list(PAGES))


async def visit(request: Request) -> JSONResponse:
    """Count a visit. A client that has got no answer may send it again with the same `Idempotency-Key`."""
    counted = await request.state.engine.aio.update(
        "visits",
        request.path_params["page"],
        [ops.Increment("", 1)],
        idempotency_key=request.headers.get("Idempotency-Key"),
    )
    return JSONResponse({"visits": counted.new_value, "worker": os.getpid()})


async def report(request: Request) -> JSONResponse:
    """Return everything that is known. The answer is the same, whichever worker gives it."""
    engine: Engine = request.state.engine
    found = {}
    for scope in ("visits", "milestones", "site"):
        found[scope] = dict(await engine.scope(scope).aio.items())
    return JSONResponse(found)


app = Starlette(
    routes=[Route("/visits/{page}", visit, methods=["POST"]), Route("/report", report)],
    lifespan=lifespan(CONFIG, setup=set_up),
)
