"""Imports run one way, every module has its layer, and CONTRIBUTING shows the layers as `make check` knows them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERED = ("actors", "config", "console", "integrations", "ops", "persistence", "wire")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package under its import name, and the contract beside it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "engine", tmp_path / "scopestate", ignore=ignored)
    for folder in LAYERED:
        shutil.copytree(ROOT / folder, tmp_path / "scopestate" / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _lint(tree: Path) -> tuple[int, str]:
    """Run the import contract over the copy; return the exit status and what was printed."""
    # `-P` and the first entry of the path: the copy is read, not the installed package.
    program = f"import sys; sys.path.insert(0, {str(tree)!r}); from importlinter.cli import lint_imports_command as run"
    command = [sys.executable, "-P", "-c", f"{program}; run(['--no-cache', '--no-logo'])"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60, check=False)
    # The messages are folded to the width of a terminal.
    return done.returncode, " ".join(done.stdout.split()) + done.stderr


def test_the_contract_holds(tree: Path) -> None:
    status, said = _lint(tree)

    assert status == 0, said
    assert "1 kept, 0 broken" in said


@pytest.mark.parametrize("name", ["planted.py", "planted/__init__.py"])
def test_a_new_module_or_package_without_a_layer_is_refused_with_what_to_do(tree: Path, name: str) -> None:
    file = tree / "scopestate" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('"""In no layer."""\n', encoding="utf-8")

    status, said = _lint(tree)

    assert status == 1, said
    assert "planted" in said
    assert "must be named in a layer" in said


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("ops/planted.py", "scopestate.actors.turn"),
        ("actors/planted.py", "scopestate.persistence.local"),
        ("config/planted.py", "scopestate.engine"),
        ("stats.py", "scopestate.server"),
        ("server/channels.py", "scopestate.cli.terminal"),
        ("errors.py", "scopestate.ops"),
    ],
)
def test_an_import_from_a_higher_layer_is_refused(tree: Path, importer: str, imported: str) -> None:
    with (tree / "scopestate" / importer).open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef later():\n    import {imported}\n")

    status, said = _lint(tree)

    assert status == 1, said
    assert imported in said


def test_contributing_shows_the_layers_of_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    names = [layer.split(":")[0].strip() for layer in reversed(contract["layers"])]

    assert f"`{' <- '.join(names)}`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _guesses(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that ask what a backend, an adapter or a store has or lacks."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[asked, *_]):
                if re.search("adapter|backend|store", ast.unparse(asked)):
                    yield node.lineno


def test_nothing_guesses_what_a_backend_can_do() -> None:
    assert list(_guesses(ast.parse("if hasattr(self.parts.backend, 'counts'):\n    pass"))) == [1]  # it does find one
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for folder in ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire")
        for file in (ROOT / folder).rglob("*.py")
        for line in _guesses(ast.parse(file.read_text(encoding="utf-8")))
    ]

    assert found == []
