"""A connection to another engine that answers when the test says so."""

from __future__ import annotations

import json
import threading
from typing import Any

from second_engine import PATIENCE_S

from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.errors import ConnectionLost, EngineClosed
from scopestate.persistence import Backend
from scopestate.persistence.bridge.calls import Done
from scopestate.persistence.bridge.scope import BridgeScope
from scopestate.wire.features import Needs


class PlayedRemote(Backend):
    """A connection to an engine that answers when the test says so."""

    reports_changes = transparent = False
    owner = None

    def __init__(self) -> None:
        self.leaving = False
        self.open: dict[str, Done] = {}
        """Label -> what takes the answer; a label is `set k`, `get k`, `list`, with ` 2`, ... for the next alike."""
        self._sent = threading.Condition()
        self.closed = False

    def call(self, function_id: str, payload: bytes, done: Done, depth: int = 0, needs: Needs | None = None) -> None:
        if self.closed:
            raise EngineClosed("the connection is closed")
        fields = json.loads(payload)
        label = " ".join([function_id.removeprefix("state::"), *([fields["key"]] if "key" in fields else [])])
        with self._sent:
            number = 1
            while f"{label} {number}" in self.open or (number == 1 and label in self.open):
                number += 1
            self.open[label if number == 1 else f"{label} {number}"] = done
            self._sent.notify_all()

    def sent(self, *labels: str) -> None:
        """Wait until exactly these calls are in progress."""
        with self._sent:
            assert self._sent.wait_for(lambda: set(self.open) >= set(labels), PATIENCE_S), self.open.keys()
            assert set(self.open) == set(labels)

    def answer(self, label: str, result: Any = ..., error: Any = None) -> None:
        """Answer a call, on this thread; `...` is no value."""
        with self._sent:
            done = self.open.pop(label)
        done(None if result is ... else json.dumps(result).encode(), error)

    def scopes(self) -> list[str]:
        return []

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        return BridgeScope(scope, around, self)

    def leave(self) -> None:
        self.leaving = True
        while self.open:
            label = next(iter(self.open))
            self.answer(label, error=ConnectionLost(label, "the test", "the test"))
        self.close()

    def close(self) -> None:
        self.closed = True
