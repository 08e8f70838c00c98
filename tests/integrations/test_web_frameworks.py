"""Starlette, FastAPI and Litestar: the engine of the lifespan in routes, errors as answers, streams of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import pytest
from fastapi import FastAPI, WebSocket
from litestar import Litestar, Request, get, put, websocket
from litestar.connection import WebSocket as LitestarSocket
from litestar.datastructures import Cookie
from litestar.params import FromPath
from served import Served
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from scopestate import Engine, Scope
from scopestate.errors import EngineClosed, Overloaded
from scopestate.integrations import fastapi as for_fastapi
from scopestate.integrations import litestar as for_litestar
from scopestate.integrations import starlette as for_starlette
from scopestate.integrations.asgi import lifespan


class User(msgspec.Struct):
    name: str


Users = Annotated[Scope[User], for_fastapi.scope_of("users", type=User)]


def set_up(engine: Engine) -> None:
    engine.set("users", "ada", {"name": "Ada"})


def fail(kind: str, engine: Engine) -> Any:
    """Do what raises an error of each kind."""
    match kind:
        case "conflict":
            return engine.set("users", "ada", {"name": "Eve"}, if_revision=7)
        case "invalid":
            return engine.set("users", "ada", {1, 2})
        case "schema":
            return engine.scope("users", type=User).set("ada", {"nom": "Ada"})  # type: ignore[arg-type]
        case "busy":
            raise Overloaded("a mailbox is full")
        case "mistake":
            raise LookupError("a mistake of the program")
        case _:
            raise EngineClosed("the engine is closed")


def with_starlette() -> Any:
    async def user(request: StarletteRequest) -> JSONResponse:
        return JSONResponse(for_starlette.engine_of(request).get("users", request.path_params["name"]))

    async def failing(request: StarletteRequest) -> JSONResponse:
        return JSONResponse(fail(request.path_params["kind"], for_starlette.engine_of(request)))

    async def events(request: StarletteRequest) -> Any:
        return await for_starlette.watch_response(request, for_starlette.engine_of(request).scope("users"))

    async def talk(socket: Any) -> None:
        await socket.accept()
        await socket.send_json(for_starlette.engine_of(socket).get("users", "ada"))
        fail(await socket.receive_text(), for_starlette.engine_of(socket))

    return Starlette(
        routes=[
            Route("/users/{name}", user),
            Route("/fail/{kind}", failing, methods=["PUT"]),
            Route("/events", events),
            WebSocketRoute("/talk", talk),
        ],
        lifespan=lifespan(setup=set_up),
        exception_handlers=for_starlette.exception_handlers,
    )


def with_fastapi() -> Any:
    app = FastAPI(
        lifespan=lifespan(setup=set_up),
        exception_handlers=for_fastapi.exception_handlers,
        responses=for_fastapi.problem_responses,
    )

    @app.get("/users/{name}")
    async def user(name: str, users: Users) -> Any:
        return msgspec.to_builtins(users.get(name))

    @app.put("/fail/{kind}")
    def failing(kind: str, engine: for_fastapi.EngineDep) -> Any:  # on a thread of Starlette's pool
        return fail(kind, engine)

    @app.get("/events")
    async def events(request: StarletteRequest, engine: for_fastapi.EngineDep) -> Any:
        return await for_fastapi.watch_response(request, engine.scope("users"))

    @app.websocket("/talk")
    async def talk(socket: WebSocket, engine: for_fastapi.EngineDep) -> None:
        await socket.accept()
        await socket.send_json(engine.get("users", "ada"))
        fail(await socket.receive_text(), engine)

    return app


def litestar_of(handlers: list[Any], **settings: Any) -> Litestar:
    """Make an application that leaves the root logger alone, which Litestar configures by itself."""
    return Litestar(handlers, logging_config=None, **settings)


def with_litestar() -> Any:
    @get("/users/{name:str}")
    async def user(name: FromPath[str], engine: for_litestar.EngineDep) -> Any:
        return engine.get("users", name)

    @put("/fail/{kind:str}")
    async def failing(kind: FromPath[str], engine: for_litestar.EngineDep) -> Any:
        return fail(kind, engine)

    @get("/events", response_cookies=[Cookie("seen", value="yes")], response_headers={"X-Mine": "1"})
    async def events(request: Request[Any, Any, Any], engine: for_litestar.EngineDep) -> for_litestar.WatchResponse:
        return await for_litestar.watch_response(request, engine.scope("users"))

    @websocket("/talk")
    async def talk(socket: LitestarSocket[Any, Any, Any], engine: for_litestar.EngineDep) -> None:
        await socket.accept()
        await socket.send_json(engine.get("users", "ada"))
        fail(await socket.receive_text(), engine)

    return litestar_of([user, failing, events, talk], plugins=[for_litestar.ScopestatePlugin(setup=set_up)])


@pytest.fixture(params=[with_starlette, with_fastapi, with_litestar])
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    made: Callable[[], Any] = request.param
    return made


FAILURES = [
    ("conflict", 409, {"code": "CONFLICT", "scope": "users", "key": "ada", "expected_revision": 7, "revision": 1}),
    ("invalid", 422, {"code": "deserialization_error", "path": "$"}),
    ("schema", 422, {"code": "SCHEMA_VIOLATION", "scope": "users", "key": "ada", "path": "$"}),
    ("busy", 503, {"code": "OVERLOADED", "may_be_applied": False}),
    ("closed", 503, {"code": "ENGINE_CLOSED"}),
]


def test_routes_get_the_engine_and_its_errors_are_answers(make: Callable[[], Any]) -> None:
    with Served(make()) as served:
        response, body = served.ask("GET", "/users/ada")
        assert (response.status, msgspec.json.decode(body)) == (200, {"name": "Ada"})

        for kind, status, facts in FAILURES:
            response, body = served.ask("PUT", f"/fail/{kind}")
            problem = msgspec.json.decode(body)
            assert response.status == status, body
            assert response.headers["Content-Type"] == "application/problem+json"
            assert response.headers["Cache-Control"] == "no-store"
            assert problem.items() >= facts.items()
            assert problem["type"] == f"urn:scopestate:{problem['code']}"
            assert problem["status"] == status
            assert problem["title"]
            assert (response.headers["Retry-After"] == "1") is (status == 503)
            assert "mailbox" not in problem["detail"]  # what is of no concern to clients is in the log

        assert served.ask("PUT", "/fail/mistake")[0].status == 500


def test_a_stream_is_a_response_of_the_framework(make: Callable[[], Any]) -> None:
    with Served(make()) as served:
        with served.stream("/events") as source:
            assert source.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert source.response.headers["Content-Length"] is None
            assert [event.kind for event in source.until("synced")] == ["resync", "put", "synced"]
            if make is with_litestar:
                assert source.response.headers["X-Mine"] == "1"
                assert "seen=yes" in source.response.headers["Set-Cookie"]
            told = source.last_event_id
        with served.stream("/events", told) as source:
            served.stop()  # which does not wait for it
            assert source.next() is None


def test_a_websocket_gets_the_engine_and_an_error_closes_it(make: Callable[[], Any]) -> None:
    with Served(make()) as served:
        for kind, code, reason in [("conflict", 1008, "CONFLICT"), ("busy", 1013, "OVERLOADED")]:
            with connect(f"ws://127.0.0.1:{served.port}/talk") as socket:
                assert msgspec.json.decode(socket.recv()) == {"name": "Ada"}
                socket.send(kind)
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv()
            assert closed.value.rcvd is not None
            found = closed.value.rcvd.code, closed.value.rcvd.reason
            # Litestar asks no exception handler for a WebSocket.
            assert found == ((4500, "Internal Server Error") if make is with_litestar else (code, reason))


def test_fastapi_documents_the_problems() -> None:
    app = with_fastapi()
    responses = app.openapi()["paths"]["/fail/{kind}"]["put"]["responses"]
    assert {"403", "409", "410", "413", "422", "503"} <= set(responses)
    schema = responses["409"]["content"]["application/problem+json"]["schema"]
    assert schema["required"] == ["type", "title", "status", "detail", "code"]
    assert "Retry-After" in responses["503"]["headers"]
    assert set(responses["422"]["content"]) == {"application/json", "application/problem+json"}
    assert "422" in app.openapi()["paths"]["/users/{name}"]["get"]["responses"]


def test_a_missing_lifespan_is_named() -> None:
    app = with_fastapi()
    with pytest.raises(RuntimeError, match="there is no engine 'engine' in the state of this request"):
        TestClient(app).get("/users/ada")
    with TestClient(app) as client:
        assert client.get("/users/ada").json() == {"name": "Ada"}


def test_an_application_handles_errors_of_its_own_way() -> None:
    def answer(request: Any, error: Exception) -> Any:
        return for_litestar.Response("mine", status_code=418)

    @put("/fail/{kind:str}")
    async def failing(kind: FromPath[str], engine: for_litestar.EngineDep) -> Any:
        return fail(kind, engine)

    plugin = for_litestar.ScopestatePlugin(name="engine")
    with Served(litestar_of([failing], plugins=[plugin], exception_handlers={Overloaded: answer})) as served:
        assert served.ask("PUT", "/fail/busy")[0].status == 418
        assert served.ask("PUT", "/fail/invalid")[0].status == 422
    plugin = for_litestar.ScopestatePlugin(handle_errors=False)
    with Served(litestar_of([failing], plugins=[plugin])) as served:
        assert served.ask("PUT", "/fail/invalid")[0].status == 500
