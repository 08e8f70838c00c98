"""The console as a client of HTTP sees it: a visitor that follows links and sends forms."""

from __future__ import annotations

import re
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from scopestate import Engine
from scopestate.console import Auth, allow_everyone, console

HOST = "testserver"
"""What Starlette's client sends as `Host`."""
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


class Visitor:
    """A browser without a script: follows links, and sends forms with the token of their page."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def page(self, address: str = "", status: int = 200) -> str:
        """Return a page as HTML."""
        response = self.client.get(address)
        assert response.status_code == status, response.text
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        return response.text

    def token(self, page: str = "scopes") -> str:
        """Return the token of the forms."""
        self.client.get(page)
        return self.client.cookies["scopestate_csrf"]

    def send(self, action: str, status: int = 200, **fields: Any) -> str:
        """Send a form; return the page that it leads to."""
        data = {"csrf": self.token(), **fields}
        response = self.client.post(action, data=data, headers=SAME_ORIGIN)
        assert response.status_code == status, response.text
        return response.text


def visit(engine: Engine, *, auth: Auth | None = allow_everyone, **options: Any) -> Visitor:
    """Return a visitor of a console that is mounted under a path."""
    options.setdefault("hosts", [HOST])
    app = Starlette(routes=[Mount("/state", console(engine, auth=auth, **options))])
    return Visitor(TestClient(app, base_url=f"http://{HOST}/state/"))


def text_of(html: str) -> str:
    """Return the text of a page, its whitespace as one space each."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())
