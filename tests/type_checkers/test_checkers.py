"""Type checkers see what the handles promise: `expected.py` is without an error, `mistakes.py` is full of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from node_packages import NODE, from_npm

HERE = Path(__file__).parent
PYRIGHT = "1.1.405"
MARK = "# wrong"

Check = Callable[[Path, Path], dict[int, str]]


def by_mypy(file: Path, folder: Path) -> dict[int, str]:
    """Return the errors that mypy finds, by line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    command += ["--cache-dir", str(folder / "mypy"), "--config-file", "", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert finished.stderr == ""
    errors: dict[int, str] = {}
    for line in finished.stdout.splitlines():
        name, number, kind, text = line.split(":", 3)
        assert Path(name).name == file.name, line
        if kind.strip() == "error":
            errors.setdefault(int(number), text)
    return errors


def by_pyright(file: Path, folder: Path) -> dict[int, str]:
    """Return the errors that pyright finds, by line."""
    package = from_npm(f"pyright-{PYRIGHT}", f"pyright@{PYRIGHT}") / "node_modules" / "pyright"
    shutil.copy(file, folder)
    settings = folder / "pyrightconfig.json"
    settings.write_text(json.dumps({"typeCheckingMode": "strict", "include": [file.name]}), encoding="utf-8")
    command = [NODE, str(package / "index.js"), "--outputjson", "--pythonpath", sys.executable, "-p", str(settings)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    report = json.loads(finished.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, finished.stdout
    return {
        one["range"]["start"]["line"] + 1: one["message"]
        for one in report["generalDiagnostics"]
        if one["severity"] == "error"
    }


checkers = pytest.mark.parametrize("check", [by_mypy, by_pyright])


@checkers
@pytest.mark.timeout(300)  # pyright is fetched once
def test_what_is_right_is_accepted(check: Check, tmp_path: Path) -> None:
    assert check(HERE / "expected.py", tmp_path) == {}


@checkers
@pytest.mark.timeout(300)  # pyright is fetched once
def test_each_mistake_is_found_and_nothing_else(check: Check, tmp_path: Path) -> None:
    file = HERE / "mistakes.py"
    marked = {number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith(MARK)}

    found = check(file, tmp_path)

    assert {number: text for number, text in found.items() if number not in marked} == {}
    assert marked - found.keys() == set()
