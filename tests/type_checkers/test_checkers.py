"""Type checkers see what the API promises: files of expected types are without an error, mistakes are found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from node_packages import NODE, from_npm

HERE = Path(__file__).parent
PYRIGHT = "1.1.405"
MARK = "# wrong"
EXPECTED = ["expected.py", "integrations_expected.py"]
MISTAKES = ["mistakes.py", "integrations_mistakes.py"]

Place = tuple[str, int]
"""The name of a file, and a line."""


def by_mypy(folder: Path) -> dict[Place, str]:
    """Return the errors that mypy finds in all files."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    command += ["--cache-dir", str(folder / "mypy"), "--config-file", "", *EXPECTED, *MISTAKES]
    finished = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=280, check=False)
    assert finished.stderr == ""
    errors: dict[Place, str] = {}
    for line in finished.stdout.splitlines():
        name, number, kind, text = line.split(":", 3)
        if kind.strip() == "error":
            errors.setdefault((name, int(number)), text)
    return errors


def by_pyright(folder: Path) -> dict[Place, str]:
    """Return the errors that pyright finds in all files."""
    package = from_npm(f"pyright-{PYRIGHT}", f"pyright@{PYRIGHT}") / "node_modules" / "pyright"
    names = [*EXPECTED, *MISTAKES]
    for name in names:
        shutil.copy(HERE / name, folder)
    settings = folder / "pyrightconfig.json"
    settings.write_text(json.dumps({"typeCheckingMode": "strict", "include": names}), encoding="utf-8")
    command = [NODE, str(package / "index.js"), "--outputjson", "--pythonpath", sys.executable, "-p", str(settings)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    report = json.loads(finished.stdout)
    assert report["summary"]["filesAnalyzed"] == len(names), finished.stdout
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"]
        for one in report["generalDiagnostics"]
        if one["severity"] == "error"
    }


@pytest.fixture(scope="module", params=[by_mypy, by_pyright])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Place, str]:
    """The errors that a type checker finds."""
    errors: dict[Place, str] = request.param(tmp_path_factory.mktemp("types"))
    return errors


@pytest.mark.timeout(600)  # pyright is fetched once
def test_what_is_right_is_accepted(found: dict[Place, str]) -> None:
    assert {place: text for place, text in found.items() if place[0] in EXPECTED} == {}


@pytest.mark.timeout(600)  # likewise
def test_each_mistake_is_found_and_nothing_else(found: dict[Place, str]) -> None:
    marked = {
        (name, number)
        for name in MISTAKES
        for number, line in enumerate((HERE / name).read_text().splitlines(), 1)
        if line.endswith(MARK)
    }

    assert len(marked) > 70
    assert {place: text for place, text in found.items() if place[0] in MISTAKES and place not in marked} == {}
    assert marked - found.keys() == set()
