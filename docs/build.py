"""Build the documentation site: `python docs/build.py [FOLDER]`, or `make docs`. Needs no network.

Zensical gets a copy of the pages. In the copy, README and SECURITY are pages too, and a link to another file outside
docs/ is its text only, because the site does not have it. Raises CalledProcessError if Zensical warns of anything, such
as a link that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = {"README.md": "project/readme.md", "SECURITY.md": "project/security.md"}
"""The files outside docs/ that are pages of the site, and where."""
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?!\w+:)([^)#\s]*)(#[^)\s]+)?\)")
ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)]+\.md)\) \| (.+) \|$", re.MULTILINE)
NAMED = re.compile(r"\A```(\w+) ([^\s`]+)$", re.MULTILINE)
"""The first line of a block with the name of its file: Zensical takes the name as an option, `title`."""
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def _title(page: Path) -> str:
    return str(re.findall(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)[0]).replace("`", "")


def _staged(text: str, source: Path, place: str) -> str:
    """Return a page with its links as they are in the site, where it lies at `place`."""

    def mend(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if not target:
            return match[0]
        path = (source.parent / target).resolve()
        inside = path.is_relative_to(DOCS) and path.is_file()
        name = str(path.relative_to(DOCS)) if inside else PROJECT.get(os.path.relpath(path, ROOT), "")
        if path == DOCS / "design":
            name = "design/index.md"
        return f"[{label}]({os.path.relpath(name, Path(place).parent)}{anchor})" if name else label

    parts = FENCE.split(text)
    return "".join(
        NAMED.sub(r'```\1 title="\2"', part) if part.startswith("```") else LINK.sub(mend, part) for part in parts
    )


def navigation() -> list[dict[str, Any]]:
    """Return the navigation: the tutorial, then the tables of docs/index.md in their order, then the design pages."""
    parts = re.split(r"^## (.+)$", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    steps = [DOCS / "tutorial" / "index.md", *sorted((DOCS / "tutorial").glob("[0-9]*.md"))]
    tree: list[dict[str, Any]] = [
        {"Home": "index.md"},
        {"Tutorial": [{_title(step): str(step.relative_to(DOCS))} for step in steps]},
    ]
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        rows = [{title: link} for title, link, _ in ROW.findall(text) if not link.startswith("..")]
        tree.append({heading: rows})
    designs = sorted((DOCS / "design").glob("*.md"))
    tree.append(
        {"Design": ["design/index.md", *({_title(page): str(page.relative_to(DOCS))} for page in designs)]},
    )
    tree.append({"Project": [{_title(ROOT / name): place} for name, place in PROJECT.items()]})
    return tree


def _llms() -> str:
    """Return llms.txt: each page of docs/index.md with its subject, for programs that read the documentation."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    parts = re.split(r"^## (.+)$", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [
        f"# {config['site_name']}",
        "",
        f"> {config['site_description']}",
        "",
        "All pages in one file: [llms-full.txt](llms-full.txt)",
        "",
        "## Tutorial",
        "",
    ]
    lines += [
        f"- [{_title(page)}]({page.relative_to(DOCS).with_suffix('.html')})"
        for page in sorted((DOCS / "tutorial").glob("*.md"))
    ]
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        lines += ["", f"## {heading}", ""]
        lines += [
            f"- [{title}]({link.removesuffix('.md')}.html): {subject}"
            for title, link, subject in ROW.findall(text)
            if not link.startswith("..")
        ]
    return "\n".join(lines) + "\n"


def _llms_full(pages: Path, tree: list[dict[str, Any]]) -> str:
    """Return llms-full.txt: the text of every page but the design decisions, in the order of the navigation."""
    places: list[str] = []
    for part in tree:
        for heading, inner in part.items():
            if heading != "Design":
                places += [inner] if isinstance(inner, str) else [place for row in inner for place in row.values()]
    texts = [(place, (pages / place).read_text(encoding="utf-8").strip()) for place in places]
    return "\n\n".join(f"<!-- {place.removesuffix('.md')}.html -->\n\n{text}" for place, text in texts) + "\n"


def build(folder: Path) -> Path:
    """Build the site in `folder`, which is emptied first, and return where its pages are."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in DOCS.rglob("*.md"):
        place = str(page.relative_to(DOCS))
        (pages / place).write_text(_staged(page.read_text(encoding="utf-8"), page, place), encoding="utf-8")
    (pages / "project").mkdir()
    for name, place in PROJECT.items():
        text = _staged((ROOT / name).read_text(encoding="utf-8"), ROOT / name, place)
        (pages / place).write_text(text.replace("](docs/", "](../").replace('src="docs/', 'src="../'), encoding="utf-8")
    designs = "\n".join(f"- [{_title(page)}]({page.name})" for page in sorted((DOCS / "design").glob("*.md")))
    (pages / "design" / "index.md").write_text(f"# Design decisions\n\n{designs}\n", encoding="utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    tree = navigation()
    config |= {"docs_dir": "pages", "site_dir": "site", "nav": tree}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    program = Path(sys.executable).parent / "zensical"
    subprocess.run([program, "build", "--strict", "--config-file", folder / "mkdocs.yml"], check=True)  # noqa: S603 - ours
    (folder / "site" / "llms.txt").write_text(_llms(), encoding="utf-8")
    (folder / "site" / "llms-full.txt").write_text(_llms_full(pages, tree), encoding="utf-8")
    return folder / "site"


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".cache" / "docs")
