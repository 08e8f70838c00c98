"""Make the pictures of the console in docs/images: `python tests/console/browser/screenshots.py [FOLDER]`.

What differs from run to run (times, process ids, folders) is replaced before a picture is taken, so that two runs give
the same pictures.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `import node_packages`
sys.path.insert(0, str(Path(__file__).parent))  # for `import console_shop`

from browsers import BROWSERS, program
from console_shop import NAMES, Shop
from playwright.sync_api import Browser, Page, expect, sync_playwright
from windows import ColorScheme, Window

IMAGES = Path(__file__).parents[3] / "docs" / "images"
LARGEST = 150_000
"""Bytes of a picture."""

_SAME_EACH_TIME = r"""folder => {
    for (const time of document.querySelectorAll("time")) time.textContent = "2026-11-28 09:30:00 UTC";
    const figures = {"Worker threads": "2", "Saves": "8", "Keys saved": "26"};
    for (const row of document.querySelectorAll(".facts tr"))
        row.cells[1].textContent = figures[row.cells[0].textContent] ?? row.cells[1].textContent;
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const node = texts.currentNode;
        node.data = node.data.replaceAll(folder, "/srv/shop/state")
            .replace(/process \d+ on \S+ since \S+( \S+)*/, "process 4711 on web-1, since 09:12:00")
            .replace(/\d+\.\d ms/, "1.8 ms");
    }
}"""


def take(folder: Path) -> list[Path]:
    """Take all pictures, into a folder; return their paths."""
    taken = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as state, Shop(Path(state)) as shop:
        chosen = program((BROWSERS or ["none"])[0])
        browser = playwright.chromium.launch(executable_path=chosen.path, env={**os.environ, **chosen.environment})
        letter = shop.engine.dead_letters().list(1)[0].id
        pages: list[tuple[str, str, ColorScheme]] = [
            ("overview", shop.url(), "light"),
            ("overview-dark", shop.url(), "dark"),
            ("scopes", shop.url("scopes", sizes="1"), "light"),
            ("keys", shop.url("keys", scope="users"), "light"),
            ("entry", shop.url("entry", scope="cart:ada", key="book"), "light"),
            ("triggers", shop.url("triggers"), "light"),
            ("dead-letter", shop.url("dead-letter", id=letter), "light"),
        ]
        for name, address, scheme in pages:
            window = Window(browser, scheme=scheme)
            window.page.goto(address)
            taken.append(_picture(window.page, folder / f"console-{name}.png", state))
            window.close()
        taken += [_live(browser, shop, folder, state), _conflict(browser, shop, folder, state)]
        browser.close()
    return taken


def _live(browser: Browser, shop: Shop, folder: Path, state: str) -> Path:
    window = Window(browser)
    window.page.goto(shop.url("changes"))
    expect(window.page.get_by_role("status")).to_have_text("Live")
    rows = window.page.locator("#changes tr")
    for number in range(1, 6):
        person = ("ada", "grace", "alan")[number % 3]
        shop.engine.set(f"cart:{person}", f"item-{number}", {"quantity": number, "price": 2.25 * number})
        shop.engine.set("users", person, {"name": NAMES[person], "visits": number})
        expect(rows).to_have_count(2 * number)
    shop.engine.delete("cart:grace", "item-1")
    expect(rows.first).to_contain_text("deleted")
    try:
        return _picture(window.page, folder / "console-changes.png", state)
    finally:
        window.close()


def _conflict(browser: Browser, shop: Shop, folder: Path, state: str) -> Path:
    window = Window(browser)
    shop.engine.set("cart:ada", "pen", {"title": "Pen", "quantity": 1, "price": 2.25})
    window.page.goto(shop.url("entry", scope="cart:ada", key="pen"))
    shop.engine.set("cart:ada", "pen", {"title": "Pen", "quantity": 5, "price": 2.25})
    window.page.get_by_label("Value, as JSON").fill('{\n  "title": "Pen",\n  "quantity": 2,\n  "price": 2.25\n}')
    window.page.get_by_role("button", name="Save").click()
    expect(window.page.get_by_role("alert").first).to_be_visible()
    window.allow("status of 409")
    try:
        return _picture(window.page, folder / "console-conflict.png", state)
    finally:
        window.close()


def _picture(page: Page, path: Path, state: str) -> Path:
    page.evaluate(_SAME_EACH_TIME, state)
    page.screenshot(path=path, animations="disabled")
    assert path.stat().st_size < LARGEST, f"{path.name} has {path.stat().st_size:,} bytes"
    return path


def main() -> None:
    """Take all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("scopestate").setLevel(logging.CRITICAL)  # the shop has orders that cannot be shipped
    for path in take(folder):
        sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
