"""The triggers of simulated engines: what they watch, what their handlers do, and which calls each must get."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from scopestate import StateEvent, ops
from scopestate.errors import Overloaded, ReplyTimeout, StorageError
from scopestate.ops import messages
from tests.simulation.clients import KEYS
from tests.simulation.model import Watcher, Write

if TYPE_CHECKING:
    from tests.simulation.simulator import Life

DERIVED: Final = ("interval-derived", "commit-derived")
"""Scopes that only handlers write."""


def _nothing(life: Life, event: StateEvent) -> None:
    """Do nothing with the event."""


def _fail_sometimes(life: Life, event: StateEvent) -> None:
    if event.revision % 3 == 0:
        raise ValueError("this handler fails on every third write")


def _take_time(life: Life, event: StateEvent) -> None:
    life.dispatcher.sleep(0.02)


def _derive(life: Life, event: StateEvent) -> None:
    """Write into other scopes, in each of the ways that handlers can."""
    scope = DERIVED[event.revision % 2]
    number = life.next_id()
    with contextlib.suppress(Overloaded, StorageError, ReplyTimeout):
        match event.revision % 4:
            case 0 | 1:
                life.engine.set(scope, event.key, {"id": number})
            case 2:
                life.engine.update(scope, event.key, [ops.Merge({"id": number}), ops.Increment("count", 1)])
            case 3:
                life.engine.tell(messages.Set(scope, event.key, {"id": number}))


TRIGGERS: Final[dict[str, tuple[dict[str, Any], Callable[[Life, StateEvent], None]]]] = {
    "witness": ({}, _nothing),
    "one key": ({"scope": "interval-0", "key": KEYS[1]}, _nothing),
    "odd ones": ({"scope": "commit-0", "condition_function_id": "is_odd"}, _take_time),
    "failing": ({"key": KEYS[2]}, _fail_sometimes),
    "deriving": ({"scope": "interval-1"}, _derive),
    "deriving too": ({"scope": "commit-1", "key": KEYS[0]}, _derive),
}
"""Trigger id, also the function's -> filters, and what the handler does."""


def watchers() -> list[Watcher]:
    def matcher(trigger_id: str) -> Callable[[Write, str], bool]:
        filters = TRIGGERS[trigger_id][0]
        wanted_scope, wanted_key = filters.get("scope"), filters.get("key")
        odd = "condition_function_id" in filters
        return lambda write, scope: (
            wanted_scope in (None, scope) and wanted_key in (None, write.key) and (not odd or write.sequence % 2 == 1)
        )

    return [
        Watcher(trigger_id, matcher(trigger_id), _tries_if_failing if trigger_id == "failing" else lambda _: 1)
        for trigger_id in TRIGGERS
    ]


def _tries_if_failing(write: Write) -> int:
    return 2 if write.sequence % 3 == 0 else 1
