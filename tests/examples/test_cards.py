"""The cards example: two workers under uvicorn, one of them killed under load; and its own tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.examples.running import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "cards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the example."""
    return shutil.copytree(EXAMPLE, tmp_path / "cards", ignore=shutil.ignore_patterns("__pycache__", "cards-state"))


@pytest.mark.timeout(300)  # it starts a server twice, and replaces a worker: less than 10 s on an idle machine
def test_nothing_is_lost_or_done_twice_when_a_worker_is_killed(folder: Path) -> None:
    status, printed, complaints = run("cards.py", cwd=folder)

    assert (status, complaints) == (0, ""), printed
    assert "NO" not in printed
    assert "nothing was lost, and nothing was done or shown twice" in printed


def test_the_tests_of_the_example_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # of the run that this test is part of

    # Without pytest-asyncio, which the example does not use: it warns of each project that does not set it up.
    status, printed, complaints = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", cwd=folder)

    assert (status, complaints) == (0, ""), printed
    assert "7 passed" in printed
