"""The members example: a Django project on two workers, one of which is killed, and no session is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import run

SCRIPT = Path(__file__).parents[2] / "examples" / "members" / "members.py"


@pytest.mark.timeout(300)  # it starts four processes: about 4 s on an idle machine
def test_members_stay_logged_in_when_a_worker_is_killed(tmp_path: Path) -> None:
    status, printed, complaints = run(SCRIPT, cwd=tmp_path)

    assert (status, complaints) == (0, ""), printed
    assert "every member stayed logged in, every visit counted, the limit of searches held" in printed
    assert list(tmp_path.iterdir()) == []
