"""The counters example: four workers under real web servers, restarted under load, and every visit counted once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.living import untraced_environment

SCRIPT = Path(__file__).parents[2] / "examples" / "counters" / "counters.py"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """Run the example with a server; return its exit status and what it has printed. Nothing outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run_(server: str) -> tuple[int, str, str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", SCRIPT, server],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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


@pytest.mark.timeout(300)  # it starts nine processes, and four of them again: about 10 s on an idle machine
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_no_request_fails_and_no_visit_is_lost_while_the_workers_are_restarted(
    run: Callable[[str], tuple[int, str, str]], tmp_path: Path, server: str
) -> None:
    status, printed, complaints = run(server)

    assert (status, complaints) == (0, ""), printed
    assert "requests that failed: 0" in printed
    assert "every request was answered, every visit counted once, every job done once" in printed
    assert list(tmp_path.iterdir()) == []
