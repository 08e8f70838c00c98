"""The page of the tutorial in a browser: it shows votes of another window as they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from windows import Window

from tests.docs.walking import ROOT, Walk, blocks

OpenWindow = Callable[..., Window]

TUTORIAL = ROOT / "docs" / "tutorial"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of the service of step 4, with the file of step 3."""
    walk = Walk(tmp_path)
    try:
        for name in ("3-survive-a-restart.md", "4-web-service.md"):
            walk.save(blocks(TUTORIAL / name))
        yield walk.serve("uvicorn app:app")
    finally:
        walk.close()


@pytest.mark.timeout(300)
def test_both_windows_show_a_vote_at_once(address: str, open_window: OpenWindow) -> None:
    one, two = (open_window().page for _ in range(2))
    one.goto(address)
    two.goto(address)

    one.get_by_role("button", name="tea").click()
    expect(one.get_by_role("listitem")).to_have_text(["tea: 1"])
    expect(two.get_by_role("listitem")).to_have_text(["tea: 1"])

    two.get_by_role("button", name="coffee").click()
    two.get_by_role("button", name="tea").click()
    for page in (one, two):
        expect(page.get_by_role("listitem")).to_have_text(["coffee: 1", "tea: 2"])
