"""An engine in a Litestar application: a plugin opens it, gives it to handlers, and turns its errors into answers.

    @get("/users/{name:str}")
    async def user(name: FromPath[str], engine: EngineDep) -> dict[str, Any]: ...

    app = Litestar([user], plugins=[ScopestatePlugin("engine.yaml")])

docs/how-to/web-frameworks.md has the details.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Unpack

try:
    from litestar import Litestar, Request, Response
    from litestar.config.app import AppConfig
    from litestar.datastructures import State
    from litestar.di import NamedDependency, Provide
    from litestar.plugins import InitPlugin
    from litestar.response.base import ASGIResponse
except ImportError as error:
    raise ImportError("scopestate.integrations.litestar needs Litestar: pip install 'scopestate[litestar]'") from error

from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.integrations.asgi import EngineOptions, Source, lifespan
from scopestate.integrations.problems import problem_of
from scopestate.integrations.sse import HEADERS, ResponseOptions, Watched, WatchStream, open_stream

__all__ = ["EngineDep", "ScopestatePlugin", "WatchResponse", "answer_to_error", "watch_response"]

EngineDep = NamedDependency[Engine]
"""The type of the parameter that is the engine."""


class ScopestatePlugin(InitPlugin):
    """Opens an engine in the lifespan, for `Litestar(plugins=[ScopestatePlugin("engine.yaml")])`.

    A handler of a route or a WebSocket gets it as the parameter `engine: EngineDep`, or under another `name`; elsewhere
    it is `app.state.engine`. Errors of the engine become answers, unless `handle_errors` is false. `source`, `setup`
    and `options` are those of `scopestate.integrations.asgi.lifespan`.
    """

    def __init__(
        self,
        source: Source = None,
        *,
        setup: Callable[[Engine], Awaitable[None] | None] | None = None,
        name: str = "engine",
        handle_errors: bool = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        self._open = lifespan(source, setup=setup, name=name, **options)
        self._name = name
        self._handle_errors = handle_errors

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add the engine to an application. Litestar calls it."""
        name = self._name

        async def engine(state: State) -> Engine:
            found: Engine = state[name]
            return found

        @asynccontextmanager
        async def running(app: Litestar) -> AsyncIterator[None]:
            async with self._open(app) as opened:
                app.state.update(opened)
                yield

        app_config.lifespan.append(running)
        app_config.dependencies[name] = Provide(engine)
        app_config.signature_namespace |= {"Engine": Engine, "EngineDep": EngineDep, "WatchResponse": WatchResponse}
        if self._handle_errors:
            # Litestar has one table for all errors. Handlers that the application has already registered stay.
            app_config.exception_handlers = {ScopestateError: answer_to_error, **(app_config.exception_handlers or {})}
        return app_config


def answer_to_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer a request that has failed with an error of the engine.

    Litestar does not call it for a WebSocket, which it closes with code 4500. Raises the error again if it is not one
    of `STATUSES` in `scopestate.integrations.problems`: a mistake of the program is answered with status 500.
    """
    problem = problem_of(error, f"{request.method} {request.url.path}")
    if problem is None:
        raise error
    headers = problem.headers()
    return Response(problem.body(), status_code=problem.status, media_type=headers.pop("Content-Type"), headers=headers)


class WatchResponse(Response[bytes]):
    """A stream of server-sent events. `watch_response` makes it."""

    def __init__(self, stream: WatchStream) -> None:
        super().__init__(b"", headers=HEADERS, media_type=HEADERS["Content-Type"])
        self.stream = stream

    def to_asgi_response(self, app: Litestar | None, request: Request[Any, Any, Any], **given: Any) -> ASGIResponse:
        """Return the ASGI response to the request. Litestar calls it."""
        return _SentStream(
            self.stream,
            background=self.background or given.get("background"),
            cookies=[*self.cookies, *(given.get("cookies") or ())],
            headers={**(given.get("headers") or {}), **self.headers},
            is_head_response=given.get("is_head_response", False),
            media_type=self.media_type,
        )


class _SentStream(ASGIResponse):
    """A stream as Litestar sends it, with the headers and cookies of the handler, the router and the application."""

    __slots__ = ("_stream",)

    def __init__(self, stream: WatchStream, **given: Any) -> None:
        super().__init__(**given)
        self._stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(name, value) for name, value in self.encode_headers() if name.lower() != b"content-length"]
        await self._stream(scope, receive, send, headers)
        await self.after_response()


async def watch_response(
    request: Request[Any, Any, Any],
    watched: Watched,
    **options: Unpack[ResponseOptions],
) -> WatchResponse:
    """Return a response that streams the changes of a scope, or of an engine, as server-sent events.

    `return await watch_response(request, engine.scope("jobs"))`. The request's header `Last-Event-ID` says where the
    stream continues. The rest is as in `scopestate.integrations.sse.open_stream`.
    """
    return WatchResponse(await open_stream(watched, request.headers.get("Last-Event-ID"), **options))
