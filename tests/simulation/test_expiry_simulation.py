"""Keys with deadlines under simulation: no violation in any seed, and each planted bug is caught soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scopestate.actors.clock import Clock
from scopestate.actors.expiry import ExpiryActor
from scopestate.actors.local import LocalScope
from scopestate.actors.view import Unexpired
from scopestate.actors.wheel import Wheel
from scopestate.ops import turns
from scopestate.persistence import Store
from tests.effort import size, untraced
from tests.reliability.figures import record
from tests.simulation.expiry_simulator import ExpiryWorld, PlatterStore, quiet, simulate_expiry

SEEDS = size(60, 400)
ENOUGH_SEEDS = 150

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.timeout(600)  # 9 s on an idle machine; the full size, 1 minute
def test_keys_expire_as_they_must_in_every_seed() -> None:
    with untraced():
        failures = [failure for seed in range(SEEDS) if (failure := simulate_expiry(seed))]

    assert failures == []
    record("simulation of expiry: seeds from 0", seeds=SEEDS, failures=0)


def test_a_seed_replays_to_the_letter() -> None:
    for seed in range(5):
        first, second = ExpiryWorld(seed, trace=True), ExpiryWorld(seed, trace=True)
        first.run()
        second.run()

        assert first.trace == second.trace


def the_clock_follows_the_time_of_day_back(patch: Patch) -> None:
    patch.setattr(Clock, "now_ms", lambda self: self._wall_ns() // 1_000_000)


def the_clock_does_not_go_on_after_a_restart(patch: Patch) -> None:
    make = PlatterStore.__init__

    def forgetful(self: PlatterStore, platter: Any) -> None:
        make(self, platter)
        self.clock_ms = 0

    patch.setattr(PlatterStore, "__init__", forgetful)


def a_scope_that_leaves_memory_takes_its_deadlines_along(patch: Patch) -> None:
    patch.setattr(ExpiryActor, "expect", lambda self, scope, ms: None)
    patch.setattr(LocalScope, "_expect", lambda self: None)


def a_store_is_not_asked_for_deadlines(patch: Patch) -> None:
    patch.setattr(PlatterStore, "due", Store.due)


def a_refused_removal_is_not_tried_again(patch: Patch) -> None:
    patch.setattr(ExpiryActor, "_note_refusal", lambda self, asked, error: 1 << 62)


def a_key_is_looked_at_one_millisecond_late(patch: Patch) -> None:
    place = Wheel.place
    patch.setattr(Wheel, "place", lambda self, key, ms, now_ms: place(self, key, ms + 1, now_ms))


def a_reader_without_a_turn_sees_expired_keys(patch: Patch) -> None:
    patch.setattr(Unexpired, "get", lambda self, key, default=None: self._values.get(key))


def a_write_does_not_tell_of_the_key_that_has_expired_before_it(patch: Patch) -> None:
    changes_of = turns.changes_of

    def without(view: Any, key: str, before: Any, after: Any, expires_ms: Any = None) -> Any:
        return changes_of(view, key, before, after, expires_ms)[-1:]

    patch.setattr(turns, "changes_of", without)


BUGS: list[Callable[[Patch], None]] = [
    the_clock_follows_the_time_of_day_back,
    the_clock_does_not_go_on_after_a_restart,
    a_scope_that_leaves_memory_takes_its_deadlines_along,
    a_store_is_not_asked_for_deadlines,
    a_refused_removal_is_not_tried_again,
    a_key_is_looked_at_one_millisecond_late,
    a_reader_without_a_turn_sees_expired_keys,
    a_write_does_not_tell_of_the_key_that_has_expired_before_it,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)

    with untraced():
        assert any(simulate_expiry(seed) is not None for seed in range(ENOUGH_SEEDS))
