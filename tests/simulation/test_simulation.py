"""Whole engines under simulation: many seeds, no violation of anything that scopestate promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.effort import size, untraced
from tests.reliability.figures import record
from tests.simulation.__main__ import main
from tests.simulation.simulator import World, observed, simulate

SEEDS = size(200, 2000)


@pytest.fixture(autouse=True)
def _observed() -> Iterator[None]:
    with observed():
        yield


@pytest.mark.timeout(1200)  # 12 s on an idle machine; the full size, 2 minutes
def test_nothing_is_lost_or_wrong_in_any_seed() -> None:
    with untraced():
        failures = [failure for seed in range(SEEDS) if (failure := simulate(seed)) is not None]

    assert failures == []
    record("simulation: seeds from 0", seeds=SEEDS, failures=0)


def test_nothing_is_lost_or_wrong_on_real_files(tmp_path: Path) -> None:
    failures = [
        failure
        for seed in range(size(20, 60))
        if (failure := simulate(seed, path=str(tmp_path / f"store-{seed}"))) is not None
    ]

    assert failures == []


def test_a_seed_replays_to_the_letter() -> None:
    for seed in range(10):
        first, second = World(seed, trace=True), World(seed, trace=True)
        first.run()
        second.run()

        assert first.trace == second.trace
        assert first.trace


def test_the_seeds_reach_what_they_are_there_for() -> None:
    lines: list[str] = []
    for seed in range(100):
        world = World(seed, trace=True)
        world.run()
        lines += world.trace or []

    trace = "\n".join(lines)
    for wanted in (
        "crash",
        "closed",
        "reload: ",
        "passivate commit-0",
        "passivate interval-0",
        "the next load will fail",
        "the extra trigger goes",
        "a save takes 0.1 s",
        "flush -> StorageError",
        "drain is done",
        "StorageError('Failed to set value: the simulated disk is full')",
        "already wait for scope",
        "EngineClosed()",
        "odd ones is called",
        "extra is called",
        "deriving too is called",
        "batch commit-0/",
        "transact interval-0/",
        "compare and set memory-0/",
        "-> Conflict(",
    ):
        assert wanted in trace


def test_the_command_says_how_many_seeds_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--first", "100"]) == 0

    assert capsys.readouterr().out.startswith("3 seeds run, 0 failures, ")
