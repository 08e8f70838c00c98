"""The members example: a Django project on two workers, one of which is killed, and no session is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.living import untraced_environment

SCRIPT = Path(__file__).parents[2] / "examples" / "members" / "members.py"


@pytest.mark.timeout(300)  # it starts four processes: about 4 s on an idle machine
def test_members_stay_logged_in_when_a_worker_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", SCRIPT],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=untraced_environment(), start_new_session=True,
    )  # fmt: skip
    try:
        printed, complaints = process.communicate(timeout=250)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    assert (process.returncode, complaints) == (0, ""), printed
    assert "every member stayed logged in, every visit counted, the limit of searches held" in printed
    assert list(tmp_path.iterdir()) == []
