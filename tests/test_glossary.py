"""The words of docs/reference/glossary.md: each stands there once, and those that it rules out are nowhere else."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "reference" / "glossary.md").read_text(encoding="utf-8")
SOURCES = sorted(
    file
    for folder in (
        "actors",
        "benchmarks",
        "config",
        "console",
        "engine",
        "examples",
        "integrations",
        "ops",
        "persistence",
        "wire",
    )
    for file in (ROOT / folder).rglob("*.py")
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "design"),
]

PHRASES = re.compile(
    r"\b[Ww]ho\b|\bfor ever\b|\b(?:hears?|told) of\b|\b(?:the|this|that) very\b|(?<!\bthere )\b(?:is|are) none\b"
)
"""Habits of speech that have to be read twice."""


def _table(heading: str) -> list[list[str]]:
    """Return the rows of the table under a heading, each as its cells."""
    section = GLOSSARY.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return rows[2:]


def _ruled_out() -> list[str]:
    return [word for row in _table("Words that are not used") for word in row[0].split(", ")]


def _found(text: str, words: list[str] | tuple[str, ...]) -> list[str]:
    """Return the words in a text, also as plurals and with -ed and -ing; "in flight" is a term of the field."""
    return re.findall(rf"(?<!\bin[ -])\b(?:{'|'.join(words)})(?:s|ed|ing)?\b", text, re.IGNORECASE)


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the text of each docstring, those of attributes included."""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
        else:
            yield from _docstrings(node)


def _comments(file: Path) -> Iterator[str]:
    with file.open("rb") as source:
        yield from (token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT)


def _messages(tree: ast.AST) -> Iterator[str]:
    """Yield each text that is not a docstring: what errors and logs are made of."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _prose(file: Path) -> str:
    """Return the docstrings and comments of a source file."""
    return "\n".join((*_docstrings(_tree(file)), *_comments(file)))


def test_each_word_of_the_glossary_stands_there_once() -> None:
    words = re.findall(r"^\| ([a-z ]+) \| (?!---)", GLOSSARY.split("\n## Two words")[0], re.MULTILINE)
    entries = [word for word in words if word != "word"]

    assert len(entries) >= 30
    assert sorted(set(entries)) == sorted(entries)


def test_each_file_that_the_glossary_names_exists() -> None:
    assert [path for path in re.findall(r"`([a-z_]+/[a-z_/.]*)`", GLOSSARY) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_none_of_the_words_that_are_ruled_out(page: Path) -> None:
    text = page.read_text(encoding="utf-8").split("\n## Words that are not used\n")[0]
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)

    assert _found(prose, _ruled_out()) == []


def test_messages_have_none_of_the_words_that_are_ruled_out() -> None:
    found = [
        f"{file.name}: {text}" for file in SOURCES for text in _messages(_tree(file)) if _found(text, _ruled_out())
    ]

    assert found == []


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_comments_and_docstrings_have_none_of_the_words_that_are_ruled_out(file: Path) -> None:
    prose = _prose(file)

    assert _found(prose, _ruled_out()) == []
    assert [hit[0] for hit in PHRASES.finditer(prose)] == []
