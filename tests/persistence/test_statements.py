"""What every SQL statement of the product keeps to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire")


def _texts(file: Path) -> list[str]:
    """Return the string constants of a module, docstrings and parts of f-strings too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_statements_name_their_parameters_or_use_plain_question_marks() -> None:
    """CPython 3.12.0 to 3.12.3 warn of `?1` with a sequence, later ones of `:name` with one (python/cpython#117995)."""
    numbered = [
        (file.name, text)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for text in _texts(file)
        if re.search(r"(?<!\[)\?[1-9]", text)  # not a sequence for terminals
    ]

    assert numbered == []
