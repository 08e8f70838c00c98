"""Watches and durable triggers under simulation: many seeds, no promise broken; and planted bugs are caught soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from scopestate.actors.feed import Feed
from scopestate.actors.holders import SharedLane
from scopestate.actors.journal_consumer import JournalConsumer
from scopestate.actors.progress import Progress
from scopestate.actors.watcher import Watcher
from tests.durable.simulator import noted, simulate, traced
from tests.effort import size, untraced
from tests.reliability.figures import record

SEEDS = size(40, 2_000)
ENOUGH_SEEDS = 150

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _noted() -> Iterator[None]:
    with noted():
        yield


@pytest.mark.timeout(3600)  # 10 s on an idle machine; the full size, ten minutes
def test_watches_and_durable_triggers_keep_their_promises_in_every_seed() -> None:
    with untraced():
        failures = [failure for seed in range(SEEDS) if (failure := simulate(seed)) is not None]

    assert failures == []
    record("simulation of watches and durable triggers: seeds from 0", seeds=SEEDS, failures=0)


def test_a_seed_replays_to_the_letter() -> None:
    for seed in range(5):
        assert traced(seed) == traced(seed)


def test_the_seeds_reach_what_they_are_there_for() -> None:
    trace = "\n".join(line for seed in range(40) for line in traced(seed))

    for wanted in (
        "crash",
        "close",
        "passivate interval-a",
        "was too slow",
        "sees Change('put'",
        "sees Change('delete'",
        "sees Change('expire'",
        "sees Change('progress'",
        "are no longer kept",
        "was lost in a crash",
        "attempt=3",
        "verdict='failed'",
        "verdict='dead'",
        "Asked(consumer='dies'",
        "Counted(consumer='counts'",
    ):
        assert wanted in trace, wanted


# ------------------------------------------------------------------------------------------------------ planted bugs


def attempts_are_not_noted(patch: Patch) -> None:
    patch.setattr(JournalConsumer, "began", lambda self, attempts: None)


def what_was_fetched_counts_as_done(patch: Patch) -> None:
    change = Progress.change

    def hasty(self: Progress) -> Any:
        found = change(self)
        if found is not None:
            found.done = max(found.done, self.floor)
        return found

    patch.setattr(Progress, "change", hasty)


def a_watch_overlooks_a_change(patch: Patch) -> None:
    add = Watcher._add

    def careless(self: Watcher, changes: Sequence[Any]) -> None:
        add(self, [change for change in changes if change.revision % 7])

    patch.setattr(Watcher, "_add", careless)


def an_event_is_delivered_before_it_is_saved(patch: Patch) -> None:
    enter = Feed._enter

    def early(self: Feed, events: Sequence[Any], woken: Any) -> None:
        enter(self, events, woken)
        self.committed(events)

    patch.setattr(Feed, "_enter", early)


BUGS: list[Callable[[Patch], None]] = [
    attempts_are_not_noted,
    what_was_fetched_counts_as_done,
    a_watch_overlooks_a_change,
    an_event_is_delivered_before_it_is_saved,
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)

    with untraced():
        assert any(simulate(seed) is not None for seed in range(ENOUGH_SEEDS))


@pytest.mark.timeout(600)
def test_it_is_caught_if_a_lane_overlooks_what_a_follower_may_be_handling(monkeypatch: Patch) -> None:
    """Few seeds come there: in each of these, a crash cuts off an event of a lane in which this engine has others."""
    seeds = (126, *range(ENOUGH_SEEDS))
    monkeypatch.setattr(SharedLane, "is_open_to", lambda self, holder: not self.holders or holder in self.holders)

    with untraced():
        assert any(simulate(seed) is not None for seed in seeds)
        monkeypatch.undo()
        assert simulate(seeds[0]) is None
