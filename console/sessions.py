"""Addresses that let one browser in, once: how `scopestate console` knows the person that has started it."""

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
"""How long an address is good that was not opened."""
_COOKIE: Final = "scopestate_console"

# It loads nothing and links to no other site, so the token in its address gets nowhere. Refused: a redirect. A browser
# would not send the new cookie (SameSite=Strict) to its target if the address was opened from a page of another site.
_WELCOME: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=./">'
    '<title>scopestate</title><main><h1>scopestate</h1><p><a href="./">Go on to the console</a></p></main></html>'
)
_REFUSED: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>scopestate</title><main><h1>Not allowed</h1>"
    "<p>Open the address that <code>scopestate console</code> has printed. It lets one browser in, once, and within 15 "
    "minutes. For another browser, press Enter in that terminal, or start the command again.</p></main></html>"
)


class Sessions:
    """Tokens that are exchanged for a cookie. Each method may be called from any thread."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._exclusive = Guard()
        # Digests: to look one up takes as long for a token that is nearly right as for any other.
        self._links: dict[bytes, float] = {}
        """Of tokens that were not used -> when they end."""
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
        """Return a new cookie for a token, which is used then; None if it is not one, or not any more."""
        ends = self._links.pop(_digest(token), None)
        if ends is None or ends < self._monotonic():
            return None
        cookie = secrets.token_urlsafe(32)
        self._cookies.add(_digest(cookie))
        return cookie

    async def auth(self, request: Request) -> Verdict:
        """Let in a browser with a cookie of this process; one that brings a new token gets a cookie."""
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
