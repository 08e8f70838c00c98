"""Addresses that let in one browser, once: so `scopestate console` lets in only the person that started it."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from scopestate.console.security import Verdict, cookie_name
from scopestate.signals import Guard, exclusive

LINK_S: Final = 15 * 60.0
"""Seconds for which an address that was not opened stays valid."""
_COOKIE: Final = "scopestate_console"

# The page loads nothing and links to no other site, so the token in its address does not leak. Refused: a redirect. If
# the address was opened from a page of another site, the browser would not send the new cookie (SameSite=Strict) to the
# target.
_WELCOME: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=./">'
    '<title>scopestate</title><main><h1>scopestate</h1><p><a href="./">Continue to the console</a></p></main></html>'
)
_REFUSED: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>scopestate</title><main><h1>Not allowed</h1>"
    "<p>Open the address that <code>scopestate console</code> has printed. It lets one browser in, once, and within 15 "
    "minutes. For another browser, press Enter in that terminal, or start the command again.</p></main></html>"
)
_LOGGED_OUT: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>scopestate</title><main><h1>Logged out</h1>"
    "<p>This browser is not let in any more. For a new address, press Enter in the terminal of "
    "<code>scopestate console</code>, or start the command again.</p></main></html>"
)


class Sessions:
    """Tokens that are exchanged for a cookie. Each method may be called from any thread."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._exclusive = Guard()
        # Keyed by digests: looking up a nearly right token takes as long as any other.
        self._links: dict[bytes, float] = {}
        """Digest of an unused token -> when it expires."""
        self._cookies: set[bytes] = set()

    def new_token(self) -> str:
        """Return a token for one browser."""
        token = secrets.token_urlsafe(32)
        self._keep(token)
        return token

    @exclusive
    def _keep(self, token: str) -> None:
        now = self._monotonic()
        self._links = {digest: ends for digest, ends in self._links.items() if ends >= now}
        self._links[_digest(token)] = now + LINK_S

    @exclusive
    def _exchange(self, token: str) -> str | None:
        """Exchange a token for a new cookie. None: the token is unknown, used or expired."""
        ends = self._links.pop(_digest(token), None)
        if ends is None or ends < self._monotonic():
            return None
        cookie = secrets.token_urlsafe(32)
        self._cookies.add(_digest(cookie))
        return cookie

    @exclusive
    def _forget(self, cookie: str) -> None:
        self._cookies.discard(_digest(cookie))

    async def log_out(self, request: Request) -> Response:
        """End the session of a browser: its cookie is worth nothing from now on."""
        name = cookie_name(_COOKIE, request)
        self._forget(request.cookies.get(name, ""))
        answer = HTMLResponse(_LOGGED_OUT)
        answer.delete_cookie(name, path="/", httponly=True, samesite="strict")
        return answer

    async def auth(self, request: Request) -> Verdict:
        """Let in a browser with a cookie of this process; a browser with a new token gets a cookie."""
        name = cookie_name(_COOKIE, request)
        given = request.query_params.get("token")
        if given is not None and request.method == "GET":
            cookie = self._exchange(given)
            if cookie is not None:
                answer = HTMLResponse(_WELCOME, headers={"Referrer-Policy": "no-referrer"})
                answer.set_cookie(name, cookie, path="/", httponly=True, samesite="strict")
                return answer
        if _digest(request.cookies.get(name, "")) in self._cookies:
            return True
        refused: Response = HTMLResponse(_REFUSED, 401)
        return refused


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
