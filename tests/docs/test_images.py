"""The drawings in docs/images: well-formed, described for readers who do not see them, and complete in themselves."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.docs.walking import ROOT

IMAGES = sorted((ROOT / "docs" / "images").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
SHOWN = re.compile(r"!\[([^\]]*)\]\(([^)]+\.svg)\)")


@pytest.mark.parametrize("image", IMAGES, ids=[image.name for image in IMAGES])
def test_a_drawing_has_a_title_and_a_description_and_loads_nothing(image: Path) -> None:
    root = ET.fromstring(image.read_bytes())

    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title")
    assert len(root.findtext(f"{SVG}desc") or "") > 40
    names = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert names.isdisjoint({"script", "image", "foreignObject", "use", "a"})
    assert re.findall(r"url\((?!#)|@import|href", image.read_text(encoding="utf-8")) == []
    assert image.stat().st_size < 8_000


def test_each_drawing_is_shown_by_a_page_that_says_what_is_in_it() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [
        (page.parent / path, text) for page in pages for text, path in SHOWN.findall(page.read_text(encoding="utf-8"))
    ]

    assert {path.resolve() for path, _ in shown} >= set(IMAGES)
    assert [path for path, text in shown if len(text) < 40] == []
    assert len(IMAGES) >= 4
