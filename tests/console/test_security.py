"""Who may use the console, and what a browser may do with its pages."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.testclient import TestClient
from visitors import HOST, SAME_ORIGIN, Visitor, visit

from scopestate import Engine
from scopestate.console import allow_everyone, basic_auth, console
from scopestate.integrations.asgi import lifespan

NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
PAGES = ["", "scopes", "entry?scope=s&key=k", "changes", "stream", "nowhere", "download?scope=s&key=k"]


@pytest.mark.parametrize("page", PAGES)
def test_without_auth_nothing_is_shown_and_the_page_says_how(engine: Engine, page: str) -> None:
    engine.set("s", "k", "secret")

    response = visit(engine, auth=None).client.get(page)

    assert response.status_code == 403
    assert "basic_auth" in response.text
    assert "secret" not in response.text


def test_a_function_of_the_application_decides(engine: Engine) -> None:
    def plain(request: Request) -> Any:
        return request.headers.get("X-User") == "ada"

    async def waits(request: Request) -> Any:
        return request.headers.get("X-User") == "ada" or RedirectResponse("/login")

    for auth, status in ((plain, 403), (waits, 307)):
        client = visit(engine, auth=auth).client
        assert client.get("scopes", headers={"X-User": "ada"}).status_code == 200
        assert client.get("scopes", headers={"X-User": "eve"}, follow_redirects=False).status_code == status


def test_only_true_lets_a_request_in(engine: Engine) -> None:
    async def careless(request: Request) -> Any:
        return "no"

    assert visit(engine, auth=careless).client.get("").status_code == 403


def test_basic_auth_asks_for_user_and_password(engine: Engine) -> None:
    client = visit(engine, auth=basic_auth("admin", "pässword")).client

    refused = client.get("")

    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Basic ")
    given = base64.b64encode("admin:pässword".encode()).decode()
    assert client.get("", headers={"Authorization": f"Basic {given}"}).status_code == 200
    for wrong in ("Basic !", "Bearer x", "Basic " + base64.b64encode(b"admin:other").decode(), "Basic é"):
        assert client.get("", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
    for user, password in (("", "x"), ("x", ""), ("a:b", "x")):
        with pytest.raises(ValueError, match="without a colon"):
            basic_auth(user, password)


def test_who_may_write_is_decided_for_each_request(engine: Engine) -> None:
    def operator(request: Request) -> bool:
        return request.headers.get("X-User") == "ada"

    client = visit(engine, write=operator).client
    client.headers["X-User"] = "ada"
    assert "read and write" in client.get("").text
    token = client.cookies["scopestate_csrf"]
    form = {"csrf": token, "key": "k", "value": "1"}

    assert client.post("create?scope=s", data=form, headers={**SAME_ORIGIN, "X-User": "eve"}).status_code == 403
    assert client.post("create?scope=s", data=form, headers=SAME_ORIGIN).status_code == 200
    assert engine.get("s", "k") == 1


@pytest.mark.parametrize("page", [*PAGES[:4], "nowhere", "static/console.css", "static/console.js"])
def test_every_answer_has_the_headers_that_protect_it(engine: Engine, writer: Visitor, page: str) -> None:
    engine.set("s", "k", 1)

    headers = writer.client.get(page).headers

    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == ("public, max-age=31536000, immutable" if "static" in page else "no-store")


def test_no_page_has_a_script_or_a_style_of_its_own(engine: Engine, writer: Visitor) -> None:
    engine.set("s", "k", {"a": 1})
    engine.on_change()(lambda event: None)

    for page in ("", "scopes", "keys?scope=s", "entry?scope=s&key=k", "changes", "triggers", "dead-letters", "workers"):
        html = writer.page(page)
        assert re.findall(r"<script(?![^>]* src=)", html) == []
        assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", html) == []


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "another site"),
        ({"Sec-Fetch-Site": "same-site", **NAVIGATION}, "another site"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "other sites"),
        ({"Sec-Fetch-Site": "none"}, "another site"),
        ({"Origin": "http://evil.example"}, "evil.example"),
        ({"Origin": "null"}, "null"),
        ({"Origin": "http://[bad"}, "bad"),
        ({}, "does not say"),
    ],
)
def test_a_form_of_another_site_changes_nothing(
    engine: Engine, writer: Visitor, headers: dict[str, str], said: str
) -> None:
    form = {"csrf": writer.token(), "key": "k", "value": "1"}

    response = writer.client.post("create?scope=s", data=form, headers=headers)

    assert response.status_code == 403
    assert said in response.text
    assert engine.keys("s") == []


def test_the_origin_counts_where_a_browser_sends_nothing_better(engine: Engine, writer: Visitor) -> None:
    form = {"csrf": writer.token(), "key": "k", "value": "1"}

    assert writer.client.post("create?scope=s", data=form, headers={"Origin": f"http://{HOST}"}).status_code == 200
    assert engine.get("s", "k") == 1


@pytest.mark.parametrize("token", [None, "", "short", "x" * 43])
def test_a_form_without_the_token_of_its_browser_changes_nothing(
    engine: Engine, writer: Visitor, token: str | None
) -> None:
    writer.token()
    form = {"key": "k", "value": "1"} if token is None else {"key": "k", "value": "1", "csrf": token}

    response = writer.client.post("create?scope=s", data=form, headers=SAME_ORIGIN)

    assert response.status_code == 403
    assert "token" in response.text
    assert engine.keys("s") == []


def test_the_cookie_of_the_token_is_for_this_site_and_not_for_scripts(writer: Visitor) -> None:
    cookie = writer.client.get("scopes").headers["Set-Cookie"]

    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Set-Cookie" not in writer.client.get("scopes").headers


def test_a_form_that_is_too_large_or_broken_is_refused(engine: Engine, writer: Visitor) -> None:
    writer.token()

    large = writer.client.post("create?scope=s", data={"value": "x" * 3_000_000}, headers=SAME_ORIGIN)
    broken = writer.client.post("create?scope=s", content=b"value=%ff\xff", headers=SAME_ORIGIN)
    many = writer.client.post("create?scope=s", content=b"a=1&" * 2_000, headers=SAME_ORIGIN)

    assert (large.status_code, broken.status_code, many.status_code) == (413, 400, 400)


def test_only_a_form_changes_anything(engine: Engine, writer: Visitor) -> None:
    revision = engine.set("s", "k", 1).revision

    assert writer.client.get(f"delete?scope=s&key=k&revision={revision}").status_code == 405
    assert writer.client.post("scopes").status_code == 405
    assert engine.get("s", "k") == 1


def test_allow_everyone_answers_for_this_machine_only(engine: Engine) -> None:
    client = visit(engine, hosts=None).client

    refused = client.get("", headers={"Host": "rebound.example:8080"})

    assert refused.status_code == 421
    assert "rebound.example" in refused.text
    for host in ("localhost", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST:1"):
        assert client.get("", headers={"Host": host}).status_code == 200


def test_with_auth_any_host_will_do_unless_they_are_named(engine: Engine) -> None:
    async def anybody(request: Request) -> Any:
        return True

    assert visit(engine, auth=anybody, hosts=None).client.get("", headers={"Host": "a.example"}).status_code == 200
    named = visit(engine, auth=anybody, hosts=["a.example"]).client
    assert named.get("", headers={"Host": "a.example:81"}).status_code == 200
    assert named.get("", headers={"Host": "b.example"}).status_code == 421


def test_a_websocket_is_refused(engine: Engine) -> None:
    app = Starlette(routes=[Mount("/state", console(engine, auth=allow_everyone, hosts=[HOST]))])
    client = TestClient(app)

    with pytest.raises(Exception), client.websocket_connect("/state/"):  # noqa: B017 - of the test client
        pass


def test_the_engine_may_be_the_one_of_the_lifespan() -> None:
    mounted = console("engine", auth=allow_everyone, hosts=[HOST])
    app = Starlette(routes=[Mount("/state", mounted)], lifespan=lifespan(setup=lambda engine: engine.set("s", "k", 1)))  # type: ignore[func-returns-value, arg-type, return-value]

    with TestClient(app) as client:
        assert "Keys in memory" in client.get("/state/").text


def test_it_takes_an_engine_or_its_name() -> None:
    with pytest.raises(TypeError, match="open engine"):
        console(object())  # type: ignore[arg-type]


def test_a_response_of_auth_is_the_answer_to_a_form_too(engine: Engine) -> None:
    async def login(request: Request) -> Response:
        return Response("log in", 401)

    client = visit(engine, auth=login, write=True).client

    assert client.post("create?scope=s", data={"key": "k"}).text == "log in"
    assert client.get("stream").text == "log in"
