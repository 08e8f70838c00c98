"""A write with an idempotency key, done by an engine and repeated by one that is its bridge, or the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from second_engine import OpenBridge

from scopestate import Engine, ops
from scopestate.server import Server


def batch(engine: Engine, token: str) -> Any:
    with engine.batch("s", idempotency_key=token) as batch:
        batch.set("k", 1)
        batch.update("n", [ops.Increment("", 1)])
    return batch.result


def count(tx: Any) -> int:
    tx.set("n", (tx.get("n") or 0) + 1)
    return int(tx["n"])


WRITES: dict[str, Callable[[Engine, str], Any]] = {
    "set": lambda engine, token: engine.set("s", "k", 1, idempotency_key=token),
    "set with a time to live": lambda engine, token: engine.set("s", "k", 1, ttl=100, idempotency_key=token),
    "conditional set": lambda engine, token: engine.set("s", "new", 1, if_absent=True, idempotency_key=token),
    "update": lambda engine, token: engine.update("s", "n", [ops.Increment("", 1)], idempotency_key=token),
    "delete": lambda engine, token: engine.delete("s", "gone", idempotency_key=token),
    "conditional delete": lambda engine, token: engine.delete("s", "gone", if_revision=1, idempotency_key=token),
    "compare and set": lambda engine, token: engine.compare_and_set("s", "gone", 1, 2, idempotency_key=token),
    "compare and set, absent": lambda engine, token: engine.compare_and_set("s", "x", None, 2, idempotency_key=token),
    "touch": lambda engine, token: engine.touch("s", "gone", 100, idempotency_key=token),
    "delete a range": lambda engine, token: engine.delete_range("s", prefix="gone", idempotency_key=token),
    "batch": batch,
    "transact": lambda engine, token: engine.transact("s", count, idempotency_key=token),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("local_first", [True, False])
def test_a_repetition_elsewhere_gets_the_first_answer(open_bridge: OpenBridge, name: str, local_first: bool) -> None:
    with Engine() as engine, Server(engine, port=0) as server:
        bridge = open_bridge(server.url)
        engine.set("s", "gone", 1)
        one, other = (engine, bridge) if local_first else (bridge, engine)

        first = WRITES[name](one, "token")
        content = engine.entries("s")
        again = WRITES[name](other, "token")

        assert engine.entries("s") == content
        assert getattr(again, "replayed", True)
        assert again == first or again.revision == first.revision
        bridge.close()
