"""The README is true: each ```python block runs as it stands, and its tables name what the source has.

A block runs in an interpreter of its own, in a folder that holds the files that the README shows (```yaml NAME).
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
from scopestate.cli import app
from scopestate.config import LimitsConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<file>\S+))?\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)


def _examples() -> list[tuple[str, str]]:
    """Return (id, source) of each block to run; the id is its heading and place, for a readable failure."""
    found = []
    for match in BLOCK.finditer(TEXT):
        if match["language"] == "python" and not match["file"]:
            line = TEXT.count("\n", 0, match.start()) + 1
            heading = re.findall(r"^#+ (.+)$", TEXT[: match.start()], re.MULTILINE)[-1]
            # Keeps the line numbers of a traceback those of the README.
            found.append((f"{heading}, line {line}", "\n" * line + match["source"]))
    return found


EXAMPLES = _examples()


def _section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def _first_cells(section: str) -> list[str]:
    """Return the names in backquotes of the first column of the section's table."""
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("source", [source for _, source in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_example_runs_without_error_or_warning(source: str, tmp_path: Path) -> None:
    for match in BLOCK.finditer(TEXT):
        if match["file"]:
            (tmp_path / match["file"]).write_text(match["source"], encoding="utf-8")
    script = tmp_path / "README.md"
    script.write_text(source, encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_each_logger_of_the_source_has_its_line_and_no_other() -> None:
    used = set()
    for package in ("actors", "config", "engine", "ops", "persistence", "wire"):
        for file in (ROOT / package).rglob("*.py"):
            used.update(re.findall(r'getLogger\("(scopestate[^"]*)"\)', file.read_text(encoding="utf-8")))

    assert set(_first_cells(_section("Health, counts, logs"))) == used


def test_each_command_has_its_place_and_no_other() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    groups = {"config", "store"}
    real = {name for name in command.commands if name not in groups}
    for name in groups:
        group = command.commands[name]
        assert isinstance(group, TyperGroup)
        real.update(f"{name} {inner}" for inner in group.commands)

    assert {re.split(r" [A-Z[]", cell)[0] for cell in _first_cells(_section("Command line"))} == real


def test_each_limit_has_its_line_and_no_other() -> None:
    assert _first_cells(_section("Bounds")) == [field.name for field in msgspec.structs.fields(LimitsConfig)]


def test_each_error_in_the_table_exists_and_has_the_code_that_stands_there() -> None:
    rows = [line.split("|") for line in _section("Errors").splitlines() if line.startswith("| `")]

    for _, names, codes, *_ in rows:
        kinds = [getattr(errors, name) for name in re.findall(r"`([^`]+)`", names)]
        if errors.StorageError not in kinds:  # its code is that of the call that failed
            assert [kind.code for kind in kinds] == re.findall(r"`([^`]+)`", codes)
            assert all(issubclass(kind, errors.ScopestateError) for kind in kinds)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_each_link_into_the_repository_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))

    assert [link for link in links if not (ROOT / link).exists()] == []


def test_reading_the_source_names_files_and_functions_that_exist() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Reading the source\n")[1]
    files = re.findall(r"`(\w+/\w+\.py)`", guide)
    methods = re.findall(r"`([A-Z]\w+)\.(\w+)`", guide)
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for package in ("actors", "config", "engine", "ops", "persistence")
        for file in sorted((ROOT / package).rglob("*.py"))
    )

    assert len(files) >= 10
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert len(methods) >= 10
    assert [name for name in methods if not _defines(source, *name)] == []


def _defines(source: str, owner: str, method: str) -> bool:
    """Say whether class `owner` has a `def method` in its body: the lines up to the next one without indentation."""
    body = re.search(rf"^class {owner}\b.*?\n(?=\S|\Z)", source, re.MULTILINE | re.DOTALL)
    return body is not None and re.search(rf"^    (?:async )?def {method}\b", body.group(), re.MULTILINE) is not None
