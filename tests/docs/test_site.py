"""`make docs` builds the site: each page and export is in it, and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
MODULES = re.findall(r"^## (scopestate\S*)$", API, re.MULTILINE)

pytestmark = pytest.mark.timeout(300)


class _Page(HTMLParser):
    """What a built page has: ids, links, and the addresses of what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in {"canonical", "next", "prev"}:
            self.loaded.append(values.get("href", ""))
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", folder], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {file: _Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_each_page_is_built_and_in_the_navigation(site: Path, pages: dict[Path, _Page]) -> None:
    linked = {(site / urlsplit(link).path).resolve() for link in pages[site / "index.html"].links if "://" not in link}
    sources = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}

    assert {site / page for page in sources} - set(pages) == set()
    assert {site / page for page in sources} - linked - {site / "index.html"} == set()


def test_each_link_and_anchor_of_the_site_leads_somewhere(site: Path, pages: dict[Path, _Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or file.name == "404.html":
                assert parts.scheme in {"", "https", "http", "mailto"}, link
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[target].ids):
                broken.append((str(file.relative_to(site)), link))

    assert broken == []


def test_each_block_of_code_ends_where_it_does_in_the_page(site: Path) -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in (site / "how-to").glob("*.html"))

    assert "```" not in text


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[Path, _Page]) -> None:
    styles = "\n".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))

    assert [address for page in pages.values() for address in page.loaded if urlsplit(address).netloc] == []
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", styles) == []


@pytest.mark.parametrize("name", MODULES)
def test_each_public_export_is_in_the_api_reference(name: str, site: Path, pages: dict[Path, _Page]) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None) or [
        kind for kind, value in vars(module).items() if isinstance(value, type) and value.__module__ == name
    ]
    ids = pages[site / "reference" / "api.html"].ids
    public = {f"{name}.{export}" for export in exported if not export.startswith("_")}

    assert set(re.findall(rf"^::: ({re.escape(name)}\.[A-Za-z_]\w*)$", API, re.MULTILINE)) == public
    assert public - ids == set()


def test_llms_txt_lists_the_pages_and_each_is_there(site: Path) -> None:
    listed = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))

    assert len(listed) >= 40
    assert [link for link in listed if not (site / link).is_file()] == []


def test_llms_full_txt_has_the_text_of_each_page_that_llms_txt_lists(site: Path) -> None:
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    parts = re.split(r"^<!-- (\S+) -->$", (site / "llms-full.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))

    assert len(listed) >= 40
    assert [link for link in listed if link not in texts and not link.startswith("design")] == []
    for link, text in texts.items():
        assert text.lstrip().startswith("# "), link
