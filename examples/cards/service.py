"""The cards of a team: everyone sees at once what the others do. FastAPI, for any number of workers.

    uvicorn service:app --workers 2

Then open http://127.0.0.1:8000 in two browsers. `python cards.py` starts it, makes requests, kills a worker meanwhile,
and compares. test_service.py has the tests of a service like this.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from scopestate import Delivery, Engine, Health, Scope, StateEvent, ops
from scopestate.integrations.asgi import open_engine
from scopestate.integrations.fastapi import (
    EngineDep,
    WatchResponse,
    exception_handlers,
    problem_responses,
    scope_of,
    watch_response,
)

HERE = Path(__file__).parent


class Card(BaseModel):
    """A card, as it is stored and as clients see it."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    column: Literal["todo", "doing", "done"] = "todo"
    votes: Annotated[int, Field(ge=0)] = 0


class Hold(BaseModel):
    """Says which member is working on a card now. It ends by itself."""

    by: str


class Written(BaseModel):
    """The answer to a write."""

    revision: int
    worker: int


class Status(BaseModel):
    """The state of one worker."""

    worker: int
    health: Health


Cards = Annotated[Scope[Card], scope_of("team:cards", type=Card)]
Holds = Annotated[Scope[Hold], scope_of("team:holds", type=Hold)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key")]
"""A client that has got no answer sends its request again with the same key: it is done once."""


def set_up(engine: Engine) -> None:
    """Register the triggers, in each worker."""

    # Each worker registers it under the same name: an event is handled by one of them, and by another one if that is
    # killed. What is written in the transaction is written once, however often the event was delivered.
    @engine.scope("team:cards", type=Card).on_change(durable="count-done")
    def count_done(event: StateEvent[Card | None], delivery: Delivery) -> None:
        more = is_done(event.new_value) - is_done(event.old_value)
        if more:
            with delivery.transaction("team:totals") as tx:
                tx.update("done", [ops.Increment("", more)])


def is_done(card: Card | None) -> bool:
    """Return whether a card is done."""
    return card is not None and card.column == "done"


def create_app(engine: Engine | None = None) -> FastAPI:
    """Return the application. It opens an engine of its own, or takes the one of a test."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[dict[str, Engine]]:
        async with open_engine(HERE / "engine.yaml" if engine is None else engine) as opened:
            set_up(opened)
            yield {"engine": opened}

    app = FastAPI(title="Cards", lifespan=running, exception_handlers=exception_handlers, responses=problem_responses)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(HERE / "cards.html")

    @app.get("/changes")
    async def changes(request: Request, engine: EngineDep) -> WatchResponse:
        """Stream what is there, and every change of cards, holds and totals from then on."""
        response = await watch_response(request, engine, scope_prefix="team:", retry_ms=100)
        response.headers["X-Worker"] = str(os.getpid())
        return response

    @app.get("/cards")
    async def all_cards(cards: Cards) -> dict[str, Card]:
        return dict(await cards.aio.items())

    @app.get("/cards/{key}")
    async def one_card(key: str, cards: Cards) -> dict[str, Any]:
        entry = await cards.aio.entry(key)
        if entry is None:
            raise HTTPException(404, "there is no such card")
        return {"revision": entry.revision, "card": entry.value}

    @app.put("/cards/{key}")
    async def write_card(
        key: str, card: Card, cards: Cards, revision: int = 0, idempotency_key: IdempotencyKey = None
    ) -> Written:
        """Write a card, if it is still the one that the client has seen; `revision=0`: if there is none yet.

        Otherwise the engine raises Conflict, which `exception_handlers` answers with status 409.
        """
        written = await cards.aio.set(key, card, if_revision=revision, idempotency_key=idempotency_key)
        return Written(revision=written.revision, worker=os.getpid())

    @app.post("/cards/{key}/hold")
    async def hold_card(
        key: str,
        hold: Hold,
        holds: Holds,
        seconds: Annotated[float, Field(gt=0, le=3600)] = 30,
        idempotency_key: IdempotencyKey = None,
    ) -> Written:
        """Say that a member is working on a card. While one does, others get status 409."""
        written = await holds.aio.set(key, hold, ttl=seconds, if_absent=True, idempotency_key=idempotency_key)
        return Written(revision=written.revision, worker=os.getpid())

    @app.get("/status")
    async def status(engine: EngineDep) -> Status:
        """Return which process answers, and what its engine reports, such as its part in sharing the directory."""
        return Status(worker=os.getpid(), health=engine.health())

    return app


app = create_app()
