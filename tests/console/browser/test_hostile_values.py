"""Names and values that attack the page, the terminal or the browser's memory are shown as what they are: text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from console_shop import Shop
from playwright.sync_api import expect
from windows import Window

OpenWindow = Callable[..., Window]

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "\"'><img src=x onerror=alert(2)>",
    "</textarea><script>alert(3)</script>",
    "</title><svg onload=alert(4)>",
    "javascript:alert(5)",
    "{{ 7*7 }}{% raw %}${7*7}",
    "\x1b[31mred\x1b[0m\x07",
    "two\nlines\r\nand\ttabs",
    "\u202egnp.exe\u2066\u200b",
    "a&amp;b&lt;c",
    "../../etc/passwd",
    "100%25 of /a/b?c=d#e",
    "",
    "\U0001f600" * 100,
    "w" * 5_000,
]


def test_hostile_names_and_values_run_nothing_on_any_page(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(width=360)
    with Shop(tmp_path, filled=False) as shop:
        for text in HOSTILE:
            shop.engine.set(text, text, {text: [text, {"deep": text}]})
        window.page.goto(shop.url("scopes"))
        links = window.page.locator("main table a[href*='keys?']")
        expect(links).to_have_count(len(HOSTILE))
        assert window.overflow() == 0
        for address in [links.nth(number).get_attribute("href") for number in range(len(HOSTILE))]:
            assert address is not None
            window.page.goto(shop.url("scopes"))
            window.page.locator(f"main table a[href={json.dumps(address)}]").click()
            window.page.wait_for_url(re.compile("/keys"))
            assert window.overflow() == 0, address
            window.page.locator("main table a[href*='entry?']").click()
            window.page.wait_for_url(re.compile("entry"))
            asked = parse_qs(urlsplit(window.page.url).query, keep_blank_values=True)
            assert asked["key"][0] in HOSTILE
            assert asked["scope"] == asked["key"]
            assert window.overflow() == 0, address
            window.check()
        assert window.violations() == []


def test_hostile_changes_run_nothing_while_they_arrive(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(width=360)
    with Shop(tmp_path, filled=False) as shop:
        window.page.goto(shop.url("changes"))
        expect(window.page.get_by_role("status")).to_have_text("Live")
        for text in HOSTILE:
            shop.engine.set(text, text, {text: text})
        shop.engine.set("after", "all", "arrived")

        expect(window.page.locator("main")).to_contain_text("arrived")
        expect(window.page.locator("main")).to_contain_text(SCRIPT)
        assert window.overflow() == 0


def test_a_value_of_five_megabytes_is_cut_and_can_be_downloaded(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    value = [{"number": number, "text": "<b>x</b>" * 10} for number in range(50_000)]
    with Shop(tmp_path, filled=False) as shop:
        shop.engine.set("large", "value", value)
        response = window.page.goto(shop.url("entry", scope="large", key="value"))

        assert response is not None
        assert len(response.body()) < 1_000_000
        with window.page.expect_download() as started:
            window.page.get_by_role("link", name="Download").click()
        downloaded = Path(started.value.path()).read_text(encoding="utf-8")
        assert len(downloaded) > 5_000_000
        assert json.loads(downloaded) == value
        assert window.violations() == []


def test_a_value_of_many_levels_is_shown(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window(width=360)
    value: object = "bottom"
    for _ in range(120):  # 128 are the most
        value = {"down": value}
    with Shop(tmp_path, filled=False) as shop:
        shop.engine.set("deep", "value", value)
        response = window.page.goto(shop.url("entry", scope="deep", key="value"))

        assert response is not None
        assert response.status == 200
        assert window.overflow() == 0


def test_a_million_keys_are_read_a_page_at_a_time(open_window: OpenWindow, tmp_path: Path) -> None:
    window = open_window()
    with Shop(tmp_path, filled=False, memory=True) as shop:
        for number in range(1_000_000):
            shop.engine.set("many", f"key-{number:07}", number)
        begun = time.monotonic()
        response = window.page.goto(shop.url("keys", scope="many"))
        assert response is not None
        assert len(response.body()) < 200_000
        rows = window.page.locator("main table a[href*='entry?']")
        expect(rows.first).to_have_text("key-0000000")
        shown = rows.count()
        window.page.get_by_role("link", name="Next page").click()
        expect(rows.first).to_have_text(f"key-{shown:07}")
        window.page.get_by_label("Key begins with").fill("key-09999")
        window.page.get_by_label("Key begins with").press("Enter")
        expect(rows.first).to_have_text("key-0999900")
        window.page.goto(shop.url("scopes"))
        expect(window.page.locator("main")).to_contain_text("1,000,000")

        # Four pages. Each reads what it shows; one that read all keys would be far above this on a busy machine.
        assert time.monotonic() - begun < 60
