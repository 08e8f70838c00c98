"""What the processes that are killed and the test that kills them agree on."""

from __future__ import annotations

from typing import Any, Final

SCOPE: Final = "orders"
EFFECTS: Final = "effects"
KEYS: Final = ("a", "b", "c", "d")
CONSUMERS: Final = {"plain", "waits", "fails", "counts", "dies"}


def settings_of(place: str, durability: str) -> dict[str, Any]:
    """Return the configuration of an engine; `place`: a directory, or the URL of a Redis."""
    adapter: dict[str, Any]
    if place.startswith("redis"):
        adapter = {"name": "redis", "config": {"redis_url": place, "events": "shared"}}
    else:
        kv = {"store_method": "file_based", "file_path": place, "save_interval_ms": 30, "durability": durability}
        adapter = {"name": "kv", "config": kv}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
