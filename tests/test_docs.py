"""The pages are true: each ```python block runs as it stands, tables name what the source has, links lead somewhere.

A block runs in an interpreter of its own, in a folder that holds the files that its page shows (```yaml NAME). If a
```text output block follows it, that is what it prints.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import typer
from typer.core import TyperGroup

from scopestate import errors
from scopestate.cli.app import app
from scopestate.config import LimitsConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDE = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "design")
"""The pages for users: the blocks of docs/design are sketches."""
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("tests/**/*.md"))]
SOURCES = sorted(
    file
    for folder in (
        "actors",
        "benchmarks",
        "config",
        "docs",
        "engine",
        "examples",
        "integrations",
        "ops",
        "persistence",
        "tests",
        "wire",
    )
    for file in (ROOT / folder).rglob("*")
    if file.suffix in {".md", ".py", ".yaml"}
)
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<file>\S+))?\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"\s*^```text output\n(?P<printed>.*?)^```$", re.MULTILINE | re.DOTALL)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _examples() -> list[pytest.param]:
    """Return page, source and expected output of each block to run, with page and place as the id."""
    found = []
    for page in (README, *GUIDE):
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == "python" and not match["file"]:
                line = text.count("\n", 0, match.start()) + 1
                output = OUTPUT.match(text, match.end())
                found.append(
                    pytest.param(
                        page,
                        "\n" * line + match["source"],  # the line numbers of a traceback are those of the page
                        output["printed"] if output else "",
                        id=f"{page.relative_to(ROOT)}:{line}",
                    )
                )
    return found


EXAMPLES = _examples()


def _section(page: str, heading: str) -> str:
    return _text(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def _first_cells(section: str) -> list[str]:
    """Return the names in backquotes of the first column of the section's table."""
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_pages_have_examples() -> None:
    assert len(EXAMPLES) >= 14


def test_the_readme_is_short_and_its_example_prints_something() -> None:
    assert len(README.read_bytes()) <= 7_000
    assert [printed for page, _, printed in (example.values for example in EXAMPLES) if page == README] != [""]


@pytest.mark.parametrize(("page", "source", "printed"), EXAMPLES)
def test_example_runs_without_error_or_warning(page: Path, source: str, printed: str, tmp_path: Path) -> None:
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["file"] and match["language"] != "text":
            (tmp_path / match["file"]).write_text(match["source"], encoding="utf-8")
    script = tmp_path / page.name
    script.write_text(source, encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == printed


def test_each_logger_of_the_source_has_its_line_and_no_other() -> None:
    used = set()
    for package in ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire"):
        for file in (ROOT / package).rglob("*.py"):
            used.update(re.findall(r'(?:getLogger|\bLog)\("(scopestate[^"]*)"\)', file.read_text(encoding="utf-8")))

    assert set(_first_cells(_section("docs/reference/operations.md", "Logs"))) == used


def test_each_command_has_its_place_and_no_other() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    context = command.make_context("scopestate", [], resilient_parsing=True)
    groups = {"cache", "config", "store", "consumers", "dead-letters"}
    real = {name for name in command.commands if name not in groups}
    for name in groups:
        _, group, _ = command.resolve_command(context, [name])
        assert isinstance(group, TyperGroup)
        real.update(f"{name} {inner}" for inner in group.commands)

    assert {re.split(r" [A-Z[]", cell)[0] for cell in _first_cells(_text("docs/reference/command-line.md"))} == real


def test_each_limit_has_its_line_and_no_other() -> None:
    assert _first_cells(_section("docs/reference/operations.md", "Limits that you can set")) == [
        field.name for field in msgspec.structs.fields(LimitsConfig)
    ]


def test_each_error_in_the_table_exists_and_has_the_code_that_stands_there() -> None:
    rows = [line.split("|") for line in _text("docs/reference/errors.md").splitlines() if line.startswith("| `")]

    for _, names, codes, *_ in rows:
        kinds = [getattr(errors, name) for name in re.findall(r"`([^`]+)`", names)]
        if errors.StorageError not in kinds:  # its code is that of the call that failed
            assert [kind.code for kind in kinds] == re.findall(r"`([^`]+)`", codes)
            assert all(issubclass(kind, errors.ScopestateError) for kind in kinds)


def _anchor(heading: str) -> str:
    """Return the name that GitHub gives a heading: lower case, without punctuation, with hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_each_link_into_the_repository_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / link if link else page, anchor) for link, anchor in links]

    assert [target for target, _ in targets if not target.exists()] == []
    assert [(target, anchor) for target, anchor in targets if anchor and anchor not in _anchors(target)] == []


def test_the_index_lists_every_page_of_the_folder() -> None:
    folder = ROOT / "docs"
    listed = {folder / name for name in re.findall(r"\]\(([^)#]+)\)", _text("docs/index.md"))}
    pages = {page for page in GUIDE if page.parent.name != "tutorial"}  # the tutorial's own index lists its steps

    assert pages - listed == {folder / "index.md"}


CITED = re.compile(
    r"docs/reference/(?P<page>semantics|protocol)\.md"
    r"(?P<sections>,? (?:sections? )?\d+(?:\.\d+)?(?:(?:,| and| to) \d+(?:\.\d+)?)*)"
    r"(?P<points>,? points? \d+(?:(?:,| and| to) \d+)*)?"
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def _numbered(page: str) -> set[str]:
    """Return the numbers of the sections and subsections, and of the points of each section's list: `8.17`."""
    numbers = set()
    section = ""
    for line in _text(page).splitlines():
        if heading := re.match(r"#+ (\d+)(\.\d+)?\.? ", line):
            section = heading[1]
            numbers.add(section + (heading[2] or ""))
        elif point := re.match(r"(\d+)\. ", line):
            numbers.add(f"{section}.{point[1]}")
    return numbers


def test_cited_sections_of_semantics_and_protocol_exist() -> None:
    numbers = {page: _numbered(f"docs/reference/{page}.md") for page in ("semantics", "protocol")}
    citations = set()
    for file in SOURCES:
        # A citation may continue after a line break, and after the mark of a comment.
        for match in CITED.finditer(re.sub(r"\s+(?:# )?", " ", file.read_text(encoding="utf-8"))):
            cited = NUMBER.findall(match["sections"])
            points = NUMBER.findall(match["points"] or "")
            cited += [f"{cited[-1]}.{point}" for point in points]
            citations.update((file.relative_to(ROOT), match["page"], number) for number in cited)

    assert len(citations) >= 50
    assert {citation for citation in citations if citation[2] not in numbers[citation[1]]} == set()


def test_cited_pages_exist() -> None:
    cited = {
        (file.relative_to(ROOT), page)
        for file in SOURCES
        for page in re.findall(r"\bdocs/[\w/.-]+\.md\b", file.read_text(encoding="utf-8"))
    }

    assert len(cited) >= 50
    assert {(file, page) for file, page in cited if not (ROOT / page).exists()} == set()


def _guide() -> str:
    """Return what CONTRIBUTING says about the source, from the walk to the end."""
    return _text("CONTRIBUTING.md").split("\n## Reading the source\n")[1]


def test_reading_the_source_names_files_and_functions_that_exist() -> None:
    guide = _guide()
    files = re.findall(r"`(\w+/[\w/]+\.(?:py|json))`", guide)
    methods = re.findall(r"`([A-Z_]\w+)\.(?!md)(\w+)`", guide)
    source = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES if file.suffix == ".py")

    assert len(files) >= 30
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert len(methods) >= 15
    assert [name for name in methods if not _defines(source, *name)] == []


def test_each_name_that_follows_a_file_is_in_that_file() -> None:
    following = re.findall(r"`(\w+/[\w/]+\.py)`, `(?:([A-Z_]\w+)\.)?(\w+)`", _guide())

    assert len(following) >= 15
    for file, owner, name in following:
        text = _text(file)
        assert _defines(text, owner, name) if owner else re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), (
            name
        )


def test_each_line_that_the_table_quotes_stands_in_its_file() -> None:
    rows = [row.split(" | ") for row in _guide().splitlines() if row.startswith("| ") and "`" in row]

    assert len(rows) >= 8
    for _, place, line in rows:
        file = re.findall(r"`([^`]+)`", place)[0]
        assert line.strip(" |`") in _text(file), line


def _defines(source: str, owner: str, method: str) -> bool:
    """Say whether class `owner` has a `def method` in its body: the lines up to the next one without indentation."""
    body = re.search(rf"^class {owner}\b.*?\n(?=\S|\Z)", source, re.MULTILINE | re.DOTALL)
    return body is not None and re.search(rf"^    (?:async )?def {method}\b", body.group(), re.MULTILINE) is not None
