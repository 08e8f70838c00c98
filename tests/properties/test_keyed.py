"""A part of a scope in memory does what a scope does that was loaded whole: answers, events, what is saved."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from effort import size
from hypothesis import example, given, settings
from hypothesis import strategies as st
from properties.test_turns import NOW_MS, TURNS

from scopestate import Engine, StateEvent
from scopestate.actors import keyed
from scopestate.actors.clock import Clock
from scopestate.actors.expiry import ExpiryActor
from scopestate.actors.keyed import KeyedScope, Shed
from scopestate.actors.local import LocalScope
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.errors import ScopestateError
from scopestate.ops import ranges, transactions, turns
from scopestate.ops.writes import Expire, Once
from scopestate.persistence import FileAdapter

NAMES = st.sampled_from(["a", "b", "é", "", "k1", "k2", "k3", "k4", "k\x00"])
BOUNDS = st.none() | NAMES
WITHIN = st.builds(
    turns.Range,
    prefix=st.sampled_from([None, "", "k"]),
    start=BOUNDS,
    after=BOUNDS,
    end=BOUNDS,
    reverse=st.booleans(),
    limit=st.sampled_from([None, 0, 1, 2, 3]),
)


def moved(transaction: transactions.Transaction) -> list[Any]:
    """Read some keys, and write others."""
    seen = [transaction.get("k1"), transaction.keys(prefix="k"), "k3" in transaction]
    transaction["k2"] = len(seen[1])
    if "k3" in transaction:
        del transaction["k3"]
    return seen


RANGED = st.one_of(
    *(st.builds(kind, WITHIN) for kind in (ranges.Keys, ranges.Pairs, ranges.Values, ranges.Entries, ranges.State)),
    st.builds(ranges.Count, WITHIN),
    st.builds(ranges.DeleteRange, WITHIN),
    st.builds(ranges.ReadPage, WITHIN.filter(lambda within: within.limit != 0)),
    st.builds(Once, st.builds(ranges.DeleteRange, WITHIN), st.just("once")),
    st.just(transactions.Transact(moved)),
    st.just(turns.List()),
    st.just(Expire(2)),
)
STEPS = st.lists(
    st.one_of(
        TURNS,
        RANGED,
        st.builds(turns.Set, NAMES, st.sampled_from([b"1", b'{"n":1}'])),
        st.builds(turns.Delete, NAMES),
        st.builds(turns.Get, NAMES),
        st.sampled_from(["flush", "reopen", "shed"]),
    ),
    max_size=12,
)
FIRST = [turns.Set(key, b"%d" % place) for place, key in enumerate(["k2", "b", "k1", "", "k3", "a"])]


def outcome(actor: KeyedScope, turn: turns.Turn[Any]) -> Any:
    try:
        return actor.run(turn)
    except (ScopestateError, ValueError) as error:
        return type(error), str(error)


def history(
    steps: list[Any], durability: str, rule: dict[str, Any], most: int, resident: int = 0
) -> tuple[list[Any], int]:
    """Return all that can be seen of the steps, and how many turns found a part of the scope in memory."""
    seen: list[Any] = []
    parts = 0
    config = Config(
        scopes=[ScopeRule(name="s", durability=durability, **rule)], limits=LimitsConfig(max_resident_bytes=resident)
    )  # type: ignore[arg-type]  # one of two
    with (
        TemporaryDirectory() as place,
        mock.patch.object(keyed, "LOADED_WHOLE", most),
        mock.patch.object(Clock, "now_ms", return_value=NOW_MS),
        # Expired keys are removed by steps, at the same place each time.
        mock.patch.object(LocalScope, "_expect"),
        mock.patch.object(ExpiryActor, "begin"),
    ):

        def opened() -> Engine:
            # Cursors name the store.
            adapter = FileAdapter(Path(place) / "store")
            adapter.id = "store"
            engine = Engine(config, adapter=adapter, handle_sigterm=False)
            engine.on_change(scope="s")(events.append)
            return engine

        events: list[StateEvent] = []
        engine = opened()
        try:
            for step in [*FIRST, "reopen", *steps, "reopen"]:
                actor = engine._scopes["s"]
                assert isinstance(actor, KeyedScope)
                if step == "flush":
                    engine.flush()
                elif step == "shed":
                    for _ in range(0 if most else 2):  # the first time, what was just used stays
                        actor.housekeep(Shed(1 << 40))
                elif step == "reopen":
                    engine.drain(60)
                    engine.close()
                    engine = opened()
                else:
                    seen.append((step, outcome(actor, step), actor._sequence))
                    parts += actor._keyed is not None
            seen.append(engine._run("s", ranges.Entries()))
            seen.append(engine._run("s", turns.Items()))
        finally:
            engine.close()
        reader = FileAdapter(Path(place) / "store")
        seen.append((reader.load("s"), reader.check()))
        reader.close()
    seen.append([(event.event_type, event.key, event.old_json, event.new_json, event.revision) for event in events])
    return seen, parts


@pytest.mark.parametrize("durability", ["interval", "commit"])
@settings(deadline=None, max_examples=size(20, 1000))  # two histories for each
@given(steps=STEPS, rule=st.sampled_from([{}, {}, {"strict": True}]), resident=st.sampled_from([0, 1 << 40]))
@example(
    steps=[turns.Delete("k1"), "flush", turns.Get("k1"), ranges.Count(), turns.Set("k1", b"1")], rule={}, resident=0
)
@example(
    steps=[turns.List(), turns.Set("k1", b"7"), turns.Delete("k2"), "shed", turns.Get("b"), "flush", "shed", "shed"],
    rule={},
    resident=1 << 40,
)
def test_a_part_in_memory_answers_as_the_whole(
    durability: str, steps: list[Any], rule: dict[str, Any], resident: int
) -> None:
    parted, parts = history(steps, durability, rule, 0, resident)
    whole, none = history(steps, durability, rule, 100)

    assert parted == whole
    assert none == 0
    assert parts > 0 or not any(isinstance(step, turns.Get) for step in steps[:1])
