"""Scopes and stores that block, so that calls are given up in the meantime; and the check that all agrees later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from reliability.living import PATIENCE_S, InThread, Seen, in_a_turn, until

from scopestate import Engine
from scopestate.persistence import FileAdapter, ScopeChange, ScopeState


def watched(engine: Engine) -> Seen:
    seen = Seen()
    engine.register_function("watch", seen)
    engine.register_trigger(function_id="watch")
    return seen


class Gate:
    """Blocks every thread that calls it until it is opened, and reports that a thread has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE_S), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()


class SlowDisk(FileAdapter):
    """A store whose disk waits at gates."""

    at_load: Callable[[], object] = staticmethod(lambda: None)
    at_save: Callable[[], object] = staticmethod(lambda: None)

    def load(self, scope: str) -> ScopeState:
        self.at_load()
        return super().load(scope)

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self.at_save()
        super().save(batch)


def busy(engine: Engine) -> tuple[Gate, InThread]:
    """Hold scope "s" in a turn of another thread's."""
    gate = Gate()
    holder = InThread(lambda: in_a_turn(engine, gate))
    assert gate.reached.wait(PATIENCE_S)
    return gate, holder


def check_agreement(engine: Engine, seen: Seen) -> None:
    """Check that sequence, events and memory agree, and that nothing is held or stuck."""
    engine.drain(PATIENCE_S)
    actor = engine._scopes["s"]
    mine = [event for event in seen.wait_for(actor._sequence) if event.scope == "s"]
    assert [event.revision for event in mine] == list(range(1, actor._sequence + 1))
    state: dict[str, bytes] = {}
    for event in mine:
        assert event.old_json == state.get(event.key)
        if event.new_json is None:
            state.pop(event.key, None)
        else:
            state[event.key] = event.new_json
    assert state == actor._values
    until(
        lambda: not actor._claim and not actor._mailbox, "a claim is kept, or a message is stuck"
    )  # a save may be at it
