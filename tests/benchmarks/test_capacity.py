"""The capacity figures: the script runs, and what it computes from measurements is right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmarks import capacity_model
from benchmarks.capacity_model import ServiceTimes, Setup, demands, first_full, scaled, setups, simulated

ROOT = Path(__file__).parents[2]
US = 1e-6

# The script starts servers, which takes long beside other load.
pytestmark = pytest.mark.timeout(600)

ELSEWHERE = ("follower 0", "follower 1", "redis shared 1", "cluster shared 0", "cluster shared 1")
"""Measurements of the script that start processes, or a cluster, which take seconds each."""


@pytest.fixture
def times() -> ServiceTimes:
    """Return service times of 1 us each, so that a test need name only those that it is about."""
    return ServiceTimes(**dict.fromkeys((field.name for field in fields(ServiceTimes)), US))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.capacity", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _setup(times: ServiceTimes, words: str) -> Setup:
    (found,) = [setup for setup in setups(times) if words in setup.name]
    return found


def test_the_script_measures_computes_and_simulates_at_its_small_size(tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    known = dict.fromkeys(
        ("there_s", "s", "read_s", "event_bytes", "tasks_s", "tasks_here_s", "tasks_there_s"), 10 * US
    )
    given = {f"{name}, round 1": known for name in ELSEWHERE}
    file.write_text(json.dumps({"quick": True, "findings": {"writes": given}}), encoding="utf-8")

    done = _run("--quick", "--resume", "--json", str(file))

    assert done.returncode == 0, done.stderr
    titles = [line.removeprefix("### ") for line in done.stdout.splitlines() if line.startswith("### ")]
    assert titles == [
        "Engines: each of them",
        "Engines that do nothing: each of them",
        "Scopes with one small key",
        "A scope that is not used",
        "Keys with values of 60 bytes: each of them",
        "What a write takes",
        "What a change takes in a journal",
        "The first limit",
        "The first limit by engines: writes a second of all together, and what is full then",
        "How long writes wait (simulated)",
        "The simulation beside the engine",
    ]
    found = json.loads(file.read_text(encoding="utf-8"))["findings"]
    assert set(found) == {"engines", "scopes", "keys", "writes"}
    engines = found["engines"]
    assert {name: each["opened"] for name, each in engines.items()} == {
        f"{kind} 2": 2 for kind in ("memory", "file", "redis", "shared")
    }
    assert engines["file 2"]["fds"] > engines["memory 2"]["fds"] == 0
    assert engines["shared 2"]["there_fds"] > engines["redis 2"]["there_fds"] > 0
    assert found["writes"]["commits 2, round 1"]["batch"] >= 1
    assert {name: found["writes"][name] for name in given} == given


def test_a_run_is_not_resumed_with_other_sizes(tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    file.write_text(json.dumps({"quick": True, "findings": {}}), encoding="utf-8")

    done = _run("--resume", "--only", "keys", "--json", str(file))

    assert done.returncode == 2
    assert f"{file} is from a run with --quick" in done.stderr


def test_the_first_limit_is_the_part_that_takes_longest(times: ServiceTimes) -> None:
    shared = replace(times, shared_there=20 * US, read_there=5 * US, redis_here=12 * US, read_here=3 * US)

    setup = _setup(shared, "Redis, 4 engines, events shared")

    # Four engines share the writes, and each of them reads every event.
    assert demands(setup) == {"server": pytest.approx(40 * US), "engine": pytest.approx(6 * US)}
    assert first_full(setup) == ("server", pytest.approx(25_000))


def test_a_cluster_divides_what_the_servers_do_and_not_what_each_engine_reads(times: ServiceTimes) -> None:
    setup = _setup(
        replace(times, cluster_there=26 * US, cluster_read_there=1 * US, cluster_read_here=40 * US), "cluster"
    )

    assert demands(setup) == {"server": pytest.approx(10 * US), "engine": pytest.approx(40.25 * US)}
    assert first_full(setup)[0] == "engine"


def test_more_followers_leave_fewer_writes_if_each_of_them_wants_every_event(times: ServiceTimes) -> None:
    rows = dict(scaled(replace(times, follower_there=15 * US, follower_event_there=5 * US), (1, 10, 100)))

    assert [rows[count][0] for count in (1, 10, 100)] == ["50,000: owner", "15,385: owner", "1,942: owner"]


def test_the_part_that_is_full_first_is_the_busiest_one_of_the_simulation(times: ServiceTimes) -> None:
    setup = _setup(replace(times, follower_there=50 * US), "share, 4")

    rate, outcome = simulated(setup, 0.8, 5_000)

    assert rate == pytest.approx(0.8 / (54 * US))
    assert outcome.utilisation["owner"] == pytest.approx(0.8, rel=0.1)
    assert max(outcome.utilisation, key=outcome.utilisation.__getitem__) == "owner"


def test_the_time_of_a_save_and_of_a_call_are_told_apart_by_how_many_writes_a_save_had() -> None:
    call, save, sync = 100 * US, 300 * US, 50 * US
    found: dict[str, dict[str, float]] = {
        f"commits {threads}": {"batch": batch, "cpu_s": call + save / batch} for threads, batch in ((1, 1), (64, 30))
    }
    zero = dict.fromkeys(
        ("cpu_s", "s", "here_s", "there_s", "tasks_here_s", "tasks_there_s", "tasks_s", "commit_s", "read_s"), 0.0
    )
    names = [f"writes {pair}" for pair in ("0 0", "1 0", "8 0", "0 1", "0 8")]
    names += [f"saved {kind}" for kind in ("plain", "new", "history", "durable")]
    names += ["follower 0", "follower 1", "redis local 0", "raw_commits 64"]
    names += [f"{kind} shared {engines}" for kind in ("redis", "cluster") for engines in (1, 3)]
    found |= dict.fromkeys(names, zero) | {"raw_commits 1": {"commit_s": 200 * US, "cpu_s": sync}}

    times = ServiceTimes.of(found, (1, 64), (1, 3))

    assert times.commit_call == pytest.approx(call)
    assert times.commit_save == pytest.approx(save - sync)
    assert times.sync == pytest.approx(200 * US)


def test_each_service_time_is_described(times: ServiceTimes) -> None:
    distinct = ServiceTimes(*range(1, len(fields(ServiceTimes)) + 1))

    assert sorted(seconds for _, seconds in distinct.described()) == list(range(1, len(fields(ServiceTimes)) + 1))
    assert capacity_model.PRIMARIES == 3
    assert times.turn == US
