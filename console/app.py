"""The application: which requests are let in, how a request becomes a page, and the table of pages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from inspect import isawaitable
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from scopestate.actors.functions import is_async
from scopestate.console import changing, live, pages, reacting
from scopestate.console.asked import Answer, Asked, Download, Moved, Page
from scopestate.console.rendering import STATICS, page
from scopestate.console.security import (
    CSRF_FIELD,
    LOOPBACK,
    Auth,
    Guard,
    Receive,
    Scope,
    Send,
    allow_everyone,
    csrf_token,
    give_csrf_token,
    wrong_origin,
    wrong_token,
)
from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.integrations.problems import problem_of
from scopestate.integrations.starlette import engine_of

T = TypeVar("T")

LogOut = Callable[[Request], Response | Awaitable[Response]]
"""Ends the session of a browser, and returns the answer. As with `Auth`, a plain function runs on a thread."""

THREADS: Final = 8
"""Pages of one console that are made at the same time; further ones wait."""
MOST_FORM_BYTES: Final = 2 * 1024 * 1024
MOST_FIELDS: Final = 1_100
"""Fields of a form; that of dead letters has up to a thousand."""
_YEAR: Final = "public, max-age=31536000, immutable"

_NO_AUTH: Final = (
    "It was mounted without `auth`, so it lets no request in. Give it a function that decides: "
    'console(engine, auth=basic_auth("admin", password)), or one of the application, which takes the request and '
    "returns True. allow_everyone is for a console that only trusted people can reach."
)


def console(
    engine: Engine | str = "engine",
    *,
    auth: Auth | None = None,
    write: bool | Auth = False,
    hosts: Collection[str] | None = None,
    max_streams: int = 64,
    log_out: LogOut | None = None,
) -> Console:
    """Return the console of an engine, an ASGI application: `app.mount("/state", console(engine, auth=...))`.

    `engine` is an open engine, or the name of one that a lifespan of `scopestate.integrations.asgi` opens.
    `auth` decides about each request: a function of the Starlette request, plain or `async`, that returns True to let
    it in, or a response, such as a redirect to a login; `basic_auth(user, password)` makes one. Without `auth` every
    request is refused. `write` decides in the same way which requests may change the state; by default the console only
    reads.

    `hosts` are the names, without ports, that are accepted in the header `Host`. None accepts any; but with
    `auth=allow_everyone` only those of this machine, so that no web page can reach the console through a host name of
    its own (DNS rebinding). `max_streams` bounds the open streams of live changes; a client can have a quarter of them.

    `log_out` is a function of the request, plain or `async`, that ends the session of a browser and returns the
    response, such as a redirect to the page of a login. With it each page has a button. Open streams ask `auth` again
    every 15 s.

    The console acts with all rights of this engine, and has no others. Raises TypeError if `engine` is neither an
    engine nor a name.
    """
    return Console(engine, auth, write, hosts, max_streams, log_out)


class Console:
    """An ASGI application. `console` makes it."""

    def __init__(
        self,
        engine: Engine | str,
        auth: Auth | None,
        write: bool | Auth,
        hosts: Collection[str] | None,
        max_streams: int,
        log_out: LogOut | None,
    ) -> None:
        if not isinstance(engine, (Engine, str)):
            raise TypeError(
                f"console() takes an open engine, or the name of one in the state of a request, not "
                f"{type(engine).__name__}"
            )
        self._engine = engine
        self._auth = auth
        self._write = write
        self._log_out = log_out
        self._streams = live.Streams(max_streams)
        self._limiter: RunVar[CapacityLimiter] = RunVar("scopestate.console")
        """The limit of threads, for each event loop."""
        if hosts is None and auth is allow_everyone:
            hosts = LOOPBACK
        routes = [
            *[Route(path, self._page(make)) for path, make in _PAGES.items()],
            *[Route(path, self._change(make), methods=["POST"]) for path, make in _CHANGES.items()],
            *([] if log_out is None else [Route("/log-out", self._leave(log_out), methods=["POST"])]),
            Route("/stream", self._stream),
            Route("/static/{name}", _static),
        ]
        self._app = Guard(Starlette(routes=routes, exception_handlers={404: self._missing, 405: self._missing}), hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI says."""
        await self._app(scope, receive, send)

    # ---------------------------------------------------------------------------------------------- letting requests in

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """Run `work`, which may wait, on one of the console's threads."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(THREADS)
            self._limiter.set(limiter)
        return await anyio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)

    async def _decide(self, rule: Auth, request: Request) -> bool | Response:
        """Return the decision of the application's function about a request."""
        if is_async(rule):
            verdict: Any = await rule(request)  # type: ignore[misc]  # it is a coroutine function
        else:
            verdict = await self._on_thread(partial(rule, request))
        return verdict if isinstance(verdict, Response) else verdict is True

    async def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that is not let in; None: it is let in."""
        if self._auth is None:
            return _message(403, "The console is closed", _NO_AUTH)
        verdict = await self._decide(self._auth, request)
        if isinstance(verdict, Response):
            return verdict
        return None if verdict else _message(403, "Not allowed", "You may not use this console.")

    async def _may_write(self, request: Request) -> bool:
        if isinstance(self._write, bool):
            return self._write
        return await self._decide(self._write, request) is True

    def _engine_for(self, request: Request) -> Engine:
        return self._engine if isinstance(self._engine, Engine) else engine_of(request, self._engine)

    async def _asked(self, request: Request, token: str, form: list[tuple[str, str]] | None = None) -> Asked:
        return Asked(
            self._engine_for(request),
            request.query_params,
            form or [],
            token,
            may_write=await self._may_write(request),
            may_log_out=self._log_out is not None,
        )

    # ---------------------------------------------------------------------------------------------------- the pages

    def _page(self, make: Page) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            refused = await self._refusal(request)
            if refused is not None:
                return refused
            token, new = csrf_token(request)
            asked = await self._asked(request, token)
            response = await self._made(asked, make)
            if new and (asked.may_write or asked.may_log_out):
                give_csrf_token(response, request, token)
            return response

        return answer

    def _change(self, make: Page) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            refused = await self._refusal(request)
            if refused is not None:
                return refused
            token, _ = csrf_token(request)
            if not (await self._asked(request, token)).may_write:
                return _message(403, "Read only", "This console shows the state, and does not change it.")
            form = await _accepted_form(request)
            if isinstance(form, Response):
                return form
            return await self._made(await self._asked(request, token, form), make)

        return answer

    def _leave(self, log_out: LogOut) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            refused = await self._refusal(request)
            if refused is not None:
                return refused
            form = await _accepted_form(request)
            if isinstance(form, Response):
                return form
            left: Any = log_out(request) if is_async(log_out) else await self._on_thread(partial(log_out, request))
            response: Response = await left if isawaitable(left) else left
            return response

        return answer

    async def _made(self, asked: Asked, make: Page) -> Response:
        """Make a page on a thread; return it, or a page about its error."""
        try:
            return await self._on_thread(lambda: _response(make(asked), asked))
        except ScopestateError as error:
            problem = problem_of(error, f"console: {make.__name__}")
            if problem is None:
                raise
            return _message(problem.status, problem.title, str(error), asked)

    async def _stream(self, request: Request) -> Response:
        refused = await self._refusal(request)
        if refused is not None:
            return refused
        try:
            engine = self._engine_for(request)
            return await self._streams.open(request, engine, partial(self._is_let_in, request))
        except ScopestateError as error:
            problem = problem_of(error, "console: stream")
            return _message(500 if problem is None else problem.status, "No live changes", str(error))

    async def _is_let_in(self, request: Request) -> bool:
        return await self._refusal(request) is None

    async def _missing(self, request: Request, error: Exception) -> Response:
        refused = await self._refusal(request)
        if refused is not None:
            return refused
        status: int = getattr(error, "status_code", 404)
        return _message(status, "No such page", "The console has no page at this address.")


def _response(answer: Answer, asked: Asked) -> Response:
    match answer:
        case Moved(to):
            return RedirectResponse(to, 303)
        case Download():
            return answer.response()
    facts = {"asked": asked, **answer.facts}
    return Response(page(answer.template, facts), answer.status, media_type="text/html")


def _message(status: int, title: str, text: str, asked: Asked | None = None) -> Response:
    facts = {"asked": asked, "title": title, "text": text}
    return Response(page("message.html", facts), status, media_type="text/html")


async def _accepted_form(request: Request) -> list[tuple[str, str]] | Response:
    """Return the fields of a form that a page of this console has sent, or a response that says why it is refused."""
    why = wrong_origin(request)
    if why is not None:
        return _message(403, "The form was not accepted", f"Nothing was changed: {why}.")
    form = await _form(request)
    if isinstance(form, Response):
        return form
    if wrong_token(request, dict(form).get(CSRF_FIELD)):
        return _message(
            403,
            "The form was not accepted",
            "Nothing was changed: its token is not the one of this browser. Load the page again, and see that "
            "the browser keeps the cookies of this site.",
        )
    return form


async def _form(request: Request) -> list[tuple[str, str]] | Response:
    """Return the fields of a form, or a response that says what is wrong with it."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_FORM_BYTES:
                return _message(413, "The form is too large", f"At most {MOST_FORM_BYTES:,} bytes are read.")
    except ClientDisconnect:
        return Response(status_code=400)
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError as error:
        return _message(400, "The form cannot be read", str(error))


async def _static(request: Request) -> Response:
    found = STATICS.get(request.path_params["name"])
    if found is None:
        return Response(status_code=404)
    return Response(found[0], media_type=found[1], headers={"Cache-Control": _YEAR})


_PAGES: Final[dict[str, Page]] = {
    "/": pages.overview,
    "/scopes": pages.scopes,
    "/keys": pages.keys,
    "/entry": pages.entry,
    "/download": pages.download,
    "/changes": live.changes,
    "/triggers": reacting.triggers,
    "/dead-letters": reacting.dead_letters,
    "/dead-letter": reacting.dead_letter,
    "/workers": reacting.workers,
}
_CHANGES: Final[dict[str, Page]] = {
    "/set": changing.set_value,
    "/create": changing.create,
    "/delete": changing.delete,
    "/consumers": changing.consumer,
    "/trigger": changing.trigger,
    "/letters": changing.letters,
}
