"""The cards example: two workers under uvicorn, one of them killed under load; and its own tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.living import untraced_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "cards"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run this interpreter in a copy of the example; return the exit status and what it has printed."""
    started: list[subprocess.Popen[str]] = []
    shutil.copytree(EXAMPLE, tmp_path / "cards", ignore=shutil.ignore_patterns("__pycache__", "cards-state"))

    def run_(*arguments: str) -> tuple[int, str, str]:
        process = subprocess.Popen(
            [sys.executable, "-B", "-W", "error", *arguments],
            cwd=tmp_path / "cards", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=untraced_environment(), start_new_session=True,
        )  # fmt: skip
        started.append(process)
        printed, complaints = process.communicate(timeout=250)
        return process.returncode, printed, complaints

    yield run_
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.timeout(300)  # it starts a server twice, and replaces a worker: less than 10 s on an idle machine
def test_nothing_is_lost_or_done_twice_when_a_worker_is_killed(run: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, complaints = run("cards.py")

    assert (status, complaints) == (0, ""), printed
    assert "NO" not in printed
    assert "nothing was lost, and nothing was done or shown twice" in printed


def test_the_tests_of_the_example_pass(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # of the run that this test is part of

    # Without pytest-asyncio, which the example does not use: it warns of each project that does not set it up.
    status, printed, complaints = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio")

    assert (status, complaints) == (0, ""), printed
    assert "7 passed" in printed
