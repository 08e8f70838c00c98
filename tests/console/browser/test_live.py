"""Live changes: they appear, are filtered, wait while the page is paused, and go on after a restart of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from console_shop import Shop
from playwright.sync_api import Locator, Page, expect
from windows import Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


def changes(page: Page) -> Locator:
    """Return the rows of the changes that are shown."""
    return page.locator("#changes tr")


def state(page: Page) -> Locator:
    """Return what the page says about its stream."""
    return page.get_by_role("status")


def live(page: Page) -> None:
    """Wait until the page says that it gets what happens."""
    expect(state(page)).to_have_text("Live")


def test_a_change_of_another_thread_appears(open_in_each: OpenWindow, tmp_path: Path) -> None:
    window = open_in_each()
    with Shop(tmp_path) as shop:
        window.page.goto(shop.url("changes"))
        live(window.page)
        writer = threading.Thread(target=shop.engine.set, args=("users", "linus", {"name": "Linus Torvalds"}))
        writer.start()
        writer.join()

        row = changes(window.page).filter(has_text="Linus Torvalds")
        expect(row).to_have_count(1)
        expect(row).to_contain_text("users")
        expect(changes(window.page)).to_have_count(1)  # nothing of what was there before
        row.get_by_role("link", name="linus").click()
        expect(window.page.get_by_role("heading", level=1)).to_contain_text("linus")


def test_a_deletion_appears(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        window.page.goto(shop.url("changes", scope="users"))
        live(window.page)
        shop.engine.delete("users", "ada")

        expect(changes(window.page).first).to_contain_text("delete")
        expect(changes(window.page).first).to_contain_text("ada")


def test_only_what_the_filter_names_appears(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("changes"))
        page.get_by_label("Scope", exact=True).fill("users")
        page.get_by_label("Key begins with").fill("li")
        page.get_by_label("Key begins with").press("Enter")
        live(page)
        expect(page.get_by_label("Scope", exact=True)).to_have_value("users")
        shop.engine.set("users", "bjarne", 1)
        shop.engine.set("other", "linus", 1)
        shop.engine.set("users", "linus", 1)

        expect(changes(page).filter(has_text="linus")).to_have_count(1)
        expect(changes(page).filter(has_text="bjarne")).to_have_count(0)
        expect(changes(page).filter(has_text="other")).to_have_count(0)


def test_a_paused_page_holds_what_arrives_and_shows_it_when_it_goes_on(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("changes", scope="users"))
        live(page)
        page.get_by_role("button", name="Pause").click()
        expect(state(page)).to_contain_text("Paused")
        shop.engine.set("users", "linus", 1)
        shop.engine.set("users", "bjarne", 1)
        expect(state(page)).to_contain_text("2")
        expect(changes(page).filter(has_text="linus")).to_have_count(0)

        page.get_by_role("button", name="Resume").click()

        expect(changes(page).filter(has_text="linus")).to_have_count(1)
        expect(changes(page).filter(has_text="bjarne")).to_have_count(1)


def test_the_page_stays_small_however_much_happens(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path, filled=False) as shop:
        window.page.goto(shop.url("changes"))
        live(window.page)
        for number in range(1_500):
            shop.engine.set("busy", f"key-{number}", number)
        shop.engine.set("busy", "last", "the end")

        expect(changes(window.page).first).to_contain_text("the end")
        assert changes(window.page).count() <= 500


def test_the_stream_goes_on_after_a_restart_of_the_server_without_a_gap(
    open_window: OpenWindow, tmp_path: Path
) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("changes", scope="users"))
        live(page)
        shop.engine.set("users", "before", 1)
        expect(changes(page).filter(has_text="before")).to_have_count(1)

        def meanwhile() -> None:
            expect(state(page)).not_to_have_text("Live")
            shop.engine.set("users", "while-down", 1)

        shop.restart(meanwhile)
        live(page)
        shop.engine.set("users", "later", 1)

        expect(changes(page).filter(has_text="later")).to_have_count(1)
        expect(changes(page).filter(has_text="while-down")).to_have_count(1)
        expect(changes(page).filter(has_text="before")).to_have_count(1)
        window.complaints[:] = [said for said in window.complaints if "ERR_" not in said]


def test_leaving_the_page_ends_its_stream(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path, max_streams=16) as shop:  # of which a client has four
        for _ in range(12):
            window.page.goto(shop.url("changes"))
            live(window.page)
            window.page.goto(shop.url())


# A browser that runs for tests counts every page as visible.
_HIDE = """hidden => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.mark.parametrize("seen", [True, False])
def test_a_hidden_page_gives_back_its_connection_and_goes_on_without_a_gap(
    open_window: OpenWindow, tmp_path: Path, seen: bool
) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.goto(shop.url("changes", scope="users"))
        live(page)
        if seen:  # else it knows of the cursor only by the beginning of the stream
            shop.engine.set("users", "before", 1)
            expect(changes(page).filter(has_text="before")).to_have_count(1)
        with page.expect_event("requestfailed"):  # the stream, which the page has closed
            page.evaluate(_HIDE, True)
        shop.engine.set("users", "while-hidden", 1)
        page.evaluate(_HIDE, False)
        shop.engine.set("users", "later", 1)

        expect(changes(page).filter(has_text="later")).to_have_count(1)
        expect(changes(page).filter(has_text="while-hidden")).to_have_count(1)
        expect(changes(page)).to_have_count(3 if seen else 2)


def figure(page: Page, name: str) -> Locator:
    """Return a figure of the overview, by its name."""
    return page.locator("dl.cards div").filter(has_text=name).locator("dd")


def asked_in_a_minute(page: Page) -> list[str]:
    """Let a minute pass on the clock of the page, and return the pages that it asked for; "scopes" is the last."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.clock.fast_forward(60_000)
    page.evaluate("fetch('scopes').then(response => response.text())")
    return asked


def test_the_figures_of_the_overview_refresh_by_themselves_until_they_are_stopped(
    open_window: OpenWindow, tmp_path: Path
) -> None:
    window = open_window()
    with Shop(tmp_path, filled=False) as shop:
        page = window.page
        page.clock.install()
        page.goto(shop.url())
        expect(figure(page, "Keys in memory")).to_have_text("0")
        shop.engine.set("s", "first", 1)
        page.clock.fast_forward(4_000)
        expect(figure(page, "Keys in memory")).to_have_text("1")

        page.get_by_role("button", name="Refreshing").click()
        shop.engine.set("s", "second", 1)
        assert asked_in_a_minute(page) == ["scopes"]
        expect(figure(page, "Keys in memory")).to_have_text("1")


def test_refreshing_leaves_the_focus_where_it_is(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = window.page
        page.clock.install()
        page.goto(shop.url("triggers"))
        button = page.get_by_role("button", name="Pause ship-orders")
        assert asked_in_a_minute(page)[0] == "triggers"
        button.focus()
        assert asked_in_a_minute(page) == ["scopes"]

        expect(button).to_be_focused()
