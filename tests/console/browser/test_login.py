"""`scopestate console` in a browser: its address lets in one browser, once, and the token in it gets nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from console_shop import config, fill
from playwright.sync_api import Page, Request, expect
from reliability.living import untraced_environment
from windows import Window, leave_all

from scopestate import Engine

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[str]:
    """Run the command for the shop in a folder; yield the address that it prints."""
    file = folder / "shop.yaml"
    file.write_text(json.dumps(config(folder / "state")), encoding="utf-8")  # YAML takes JSON
    program = [sys.executable, "-m", "scopestate", "console", str(file), "--json", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=untraced_environment()) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            leave_all()
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the state of the shop, which no engine has open."""
    with Engine.from_config(config(tmp_path / "state")) as engine:
        fill(engine)
    return tmp_path


def enter(page: Page, address: str) -> None:
    """Open the address with the token, and wait for the console."""
    page.goto(address)
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


def test_the_token_is_in_no_request_but_the_first_and_not_in_the_address_of_the_page(
    open_window: OpenWindow, folder: Path
) -> None:
    window = open_window()
    with command(folder) as address:
        token = address.partition("token=")[2]
        leaks: list[str] = []

        def look(request: Request) -> None:
            if request.url != address and (token in request.url or token in str(request.all_headers())):
                leaks.append(request.url)

        window.context.on("requestfinished", look)
        enter(window.page, address)
        window.page.get_by_role("link", name="Scopes", exact=True).click()
        expect(window.page.get_by_role("heading", level=1)).to_have_text("Scopes")

        assert token not in window.page.url
        assert token not in window.page.content()
        assert token not in window.page.evaluate("document.referrer + document.cookie")
        assert leaks == []


def test_the_address_lets_in_one_browser_only_and_says_how_to_let_in_another(
    open_window: OpenWindow, folder: Path
) -> None:
    first, second = open_window(), open_window()
    with command(folder) as address:
        enter(first.page, address)
        second.page.goto(address)
        expect(second.page.get_by_role("heading", level=1)).to_have_text("Not allowed")
        expect(second.page.locator("body")).to_contain_text("press Enter in that terminal")
        assert second.violations() == []
        second.allow("status of 401")

        first.page.reload()
        expect(first.page.get_by_role("heading", level=1)).to_have_text("Overview")
        expect(first.page.locator("header")).to_contain_text("read only")


def test_a_link_in_a_page_of_another_site_works_too(open_window: OpenWindow, folder: Path) -> None:
    # Such as a web mail. The cookie is SameSite=Strict: the target of a redirect would not get it.
    window = open_window()
    with command(folder) as address:
        window.page.goto(f"data:text/html,<title>Mail</title><a href='{address}'>The console</a>")
        window.page.get_by_role("link").click()

        expect(window.page.get_by_role("heading", level=1)).to_have_text("Overview")


def test_two_consoles_of_one_machine_do_not_log_each_other_out(open_window: OpenWindow, folder: Path) -> None:
    window = open_window()
    (folder / "other").mkdir()
    with command(folder, "--write") as address, command(folder / "other", "--write") as another:
        enter(window.page, address)
        enter(window.page, another)
        window.page.goto(address.partition("?")[0] + "entry?scope=users&key=ada")
        window.page.get_by_label("Value, as JSON").fill('"changed"')
        window.page.get_by_role("button", name="Save").click()

        expect(window.page.get_by_role("status").first).to_contain_text("saved")
    with Engine.from_config(config(folder / "state")) as engine:
        assert engine.get("users", "ada") == "changed"


def test_the_cookie_of_an_earlier_run_is_not_good(open_window: OpenWindow, folder: Path) -> None:
    window = open_window()
    with command(folder) as address:
        enter(window.page, address)
        window.page.goto("about:blank")
        port = address.partition("?")[0].rstrip("/").rpartition(":")[2]
    with command(folder, "--port", port) as address:
        window.page.goto(address.partition("?")[0])
        expect(window.page.get_by_role("heading", level=1)).to_have_text("Not allowed")
        window.allow("status of 401")

        enter(window.page, address)


def test_a_browser_logs_out_with_the_button(open_window: OpenWindow, folder: Path) -> None:
    window = open_window()
    with command(folder) as address:
        enter(window.page, address)
        window.page.get_by_role("link", name="Live changes").click()
        window.page.get_by_role("button", name="Log out").click()
        expect(window.page.get_by_role("heading", level=1)).to_have_text("Logged out")
        assert window.violations() == []

        window.page.goto(address.partition("?")[0])
        expect(window.page.get_by_role("heading", level=1)).to_have_text("Not allowed")
        window.allow("status of 401")
