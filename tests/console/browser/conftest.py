"""Browsers and windows for the tests. A window that is left open is closed, and fails the test if it has complaints.

`browser` is one browser; `each_browser` runs a test with each browser of this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))  # for `import windows`

from browsers import BROWSERS, program
from windows import PATIENCE_MS, Window

OpenWindow = Callable[..., Window]
"""The fixture `open_window`: takes what `Window` takes, besides the browser."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine, or a thread of an engine, outlives its test."""
    with no_leftovers():
        yield


# Of a module, not of the session: as long as Playwright's synchronous API is open, its event loop counts as running in
# the thread of the tests, and `asyncio.run` in a test of another folder would refuse.
@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as started:
        yield started


def _launched(playwright: Playwright, name: str) -> Browser:
    chosen = program(name)
    return playwright.chromium.launch(
        executable_path=chosen.path,
        env={**os.environ, **chosen.environment},
        args=["--host-resolver-rules=MAP *.example 127.0.0.1"],  # sites of other people, for attacks
        timeout=PATIENCE_MS,
    )


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """The pinned browser, or the installed one where there is no pinned one."""
    with _launched(playwright, (BROWSERS or ["none"])[0]) as started:
        yield started


@pytest.fixture(scope="module", params=BROWSERS or ["none"])
def each_browser(request: pytest.FixtureRequest, playwright: Playwright) -> Iterator[Browser]:
    """Each browser of this machine in turn."""
    with _launched(playwright, request.param) as started:
        yield started


def _windows_of(browser: Browser) -> Iterator[OpenWindow]:
    with ExitStack() as opened:

        def open_one(**options: Any) -> Window:
            window = Window(browser, **options)
            opened.callback(window.close)
            return window

        yield open_one


@pytest.fixture
def open_window(browser: Browser) -> Iterator[OpenWindow]:
    """Open windows: `open_window(width=360, scheme="dark")`."""
    yield from _windows_of(browser)


@pytest.fixture
def open_in_each(each_browser: Browser) -> Iterator[OpenWindow]:
    """Open windows of each browser of this machine in turn."""
    yield from _windows_of(each_browser)
