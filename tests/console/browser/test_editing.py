"""Changing the state by hand: with the keyboard, in two windows at once, and the ways of a browser back and forth."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from console_shop import Shop
from playwright.sync_api import Page, expect
from windows import Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


def heading(page: Page, text: str | re.Pattern[str]) -> None:
    """Wait for a page with this in its heading."""
    expect(page.get_by_role("heading", level=1)).to_contain_text(text)


def tab_to(page: Page, what: str) -> None:
    """Press Tab until the element that a selector names has the focus."""
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("what => document.activeElement.matches(what)", what):
            return
    raise AssertionError(f"the keyboard does not reach {what}")


def test_an_entry_is_found_and_changed_by_the_keyboard_alone(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url())
        tab_to(page, "nav a[href='scopes']")
        page.keyboard.press("Enter")
        heading(page, "Scopes")
        tab_to(page, "main a[href='keys?scope=users']")
        page.keyboard.press("Enter")
        heading(page, "users")
        tab_to(page, "input[name=prefix]")
        page.keyboard.type("gr")
        page.keyboard.press("Enter")
        expect(page.locator("main table tbody tr")).to_have_count(1)
        tab_to(page, "main a[href*='entry?']")
        page.keyboard.press("Enter")
        heading(page, "grace")
        tab_to(page, "textarea[name=value]")
        page.keyboard.press("ControlOrMeta+A")
        page.keyboard.type('{"name": "Rear Admiral Hopper"}')
        tab_to(page, "button.primary")
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_contain_text("Rear Admiral Hopper")

        assert shop.engine.get("users", "grace") == {"name": "Rear Admiral Hopper"}


def test_the_second_of_two_windows_is_shown_both_values_and_nothing_is_lost(
    open_window: OpenWindow, tmp_path: Path
) -> None:
    first, window = open_window().page, open_window()
    second = window.page
    with Shop(tmp_path) as shop:
        for page in (first, second):
            page.goto(shop.url("entry", scope="users", key="ada"))
        first.get_by_label("Value, as JSON").fill('{"by": "the first window"}')
        first.get_by_role("button", name="Save").click()
        expect(first.locator("main")).to_contain_text("the first window")
        second.get_by_label("Value, as JSON").fill('{"by": "the second window"}')
        second.get_by_role("button", name="Save").click()

        expect(second.get_by_role("alert")).to_contain_text("changed")
        expect(second.locator("main")).to_contain_text("the first window")
        expect(second.get_by_label("Value, as JSON")).to_have_value(re.compile("the second window"))
        assert shop.engine.get("users", "ada") == {"by": "the first window"}
        assert window.violations() == []
        window.allow("status of 409")

        second.get_by_role("button", name="Save over it").click()
        expect(second.locator("main")).to_contain_text("the second window")
        assert shop.engine.get("users", "ada") == {"by": "the second window"}


def test_text_that_is_not_json_is_kept_and_said_to_be_wrong(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("entry", scope="users", key="ada"))
        page.get_by_label("Value, as JSON").fill('{"name": ')
        page.get_by_role("button", name="Save").click()

        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.get_by_label("Value, as JSON")).to_have_value('{"name": ')
        assert window.violations() == []
        window.allow("status of 422")
        assert shop.engine.get("users", "ada")["name"] == "Ada Lovelace"


def test_a_console_that_only_reads_has_no_forms_that_write(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path, write=False) as shop:
        letter = shop.engine.dead_letters().list(1)[0]
        for address in (
            shop.url("entry", scope="users", key="ada"),
            shop.url("keys", scope="users"),
            shop.url("triggers"),
            shop.url("dead-letters"),
            shop.url("dead-letter", id=letter.id),
        ):
            window.page.goto(address)
            expect(window.page.locator("form[method=post]")).to_have_count(0)


def test_back_and_forward_show_the_same_pages_and_send_nothing_twice(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("keys", scope="users", limit="4"))
        page.get_by_role("link", name="Next page").click()
        expect(page.locator("main table")).to_contain_text("edsger")
        page.get_by_role("link", name="edsger").click()
        heading(page, "edsger")
        page.get_by_label("Value, as JSON").fill('"changed"')
        page.get_by_role("button", name="Save").click()
        expect(page.locator("main")).to_contain_text("changed")
        revision = shop.engine.entry("users", "edsger").revision
        page.go_back()
        heading(page, "edsger")
        page.go_back()
        expect(page.locator("main table")).to_contain_text("edsger")
        expect(page.locator("main table")).not_to_contain_text("ada")
        page.go_back()
        expect(page.locator("main table")).to_contain_text("ada")
        page.go_forward()
        page.go_forward()
        heading(page, "edsger")
        page.reload()

        assert shop.engine.entry("users", "edsger").revision == revision


def test_a_consumer_is_paused_and_resumed(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("triggers"))
        row = page.get_by_role("row").filter(has_text="ship-orders").filter(has=page.get_by_role("button"))
        row.get_by_role("button", name="Pause").first.click()
        expect(row.get_by_role("button", name="Resume").first).to_be_visible()
        assert {one.name: bool(one.paused) for one in shop.engine.consumers()}["ship-orders"]

        row.get_by_role("button", name="Resume").first.click()
        expect(row.get_by_role("button", name="Pause").first).to_be_visible()
        assert not {one.name: bool(one.paused) for one in shop.engine.consumers()}["ship-orders"]


def test_a_dead_letter_is_looked_at_and_purged(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("dead-letters"))
        expect(page.locator("main table tbody tr")).to_have_count(2)
        page.locator("main table a[href*='dead-letter?']").first.click()
        expect(page.locator("main")).to_contain_text("the carrier does not answer")
        page.go_back()
        page.get_by_role("checkbox").first.check()
        page.get_by_text("Purge the chosen").first.click()
        page.get_by_role("button", name="Purge the chosen").click()
        expect(page.locator("main table tbody tr")).to_have_count(1)
        assert shop.engine.dead_letters().count() == 1
