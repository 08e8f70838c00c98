"""Runs an example in a process group of its own, of which nothing outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from reliability.living import untraced_environment

PATIENCE_S = 250.0


def run(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    """Run this interpreter, with warnings as errors; return the exit status, and what was written to both outputs."""
    process = subprocess.Popen(
        [sys.executable, "-B", "-W", "error", *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=untraced_environment(), start_new_session=True,
    )  # fmt: skip
    try:
        printed, complaints = process.communicate(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode, printed, complaints
