"""The short ways of a local scope do what `decide` and the commit do: answers, values, changes to save, events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate import Engine, StateEvent
from scopestate.actors.clock import Clock
from scopestate.actors.local import LocalScope
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.errors import ScopestateError
from scopestate.ops import Increment, turns
from scopestate.ops.transactions import SetAll
from scopestate.ops.writes import DELETE, KEEP, CompareAndSet, GetEntry, Modify, Once, SetWith, Touch
from scopestate.persistence import ScopeChange, ScopeState, Store

NOW_MS = 2_000_000_000_000
KEYS = st.sampled_from(["a", "b", "é", ""])
VALUES = st.sampled_from([b"1", b"2", b"null", b'"x"', b'{"n":1}'])
DEADLINES = st.sampled_from(
    [
        turns.NO_DEADLINE,
        turns.KEEP_DEADLINE,
        turns.Deadline(ttl_ms=1000),
        turns.Deadline(ttl_ms=turns.LAST_MS),
        turns.Deadline(expires_ms=NOW_MS - 1),
        turns.Deadline(expires_ms=NOW_MS),
        turns.Deadline(expires_ms=NOW_MS + 5),
    ]
)
REVISIONS = st.sampled_from([None, None, 0, 1, 2, 3])


def returning(value: object) -> Callable[[Any], Any]:
    return lambda _: value


def failing(value: object) -> Any:
    raise ValueError(value)


FUNCTIONS = st.one_of(
    st.sampled_from([DELETE, KEEP, 1, None, {"n": [1]}]).map(returning), st.just(repr), st.just(failing)
)
PLAIN = st.one_of(
    st.builds(turns.Set, KEYS, VALUES),
    st.builds(turns.Delete, KEYS),
    st.builds(turns.Update, KEYS, st.just((Increment("", 1),))),
)
TURNS = st.one_of(
    PLAIN,
    st.builds(SetWith, KEYS, VALUES, REVISIONS, DEADLINES),
    st.builds(CompareAndSet, KEYS, st.none() | VALUES | st.just(b'{ "n": 1 }'), VALUES, REVISIONS, DEADLINES),
    st.builds(CompareAndSet, KEYS, st.none() | VALUES, VALUES),
    st.builds(Modify, KEYS, FUNCTIONS, st.sampled_from([None, 0])),
    st.builds(SetAll, st.dictionaries(KEYS, VALUES, min_size=1)),
    st.builds(Touch, KEYS, DEADLINES),
    st.builds(Once, st.builds(SetWith, KEYS, VALUES, REVISIONS), st.sampled_from(["i", "j"])),
    st.builds(GetEntry, KEYS),
    st.just(turns.Items()),
)


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


def decided(actor: LocalScope, turn: turns.Turn[Any]) -> Any:
    """As `LocalScope.on_receive`, without short ways."""
    return actor._without_values(turn) if actor._view is None else actor._decide(turn)


def outcome(actor: LocalScope, turn: turns.Turn[Any]) -> Any:
    try:
        return actor.run(turn)
    except (ScopestateError, ValueError) as error:
        return type(error), str(error)


def history(steps: list[Any], durability: str, rule: dict[str, Any]) -> tuple[Any, ...]:
    """Do the turns on a new engine, and return everything that can be seen of them."""
    store, events = InMemory(), list[StateEvent]()
    config = Config(scopes=[ScopeRule(name="s", durability=durability, **rule)], limits=LimitsConfig())  # type: ignore[arg-type]  # one of three
    with Engine(config, adapter=store, handle_sigterm=False) as engine:
        engine.on_change(scope="s")(events.append)
        actor = engine._scopes["s"]
        assert isinstance(actor, LocalScope)
        answers = [outcome(actor, turn) for turn in steps]
        tables = [list((actor._values or {}).items()), actor._revisions, actor._deadlines, actor._answers.kept]
        state = tables, actor._sequence, actor._creations
        engine.flush()
        engine.drain(60)
    seen = [(event.event_type, event.key, event.old_json, event.new_json, event.revision) for event in events]
    saved = [
        (change.revision, change.entries, sorted(change.removed), change.due_ms, change.answers)
        for change in store.saved
    ]
    return answers, state, seen, saved


@pytest.mark.parametrize("durability", ["memory", "interval", "commit"])
@settings(deadline=None, max_examples=60)  # two engines for each
@given(steps=st.lists(TURNS, max_size=8), rule=st.sampled_from([{}, {}, {"ttl_ms": 500}, {"strict": True}]))
def test_the_short_ways_do_what_the_decision_says(durability: str, steps: list[Any], rule: dict[str, Any]) -> None:
    with (
        mock.patch.object(Clock, "now_ms", return_value=NOW_MS),
        mock.patch.object(LocalScope, "_expect"),
    ):
        short = history(steps, durability, rule)
        with mock.patch.object(LocalScope, "on_receive", decided):
            assert history(steps, durability, rule) == short
