"""An engine in a FastAPI application: as a dependency, as a stream of events, and its errors as documented answers.

    app = FastAPI(lifespan=lifespan("engine.yaml"), exception_handlers=exception_handlers, responses=problem_responses)

    @app.get("/users/{name}")
    async def user(name: str, engine: EngineDep) -> dict[str, Any]: ...

`lifespan` is in `scopestate.integrations.asgi`. docs/how-to/web-frameworks.md has the details.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

try:
    from fastapi import Depends
    from pydantic import BaseModel
    from starlette.requests import HTTPConnection
except ImportError as error:
    raise ImportError("scopestate.integrations.fastapi needs FastAPI: pip install 'scopestate[fastapi]'") from error

from scopestate.engine import Engine
from scopestate.handles import Scope
from scopestate.integrations.problems import MEDIA_TYPE, SCHEMA, STATUSES
from scopestate.integrations.starlette import WatchResponse, engine_of, exception_handlers, watch_response
from scopestate.typed_results import OnInvalid

__all__ = ["EngineDep", "WatchResponse", "exception_handlers", "problem_responses", "scope_of", "watch_response"]


async def _engine(connection: HTTPConnection) -> Engine:
    return engine_of(connection)


EngineDep = Annotated[Engine, Depends(_engine)]
"""The type of a parameter, of a route or a WebSocket, that is the engine which the lifespan has opened."""


def scope_of(scope: str, *, type: Any = None, on_invalid: OnInvalid = "raise", engine: str = "engine") -> Any:  # noqa: A002 - as `Engine.scope`
    """Return a dependency on a scope's handle: `Users = Annotated[Scope[User], scope_of("users", type=User)]`.

    `type` and `on_invalid` are those of `Engine.scope`; `engine` is the `name` of the lifespan.
    """

    async def handle(connection: HTTPConnection) -> Scope:
        handle: Scope = engine_of(connection, engine).scope(scope, type=type, on_invalid=on_invalid)
        return handle

    return Depends(handle)


class HTTPValidationError(BaseModel):
    """FastAPI's answer to a request that does not fit the parameters of a route."""

    detail: list[dict[str, Any]] = []


def _responses() -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for kind, (status, title) in STATUSES.items():
        said = found.setdefault(status, {"description": "", "content": {MEDIA_TYPE: {"schema": SCHEMA}}})
        said["description"] += f"{', ' if said['description'] else ''}{title} (`{kind.code}`)"
    found[422]["model"] = HTTPValidationError  # FastAPI no longer documents its own once this is given
    found[503]["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return found


problem_responses: Final = _responses()
"""The error answers for the OpenAPI document: `FastAPI(responses=problem_responses)`, or of a router or a route."""
