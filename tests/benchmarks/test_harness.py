"""The arithmetic of the benchmarks: percentiles, ratios, verdicts, the table."""

from __future__ import annotations

import threading

import pytest

from benchmarks.harness import Pairs, Row, compare, cpu_bound_thread, in_threads, make_pairs, percentile
from benchmarks.report import summary, table


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.001, 1), (0.5, 500), (0.99, 990), (0.999, 999), (0.9991, 1000), (1.0, 1000)]
)
def test_a_percentile_is_the_smallest_sample_that_enough_samples_do_not_exceed(share: float, expected: int) -> None:
    assert percentile(list(range(1000, 0, -1)), share) == expected


def test_pairs_repeat_their_keys_and_vary_their_values() -> None:
    pairs = make_pairs(5, keys=2)

    assert [key for key, _ in pairs] == ["key-0", "key-1", "key-0", "key-1", "key-0"]
    assert len({str(value) for _, value in pairs}) == 5


def test_contenders_take_turns_after_one_warming_batch_each() -> None:
    turns: list[str] = []

    def ours(_pairs: Pairs) -> None:
        turns.append("ours")

    def theirs(_pairs: Pairs) -> None:
        turns.append("theirs")

    compare(ours, theirs, make_pairs(1), repeats=2)

    assert turns == ["ours", "theirs"] * 3


def test_the_ratio_says_how_many_times_as_long_the_peer_takes() -> None:
    def work(rounds: int) -> None:
        sum(range(rounds))

    found = compare(lambda _: work(50_000), lambda _: work(500_000), make_pairs(1), repeats=5)

    assert found.ratio > 2


@pytest.mark.parametrize(
    ("at_least", "value", "passed"), [(True, 8, True), (True, 7.9, False), (False, 8, True), (False, 8.1, False)]
)
def test_a_row_passes_at_its_limit_and_misses_beyond(at_least: bool, value: float, passed: bool) -> None:
    assert Row("row", "what", value, "x", 8, at_least=at_least).passed is passed


def test_a_row_without_a_limit_is_not_judged() -> None:
    assert Row("row", "what", 1, "x").passed is None


def test_the_table_marks_what_was_missed_and_the_summary_names_it() -> None:
    rows = [
        Row("quick", "quick thing", 9, "x", 8, at_least=True, figures={"ours_us": 2.2}),
        Row("slow", "slow thing", 7, "ms", 5),
        Row("other", "other thing", 3, "x"),
    ]

    lines = table(rows).splitlines()

    assert lines[2].split("  ")[0] == "quick thing"
    assert "pass" in lines[2]
    assert "ours 2.20 us" in lines[2]
    assert "MISS" in lines[3]
    assert "pass" not in lines[4]
    assert "MISS" not in lines[4]
    assert summary(rows) == "1 of 2 targets reached; missed: slow"


def test_the_computing_thread_ends_with_its_block() -> None:
    with cpu_bound_thread():
        assert any(thread.name == "cpu-bound" for thread in threading.enumerate())

    assert not any(thread.name == "cpu-bound" for thread in threading.enumerate())


def test_a_failure_in_a_measuring_thread_reaches_the_caller() -> None:
    def fail() -> None:
        raise ValueError("in the thread")

    with pytest.raises(ValueError, match="in the thread"):
        in_threads([fail, lambda: None])
