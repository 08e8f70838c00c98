"""Pages of other sites, open in the same browser, can neither read the console nor make it change anything."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from console_shop import Shop
from playwright.sync_api import expect
from served import Served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from windows import Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


@contextmanager
def foreign_page(body: str) -> Iterator[str]:
    """Serve a page at the site `evil.example`; yield its address."""

    def answer(request: Request) -> HTMLResponse:
        del request
        return HTMLResponse(f'<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>Evil</title>{body}')

    with Served(Starlette(routes=[Route("/", answer)])) as served:
        yield f"http://evil.example:{served.port}/"


def form(address: str, **fields: str) -> str:
    """Return a form that sends fields to an address."""
    hidden = "".join(
        f'<input type="hidden" name="{name}" value="{html.escape(text)}">' for name, text in fields.items()
    )
    return f'<form method="post" action="{html.escape(address)}">{hidden}<button>Win a prize</button></form>'


def test_a_form_of_another_site_changes_nothing(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        window.page.goto(shop.url("entry", scope="users", key="ada"))
        (token,) = (c["value"] for c in window.context.cookies() if "csrf" in c["name"])
        revision = str(shop.engine.entry("users", "ada").revision)
        address = shop.url("set", scope="users", key="ada")
        # The token is one that the attacker cannot know; the origin alone is enough to refuse.
        with foreign_page(form(address, csrf=token, revision=revision, value='"gone"')) as evil:
            window.page.goto(evil)
            window.page.get_by_role("button").click()

            expect(window.page.get_by_role("heading", level=1)).to_have_text("The form was not accepted")
        window.allow("403")
        assert shop.engine.get("users", "ada")["name"] == "Ada Lovelace"


def test_a_form_of_another_port_of_this_machine_changes_nothing(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        window.page.goto(shop.url("entry", scope="users", key="ada"))
        (token,) = (c["value"] for c in window.context.cookies() if "csrf" in c["name"])
        body = form(shop.url("set", scope="users", key="ada"), csrf=token, revision="1", value='"gone"')
        with foreign_page(body) as evil:
            # The same site for cookies, as they know no ports; another origin.
            window.page.goto(evil.replace("evil.example", "127.0.0.1"))
            window.page.get_by_role("button").click()

            expect(window.page.get_by_role("heading", level=1)).to_have_text("The form was not accepted")
        window.allow("403")
        assert shop.engine.get("users", "ada")["name"] == "Ada Lovelace"


def test_the_console_is_not_shown_in_a_frame(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop, foreign_page(f'<iframe title="prize" src="{shop.url()}"></iframe>') as evil:
        window.page.goto(evil)

        window.allow("frame-ancestors|ERR_BLOCKED_BY_RESPONSE|403")
        assert window.page.frame_locator("iframe").get_by_role("heading", name="Overview").count() == 0
        window.complaints.clear()


@pytest.mark.parametrize("page", ["", "download?scope=users&key=ada", "stream?scope=users", "keys?scope=users"])
def test_another_site_reads_nothing(open_window: OpenWindow, tmp_path: Path, page: str) -> None:
    window = open_window()
    with Shop(tmp_path) as shop, foreign_page("") as evil:
        window.page.goto(shop.url())
        window.page.goto(evil)
        outcome = window.page.evaluate(
            """async address => {
                const fetched = async mode => {
                    try {
                        const response = await fetch(address, {mode, credentials: "include"});
                        return response.type === "opaque" ? "opaque" : await response.text();
                    } catch (error) { return "refused"; }
                };
                const loaded = tag => new Promise(done => {
                    const element = document.createElement(tag);
                    element.onload = () => done("loaded"); element.onerror = () => done("refused");
                    element.src = address; document.head.append(element);
                });
                return [await fetched("cors"), await fetched("no-cors"), await loaded("script"), await loaded("img")];
            }""",
            shop.url(page),
        )

        assert outcome == ["refused"] * 4
        window.complaints.clear()


def test_a_stream_of_another_site_is_refused(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop, foreign_page("") as evil:
        window.page.goto(evil)
        outcome = window.page.evaluate(
            """address => new Promise(done => {
                const source = new EventSource(address, {withCredentials: true});
                source.onopen = () => done("open");
                source.onerror = () => done(source.readyState === EventSource.CLOSED ? "refused" : "tried again");
            })""",
            shop.url("stream"),
        )

        assert outcome == "refused"
        window.allow("request failed: .*stream")
        window.complaints.clear()


def test_a_name_that_leads_to_this_machine_is_refused(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        response = window.page.goto(f"http://evil.example:{shop.port}/state/")

        assert response is not None
        assert response.status == 421
        assert "Ada" not in window.page.content()
        window.allow("status of 421")
        window.complaints[:] = [said for said in window.complaints if "Cross-Origin-Opener-Policy" not in said]


def test_a_page_that_opens_the_console_has_no_hold_on_it(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        body = f'<a target="_blank" rel="opener" href="{shop.url()}">Look</a>'
        with foreign_page(body) as evil:
            window.page.goto(evil)
            with window.context.expect_page() as opened:
                window.page.get_by_role("link").click()
            opened.value.wait_for_load_state()

            assert opened.value.evaluate("window.opener") is None


def test_an_address_that_another_site_made_is_only_text(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    bad = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'
    parameters = {
        "scopes": ("prefix", "after"),
        "keys": ("scope", "prefix", "cursor", "limit", "order", "done"),
        "entry": ("scope", "key", "done"),
        "download": ("scope", "key"),
        "changes": ("scope", "scope_prefix", "prefix", "events"),
        "dead-letters": ("consumer", "after", "done", "count"),
        "dead-letter": ("id",),
    }
    with Shop(tmp_path) as shop:
        for page, names in parameters.items():
            for name in names:
                response = window.page.goto(shop.url(page, **{"scope": "users", "key": "ada", name: bad}))
                assert response is not None
                assert response.status < 500, (page, name)
                assert "49" not in window.page.inner_text("main"), (page, name)
            window.complaints[:] = [said for said in window.complaints if "status of 4" not in said]
            window.check()
