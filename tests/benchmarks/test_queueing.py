"""The simulation of queues agrees with what queueing theory says about cases that can be computed."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.queueing import Job, Outcome, Station, Visit, simulate

ONE_MS = 0.001


def _one_station(load: float, variation: float) -> Outcome:
    job = Job([Visit("cpu", ONE_MS)])
    return simulate([Station("cpu")], lambda _: job, rate=load / ONE_MS, jobs=20_000, variation=variation)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize(("variation", "part"), [(0.0, 0.5), (1.0, 1.0)])
def test_the_mean_wait_of_one_station_is_that_of_the_formula_of_pollaczek_and_khinchine(
    load: float, variation: float, part: float
) -> None:
    found = _one_station(load, variation)

    waiting = statistics.fmean(found.answers_s) - ONE_MS
    assert waiting == pytest.approx(part * load / (1 - load) * ONE_MS, rel=0.15)
    assert found.utilisation["cpu"] == pytest.approx(load, rel=0.03)


def test_the_order_in_which_jobs_are_served_changes_the_longest_waits_and_not_the_mean() -> None:
    job = Job([Visit("cpu", ONE_MS)])

    in_turn, at_random = (
        simulate([Station("cpu", in_turn=in_turn)], lambda _: job, rate=800, jobs=40_000) for in_turn in (True, False)
    )

    assert statistics.fmean(at_random.answers_s) == pytest.approx(statistics.fmean(in_turn.answers_s), rel=0.15)
    assert at_random.answer_ms(0.999) > in_turn.answer_ms(0.999) * 1.3


def test_a_caller_alone_waits_for_nothing_but_the_service() -> None:
    job = Job([Visit("cpu", ONE_MS), Visit("disk", ONE_MS)])

    found = simulate([Station("cpu"), Station("disk")], lambda _: job, callers=1, jobs=1_000, variation=0)

    assert found.per_s == pytest.approx(500)
    assert found.answer_ms(0.99) == pytest.approx(2)
    assert found.utilisation == {"cpu": pytest.approx(0.5), "disk": pytest.approx(0.5)}


def test_the_station_with_the_longest_service_bounds_the_rate_and_is_the_one_that_is_full() -> None:
    job = Job([Visit("cpu", ONE_MS), Visit("disk", 4 * ONE_MS)])

    found = simulate([Station("cpu"), Station("disk")], lambda _: job, rate=2_000, jobs=5_000)

    assert found.per_s == pytest.approx(250, rel=0.05)
    assert found.utilisation["disk"] == pytest.approx(1, abs=0.01)
    assert found.utilisation["cpu"] == pytest.approx(0.25, rel=0.15)


def test_what_waits_is_served_together_and_shares_the_fixed_part() -> None:
    job = Job([Visit("disk", ONE_MS)])

    found = simulate(
        [Station("disk", batch=1_000, fixed_s=10 * ONE_MS)], lambda _: job, callers=40, jobs=4_000, variation=0
    )

    assert found.batches["disk"] == pytest.approx(40, rel=0.05)
    assert found.per_s == pytest.approx(40 / (50 * ONE_MS), rel=0.05)


def test_a_batch_that_needs_another_station_to_begin_takes_what_has_come_by_then() -> None:
    # The save waits for the interpreter behind the turns of all other callers, so each save has the writes of all.
    job = Job([Visit("interpreter", ONE_MS), Visit("disk", 0), Visit("interpreter", ONE_MS)])
    disk = Station("disk", batch=1_000, fixed_s=5 * ONE_MS, opening=Visit("interpreter", 2 * ONE_MS))

    found = simulate([Station("interpreter"), disk], lambda _: job, callers=20, jobs=4_000, variation=0)

    assert found.batches["disk"] == pytest.approx(20, rel=0.02)
    assert found.per_s == pytest.approx(20 / (20 * 2 * ONE_MS + 2 * ONE_MS + 5 * ONE_MS), rel=0.02)


def test_branches_begin_with_the_answer_and_the_last_of_them_ends_the_job() -> None:
    job = Job([Visit("cpu", ONE_MS)], after=[[Visit("a", ONE_MS)], [Visit("b", 3 * ONE_MS)]])

    found = simulate([Station("cpu"), Station("a"), Station("b")], lambda _: job, rate=1, jobs=100, variation=0)

    assert found.answer_ms(0.5) == pytest.approx(1)
    assert found.end_ms(0.5) == pytest.approx(4)


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    job = Job([Visit("cpu", ONE_MS)])

    first, again, other = (
        simulate([Station("cpu")], lambda _: job, rate=700, jobs=500, seed=seed) for seed in (7, 7, 8)
    )

    assert first == again
    assert first.answers_s != other.answers_s


def test_two_stations_that_take_all_that_waits_take_turns_with_callers_that_wait() -> None:
    job = Job([Visit("engine", ONE_MS), Visit("server", 2 * ONE_MS)])
    stations = [Station("engine", batch=1_000), Station("server", batch=1_000)]

    found = simulate(stations, lambda _: job, callers=64, jobs=4_000, variation=0)

    # One by one they would work at the same time, and the server alone would bound the rate: 500 a second.
    assert found.per_s == pytest.approx(1 / (3 * ONE_MS), rel=0.05)


@pytest.mark.parametrize(("cores", "per_s"), [(0, 3_000), (3, 3_000), (2, 2_000), (1, 1_000)])
def test_stations_share_the_cores_that_there_are(cores: int, per_s: float) -> None:
    names = ("a", "b", "c")

    found = simulate(
        [Station(name) for name in names],
        lambda number: Job([Visit(names[number % 3], ONE_MS)]),
        callers=30,
        jobs=6_000,
        cores=cores,
        variation=0,
    )

    assert found.per_s == pytest.approx(per_s, rel=0.05)


def test_a_disk_serves_without_a_core() -> None:
    job = Job([Visit("cpu", ONE_MS), Visit("disk", ONE_MS)])
    stations = [Station("cpu"), Station("disk", on_core=False)]

    found = simulate(stations, lambda _: job, callers=10, jobs=1_000, cores=1, variation=0)

    assert found.per_s == pytest.approx(1_000, rel=0.02)
