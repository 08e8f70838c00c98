"""The whole suite in two processes side by side, with the coverage of both: `python -m tests.side_by_side`.

Most tests wait more than they compute. What is printed: the first part while it runs, the second one after it, then
the coverage of both. The exit status is 1 if a part fails, or if too little is covered.
"""

# ruff: noqa: T201 - a command talks to its user

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FIRST: Final = ("tests/redis", "tests/server", "tests/bridge", "tests/semantics", "tests/linearizability")
"""The folders of the first part; the second one has everything else."""


def main() -> int:
    """Run both parts; return the exit status."""
    began = time.monotonic()
    rest = [f"--ignore={folder}" for folder in FIRST]
    with tempfile.TemporaryDirectory(prefix="scopestate-coverage-") as scratch:
        with (Path(scratch) / "second.log").open("w+b") as log:
            second = _start(scratch, "second", ["tests", *rest], stdout=log, stderr=subprocess.STDOUT)
            try:
                statuses = [_start(scratch, "first", list(FIRST)).wait(), second.wait()]
            finally:
                second.kill()
            log.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(log.read())
        data = [str(Path(scratch) / part / ".coverage") for part in ("first", "second")]
        statuses += [_coverage("combine", "--quiet", *data), _coverage("report")]
    print(f"first part: {statuses[0]}, second part: {statuses[1]}, in {time.monotonic() - began:.0f} s", flush=True)
    return int(any(statuses))


def _start(scratch: str, part: str, arguments: list[str], **options: object) -> subprocess.Popen[bytes]:
    folder = Path(scratch) / part
    folder.mkdir()
    command = [sys.executable, "-m", "pytest", "--cov", "--cov-report=", "--cov-fail-under=0"]
    command += ["-o", f"cache_dir={folder / 'cache'}", *arguments]
    environment = {**os.environ, "COVERAGE_FILE": str(folder / ".coverage")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)  # type: ignore[call-overload,no-any-return]  # typed for each option


def _coverage(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
