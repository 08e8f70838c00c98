"""The addresses that let one browser in: each once, and not for ever."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from visitors import HOST

from scopestate import Engine
from scopestate.console import console
from scopestate.console.sessions import LINK_S, Sessions


def _browser(engine: Engine, sessions: Sessions, port: int = 80) -> TestClient:
    app = Starlette(routes=[Mount("/state", console(engine, auth=sessions.auth))])
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
