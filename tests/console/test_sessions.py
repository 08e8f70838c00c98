"""The addresses that let one browser in: each once, and not for ever."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.testclient import TestClient
from visitors import HOST, SAME_ORIGIN, visit

from scopestate import Engine
from scopestate.console import console
from scopestate.console.sessions import LINK_S, Sessions


def _browser(engine: Engine, sessions: Sessions, port: int = 80) -> TestClient:
    app = Starlette(routes=[Mount("/state", console(engine, auth=sessions.auth, log_out=sessions.log_out))])
    return TestClient(app, base_url=f"http://{HOST}:{port}/state/")


def test_a_token_is_good_for_one_browser_and_its_cookie_goes_on(engine: Engine) -> None:
    sessions = Sessions()
    token = sessions.new_token()
    first, second = _browser(engine, sessions), _browser(engine, sessions)

    assert first.head(f"?token={token}").status_code == 401  # a preview of the link does not use it
    welcome = first.get(f"?token={token}")
    assert welcome.headers["Referrer-Policy"] == "no-referrer"
    assert welcome.headers["Cache-Control"] == "no-store"
    assert "Overview" in first.get("").text
    assert second.get(f"?token={token}").status_code == 401
    assert first.get(f"?token={token}").status_code == 200  # it has its cookie


def test_a_token_ends_if_it_is_not_used(engine: Engine) -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    late, used = sessions.new_token(), sessions.new_token()
    browser = _browser(engine, sessions)

    assert browser.get(f"?token={used}").status_code == 200
    now[0] = LINK_S + 1
    assert _browser(engine, sessions).get(f"?token={late}").status_code == 401
    sessions.new_token()
    assert len(sessions._links) == 1
    assert "Overview" in browser.get("").text


def test_consoles_at_two_ports_have_cookies_of_their_own(engine: Engine) -> None:
    sessions = Sessions()
    browser = _browser(engine, sessions, 8001)

    browser.get(f"?token={sessions.new_token()}")

    assert list(browser.cookies) == ["scopestate_console_8001"]


def test_a_browser_that_logs_out_is_not_let_in_any_more_and_others_are(engine: Engine) -> None:
    sessions = Sessions()
    first, second = _browser(engine, sessions), _browser(engine, sessions)
    for browser in (first, second):
        browser.get(f"?token={sessions.new_token()}")
    page = first.get("").text
    assert 'action="log-out"' in page
    assert "read only" in page
    kept = dict(first.cookies)
    token = first.cookies["scopestate_csrf"]
    same_origin = {"Sec-Fetch-Site": "same-origin"}

    assert first.get("log-out").status_code == 405
    assert first.post("log-out", data={"csrf": "x"}, headers=same_origin).status_code == 403
    assert first.post("log-out", data={"csrf": token}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert "Overview" in first.get("").text
    left = first.post("log-out", data={"csrf": token}, headers=same_origin)
    assert (left.status_code, "Logged out" in left.text) == (200, True)

    assert "scopestate_console" not in first.cookies
    assert first.get("").status_code == 401
    first.cookies.update(kept)  # a copy of the cookie is worth nothing
    assert first.get("scopes").status_code == 401
    assert first.post("log-out", data={"csrf": token}, headers=same_origin).status_code == 401
    assert "Overview" in second.get("").text


@pytest.mark.parametrize("plain", [True, False])
def test_an_application_says_what_a_log_out_does(plain: bool, engine: Engine) -> None:
    def to_login(request: Request) -> Response:
        return RedirectResponse("/login", 303)

    async def to_login_soon(request: Request) -> Response:
        return to_login(request)

    visitor = visit(engine, log_out=to_login if plain else to_login_soon)
    page = visitor.page("scopes")
    assert 'action="log-out"' in page

    visitor.client.follow_redirects = False
    answer = visitor.client.post("log-out", data={"csrf": visitor.token()}, headers=SAME_ORIGIN)

    assert (answer.status_code, answer.headers["Location"]) == (303, "/login")


def test_without_a_log_out_there_is_no_button(engine: Engine) -> None:
    visitor = visit(engine)

    assert "log-out" not in visitor.page()
    assert visitor.client.post("log-out", headers=SAME_ORIGIN).status_code == 404
