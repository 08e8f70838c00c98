"""Sizes that an engine must carry: each in a process of its own, whose memory, time and bystander are looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reliability.figures import record


def run_load(name: str, directory: Path) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("child.py")), name, str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == "", "nothing is logged: nothing was dropped, refused or late"
    figures: dict[str, Any] = json.loads(child.stdout)
    record(f"load: {name}", **{key: value for key, value in figures.items() if not isinstance(value, list)})
    # Somebody who works on another scope all the while. A blocked engine would work for seconds before it answers.
    assert figures["calls"] > 0
    assert figures["longest_ms"] < 3000
    return figures


def test_values_of_64_mib(tmp_path: Path) -> None:
    figures = run_load("large_values", tmp_path)

    mib = 64 * 1024 * 1024
    assert figures["seen"] == [mib, mib + 1, mib, 0]
    assert figures["grew_mib"] < 10 * 64, "a few copies at a time, not one per step"


def test_a_scope_of_1_000_000_keys(tmp_path: Path) -> None:
    figures = run_load("large_scope", tmp_path)

    assert figures["one_key_ms"] < 1000
    assert figures["grew_mib"] < 800


def test_100_000_scopes(tmp_path: Path) -> None:
    figures = run_load("many_scopes", tmp_path)

    assert figures["grew_mib"] < 400, "2 KB each, and what a save holds"
    assert figures["closed_s"] < 3


def test_100_000_triggers(tmp_path: Path) -> None:
    figures = run_load("many_triggers", tmp_path)

    assert figures["grew_mib"] < 600


def test_1_000_asyncio_writers_on_one_scope_with_commit_durability(tmp_path: Path) -> None:
    figures = run_load("many_writers", tmp_path)

    assert figures["grew_mib"] < 100
    assert figures["commits"] < 5000, "writes that wait together share a commit"


@pytest.fixture(autouse=True)
def _room(tmp_path: Path) -> None:
    assert os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize > 2 * 2**30, "these tests need 2 GiB of disk"
