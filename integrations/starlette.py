"""An engine in a Starlette application: its use in a request, streams of events, and its errors as answers.

    app = Starlette(routes=..., lifespan=lifespan("engine.yaml"), exception_handlers=exception_handlers)

`lifespan` is in `scopestate.integrations.asgi`. docs/how-to/web-frameworks.md has the details.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, Unpack

try:
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket
except ImportError as error:
    raise ImportError(
        "scopestate.integrations.starlette needs Starlette: pip install 'scopestate[starlette]'"
    ) from error

from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.integrations.problems import problem_of
from scopestate.integrations.sse import HEADERS, ResponseOptions, Watched, WatchStream, open_stream

__all__ = ["WatchResponse", "answer_to_error", "engine_of", "exception_handlers", "watch_response"]


def engine_of(connection: HTTPConnection, name: str = "engine") -> Engine:
    """Return the engine that the lifespan has opened, for a request or a WebSocket. `name` is that of the lifespan.

    Raises RuntimeError if there is none.
    """
    engine = connection.scope.get("state", {}).get(name)
    if not isinstance(engine, Engine):
        raise RuntimeError(  # noqa: TRY004 - a mistake of the application, not of an argument
            f"there is no engine {name!r} in the state of this request: give the application "
            "`lifespan=scopestate.integrations.asgi.lifespan(...)`, and see that the server runs lifespans (a "
            "TestClient does so in a `with` statement)"
        )
    return engine


async def answer_to_error(connection: HTTPConnection, error: Exception) -> Response | None:
    """Answer a request that has failed with an error of the engine; close a WebSocket, with its code as the reason.

    Raises the error again if it is not one of `STATUSES` in `scopestate.integrations.problems`: a mistake of the
    program is logged by the server, and answered with status 500.
    """
    problem = problem_of(error, f"{connection.scope.get('method', 'WEBSOCKET')} {connection.url.path}")
    if problem is None:
        raise error
    if isinstance(connection, WebSocket):
        with suppress(RuntimeError):  # it is closed by now
            await connection.close(problem.close_code, problem.code)
        return None
    return Response(problem.body(), problem.status, problem.headers())


exception_handlers: Final[dict[Any, Any]] = {ScopestateError: answer_to_error}
"""For `Starlette(exception_handlers=...)`, and for `FastAPI(exception_handlers=...)`."""


class WatchResponse(Response):
    """A stream of server-sent events. `watch_response` makes it."""

    def __init__(self, stream: WatchStream) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["Content-Length"]
        self.stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer the request, as ASGI says."""
        await self.stream(scope, receive, send, self.raw_headers)
        if self.background is not None:
            await self.background()


async def watch_response(
    request: Request,
    watched: Watched,
    **options: Unpack[ResponseOptions],
) -> WatchResponse:
    """Return a response that streams the changes of a scope, or of an engine, as server-sent events.

    `return await watch_response(request, engine_of(request).scope("jobs"))`. The request's header `Last-Event-ID` says
    where the stream continues. The rest is as in `scopestate.integrations.sse.open_stream`.
    """
    return WatchResponse(await open_stream(watched, request.headers.get("Last-Event-ID"), **options))
