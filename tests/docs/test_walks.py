"""The tutorial and how-to pages, followed as a reader does: their files, their commands, and what these print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.walking import Walk, has_commands

ROOT = Path(__file__).parents[2]
TUTORIAL = [ROOT / "docs/tutorial/index.md", *sorted((ROOT / "docs/tutorial").glob("[0-9]*.md"))]
HOW_TO = [page for page in sorted((ROOT / "docs/how-to").glob("*.md")) if has_commands(page)]

pytestmark = pytest.mark.timeout(300)  # they start servers: some seconds on an idle machine


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(tmp_path)
    yield walk
    walk.close()


def test_the_tutorial_works_from_the_first_step_to_the_last(walk: Walk) -> None:
    assert len(TUTORIAL) == 7
    for page in TUTORIAL:
        walk.follow(page)


@pytest.mark.parametrize("page", HOW_TO, ids=[page.name for page in HOW_TO])
def test_a_how_to_page_prints_what_it_shows(page: Path, walk: Walk) -> None:
    walk.follow(page)


@pytest.mark.parametrize(
    ("shown", "fails"), [("1", False), ("2", True), ("...", False), ("1\n\nand more", True)], ids=repr
)
def test_a_page_that_shows_something_else_fails(shown: str, fails: bool, tmp_path: Path, walk: Walk) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python one.py\nprint(1)\n```\n\n```sh\npython one.py\n```\n\n```text output\n{shown}\n```\n")

    if fails:
        with pytest.raises(AssertionError, match=r"page\.md:9 shows"):
            walk.follow(page)
    else:
        walk.follow(page)


def test_a_page_whose_command_fails_fails(tmp_path: Path, walk: Walk) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\npython missing.py\n```\n\n```text output\n...\n```\n")

    with pytest.raises(AssertionError, match=r"missing\.py"):
        walk.follow(page)
