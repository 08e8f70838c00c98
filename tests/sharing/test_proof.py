"""Processes that share a directory, of which owners are killed again and again: every promise is kept.

`python -m tests.sharing` does the same, for as long as it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from effort import FULL, size
from reliability.figures import record
from sharing import killing
from sharing.__main__ import figures_of, found_in, processes_of, together
from sharing.checks import service_ms
from sharing.planted import PLANTED

SEEDS = range(size(1, 20))
SECONDS = size(4, 60)
SERVED_AGAIN_MS = 60_000
"""Generous: 500 ms is what a machine needs that has nothing else to do."""

figures: list[dict[str, float]] = []


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Keep what all runs came to, for docs/explanation/reliability.md."""
    figures.clear()
    yield
    if figures:
        record("processes on one directory", **together(figures))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_closed_owners_break_no_promise(tmp_path: Path, seed: int) -> None:
    plan = killing.Plan(SECONDS, processes_of(seed) if FULL else 4, seed)

    run = killing.run(plan, tmp_path)

    assert found_in(run) == []
    assert max(service_ms(run), default=0) < SERVED_AGAIN_MS
    figures.append(figures_of(run))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", list(PLANTED)[: size(1, len(PLANTED))])
def test_a_fault_that_was_planted_is_found(tmp_path: Path, fault: str) -> None:
    plan = killing.Plan(size(2, 6), 4, 0, calm=True, plant=fault, pause_s=(0.5, 1.2))

    try:
        found = found_in(killing.run(plan, tmp_path))
    except AssertionError as error:  # the processes did not even come to an end
        found = [str(error)]

    assert found
