"""How long a commit waits for callers that are about to write again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine
from scopestate.actors import gathering
from scopestate.actors.gathering import ENOUGH, LONGEST_S, MOST_SKIPPED, STEP_S, Gathering

SLOW_S = 10.0
"""A commit that took so long that the longest wait applies."""


class Callers:
    """A clock that moves with each pause, and the calls that have come by then."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses = 0
        self.coming: Iterator[int] = iter(())
        self.waiting = 0
        self.gathering = Gathering(lambda: self.now_s, self.pause)

    def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses += 1
        self.waiting = next(self.coming, self.waiting)

    def begin(self, waiting: int, *coming: int) -> int:
        """Begin a commit with `waiting` calls; `coming`: how many there are after each pause. Return the pauses."""
        self.waiting, self.coming, self.pauses = waiting, iter(coming), 0
        self.gathering.wait(lambda: self.waiting)
        return self.pauses


@pytest.fixture
def callers() -> Callers:
    return Callers()


def test_a_commit_waits_until_the_answered_callers_are_back(callers: Callers) -> None:
    callers.gathering.note_answers(3, 0, SLOW_S)

    assert callers.begin(1, 1, 2, 3, 4) == 3


def test_calls_that_wait_already_are_expected_too(callers: Callers) -> None:
    callers.gathering.note_answers(2, 2, SLOW_S)

    assert callers.begin(2, 3, 4, 5) == 2


def test_answers_of_one_commit_are_counted_together(callers: Callers) -> None:
    callers.gathering.note_answers(2, 0, SLOW_S)
    callers.gathering.note_answers(1, 0, SLOW_S)

    assert callers.begin(1, 2, 3, 4) == 2


def test_a_single_writer_never_waits(callers: Callers) -> None:
    for _ in range(3):
        assert callers.begin(1) == 0
        callers.gathering.note_answers(1, 0, SLOW_S)


def test_a_commit_without_calls_does_not_wait_and_leaves_the_next_one_to_wait(callers: Callers) -> None:
    callers.gathering.note_answers(2, 0, SLOW_S)

    assert callers.begin(0, 1) == 0
    assert callers.begin(1, 2) == 1


def test_a_call_that_comes_late_does_not_wait(callers: Callers) -> None:
    callers.gathering.note_answers(2, 0, SLOW_S)
    callers.now_s += LONGEST_S

    assert callers.begin(1) == 0


def test_the_wait_is_a_share_of_the_commit_and_at_most_the_longest(callers: Callers) -> None:
    callers.gathering.note_answers(2, 0, 4 * STEP_S)
    assert callers.begin(1) == 2

    other = Callers()
    other.gathering.note_answers(2, 0, SLOW_S)
    assert other.begin(1) == pytest.approx(LONGEST_S / STEP_S, abs=1)


def test_many_calls_do_not_wait_for_more(callers: Callers) -> None:
    callers.gathering.note_answers(10 * ENOUGH, 0, SLOW_S)

    assert callers.begin(ENOUGH) == 0


def test_waits_in_vain_are_left_out_until_callers_come_back(callers: Callers) -> None:
    waited = []
    for number in range(1000):
        callers.gathering.note_answers(4, 0, SLOW_S)
        if callers.begin(1):
            waited.append(number)
    assert waited[:5] == [0, 2, 6, 14, 30]
    assert waited[-1] - waited[-2] == MOST_SKIPPED + 1

    for _ in range(MOST_SKIPPED + 1):
        callers.gathering.note_answers(4, 0, SLOW_S)
        callers.begin(1, 4)
    callers.gathering.note_answers(4, 0, SLOW_S)
    assert callers.begin(1, 4) == 1  # callers have come back, so none is left out any more


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_two_callers_share_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    monkeypatch.setattr(gathering, "LONGEST_S", 60.0)
    options_of_store = {
        "store_method": "file_based",
        "file_path": str(tmp_path / "store"),
        "save_interval_ms": 600_000,
        "durability": durability,
    }
    adapter = {"name": "kv", "config": options_of_store}
    config = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
    with Engine.from_config(config) as engine:
        options: dict[str, Any] = {} if durability == "commit" else {"durable": True}
        engine.set("a", "k", 0, **options)
        engine.set("b", "k", 0, **options)
        snapshot = engine._parts.snapshot
        other = threading.Thread(target=engine.set, args=("b", "k", 1), kwargs=options)

        def pause(seconds: float) -> None:
            if other.ident is None:
                other.start()
            threading.Event().wait(seconds)

        snapshot._gathering = Gathering(snapshot._dispatcher.monotonic, pause)
        snapshot._gathering.note_answers(2, 0, 120.0)
        before = snapshot.saves
        engine.set("a", "k", 1, **options)
        other.join(60)

        assert snapshot.saves == before + 1
        assert (engine.get("a", "k"), engine.get("b", "k")) == (1, 1)
