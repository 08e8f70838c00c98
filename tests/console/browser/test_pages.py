"""Every page: nothing to complain of, accessible, no wider than a telephone, and usable by the keyboard alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from console_shop import Shop
from playwright.sync_api import Page, expect
from windows import ColorScheme, Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


def addresses(shop: Shop) -> list[str]:
    """Return the address of each kind of page, some with something to say, some without."""
    letter = shop.engine.dead_letters().list(1)[0]
    return [
        shop.url(),
        shop.url("scopes"),
        shop.url("scopes", sizes="1", prefix="cart:"),
        shop.url("scopes", prefix="no such scope"),
        shop.url("keys", scope="users"),
        shop.url("keys", scope="users", limit="2", order="desc"),
        shop.url("keys", scope="users", prefix="no such key"),
        shop.url("keys", scope="no such scope"),
        shop.url("entry", scope="cart:ada", key="book"),
        shop.url("entry", scope="session:web", key="s-0001"),
        shop.url("entry", scope="users", key="no such key"),
        shop.url("changes"),
        shop.url("changes", scope="users", prefix="a"),
        shop.url("triggers"),
        shop.url("dead-letters"),
        shop.url("dead-letters", consumer="search-index"),
        shop.url("dead-letter", id=letter.id),
        shop.url("dead-letter", id="no such letter"),
        shop.url("workers"),
        shop.url("no-such-page"),
    ]


def visit(window: Window, address: str) -> Page:
    """Open a page. The console of a browser says that one is not there, which is no complaint."""
    response = window.page.goto(address)
    assert response is not None
    assert response.status in (200, 404), address
    if response.status == 404:
        window.allow("status of 404")
    return window.page


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_each_page_is_accessible_and_fits(
    open_window: OpenWindow, tmp_path: Path, width: int, scheme: ColorScheme
) -> None:
    window = open_window(width=width, scheme=scheme)
    with Shop(tmp_path) as shop:
        found = []
        for address in addresses(shop):
            page = visit(window, address)
            expect(page.get_by_role("heading", level=1)).to_have_count(1)
            found += window.violations()
            if (overflow := window.overflow()) > 0:
                found.append(f"{address} is {overflow} pixels too wide")

        assert found == []
        assert window.hosts == {f"127.0.0.1:{shop.port}"}


def test_each_browser_shows_each_page(open_in_each: OpenWindow, tmp_path: Path) -> None:
    window = open_in_each(width=360)
    with Shop(tmp_path) as shop:
        for address in addresses(shop):
            page = visit(window, address)
            expect(page.get_by_role("heading", level=1)).to_have_count(1)
            assert window.overflow() == 0, address


def test_each_page_has_a_title_of_its_own(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        pages = ("", "scopes", "changes", "triggers", "dead-letters", "workers")
        titles = [visit(window, shop.url(page)).title() for page in pages]
        titles.append(visit(window, shop.url("keys", scope="users")).title())
        titles.append(visit(window, shop.url("entry", scope="users", key="ada")).title())

    assert len(set(titles)) == len(titles), titles
    assert all("ada" in title or "scopestate" in title for title in titles), titles


def test_dark_is_dark_and_light_is_light(open_window: OpenWindow, tmp_path: Path) -> None:
    with Shop(tmp_path) as shop:
        brightness = []
        for scheme in ("light", "dark"):
            page = visit(open_window(scheme=scheme), shop.url())
            color = page.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness.append(sum(int(part) for part in color.strip("rgba()").split(",")[:3]) / 3)

    assert brightness[0] > 200
    assert brightness[1] < 60


# What has the focus, and whether it can be seen to have it.
_FOCUSED = """() => {
    const element = document.activeElement;
    if (element === document.body) return null;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    return {
        number: [...document.querySelectorAll("*")].indexOf(element),
        text: `${element.tagName} ${element.name ?? ""} ${element.innerText ?? ""}`.slice(0, 60),
        marked: (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1) || style.boxShadow !== "none",
        inside: box.width > 0 && box.height > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0,
    };
}"""
_FOCUSABLE = """() => [...document.querySelectorAll(
        "a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex='0']")]
    .filter(element => element.checkVisibility() && !element.disabled)
    .filter(element => element.type !== "radio" || element.checked)  // arrows lead to the others
    .map(element => [...document.querySelectorAll("*")].indexOf(element))"""


@pytest.mark.parametrize("width", [1280, 360])
def test_the_keyboard_reaches_everything_in_order_and_the_focus_is_seen(
    open_window: OpenWindow, tmp_path: Path, width: int
) -> None:
    window = open_window(width=width)
    with Shop(tmp_path) as shop:
        for address in addresses(shop):
            page = visit(window, address)
            expected = page.evaluate(_FOCUSABLE)
            reached: list[Any] = []
            for _ in expected:
                page.keyboard.press("Tab")
                reached.append(page.evaluate(_FOCUSED))
                assert reached[-1] is not None, f"{address}: the focus is lost after {reached[:-1]}"

            assert [one["number"] for one in reached] == expected, address
            assert [one["text"] for one in reached if not (one["marked"] and one["inside"])] == [], address


def test_the_first_link_leads_past_the_navigation(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path) as shop:
        page = visit(window, shop.url("keys", scope="users"))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")

        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
