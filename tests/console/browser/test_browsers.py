"""The browsers and windows that the other tests here stand on do what those tests take for granted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import browsers
import pytest
from served import Served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from windows import Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once

PAGE = """<!doctype html><html lang="en"><title>A page</title><meta name="viewport" content="width=device-width">
<main><h1>A page</h1>{body}</main></html>"""


def serving(body: str, *, policy: str = "default-src 'self'") -> Served:
    """Return a server with one page, which has this body and this content security policy."""

    async def answer(request: Request) -> HTMLResponse:
        return HTMLResponse(PAGE.format(body=body), headers={"Content-Security-Policy": policy})

    icon = Route("/favicon.ico", lambda _: HTMLResponse(""))
    return Served(Starlette(routes=[Route("/", answer), icon]))


def test_each_browser_shows_a_page_and_has_nothing_to_complain_of(open_in_each: OpenWindow) -> None:
    window = open_in_each()
    with serving("<a href='/'>Again</a>") as served:
        window.page.goto(f"http://127.0.0.1:{served.port}/")
        window.page.get_by_role("link", name="Again").click()

        assert window.page.get_by_role("heading").inner_text() == "A page"
        assert window.hosts == {f"127.0.0.1:{served.port}"}
        assert window.violations() == []
        assert window.overflow() == 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>alert(1)</script>", "content security policy: script-src-elem inline"),
        ("<p style='color: red'>red</p>", "content security policy: style-src-attr inline"),
        ("<img alt='' src='http://127.0.0.1:9/pixel.gif'>", "content security policy: img-src"),
        ("<img alt='' src='/not-there.gif'>", "404"),
    ],
)
def test_a_complaint_of_the_browser_fails_the_test(open_window: OpenWindow, body: str, complaint: str) -> None:
    window = open_window()
    with serving(body) as served:
        window.page.goto(f"http://127.0.0.1:{served.port}/")
        with pytest.raises(AssertionError, match=complaint):
            window.check()

        window.allow(complaint)
        window.complaints.clear()


def test_a_script_that_runs_is_noticed_where_the_policy_allows_it(open_window: OpenWindow) -> None:
    window = open_window()
    with serving("<script>alert('from a value'); missing()</script>", policy="script-src 'unsafe-inline'") as served:
        window.page.goto(f"http://127.0.0.1:{served.port}/")

        window.allow("dialog: from a value")
        window.allow("uncaught: .*missing")


def test_what_is_hard_to_use_is_found(open_window: OpenWindow) -> None:
    window = open_window()
    with serving("<input><p style='color: #ccc'>pale</p>", policy="style-src 'unsafe-inline'") as served:
        window.page.goto(f"http://127.0.0.1:{served.port}/")

        found = window.violations()

    assert [any(rule in text for text in found) for rule in ("label", "color-contrast")] == [True, True]


def test_a_page_that_is_too_wide_is_noticed(open_window: OpenWindow) -> None:
    window = open_window(width=360)
    with serving("<pre>" + "wide " * 100 + "</pre>") as served:
        window.page.goto(f"http://127.0.0.1:{served.port}/")

        assert window.overflow() > 1000


def test_the_browser_of_a_snap_is_not_used_and_its_absence_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snap = tmp_path / "snap"
    snap.write_text("#!/bin/sh\n")
    snap.chmod(0o755)
    (tmp_path / "chromium").symlink_to(snap)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browsers, "_CHROME_OF_MACOS", str(tmp_path / "absent"))

    with pytest.raises(AssertionError, match="install Chromium"):
        browsers.program("installed")

    snap.rename(tmp_path / "real")
    (tmp_path / "chromium").unlink()
    (tmp_path / "chromium").symlink_to(tmp_path / "real")
    assert browsers.program("installed").path == os.fspath(tmp_path / "chromium")
