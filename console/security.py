"""The checks of a request: its host, its caller, and whether a form comes from a page of the console."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

Verdict: TypeAlias = bool | Response | None
Auth = Callable[[Request], Verdict | Awaitable[Verdict]]
"""Decides about a request: True lets it in, a Response is its answer (such as a login page), anything else refuses it.

A plain function runs on a thread, a coroutine function on the event loop.
"""

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""The hosts of this machine, as the header `Host` names them."""

_CSRF_COOKIE: Final = "scopestate_csrf"
CSRF_FIELD: Final = "csrf"

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final[dict[bytes, bytes]] = {
    b"content-security-policy": _POLICY.encode(),
    b"x-frame-options": b"DENY",
    b"x-content-type-options": b"nosniff",
    # Not `no-referrer`: browsers then send `Origin: null` with the forms of this page.
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
"""Headers of every answer, unless the answer has its own."""

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


def allow_everyone(request: Request) -> bool:
    """Let every request in: for a console that only trusted programs and people can reach."""
    del request
    return True


def basic_auth(user: str, password: str) -> Auth:
    """Return an `auth` that asks for a user and a password (HTTP Basic, RFC 7617).

    Use it behind TLS: the password is readable in each request otherwise. Raises ValueError if one of them is empty, or
    if `user` has a colon.
    """
    if not user or not password or ":" in user:
        raise ValueError("basic_auth takes a user without a colon and a password, neither of them empty")
    expected = f"{user}:{password}".encode()

    async def check(request: Request) -> Verdict:
        kind, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "basic" and hmac.compare_digest(_decoded(credentials), expected):
            return True
        challenge = {"WWW-Authenticate": 'Basic realm="scopestate", charset="UTF-8"'}
        return PlainTextResponse("This console needs a user and a password.\n", 401, challenge)

    return check


def _decoded(credentials: str) -> bytes:
    try:
        return base64.b64decode(credentials.strip().encode(), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return b""


class Guard:
    """Refuses requests for other hosts, and adds protective headers to every answer."""

    def __init__(self, app: Any, hosts: Collection[str] | None) -> None:
        """`hosts`: names as in the header `Host`, without a port; None: any."""
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI says. WebSockets are refused: the console has none."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_headers(message.get("headers", ()))}
            await send(message)

        if _is_foreign(scope):
            said = "Pages of other sites may only link to this console.\n"
            await PlainTextResponse(said, 403)(scope, receive, protected)
            return
        host = _header(scope, b"host")
        if self._hosts is None or _without_port(host) in self._hosts:
            await self._app(scope, receive, protected)
            return
        said = (
            f"This console does not answer for the host {host!r}: it answers for {', '.join(sorted(self._hosts))}.\n"
            "A program that mounts it gives more of them: console(..., hosts=[...]).\n"
        )
        await PlainTextResponse(said, 421)(scope, receive, protected)


def _with_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    own = list(headers)
    named = {name.lower() for name, _ in own}
    return own + [(name, value) for name, value in HEADERS.items() if name not in named]


def _header(scope: Scope, wanted: bytes) -> str:
    """Return a header; empty if it is missing, or given more than once."""
    found = [value for name, value in scope["headers"] if name == wanted]
    return found[0].decode("latin-1") if len(found) == 1 else ""


def _is_foreign(scope: Scope) -> bool:
    """Tell whether a page of another site made the request, unless a person followed a link.

    Such a page cannot read the answer, but it could open streams with the password that the browser remembers, and
    measure timing.
    """
    if _header(scope, b"sec-fetch-site") not in {"cross-site", "same-site"}:
        return False
    return (_header(scope, b"sec-fetch-mode"), _header(scope, b"sec-fetch-dest")) != ("navigate", "document")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and not port.strip("0123456789") and name else host).lower()


def cookie_name(name: str, request: Request) -> str:
    """Return the name of a cookie with the port of the request: browsers do not separate cookies by port."""
    host = request.headers.get("Host", "")
    port = host[len(_without_port(host)) + 1 :]
    return f"{name}_{port}" if port else name


def csrf_token(request: Request) -> tuple[str, bool]:
    """Return the token for the forms of a page, and whether it must still be set as a cookie."""
    known = request.cookies.get(cookie_name(_CSRF_COOKIE, request), "")
    return (known, False) if len(known) >= 32 else (secrets.token_urlsafe(32), True)


def give_csrf_token(response: Response, request: Request, token: str) -> None:
    """Set the cookie with which the tokens of forms are compared."""
    secure = request.url.scheme == "https"
    response.set_cookie(
        cookie_name(_CSRF_COOKIE, request), token, path="/", httponly=True, samesite="strict", secure=secure
    )


def wrong_origin(request: Request) -> str | None:
    """Return why a form does not come from a page of this console; None: the browser says that it does.

    Browsers send `Sec-Fetch-Site` over TLS and to this machine, and `Origin` with each form.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return None if site == "same-origin" else f"it comes from another site (`Sec-Fetch-Site: {site}`)"
    origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
    if origin is None:
        return "the browser does not say where it comes from (no `Sec-Fetch-Site` and no `Origin`)"
    try:
        came_from = urlsplit(origin).netloc
    except ValueError:
        came_from = ""
    if not came_from or came_from.lower() != host.lower():
        return f"it comes from {origin}, and this console is at the host {host}; a proxy must pass `Host` on"
    return None


def wrong_token(request: Request, given: str | None) -> bool:
    """Tell whether the token of a form differs from its browser's cookie."""
    known = request.cookies.get(cookie_name(_CSRF_COOKIE, request), "")
    return len(known) < 32 or not hmac.compare_digest(known.encode(), (given or "").encode())
