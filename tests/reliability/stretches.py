"""Turns that change several keys of a scope, and what must be true of the scope after each."""

from __future__ import annotations

import random
from typing import Any

from reliability.living import PATIENCE_S, Seen, until

from scopestate import Engine
from scopestate.actors.keyed import KeyedScope
from scopestate.actors.local import LocalScope
from scopestate.actors.ports import ScopeState
from scopestate.actors.turn import BUSY
from scopestate.ops import transactions as tx
from scopestate.ops import turns
from scopestate.ops.ranges import DeleteRange
from scopestate.ops.turns import Deadline, Range, Turn
from scopestate.ops.values import decode
from scopestate.ops.writes import Modify, SetWith, Touch

LATER = Deadline(ttl_ms=3_600_000)
PASSED = Deadline(expires_ms=1)
KEYS = "abcdefgh"


def scope_of(engine: Engine) -> LocalScope:
    actor = engine._scopes["s"]
    assert isinstance(actor, LocalScope)
    return actor


class Told:
    """The events of a scope as a handler and a watch get them: both must get the same."""

    def __init__(self, engine: Engine) -> None:
        self._seen = Seen()
        engine.register_function("watch", self._seen)
        engine.register_trigger(function_id="watch", scope="s", trigger_id="watch")
        self._changes = engine.scope("s").watch(snapshot=False, buffer=10**9)
        self._told: list[tuple[Any, ...]] = []

    def wait_for(self, count: int) -> list[Any]:
        """Wait for this many events, and return them."""
        events = self._seen.wait_for(count)
        expected = [
            (event.revision, event.key, event.old_json, event.new_json, event.transaction)
            for event in events[:count]
            if event.old_json is not None or event.new_json is not None
        ]
        while len(self._told) < len(expected):
            one = self._changes.get(PATIENCE_S)
            self._told.append((one.revision, one.key, one.old_json, one.json, one.transaction))
        assert self._told == expected
        return events


def watched(engine: Engine) -> Told:
    return Told(engine)


def any_turn(draw: random.Random, number: int, kind: int | None = None) -> Turn[Any]:
    """Return a turn that changes several keys, or more than one thing of a key; `kind`: 0 to 6, 6 is a batch."""
    keys = draw.sample(KEYS, draw.randint(2, 5))
    data = b"%d" % number
    match draw.randrange(7) if kind is None else kind:
        case 0:
            return tx.SetAll(dict.fromkeys(keys, data))
        case 1:
            return SetWith(keys[0], data, None, draw.choice([LATER, PASSED]))
        case 2:
            return Modify(keys[0], lambda _: number)
        case 3:
            return DeleteRange(Range(start=min(keys), end=max(keys)))
        case 4:
            return Touch(keys[0], draw.choice([LATER, PASSED, turns.NO_DEADLINE]))
        case 5:
            return tx.Transact(lambda transaction: [transaction.set(key, number) for key in keys])
    return tx.Batch(tuple([any_step(draw, key, data) for key in keys]))


def any_step(draw: random.Random, key: str, data: bytes) -> tx.Step:
    match draw.randrange(4):
        case 0:
            return tx.SetStep(key, data, draw.choice([LATER, PASSED]))
        case 1:
            return tx.DeleteStep(key)
        case 2:
            return tx.TouchStep(key, draw.choice([LATER, PASSED, turns.NO_DEADLINE]))
        case _:
            return tx.SetStep(key, data)


def replayed(events: list[Any]) -> dict[str, Any]:
    """Return the content of the scope according to the events."""
    state: dict[str, Any] = {}
    for event in events:
        assert event.old_value == state.get(event.key), event
        if event.new_json is None:
            state.pop(event.key, None)
        else:
            state[event.key] = event.new_value
    return state


def content(actor: LocalScope) -> ScopeState:
    """Return what is in the scope, including keys that have left memory."""
    if not isinstance(actor, KeyedScope) or actor._keyed is None:
        return ScopeState(actor._values or {}, actor._revisions, actor._created, actor._deadlines, actor._sequence)
    found: list[ScopeState] = []
    until(lambda: actor._if_idle(lambda _: found.append(actor._whole()), None) is not BUSY, "the scope stays busy")
    return found[-1]


def check(actor: LocalScope, events: list[Any], where: str) -> None:
    """Memory, its side tables, the numbers and the events agree."""
    assert actor._values is not None
    state = content(actor)
    values = state.values
    assert [event.revision for event in events] == list(range(1, actor._sequence + 1)), where
    assert replayed(events) == {key: decode(data) for key, data in values.items()}, where
    assert state.revisions == {key: revision for key, revision in last_of(events).items() if key in values}, where
    assert state.deadlines.keys() <= values.keys(), where
    assert actor._creations == sum(event.old_json is None and event.new_json is not None for event in events), where
    if actor._dirty is not None:
        assert state.created.keys() == values.keys(), where
        assert all(state.created[key] <= revision for key, revision in state.revisions.items()), where


def last_of(events: list[Any]) -> dict[str, int]:
    return {event.key: event.revision for event in events}
