"""The counters example: four workers under real web servers, restarted under load, and every visit counted once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "counters" / "counters.py"


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_no_request_fails_and_no_visit_is_lost_while_the_workers_are_restarted(tmp_path: Path, server: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, server],
        cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "requests that failed: 0" in done.stdout
    assert "every request was answered, every visit counted once, every job done once" in done.stdout
    assert list(tmp_path.iterdir()) == []
