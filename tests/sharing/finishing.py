"""The last process of a run: waits until everything is handled, ends what was cut off, and reads everything."""

from __future__ import annotations

import time
from typing import Any

from linearizability.model import text_of
from sharing.clients import CONSUMERS, ORDER_KEYS, REGISTERS, Log, count, counter_arguments, number_of, told

from scopestate import Engine
from scopestate.errors import ScopestateError
from scopestate.ops import Increment

PATIENCE_S = 90.0


def finish(engine: Engine, log: Log, facts: dict[str, Any]) -> None:
    """Wait for the durable triggers, count what was cut off, and log the content of every scope."""
    for key in ORDER_KEYS:  # so that every remaining process gets an event for each key
        engine.update("orders", key, [Increment("", 1)])
    if facts["durable"]:
        wait_for_consumers(engine)
    for client, number in facts["pending"]:
        scope, kind = counter_arguments(number)
        log("end", client, number, number_of(insisted(engine, scope, kind, f"{client}-{number}")))
    for scope in engine.list_groups():
        if scope.startswith(REGISTERS):
            log("begin", "finish", scope, "items", scope, [])
            log("end", "finish", scope, sorted((key, text_of(value)) for key, value in engine.items(scope)))
        else:
            log("final", scope, dict(engine.items(scope)))
    log("finished")


def insisted(engine: Engine, scope: str, kind: str, token: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return count(engine, scope, kind, token)
        except ScopestateError as error:
            if time.monotonic() > deadline:
                raise AssertionError(told(error)) from error
            time.sleep(0.05)


def wait_for_consumers(engine: Engine) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = {one.name: one for one in engine.consumers()}
        if set(CONSUMERS) <= set(found) and not any(one.lag_events or one.in_flight for one in found.values()):
            return
        assert time.monotonic() < deadline, f"the consumers do not come to an end: {found}"
        time.sleep(0.02)
