"""A window of a browser that keeps what the browser complains about, and the judge of accessibility."""

from __future__ import annotations

import functools
import re
import time
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from browsers import axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

PATIENCE_MS = 60_000
"""How long a step may take; far longer than it takes on a busy machine."""

ColorScheme = Literal["light", "dark"]

# The level that public bodies ask for, and what is good practice besides.
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_ON_VIOLATION = """
document.addEventListener("securitypolicyviolation", e =>
    console.error(`content security policy: ${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
"""


OPEN: Final[list[Window]] = []
"""The windows that are open now."""


class Window:
    """One private window, with cookies of its own. `page` is its first page. Used by the thread that made it."""

    def __init__(self, browser: Browser, *, width: int = 1280, scheme: ColorScheme = "light", **options: Any) -> None:
        self.complaints: list[str] = []
        """Errors and warnings of the console, failed requests, violations of the content security policy."""
        self.hosts: set[str] = set()
        """The hosts that were asked for something."""
        viewport = {"width": width, "height": 800}
        self.context: BrowserContext = browser.new_context(
            viewport=viewport,  # type: ignore[arg-type]  # a dict of these two numbers
            color_scheme=scheme,
            reduced_motion="reduce",
            **options,
        )
        self.context.set_default_timeout(PATIENCE_MS)
        self.context.add_init_script(_ON_VIOLATION)
        self.context.on("console", self._said)
        self.context.on("weberror", lambda error: self.complaints.append(f"uncaught: {error.error}"))
        self.context.on("request", self._requested)
        self.context.on("requestfailed", self._failed)
        self.context.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.accept()))
        self.page: Page = self.context.new_page()
        OPEN.append(self)

    def close(self) -> None:
        """Close it, and check."""
        OPEN.remove(self)
        try:
            self.check()
        finally:
            self.context.close()

    def check(self) -> None:
        """Fail if the browser has complained of what was not allowed."""
        for page in self.context.pages:
            page.evaluate("0")  # what it complained of before is here when this is answered
        assert not self.complaints, "\n".join(self.complaints)

    def allow(self, pattern: str) -> None:
        """Wait for a complaint that a test has provoked, and forget those in which `pattern` is found."""
        ends = time.monotonic() + PATIENCE_MS / 1000
        while not any(re.search(pattern, complaint) for complaint in self.complaints):
            assert time.monotonic() < ends, f"nothing like {pattern!r} in {self.complaints}"
            self.page.wait_for_timeout(20)  # the browser's messages arrive in the meantime
        self.complaints[:] = [complaint for complaint in self.complaints if not re.search(pattern, complaint)]

    def violations(self, page: Page | None = None) -> list[str]:
        """Return what axe finds on a page, with the elements that it is about."""
        page = page or self.page
        page.evaluate(_axe_script())
        options = {"runOnly": {"type": "tag", "values": _RULES}, "resultTypes": ["violations"]}
        found = page.evaluate("options => axe.run(document, options)", options)["violations"]
        return [
            f"{page.url}: {one['id']} ({one['help']}): {node['html'][:200]}: {node['failureSummary'][:300]}"
            for one in found
            for node in one["nodes"]
        ]

    def overflow(self, page: Page | None = None) -> int:
        """Return by how many CSS pixels a page is wider than its window."""
        page = page or self.page
        page.wait_for_load_state()
        return int(page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth"))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text} ({message.location.get('url')})")

    def _requested(self, request: Request) -> None:
        host = urlsplit(request.url).netloc
        if host:
            self.hosts.add(host)

    def _failed(self, request: Request) -> None:
        # A page that is left ends its own streams, and a download has no page to be shown on.
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"request failed: {request.url}: {request.failure}")


@functools.cache
def _axe_script() -> str:
    return axe().read_text(encoding="utf-8")


def leave_all() -> None:
    """Leave the pages of a server that is about to end: they would ask it for their streams again."""
    for window in OPEN:
        for page in window.context.pages:
            page.goto("about:blank")
