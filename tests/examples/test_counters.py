"""The counters example: four workers under real web servers, restarted under load, and every visit counted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import run

SCRIPT = Path(__file__).parents[2] / "examples" / "counters" / "counters.py"


@pytest.mark.timeout(300)  # it starts nine processes, and four of them again: about 10 s on an idle machine
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_no_request_fails_and_no_visit_is_lost_while_the_workers_are_restarted(tmp_path: Path, server: str) -> None:
    status, printed, complaints = run(SCRIPT, server, cwd=tmp_path)

    assert (status, complaints) == (0, ""), printed
    assert "requests that failed: 0" in printed
    assert "every request was answered, every visit counted once, every job done once" in printed
    assert list(tmp_path.iterdir()) == []
