"""scopestate as the benchmarks use it: the same batches as `peers`, and engines on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Batch, Pairs, Value
from scopestate import Engine, ops

SCOPE = "bench"
NEVER_MS = 86_400_000
"""A save interval longer than any run: saving happens when a measure asks for it."""


def on_disk(folder: Path | str, *, save_interval_ms: int = NEVER_MS) -> dict[str, Any]:
    """Return the configuration of a file_based engine in `folder`; everything else is the default."""
    kv = {"store_method": "file_based", "file_path": str(folder), "save_interval_ms": save_interval_ms}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


def set_batch(engine: Engine, scope: str = SCOPE) -> Batch:
    """`engine.set` of each pair."""
    set_value = engine.set

    def batch(pairs: Pairs) -> None:
        for key, value in pairs:
            set_value(scope, key, value)

    return batch


def get_batch(engine: Engine, scope: str = SCOPE) -> Batch:
    """`engine.get` of each key."""
    get_value = engine.get

    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            get_value(scope, key)

    return batch


def increment_batch(engine: Engine, scope: str = SCOPE) -> Batch:
    """`engine.update` of each key with one increment."""
    update = engine.update
    increment = [ops.Increment("id", 1)]

    def batch(pairs: Pairs) -> None:
        for key, _ in pairs:
            update(scope, key, increment)

    return batch


def setter(engine: Engine, scope: str = SCOPE) -> Callable[[str, Value], object]:
    """One `engine.set`, for latencies."""
    set_value = engine.set
    return lambda key, value: set_value(scope, key, value)
