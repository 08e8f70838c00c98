"""The short way of a plain set does what `decide` and the commit do: same answers, values, changes to save, events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate import Engine, StateEvent
from scopestate.actors.local import LocalScope
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.ops import Increment, turns
from scopestate.persistence import ScopeChange, ScopeState, Store

KEYS = st.sampled_from(["a", "b", "é", ""])
TURNS = st.one_of(
    st.builds(turns.Set, KEYS, st.sampled_from([b"1", b"2", b"null", b'"x"'])),
    st.builds(turns.Delete, KEYS),
    st.builds(turns.Update, KEYS, st.just((Increment("", 1),))),
)


class Decided(turns.Set, frozen=True):
    """A set that has no shorter way."""


class InMemory(Store):
    """Keeps every change that it is given."""

    def __init__(self) -> None:
        self.saved: list[ScopeChange] = []

    def load(self, scope: str) -> ScopeState:
        return ScopeState.of({}, 0)

    def scopes(self) -> list[str]:
        return []

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self.saved += batch

    def close(self) -> None:
        pass


def history(steps: list[Any], durability: str) -> tuple[Any, ...]:
    """Do the turns on a new engine, and return everything that can be seen of them."""
    store, events = InMemory(), list[StateEvent]()
    config = Config(scopes=[ScopeRule(name="s", durability=durability)], limits=LimitsConfig())  # type: ignore[arg-type]  # one of three
    with Engine(config, adapter=store, handle_sigterm=False) as engine:
        engine.on_change(scope="s")(events.append)
        actor = engine._scopes["s"]
        assert isinstance(actor, LocalScope)
        answers = [actor.run(turn) for turn in steps]
        state = list((actor._values or {}).items()), actor._sequence
        engine.flush()
        engine.drain(20)
    seen = [(event.event_type, event.key, event.old_json, event.new_json, event.revision) for event in events]
    saved = [(change.revision, change.entries, change.removed) for change in store.saved]
    return answers, state, seen, saved


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
@settings(deadline=None, max_examples=60)  # an engine for each
@given(steps=st.lists(TURNS, max_size=8))
def test_a_set_does_what_its_decision_says(durability: str, steps: list[Any]) -> None:
    decided = [Decided(turn.key, turn.data) if type(turn) is turns.Set else turn for turn in steps]

    assert history(steps, durability) == history(decided, durability)
