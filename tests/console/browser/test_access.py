"""Who is let in, as a browser sees it, and what works without a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from console_shop import Shop
from playwright.sync_api import expect
from windows import Window

from scopestate.console import basic_auth

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


def test_a_console_without_auth_says_how_to_open_it(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path, auth=None) as shop:
        window.page.goto(shop.url())

        expect(window.page.locator("main")).to_contain_text("basic_auth")
        assert window.violations() == []
        window.allow("status of 403")


def test_a_user_with_a_password_reads_writes_and_sees_live_changes(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(http_credentials={"username": "admin", "password": "secret"})
    with Shop(tmp_path, auth=basic_auth("admin", "secret")) as shop:
        page = window.page
        page.goto(shop.url("entry", scope="users", key="ada"))
        page.get_by_label("Value, as JSON").fill('"changed"')
        page.get_by_role("button", name="Save").click()
        expect(page.locator("main")).to_contain_text('"changed"')
        page.get_by_role("link", name="Live changes", exact=True).click()
        expect(page.locator("#stream-state")).to_have_text("Live")
        shop.engine.set("users", "linus", 1)
        expect(page.locator("#changes tr").filter(has_text="linus")).to_have_count(1)

        assert shop.engine.get("users", "ada") == "changed"


def test_another_password_shows_nothing(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(http_credentials={"username": "admin", "password": "guessed"})
    with Shop(tmp_path, auth=basic_auth("admin", "secret")) as shop:
        response = window.page.goto(shop.url("keys", scope="users"))

        assert response is not None
        assert response.status == 401
        assert "ada" not in window.page.content()
        window.allow("status of 401")


def test_all_but_live_changes_works_without_a_script(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(java_script_enabled=False)
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url())
        page.get_by_role("link", name="Scopes", exact=True).click()
        page.get_by_role("link", name="users").click()
        page.get_by_label("Key begins with").fill("gr")
        page.get_by_label("Key begins with").press("Enter")
        page.get_by_role("link", name="grace").click()
        page.get_by_label("Value, as JSON").fill('"changed"')
        page.get_by_role("button", name="Save").click()
        expect(page.locator("main")).to_contain_text('"changed"')
        page.get_by_text("Delete this key").click()
        page.get_by_role("button", name="Delete").click()
        expect(page.get_by_role("status").first).to_contain_text("deleted")
        page.get_by_role("link", name="Live changes", exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Live changes")

        assert shop.engine.get("users", "grace") is None
